"""What the commands write on the terminal: errors, tables, running text."""

from __future__ import annotations

import os
import shutil
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def warned_once() -> Iterator[None]:
    """What was said of the labels when their files were read is not said again by the functions."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*negative labels other than -1")
        yield


def shown(name: str | os.PathLike[str]) -> str:
    """A file's name as it is; bytes that are not UTF-8 and control characters as Python writes them."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in os.fspath(name))


def _escaped(letter: str) -> str:
    surrogate = "\udc80" <= letter <= "\udcff"  # how Python keeps a byte that is not UTF-8
    return f"\\x{ord(letter) - 0xDC00:02x}" if surrogate else letter.encode("unicode_escape").decode()


def wrapped(text: str, indent: str = "") -> str:
    """The text in lines that fit the terminal; a line that is indented already (code to copy) stays whole."""
    width = min(shutil.get_terminal_size().columns, 100)
    lines = [
        indent + part
        for line in text.split("\n")
        for part in (
            [line]
            if line.startswith(" ")
            else textwrap.wrap(line, width - len(indent), break_long_words=False, break_on_hyphens=False)
        )
    ]
    return "\n".join(lines)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows and columns if they fit the terminal, or else columns and rows, or else one column of both."""
    width = shutil.get_terminal_size().columns
    for table in (_aligned(rows), _aligned(list(zip(*rows, strict=True)))):
        if all(len(line) <= width for line in table):
            typer.echo("\n".join(table))
            return
    for row in rows[1:]:
        typer.echo(row[0])
        typer.echo(
            "\n".join(f"  {name}: {cell}" for name, cell in zip(rows[0][1:], row[1:], strict=True) if cell)
        )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their longest cell; a header of several words takes two lines."""
    heads = [textwrap.wrap(cell, max(6, len(cell) // 2 + 2), break_long_words=False) for cell in rows[0]]
    deep = max(map(len, heads))
    lines = [*zip(*([""] * (deep - len(head)) + head for head in heads), strict=True), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if i == 0 else '>'}{wide}}"
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in lines
    ]


def print_report(description: str, rows: Sequence[Sequence[str]], notes: Sequence[tuple[str, str]]) -> None:
    """What was judged, its table, and what the numbers mean."""
    typer.echo(f"\n{wrapped(description)}\n")
    print_table(rows)
    for heading, text in notes:
        typer.echo(f"\n{heading}\n{wrapped(text, '  ')}")
