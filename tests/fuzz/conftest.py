"""What every fuzzer draws: an instruction set, a number of threads, and how a matrix lies in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastcompat import _native


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """The instruction set and the number of threads that an example set are taken back."""
    level, threads = _native.simd(), torch.get_num_threads()
    yield
    _native.set_simd(level)
    torch.set_num_threads(threads)
