"""torch.compile without graph breaks, and torch's own checks of the operators."""

from __future__ import annotations

import pytest
import torch

import fastcompat as fc
from fastcompat import _ops, functional

pytestmark = pytest.mark.one_simd  # every case compiles for a second

ops = torch.ops.fastcompat


def gradients(function, *inputs):
    leaves = [x for x in inputs if x.requires_grad]
    return [function(*inputs).detach(), *torch.autograd.grad(function(*inputs), leaves)]


def total(query, keys, scale, bias, y, w):
    stats = fc.softmax_stats(query, keys, scale=scale, bias=bias, query_labels=y, key_labels=w)
    return (torch.logaddexp(stats.neg_lse, stats.pos_lse) - stats.pos_sum / stats.pos_count).sum()


def inputs(rows, columns):
    query, keys = torch.randn(rows, 12), torch.randn(columns, 12)
    scale, bias = torch.tensor(0.5), torch.randn(columns)
    leaves = [x.requires_grad_() for x in (query, keys, scale, bias)]
    return (*leaves, torch.arange(rows) % 3, torch.arange(columns) % 3)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


@pytest.mark.parametrize("dynamic", [None, True])
def test_statistics_with_changing_shapes(dynamic):
    compiled = torch.compile(total, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows, columns in [(9, 14), (5, 14), (6, 11), (30, 7), (8, 40)]:
        given = inputs(rows, columns)
        for mine, theirs in zip(gradients(compiled, *given), gradients(total, *given), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "loss",
    [
        lambda x, old, y: functional.contrastive_loss(x, old, query_labels=y, key_labels=y),
        lambda x, old, y: functional.contrastive_loss(x, x, positive=y, exclude=y, positives="mean_out"),
        lambda x, old, y: functional.bct_loss(x, y, old, scale=30.0),
        lambda x, old, y: functional.ract_loss(x, old, y, k=3),
        lambda x, old, y: functional.ract_loss(x, old, y, k=None, detach_keys=False),
        lambda x, old, y: functional.ract_loss(x, old, y, k=3, backend="reference"),
        lambda x, old, y: functional.metric_compatible_loss(x[:, :6], x, old[:, :6], y),
        lambda x, old, y: functional.prototype_loss(x, old, y, perturbed=old + 1),
        lambda x, old, y: functional.margin_softmax_loss(x, x + 1, y),
        lambda x, old, y: (
            functional.fct_loss(x, old) + functional.fastfill_loss(x, old, x[:, 0], old, None, y)
        ),
    ],
    ids=[
        "contrastive",
        "self",
        "bct",
        "ract",
        "ract-all",
        "ract-reference",
        "metric-compatible",
        "prototype",
        "margin",
        "transforms",
    ],
)
def test_losses(loss, dynamic):
    given = (torch.randn(10, 8, requires_grad=True), torch.randn(10, 8), torch.arange(10) % 4)
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for mine, theirs in zip(gradients(compiled, *given), gradients(loss, *given), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_default_compiler():
    given = inputs(9, 14)
    compiled = torch.compile(total, fullgraph=True)
    for mine, theirs in zip(gradients(compiled, *given), gradients(total, *given), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_search():
    def search(query, keys):
        scores, ids = fc.topk(query, keys, 3)
        return scores.sum() + fc.ranks(query, keys, ids).sum()

    given = torch.randn(4, 6), torch.randn(20, 6)
    assert torch.compile(search, fullgraph=True, backend="aot_eager")(*given) == search(*given)


def test_an_index_out_of_range_is_an_error_when_compiled_too():
    compiled = torch.compile(
        lambda q, k, p: fc.softmax_stats(q, k, positive=p).neg_lse, fullgraph=True, backend="aot_eager"
    )
    with pytest.raises(ValueError, match="`positive`"):
        compiled(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 4]))


def op_calls():
    q, k, bias, scale = torch.randn(5, 8), torch.randn(9, 8), torch.randn(9), torch.tensor(2.0)
    y, w = torch.arange(5) % 3, torch.arange(9) % 3
    problem = (q, k, 0.5, scale, bias, y, w, None, torch.arange(5))
    neg, pos, _, _, mean = _ops.softmax_stats(*problem, True)
    grad = torch.randn(5)
    ids = torch.randint(-1, 9, (5, 4))
    bars = _ops.pair_scores(q, k, ids, "cosine")
    rows = [torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4, 8])]
    return [
        (ops.softmax_stats.default, (*problem, True)),
        (ops.softmax_stats.default, (*problem, False)),
        (ops.softmax_query_grad.default, (*problem, neg, pos, mean, grad, None, grad)),
        (ops.softmax_key_grad.default, (*problem, neg, pos, grad, grad, None, True, False)),
        (ops.softmax_key_grad.default, (*problem, neg, pos, None, grad, grad, False, True)),
        (ops.topk.default, ([q], [k], [], [1.0], [0.0], 3, "cosine", y, w, None, [])),
        (ops.topk.default, ([q, q], [k, k], rows, [1.0, 2.0], [0.0, 1.0], 3, "l2", None, None, None, [])),
        (ops.pair_scores.default, (q, k, ids, "l2")),
        (ops.count_beats.default, (q, k, None, torch.tensor([0, 4, 9]), bars, ids, "cosine", None)),
    ]


@pytest.mark.parametrize("number", range(9))
def test_opcheck(number):
    op, arguments = op_calls()[number]
    torch.library.opcheck(op, arguments)
