"""Judge an upgrade from stored vectors alone: the curves of a backfill, and in plain words what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import _checks, _inputs
from ._arrays import NpyFile
from .backfill import BackfillCurve, backfill_curve
from .judging import queries
from .npy_files import read_npy

KS = (1, 5, 10)
BLOCK = 1024  # queries between two steps of the progress bar
VECTORS = ("old", "new", "query_old", "query_new")
HEADER = ("serving", "backfilled", "mAP", *(f"CMC@{k}" for k in KS), "lost", "won")


@dataclass(frozen=True)
class Upgrade:
    """A gallery and its queries in both spaces, under the names of `fastcompat.backfill_curve`.

    Without queries of their own the gallery's items are the queries, each left out of its own ranking.
    """

    arrays: dict[str, Any]
    leave_one_out: bool

    @property
    def same_width(self) -> bool:
        """Whether a new query can be compared with an old item."""
        return bool(self.arrays["old"].shape[1] == self.arrays["new"].shape[1])


def load(
    old: Path,
    new: Path,
    labels: Path,
    query_old: Path | None,
    query_new: Path | None,
    query_labels: Path | None,
) -> Upgrade:
    """Read the files; ValueError, naming the option, for one that does not hold what it should."""
    queries = {"query_old": query_old, "query_new": query_new, "query_labels": query_labels}
    given = [name for name, path in queries.items() if path is not None]
    if given and len(given) < len(queries):
        missing = next(name for name in queries if name not in given)
        raise ValueError(
            f"`{_option(missing)}` must be given with `{_option(given[0])}`: pass all three or none"
        )
    paths = {"old": old, "new": new, "gallery_labels": labels} | {n: p for n, p in queries.items() if p}
    files = {name: read_npy(_option(name), path, vectors=name in VECTORS) for name, path in paths.items()}
    arrays = _vectors({name: file for name, file in files.items() if name in VECTORS})
    arrays |= _labels({name: file for name, file in files.items() if name not in VECTORS}, arrays)
    if not given:
        arrays |= {"query_old": arrays["old"], "query_new": arrays["new"]}
        arrays["query_labels"] = arrays["gallery_labels"]
        arrays["exclude"] = np.arange(len(arrays["gallery_labels"]))
    return Upgrade(arrays, leave_one_out=not given)


def read_order(path: Path) -> np.ndarray[Any, Any]:
    """The rows of the gallery, first to be backfilled first."""
    file = read_npy("--order", path, vectors=False)
    return _inputs.rows("--order", file, None).numpy()


def _vectors(files: dict[str, NpyFile]) -> dict[str, Any]:
    """Float16 as it lies in its files, which stay memory-mapped; float32 where they differ or are wider."""
    found = {name: _inputs.matrix(_option(name), file) for name, file in files.items()}
    for name, other in (("new", "old"), ("query_new", "query_old")):
        if name in found:
            _checks.rows(_option(name), found[name], _option(other), found[other])
    dtypes = {x.dtype for x in found.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32
    return {name: x.to(dtype).numpy() for name, x in found.items()}


def _labels(files: dict[str, NpyFile], vectors: dict[str, Any]) -> dict[str, Any]:
    """Labels as int64; strings are numbered over the gallery and the queries together."""
    sides = {"gallery_labels": "old", "query_labels": "query_old"}
    of = [(_option(sides[name]), torch.from_numpy(vectors[sides[name]])) for name in files]
    found = _inputs.labels([_option(name) for name in files], list(files.values()), of)
    return {name: y.numpy() for name, y in zip(files, found, strict=True)}


def curves(
    upgrade: Upgrade, order: np.ndarray[Any, Any] | None, metric: str, states: int, seed: int
) -> dict[str, BackfillCurve]:
    """The backfill with both models' queries and, where widths allow it, with the new model's alone.

    Flips are counted against the old system. Raises ValueError, naming the option, for vectors, labels or an
    order that do not fit one another.
    """
    arrays = upgrade.arrays
    ways = {"both models": "query_old", "new alone": "query_new"}
    if not upgrade.same_width:
        del ways["new alone"]
    common: dict[str, Any] = {"order": order, "metric": metric, "states": states, "seed": seed, "ks": KS}
    parts: dict[str, list[tuple[int, BackfillCurve]]] = {way: [] for way in ways}
    total = len(arrays["query_labels"])
    with tqdm(total=total * len(ways), desc="judging", unit=" queries", disable=None) as bar:
        for first in range(0, max(total, 1), BLOCK):
            rows = slice(first, first + BLOCK)
            block = {n: a[rows] for n, a in arrays.items() if n.startswith("query") or n == "exclude"}
            gallery = {n: a for n, a in arrays.items() if n not in block}
            for way, side in ways.items():
                try:
                    curve = backfill_curve(
                        **{**block, **gallery, "query_old": block[side]},
                        baseline=(block["query_old"], arrays["old"]),
                        **common,
                    )
                except (TypeError, ValueError) as error:
                    raise ValueError(_with_options(str(error), upgrade.leave_one_out)) from None
                parts[way].append((len(block["query_labels"]) - curve.skipped, curve))
                bar.update(len(block["query_labels"]))
    if not sum(count for count, _ in parts["both models"]):
        raise ValueError("`--labels` must make some item relevant: no query has a relevant item to find")
    return {way: _mean(each) for way, each in parts.items()}


def _mean(parts: Sequence[tuple[int, BackfillCurve]]) -> BackfillCurve:
    """The curve of all queries from the curves of some, and how many queries each of them counted."""
    some = [(count, curve) for count, curve in parts if count]
    counts = np.array([count for count, _ in some], dtype=np.float64)

    def mean(values: Iterator[Any]) -> Any:
        return np.average(np.stack(list(values)), axis=0, weights=counts)

    return BackfillCurve(
        fraction=some[0][1].fraction,
        map=mean(curve.map for _, curve in some),
        cmc={k: mean(curve.cmc[k] for _, curve in some) for k in KS},
        negative_flips=mean(curve.negative_flips for _, curve in some),
        positive_flips=mean(curve.positive_flips for _, curve in some),
        ndcg={k: mean(curve.ndcg[k] for _, curve in some) for k in KS},
        mrr=mean(curve.mrr for _, curve in some),
        skipped=sum(curve.skipped for _, curve in parts),
        per_query=queries.joined([curve.per_query for _, curve in parts]),
    )


def table(found: dict[str, BackfillCurve]) -> list[tuple[str, ...]]:
    """The start, the middle, the end and the mean of each way to serve, header first, as text."""
    rows = [HEADER]
    for way, curve in found.items():
        last = len(curve.fraction) - 1
        for name, at in (
            *((f"{curve.fraction[t]:.0%}", t) for t in dict.fromkeys((0, (last + 1) // 2, last))),
            ("mean", None),
        ):
            figures = [curve.map, *curve.cmc.values(), curve.negative_flips, curve.positive_flips]
            values = [float(each.mean() if at is None else each[at]) for each in figures]
            cells = [f"{value:.3f}" for value in values[:-2]] + [f"{value:.1%}" for value in values[-2:]]
            rows.append((way, name, *cells))
    return rows


def describe(upgrade: Upgrade, found: dict[str, BackfillCurve], order: str, metric: str) -> str:
    """What was judged, in one sentence."""
    arrays, curve = upgrade.arrays, found["both models"]
    queries = len(arrays["query_labels"])
    asked = (
        "each item a query, left out of its own ranking" if upgrade.leave_one_out else f"{queries:,} queries"
    )
    left_out = f", {curve.skipped:,} queries without a relevant item left out" if curve.skipped else ""
    widths = f"old {arrays['old'].shape[1]} and new {arrays['new'].shape[1]} dimensions"
    return f"{len(arrays['old']):,} items, {asked}; {widths}; metric {metric}; order {order}{left_out}"


def notes(upgrade: Upgrade, found: dict[str, BackfillCurve]) -> list[tuple[str, str]]:
    """(heading, explanation) pairs: how to read the table."""
    both, alone = found["both models"], found.get("new alone")
    counted = len(upgrade.arrays["query_labels"]) - both.skipped
    right = float(both.cmc[1][0])
    error = max((right * (1 - right) / counted) ** 0.5, 1 / counted)
    if alone is None:
        verdict = "The two models' vectors have different widths, so a new query cannot search old items."
    else:
        wins = float(alone.map[0]) > float(both.map[0])
        verdict = (
            "One new query searches old and re-embedded items alike. At 0 % that is the cross test: mAP "
            f"{float(alone.map[0]):.3f} against the old system's {float(both.map[0]):.3f}, so the new model "
            f"{'counts' if wins else 'does not count'} as compatible with the old one."
        )
    return [
        (
            "Both models",
            "Both models embed every query: the old query ranks the items that still have old vectors, the "
            "new query those re-embedded, in one list by score. At 0 % that is the old system, at 100 % the "
            "new one.",
        ),
        ("New alone", verdict),
        (
            "Lost and won",
            "Share of the queries whose first result was right under the old system and is wrong now, and "
            "the reverse. An average that rises can hide the lost ones.",
        ),
        (
            "Mean",
            f"Plain mean over the {len(both.fraction)} states of the gallery: what users get on average "
            "while the backfill runs.",
        ),
        (
            "How sure",
            f"{counted:,} queries: a CMC@1 has a standard error of about {error:.1%}. Another order of "
            "backfilling (`--seed`) moves the middle of the curves too.",
        ),
    ]


def _option(name: str) -> str:
    return "--labels" if name == "gallery_labels" else f"--{name.replace('_', '-')}"


def _with_options(message: str, leave_one_out: bool) -> str:
    """The message of a function with the names of its arguments as options of the command."""

    def option(match: re.Match[str]) -> str:
        name = match[1]
        if leave_one_out:
            name = {"query_labels": "gallery_labels"}.get(name, name.removeprefix("query_"))
        return f"`{_option(name)}`"

    names = "|".join((*VECTORS, "query_labels", "gallery_labels", "order", "metric", "states", "seed"))
    return re.sub(f"`({names})`", option, message)
