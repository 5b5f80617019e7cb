"""The losses against the slow lines a user would write, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS, compare

from fastcompat import functional as fc


def unit(rows: int, dim: int) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim))


def all_pairs(query, keys, y_query, y_key, temperature, positives, exclude=None):
    """InfoNCE / SupCon row by row, from the definition."""
    z = F.normalize(query) @ F.normalize(keys).T / temperature
    rows = []
    for i in range(len(z)):
        same = y_key == y_query[i]
        use = torch.ones_like(same)
        if exclude is not None:
            use[exclude[i]] = False
        pos, everything = z[i][same & use], z[i][use]
        if not len(pos):
            continue
        p = pos.logsumexp(0) if positives == "sum_in_log" else pos.mean()
        rows.append(everything.logsumexp(0) - p)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_contrastive_loss(backend, positives, temperature):
    query, keys = torch.randn(31, 20), torch.randn(57, 20)
    y_query, y_key = torch.randint(9, (31,)), torch.randint(8, (57,))

    def ours(q, k):
        return fc.contrastive_loss(
            q,
            k,
            query_labels=y_query,
            key_labels=y_key,
            temperature=temperature,
            positives=positives,
            backend=backend,
        )

    def eager(q, k):
        return all_pairs(q, k, y_query, y_key, temperature, positives).mean()

    compare(ours, eager, query, keys, floor=20 + 2 / temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_contrastive_loss_with_an_index_is_cross_entropy(backend):
    query, keys, target = torch.randn(31, 20), torch.randn(57, 20), torch.randint(57, (31,))

    def ours(q, k, tau):
        return fc.contrastive_loss(q, k, positive=target, temperature=tau, backend=backend)

    def eager(q, k, tau):
        return F.cross_entropy(F.normalize(q) @ F.normalize(k).T / tau, target)

    compare(ours, eager, query, keys, torch.tensor(0.2))


def test_contrastive_loss_without_normalisation():
    query, keys, target = torch.randn(31, 20), torch.randn(57, 20), torch.randint(57, (31,))
    compare(
        lambda q, k: fc.contrastive_loss(q, k, positive=target, temperature=2.0, normalize=False),
        lambda q, k: F.cross_entropy(q @ k.T / 2.0, target),
        query,
        keys,
        floor=60,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
def test_rows_without_positives_take_no_part(backend, positives):
    query, keys = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8)
    named = {
        "query_labels": torch.tensor([0, 7, -1, 1]),
        "key_labels": torch.tensor([0, 1, 1, -1, 2, 0]),
        "positives": positives,
        "backend": backend,
    }
    each = fc.contrastive_loss(query, keys, **named, reduction="none")
    assert each.eq(0).tolist() == [False, True, True, False]
    torch.testing.assert_close(fc.contrastive_loss(query, keys, **named), each.sum() / 2)
    torch.testing.assert_close(fc.contrastive_loss(query, keys, **named, reduction="sum"), each.sum())
    (grad,) = torch.autograd.grad(each.sum(), query)
    assert grad.isfinite().all() and grad[1:3].eq(0).all() and grad[[0, 3]].ne(0).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("columns", [0, 3])
def test_every_row_is_ignored(backend, positives, rows, columns):
    query, keys = torch.randn(rows, 8, requires_grad=True), torch.randn(columns, 8, requires_grad=True)
    loss = fc.contrastive_loss(query, keys, positives=positives, backend=backend)
    assert loss.item() == 0
    for grad in torch.autograd.grad(loss, (query, keys)):
        assert grad.eq(0).all()


@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
def test_one_class_has_finite_gradients(positives):
    """Every key is a positive: there is no negative to push away."""
    x, y = torch.randn(6, 8, requires_grad=True), torch.zeros(6, dtype=torch.int64)
    loss = fc.contrastive_loss(
        x, x, query_labels=y, key_labels=y, exclude=torch.arange(6), positives=positives
    )
    (grad,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and grad.isfinite().all()
    assert loss == 0 if positives == "sum_in_log" else loss > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [None, 30.0])
@pytest.mark.parametrize("widths", [(20, 20), (28, 20), (20, 28)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_bct_loss(backend, scale, widths, with_bias):
    new, weight = torch.randn(31, widths[0]), torch.randn(12, widths[1])
    bias = torch.randn(12) if with_bias else None
    target = torch.randint(-1, 15, (31,))
    known = (target >= 0) & (target < 12)

    def eager(x):
        w, b = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        x = F.pad(x, (0, max(0, widths[1] - widths[0])))[:, : widths[1]]
        if scale is not None:
            x, w = F.normalize(x), F.normalize(w)
        z = (scale or 1.0) * (x @ w.T) + (0 if b is None else b)
        return F.cross_entropy(z[known], target[known])

    compare(
        lambda x: fc.bct_loss(x, target, weight, bias, scale=scale, backend=backend), eager, new, floor=60
    )
    each = fc.bct_loss(new, target, weight, bias, scale=scale, backend=backend, reduction="none")
    assert torch.equal(each != 0, known)


def test_bct_loss_never_trains_the_old_classifier():
    weight, bias = torch.randn(12, 8, requires_grad=True), torch.randn(12, requires_grad=True)
    new = torch.randn(5, 8, requires_grad=True)
    fc.bct_loss(new, torch.arange(5), weight, bias).backward()
    assert weight.grad is None and bias.grad is None and new.grad is not None


def test_bct_loss_without_any_known_class():
    new = torch.randn(5, 8, requires_grad=True)
    loss = fc.bct_loss(new, torch.full((5,), 99), torch.randn(12, 8))
    (grad,) = torch.autograd.grad(loss, new)
    assert loss == 0 and grad.eq(0).all()
