"""What a GPU may lack and what may go wrong on it, tried on the emulated one: an error; the next call works.

    PYTHONPATH=tests/gpu pytest tests/gpu/test_failures.py

wants the module that CMakeLists.txt here describes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

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


def test_a_launch_that_fails(emulate: Callable[..., None]) -> None:
    right = statistics_and_search()
    emulate(80, 13000, 1 << 10)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"launch: .* shared memory"):
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
