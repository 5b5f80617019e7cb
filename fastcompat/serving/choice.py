"""Which calibration to take: a simulated backfill on judged queries."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _inputs
from .._types import ArrayLike, Metric
from ..judging.curve import backfill_curve
from ..judging.relevance import Relevance
from .calibration import METHODS, Calibrator, Judgement

PREFERRED = ("odds", "zscore", "tail", "odds-tail")  # of two that are as good
FOLDS = 4
STATES = 7
BACKGROUND = 1000
UNSURE = 0.5  # standard errors by which one may be behind the best and still be taken
NOTHING = 1e-4  # a difference of areas that nobody will see
SURE = 3.0  # standard errors by which the raw merge must be ahead
MEASURES = ("map", "ndcg@10")


def choose_calibration(
    query_old: ArrayLike,
    old: ArrayLike,
    query_new: ArrayLike,
    new: ArrayLike,
    *,
    relevance: Relevance | None = None,
    query_labels: Any = None,
    gallery_labels: Any = None,
    rows: Any = None,
    metric: Metric = "cosine",
    measure: str = "map",
    seed: int = 0,
) -> str:
    """The calibration under which a simulated backfill loses least, by cross-validation on judged queries.

    The items that have both vectors are backfilled in a random order. In each of four folds the calibrators
    are fitted on the other folds' queries and a sample of the gallery, and the fold's queries get the area
    under their own curve (`fastcompat.backfill_curve`, the mean over 7 states). With A_m the mean area of
    method m, and SE the standard error of the mean difference of two methods over the queries:

    * the first of "odds", "zscore", "tail", "odds-tail" with `A_best - A_m <= SE / 2`;
    * "none", scores as they are, only if it is better than that one by more than 3 SE.

    A few hundred judged queries tell differences of about 0.005. They should be like those served, and must
    be nothing that a model was trained on: the model looks better there than it is, and the choice will trust
    it too much.

    Args:
        query_old: [Q, D_old], judged queries; at least 20 with a relevant item.
        old: [N, D_old].
        query_new: [Q, D_new].
        new: [N, D_new], of the same items. Only `rows` are read.
        relevance: judged pairs.
        query_labels: [Q], labels instead of pairs.
        gallery_labels: [N].
        rows: the items that have both vectors, whole numbers (None: all).
        metric: "cosine", "ip" or "l2".
        measure: "map" or "ndcg@10", what the area is of.
        seed: of folds, background and order.

    Returns:
        "zscore", "tail", "odds", "odds-tail" or "none". Where the odds cannot be trusted (`Calibrator.fit`),
        they do not take part.

    Raises:
        ValueError, TypeError: arguments that do not fit; fewer than 20 judged queries with a relevant item.
    """
    _checks.choice("metric", metric, _checks.METRICS)
    _checks.choice("measure", measure, MEASURES)
    seed = _checks.whole("seed", seed)
    spaces = [
        _inputs.pair(names, q, x)[:2]
        for names, q, x in ((("query_old", "old"), query_old, old), (("query_new", "new"), query_new, new))
    ]
    _checks.rows("query_new", spaces[1][0], "query_old", spaces[0][0])
    _checks.rows("new", spaces[1][1], "old", spaces[0][1])
    generator = torch.Generator("cpu").manual_seed(seed)
    names = ("query_old", "old")
    judged = Judgement(*spaces[0], query_labels, gallery_labels, relevance, names)
    if rows is not None:
        chosen = _inputs.rows("rows", rows, None)
        _checks.in_range("rows", chosen, len(spaces[0][1]), none=False, wait=True)
        spaces = [(q, x[chosen.to(x.device)]) for q, x in spaces]
    else:
        chosen = torch.arange(len(spaces[0][1]), dtype=torch.int64, device="cpu")
    kept, labels = _numbered(judged, chosen.to(spaces[0][0].device))
    if len(kept) < 20:
        raise ValueError(
            "`query_old` must have at least 20 judged queries with a relevant item among `rows`: got "
            f'{len(kept)}; judge more, or take "zscore", which needs none'
        )
    fold, sample = (
        torch.randperm(len(x), dtype=torch.int64, device="cpu", generator=generator) for x in (kept, chosen)
    )
    fold, sample = fold % FOLDS, sample[:BACKGROUND].to(kept.device)
    areas: dict[str, list[Tensor]] = {}
    for number in range(FOLDS):
        train, test = (kept[mask.to(kept.device)] for mask in (fold != number, fold == number))
        for method in ("none", *METHODS):
            found = _fitted(method, metric, spaces, labels, train, sample)
            if found is not None:
                areas.setdefault(method, []).append(_area(found, metric, spaces, labels, test, measure, seed))
    return _choose({m: torch.cat(a) for m, a in areas.items() if len(a) == FOLDS})


def _choose(area: dict[str, Tensor]) -> str:
    """From every query's area [Q] under each method."""

    def lead(a: str, b: str) -> float:
        """By how many standard errors a is ahead of b."""
        difference = area[a] - area[b]
        error = float(difference.std()) / len(difference) ** 0.5
        mean = float(difference.mean())
        return mean / max(error, 1e-12) if abs(mean) > NOTHING else 0.0

    candidates = [m for m in PREFERRED if m in area]
    best = max(candidates, key=lambda m: float(area[m].mean()))
    chosen = next(m for m in candidates if m == best or lead(best, m) <= UNSURE)
    return "none" if lead("none", chosen) > SURE else chosen


def _numbered(judged: Judgement, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Judged queries with a relevant item among `chosen`, and the mask [Q, M] of relevant pairs."""
    mask = torch.cat([judged.relevant(some)[:, chosen] for some in torch.split(judged.counted, 1024)])
    some = mask.any(1)
    whole = torch.zeros(judged.queries, len(chosen), dtype=torch.bool, device=chosen.device)
    whole[judged.counted] = mask
    return judged.counted[some], whole


def _pairs(mask: Tensor) -> Relevance:
    query, item = mask.cpu().nonzero(as_tuple=True)
    return Relevance(query, item)


def _fitted(
    method: str,
    metric: Metric,
    spaces: list[tuple[Tensor, Tensor]],
    mask: Tensor,
    train: Tensor,
    sample: Tensor,
) -> list[Calibrator] | None:
    """The calibrators of both spaces; an empty list for the raw merge; None where the odds fell back."""
    if method == "none":
        return []
    found = []
    for q, x in spaces:
        judged: dict[str, Any] = {}
        if method.startswith("odds"):
            judged = {"query": q[train], "gallery": x, "relevance": _pairs(mask[train])}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(Calibrator(method, metric).fit(x[sample], **judged))
    return None if any(c.fell_back for c in found) else found


def _area(
    calibrators: list[Calibrator],
    metric: Metric,
    spaces: list[tuple[Tensor, Tensor]],
    mask: Tensor,
    test: Tensor,
    measure: str,
    seed: int,
) -> Tensor:
    """Mean over the states of every query's figure [Q]."""
    (q_old, x_old), (q_new, x_new) = spaces
    curve = backfill_curve(
        q_old[test],
        x_old,
        q_new[test],
        x_new,
        relevance=_pairs(mask[test]),
        states=STATES,
        ks=(10,),
        metric=metric,
        seed=seed,
        calibrators=tuple(calibrators) or None,  # type: ignore[arg-type]
    )
    figures = curve.per_query.ap if measure == "map" else curve.per_query.ndcg[10]
    mean: Tensor = figures.mean(0)
    return mean
