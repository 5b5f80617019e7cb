"""Ranks of relevant items and the figures made of them: what `evaluate` and `backfill` share."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import _checks, _ops, reference

# Entries of the largest table of one query block (of int64: 16 MiB).
BLOCK = 2**21
# The rank of padding: after every real rank, and safe to add 1 to.
BEHIND_ALL = 2**62


class Space:
    """One embedding space: the queries, the gallery they rank, and the names the caller gave to both."""

    def __init__(self, query: Any, gallery: Any, names: tuple[str, str], metric: str, backend: str) -> None:
        query, gallery = _checks.as_tensor(names[0], query), _checks.as_tensor(names[1], gallery)
        _checks.pair(query, gallery, names)
        _checks.choice("metric", metric, _checks.METRICS)
        self.native = _checks.takes_native(backend, query)
        self.names, self.metric = names, metric
        self.query = query.detach()  # [Q, D]
        self.gallery = gallery.detach()  # [N, D]
        if self.gallery.stride(1) != 1:
            self.gallery = self.gallery.contiguous()

    def refuse_nonfinite(self, q: Tensor) -> None:
        """Refuse NaN and inf in the query rows `q`, and in a gallery that no native kernel will check."""
        bad = ~self.query[q].isfinite().all(1)
        if bad.any():
            self._refuse("query", int(q[bad][0]))
        if not self.native and len(q):
            self._refuse_gallery()

    def _refuse_gallery(self) -> None:
        bad = (~self.gallery.isfinite().all(1)).nonzero()
        if len(bad):
            self._refuse("keys", int(bad[0]))

    def _refuse(self, side: str, row: int) -> NoReturn:
        _checks.refuse_nonfinite(_checks.NonFiniteError(side, 0, row), [self.names])

    def _refuse_overflow(self, q: Tensor, scores: Tensor, ids: Tensor) -> None:
        try:
            reference.refuse_overflow(scores.isinf() & (ids >= 0))
        except _checks.ScoreOverflowError as error:
            _checks.refuse_overflow(int(q[error.row]), self.names[0])

    def pair_scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """Scores [B, P] of the gallery items `ids` for the queries `q` (native)."""
        try:
            found: Tensor = _ops.pair_scores(self.query[q], self.gallery, ids, self.metric)
        except _checks.NonFiniteError:
            self._refuse_gallery()
            raise
        self._refuse_overflow(q, found, ids)
        return found

    def count_beats(
        self,
        q: Tensor,
        order: Tensor | None,
        bounds: Tensor,
        thresholds: Tensor,
        ids: Tensor,
        exclude: Tensor | None,
    ) -> Tensor:
        """How many items of each block of the walk beat each threshold [B, P, T] (native)."""
        query = self.query[q]
        try:
            counts: Tensor = _ops.count_beats(
                query, self.gallery, order, bounds, thresholds, ids, self.metric, exclude
            )
        except _checks.NonFiniteError:
            self._refuse_gallery()
            raise
        return counts

    def scores(self, q: Tensor, ids: Tensor) -> Tensor:
        """All scores [B, N] of the queries `q`, among which the items `ids` are ranked (reference)."""
        scores = reference.scores(self.query[q], self.gallery, self.metric)
        self._refuse_overflow(q, scores.gather(1, ids.clamp(min=0)), ids)
        return scores

    def ranks(self, q: Tensor, ids: Tensor, exclude: Tensor | None) -> Tensor:
        """Rank [B, P] of the items `ids` in the whole gallery; -1 where the id is -1."""
        if not self.native:
            return full_sort_ranks(self.scores(q, ids), ids, exclude)
        everything = torch.tensor([0, len(self.gallery)], device=ids.device)
        beaten_by = self.count_beats(q, None, everything, self.pair_scores(q, ids), ids, exclude)
        return beaten_by[..., 0].masked_fill(ids < 0, -1)


def full_sort_ranks(scores: Tensor, ids: Tensor, exclude: Tensor | None) -> Tensor:
    """Rank [B, P] of the items `ids` after a full stable sort of `scores` [B, N]; -1 where the id is -1."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order)
    place.scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    ranks = place.gather(1, ids.clamp(min=0))
    if exclude is not None:
        ahead = place.gather(1, exclude.clamp(min=0)[:, None]) < ranks
        ranks = ranks - (ahead & (exclude >= 0)[:, None]).long()
    return ranks.masked_fill(ids < 0, -1)


