"""The `fastcompat` command."""

from __future__ import annotations

import json
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import torch
import typer

import fastcompat as fc

from . import selfcheck

if TYPE_CHECKING:
    from .demo import Upgrade

EXTRAS = {"sklearn", "matplotlib", "jinja2", "PIL"}

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the `fastcompat` command."""
    app()


@app.callback()
def _command() -> None:
    """Replace an embedding model without downtime and without regret."""
    try:
        fc.build_info()
    except ValueError as error:
        _fail(str(error))


@app.command()
def info() -> None:
    """Show what was built and what this machine offers, and check every kernel against the reference."""
    build = fc.build_info()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "fastcompat": f"{build['version']}, built with {build['compiler']}",
        "CUDA kernels": f"{build['cuda']} for {', '.join(build['cuda_archs'])}"
        if build["cuda"]
        else "not built",
        "SIMD built": ", ".join(build["simd_built"]),
        "SIMD usable": f"{', '.join(build['simd_usable'])} (in use: {build['simd']})",
        "threads": f"{build['threads']} (follows torch.set_num_threads), {cpus} CPUs available",
        "CPU": _cpu_name(),
        "GPU": ", ".join(gpus) or "none that torch can use",
        "torch, Python": f"{torch.__version__}, {platform.python_version()}",
    }
    for name, value in facts.items():
        typer.echo(f"{name + ':':15}{value}")

    typer.echo("\nself-check (float32, bfloat16, float16 against the reference in float64):")
    checks = list(selfcheck.run())
    levels = list(dict.fromkeys(check.simd for check in checks))
    rows = [("kernel", *levels)]
    for kernel in dict.fromkeys(check.kernel for check in checks):
        wrong = {check.simd for check in checks if check.kernel == kernel and check.problem}
        rows.append((kernel, *("FAIL" if level in wrong else "ok" for level in levels)))
    _print_table(rows)
    failed = [check for check in checks if check.problem]
    for check in failed:
        typer.echo(f"FAIL {check.kernel}, {check.simd}, {check.dtype}: {check.problem}", err=True)
    if failed:
        raise typer.Exit(1)


@app.command()
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
        from . import demo as demonstration
        from . import report
    except ModuleNotFoundError as error:
        extra = (error.name or "").partition(".")[0]
        if extra not in EXTRAS:
            raise
        _fail(f'the demonstration needs {extra}: pip install "fastcompat[demo]"')

    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(report.OutputFolder(out))
            images = demonstration.load(data)
        except ValueError as error:
            _fail(str(error))
        found = demonstration.run(images, seed)
        seconds = round(time.perf_counter() - start, 1)
        rows, notes = demonstration.table(found), demonstration.notes(found)
        typer.echo(f"\n{_wrapped(found.description)}\n")
        _print_table(rows)
        for heading, text in notes:
            typer.echo(f"\n{heading}\n{_wrapped(text, '  ')}")
        written = folder.write(_files(found, rows, notes, seconds))
    typer.echo(f"\nDone in {seconds:.0f} s. Written: {', '.join(map(str, written))}")


def _files(
    found: Upgrade, rows: Sequence[Sequence[str]], notes: Sequence[tuple[str, str]], seconds: float
) -> dict[str, bytes]:
    """The report's files by name."""
    from . import demo as demonstration
    from . import report

    picture = report.png(demonstration.picture(found))
    run = {"seconds": seconds, "build": fc.build_info(), "torch": torch.__version__}
    page = report.html("demo.html", picture, found=found, rows=rows, notes=notes, **run)
    figures = json.dumps(found.to_dict() | run, indent=1).encode()
    return {"curves.png": picture, "figures.json": figures, "report.html": page}


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def _wrapped(text: str, indent: str = "") -> str:
    width = min(shutil.get_terminal_size().columns, 100)
    return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their longest cell; a header of several words takes two lines."""
    heads = [textwrap.wrap(cell, max(6, len(cell) // 2 + 2), break_long_words=False) for cell in rows[0]]
    deep = max(map(len, heads))
    lines = [*zip(*([""] * (deep - len(head)) + head for head in heads), strict=True), *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for row in lines:
        cells = zip(row, widths, strict=True)
        first, wide = next(cells)
        typer.echo("  ".join([f"{first:{wide}}", *(f"{cell:>{wide}}" for cell, wide in cells)]))


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
