"""One merge on one pair: area, worst state against the old system, worst share of queries lost."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

import fastcompat as fc

from .pairs import Side

STATES = 7
BACKGROUND = 1000
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ALPHA = 0.05
METHODS = ("zscore", "tail", "odds", "odds-tail")


class Judged(NamedTuple):
    """Mean over the states; least difference to the old system; largest share lost."""

    area: float
    ndcg: float
    worst: float
    lost: float


def curve(
    side: Side, seed: int, calibrators: tuple[fc.Calibrator, ...] | None = None, query: Tensor | None = None
) -> fc.BackfillCurve:
    """A random order; `query` stands in for the old query."""
    arrays = (side.query_old if query is None else query, *side[1:])
    return fc.backfill_curve(
        *arrays,
        states=STATES,
        ks=(10,),
        seed=seed,
        calibrators=calibrators,
        baseline=(side.query_old, side.old),
    )


def figures(found: fc.BackfillCurve, old: float) -> Judged:
    """Of a curve, beside the old system's mAP."""
    return Judged(
        found.auc(), found.auc("ndcg@10"), float(found.map.min()) - old, float(found.negative_flips.max())
    )


def calibrators(method: str, judged: Side, gallery: Side, seed: int) -> tuple[fc.Calibrator, ...]:
    """Odds from the judged side; the background is a sample of the gallery that is served."""
    sample = torch.randperm(len(gallery.old), generator=torch.Generator().manual_seed(seed))[:BACKGROUND]
    fits = []
    for space in ("old", "new"):
        named = {}
        if method.startswith("odds"):
            named = {
                "query": getattr(judged, f"query_{space}"),
                "gallery": getattr(judged, space),
                "query_labels": judged.query_labels,
                "gallery_labels": judged.gallery_labels,
            }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback shows in the figures
            fits.append(fc.Calibrator(method).fit(getattr(gallery, space)[sample], **named))
    return tuple(fits)


def all_scores(side: Side, maps: tuple[fc.Calibrator, ...] | None = None) -> list[Tensor]:
    """Every score [Q, N] in both spaces."""
    found = []
    for i, (q, x) in enumerate(((side.query_old, side.old), (side.query_new, side.new))):
        s = q @ x.T
        if maps is not None:
            scale, offset = maps[i].affine(q)
            s = scale[:, None] * s + offset[:, None]
        found.append(s)
    return found


def turn(count: int, seed: int) -> list[Tensor]:
    """Which items [N] are backfilled in each state."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    states = []
    for t in range(STATES):
        done = torch.zeros(count, dtype=torch.bool)
        done[order[: t * count // (STATES - 1)]] = True
        states.append(done)
    return states


def ranked(side: Side, tables: list[Tensor]) -> tuple[Judged, Tensor]:
    """Figures of any merge from its scores in every state, and top-1 [T, Q]."""
    relevant = side.query_labels[:, None] == side.gallery_labels
    place = torch.arange(1, relevant.shape[1] + 1)
    gain = 1 / torch.log2(torch.arange(2, 12))
    ap, ndcg, first = [], [], []
    for table in tables:
        right = relevant.gather(1, table.argsort(dim=1, descending=True, stable=True))
        ap.append(((right * right.cumsum(1) / place).sum(1) / right.sum(1)).mean())
        ideal = gain.cumsum(0)[right.sum(1).clamp(max=10) - 1]
        ndcg.append(((right[:, :10] * gain).sum(1) / ideal).mean())
        first.append(right[:, 0])
    top = torch.stack(first)
    lost = (top[0] & ~top).float().mean(1).max()
    mean = torch.stack(ap)
    return Judged(
        float(mean.mean()), float(torch.stack(ndcg).mean()), float((mean - mean[0]).min()), float(lost)
    ), top


def rrf(side: Side, seed: int) -> Judged:
    """Reciprocal rank fusion of the two parts' lists."""
    tables = []
    scores = all_scores(side)
    for done in turn(len(side.old), seed):
        table = torch.empty_like(scores[0])
        for s, counts in zip(scores, (~done, done), strict=True):
            place = s[:, counts].argsort(dim=1, descending=True).argsort(1) + 1
            table[:, counts] = 1 / (60 + place.float())
        tables.append(table)
    return ranked(side, tables)[0]


def blend(side: Side, maps: tuple[fc.Calibrator, ...], weight: float, seed: int) -> tuple[Judged, Tensor]:
    """Both vectors of a backfilled item are kept."""
    old, new = all_scores(side, maps)
    mixed = (1 - weight) * old + weight * new
    return ranked(side, [torch.where(done, mixed, old) for done in turn(len(side.old), seed)])


def bounded(judged: Side, served: Side, method: str, seed: int) -> tuple[Judged, float]:
    """The blend certified on judged queries to lose at most 5 % in any state, on the served ones."""
    maps = calibrators(method, judged, judged, seed)
    lost = []
    for weight in WEIGHTS:
        top = blend(judged, maps, weight, seed)[1]
        lost.append((top[0] & ~top).any(0))
    weight = WEIGHTS[fc.bounded_blend(torch.stack(lost), ALPHA)]
    return blend(served, calibrators(method, judged, served, seed), weight, seed)[0], weight


def mapped_query(name: str, judged: Side, side: Side, alpha: float = 1.0) -> Tensor:
    """The new query in the old space, by a closed form fitted on the judged side's items."""
    fit = (fc.Ridge() if name == "ridge" else fc.Procrustes()).fit(judged.new, judged.old)
    return fc.slerp(side.query_old, fit.transform(side.query_new), alpha)


def best_alpha(judged: Side, seed: int) -> float:
    """The share of SLERP with the largest area on judged queries."""
    found = {
        a: curve(judged, seed, query=mapped_query("slerp", judged, judged, a)).auc()
        for a in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    return max(found, key=found.__getitem__)
