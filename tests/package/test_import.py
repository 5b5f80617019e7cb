"""Importing the package costs little more than importing torch, which it needs."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "pandas", "matplotlib", "scipy", "tqdm", "typer")


def test_the_import_brings_no_compiler() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import torch; middle = time.perf_counter(); "
        "before = set(sys.modules); import fastcompat; end = time.perf_counter(); "
        f"print([name for name in {HEAVY!r} if name in set(sys.modules) - before]); "
        "print(f'{(end - start) / (middle - start):.2f} times the time of importing torch')"
    )
    path = f"import sys; sys.path[:0] = {sys.path!r}; "
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=True)
    found, ratio = done.stdout.splitlines()
    print(ratio)
    assert found == "[]"
