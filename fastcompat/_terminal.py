"""What the commands write on the terminal: errors, tables, running text."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import NoReturn

import typer

EXTRAS = {"sklearn", "matplotlib", "jinja2", "PIL"}


def fail(message: str) -> NoReturn:
    """End the command because of what the user gave it."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def refuse_missing_extra(error: ModuleNotFoundError, what: str) -> None:
    """End the command, with the line that installs what is missing, if that is one of the extras."""
    extra = (error.name or "").partition(".")[0]
    if extra in EXTRAS:
        fail(f'{what} needs {extra}: pip install "fastcompat[demo]"')


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines that fit the terminal."""
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; a header of several words takes two lines."""
    heads = [textwrap.wrap(cell, max(6, len(cell) // 2 + 2), break_long_words=False) for cell in rows[0]]
    deep = max(map(len, heads))
    lines = [*zip(*([""] * (deep - len(head)) + head for head in heads), strict=True), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        cells = zip(row, widths, strict=True)
        first, wide = next(cells)
        typer.echo("  ".join([f"{first:{wide}}", *(f"{cell:>{wide}}" for cell, wide in cells)]))


def print_report(description: str, rows: Sequence[Sequence[str]], notes: Sequence[tuple[str, str]]) -> None:
    """What was judged, its table, and what the numbers mean."""
    typer.echo(f"\n{wrapped(description)}\n")
    print_table(rows)
    for heading, text in notes:
        typer.echo(f"\n{heading}\n{wrapped(text, '  ')}")
