"""The command `fastcompat evaluate`."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .output import OutputFolder
from .terminal import fail, print_report, refuse_missing_extra, shown, warned_once


def evaluate(
    old: Annotated[Path, typer.Option(help="Old vectors of the gallery, [N, D_old], .npy.")],
    new: Annotated[Path, typer.Option(help="New vectors of the same items, [N, D_new].")],
    labels: Annotated[Path, typer.Option(help="Labels of the items, [N]; equal labels are relevant.")],
    query_old: Annotated[
        Path | None, typer.Option(help="Old vectors of the queries (without queries: leave-one-out).")
    ] = None,
    query_new: Annotated[Path | None, typer.Option(help="New vectors of the same queries.")] = None,
    query_labels: Annotated[Path | None, typer.Option(help="Labels of the queries.")] = None,
    out: Annotated[
        Path,
        typer.Option(
            help="The report; its figures (figures.json, curves.png) are written beside it, under names that "
            "begin with the report's where that is not report.html."
        ),
    ] = Path("report.html"),
    order: Annotated[
        str,
        typer.Option(
            help="`random`, or an .npy file: the rows of the gallery, first to be backfilled first."
        ),
    ] = "random",
    metric: Annotated[str, typer.Option(help="`cosine`, `ip` or `l2`.")] = "cosine",
    states: Annotated[int, typer.Option(min=2, help="States of the backfill, old and new included.")] = 22,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Seed of the random order.")] = 0,
) -> None:
    """Judge an upgrade from stored vectors: every state of the backfill, and what users lose."""
    try:
        from . import evaluation, report
    except ModuleNotFoundError as error:
        refuse_missing_extra(error, "the report")
        raise

    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            if out.suffix != ".html":
                raise ValueError(f"`--out` must end in .html: got `{shown(out)}`")
            folder = stack.enter_context(OutputFolder(out.parent, report.names(out.name)))
            upgrade = evaluation.load(old, new, labels, query_old, query_new, query_labels)
            given = None if order == "random" else evaluation.read_order(Path(order))
            stack.enter_context(warned_once())
            found = evaluation.curves(upgrade, given, metric, states, seed)
        except (TypeError, ValueError) as error:
            fail(str(error))
        seconds = round(time.perf_counter() - start, 1)
        description = evaluation.describe(upgrade, found, shown(Path(order).name), metric)
        rows, notes = evaluation.table(found), evaluation.notes(upgrade, found)
        print_report(description, rows, notes)
        both = found["both models"]
        picture = report.figure(
            [report.Line(way, curve) for way, curve in found.items()],
            title="What users get while the gallery is being re-embedded",
            subtitle=description,
            caption=(
                "both models: both embed every query, and the two result lists are merged by score.\n"
                "new alone: one new query searches old and re-embedded items."
            ),
            old_map=float(both.map[0]),
        )
        figures = {
            "description": description,
            "curves": {way: curve.to_dict() for way, curve in found.items()},
            "area": {
                way: {name: curve.auc(name) for name in ("map", "cmc@1")} for way, curve in found.items()
            },
        }
        title = "A model upgrade judged from its vectors"
        files = report.pages(
            picture, figures, title, description, rows, notes, seed=seed, seconds=seconds, name=out.name
        )
        try:
            written = folder.write(files)
        except ValueError as error:
            fail(str(error))
    typer.echo(f"\nDone in {seconds:.0f} s. Written: {', '.join(map(shown, written))}")
