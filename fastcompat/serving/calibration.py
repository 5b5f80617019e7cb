"""Scores of different models made comparable: per query and space an affine map."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .. import _checks, _inputs, reference
from .._types import Array, ArrayLike
from ..judging.relevance import Relevance
from .background import FEWEST, Background
from .logistic import logistic_fit

METHODS = ("zscore", "tail", "odds", "odds-tail")
BEST_PAIRS = 2  # times the share of relevant pairs: how many of a query's best pairs the odds are fitted on
FEWEST_POSITIVES = 20
SAMPLE = 1000  # of the judged items, which need not be those served
MOST_PAIRS = 2**21  # that a fit of odds looks at


class Calibrator:
    """Maps the scores of one space to what can be compared with another space's: `t = scale_i s + offset_i`.

    A ranking over two models' scores needs scores that mean the same. From a random sample of the space's
    gallery, the background, and for the odds methods from judged queries::

        "zscore"     t = (s - mean_i) / deviation_i     over the background, query by query
        "tail"       t = (s - u_i) / b_i                u_i the 95 % quantile, b_i the mean excess above it
        "odds"       t = a z + c                        log-odds of relevance; z the zscore
        "odds-tail"  t = a z + c                        z the tail score

    tail is minus the log of the share of the gallery expected above s, up to a constant: excesses over a
    high threshold are nearly exponential (peaks over threshold: Pickands, "Statistical inference using
    extreme order statistics", Annals of Statistics 1975). The odds methods rank by the probability of
    relevance (Robertson, "The probability ranking principle in IR", Journal of Documentation 1977), with a
    and c from a logistic regression of relevance on z (Platt, "Probabilistic outputs for support vector
    machines", 1999). It is fitted on each query's best pairs, twice as many as are relevant on average: a
    merge decides among those, and one straight line over all pairs is bent by the many that nobody sees.

    Use one calibrator of one method per space::

        old_map = fc.Calibrator("zscore").fit(old[sample])
        new_map = fc.Calibrator("zscore").fit(new[sample])
        (a, b), (c, d) = old_map.affine(query_old), new_map.affine(query_new)
        fc.mixed_topk(query_old, old, query_new, new, done, 10, scale=(a, c), offset=(b, d))

    Args:
        method: "zscore", "tail", "odds" or "odds-tail"; `fastcompat.choose_calibration` names one.
        metric: "cosine", "ip" or "l2" (score = minus the squared distance), that of the search.

    Attributes:
        width: columns of the space, once fitted.
        slope, intercept: a and c; 1 and 0 for "zscore" and "tail".
        fell_back: whether the odds could not be trusted (a warning said so). Then `affine` is the map without
            odds, and every other space of the merge must use `base()` too.
    """

    def __init__(self, method: str, metric: str = "cosine") -> None:
        _checks.choice("method", method, METHODS)
        _checks.choice("metric", metric, _checks.METRICS)
        self.method, self.metric = method, metric
        self.width = 0
        self.slope, self.intercept, self.fell_back = 1.0, 0.0, False
        self._background: Background | None = None

    def __repr__(self) -> str:
        state = f"{self.width} columns" if self._background else "not fitted"
        return f'Calibrator("{self.method}", "{self.metric}": {state})'

    def fit(
        self,
        background: ArrayLike,
        *,
        query: ArrayLike | None = None,
        gallery: ArrayLike | None = None,
        query_labels: Any = None,
        gallery_labels: Any = None,
        relevance: Relevance | None = None,
    ) -> Calibrator:
        """Learn the map of one space.

        Args:
            background: [M, D], a random sample of the space's gallery, at least 50 rows; about 1,000.
            query: [Q, D], judged queries in this space, for the odds methods. A hundred will do; they may be
                of other classes than those served, but no data that a model was trained on, which looks
                better there than it is.
            gallery: [N, D], the items that they were judged against, in this space. They need not be those
                served: z of a judged query is taken over a sample of them.
            query_labels: [Q]; an item with the same label is relevant; a negative label equals none.
            gallery_labels: [N].
            relevance: judged pairs instead of labels.

        Returns:
            This calibrator. With fewer than 20 relevant pairs, or a slope that is not above 0, the odds
            methods fall back to the map without odds and warn.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row; fewer than
                50 rows; a background whose rows are all equal; judged queries without a relevant item.
        """
        x = _finite("background", background)
        if len(x) < FEWEST:
            raise ValueError(
                f"`background` must have at least {FEWEST} rows, better 1,000, drawn at random from the "
                f"gallery: got {len(x)}"
            )
        found = Background(x, self.metric)
        if found.constant:
            raise ValueError(
                "`background` must hold different vectors: all rows are equal, so every score is the same; "
                "draw it at random from the gallery"
            )
        judged = {"query": query, "gallery": gallery}
        needed = self.method.startswith("odds")
        missing = [name for name, value in judged.items() if value is None]
        if needed and missing:
            raise ValueError(
                f"`{missing[0]}` must be given: the method {self.method!r} is fitted on judged queries; "
                'give them, or use "zscore" or "tail", which need none'
            )
        fitted = (1.0, 0.0, False)
        if needed:
            q, g = (_finite(name, value) for name, value in judged.items())
            for name, value in (("query", q), ("gallery", g)):
                _checks.columns(name, value, "background", x)
            judgement = Judgement(q, g, query_labels, gallery_labels, relevance)
            fitted = self._fit_odds(self._own_background(g, found), q, g, judgement)
        self._background, self.width = found, x.shape[1]
        self.slope, self.intercept, self.fell_back = fitted
        return self

    def _own_background(self, gallery: Tensor, other: Background) -> Background:
        """What the judged queries' scores are spread over: the items that they were judged against."""
        if len(gallery) < FEWEST:
            return other
        own = Background(gallery[_drawn(len(gallery), SAMPLE, gallery.device)], self.metric)
        return other if own.constant else own

    def _fit_odds(
        self, background: Background, query: Tensor, gallery: Tensor, judged: Judgement
    ) -> tuple[float, float, bool]:
        share = judged.share
        width = max(1, min(len(gallery), math.ceil(BEST_PAIRS * share * len(gallery))))
        rows = judged.counted
        if len(rows) * width > MOST_PAIRS:
            rows = rows[_drawn(len(rows), max(1, MOST_PAIRS // width), rows.device)]
        scores, relevant = [], []
        for some in torch.split(rows, max(1, MOST_PAIRS // max(1, len(gallery)))):
            scale, offset = self._base(background, query[some])
            z = scale[:, None] * reference.scores(query[some], gallery, self.metric) + offset[:, None]
            best, place = z.topk(width, dim=1)
            scores.append(best.flatten())
            relevant.append(judged.relevant(some).gather(1, place).flatten())
        x, y = torch.cat(scores), torch.cat(relevant)
        positives = int(y.sum())
        if positives < FEWEST_POSITIVES or positives == len(y) or float(x.std()) == 0:
            return self._without_odds(
                f"{positives} of {len(y)} judged pairs are relevant; at least {FEWEST_POSITIVES} must be, "
                "and not all"
            )
        slope, intercept = logistic_fit(x, y)
        if not slope > 0:
            return self._without_odds(
                f"the odds of relevance fall with the score (slope {slope:.3g}) among the judged pairs"
            )
        return slope, intercept, False

    def _without_odds(self, why: str) -> tuple[float, float, bool]:
        warnings.warn(
            f'the calibration "{self.method}" falls back to "{self._base_method}": {why}', stacklevel=4
        )
        return 1.0, 0.0, True

    @property
    def _base_method(self) -> str:
        return "tail" if self.method.endswith("tail") else "zscore"

    def _base(self, background: Background, query: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(background, self._base_method)(query)  # type: ignore[no-any-return]

    def base(self) -> Calibrator:
        """The same map without the odds: "zscore" or "tail"."""
        copy = Calibrator(self._base_method, self.metric)
        copy._background, copy.width = self._background, self.width
        return copy

    def affine(self, query: Array) -> tuple[Array, Array]:
        """Scale and offset of every query, float32 [B] each; scale is above 0.

        A query whose scores of the background are all equal, such as a zero vector, gets scale 1 (times the
        slope) and minus their mean.

        Args:
            query: [B, D], of the width that was fitted.

        Returns:
            Two vectors, NumPy arrays for NumPy queries.

        Raises:
            ValueError, TypeError: a query of another width, NaN or inf; a calibrator that was never fitted.
        """
        q = self.check("query", _finite("query", query))
        assert self._background is not None
        scale, offset = self._base(self._background, q.to(self._background.mean.device))
        mapped = (self.slope * scale, self.slope * offset + self.intercept)
        given: tuple[Array, Array] = _checks.like_input(tuple(x.float().to(q.device) for x in mapped), query)
        return given

    def check(self, name: str, query: Tensor, metric: str | None = None) -> Tensor:
        """`query`, if this calibrator was fitted for its width and for the metric."""
        if self._background is None:
            raise ValueError("`fit` must be called before a calibrator is used")
        if metric is not None and metric != self.metric:
            raise ValueError(
                f"the calibrator of `{name}` was fitted for the metric {self.metric!r}, not {metric!r}: "
                f'make one with fastcompat.Calibrator("{self.method}", "{metric}")'
            )
        if query.shape[1] != self.width:
            raise ValueError(
                f"`{name}` must have the {self.width} columns that the calibrator was fitted for: "
                f"got shape {list(query.shape)}"
            )
        return query


class Judgement:
    """Which of some items answer which of some queries, from labels or judged pairs."""

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        query_labels: Any,
        gallery_labels: Any,
        relevance: Relevance | None,
        names: tuple[str, str] = ("query", "gallery"),
    ) -> None:
        self._shape, self._device = (len(query), len(gallery)), query.device
        self.queries = len(query)
        self._pairs: tuple[Tensor, Tensor] | None = None
        if relevance is not None:
            if query_labels is not None or gallery_labels is not None:
                raise ValueError("`relevance` must be given without `query_labels` and `gallery_labels`")
            if not isinstance(relevance, Relevance):
                raise TypeError(f"`relevance` must be a fastcompat.Relevance: got {type(relevance).__name__}")
            q, item, _ = relevance.relevant(*self._shape)
            self._pairs = q.to(self._device), item.to(self._device)
            counts = torch.bincount(self._pairs[0], minlength=len(query))
        else:
            sides = (names[0], query), (names[1], gallery)
            self._labels = _inputs.labels(
                ("query_labels", "gallery_labels"), (query_labels, gallery_labels), sides, needed=True
            )
            ascending = self._labels[1].sort().values
            ends = [torch.searchsorted(ascending, self._labels[0], right=right) for right in (False, True)]
            counts = (ends[1] - ends[0]).masked_fill(self._labels[0] < 0, 0)
        self.counted = (counts > 0).nonzero()[:, 0]
        if not len(self.counted):
            raise ValueError(
                f"`{names[0]}` must have relevant items in `{names[1]}`: none of {len(query)} judged queries "
                "has one; give queries and items of the same classes"
            )
        self.share = float(counts.sum()) / (len(self.counted) * max(1, len(gallery)))

    def relevant(self, rows: Tensor) -> Tensor:
        """Bool [b, N] of these queries."""
        if self._pairs is None:
            return reference.same_label(self._labels[0][rows], self._labels[1])
        found = torch.zeros(len(rows), self._shape[1], dtype=torch.bool, device=self._device)
        place = torch.full((self._shape[0],), -1, dtype=torch.int64, device=self._device)
        place[rows] = torch.arange(len(rows), dtype=torch.int64, device=self._device)
        at = place[self._pairs[0]]
        found[at[at >= 0], self._pairs[1][at >= 0]] = True
        return found


def together(calibrators: Any, queries: Any, names: tuple[str, ...], metric: str) -> list[Tensor]:
    """Scale and offset, float32 [2, B], in each space of one merge.

    Where one of the calibrators fell back, all of them are used without their odds.
    """
    if not isinstance(calibrators, (tuple, list)) or len(calibrators) != len(queries):
        raise TypeError(
            f"`calibrators` must be {len(queries)} fitted calibrators, one of each space: got "
            f"{type(calibrators).__name__}"
        )
    for c in calibrators:
        if not isinstance(c, Calibrator):
            raise TypeError(f"`calibrators` must hold fastcompat.Calibrator: got {type(c).__name__}")
    methods = {c.method for c in calibrators}
    if len(methods) > 1:
        raise ValueError(
            f"`calibrators` must be of one method, or their scores are not comparable: got {sorted(methods)}"
        )
    if any(c.fell_back for c in calibrators):
        calibrators = [c.base() for c in calibrators]
    for c, query, name in zip(calibrators, queries, names, strict=True):
        c.check(name, query, metric)
    return [torch.stack(list(c.affine(query))) for c, query in zip(calibrators, queries, strict=True)]


def _drawn(size: int, count: int, device: torch.device) -> Tensor:
    """At most `count` of `size` rows at random, the same ones on every device."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randperm(size, dtype=torch.int64, device="cpu", generator=generator)[:count].to(device)


def _finite(name: str, value: Any) -> Tensor:
    x = _inputs.matrix(name, value).detach()
    try:
        reference.refuse_nonfinite(x[:0], x)
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, ((name, name),))
    return x
