"""Search in a gallery that is only partly re-embedded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .. import _checks, _inputs, _promoted
from .._types import Array, ArrayLike, Backend, Metric, Segment


def mixed_topk(
    query_old: Array,
    old: ArrayLike,
    query_new: ArrayLike,
    new: ArrayLike,
    backfilled: ArrayLike,
    k: int,
    *,
    metric: Metric = "cosine",
    scale: Sequence[float] = (1.0, 1.0),
    offset: Sequence[float] = (0.0, 0.0),
    backend: Backend = "auto",
) -> tuple[Array, Array]:
    """The best k items of a half-upgraded gallery, each item ranked by the score in its own space.

    An item j that is not backfilled counts with its old vector and the old query, a backfilled one with its
    new vector and the new query; one list is sorted by::

        score_ij = scale[0] * s(query_old_i, old_j) + offset[0]     if not backfilled[j]
                   scale[1] * s(query_new_i, new_j) + offset[1]     if backfilled[j]

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
        scale: factors of the old and of the new scores.
        offset: numbers added to the old and to the new scores.
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
    scales, offsets = two_numbers("scale", scale), two_numbers("offset", offset)
    native = all([_checks.use_native(backend, query) for query, _ in pairs])

    parts: list[Segment] = []
    used: list[tuple[str, str]] = []
    for s, counts in enumerate((~done, done)):
        rows = counts.nonzero()[:, 0]
        # A side without items is left out, so nothing of it is read; an empty gallery keeps the old side.
        if len(rows) or (s == 0 and not len(done)):
            every = len(rows) == len(done)
            parts.append(Segment(*pairs[s], None if every else rows, scales[s], offsets[s]))
            used.append(names[s])
    found = _promoted.topk(parts, k, metric, native=native, names=used)
    found = (found[0][0], found[1][0]) if single else found
    best, ids = _checks.like_input(found, query_old)
    return best, ids


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
