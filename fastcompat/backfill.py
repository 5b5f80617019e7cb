"""What users gain and lose at every moment of a backfill, in one pass over the gallery."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _files
from ._ranking import Relevant, Space, average_precision, best_first, cutoffs, full_sort_ranks
from .functional import Array


@dataclass(frozen=True)
class BackfillCurve:
    """Retrieval quality of a gallery over the states of its backfill.

    Arrays are float64 [T], tensors or NumPy arrays as the queries were given; rates are shares of the
    counted queries.

    Attributes:
        fraction: share of the gallery that is backfilled.
        map: mean average precision over the whole mixed ranking.
        cmc: `cmc[k]`, share of the queries with a relevant item among the first k.
        negative_flips: queries whose best item is relevant in the baseline and not relevant here.
        positive_flips: queries whose best item is relevant here and not relevant in the baseline.
        skipped: number of queries with no relevant item, left out of every figure.
    """

    fraction: Any
    map: Any
    cmc: dict[int, Any]
    negative_flips: Any
    positive_flips: Any
    skipped: int

    def auc(self, name: str = "map") -> float:
        """Area under one curve: the plain mean over the states of "map" or "cmc@k" (k one of `ks`)."""
        curves = {"map": self.map} | {f"cmc@{k}": values for k, values in self.cmc.items()}
        _checks.choice("name", name, tuple(curves))
        return float(curves[name].mean())

    def to_dict(self) -> dict[str, Any]:
        """The curve as plain numbers and lists under the attributes' names, ready for JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(values) for k, values in value.items()}
            return value if isinstance(value, int) else value.tolist()

        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curve with matplotlib; write it to `path` if given (the ending says the format).

        Returns:
            The `matplotlib.figure.Figure`: quality on the left, flips on the right.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("`plot` needs matplotlib: install fastcompat[demo]") from None
        data = self.to_dict()
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        quality, flips = figure.subplots(1, 2)
        backfilled = [100 * share for share in data["fraction"]]
        quality.plot(backfilled, data["map"], marker=".", label=f"mAP (mean {self.auc('map'):.3f})")
        for k, values in data["cmc"].items():
            quality.plot(backfilled, values, marker=".", label=f"CMC@{k} (mean {self.auc(f'cmc@{k}'):.3f})")
        for name, color in (("negative", "tab:red"), ("positive", "tab:green")):
            shares = [100 * share for share in data[f"{name}_flips"]]
            flips.plot(backfilled, shares, marker=".", color=color, label=f"{name} flips")
        quality.set_ylabel("retrieval quality")
        flips.set_ylabel("top-1 against the baseline, % of queries")
        for axes in (quality, flips):
            axes.set_xlabel("gallery backfilled, %")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2)
        if path is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format=Path(path).suffix[1:] or None)
            _files.write_file(path, buffer.getvalue())
        return figure


