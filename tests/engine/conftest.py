"""Every test in this folder runs once per instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastcompat import _native


@pytest.fixture(scope="session", autouse=True, params=_native.simd_levels())
def simd(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _native.simd()
    _native.set_simd(request.param)
    yield request.param
    _native.set_simd(before)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The eager expressions are tiny: threads only slow them down. Tests of threads set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
