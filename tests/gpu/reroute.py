"""A pytest plugin that runs the tests of tests/engine, which use CPU tensors, through the CUDA engine.

    PYTHONPATH=tests/gpu pytest -p reroute tests/engine                 # on a GPU
    PYTHONPATH=tests/gpu pytest -p reroute tests/engine --emulated 80   # on an emulated A100

The second line takes the native module that CMakeLists.txt here describes, whose GPU is the emulator of
tests/emulator: Python, bindings, dispatch, scratch sizes and kernels are the product's, not the device.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastcompat import _autograd, _native, _ops

MODULE = Path(__file__).parents[2] / "build" / "emulator" / "gpu"  # of the module with an emulated GPU
SHARED_MEMORY = {80: 99 << 10, 90: 227 << 10}  # of a block, by compute capability; 80: as small as on 8.6
KERNELS = ("softmax_stats", "softmax_query_grad", "softmax_key_grad", "topk", "pair_scores", "count_beats")
# About the CPU, or different on a GPU: there an index out of range makes a row NaN, without an error.
LEFT_OUT = ("test_threads.py", "test_softmax_loss.py", "out_of_range")
LEFT_OUT_ON_A_GPU = ("strides_do_not_change_a_bit",)  # copies to a GPU are dense; test_device.py has its own
LEFT_OUT_EMULATED = ("test_more_pairs_than_31_bits_can_number",)  # too slow there


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulated", type=int, choices=SHARED_MEMORY, help="capability of an emulated GPU")


def pytest_configure(config: pytest.Config) -> None:
    _autograd.fuses = lambda *_: False  # that call is the CPU's alone
    capability = config.getoption("emulated")
    if capability is None:
        config.stash[pytest.StashKey[Any]()] = _carry_to_the_gpu()
    else:
        _emulate(capability)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out the modules that import what this machine does not have."""
    if collection_path.suffix != ".py":
        return None
    needed = re.findall(r"^(?:import|from) (\w+)", collection_path.read_text(), re.MULTILINE)
    return any(importlib.util.find_spec(name) is None for name in needed) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one instruction set of each test, and what holds on a GPU."""
    left_out = LEFT_OUT + (LEFT_OUT_EMULATED if config.getoption("emulated") else LEFT_OUT_ON_A_GPU)
    level = _native.simd_levels()[0]

    def wanted(item: pytest.Item) -> bool:
        return item.callspec.params["simd"] == level and not any(part in item.nodeid for part in left_out)

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


def _carry_to_the_gpu() -> torch.library.Library:
    """Give CPU tensors the GPU's kernels: there and back."""
    library = torch.library.Library("fastcompat", "IMPL")
    _ops.observed = lambda _: True  # every call goes through the dispatcher
    for name in KERNELS:
        library.impl(name, _carried(getattr(_ops, name)), "CPU", allow_override=True)
    return library


def _carried(kernel: Callable[..., Any]) -> Callable[..., Any]:
    def there_and_back(*arguments: Any) -> Any:
        there = tree_map_only(Tensor, Tensor.cuda, arguments)
        return tree_map_only(Tensor, Tensor.cpu, kernel(*there))

    return there_and_back


def emulated_module() -> Any:
    """The native module with an emulated GPU."""
    spec = importlib.util.spec_from_file_location("_C", next(MODULE.glob("_C*.so")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _emulate(capability: int) -> None:
    _native._C = emulated_module()
    ctypes.CDLL(_native._C.__file__).emulate(capability, 13000, SHARED_MEMORY[capability])
    _native._Call = Emulated
    torch.cuda.is_current_stream_capturing = lambda: False


class Emulated(_native._Call):
    """A call whose tensors pretend to live on a GPU; its scratch holds NaN, whatever it is read as."""

    def __init__(self, query: Tensor) -> None:
        super().__init__(query)
        self.gpu = True
        self.behind = torch.empty(0, dtype=torch.uint8)  # the bytes after the scratch

    def run(self, kernel: str, *arguments: Any) -> None:
        super().run(kernel, *arguments)
        assert self.behind.eq(255).all(), f"{kernel} wrote past its scratch"

    def launch(self) -> Any:
        precision = _native._precision(self.dtype)
        return _native._C.cuda.Run(0, 0, precision, self.scale_factor, self.scratch)

    def scratch(self, size: int) -> int:
        raw = torch.full((size + 4096,), 255, dtype=torch.uint8)
        start = -raw.data_ptr() % 256
        self.memory, self.behind = raw[start : start + size], raw[start + size :]
        return self.memory.data_ptr()
