"""The `fastcompat` command."""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated

import typer

import fastcompat as fc

from . import align, demo, evaluate, info
from .terminal import fail

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `fastcompat` command."""
    warnings.showwarning = lambda message, *_: typer.echo(f"warning: {message}", err=True)
    app(prog_name="fastcompat")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastcompat {fc.__version__}")
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Replace an embedding model without downtime and without regret."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no terminal's encoding stops a report
            stream.reconfigure(errors="backslashreplace")
    try:
        fc.build_info()
    except ValueError as error:
        fail(str(error))


for _run in (info.info, demo.demo, evaluate.evaluate, align.align):
    app.command()(_run)
