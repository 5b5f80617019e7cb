"""Ranks of relevant items and the figures made of them: what `evaluate` and `backfill` share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _inputs, _search
from . import counting
from .excluded import Excluded
from .relevance import Relevance

# Entries of the largest table of one query block (of int64: 16 MiB).
BLOCK = 2**21
# From this share of the gallery on, the ranks of a curve are read off all scores in order.
MANY = 0.05
# The rank of padding: after every real rank, and safe to add 1 to.
BEHIND_ALL = 2**62


class Space:
    """One embedding space: the queries, the gallery they rank, and the names the caller gave to both."""

    def __init__(self, query: Any, gallery: Any, names: tuple[str, str], metric: str, backend: str) -> None:
        query, gallery, _ = _inputs.pair(names, query, gallery)
        gallery = gallery.to(query.dtype)
        _checks.choice("metric", metric, _checks.METRICS)
        self.native = _checks.use_native(backend, query)
        self.names, self.metric = names, metric
        self.query = query.detach()  # [Q, D]
        self.gallery = gallery.detach()  # [N, D]
        if self.gallery.stride(1) != 1:
            self.gallery = self.gallery.contiguous()

    def refuse_nonfinite(self, q: Tensor) -> None:
        """Refuse NaN and inf in the query rows `q`, and in a gallery that no native kernel will check."""
        bad = ~self.query[q].isfinite().all(1)
        if bad.any():
            _checks.refuse_nonfinite(_checks.NonFiniteError("query", 0, int(q[bad][0])), [self.names])
        if not self.native and len(q):
            _search.refuse_nonfinite(self.query[:0], self.gallery, self.names)

    def _how(self, q: Tensor) -> dict[str, Any]:
        return {"native": self.native, "names": (self.names,), "query_rows": q}

    def pair_scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """Scores [B, P] of the gallery items `ids` for the queries `q`."""
        return _search.pair_scores(self.query[q], self.gallery, ids, self.metric, **self._how(q))

    def count_beats(
        self,
        q: Tensor,
        order: Tensor | None,
        bounds: Tensor,
        thresholds: Tensor,
        ids: Tensor,
        exclude: Tensor | None,
    ) -> Tensor:
        """How many items of each block of the walk beat each threshold [B, P, T].

        `exclude` [B, E] never counts.
        """
        sides = self.query[q], self.gallery
        one = None if exclude is None or exclude.shape[1] > 1 else exclude[:, 0]
        counts = _search.count_beats(
            *sides, order, bounds, thresholds, ids, self.metric, exclude=one, **self._how(q)
        )
        if exclude is not None and one is None:
            counts = counts - self._beaten_by(q, exclude, order, bounds, thresholds, ids)
        return counts

    def _beaten_by(
        self,
        q: Tensor,
        items: Tensor,
        order: Tensor | None,
        bounds: Tensor,
        thresholds: Tensor,
        ids: Tensor,
    ) -> Tensor:
        """`count_beats` among `items` [B, M] alone, by sorting their scores."""
        scores = self.pair_scores(q, items)
        turn = torch.arange(len(self.gallery), dtype=torch.int64, device=ids.device)
        block = torch.bucketize(turn, bounds, right=True) - 1  # [N], of the walk's positions
        block = block.masked_fill(block < 0, len(bounds) - 1)
        if order is not None:
            block = torch.empty_like(block).scatter_(0, order, block)
        return counting.beaten_by(scores, items, block, len(bounds) - 1, thresholds, ids)

    def scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """All scores [B, N] of the queries `q`, among which the items `ids` are ranked (reference)."""
        return _search.all_scores(
            self.query[q], self.gallery, ids, self.metric, names=(self.names,), query_rows=q
        )

    def ranks(self, q: Tensor, ids: Tensor, exclude: Tensor | None) -> Tensor:
        """Rank [B, P] of the items `ids` in the whole gallery; -1 where the id is -1."""
        if not self.native:
            return full_sort_ranks(self.scores(q, ids), ids, exclude)
        if exclude is None or exclude.shape[1] == 1:
            one = None if exclude is None else exclude[:, 0]
            return _search.ranks(self.query[q], self.gallery, ids, self.metric, exclude=one, **self._how(q))
        everything = torch.tensor([0, len(self.gallery)], dtype=torch.int64, device=ids.device)
        beaten_by = self.count_beats(q, None, everything, self.pair_scores(q, ids), ids, exclude)
        return beaten_by[..., 0].masked_fill(ids < 0, -1)


def full_sort_ranks(scores: Tensor, ids: Tensor, exclude: Tensor | None) -> Tensor:
    """Rank [B, P] of the items `ids` after a full stable sort of `scores` [B, N]; -1 where the id is -1."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    counts = torch.ones_like(order)
    if exclude is not None:
        counts.scatter_reduce_(1, exclude.clamp(min=0), (exclude < 0).long(), "amin")
    counts = counts.gather(1, order)
    place = torch.empty_like(order).scatter_(1, order, counts.cumsum(1) - counts)
    ranks = place.gather(1, ids.clamp(min=0))
    return ranks.masked_fill(ids < 0, -1)


