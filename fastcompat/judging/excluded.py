"""What a query must not find: itself, its page, its camera. Neither ranked nor relevant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, _inputs

# (name, queries [Q, D]), (name, gallery [N, D])
Sides = tuple[tuple[str, Tensor], tuple[str, Tensor]]


class Excluded:
    """The gallery items that each query leaves out, by id or by group."""

    def __init__(self, exclude: Any, groups: Any, sides: Sides) -> None:
        query, gallery = sides[0][1], sides[1][1]
        self._queries = len(query)
        self.ids: Tensor | None = None  # [Q, E], each id once a row, else -1
        self.groups: tuple[Tensor, Tensor] | None = None  # [Q], [N]
        if exclude is not None:
            if exclude_is_table := _inputs.whole("exclude", exclude, "rows").dim() == 2:
                table = _inputs.row_table("exclude", exclude, sides[0], single=False)
            else:
                table = _inputs.rows("exclude", exclude, sides[0])[:, None]
            _checks.in_range("exclude", table, len(gallery), wait=True)
            if exclude_is_table:
                table = table.sort(1).values
                table = torch.cat(
                    [table[:, :1], table[:, 1:].masked_fill(table[:, 1:] == table[:, :-1], -1)], 1
                )
            self.ids = table if table.shape[1] else None
        if groups is not None:
            if not isinstance(groups, (tuple, list)) or len(groups) != 2:
                raise TypeError(
                    "`exclude_groups` must be a pair (query_groups, gallery_groups): "
                    f"got {type(groups).__name__}"
                )
            names = "exclude_groups[0]", "exclude_groups[1]"
            mine, theirs = _inputs.labels(names, tuple(groups), sides, needed=True)
            self.groups = mine, theirs
            by_group, self._members = theirs.sort(stable=True)
            self._start = torch.searchsorted(by_group, mine)
            stop = torch.searchsorted(by_group, mine, right=True)
            self._stop = torch.where(mine < 0, self._start, stop)
            if self.ids is not None:  # named once, by its group
                again = (theirs[self.ids.clamp(min=0)] == mine[:, None]) & (mine >= 0)[:, None]
                self.ids = self.ids.masked_fill(again, -1)

    @property
    def width(self) -> int:
        """The most items that one query leaves out."""
        listed = 0 if self.ids is None else self.ids.shape[1]
        grouped = 0 if self.groups is None or not self._queries else int((self._stop - self._start).max())
        return listed + grouped

    def of(self, q: Tensor) -> Tensor | None:
        """All ids that the queries `q` leave out: [B, E], padded with -1 (None: no query leaves any out)."""
        parts = [] if self.ids is None else [self.ids[q]]
        if self.groups is not None and len(q) and len(self._members):
            start, stop = self._start[q], self._stop[q]
            longest = int((stop - start).max())
            at = start[:, None] + torch.arange(longest, dtype=torch.int64, device=q.device)
            ids = self._members[at.clamp(max=len(self._members) - 1)]
            parts.append(ids.masked_fill(at >= stop[:, None], -1))
        table = torch.cat(parts, 1) if parts else None
        return table if table is not None and table.shape[1] else None

    def covers(self, q: Tensor, ids: Tensor) -> Tensor:
        """Which of the items `ids` [B, P] the queries `q` [B] leave out."""
        found = torch.zeros_like(ids, dtype=torch.bool)
        if self.ids is not None:
            for column in self.ids[q].unbind(1):
                found |= (ids == column[:, None]) & (ids >= 0)
        if self.groups is not None:
            mine, theirs = self.groups
            if len(theirs):
                same = theirs[ids.clamp(min=0)] == mine[q][:, None]
                found |= same & (mine[q] >= 0)[:, None] & (ids >= 0)
        return found

    def count_with_label(self, query_labels: Tensor, gallery_labels: Tensor) -> Tensor:
        """How many of the items that each query leaves out have its label: [Q]."""
        number = torch.zeros_like(query_labels)
        if not len(gallery_labels):
            return number
        labelled = query_labels >= 0
        if self.ids is not None:
            same = gallery_labels[self.ids.clamp(min=0)] == query_labels[:, None]
            number += ((self.ids >= 0) & same & labelled[:, None]).sum(1)
        if self.groups is not None:
            mine, theirs = self.groups
            # Pairs (label, group) get numbers of their own; those of both sides together.
            pairs = torch.stack([torch.cat([gallery_labels, query_labels]), torch.cat([theirs, mine])])
            numbers = torch.unique(pairs, dim=1, return_inverse=True)[1]
            theirs, mine_pair = numbers.split([len(gallery_labels), len(query_labels)])
            each = torch.bincount(theirs, minlength=len(numbers))[mine_pair]
            number += each.masked_fill(~labelled | (mine < 0), 0)
        return number
