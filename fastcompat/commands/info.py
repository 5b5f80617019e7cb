"""The command `fastcompat info`: what was built, what runs here, and whether the kernels are right."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path

import torch
import typer

import fastcompat as fc

from .. import _native, selfcheck
from .terminal import print_table


def info() -> None:
    """Show what was built and what this machine offers, and check every kernel against the reference."""
    build = fc.build_info()
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {
        "fastcompat": f"{build['version']}, built with {build['compiler']}",
        "CUDA kernels": f"{build['cuda']} for {', '.join(build['cuda_archs'])}"
        if build["cuda"]
        else "not built",
        "CUDA tier": build["cuda_tier"] or "the best that a GPU runs",
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
