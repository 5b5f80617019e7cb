"""Which matrix kernels the baselines run: torch's, and faiss's under the setting that is fastest here.

faiss brings an OpenBLAS of its own, which falls back to its oldest kernel, several times slower, on a
processor that it does not know. `OPENBLAS_CORETYPE` decides before the library is loaded, so every setting is
tried in a fresh process.
"""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

VARIABLE = "OPENBLAS_CORETYPE"
# What each kernel needs of the processor: OpenBLAS does not look when it is told.
NEEDS = {"HASWELL": ("avx2", "fma"), "ZEN": ("avx2", "fma"), "SKYLAKEX": ("avx512f", "avx512bw", "avx512vl")}
UNSET = ""
QUERIES, KEYS, DIM = 1024, 20_000, 128


def apply(core: str) -> None:
    """Set or unset the variable for what this process loads from now on."""
    if core == UNSET:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = core


def torch_kernels() -> str:
    """Return the library that torch's products come from, and its own instruction set."""
    library = re.search(r"(Math Kernel Library Version \S+?)-|BLAS_INFO=(\w+)", torch.__config__.show())
    name = (library[1] or library[2]) if library else "an unknown library"
    return f"{name.replace('Math Kernel Library Version', 'MKL')}, {torch.backends.cpu.get_cpu_capability()}"


def best_for_faiss(threads: int, flags: list[str], context: Any) -> dict[str, Any]:
    """Return the fastest setting and its kernel, and all that were tried; empty without faiss."""
    cores = [UNSET, *(core for core, needed in NEEDS.items() if set(needed) <= set(flags))]
    tried: dict[str, tuple[float, str]] = {}
    for core in cores:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            try:
                tried[core] = pool.submit(_search, core, threads).result()
            except ModuleNotFoundError:
                return {}
            except BrokenProcessPool:
                continue  # an instruction that this processor lacks after all
    core = min(tried, key=lambda name: tried[name][0])
    return {"core": core, "kernel": tried[core][1], "tried": tried}


def sentence(found: dict[str, Any]) -> str:
    """Say what `best_for_faiss` found."""
    tried = ", ".join(
        f"{name or 'unset'} ({kernel}) {seconds * 1e3:.3g} ms"
        for name, (seconds, kernel) in found["tried"].items()
    )
    return (
        f"{found['kernel']} ({VARIABLE} {found['core'] or 'unset'}; {QUERIES:,} x {KEYS:,} x {DIM}: {tried})"
    )


def _search(core: str, threads: int) -> tuple[float, str]:
    apply(core)
    import faiss  # loads its OpenBLAS
    from threadpoolctl import threadpool_info

    faiss.omp_set_num_threads(threads)
    torch.manual_seed(0)
    index = faiss.IndexFlatIP(DIM)
    index.add(torch.randn(KEYS, DIM).numpy())
    query = torch.randn(QUERIES, DIM).numpy()
    seconds = []
    for _ in range(4):  # the first one loads and starts threads
        start = time.perf_counter()
        index.search(query, 100)
        seconds.append(time.perf_counter() - start)
    libraries = [found for found in threadpool_info() if "faiss" in found["filepath"]]
    kernels = [
        f"{x['internal_api']} {x['version']} {x['architecture']}" for x in libraries if "architecture" in x
    ]
    return min(seconds[1:]), ", ".join(kernels) or "no BLAS of its own"
