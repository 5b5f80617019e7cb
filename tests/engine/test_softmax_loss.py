"""The loss that comes with its gradients in one call, against float64; and what arrives at it afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.truth import EPSILON, Problem, check, labels
from torch.utils._python_dispatch import TorchDispatchMode

from fastcompat import _autograd
from fastcompat import functional as fc
from fastcompat._types import SoftmaxProblem

SIZES = [(1, 1, 1), (1, 33, 3), (31, 2, 8), (130, 31, 64), (65, 200, 37)]
# many rows, more than caches hold, few keys, too many keys to keep
PASSES = [(700, 3000, 17), (600, 9000, 5), (600, 70, 5), (130, 66_000, 3)]


def problem(rows, columns, dim, dtype, kind):
    query, keys = (torch.randn(n, dim).to(dtype).requires_grad_() for n in (rows, columns))
    p = Problem(query, keys, 0.4, torch.randn(columns))
    if "labels" in kind:
        p.query_labels, p.key_labels = labels("negative", rows, columns).values()
    if "index" in kind:
        p.positive, p.exclude = (torch.randint(-1, columns, (rows,)) for _ in range(2))
    return p


def results(p, mean, *, fused):
    if fused:
        loss = _autograd.softmax_loss(SoftmaxProblem(*vars(p).values()), mean)
    else:
        p.query.requires_grad_(), p.keys.requires_grad_()
        neg, pos, _, count = p.eager()
        each = torch.logaddexp(neg, pos) - pos
        rows = count > 0
        loss = each[rows].sum() / (rows.sum().clamp(min=1) if mean else 1)
    return loss, *torch.autograd.grad(loss, (p.query, p.keys))


def check_loss(p, mean=True):
    ours = results(p, mean, fused=True)
    eager, truth = (results(p.to(dtype), mean, fused=False) for dtype in (p.query.dtype, torch.float64))
    for mine, theirs, exact, name in zip(ours, eager, truth, ("loss", "query", "keys"), strict=True):
        exact = exact.nan_to_num(0.0)
        size = exact.abs().max().item() * (1 + p.largest_logit()) if exact.numel() else 0.0
        if name == "loss":
            size = max(size, p.largest_logit())
        check(mine, theirs, exact, 2 * EPSILON * size, name, p.query.dtype)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["index", "labels", "labels and index"])
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(size, kind, dtype, mean):
    check_loss(problem(*size, dtype, kind), mean)


@pytest.mark.parametrize("kind", ["index", "labels and index"])
@pytest.mark.parametrize("size", PASSES)
def test_several_passes_over_the_queries(size, kind):
    check_loss(problem(*size, torch.float32, kind))


def test_logits_that_grow_along_the_keys():
    """The shift of the exponentials moves with the maximum while they are kept."""
    p = problem(70, 900, 16, torch.float32, "index")
    with torch.no_grad():
        p.keys *= torch.linspace(0.1, 40, 900)[:, None]
    check_loss(p)


@pytest.mark.parametrize("size", PASSES)
def test_any_number_of_threads(size):
    p = problem(*size, torch.float32, "index")
    torch.set_num_threads(1)
    expected = results(p, True, fused=True)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, results(p, True, fused=True), expected))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_one_side_alone(wanted):
    p = problem(70, 90, 12, torch.float32, "index")
    both = results(p, True, fused=True)
    for leaf, want in zip((p.query, p.keys), wanted, strict=True):
        leaf.requires_grad_(want)
    loss = _autograd.softmax_loss(SoftmaxProblem(*vars(p).values()), True)
    (alone,) = torch.autograd.grad(loss, p.query if wanted[0] else p.keys)
    torch.testing.assert_close(loss, both[0])
    torch.testing.assert_close(alone, both[1 + wanted[1]])


def test_a_row_without_negatives_has_a_zero_gradient():
    p = Problem(torch.randn(1, 4, requires_grad=True), torch.randn(2, 4, requires_grad=True), 1.0)
    p.positive, p.exclude = torch.tensor([0]), torch.tensor([1])
    assert all(x.eq(0).all() for x in results(p, True, fused=True))


def test_nan_reaches_the_loss_and_the_gradients():
    p = problem(5, 9, 6, torch.float32, "index")
    with torch.no_grad():
        p.keys[2, 1] = torch.nan
    p.positive, p.exclude = torch.arange(5), None
    loss, dquery, dkeys = results(p, True, fused=True)
    assert loss.isnan() and dquery.isnan().any(1).all() and dkeys.isnan().any(1).all()


def small():
    query, keys = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    return query, keys, lambda **more: fc.contrastive_loss(query, keys, positive=torch.arange(6), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arrives", [1.0, 0.0, -2.5, 1e30])
def test_what_arrives_multiplies_the_gradients(arrives, dtype):
    p = problem(30, 40, 8, dtype, "index")
    unit = results(p, True, fused=True)[1:]
    loss = _autograd.softmax_loss(SoftmaxProblem(*vars(p).values()), True)
    for got, one in zip(torch.autograd.grad(arrives * loss, (p.query, p.keys)), unit, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, arrives * one)


def test_a_graph_that_is_kept_gives_the_same_gradients_again():
    query, keys, loss_of = small()
    loss = loss_of()
    first = torch.autograd.grad(loss, (query, keys), retain_graph=True)
    copies = [x.clone() for x in first]
    for x in first:
        x.zero_()
    again = torch.autograd.grad(2 * loss, (query, keys), retain_graph=True)
    for got, copy in zip(again, copies, strict=True):
        torch.testing.assert_close(got, 2 * copy)
    last = torch.autograd.grad(loss, (query, keys))
    assert all(map(torch.equal, last, copies))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (query, keys))


def test_second_derivatives_and_transforms_name_the_way_out():
    query, keys, loss_of = small()
    first = torch.autograd.grad(loss_of() ** 2, (query, keys), create_graph=True)
    for grad in first:
        with pytest.raises(RuntimeError, match='backend="reference"'):
            grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.grad(lambda q: fc.contrastive_loss(q, keys, positive=torch.arange(6)))(query)


def test_half_precision_stays_in_range_when_the_loss_is_scaled():
    """Unscaled, these gradients lie where float16 has few digits left."""
    x = F.normalize(torch.randn(5_064, 32)).half()
    grads = []
    for dtype in (torch.float16, torch.float64):
        keys = x[64:].to(dtype).requires_grad_()
        loss = fc.contrastive_loss(
            x[:64].to(dtype), keys, positive=torch.arange(64), temperature=1.0, normalize=False
        )
        grads.append(torch.autograd.grad(loss * 2.0**10, keys)[0][64:].double())
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("flags", [(True, True, False), (False, False, True)])
def test_opcheck(flags):
    p = problem(5, 9, 8, torch.float32, "labels and index")
    torch.library.opcheck(
        torch.ops.fastcompat.softmax_loss.default,
        (p.query.detach(), p.keys.detach(), 0.5, torch.tensor(2.0), *list(vars(p).values())[3:], *flags),
    )


class Names(TorchDispatchMode):
    """Operators that were called."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.called.add(str(function))
        return function(*arguments, **(options or {}))


def test_who_listens_to_the_dispatcher_sees_the_operator():
    *_, loss_of = small()
    with Names() as names:
        loss_of().backward()
    assert "fastcompat.softmax_loss.default" in names.called
    with torch.profiler.profile() as profile:
        loss_of()
    assert any("fastcompat::softmax_loss" in event.key for event in profile.key_averages())