class Relevant:
    """The relevant gallery items of every query, found by label without a [Q, N] table."""

    def __init__(
        self,
        query: Tensor,
        gallery: Tensor,
        query_labels: Any,
        gallery_labels: Any,
        exclude: Any,
        names: tuple[str, str] = ("query", "gallery"),
    ) -> None:
        query_labels = _checks.as_tensor("query_labels", query_labels)
        gallery_labels = _checks.as_tensor("gallery_labels", gallery_labels)
        _checks.indices("query_labels", query_labels, names[0], query)
        _checks.indices("gallery_labels", gallery_labels, names[1], gallery)
        if exclude is not None:
            exclude = _checks.as_tensor("exclude", exclude)
            _checks.indices("exclude", exclude, names[0], query)
            _checks.in_range("exclude", exclude, len(gallery), wait=True)
        self._exclude: Tensor | None = exclude
        self.query_labels, self.gallery_labels = query_labels, gallery_labels
        by_label, self._ids = gallery_labels.sort(stable=True)  # [N]
        self._start = torch.searchsorted(by_label, query_labels)  # [Q]
        stop = torch.searchsorted(by_label, query_labels, right=True)
        self._stop = torch.where(query_labels < 0, self._start, stop)
        relevant = self._stop - self._start
        if exclude is not None and len(gallery):
            same = gallery_labels[exclude.clamp(min=0)] == query_labels
            relevant = relevant - ((exclude >= 0) & (query_labels >= 0) & same).long()
        # The queries with a relevant item, ascending.
        self.counted = (relevant > 0).nonzero()[:, 0]
        self.skipped = len(query) - len(self.counted)

    def excluded(self, q: Tensor) -> Tensor | None:
        """The gallery id that each of the queries `q` leaves out."""
        return None if self._exclude is None else self._exclude[q]

    def blocks(self, per_item: int = 1, per_query: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The counted queries in blocks: their numbers [B] and their relevant ids [B, P], padded with -1.

        Queries with similar numbers of relevant items share a block, so that little is padding. A block of
        more than one query needs at most BLOCK entries, where a query needs `per_query` and each of its P
        columns `per_item`.
        """
        items = self._stop - self._start
        queries = self.counted[items[self.counted].argsort(stable=True)]
        widths: list[int] = items[queries].tolist()

        def entries(stop: int) -> int:
            return (stop - first) * (per_item * widths[stop - 1] + per_query)

        first = 0
        while first < len(widths):
            larger = range(first + 2, len(widths) + 1)
            stop = first + 1 + bisect_right(larger, BLOCK, key=entries)
            q = queries[first:stop]
            at = self._start[q][:, None] + torch.arange(widths[stop - 1], device=q.device)
            ids = self._ids[at.clamp(max=len(self._ids) - 1)]
            ids = ids.masked_fill(at >= self._stop[q][:, None], -1)
            left_out = self.excluded(q)
            yield q, ids if left_out is None else ids.masked_fill(ids == left_out[:, None], -1)
            first = stop


def best_first(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks [..., P] ascending with the padding (-1) behind all, and how many are no padding [...]."""
    padding = ranks < 0
    return ranks.masked_fill(padding, BEHIND_ALL).sort(-1).values, (~padding).sum(-1)


def average_precision(ranks: Tensor, relevant: Tensor, cut: int | Tensor | None = None) -> Tensor:
    """AP, or AP@cut with divisor min(relevant, cut), from ascending ranks [..., P]: float64 [...]."""
    if cut is None:
        cut = BEHIND_ALL
    limit = torch.as_tensor(cut, device=ranks.device)
    m = torch.arange(1, ranks.shape[-1] + 1, dtype=torch.float64, device=ranks.device)
    precision = torch.where(ranks < limit[..., None], m / (ranks + 1).double(), 0.0)
    # A running sum adds from the left whatever the padding, so an AP has the same bits in every block.
    return precision.cumsum(-1)[..., -1] / torch.minimum(relevant, limit).double()


def cutoffs(ks: Sequence[int]) -> tuple[int, ...]:
    """`ks` as a tuple of positive whole numbers."""
    if not isinstance(ks, (list, tuple, range, np.ndarray)):
        raise TypeError(f"`ks` must be a sequence of ints: got {type(ks).__name__}; write ks=(1, 5, 10)")
    return tuple(_checks.positive_int("ks", k) for k in ks)