def backfill_curve(
    query_old: Array,
    old: Array,
    query_new: Array,
    new: Array,
    query_labels: Array,
    gallery_labels: Array,
    *,
    order: Array | None = None,
    states: int = 22,
    ks: Sequence[int] = (1, 5, 10),
    metric: str = "cosine",
    baseline: tuple[Array, Array] | None = None,
    exclude: Array | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> BackfillCurve:
    """Exact mAP, CMC and flips at every state of a backfill, in one pass over the gallery.

    In state t = 0 .. T-1 the first `c_t = floor(t * N / (T-1))` items of `order` are backfilled. Items are
    ranked by the score in their own space (`fastcompat.mixed_topk` with its default scale and offset): new
    vector and new query if backfilled, old vector and old query if not. mAP and CMC are those of
    `fastcompat.retrieval_metrics` on that ranking; states 0 and T-1 equal the pure old and the pure new
    system exactly.

    One pass replaces T evaluations. With `u` the score of a relevant item p in the state asked for (its old
    score before its turn, its new score after), and block b the items `order[c_b : c_(b+1)]`::

        rank_t(p) = sum over b <  t of #{j in block b : new score of j beats u}
                  + sum over b >= t of #{j in block b : old score of j beats u}

    where "beats" is a greater score, or an equal score and a smaller gallery id. So every item is scored
    once in each space and compared with both scores of each p; memory does not grow with Q * N.

    A negative flip is a query whose best item is relevant in the baseline and not in state t; a positive
    flip the reverse (Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible
    Training", ICLR 2022, arXiv 2201.09724; reconstructed from the paper's text). States and area follow
    FastFill (Jaeckle et al., ICLR 2023, arXiv 2303.04766; authors' code).

    Args:
        query_old: [Q, D_old], the queries in the old space; float32, bfloat16, float16 or float64 (float64
            in either space runs the reference). Torch tensors, or NumPy arrays, which give NumPy arrays back.
        old: [N, D_old], of the same dtype.
        query_new: [Q, D_new], the same queries in the new space.
        new: [N, D_new], of the same dtype as `query_new`.
        query_labels: [Q] int64. A gallery item with the same label is relevant; a negative label equals none.
        gallery_labels: [N] int64.
        order: [N] int64, a permutation of the gallery ids, first to be backfilled first (None: random from
            `seed`).
        states: T, at least 2.
        ks: the cut-offs k of CMC@k.
        metric: "cosine", "ip" or "l2".
        baseline: (query [Q, D_b], gallery [N, D_b]) of the system that flips are counted against, ranked in
            its own space (None: state 0).
        exclude: [Q] int64, for each query a gallery id that is neither ranked nor relevant, such as the
            query itself (-1: none).
        seed: seed of the random order.
        backend: "auto", "native" or "reference" (T independent evaluations by a full stable sort).

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read, naming the first.
    """
    mixed = _MixedSpace(
        Space(query_old, old, ("query_old", "old"), metric, backend),
        Space(query_new, new, ("query_new", "new"), metric, backend),
    )
    base = _baseline(baseline, mixed.old, metric, backend)
    states, seed = _checks.positive_int("states", states), _checks.whole("seed", seed)
    if states < 2:
        raise ValueError(f"`states` must be at least 2, the old gallery and the new one: got {states}")
    ks = cutoffs(ks)
    relevant = Relevant(
        mixed.old.query, mixed.old.gallery, query_labels, gallery_labels, exclude, ("query_old", "old")
    )
    for space in (mixed.old, mixed.new, base):
        if space is not None:
            space.refuse_nonfinite(relevant.counted)
    device, count = mixed.old.query.device, len(mixed.old.gallery)
    walk = _permutation(order, count, seed, device)  # [N]
    cuts = torch.arange(states, device=device) * count // (states - 1)  # [T]

    ap = torch.zeros(states, len(mixed.old.query), dtype=torch.float64, device=device)  # [T, Q]
    hits = {k: torch.zeros(states, dtype=torch.int64, device=device) for k in ks}
    lost, won = (torch.zeros(states, dtype=torch.int64, device=device) for _ in range(2))
    without_table = mixed.native and (base is None or base.native)
    for q, ids in relevant.blocks(per_item=2 * states, per_query=0 if without_table else count):
        left_out = relevant.excluded(q)
        ranks, found = best_first(mixed.ranks(q, ids, left_out, walk, cuts))  # [B, T, P], [B, T]
        ap[:, q] = average_precision(ranks, found).T
        for k in ks:
            hits[k] += (ranks[..., 0] < k).sum(0)
        right = ranks[..., 0] == 0  # [B, T]
        before = right[:, :1]
        if base is not None:
            before = (base.ranks(q, ids, left_out) == 0).any(1, keepdim=True)
        lost += (before & ~right).sum(0)
        won += (right & ~before).sum(0)

    def share(number: Tensor) -> Tensor:
        return number.double() / len(relevant.counted)

    def as_given(values: Tensor) -> Any:
        return values.numpy() if isinstance(query_old, np.ndarray) else values

    mean_ap = [each[relevant.counted].mean() for each in ap]
    return BackfillCurve(
        fraction=as_given(cuts.double() / max(count, 1)),
        map=as_given(torch.stack(mean_ap)),
        cmc={k: as_given(share(number)) for k, number in hits.items()},
        negative_flips=as_given(share(lost)),
        positive_flips=as_given(share(won)),
        skipped=relevant.skipped,
    )


class _MixedSpace:
    """The old and the new space of one gallery, and the ranks of a gallery that is on its way between
    them."""

    def __init__(self, old: Space, new: Space) -> None:
        _checks.rows("query_new", new.query, "query_old", old.query)
        _checks.rows("new", new.gallery, "old", old.gallery)
        _checks.same_device("new", new.gallery, "old", old.gallery)
        self.old, self.new = old, new
        self.native = old.native = new.native = old.native and new.native

    def ranks(self, q: Tensor, ids: Tensor, exclude: Tensor | None, order: Tensor, cuts: Tensor) -> Tensor:
        """Rank [B, T, P] of the items `ids` in every state; -1 where the id is -1."""
        turn = torch.empty_like(order)  # [N], position of each item in the backfill order
        turn[order] = torch.arange(len(order), device=order.device)
        how = self._ranks_in_one_pass if self.native else self._ranks_state_by_state
        return how(q, ids, exclude, order, turn, cuts)

    def _ranks_in_one_pass(
        self, q: Tensor, ids: Tensor, exclude: Tensor | None, order: Tensor, turn: Tensor, cuts: Tensor
    ) -> Tensor:
        # Every item is a target twice: with its old score and with its new score.
        twice = torch.cat([ids, ids], 1)  # [B, 2P]
        own = torch.cat([space.pair_scores(q, ids) for space in (self.old, self.new)], 1)
        in_old, in_new = (
            F.pad(space.count_beats(q, order, cuts, own, twice, exclude).cumsum(2), (1, 0))
            for space in (self.old, self.new)
        )  # [B, 2P, T]: beaten by how many of the items before each cut
        ranks = (in_new + in_old[..., -1:] - in_old).transpose(1, 2)  # [B, T, 2P]
        with_old, with_new = ranks.chunk(2, dim=2)
        done = turn[ids.clamp(min=0)][:, None] < cuts[:, None]  # [B, T, P]
        return torch.where(done, with_new, with_old).masked_fill(ids[:, None] < 0, -1)

    def _ranks_state_by_state(
        self, q: Tensor, ids: Tensor, exclude: Tensor | None, order: Tensor, turn: Tensor, cuts: Tensor
    ) -> Tensor:
        old, new = self.old.scores(q, ids), self.new.scores(q, ids)  # [B, N]
        states = [full_sort_ranks(torch.where(turn < cut, new, old), ids, exclude) for cut in cuts]
        return torch.stack(states, 1)


def _baseline(value: Any, old: Space, metric: str, backend: str) -> Space | None:
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"`baseline` must be a pair (query, gallery): got {type(value).__name__}")
    query, gallery = value
    space = Space(query, gallery, ("baseline[0]", "baseline[1]"), metric, backend)
    _checks.rows("baseline[0]", space.query, "query_old", old.query)
    _checks.rows("baseline[1]", space.gallery, "old", old.gallery)
    _checks.same_device("baseline[0]", space.query, "query_old", old.query)
    return space


def _permutation(value: Any, count: int, seed: int, device: torch.device) -> Tensor:
    if value is None:
        # Drawn on the CPU, so that a seed means the same order on every device.
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(device)
    order = _checks.as_tensor("order", value)
    if order.dtype != torch.int64:
        raise TypeError(f"`order` must be int64: got {order.dtype}; convert it with `order.long()` first")
    if order.shape != (count,):
        raise ValueError(
            f"`order` must hold each of the {count} gallery ids once: got shape {list(order.shape)}; "
            f"give all of them, first to be backfilled first"
        )
    order = order.to(device)
    wrong = (order.sort().values != torch.arange(count, device=device)).nonzero()
    if len(wrong):
        present = torch.zeros(count, dtype=torch.bool, device=device)
        present[order[(order >= 0) & (order < count)]] = True
        missing = int((~present).nonzero()[0])
        raise ValueError(
            f"`order` must be a permutation of the gallery ids 0 .. {count - 1}: id {missing} is missing; "
            f"name every id once"
        )
    return order
