"""The machine of a result: its processor, its caches, its peak rates, and the versions in use."""

from __future__ import annotations

import ctypes
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastcompat as fc

PACKAGES = {"fastcompat": "fastcompat", "torch": "torch", "numpy": "numpy", "faiss": "faiss-cpu"}
INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
QUIET = 0.9  # of the best speed seen: below it a round waits
HOPELESS = 5.0  # GF/s; torch multiplies bf16 one by one where the processor has no instruction for it
SPEED_S = 0.02
BURST_S = 0.1  # length of one peak measurement; the best of several counts


def describe() -> dict[str, Any]:
    """Return what a reader needs to judge a timing."""
    build = fc.build_info()
    cpu = _cpuinfo()
    flags = cpu_flags()
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "cpu_model": " ".join(cpu.get(key, "?") for key in ("cpu family", "model", "stepping")),
        "cores": torch.multiprocessing.cpu_count(),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
        "cache": _caches(),
        "build": {key: str(value) for key, value in build.items()},
        "versions": {
            **{name: _version(package) for name, package in PACKAGES.items()},
            "python": platform.python_version(),
            "compiler": str(build["compiler"]),
        },
    }


def cpu_flags() -> list[str]:
    """Return what the processor says it can do."""
    return _cpuinfo().get("flags", "").split()


def commit() -> dict[str, Any]:
    """Return which source was measured, and whether it had changes of its own."""
    git = partial(subprocess.run, cwd=Path(__file__).parent, capture_output=True, text=True)
    found, changes = git(["git", "rev-parse", "HEAD"]), git(["git", "status", "--porcelain", "-uno"])
    return {"id": found.stdout.strip(), "dirty": bool(changes.stdout)}


def now() -> str:
    """Return date and time in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def peaks(threads: int) -> dict[str, float]:
    """Return the best rates seen: GF/s of multiply-adds and of torch's product, GB/s of reads."""
    torch.set_num_threads(threads)
    library = _peak_library()
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a = torch.randn(2048, 2048).to(dtype)
        rate = _best(partial(_product, a[:256, :256].contiguous()))
        rates[f"{name} torch.mm"] = _best(partial(_product, a)) if rate > HOPELESS else rate
        if library:
            rates[name] = _best(partial(_on_threads, getattr(library, f"{name}_peak"), threads))
    rates["read GB/s"] = _best(partial(_read, _yardsticks()[1]))
    return rates


class Speed:
    """How fast the machine is at this moment: neighbours take caches and memory, not only processors."""

    def __init__(self, measure: Callable[[], tuple[float, ...]]) -> None:
        """`measure` is `speed` in a process of its own."""
        self._measure = measure
        self._best: tuple[float, ...] = ()

    def when_quiet(self, until: float) -> tuple[float, ...]:
        """Return the rates as soon as each is near its best, or at the time `until`."""
        while True:
            rates = self._measure()
            self._best = tuple(map(max, rates, self._best or rates))
            quiet = all(rate >= QUIET * best for rate, best in zip(rates, self._best, strict=True))
            if quiet or time.monotonic() > until:
                return rates
            time.sleep(0.2)


def speed(threads: int) -> tuple[float, float]:
    """Return GF/s of a product that the caches hold and GB/s of reads, in a short moment."""
    torch.set_num_threads(threads)
    a, x = _yardsticks()
    return tuple(_rate(partial(work, y), SPEED_S) / 1e9 for work, y in ((_product, a), (_read, x)))  # type: ignore[return-value]


@cache
def _yardsticks() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(512, 512), torch.ones(25_600_000)  # as many bytes as 100,000 keys of 256


def _read(x: torch.Tensor) -> float:
    x.sum()
    return float(x.nbytes)


def _product(a: torch.Tensor) -> float:
    torch.mm(a, a)
    return 2.0 * len(a) ** 3


def _best(work: Callable[[], float]) -> float:
    return max(_rate(work, BURST_S) for _ in range(5)) / 1e9


def _rate(work: Callable[[], float], seconds: float) -> float:
    start, done = time.perf_counter(), 0.0
    while time.perf_counter() - start < seconds:
        done += work()
    return done / (time.perf_counter() - start)


def _on_threads(function: Any, threads: int) -> float:
    def once(_: int) -> float:
        sink = (ctypes.c_float * 32)(*(0.01 * i for i in range(30)), 0.5, 0.25)
        return float(function(20_000_000, sink))  # some 50 ms: starting the threads must not count

    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL
        return sum(pool.map(once, range(threads)))


def _peak_library() -> ctypes.CDLL | None:
    """Compile `peak.c` for this very processor; without a C compiler torch's matrix product has to serve."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"{folder}/peak.so"
        source = Path(__file__).with_name("peak.c")
        command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", target]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        library = ctypes.CDLL(target)
    for function in (library.fp32_peak, library.bf16_peak):
        function.restype = ctypes.c_double
        function.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    return library


def _cpuinfo() -> dict[str, str]:
    first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    return {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())
    }


def _caches() -> dict[str, str]:
    """Return the size of each data cache of the first core, `L1` to `L3`."""
    caches = {}
    for entry in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (entry / "type").read_text().strip() != "Instruction":
            caches[f"L{(entry / 'level').read_text().strip()}"] = (entry / "size").read_text().strip()
    return caches


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
