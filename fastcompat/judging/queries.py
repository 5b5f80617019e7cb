"""A backfill query by query: who wins, who loses, and when."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import _checks, _files


@dataclass(frozen=True, repr=False)
class CurveQueries:
    """The figures of `BackfillCurve` for every query and state, tensors or arrays as the queries were given.

    A skipped query has NaN in the float64 tables and False in the others.

    Attributes:
        ap: float64 [T, Q], average precision.
        rr: float64 [T, Q], reciprocal rank of the first relevant item.
        ndcg: `ndcg[k]` float64 [T, Q].
        top1: bool [T, Q], the best item is relevant.
        lost: bool [T, Q], the best item is relevant in the baseline and not here.
        won: bool [T, Q], the best item is relevant here and not in the baseline.
        fraction: float64 [T], share of the gallery that is backfilled.
    """

    ap: Any
    rr: Any
    ndcg: dict[int, Any]
    top1: Any
    lost: Any
    won: Any
    fraction: Any

    def __repr__(self) -> str:
        states, queries = self.ap.shape
        return f"CurveQueries({queries} queries in {states} states: ap, rr, ndcg, top1, lost, won)"

    def losers(self, count: int = 10, state: int = -1) -> list[int]:
        """The queries whose AP falls most from state 0 to `state`, worst first; none whose AP does not."""
        return self._moved(count, state, -1)

    def winners(self, count: int = 10, state: int = -1) -> list[int]:
        """The queries whose AP rises most from state 0 to `state`, best first; none whose AP does not."""
        return self._moved(count, state, 1)

    def _moved(self, count: int, state: int, sign: int) -> list[int]:
        count, state = _checks.positive_int("count", count), _checks.whole("state", state)
        ap: npt.NDArray[np.float64] = _array(self.ap)
        if not -len(ap) <= state < len(ap):
            raise ValueError(f"`state` must be one of {len(ap)} states, from 0: got {state}")
        gain = sign * (ap[state] - ap[0])
        order = np.argsort(-np.nan_to_num(gain), kind="stable")[:count]
        return [int(q) for q in order if gain[q] > 0]

    def to_csv(self, path: str | Path, ids: Sequence[Any] | None = None) -> None:
        """Write one line a query: its AP before, after and at its worst, and in how many states it is lost.

        Args:
            path: the file, replaced as a whole.
            ids: [Q] names of the queries (None: their rows).
        """
        ap, top1, lost = _array(self.ap), _array(self.top1), _array(self.lost)
        fraction = _array(self.fraction)
        if ids is not None and len(ids) != ap.shape[1]:
            raise ValueError(f"`ids` must have one entry per query: got {len(ids)} and {ap.shape[1]}")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = ("query", "ap_old", "ap_new", "change", "worst_ap", "worst_at_fraction")
        writer.writerow((*head, "top1_old", "top1_new", "states_lost"))
        for q in range(ap.shape[1]):
            name = q if ids is None else _plain(ids[q])
            if np.isnan(ap[0, q]):
                writer.writerow((name, *[""] * 8))
                continue
            worst = int(ap[:, q].argmin())
            figures = (ap[0, q], ap[-1, q], ap[-1, q] - ap[0, q], ap[worst, q], fraction[worst])
            flags = int(top1[0, q]), int(top1[-1, q]), int(lost[:, q].sum())
            writer.writerow((name, *(repr(float(figure)) for figure in figures), *flags))
        _files.write_file(path, text.getvalue().encode())


def joined(parts: Sequence[CurveQueries]) -> CurveQueries:
    """The tables of the queries of all parts, in order, as NumPy arrays."""

    def together(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {k: together([each[k] for each in values]) for k in values[0]}
        return np.concatenate([_array(each) for each in values], axis=1)

    names = ("ap", "rr", "ndcg", "top1", "lost", "won")
    tables = {name: together([getattr(part, name) for part in parts]) for name in names}
    return CurveQueries(**tables, fraction=_array(parts[0].fraction))


def _array(values: Any) -> npt.NDArray[Any]:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values)


def _plain(name: Any) -> Any:
    return name.item() if hasattr(name, "item") else name
