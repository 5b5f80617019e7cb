"""For every test below: Hypothesis with fixed or fresh examples, torch with its own or other defaults."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from fastcompat import _native

# The same examples on every run; `pytest --hypothesis-profile=nightly` draws fresh ones, and more of them.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=1000, deadline=None, derandomize=False, print_blob=True)
settings.load_profile("ci")

FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm")
FACTORIES += ("as_tensor", "asarray", "scalar_tensor", "tensor", "zeros")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastcompat")
    group.addoption(
        "--default-dtype", default="float32", help="run the package under torch's other default dtype"
    )
    group.addoption("--default-device", default="cpu", help="torch's default in the package")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Other defaults are Python's business: one instruction set is enough."""
    if (config.getoption("--default-dtype"), config.getoption("--default-device")) == ("float32", "cpu"):
        return
    last = _native.simd_levels()[-1]
    others = [x for x in items if hasattr(x, "callspec") and x.callspec.params.get("simd", last) != last]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in set(others)]


@pytest.fixture(autouse=True)
def torch_defaults(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the package tensors are made with the options' defaults; a test's own data stay as they are.

    What a function returns must not depend on the defaults, so every test must pass as it stands.
    """
    dtype = getattr(torch, request.config.getoption("--default-dtype"))
    device = torch.device(request.config.getoption("--default-device"))
    if (dtype, device) == (torch.float32, torch.device("cpu")):
        yield
        return
    importlib.import_module("torch._decomp.decompositions_for_jvp")  # compiles torch's own code as it stands
    for name in FACTORIES:
        monkeypatch.setattr(torch, name, _as_usual_outside(getattr(torch, name)))
    torch.set_default_dtype(dtype)
    if device.type != "cpu":
        torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def _as_usual_outside(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory, with torch's own defaults for every caller but the package."""

    def make(*sizes: Any, **named: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("fastcompat"):
            return factory(*sizes, **named)
        if named.get("device") is None and "out" not in named:
            named["device"] = "cpu"
        other = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            return factory(*sizes, **named)
        finally:
            torch.set_default_dtype(other)

    return make
