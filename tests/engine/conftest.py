"""Every test in this folder runs once per instruction set of this machine, unless none can change its result.

That is so for the reference (a parameter is "reference", or float64, which takes it) and for what is marked
`one_simd`.
"""

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


def takes_the_reference(item: pytest.Item) -> bool:
    given = parameters(item).values()
    return any(isinstance(x, (str, torch.dtype)) and x in ("reference", torch.float64) for x in given)


def parameters(item: pytest.Item) -> dict[str, object]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def wanted(item: pytest.Item) -> bool:
        once = takes_the_reference(item) or item.get_closest_marker("one_simd")
        return not once or parameters(item).get("simd") in (None, _native.simd_levels()[-1])

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = filter(wanted, items)


@pytest.fixture(autouse=True)
def no_kernel_in_the_reference(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs once because it takes the reference must not reach a kernel."""
    if takes_the_reference(request.node):

        def refuse(_: object, kernel: str, *arguments: object) -> None:
            pytest.fail(f"the reference called the native {kernel}")

        monkeypatch.setattr(_native._Call, "run", refuse)


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
