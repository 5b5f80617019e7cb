"""Gradients of the statistics against float64, in every combination of inputs that want one."""

from __future__ import annotations

import itertools

import pytest
import torch
from engine.truth import EPSILON, Problem, check, labels

import fastcompat as fc

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("query", "keys", "scale", "bias")
SUBSETS = [names for size in range(1, 5) for names in itertools.combinations(NAMES, size)]


def problem(rows: int, columns: int, dim: int, dtype: torch.dtype, kind: str) -> Problem:
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    bias, scale = torch.randn(columns), torch.tensor(0.4)
    return Problem(query, keys, scale, bias, **labels(kind, rows, columns))


def gradients(p: Problem, wanted, weights, outputs=(0, 1, 2), *, fused: bool):
    for name in NAMES:
        getattr(p, name).grad = None
        getattr(p, name).requires_grad_(name in wanted)
    stats = p.fused() if fused else p.eager()
    # An empty set has no finite statistic to differentiate.
    total = sum(
        (torch.where(stats[i].isfinite(), stats[i], 0) * weights[i].to(stats[i].dtype)).sum() for i in outputs
    )
    return dict(zip(wanted, torch.autograd.grad(total, [getattr(p, n) for n in wanted]), strict=True))


def check_gradients(p: Problem, wanted=NAMES, outputs=(0, 1, 2)) -> None:
    weights = torch.randn(3, len(p.query))
    ours = gradients(p, wanted, weights, outputs, fused=True)
    eager = gradients(p.to(p.query.dtype), wanted, weights, outputs, fused=False)
    truth = gradients(p.to(torch.float64), wanted, weights, outputs, fused=False)
    for name in wanted:
        assert ours[name].dtype == getattr(p, name).dtype
        # The coefficient of a pair is exp(z - lse): its relative error is the absolute error of a logit.
        size = truth[name].nan_to_num(0.0).abs().max().item() * (1 + p.largest_logit())
        check(ours[name], eager[name], truth[name].nan_to_num(0.0), 2 * EPSILON * size, name, p.query.dtype)


@pytest.mark.parametrize("wanted", SUBSETS, ids="-".join)
def test_every_subset_that_wants_a_gradient(wanted):
    check_gradients(problem(33, 65, 19, torch.float32, "few"), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "few", "many", "single"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 33, 3), (31, 2, 8), (130, 31, 64), (507, 123, 37)])
def test_sizes_labels_and_dtypes(size, kind, dtype):
    check_gradients(problem(*size, dtype, kind), outputs=(0,) if kind == "none" else (0, 1, 2))


@pytest.mark.parametrize("outputs", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_outputs_that_nobody_used(outputs):
    check_gradients(problem(20, 50, 12, torch.float32, "few"), outputs=outputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_index_positive_and_exclude(dtype):
    p = problem(40, 90, 24, dtype, "few")
    p.positive, p.exclude = torch.randint(-1, 90, (40,)), torch.randint(-1, 90, (40,))
    check_gradients(p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_temperature(dtype):
    query, keys = (torch.nn.functional.normalize(torch.randn(n, 32)).to(dtype) for n in (24, 80))
    check_gradients(Problem(query, keys, torch.tensor(100.0), torch.zeros(80), **labels("few", 24, 80)))


def test_large_magnitudes():
    p = problem(24, 80, 16, torch.float32, "few")
    p.query *= 50
    check_gradients(p)


@pytest.mark.parametrize("arrives", [0.0, 1.0, torch.inf, torch.nan])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_an_empty_set_has_a_zero_gradient_whatever_arrives(arrives, backend):
    """Row 0 has no positives, row 1 no negatives."""
    p = problem(2, 6, 4, torch.float32, "none")
    p.query_labels, p.key_labels = torch.tensor([1, 0]), torch.zeros(6, dtype=torch.int64)
    leaves = [getattr(p, name).requires_grad_() for name in NAMES]
    stats = p.fused(backend)
    assert stats.pos_lse[0] == -torch.inf and stats.neg_lse[1] == -torch.inf
    arriving = [torch.tensor([0.0, arrives]), torch.tensor([arrives, 0.0]), torch.zeros(2)]
    for grad in torch.autograd.grad(stats[:3], leaves, arriving):
        assert grad.eq(0).all()


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 5])
def test_empty_inputs_have_gradients_of_their_shape(rows, columns):
    p = problem(rows, columns, 4, torch.float32, "none")
    leaves = [getattr(p, name).requires_grad_() for name in NAMES]
    stats = p.fused()
    total = (stats.neg_lse.exp() + stats.pos_sum).sum()
    for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert grad.shape == leaf.shape and grad.isfinite().all()


def test_gradients_of_strided_inputs_do_not_change_a_bit():
    base_query, base_keys = torch.randn(30, 40), torch.randn(90, 40)
    sets = labels("few", 30, 45)
    found = []
    for copy in (False, True):
        query, keys = base_query[:, 2:25], base_keys[::2, 2:25]
        query, keys = (x.clone() if copy else x.detach() for x in (query, keys))
        p = Problem(query.requires_grad_(), keys.requires_grad_(), 0.5, **sets)
        stats = p.fused()
        found.append(torch.autograd.grad((stats.neg_lse + stats.pos_lse).sum(), (query, keys)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_same_tensor_on_both_sides():
    x = torch.randn(20, 8, requires_grad=True)
    row = torch.arange(20)
    grads = [
        torch.autograd.grad(fc.softmax_stats(x, x, exclude=row, backend=b).neg_lse.sum(), x)[0]
        for b in ("native", "reference")
    ]
    torch.testing.assert_close(*grads)


def test_nan_reaches_the_gradient():
    query = torch.randn(4, 6, requires_grad=True)
    keys = torch.randn(9, 6)
    keys[2, 1] = torch.nan
    (grad,) = torch.autograd.grad(fc.softmax_stats(query, keys).neg_lse.sum(), query)
    assert grad.isnan().any(1).all()


def test_gradcheck_of_the_reference():
    p = problem(5, 7, 3, torch.float64, "few").to(torch.float64)
    leaves = [getattr(p, name).requires_grad_() for name in NAMES]

    def losses(query, keys, scale, bias):
        stats = Problem(query, keys, scale, bias, p.query_labels, p.key_labels).fused("auto")
        return torch.logaddexp(stats.neg_lse, stats.pos_lse), stats.pos_sum

    assert torch.autograd.gradcheck(losses, leaves)
    assert torch.autograd.gradgradcheck(losses, leaves)


def test_second_derivatives_and_transforms_name_the_way_out():
    query, keys = torch.randn(4, 6, requires_grad=True), torch.randn(9, 6)

    def total(x, backend="auto"):
        return fc.softmax_stats(x, keys, backend=backend).neg_lse.sum()

    (first,) = torch.autograd.grad(total(query), query, create_graph=True)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        first.sum().backward()
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            transform(total)(query)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match='backend="reference"'):
        total(torch.autograd.forward_ad.make_dual(query.detach(), torch.ones(4, 6)))
    assert torch.func.hessian(lambda x: total(x, "reference"))(query).shape == (4, 6, 4, 6)
    torch.testing.assert_close(torch.func.grad(lambda x: total(x, "reference"))(query), first.detach())
