"""Relevance judgements (qrels): which gallery items answer which query, and how well."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import _inputs


class Relevance:
    """Judged pairs of a query and a gallery item, for data where equal labels are not the question.

    Pair m says that item `item[m]` was judged for query `query[m]` with `grade[m]`: 1 and above is relevant,
    the higher the better; 0 and below is judged not relevant, which counts like an item nobody judged::

        relevance = fc.Relevance(query=[0, 0, 1], item=[7, 2, 5], grade=[2, 1, 1])
        found = fc.retrieval_metrics(query, gallery, relevance=relevance)      # labels are left out

    A query without a relevant item is left out of every figure and counted in `.skipped`, as with labels.

    Args:
        query: [M] whole numbers, rows of the queries.
        item: [M] whole numbers, rows of the gallery.
        grade: [M] whole numbers (None: 1 each).

    Attributes:
        query, item, grade: int64 [M], on the CPU.
        unknown_queries, unknown_items: ids of a file that are not among the given ones, each named once.
        left_out: number of lines of the file that named one of them.

    Raises:
        ValueError, TypeError: negative row numbers, grades that are no whole numbers, a pair listed twice.
    """

    def __init__(self, query: Any, item: Any, grade: Any = None) -> None:
        sides = {"query": query, "item": item} | ({} if grade is None else {"grade": grade})
        kinds = {"query": "rows", "item": "rows", "grade": "labels"}
        columns = {name: _inputs.rows(name, value, None, kinds[name]).cpu() for name, value in sides.items()}
        length = len(columns["query"])
        for name, column in columns.items():
            if len(column) != length:
                raise ValueError(
                    f"`{name}` must have one entry per entry of `query`: got {len(column)} and {length}"
                )
            if name != "grade" and length and int(column.min()) < 0:
                raise ValueError(f"`{name}` must hold row numbers from 0: got {int(column.min())}")
        self.query: Tensor = columns["query"]
        self.item: Tensor = columns["item"]
        self.grade: Tensor = columns.get("grade", torch.ones_like(self.query))
        self.unknown_queries: list[str] = []
        self.unknown_items: list[str] = []
        self.left_out = 0
        order = self._order()
        pairs = torch.stack([self.query[order], self.item[order]])
        twice = (pairs[:, 1:] == pairs[:, :-1]).all(0).nonzero()
        if len(twice):
            q, j = pairs[:, int(twice[0])].tolist()
            raise ValueError(
                f"`query` and `item` must name each pair once: query {q} and item {j} are listed "
                f"{int(((self.query == q) & (self.item == j)).sum())} times; keep one grade"
            )

    def _order(self) -> Tensor:
        """By query, then by item."""
        by_item = self.item.argsort(stable=True)
        return by_item[self.query[by_item].argsort(stable=True)]

    @classmethod
    def from_trec(
        cls,
        path: str | os.PathLike[str],
        query_ids: Iterable[Any],
        item_ids: Iterable[Any],
        *,
        strict: bool = False,
    ) -> Relevance:
        """Read a TREC qrels file: one `query-id iteration item-id grade` a line, separated by white space.

        Args:
            path: the file, UTF-8.
            query_ids: the ids of the query rows, in order; compared as text.
            item_ids: the ids of the gallery rows.
            strict: refuse a file that names other ids. Otherwise such lines are left out with a warning, and
                `.unknown_queries`, `.unknown_items` and `.left_out` list and count them.

        Raises:
            ValueError: a line of another form, an id given twice, no line left, `strict` and unknown ids.
        """
        queries, items = _numbered("query_ids", query_ids), _numbered("item_ids", item_ids)
        pairs: list[tuple[int, int, int]] = []
        unknown: tuple[dict[str, None], dict[str, None]] = ({}, {})
        left_out = 0
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not (fields := line.split()):
                    continue
                try:
                    query, _, item, written = fields
                    grade = int(written)
                except ValueError:
                    raise ValueError(
                        f"`path` must hold lines `query-id iteration item-id grade`: line {number} of "
                        f"{str(path)!r} is {line.strip()!r:.80}"
                    ) from None
                if query in queries and item in items:
                    pairs.append((queries[query], items[item], grade))
                    continue
                left_out += 1
                for name, known, others in ((query, queries, unknown[0]), (item, items, unknown[1])):
                    if name not in known:
                        others[name] = None
        said = " and ".join(
            f"{len(others):,} unknown {kind} (such as {next(iter(others))!r:.40})"
            for kind, others in zip(("query ids", "item ids"), unknown, strict=True)
            if others
        )
        if left_out and (strict or not pairs):
            raise ValueError(
                f"`path` must name ids of `query_ids` and `item_ids`: {str(path)!r} names {said} in "
                f"{left_out:,} of {left_out + len(pairs):,} lines"
            )
        if left_out:
            warnings.warn(f"{left_out:,} lines of {str(path)!r} are left out: {said}", stacklevel=2)
        columns = torch.tensor(pairs, dtype=torch.int64, device="cpu").reshape(-1, 3).unbind(1)
        found = cls(*columns)
        found.unknown_queries, found.unknown_items = (list(others) for others in unknown)
        found.left_out = left_out
        return found

    def __len__(self) -> int:
        return len(self.query)

    def __repr__(self) -> str:
        relevant, queries = int((self.grade >= 1).sum()), len(torch.unique(self.query))
        others = f", {self.left_out} lines left out" if self.left_out else ""
        return f"Relevance({len(self)} pairs of {queries} queries, {relevant} of them relevant{others})"

    def relevant(self, queries: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, item and grade of the relevant pairs, by query, then by item.

        Raises:
            ValueError: a pair outside `queries` rows and `items` rows.
        """
        for name, column, size in (("queries", self.query, queries), ("items", self.item, items)):
            if len(column) and int(column.max()) >= size:
                outside = column[column >= size]
                raise ValueError(
                    f"`relevance` must name {name} below {size}: {len(outside)} of its {len(self)} pairs "
                    f"name others, such as {int(outside[0])}; number them by the rows that are given here"
                )
        order = self._order()
        order = order[self.grade[order] >= 1]
        return self.query[order], self.item[order], self.grade[order]


def _numbered(name: str, ids: Iterable[Any]) -> dict[str, int]:
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    rows: dict[str, int] = {}
    for row, each in enumerate(ids):
        text = str(each)
        if text in rows:
            raise ValueError(f"`{name}` must name each row once: {text!r:.40} is row {rows[text]} and {row}")
        rows[text] = row
    return rows
