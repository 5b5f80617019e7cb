"""The `fastcompat` command."""

from __future__ import annotations

import os
import platform
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import torch
import typer

import fastcompat as fc

from . import _native, align_command, backfill_command, evaluate_command, selfcheck
from ._output import OutputFolder
from ._terminal import fail, print_report, print_table, refuse_missing_extra

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
        fail(str(error))


@app.command()
def info() -> None:
    """Show what was built and what this machine offers, and check every kernel against the reference."""
    build = fc.build_info()
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
        "GPU": ", ".join(map(_gpu, range(torch.cuda.device_count()))) or "none that torch can use",
        "torch, Python": f"{torch.__version__}, {platform.python_version()}",
    }
    for name, value in facts.items():
        typer.echo(f"{name + ':':15}{value}")

    typer.echo("\nself-check (float32, bfloat16, float16 against the reference in float64):")
    checks = list(selfcheck.run())
    levels = list(dict.fromkeys(check.where for check in checks))
    rows = [("kernel", *levels)]
    for kernel in dict.fromkeys(check.kernel for check in checks):
        wrong = {check.where for check in checks if check.kernel == kernel and check.problem}
        rows.append((kernel, *("FAIL" if level in wrong else "ok" for level in levels)))
    print_table(rows)
    failed = [check for check in checks if check.problem]
    for check in failed:
        typer.echo(f"FAIL {check.kernel}, {check.where}, {check.dtype}: {check.problem}", err=True)
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
        refuse_missing_extra(error, "the demonstration")
        raise

    start = time.perf_counter()
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(OutputFolder(out))
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
    typer.echo(f"\nDone in {seconds:.0f} s. Written: {', '.join(map(str, written))}")


app.command()(evaluate_command.evaluate)
app.command()(align_command.align)
app.add_typer(backfill_command.app, name="backfill")


def _gpu(index: int) -> str:
    """Name of a GPU, and why the CUDA kernels do not run on it if so."""
    reason = _native.not_covered(torch.device("cuda", index))
    return torch.cuda.get_device_name(index) + (f" (not used: {reason})" if reason else "")


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
