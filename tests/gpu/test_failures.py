"""What a GPU may lack and what may go wrong on it, tried on the emulated one: an error; the next call works.

    PYTHONPATH=tests/gpu pytest tests/gpu/test_failures.py

wants the module that CMakeLists.txt here describes.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from reroute import MODULE, SHARED_MEMORY, Emulated, emulated_module

import fastcompat as fc
from fastcompat import _native

AMPERE = (80, 13000, SHARED_MEMORY[80])


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Sets compute capability, the driver's CUDA version and the shared memory of a block."""
    if not any(MODULE.glob("_C*.so")):
        pytest.skip("the emulated GPU is not built")
    module = emulated_module()
    monkeypatch.setattr(_native, "_C", module)
    monkeypatch.setattr(_native, "_Call", Emulated)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    library = ctypes.CDLL(module.__file__)
    yield library.emulate
    library.emulate(*AMPERE)


@pytest.mark.parametrize(
    ("capability", "driver", "reason"),
    [
        (75, 13000, "its compute capability is 7.5, the kernels need 8.0 or more"),
        (
            90,
            12080,
            "the NVIDIA driver supports CUDA 12.8, the kernels were built with CUDA 13.0: update the",
        ),
        (90, 0, "there is no NVIDIA driver"),
        (80, 13000, ""),
        (121, 14010, ""),
    ],
)
def test_a_gpu_that_cannot_run_the_kernels(
    emulate: Callable[..., None], capability: int, driver: int, reason: str
) -> None:
    emulate(capability, driver, 99 << 10)
    found = _native._C.cuda.unusable(0)
    assert found.startswith(reason) and bool(found) == bool(reason)


def statistics_and_search() -> list[torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    query, keys = torch.randn(5, 16, generator=gen), torch.randn(40, 16, generator=gen)
    return [*fc.softmax_stats(query, keys, backend="native"), *fc.topk(query, keys, 3, backend="native")]


TIER = """
import ctypes, sys
from reroute import SHARED_MEMORY, emulated_module
module = emulated_module()
capability = int(sys.argv[1])
ctypes.CDLL(module.__file__).emulate(capability, 13000, SHARED_MEMORY[capability])
try:
    print(module.cuda_tier(), module.cuda.unusable(0), sep="|")
except ValueError as error:
    print("ValueError", error, sep="|")
"""


@pytest.mark.parametrize(
    ("tier", "capability", "listed", "reason"),
    [
        (None, 90, "None", ""),
        ("", 80, "None", ""),
        ("sm80", 90, "sm80", ""),
        ("sm90", 90, "sm90", ""),
        ("sm90", 80, "sm90", "FASTCOMPAT_CUDA_TIER=sm90 needs compute capability 9.x, the device has 8.0"),
        ("sm70", 80, "ValueError", "FASTCOMPAT_CUDA_TIER: unknown tier 'sm70': expected sm80 or sm90"),
    ],
)
def test_the_environment_chooses_the_tier(
    tier: str | None, capability: int, listed: str, reason: str
) -> None:
    if not any(MODULE.glob("_C*.so")):
        pytest.skip("the emulated GPU is not built")
    environment = {k: v for k, v in os.environ.items() if k != "FASTCOMPAT_CUDA_TIER"}
    if tier is not None:
        environment["FASTCOMPAT_CUDA_TIER"] = tier
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", TIER, str(capability)]
    # In this folder: in the root the source would be imported for the package.
    where = {"env": environment, "cwd": Path(__file__).parent}
    said = subprocess.run(command, capture_output=True, text=True, check=True, **where).stdout.strip()
    name, _, why = said.partition("|")
    assert name == listed
    assert why.startswith(reason) and bool(why) == bool(reason)


def test_a_launch_that_fails(emulate: Callable[..., None]) -> None:
    right = statistics_and_search()
    emulate(80, 13000, 1 << 10)
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"launch of .* \(CUDA error 1\); grid \d+x1x1 .* \d+ bytes of shared memory",
        ):
            statistics_and_search()
    emulate(*AMPERE)
    assert all(map(torch.equal, statistics_and_search(), right))


def test_memory_that_runs_out(emulate: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    right = statistics_and_search()

    def no_memory(call: Emulated, size: int) -> int:
        raise torch.OutOfMemoryError(f"tried to allocate {size} bytes")

    with monkeypatch.context() as less:
        less.setattr(Emulated, "scratch", no_memory)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
                statistics_and_search()
    assert all(map(torch.equal, statistics_and_search(), right))
