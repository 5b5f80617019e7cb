"""The command `fastcompat demo`: an upgrade of a model on real images, from end to end."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from .output import OutputFolder
from .terminal import fail, print_report, refuse_missing_extra, shown


def demo(
    data: Annotated[
        str, typer.Option(help="`digits`, or a folder or zip with one sub-folder of images per class.")
    ] = "digits",
    out: Annotated[Path, typer.Option(help="Folder for the report; made if missing.")] = Path(
        "fastcompat-demo"
    ),
    seed: Annotated[
        int, typer.Option(min=0, max=2**31, help="Seed of the split, the training and the backfill order.")
    ] = 0,
) -> None:
    """Train an old and new models on real images, upgrade the gallery step by step, and write a report."""
    try:
        from .. import demo as demonstration
        from . import report
    except ModuleNotFoundError as error:
        refuse_missing_extra(error, "the demonstration")
        raise

    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(OutputFolder(out, report.names()))
            images = demonstration.load(data)
        except ValueError as error:
            fail(str(error))
        found = demonstration.run(images, seed)
        seconds = round(time.perf_counter() - start, 1)
        rows, notes = demonstration.table(found), demonstration.notes(found)
        print_report(found.description, rows, notes)
        picture, title = demonstration.picture(found), f"A model upgrade on {found.data}"
        files = report.pages(
            picture, found.to_dict(), title, found.description, rows, notes, seed=seed, seconds=seconds
        )
        try:
            written = folder.write(files)
        except ValueError as error:
            fail(str(error))
    typer.echo(f"\nDone in {seconds:.0f} s. Written: {', '.join(map(shown, written))}")
