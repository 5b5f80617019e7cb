"""The command `fastcompat align`: fit a transform to stored vectors, and judge it on items it never saw."""

from __future__ import annotations

import io
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

import fastcompat as fc

from .. import _checks, _inputs
from ..judging.curve import BackfillCurve
from ..transforms.base import Transform, as_features
from .npy_files import read_npy
from .output import OutputFolder
from .terminal import fail, print_report, shown, warned_once

METHODS = ("mcl", "rqt", "fct", "fastfill", "procrustes")
FORWARD = ("fct", "fastfill")  # the gallery is transformed; the others transform the query
HELD_OUT, QUERIES = 20_000, 2_000  # at most so many items are held out, and so many of those search
FILES = ("transform.pt", "figures.json")
HEADER = ("serving, nothing re-embedded yet", "mAP", "CMC@1", "mAP on the way", "lost on the way")


def align(
    old: Annotated[Path, typer.Option(help="Old vectors of the items, [N, D_old], .npy.")],
    new: Annotated[Path, typer.Option(help="New vectors of the same items, [N, D_new].")],
    labels: Annotated[Path, typer.Option(help="Labels of the items, [N]; equal labels are relevant.")],
    method: Annotated[
        str,
        typer.Option(
            help="`mcl`, `rqt` or `procrustes`: new queries to the old space; `fct` or `fastfill`: old "
            "items to the new space."
        ),
    ] = "mcl",
    out: Annotated[Path, typer.Option(help="Folder for the transform; made if missing.")] = Path("adapter"),
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the split and the training.")] = 0,
) -> None:
    """Fit a transform between old and new vectors, so that a new query searches items not yet re-embedded."""
    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            _checks.choice("--method", method, METHODS)
            folder = stack.enter_context(OutputFolder(out, FILES))
            o, n, y = _load(old, new, labels)
            generator = torch.Generator("cpu").manual_seed(seed)
            order = torch.randperm(len(y), dtype=torch.int64, device="cpu", generator=generator)
            held_out, seen = order.tensor_split([min(HELD_OUT, len(y) // 5)])
            _refuse_unanswerable(y[held_out])
        except (TypeError, ValueError) as error:
            fail(str(error))
        stack.enter_context(warned_once())
        transform = _fitted(method, o[seen].float(), n[seen].float(), y[seen], seed)
        found = _judged(method, transform, o[held_out].float(), n[held_out].float(), y[held_out], seed)
        seconds = round(time.perf_counter() - start, 1)
        description = (
            f"{method}: old {o.shape[1]} and new {n.shape[1]} dimensions; fitted to {len(seen):,} items, "
            f"judged on {len(held_out):,} others, {min(QUERIES, len(held_out)):,} of which are queries too"
        )
        print_report(description, _table(found), _notes(method, found, out))
        figures = {
            "description": description,
            "method": method,
            "seed": seed,
            "seconds": seconds,
            "curves": {way: curve.to_dict() for way, curve in found.items()},
        }
        file = io.BytesIO()
        transform.save(file)
        files = dict(zip(FILES, (file.getvalue(), json.dumps(figures, indent=1).encode()), strict=True))
        try:
            written = folder.write(files)
        except ValueError as error:
            fail(str(error))
    typer.echo(f"\nDone in {seconds:.0f} s. Written: {', '.join(map(shown, written))}")


def _load(old: Path, new: Path, labels: Path) -> tuple[Tensor, Tensor, Tensor]:
    files = {name: read_npy(name, path, vectors=True) for name, path in (("--old", old), ("--new", new))}
    o, n = as_features(**files)
    file = read_npy("--labels", labels, vectors=False)
    (y,) = _inputs.labels(("--labels",), (file,), (("--old", o),))
    if len(y) < 10:
        raise ValueError(f"`--old` must have at least 10 rows, to fit and to check: got {len(y)}")
    return o, n, y


def _refuse_unanswerable(labels: Tensor) -> None:
    classes, counts = torch.unique(labels, return_counts=True)
    if not torch.isin(labels[:QUERIES], classes[(counts > 1) & (classes >= 0)]).any():
        raise ValueError(
            f"`--labels` must make some item relevant: no two of the {len(labels):,} items held out for the "
            "check have one label"
        )


def _fitted(method: str, old: Tensor, new: Tensor, labels: Tensor, seed: int) -> Transform:
    d_old, d_new = old.shape[1], new.shape[1]
    if method == "procrustes":
        return fc.Procrustes().fit(F.normalize(new), F.normalize(old))
    if method in FORWARD:
        hidden = min(2048, 16 * d_new)  # as many for each dimension as in the paper
        h = fc.ForwardTransform(d_old, d_new, hidden=hidden, log_variance=method == "fastfill")
        return h.fit(old, new, labels, seed=seed)
    psi = fc.ReverseQueryTransform(d_new, d_old)
    return psi.fit(old, new, labels if method == "mcl" else None, seed=seed)


def _judged(
    method: str, transform: Transform, old: Tensor, new: Tensor, labels: Tensor, seed: int
) -> dict[str, BackfillCurve[Tensor]]:
    """Backfills of the held-out items; each of the first of them searches all the others."""
    queries = min(QUERIES, len(old))

    def curve(query_old: Tensor, gallery_old: Tensor, order: Tensor | None = None) -> BackfillCurve[Tensor]:
        return fc.backfill_curve(
            query_old[:queries],
            gallery_old,
            new[:queries],
            new,
            labels[:queries],
            labels,
            order=order,
            ks=(1,),
            baseline=(old[:queries], old),
            exclude=torch.arange(queries, dtype=torch.int64, device="cpu"),
            seed=seed,
        )

    found = {"both models": curve(old, old)}
    if old.shape[1] == new.shape[1]:
        found["new alone"] = curve(new, old)
    if method == "fastfill":
        mapped, log_var = transform.transform(old)
        found["new and fastfill"] = curve(new, mapped)
        order = log_var.argsort(descending=True, stable=True)
        found["the same, in fastfill's order"] = curve(new, mapped, order)
    elif method == "fct":
        found["new and fct"] = curve(new, transform.transform(old))
    else:
        found[f"new and {method}"] = curve(transform.transform(new), old)
    return found


def _table(found: dict[str, BackfillCurve[Tensor]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [HEADER]
    for way, curve in found.items():
        figures = (float(curve.map[0]), float(curve.cmc[1][0]), curve.auc())
        lost = float(curve.negative_flips.max())
        rows.append((way, *(f"{value:.3f}" for value in figures), f"{lost:.1%}"))
    done = found["both models"]
    rows.append(("all re-embedded", f"{float(done.map[-1]):.3f}", f"{float(done.cmc[1][-1]):.3f}", "", ""))
    return rows


def _notes(method: str, found: dict[str, BackfillCurve[Tensor]], out: Path) -> list[tuple[str, str]]:
    if method in FORWARD:
        name, use = "ForwardTransform", "replaces the old vectors of the gallery; queries are new vectors"
    else:
        name = "Procrustes" if method == "procrustes" else "ReverseQueryTransform"
        use = "makes the query for items that still have old vectors out of the new query"
    notes = [
        (
            "Both models",
            "Both embed every query, and the two halves of the gallery are merged by distance. The other "
            "rows need one embedding of a query.",
        ),
        (
            "On the way",
            "mAP on the way: the mean over 22 states from nothing to everything re-embedded. Lost on the "
            "way: the largest share of queries whose first result was right under the old system and is "
            "wrong in some state.",
        ),
        (
            "How sure",
            "The items of the check were held out, their classes were not: for classes that the transform "
            "has never seen expect less.",
        ),
        (
            "How to use it",
            f"This {use}:\n\n    fastcompat.{name}.load({str(out / 'transform.pt')!r}).transform(vectors)",
        ),
    ]
    if "new alone" not in found:
        widths = "The widths differ, so a new query cannot search old items as it is."
        notes.insert(1, ("New alone", widths))
    return notes
