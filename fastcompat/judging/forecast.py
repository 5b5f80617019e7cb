"""The curve of a backfill before it begins: from old vectors, a sample, and the judged relevant items."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _inputs
from . import expected, gains
from .bands import NAMES, Bound
from .curve import BackfillCurve, permutation, state_cuts
from .queries import CurveQueries
from .ranking import Relevant, Space, best_grades, cutoffs
from .relevance import Relevance
from .tails import BINS, Tails

LEAST = 20  # sampled items that no query is judged by
_BACKGROUND = 4096  # sampled items that the tails are made of, at most
_GROUPS = 8  # of the jackknife


@torch.no_grad()
def forecast_curve(
    query_old: Any,
    old: Any,
    query_new: Any,
    sample_ids: Any,
    sample_new: Any,
    query_labels: Any = None,
    gallery_labels: Any = None,
    *,
    relevant_new: Any = None,
    relevant_ids: Any = None,
    relevance: Relevance | None = None,
    order: Any = None,
    states: int = 22,
    ks: Sequence[int] = (1, 5, 10),
    metric: str = "cosine",
    exclude: Any = None,
    exclude_groups: Any = None,
    gain: str = "linear",
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> BackfillCurve[Any]:
    """Forecast `backfill_curve` from the new vectors of a random sample and of the judged relevant items.

    Embed about 5 % of the gallery, drawn at random, and every item that some query is judged by::

        relevance = fc.Relevance(query, item, grade)
        judged = relevance.item[relevance.grade >= 1].unique()
        sample = np.random.default_rng(0).choice(len(old), len(old) // 20, replace=False)
        curve = fc.forecast_curve(query_old, old, query_new, sample, encode(sample),
                                  relevant_new=encode(judged), relevance=relevance)
        curve.map, curve.low.map, curve.high.map

    In a state a relevant item is beaten by items with their old vector, all counted exactly; by items with
    their new vector that was embedded, counted exactly; and by a binomial number of the others, whose
    probability `fastcompat.judging.tails` estimates from the sample and from all old scores. The figures are
    expectations over that number, corrected for the bias of a small sample by the jackknife over 8 groups of
    it (Quenouille 1956).

    The band from `.low` to `.high` is for the curve of *all* queries of the kind that were judged, over this
    gallery and this order: it holds the whole curve, all states at once, with probability `level` (bootstrap
    over queries, jackknife over the sample, quantile of the largest deviation in standard errors; rates by
    Wilson's interval with that quantile). `.per_query` holds
    expectations: `top1`, `lost` and `won` are probabilities, float64.

    Args:
        query_old: [Q, D_old], the judged queries in the old space; float64 is rounded to float32.
        old: [N, D_old], the whole gallery.
        query_new: [Q, D_new], the same queries in the new space.
        sample_ids: [S] row numbers of a random sample of the gallery, each once.
        sample_new: [S, D_new], their new vectors.
        query_labels: [Q], as in `backfill_curve`.
        gallery_labels: [N].
        relevant_new: [R, D_new], new vectors of all items that are relevant to some query (None: all of them
            are in the sample).
        relevant_ids: [R] their row numbers (None: every item that is relevant to some query, ascending).
        relevance: judged pairs instead of labels.
        order, states, ks, metric, exclude, exclude_groups, gain: as in `backfill_curve`.
        level: coverage of the band, between 0 and 1.
        samples: resamples of the queries.
        seed: seed of the random order, of the groups and of the resamples.

    Raises:
        ValueError, TypeError: arguments that do not fit; a relevant item without a new vector; fewer than 20
            sampled items that no query is judged by (it says how many more); fewer than 2 counted queries.
    """
    before = _space(query_old, old, ("query_old", "old"), metric)
    ks, samples = cutoffs(ks), _checks.positive_int("samples", samples)
    _checks.choice("gain", gain, gains.GAINS)
    if not isinstance(level, float) or not 0 < level < 1:
        raise ValueError(f"`level` must be a number between 0 and 1, such as 0.95: got {level!r}")
    names = ("query_old", "old")
    relevant = Relevant(
        before.query, before.gallery, query_labels, gallery_labels, exclude, names, relevance, exclude_groups
    )
    if len(relevant.counted) < 2:
        raise ValueError(
            "`query_old` must hold at least 2 queries with a relevant item, one says nothing about others: "
            f"got {len(relevant.counted)}"
        )
    count, device = len(before.gallery), before.query.device
    judged = relevant.items()  # [R']
    known, vectors, sampled = _known(
        count, before, judged, sample_ids, sample_new, relevant_ids, relevant_new
    )
    after = _space(query_new, vectors, ("query_new", "sample_new"), metric)
    _checks.rows("query_new", after.query, "query_old", before.query)
    for space in (before, after):
        space.refuse_nonfinite(relevant.counted)
    walk = permutation(order, count, _checks.whole("seed", seed), device)
    cuts = state_cuts(states, count, device)
    random = torch.Generator("cpu").manual_seed(seed)

    is_known = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, known, True)
    is_judged = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, judged, True)
    others = (~is_known).nonzero()[:, 0]  # [U]
    background = (sampled & ~is_judged[known]).nonzero()[:, 0]  # rows of `known`
    if len(others) and len(background) < LEAST:
        raise ValueError(
            f"`sample_ids` must hold at least {LEAST} items that no query is judged by: got "
            f"{len(background)}; embed {LEAST - len(background)} more, drawn at random"
        )
    background = background[_shuffled(len(background), random)[:_BACKGROUND].to(device)]
    hidden = relevant.excluded(relevant.counted)
    tails = []
    if len(others):
        tails = _tails(before, after, relevant.counted, hidden, known, background, others, random)

    turn = torch.empty_like(walk)
    turn[walk] = torch.arange(count, dtype=torch.int64, device=device)
    known_walk = turn[known].argsort()  # rows of `known` in the order of the backfill
    known_cuts = torch.searchsorted(turn[known][known_walk], cuts)  # [T]
    unknown = (cuts - known_cuts)[:, None]  # [T, 1]
    tables = [_blank(states, len(before.query), ks, device) for _ in range(max(1, len(tails)))]
    row_of = torch.full((len(before.query),), -1, dtype=torch.int64, device=device)
    row_of[relevant.counted] = torch.arange(len(relevant.counted), dtype=torch.int64, device=device)
    for q, ids, grades in relevant.blocks(per_item=16 * states):
        left_out = relevant.excluded(q)
        local = torch.searchsorted(known, ids.clamp(min=0))
        local = local.clamp(max=len(known) - 1).masked_fill(ids < 0, -1)
        hidden_known = _local(left_out, known)
        own = [before.pair_scores(q, ids), after.pair_scores(q, local)]  # [B, P] each
        bars = torch.cat(own, 1)
        in_old, in_known = (
            F.pad(space.count_beats(q, path, at, bars, numbers.repeat(1, 2), unseen).cumsum(2), (1, 0))
            for space, path, at, numbers, unseen in (
                (before, walk, cuts, ids, left_out),
                (after, known_walk, known_cuts, local, hidden_known),
            )
        )  # [B, 2P, T]
        counted = (in_known + in_old[..., -1:] - in_old).transpose(1, 2)  # [B, T, 2P]
        done = turn[ids.clamp(min=0)][:, None] < cuts[:, None]  # [B, T, P]
        ahead = _now(done, counted)
        score = torch.where(done, own[1][:, None], own[0][:, None])
        score = score.masked_fill((ids < 0)[:, None], -torch.inf)
        by_rank = score.sort(dim=2, descending=True, stable=True).indices
        found = (ids >= 0).sum(1)[:, None].expand(-1, states)  # [B, T]
        spread = None if grades is None else grades[:, None].expand_as(by_rank).gather(2, by_rank)
        ideal = best_grades(ids, grades)
        ideal = None if ideal is None else ideal[:, None].expand_as(by_rank)
        ahead = ahead.gather(2, by_rank)
        for number, table in enumerate(tables):
            share = torch.zeros_like(ahead, dtype=torch.float64)
            if tails:
                above = tails[number].share_above(row_of[q], bars)[:, None].expand(-1, states, -1)
                share = _now(done, above).gather(2, by_rank)
            one = expected.figures(ahead, unknown, share, spread, found, ideal, ks, gain)
            for name, values in _flat(one):
                table[name][:, q] = values.T
    for table in tables:
        right, base = table["top1"], table["top1"][:1]
        table["lost"], table["won"] = base * (1 - right), right * (1 - base)
    return _curve(tables, relevant, cuts.double() / max(count, 1), ks, level, samples, random, query_old)


def _space(query: Any, gallery: Any, names: tuple[str, str], metric: str) -> Space:
    query, gallery, _ = _inputs.pair(names, query, gallery)
    if query.dtype == torch.float64:
        query, gallery = query.float(), gallery.float()
    return Space(query, gallery, names, metric, "native")


def _known(
    count: int,
    before: Space,
    judged: Tensor,
    sample_ids: Any,
    sample_new: Any,
    relevant_ids: Any,
    relevant_new: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Items with a new vector, ascending [K], the vectors [K, D_new], and which are of the sample [K]."""
    device = before.query.device
    vectors = [_inputs.matrix("sample_new", sample_new).to(device)]
    ids = [_inputs.rows("sample_ids", sample_ids, ("sample_new", vectors[0])).to(device)]
    if relevant_new is not None:
        vectors.append(_inputs.matrix("relevant_new", relevant_new).to(device))
        if relevant_ids is not None:
            ids.append(_inputs.rows("relevant_ids", relevant_ids, ("relevant_new", vectors[1])).to(device))
        elif len(judged) == len(vectors[1]):
            ids.append(judged)
        else:
            raise ValueError(
                f"`relevant_new` must hold one vector for each of the {len(judged)} items that are relevant "
                f"to some query, ascending by row: got {len(vectors[1])}; name others with `relevant_ids`"
            )
        if vectors[0].shape[1] != vectors[1].shape[1]:
            raise ValueError(
                f"`relevant_new` must have as many columns as `sample_new`: got {vectors[1].shape[1]} and "
                f"{vectors[0].shape[1]}"
            )
        vectors[1] = vectors[1].to(vectors[0].dtype)
    for name, each in zip(("sample_ids", "relevant_ids"), ids, strict=False):
        _checks.in_range(name, each, count, none=False, wait=True)
        if len(torch.unique(each)) < len(each):
            raise ValueError(f"`{name}` must name each item once: some are named again")
    together = torch.cat(ids)
    by_id = together.argsort(stable=True)
    first = torch.ones_like(by_id, dtype=torch.bool)
    first[1:] = together[by_id][1:] != together[by_id][:-1]
    chosen = by_id[first]
    known = together[chosen]
    missing = judged[~torch.isin(judged, known)]
    if len(missing):
        raise ValueError(
            f"`relevant_new` must hold every item that is relevant to some query: {len(missing)} of "
            f"{len(judged)} have no new vector, such as item {int(missing[0])}; embed them and name them in "
            "`relevant_ids`"
        )
    return known, torch.cat(vectors)[chosen], torch.isin(known, ids[0])


def _tails(
    before: Space,
    after: Space,
    counted: Tensor,
    hidden: Tensor | None,
    known: Tensor,
    background: Tensor,
    others: Tensor,
    random: torch.Generator,
) -> list[Tails]:
    """The tails by the whole background, and by all of it but each group of the jackknife."""

    def scores(space: Space, ids: Tensor) -> Tensor:
        return space.pair_scores(counted, ids.expand(len(counted), -1)).double()

    new, old = scores(after, background), scores(before, known[background])  # [Q', M]
    some = others[_shuffled(len(others), random)[:_BACKGROUND].to(others.device)]
    everyone = torch.cat([old, scores(before, some)], 1)
    mean, spread = everyone.mean(1, keepdim=True), everyone.std(1, keepdim=True).clamp(min=1e-12)
    old = (old - mean) / spread
    if hidden is not None:  # what a query must not find is no example of what it may
        for column in hidden.unbind(1):
            found = known[background] == column[:, None]
            new = torch.where(found, new.masked_fill(found, torch.nan).nanmean(1, keepdim=True), new)
            old = old.masked_fill(found, 0)
    flat = old.flatten().sort().values
    edges = torch.stack([flat[min(len(flat) - 1, int(share * len(flat)))] for share in BINS])
    # How many unknown items lie above each edge, of every query: counted over all of them.
    bars = (edges * spread + mean).float()  # [Q', bins - 1]
    nobody = torch.full(bars.shape, len(before.gallery) - 1, dtype=torch.int64, device=bars.device)
    bounds = torch.tensor([0, len(others)], dtype=torch.int64, device=bars.device)
    above = before.count_beats(counted, others, bounds, bars, nobody, hidden)[..., 0].double()
    above = above / len(others)
    ends = torch.ones_like(above[:, :1])
    shares = torch.cat([ends, above], 1) - torch.cat([above, torch.zeros_like(ends)], 1)
    group = torch.arange(len(background), dtype=torch.int64, device=bars.device) % _GROUPS
    parts = [torch.ones_like(group, dtype=torch.bool)] + [group != one for one in range(_GROUPS)]
    return [Tails(new[:, part], old[:, part], shares, edges) for part in parts]


def _shuffled(count: int, random: torch.Generator) -> Tensor:
    return torch.randperm(count, dtype=torch.int64, generator=random, device="cpu")


def _rates(share: Tensor, count: int, z: Tensor, extra: Tensor) -> tuple[Tensor, Tensor]:
    """Wilson's interval of shares [T] of `count` queries, widened by a variance [T] of another source."""
    share, z2 = share.clamp(0, 1), z.square()
    half = z * (share * (1 - share) / count + z2 / (4 * count**2) + extra).sqrt()
    centre = share + z2 / (2 * count)
    return (centre - half) / (1 + z2 / count), (centre + half) / (1 + z2 / count)


def _now(done: Tensor, both: Tensor) -> Tensor:
    """Of the values with the old and with the new score [B, T, 2P] those of the items as they are."""
    old, new = both.chunk(2, 2)
    return torch.where(done, new, old)


def _local(left_out: Tensor | None, known: Tensor) -> Tensor | None:
    """Excluded ids as rows of `known` (-1: not there)."""
    if left_out is None:
        return None
    at = torch.searchsorted(known, left_out.clamp(min=0)).clamp(max=len(known) - 1)
    return at.masked_fill((left_out < 0) | (known[at] != left_out), -1)


def _blank(states: int, queries: int, ks: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    names = ["ap", "rr", "top1"] + [f"{kind}@{k}" for kind in ("ndcg", "cmc") for k in ks]
    shape = (states, queries)
    return {n: torch.full(shape, torch.nan, dtype=torch.float64, device=device) for n in names}


def _flat(found: dict[str, Any]) -> list[tuple[str, Tensor]]:
    single = [(name, found[name]) for name in ("ap", "rr", "top1")]
    return single + [(f"{kind}@{k}", v) for kind in ("ndcg", "cmc") for k, v in found[kind].items()]


def _curve(
    tables: list[dict[str, Tensor]],
    relevant: Relevant,
    fraction: Tensor,
    ks: Sequence[int],
    level: float,
    samples: int,
    random: torch.Generator,
    like: Any,
) -> BackfillCurve[Any]:
    counted = relevant.counted
    shape = (samples, len(counted))
    drawn = torch.randint(len(counted), shape, dtype=torch.int64, generator=random, device="cpu")
    weights = torch.zeros(shape, dtype=torch.float64, device="cpu")
    weights.scatter_add_(1, drawn, torch.ones_like(weights)).div_(len(counted))
    weights = weights.to(counted.device)  # [S, Q']
    noise = torch.randn(samples, _GROUPS, dtype=torch.float64, generator=random, device="cpu").to(
        counted.device
    )

    def as_given(values: Tensor) -> Any:
        return _checks.like_input((values,), like)[0]

    least = NormalDist().inv_cdf((1 + level) / 2)
    each: dict[str, Tensor] = {}
    curve, low, high = {}, {}, {}
    for name, table in tables[0].items():
        parts = torch.stack([one[name][:, counted] for one in tables[1:]]) if len(tables) > 1 else None
        values, swing = table[:, counted], torch.zeros((), dtype=torch.float64, device=table.device)
        if parts is not None:
            mean = parts.mean(0)  # [T, Q']
            values = values - (_GROUPS - 1) * (mean - values)
            # Deviations with the covariance of the jackknife, [S, T].
            swing = noise @ (parts - mean).mean(2) * ((_GROUPS - 1) / _GROUPS) ** 0.5
        each[name] = torch.full_like(table, torch.nan)
        each[name][:, counted] = values
        centre = values.mean(1)  # [T]
        middle = weights @ values.T  # [S, T]
        inner = (weights @ values.square().T - middle.square()).clamp(min=0) / (len(counted) - 1)
        outer = values.var(1) / len(counted)  # squared standard errors over queries
        extra = swing.var(0) if parts is not None else torch.zeros_like(centre)  # and over samples
        # Studentised, so that skewed figures and few queries get a wide band.
        shift = (middle + swing - centre) / (inner + extra).sqrt().clamp(min=1e-12)
        shift = shift.masked_fill(inner + extra <= 1e-24, 0)
        z = torch.quantile(shift.abs().amax(1), level).clamp(min=least)
        if name in ("top1", "lost", "won") or name.startswith("cmc"):
            ends = _rates(centre, len(counted), z, extra)
        else:
            error = (outer + extra).sqrt()
            ends = centre - z * error, centre + z * error
        curve[name] = as_given(centre.clamp(0, 1))
        low[name], high[name] = (as_given(end.clamp(0, 1)) for end in ends)

    def by_name(values: dict[str, Any]) -> dict[str, Any]:
        ends = {"map": "ap", "negative_flips": "lost", "positive_flips": "won", "mrr": "rr"}
        single = {name: values[ends[name]] for name in NAMES if name in ends}
        return single | {kind: {k: values[f"{kind}@{k}"] for k in ks} for kind in ("cmc", "ndcg")}

    return BackfillCurve(
        fraction=as_given(fraction),
        **by_name(curve),
        skipped=relevant.skipped,
        per_query=CurveQueries(
            **{name: as_given(each[name]) for name in ("ap", "rr", "top1", "lost", "won")},
            ndcg={k: as_given(each[f"ndcg@{k}"]) for k in ks},
            fraction=as_given(fraction),
        ),
        low=Bound(**by_name(low)),
        high=Bound(**by_name(high)),
    )
