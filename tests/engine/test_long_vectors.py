"""Sums over thousands of dimensions: as accurate as eager's, and the same float wherever a pair is scored."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.truth import EPSILON, Problem, check, check_stats, labels

import fastcompat as fc
from fastcompat import _autograd, _ops
from fastcompat._types import SoftmaxProblem

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["normal", "positive"]  # positive numbers: rounding errors of a sum grow with its partial sums


def rows(count: int, dim: int, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(count, dim)
    return F.normalize(x.abs() if kind == "positive" else x).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [256, 1024, 3072, 8192])
def test_scores(dim, kind):
    query, keys = rows(16, dim, kind), rows(256, dim, kind)
    ids = torch.arange(256).expand(16, -1).contiguous()
    truth = query.double() @ keys.double().T
    check(_ops.pair_scores(query, keys, ids, "ip"), query @ keys.T, truth, EPSILON * 2**-4, "scores")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1024, 3072, 8192])
def test_statistics(dim, kind, dtype):
    query, keys = rows(12, dim, kind, dtype), rows(130, dim, kind, dtype)
    check_stats(Problem(query, keys, 100.0, **labels("few", 12, 130)))


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [255, 256, 257, 512, 513, 1100])
def test_one_pair_has_one_score(dim, dtype, metric):
    """Few queries and many, screened or not, ranked, and pair by pair; duplicates are ties."""
    query, keys = torch.randn(70, dim).to(dtype), torch.randn(500, dim).to(dtype)
    keys[400:] = keys[:100]
    query[:20] = keys[30:50]
    expected, found = fc.topk(query, keys, 4, metric=metric, backend="native")
    assert torch.equal(_ops.pair_scores(query, keys, found, metric), expected)
    for few in (1, 8, 33):
        scores, ids = fc.topk(query[:few], keys, 4, metric=metric, backend="native")
        assert torch.equal(scores, expected[:few]) and torch.equal(ids, found[:few])
    all_scores, _ = fc.topk(query, keys, 500, metric=metric, backend="native")
    assert torch.equal(all_scores[:, :4], expected)
    beats = _ops.count_beats(query, keys, None, torch.tensor([0, 500]), expected, found, metric, None)
    assert torch.equal(beats[:, :, 0], torch.arange(4).expand(70, -1))
    if metric == "l2":
        assert expected[:20, 0].eq(0).all()


def long_problem(dim, kind, dtype, by):
    query, keys = rows(48, dim, kind, dtype), rows(130, dim, kind, dtype)
    sets = labels("few", 48, 130) if by == "label" else {"positive": torch.randint(130, (48,))}
    return Problem(query, keys, torch.tensor(100.0), **sets)


def loss_and_gradients(p, *, fused):
    leaves = [x.requires_grad_() for x in (p.query, p.keys, p.scale)]
    neg, pos, *_ = p.fused() if fused else p.eager()
    loss = (torch.logaddexp(neg, pos) - pos).mean()
    return loss, *torch.autograd.grad(loss, leaves)


def one_node(p, **_):
    """The loss that comes with its gradients in one call."""
    p.query.requires_grad_(), p.keys.requires_grad_()
    loss = _autograd.softmax_loss(SoftmaxProblem(*vars(p).values()), True)
    return loss, *torch.autograd.grad(loss, (p.query, p.keys))


@pytest.mark.parametrize("of", [loss_and_gradients, one_node])
@pytest.mark.parametrize("by", ["index", "label"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1024, 3072, 8192])
def test_losses_and_gradients(dim, kind, dtype, by, of):
    p = long_problem(dim, kind, dtype, by)
    ours = of(p, fused=True)
    eager, truth = (loss_and_gradients(p.to(x), fused=False) for x in (dtype, torch.float64))
    for mine, theirs, exact, name in zip(
        ours, eager, truth, ("loss", "query", "keys", "scale"), strict=False
    ):
        # A loss is a difference of logits, the scale's gradient one of scores; no score is above 1.
        size = {"loss": 100.0, "scale": 1.0}.get(name) or exact.abs().max().item()
        floor = EPSILON / 2 * size
        check(mine, theirs, exact, floor, name, dtype)
