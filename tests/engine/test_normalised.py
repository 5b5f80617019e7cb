"""Rows of unit length and their gradient: as `torch.nn.functional.normalize` gives them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat._loss_parts import normalised


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_values_and_gradient(dtype: torch.dtype) -> None:
    x, g = torch.randn(7, 5).to(dtype).requires_grad_(), torch.randn(7, 5)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.normalize(x.to(wide), dim=1)
    assert torch.equal(normalised(x), expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, g.to(wide)) for y in (normalised(x), expected))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


def test_rows_that_are_zero_or_almost() -> None:
    x, g = torch.randn(2, 7, 5, dtype=torch.float64)
    x[1], x[2], x[3] = 0, x[2] * 1e-14, x[3] * 1e20  # rows 1 and 2 are shorter than 1e-12
    x.requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(y, x, g) for y in (normalised(x), F.normalize(x, dim=1)))
    assert normalised(x)[1].eq(0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_derivatives_of_every_order_and_kind() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(normalised, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(normalised, x)
    keys, positive = torch.eye(3).double(), torch.tensor([0, 1, 2, 0])

    def loss(q: Tensor) -> Tensor:
        return fc.functional.contrastive_loss(q, keys, positive=positive, backend="reference")

    hessian = torch.func.hessian(loss)(x.detach())
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first[2, 1], x)
    torch.testing.assert_close(second, hessian[2, 1])


def test_compiles_without_a_break() -> None:
    x, g = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(f(x), x, g) for f in (compiled, normalised))
    torch.testing.assert_close(ours, theirs)


def test_nothing_stays_in_memory() -> None:
    """The result is saved for backward: no cycle may hold it."""
    gc.disable()
    try:
        x = torch.randn(7, 5, requires_grad=True)
        unit = normalised(x)
        seen = weakref.ref(unit.grad_fn)
        del unit
        assert seen() is None
    finally:
        gc.enable()
