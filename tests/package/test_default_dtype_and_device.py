"""No default dtype or device of torch reaches the engine: every allocation states its own."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcompat as fc
from fastcompat import functional, losses

# What torch makes from nothing. Of these, the second list draws numbers whose type is fixed by what they are.
FACTORIES = (
    ("empty", "zeros", "ones", "full", "eye", "arange", "linspace", "logspace", "rand", "randn", "randint")
    + ("tensor", "scalar_tensor", "randperm", "tril_indices", "triu_indices", "empty_strided", "as_tensor")
    + ("hann_window", "normal", "empty_permuted", "Tensor", "FloatTensor", "LongTensor", "asarray")
)
PACKAGE = Path(fc.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def bare_factories(source: str) -> list[int]:
    """The lines that call a factory of torch without both `dtype=` and `device=`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            stated = {keyword.arg for keyword in node.keywords}
            if not {"dtype", "device"} <= stated:
                found.append(node.lineno)
    return found


def test_the_check_finds_what_it_should() -> None:
    assert bare_factories("torch.empty(3)\ntorch.arange(3, device=d)\ntorch.ones(2, dtype=a, device=b)") == [
        1,
        2,
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_allocation_states_dtype_and_device(path: Path) -> None:
    assert not bare_factories(path.read_text())
