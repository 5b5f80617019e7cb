"""Search in a gallery that is only partly re-embedded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _checks, _inputs, _promoted, _search
from .._types import Array, ArrayLike, Backend, Metric, Segment
from ..reference import mapped as mapped_scores
from .both import blended


def mixed_topk(
    query_old: Array,
    old: ArrayLike,
    query_new: ArrayLike,
    new: ArrayLike,
    backfilled: ArrayLike,
    k: int,
    *,
    metric: Metric = "cosine",
    scale: Sequence[float | ArrayLike] = (1.0, 1.0),
    offset: Sequence[float | ArrayLike] = (0.0, 0.0),
    both: ArrayLike | None = None,
    blend: float = 0.0,
    backend: Backend = "auto",
) -> tuple[Array, Array]:
    """The best k items of a half-upgraded gallery, each item ranked by the score in its own space.

    An item j that is not backfilled counts with its old vector and the old query, a backfilled one with its
    new vector and the new query; one list is sorted by::

        score_ij = scale[0] * s(query_old_i, old_j) + offset[0]     if not backfilled[j]
                   scale[1] * s(query_new_i, new_j) + offset[1]     if backfilled[j]

    Scale and offset are numbers, or vectors [B] with a number for each query, such as those of
    `fastcompat.Calibrator.affine`: then all scores are comparable. Where one space holds all items and its
    scale is above 0, they are ranked by `s` itself and the map is applied to what is returned.

    An item of `both` keeps two vectors and counts by a blend of them, with t_old and t_new the two lines
    above::

        score_ij = (1 - blend) * t_old_ij + blend * t_new_ij

    (`fastcompat.bounded_blend` says how far `blend` may go.) Such items are copied into rows of
    `D_old + D_new` numbers for the call; with blend 0 and 1 they are plain items of one space, exactly.

    With the defaults and "cosine" this is the distance rank merge of Seo et al., "Online Backfilling with
    No Regret for Large-Scale Image Retrieval" (arXiv 2301.03767; reconstructed from the paper's text). Both
    parts share one running threshold per query: one pass over the N items, no merging afterwards. With
    nothing or everything backfilled the result is that of `fastcompat.topk` on `old` or on `new`, exactly.

    Args:
        query_old: [B, D_old], or one vector [D_old], the queries in the old space; float32, bfloat16, float16
            or float64 (float64 runs the reference). What `fastcompat.topk` takes; anything but a tensor gives
            NumPy arrays back.
        old: [N, D_old]; of two dtypes the wider one is computed in, as in `fastcompat.topk`. Rows of
            backfilled items are never read and may hold anything.
        query_new: [B, D_new], or [D_new], the same queries in the new space.
        new: [N, D_new]. Rows of items not yet backfilled are never read.
        backfilled: [N] bool.
        k: how many items to return.
        metric: "cosine", "ip" or "l2" (score = minus the squared distance).
        scale: factors of the old and of the new scores: two numbers or vectors [B].
        offset: numbers or vectors [B] added to the old and to the new scores.
        both: [N] bool, the items whose old and new vectors both count, whatever `backfilled` says (None: no
            item).
        blend: weight of the new model for those, from 0 to 1.
        backend: "auto", "native" or "reference".

    Returns:
        scores [B, k] and ids [B, k] (int64), best first; of two equal scores the smaller id first; score
        -inf and id -1 where there are fewer than k items. [k] for one vector.

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read, naming the first.
    """
    names = (("query_old", "old"), ("query_new", "new"))
    q_old, x_old, single = _inputs.pair(names[0], query_old, old, single=True)
    q_new, x_new, also_single = _inputs.pair(names[1], query_new, new, single=True)
    one_or_many(single, also_single, "query_old", "query_new")
    pairs = [(q_old, x_old), (q_new, x_new)]
    _checks.rows("query_new", pairs[1][0], "query_old", pairs[0][0])
    _checks.rows("new", pairs[1][1], "old", pairs[0][1])
    _checks.same_device("new", pairs[1][1], "old", pairs[0][1])
    done = _inputs.flags("backfilled", backfilled, ("old", x_old))
    k = _checks.positive_int("k", k)
    _checks.choice("metric", metric, _checks.METRICS)
    scales, offsets = _two("scale", scale, pairs), _two("offset", offset, pairs)
    native = all([_checks.use_native(backend, query) for query, _ in pairs])
    sides = [Segment(*pairs[s], None, scales[s], offsets[s]) for s in (0, 1)]
    old_side, new_side, mixed = ~done, done, torch.zeros_like(done)
    if not isinstance(blend, (int, float)) or isinstance(blend, bool) or not 0 <= blend <= 1:
        raise ValueError(f"`blend` must be a number from 0 to 1: got {blend!r}")
    if both is not None:
        mixed = _inputs.flags("both", both, ("old", x_old))
        old_side, new_side = old_side & ~mixed, new_side & ~mixed
        if blend in (0, 1):
            old_side, new_side = old_side | (mixed & (blend == 0)), new_side | (mixed & (blend == 1))
            mixed = torch.zeros_like(done)
    if metric == "l2" and mixed.any() and not all(isinstance(x, float) and x >= 0 for x in scales):
        raise ValueError(
            '`scale` must be two numbers, not below 0, where items of `both` are blended by metric="l2": '
            "squared distances that each query weighs differently are no distance of one vector; take "
            'blend 0 or 1, or metric="cosine"'
        )

    parts: list[Segment] = []
    used: list[tuple[str, str]] = []
    for s, counts in enumerate((old_side, new_side)):
        rows = counts.nonzero()[:, 0]
        # A side without items is left out, so nothing of it is read; an empty gallery keeps the old side.
        if len(rows) or (s == 0 and not len(done)):
            every = len(rows) == len(done)
            parts.append(sides[s]._replace(rows=None if every else rows))
            used.append(names[s])
    rows = mixed.nonzero()[:, 0]
    if len(rows):
        for side, name in zip(sides, names, strict=True):
            _search.refuse_nonfinite(side.query, side.keys, name, rows)
        parts.append(blended(sides, rows, float(blend), metric))
        used.append(names[1])
    found = one_space(parts, k, metric, native, used) or _promoted.topk(
        parts, k, metric, native=native, names=used
    )
    found = (found[0][0], found[1][0]) if single else found
    best, ids = _checks.like_input(found, query_old)
    return best, ids


def one_space(
    parts: list[Segment], k: int, metric: str, native: bool, names: list[tuple[str, str]]
) -> tuple[Tensor, Tensor] | None:
    """A single rising segment, ranked by its own scores and mapped then; None where there is no such."""
    if len(parts) != 1:
        return None
    part = parts[0]
    scale = torch.as_tensor(part.scale, dtype=torch.float64, device=part.query.device)
    if not (scale > 0).all():
        return None
    plain = part._replace(scale=1.0, offset=0.0)
    scores, ids = _promoted.topk([plain], k, metric, native=native, names=names)
    if isinstance(part.scale, float) and (part.scale, part.offset) == (1.0, 0.0):
        return scores, ids
    mapped = mapped_scores(scores.double(), part.scale, part.offset).to(scores.dtype)
    beyond = (mapped.isinf() & (ids >= 0)).any(1).nonzero()
    if len(beyond):
        _checks.refuse_overflow(int(beyond[0]), names[0][0])
    return mapped, ids


def _two(
    name: str, value: Sequence[float | ArrayLike], pairs: list[tuple[Tensor, Tensor]]
) -> list[float | Tensor]:
    """For the old and for the new scores: a finite number, or a float32 vector [B]."""
    if not isinstance(value, (tuple, list)) or all(not hasattr(x, "shape") or x.shape == () for x in value):
        return list(two_numbers(name, value))  # type: ignore[arg-type]
    if len(value) != 2:
        raise ValueError(
            f"`{name}` must be a pair, for the old and for the new scores: got {len(value)} entries"
        )
    found: list[float | Tensor] = []
    for s, (x, (query, _)) in enumerate(zip(value, pairs, strict=True)):
        if not hasattr(x, "shape") or x.shape == ():
            found.append(two_numbers(name, (x, x))[0])
            continue
        own = f"{name}[{s}]"
        vector = _inputs.vectors(own, x)
        if vector.shape != (len(query),):
            raise ValueError(
                f"`{own}` must have one number per query, [{len(query)}]: got shape {list(vector.shape)}"
            )
        vector = vector.detach().to(query.device, torch.float32)
        bad = (~vector.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"`{own}` must be finite: entry {int(bad[0])} is {float(vector[int(bad[0])])}")
        found.append(vector)
    return found


def one_or_many(first: bool, second: bool, *names: str) -> None:
    """Both queries are one vector [D], or both are several [B, D]."""
    if first != second:
        one, several = names if first else names[::-1]
        raise ValueError(f"`{one}` must have 2 dimensions, as `{several}` has: got one vector")


def two_numbers(name: str, value: Sequence[float]) -> tuple[float, float]:
    """A finite number for the old scores and one for the new."""
    try:
        first, second = (float(number) for number in value)
    except (TypeError, ValueError):
        raise ValueError(
            f"`{name}` must be two numbers, for the old and for the new scores: got {value!r}; "
            f"write {name}=(1.0, 1.0)"
        ) from None
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ValueError(f"`{name}` must be finite: got {value!r}")
    return first, second
