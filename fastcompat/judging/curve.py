"""What users gain and lose at every moment of a backfill, in one pass over the gallery."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _files, _inputs
from .._types import Array, ArrayLike, Backend, Metric
from . import bands, counting, gains
from .bands import NAMES, Bound
from .queries import CurveQueries
from .ranking import (
    MANY,
    Relevant,
    Space,
    average_precision,
    best_first,
    best_grades,
    cutoffs,
    full_sort_ranks,
)
from .relevance import Relevance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_STATES = 10_000


@dataclass(frozen=True, repr=False)
class BackfillCurve(Generic[Array]):
    """Retrieval quality of a gallery over the states of its backfill.

    Arrays are float64 [T], tensors or NumPy arrays as the queries were given; rates are shares of the
    counted queries.

    Attributes:
        fraction: share of the gallery that is backfilled.
        map: mean average precision over the whole mixed ranking.
        cmc: `cmc[k]`, share of the queries with a relevant item among the first k.
        negative_flips: queries whose best item is relevant in the baseline and not relevant here.
        positive_flips: queries whose best item is relevant here and not relevant in the baseline.
        ndcg: `ndcg[k]`, mean nDCG of the first k.
        mrr: mean reciprocal rank of the first relevant item.
        skipped: number of queries with no relevant item, left out of every figure.
        per_query: the same query by query, with lists of those who win and lose (of several `orders`, in the
            first one).
        low, high: the band around every curve: over several `orders` the least and the greatest, in a
            forecast the ends of the interval; None where neither was asked for.
    """

    fraction: Array
    map: Array
    cmc: dict[int, Array]
    negative_flips: Array
    positive_flips: Array
    ndcg: dict[int, Array]
    mrr: Array
    skipped: int
    per_query: CurveQueries
    low: Bound | None = None
    high: Bound | None = None

    def __repr__(self) -> str:
        quality = f"mAP {float(self.map[0]):.3f} to {float(self.map[-1]):.3f} (mean {self.auc():.3f})"
        lost = f"at most {float(self.negative_flips.max()):.1%} negative flips"
        return (
            f"BackfillCurve({len(self.fraction)} states: {quality}, {lost}, {self.skipped} queries skipped)"
        )

    def auc(self, name: str = "map") -> float:
        """Area under one curve: the mean over the states of "map", "mrr", "cmc@k" or "ndcg@k" (k of `ks`)."""
        curves = {"map": self.map} | {f"cmc@{k}": values for k, values in self.cmc.items()}
        curves |= {f"ndcg@{k}": values for k, values in self.ndcg.items()} | {"mrr": self.mrr}
        _checks.choice("name", name, tuple(curves))
        return float(curves[name].mean())

    def to_dict(self) -> dict[str, Any]:
        """The curve, without its queries, as plain numbers and lists under the attributes' names."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(values) for k, values in value.items()}
            if isinstance(value, Bound):
                return {name: plain(getattr(value, name)) for name in NAMES}
            return value if isinstance(value, int) else value.tolist()

        names = [field.name for field in fields(self) if field.name != "per_query"]
        return {name: plain(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def plot(self, path: str | Path | None = None) -> Figure:
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
    old: ArrayLike,
    query_new: ArrayLike,
    new: ArrayLike,
    query_labels: ArrayLike | None = None,
    gallery_labels: ArrayLike | None = None,
    *,
    relevance: Relevance | None = None,
    order: ArrayLike | None = None,
    orders: int = 1,
    states: int = 22,
    ks: Sequence[int] = (1, 5, 10),
    metric: Metric = "cosine",
    baseline: tuple[ArrayLike, ArrayLike] | None = None,
    exclude: ArrayLike | None = None,
    exclude_groups: tuple[ArrayLike, ArrayLike] | None = None,
    gain: str = "linear",
    seed: int = 0,
    backend: Backend = "auto",
) -> BackfillCurve[Array]:
    """Exact mAP, CMC, nDCG, MRR and flips at every state of a backfill, in one pass over the gallery.

    In state t = 0 .. T-1 the first `c_t = floor(t * N / (T-1))` items of `order` are backfilled. Items are
    ranked by the score in their own space (`fastcompat.mixed_topk` with its default scale and offset): new
    vector and new query if backfilled, old vector and old query if not. mAP, CMC, nDCG and MRR are those of
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
            in either space runs the reference). What `fastcompat.topk` takes; anything but a tensor gives
            NumPy arrays back.
        old: [N, D_old]. Of two dtypes in one space the wider one is computed in; a narrower gallery is copied
            into it.
        query_new: [Q, D_new], the same queries in the new space.
        new: [N, D_new].
        query_labels: [Q] whole numbers, or strings on both sides. A gallery item with the same label is
            relevant; a negative label equals none (a warning says so where there are any but -1).
        gallery_labels: [N].
        relevance: judged pairs instead of labels.
        order: [N] whole numbers, a permutation of the gallery ids, first to be backfilled first (None:
            random from `seed`).
        orders: how many random orders (from `seed`, `seed + 1`, ...) the curves are the mean of; with 2 or
            more `.low` and `.high` are the least and the greatest of them.
        states: T, from 2 to 10,000.
        ks: the cut-offs k of CMC@k.
        metric: "cosine", "ip" or "l2".
        baseline: (query [Q, D_b], gallery [N, D_b]) of the system that flips are counted against, ranked in
            its own space (None: state 0).
        exclude: [Q] or [Q, E] whole numbers, for each query gallery ids that are neither ranked nor relevant,
            such as the query itself (-1: none).
        exclude_groups: (query_groups [Q], gallery_groups [N]), labels of both sides: items of the query's
            group are neither ranked nor relevant, such as those of the same camera (negative: no group).
        gain: what a grade g is worth in nDCG: "linear" g, "exp" 2^g - 1.
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
    seed = _checks.whole("seed", seed)
    cuts = state_cuts(states, len(mixed.old.gallery), mixed.old.query.device)  # [T]
    ks, orders = cutoffs(ks), _checks.positive_int("orders", orders)
    if orders > 1 and order is not None:
        raise ValueError("`orders` must be 1 where `order` is given: several orders are drawn at random")
    _checks.choice("gain", gain, gains.GAINS)
    relevant = Relevant(
        mixed.old.query,
        mixed.old.gallery,
        query_labels,
        gallery_labels,
        exclude,
        ("query_old", "old"),
        relevance,
        exclude_groups,
    )
    for space in (mixed.old, mixed.new, base):
        if space is not None:
            space.refuse_nonfinite(relevant.counted)
    device, count = mixed.old.query.device, len(mixed.old.gallery)
    curves = []
    for draw in range(orders):
        walk = permutation(order, count, seed + draw, device)  # [N]
        found = _tables(mixed, base, relevant, walk, cuts, ks, gain)
        curves.append(_curve(found, relevant, cuts.double() / max(count, 1), query_old))
    return curves[0] if orders == 1 else _mean(curves)


def _tables(
    mixed: _MixedSpace,
    base: Space | None,
    relevant: Relevant,
    walk: Tensor,
    cuts: Tensor,
    ks: Sequence[int],
    gain: str,
) -> dict[str, Any]:
    """Every figure of every query in every state, [T, Q]."""
    states, queries, device = len(cuts), len(mixed.old.query), cuts.device

    def table(value: float | bool, dtype: torch.dtype) -> Tensor:
        return torch.full((states, queries), value, dtype=dtype, device=device)

    ap, rr = (table(torch.nan, torch.float64) for _ in range(2))
    ndcg = {k: table(torch.nan, torch.float64) for k in ks}
    top1, lost, won = (table(False, torch.bool) for _ in range(3))
    hits = {k: torch.zeros(states, dtype=torch.int64, device=device) for k in ks}
    without_table = mixed.native and (base is None or base.native)
    per_query = 0 if without_table else len(walk)
    for q, ids, grades in relevant.blocks(per_item=2 * states, per_query=per_query):
        left_out = relevant.excluded(q)
        spread = None if grades is None else grades[:, None]  # [B, 1, P]
        ranks, found, sorted_grades = best_first(
            mixed.ranks(q, ids, left_out, walk, cuts), spread
        )  # [B, T, P], [B, T]
        ap[:, q] = average_precision(ranks, found).T
        rr[:, q] = 1 / (ranks[..., 0] + 1).double().T
        ideal = best_grades(ids, grades)
        ideal = None if ideal is None else ideal[:, None]
        for k, values in gains.ndcg(ranks, sorted_grades, found, ideal, ks, gain).items():
            ndcg[k][:, q] = values.T
        for k in ks:
            hits[k] += (ranks[..., 0] < k).sum(0)
        right = ranks[..., 0] == 0  # [B, T]
        before = right[:, :1]
        if base is not None:
            before = (base.ranks(q, ids, left_out) == 0).any(1, keepdim=True)
        top1[:, q], lost[:, q], won[:, q] = right.T, (before & ~right).T, (right & ~before).T
    return {"ap": ap, "rr": rr, "ndcg": ndcg, "top1": top1, "lost": lost, "won": won, "hits": hits}


def _curve(tables: dict[str, Any], relevant: Relevant, fraction: Tensor, like: Any) -> BackfillCurve[Any]:
    """The means over the counted queries."""
    counted = relevant.counted

    def share(number: Tensor) -> Any:
        return as_given(number.double() / len(counted))

    def mean(table: Tensor) -> Any:
        return as_given(torch.stack([each[counted].mean() for each in table]))

    def as_given(values: Tensor) -> Any:
        return _checks.like_input((values,), like)[0]

    return BackfillCurve(
        fraction=as_given(fraction),
        map=mean(tables["ap"]),
        cmc={k: share(number) for k, number in tables["hits"].items()},
        negative_flips=share(tables["lost"].sum(1)),
        positive_flips=share(tables["won"].sum(1)),
        ndcg={k: mean(table) for k, table in tables["ndcg"].items()},
        mrr=mean(tables["rr"]),
        skipped=relevant.skipped,
        per_query=CurveQueries(
            **{name: as_given(tables[name]) for name in ("ap", "rr", "top1", "lost", "won")},
            ndcg={k: as_given(table) for k, table in tables["ndcg"].items()},
            fraction=as_given(fraction),
        ),
    )


def _mean(curves: Sequence[BackfillCurve[Any]]) -> BackfillCurve[Any]:
    """The mean of curves over several orders, with the least and the greatest as a band."""
    mean, low, high = bands.over(curves)
    return replace(curves[0], **{name: getattr(mean, name) for name in NAMES}, low=low, high=high)


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
        turn[order] = torch.arange(len(order), dtype=torch.int64, device=order.device)
        if not self.native:
            return self._ranks_state_by_state(q, ids, exclude, order, turn, cuts)
        if len(order) and ids.shape[1] >= MANY * len(order):
            everything = torch.arange(len(order), dtype=torch.int64, device=ids.device).expand(len(q), -1)
            old, new = (space.pair_scores(q, everything) for space in (self.old, self.new))
            return counting.mixed_ranks(old, new, ids, exclude, turn, cuts)
        return self._ranks_in_one_pass(q, ids, exclude, order, turn, cuts)

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


def state_cuts(states: int, count: int, device: torch.device) -> Tensor:
    """How many items are backfilled in each state [T]."""
    states = _checks.positive_int("states", states)
    if states < 2:
        raise ValueError(f"`states` must be at least 2, the old gallery and the new one: got {states}")
    if states > MAX_STATES:
        raise ValueError(
            f"`states` must be at most {MAX_STATES:,}: got {states:,}; every state takes memory and "
            f"time, and from one of {MAX_STATES:,} to the next {1 / MAX_STATES:.2%} of the gallery changes"
        )
    return torch.arange(states, dtype=torch.int64, device=device) * count // (states - 1)


def permutation(value: Any, count: int, seed: int, device: torch.device) -> Tensor:
    """`order` as it was given, checked, or a random one."""
    if value is None:
        # Drawn on the CPU, so that a seed means the same order on every device.
        generator = torch.Generator("cpu").manual_seed(seed)
        return torch.randperm(count, dtype=torch.int64, device="cpu", generator=generator).to(device)
    order = _inputs.rows("order", value, None)
    if order.shape != (count,):
        raise ValueError(
            f"`order` must hold each of the {count} gallery ids once: got shape {list(order.shape)}; "
            f"give all of them, first to be backfilled first"
        )
    order = order.to(device)
    everyone = torch.arange(count, dtype=torch.int64, device=device)
    wrong = (order.sort().values != everyone).nonzero()
    if len(wrong):
        present = torch.zeros(count, dtype=torch.bool, device=device)
        present[order[(order >= 0) & (order < count)]] = True
        missing = int((~present).nonzero()[0])
        raise ValueError(
            f"`order` must be a permutation of the gallery ids 0 .. {count - 1}: id {missing} is missing; "
            f"name every id once"
        )
    return order