class Relevant:
    """The relevant gallery items of every query, by label or judged one by one, without a [Q, N] table."""

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        query_labels: Any,
        gallery_labels: Any,
        exclude: Any,
        names: tuple[str, str] = ("query", "gallery"),
        relevance: Any = None,
        exclude_groups: Any = None,
    ) -> None:
        sides = (names[0], query), (names[1], gallery)
        self._excluded = Excluded(exclude, exclude_groups, sides)
        self._grades: Tensor | None = None  # of the pairs in self._ids, where they differ
        if relevance is None:
            query_labels, gallery_labels = _inputs.labels(
                ("query_labels", "gallery_labels"), (query_labels, gallery_labels), sides, needed=True
            )
            by_label, self._ids = gallery_labels.sort(stable=True)  # [N]
            self._start = torch.searchsorted(by_label, query_labels)  # [Q]
            stop = torch.searchsorted(by_label, query_labels, right=True)
            self._stop = torch.where(query_labels < 0, self._start, stop)
            left_out = self._excluded.count_with_label(query_labels, gallery_labels)
            found = self._stop - self._start - left_out
        else:
            if not isinstance(relevance, Relevance):
                raise TypeError(
                    f"`relevance` must be a fastcompat.Relevance: got {type(relevance).__name__}; "
                    "write fastcompat.Relevance(query, item, grade)"
                )
            if query_labels is not None or gallery_labels is not None:
                raise ValueError("`relevance` must be given without labels: got both; leave one of them out")
            of, ids, grades = (x.to(query.device) for x in relevance.relevant(len(query), len(gallery)))
            kept = ~self._excluded.covers(of, ids[:, None])[:, 0]
            of, self._ids, grades = of[kept], ids[kept], grades[kept]
            if len(torch.unique(grades)) > 1:  # of one grade nDCG is that of labels
                self._grades = grades
            numbers = torch.arange(len(query), dtype=torch.int64, device=query.device)
            self._start = torch.searchsorted(of, numbers)
            self._stop = torch.searchsorted(of, numbers, right=True)
            found = self._stop - self._start
        # The queries with a relevant item, ascending.
        self.counted = (found > 0).nonzero()[:, 0]
        self.skipped = len(query) - len(self.counted)

    def items(self) -> Tensor:
        """Every gallery item that is relevant to a counted query, ascending."""
        wanted = torch.zeros(len(self._ids) + 1, dtype=torch.int64, device=self._ids.device)
        ends = torch.stack([self._start[self.counted], self._stop[self.counted]])
        for sign, places in zip((1, -1), ends, strict=True):
            wanted.scatter_add_(0, places, torch.full_like(places, sign))
        found: Tensor = torch.unique(self._ids[wanted.cumsum(0)[:-1] > 0])
        return found

    def excluded(self, q: Tensor) -> Tensor | None:
        """The gallery ids [B, E] that each of the queries `q` leaves out, padded with -1."""
        return self._excluded.of(q)

    def blocks(self, per_item: int = 1, per_query: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The counted queries in blocks: their numbers [B], their relevant ids and grades [B, P].

        Ids are padded with -1; no grades: 1 each. Queries with similar numbers of relevant items share a
        block, so that little is padding. A block of more than one query needs at most BLOCK entries, where a
        query needs `per_query` and each of its P columns `per_item`.
        """
        items = self._stop - self._start
        queries = self.counted[items[self.counted].argsort(stable=True)]
        widths: list[int] = items[queries].tolist()
        per_query += self._excluded.width

        def entries(stop: int) -> int:
            return (stop - first) * (per_item * widths[stop - 1] + per_query)

        first = 0
        while first < len(widths):
            larger = range(first + 2, len(widths) + 1)
            stop = first + 1 + bisect_right(larger, BLOCK, key=entries)
            q = queries[first:stop]
            at = self._start[q][:, None] + torch.arange(widths[stop - 1], dtype=torch.int64, device=q.device)
            padding = at >= self._stop[q][:, None]
            at = at.clamp(max=len(self._ids) - 1)
            ids = self._ids[at].masked_fill(padding, -1)
            ids = ids.masked_fill(self._excluded.covers(q, ids), -1)
            yield q, ids, None if self._grades is None else self._grades[at].masked_fill(padding, 0)
            first = stop


def best_first(ranks: Tensor, grades: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Ranks [..., P] ascending with the padding (-1) last, how many are not padding [...], grades alike."""
    padding = ranks < 0
    ranks, count = ranks.masked_fill(padding, BEHIND_ALL), (~padding).sum(-1)
    if grades is None:
        return counting.sort(ranks), count, None
    ranks, order = ranks.sort(-1)
    return ranks, count, grades.expand_as(ranks).gather(-1, order)


def best_grades(ids: Tensor, grades: Tensor | None) -> Tensor | None:
    """The grades [B, P] of a block's items in descending order, 0 for the padding (None: 1 each)."""
    return None if grades is None else grades.masked_fill(ids < 0, 0).sort(1, descending=True).values


def average_precision(ranks: Tensor, relevant: Tensor, cut: int | Tensor | None = None) -> Tensor:
    """AP, or AP@cut with divisor min(relevant, cut), from ascending ranks [..., P]: float64 [...]."""
    if cut is None:
        cut = BEHIND_ALL
    limit = torch.as_tensor(cut, dtype=torch.int64, device=ranks.device)
    m = torch.arange(1, ranks.shape[-1] + 1, dtype=torch.float64, device=ranks.device)
    precision = torch.where(ranks < limit[..., None], m / (ranks + 1).double(), 0.0)
    # A running sum adds from the left whatever the padding, so an AP has the same bits in every block.
    return precision.cumsum(-1)[..., -1] / torch.minimum(relevant, limit).double()


def cutoffs(ks: Sequence[int]) -> tuple[int, ...]:
    """`ks` as a tuple of positive whole numbers."""
    if not isinstance(ks, (list, tuple, range, np.ndarray)):
        raise TypeError(f"`ks` must be a sequence of ints: got {type(ks).__name__}; write ks=(1, 5, 10)")
    return tuple(_checks.positive_int("ks", k) for k in ks)
