"""Rows of unit length and their gradient: as `torch.nn.functional.normalize` gives them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat._normalise import normalised


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.one_simd
def test_values_and_gradient(dtype: torch.dtype) -> None:
    x, g = torch.randn(7, 5).to(dtype).requires_grad_(), torch.randn(7, 5)
    wide = torch.promote_types(dtype, torch.float32)
    expected = F.normalize(x.to(wide), dim=1)
    assert torch.equal(normalised(x), expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, g.to(wide)) for y in (normalised(x), expected))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs)


@pytest.mark.one_simd
def test_rows_that_are_zero_or_almost() -> None:
    x, g = torch.randn(2, 7, 5, dtype=torch.float64)
    x[1], x[2], x[3] = 0, x[2] * 1e-14, x[3] * 1e20  # rows 1 and 2 are shorter than 1e-12
    x.requires_grad_()
    (ours,), (theirs,) = (torch.autograd.grad(y, x, g) for y in (normalised(x), F.normalize(x, dim=1)))
    assert normalised(x)[1].eq(0).all()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.one_simd
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


@pytest.mark.one_simd
def test_compiles_without_a_break() -> None:
    x, g = torch.randn(7, 5, requires_grad=True), torch.randn(7, 5)
    compiled = torch.compile(normalised, fullgraph=True, backend="aot_eager")
    (ours,), (theirs,) = (torch.autograd.grad(f(x), x, g) for f in (compiled, normalised))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reduction", ("mean", "sum"))
@pytest.mark.parametrize("trained", ((True, True), (True, False), (False, True)))
def test_a_loss_that_normalises_inside(trained: tuple[bool, bool], reduction: str) -> None:
    """As normalising first, bit for bit, but with one node of the graph."""
    query, keys = torch.randn(9, 5), torch.randn(11, 5)
    query[1], keys[2], keys[3] = 0, 0, keys[3] * 1e-14
    for x, wanted in zip((query, keys), trained, strict=True):
        x.requires_grad_(wanted)
    leaves = [x for x in (query, keys) if x.requires_grad]
    how = {"positive": torch.arange(9), "reduction": reduction, "backend": "native"}
    inside = fc.functional.contrastive_loss(query, keys, **how)
    before = fc.functional.contrastive_loss(normalised(query), normalised(keys), normalize=False, **how)
    assert inside.grad_fn is not None
    following = [node for node, _ in inside.grad_fn.next_functions if node is not None]
    assert [node.name() for node in following] == ["torch::autograd::AccumulateGrad"] * len(leaves)
    assert torch.equal(inside, before)
    with torch.no_grad():
        assert torch.equal(inside, fc.functional.contrastive_loss(query, keys, **how))
    ours, theirs = (torch.autograd.grad(loss, leaves) for loss in (inside, before))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    again = fc.functional.contrastive_loss(query, keys, **how)
    kept = torch.autograd.grad(-3 * again, leaves, retain_graph=True)
    for a, b, c in zip(kept, torch.autograd.grad(-3 * again, leaves), ours, strict=True):
        torch.testing.assert_close(a, -3 * c)
        torch.testing.assert_close(b, -3 * c)


@pytest.mark.one_simd
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
