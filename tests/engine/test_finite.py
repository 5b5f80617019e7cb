"""Finite inputs never give NaN, and padding never counts.

Keys lie in the order of their classes, so that blocks, splits and items have no negative, or no positive;
logits are far below and above zero; truth is float64.
"""

from __future__ import annotations

import pytest
import torch
from engine.truth import EPSILON, Problem

from fastcompat import _autograd, functional
from fastcompat.reference import SoftmaxProblem

# Around the rows of a packed block (96 or 112) and the smallest part of a split (512).
KEYS = [1, 97, 113, 512, 1025, 1600]
LEVELS = [-1e30, -1e4, -1000.0, -100.0, 0.0, 100.0, 1e4, 1e30]
SETS = ["labels", "index", "index beside labels", "exclude"]


def problem(
    columns: int, level: float, sets: str, first: bool, dtype: torch.dtype, spread: float = 3.0
) -> Problem:
    """Two classes, the queries' own one first or last; every logit is about `level`."""
    rows, own = 5, max(1, columns - 1 - columns // 3)
    query, keys = torch.randn(rows, 4).to(dtype), torch.randn(columns, 4).to(dtype)
    same = torch.arange(columns) < own if first else torch.arange(columns) >= columns - own
    p = Problem(query, keys, spread, torch.full((columns,), level))
    index = torch.full((rows,), 0 if first else columns - 1)
    if sets != "index":
        p.query_labels, p.key_labels = torch.ones(rows, dtype=torch.int64), same.long()
        p.query_labels[-1] = 2  # no positive
    if sets.startswith("index"):
        p.positive = index
    if sets == "exclude":
        p.exclude = index
    return p


def results(p: Problem, weights: torch.Tensor, *, fused: bool):
    """Statistics and the gradients of query, keys, scale and bias."""
    leaves = [
        x.detach().clone().requires_grad_() for x in (p.query, p.keys, torch.as_tensor(p.scale), p.bias)
    ]
    q = Problem(*leaves, p.query_labels, p.key_labels, p.positive, p.exclude)
    stats = q.fused() if fused else exact(q)
    total = sum(
        (w.to(x.dtype) * torch.where(x.isfinite(), x, 0)).sum() for w, x in zip(weights, stats, strict=False)
    )
    return [*stats[:3], stats[3].double(), *torch.autograd.grad(total, leaves)]


def exact(p: Problem):
    """The eager expression; sets that are empty, and keys of bias -inf, send nothing."""
    z = p.scale * (p.query @ p.keys.T) + p.bias
    pos, neg = (mask & (z != -torch.inf) for mask in p.members())
    lse = []
    for members in (neg, pos):
        some = members.any(1)
        chosen = z.masked_fill(~members, -torch.inf).masked_fill(~some[:, None], 0)
        lse.append(torch.where(some, chosen.logsumexp(1), -torch.inf))
    return (*lse, z.masked_fill(~pos, 0).sum(1), pos.sum(1))


def arriving(columns: int) -> torch.Tensor:
    """Gradients of the first three statistics; together a row's coefficients are about 1."""
    return torch.randn(3, 5) / torch.tensor([1.0, 1.0, columns])[:, None]


def check(p: Problem, weights: torch.Tensor, tolerance: float) -> None:
    """`tolerance`: of a coefficient, from the rounding of logits (float32) or of weights (16 bits)."""
    mine, truth = results(p, weights, fused=True), results(p.to(torch.float64), weights, fused=False)
    level = 1 + p.bias[p.bias.isfinite()].abs().max().item() if p.bias.isfinite().any() else 1.0
    for name, a, b in zip(
        ("neg", "pos", "sum", "count", "query", "keys", "scale", "bias"), mine, truth, strict=True
    ):
        assert not a.isnan().any(), name
        a, b = a.double(), b.double()
        assert torch.equal(a[~b.isfinite()], b[~b.isfinite()]), name
        a, b = a[b.isfinite()], b[b.isfinite()]
        if name in ("neg", "pos"):
            allowed = 4 * EPSILON * (level + p.largest_logit())
        elif name == "sum":
            allowed = 4 * EPSILON * (level * len(p.keys) + p.largest_logit() * len(p.keys))
        elif name == "count":
            allowed = 0
        else:
            if level > 1e6:
                continue  # no digit of a difference of such logits is left: finite is all that can be asked
            size = b.abs().max().item() + 1 + p.largest_logit()
            allowed = size * (tolerance + 8 * EPSILON * (level + p.largest_logit()))
        assert (a - b).abs().max().item() <= allowed if a.numel() else True, name


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("columns", KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sorted_keys_at_every_level(columns, sets, first, dtype):
    weights = arriving(columns)
    for level in LEVELS:
        check(
            problem(columns, level, sets, first, dtype), weights, EPSILON if dtype == torch.float32 else 2**-7
        )


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("columns", [113, 1025])
def test_levels_that_rise_fall_and_jump(columns, sets):
    """The shift of the exponentials moves, or never can."""
    steps = torch.arange(columns)
    for bias in (
        4.0 * steps,
        -4.0 * steps,
        steps.eq(columns // 2) * 1e30,
        -1e30 * steps.ne(columns - 2),
        1e30 * (-1) ** steps,
    ):
        p = problem(columns, 0.0, sets, True, torch.float32)
        p.bias = bias.float()
        check(p, arriving(columns), EPSILON)


@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("columns", [1, 113, 1025])
@pytest.mark.parametrize("kept", [0, 1, 7])
def test_a_bias_of_minus_infinity_takes_a_key_out(columns, sets, kept):
    """The same as without the key; of `kept` keys in the end none may be left."""
    p = problem(columns, -5.0, sets, True, torch.float32)
    p.bias[: max(0, columns - kept)] = -torch.inf
    check(p, arriving(columns), EPSILON)
    mine = results(p, arriving(columns), fused=True)
    out = p.bias == -torch.inf
    assert mine[5][out].eq(0).all() and mine[7][out].eq(0).all()
    reference = p.fused("reference")
    assert torch.equal(p.fused().pos_count, reference.pos_count)
    if not kept:
        assert mine[0].eq(-torch.inf).all() and mine[1].eq(-torch.inf).all() and mine[3].eq(0).all()


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("sets", SETS)
@pytest.mark.parametrize("columns", [2, 97, 113, 300, 1025])
def test_losses(columns, sets, wanted):
    for level in (*LEVELS, -torch.inf):
        for spread in (1.0, 300.0):
            p = problem(columns, 0.0, sets, True, torch.float32, spread)
            p.bias[columns // 2 :] = level
            for leaf, want in zip((p.query, p.keys), wanted, strict=True):
                leaf.requires_grad_(want)
            leaves = [x for x in (p.query, p.keys) if x.requires_grad]
            loss = _autograd.softmax_loss(SoftmaxProblem(*vars(p).values()), True)
            grads = torch.autograd.grad(loss, leaves)
            double = p.to(torch.float64)
            copies = [
                getattr(double, n).requires_grad_() for n in ("query", "keys") if getattr(p, n).requires_grad
            ]
            neg, pos, _, count = exact(double)
            each = torch.where(count > 0, neg - torch.where(count > 0, pos, 0), -torch.inf)
            truth = softplus(each).sum() / max(1, int((count > 0).sum()))
            assert not loss.isnan() and not any(g.isnan().any() for g in grads)
            size = 1 + p.largest_logit() if level == -torch.inf else 1 + p.largest_logit() + abs(level)
            assert abs(loss.item() - truth.item()) <= 4 * EPSILON * (size + abs(truth.item()))
            if abs(level) > 1e6 and level != -torch.inf:
                continue
            for mine, right in zip(grads, torch.autograd.grad(truth, copies, allow_unused=True), strict=True):
                right = torch.zeros_like(mine).double() if right is None else right.nan_to_num(0.0)
                assert (mine - right).abs().max() <= 8 * EPSILON * size * (1 + right.abs().max())


def softplus(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 40, x, torch.log1p(x.clamp(max=40).exp()))


@pytest.mark.parametrize("arrives", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_row_without_positives_has_a_zero_gradient_whatever_arrives_at_the_loss(backend, keep, arrives):
    query, keys = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    for normalize in (True, False):
        for positive in (torch.tensor([3, -1, 0, -1]), torch.full((4,), -1)):
            loss = functional.contrastive_loss(
                query, keys, positive=positive, temperature=0.5, normalize=normalize, backend=backend
            )
            dquery, dkeys = torch.autograd.grad(loss, (query, keys), torch.tensor(arrives), retain_graph=keep)
            assert dquery[positive < 0].eq(0).all()
            assert not dquery[positive >= 0].isfinite().any()
            assert dkeys.eq(0).all() or (positive >= 0).any()
