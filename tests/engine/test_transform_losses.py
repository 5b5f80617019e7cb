"""FCT and FastFill losses against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS, compare

from fastcompat import functional as fc
from fastcompat import losses


@pytest.mark.one_simd
def test_fct_loss():
    target = torch.randn(9, 7)
    compare(lambda r: fc.fct_loss(r, target.to(r)), lambda r: F.mse_loss(r, target.to(r)), torch.randn(9, 7))
    pred = torch.randn(9, 7)
    each = fc.fct_loss(pred, target, reduction="none")
    torch.testing.assert_close(each, (pred - target).square().mean(1))
    torch.testing.assert_close(fc.fct_loss(pred, target, reduction="sum"), each.sum())
    assert losses.FCTLoss()(pred, target) == fc.fct_loss(pred, target)


@pytest.mark.one_simd
def test_fct_loss_in_half_precision_is_summed_in_float32():
    pred, target = torch.full((2, 4), 300.0).half(), torch.zeros(2, 4).half()
    assert fc.fct_loss(pred, target) == 90_000  # more than float16 holds


def row_by_row(r, s, n, w, b, y, smoothing):
    """Label smoothing as a mixture: the true class, and all classes alike."""
    rows = []
    for i in range(len(y)):
        if y[i] < 0:
            continue
        log_p = (w @ r[i] + b).log_softmax(0)
        entropy = -(1 - smoothing) * log_p[y[i]] - smoothing * log_p.mean()
        error = (n[i] - r[i]).square().mean() + entropy
        rows.append(0.5 * (-s[i]).exp() * error + 0.5 * s[i])
    return torch.stack(rows).mean()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(17,), (17, 1)])
def test_fastfill_loss(backend, smoothing, with_bias, shape):
    n, w, b = torch.randn(17, 12), torch.randn(7, 12), torch.randn(7)
    y = torch.randint(-1, 7, (17,))

    def ours(r, s):
        bias = b.to(r) if with_bias else None
        named = {"label_smoothing": smoothing, "backend": backend}
        return fc.fastfill_loss(r, n.to(r), s, w.to(r), bias, y, **named)

    def eager(r, s):
        bias = b.to(r) if with_bias else torch.zeros(7).to(r)
        return row_by_row(r, s.reshape(-1), n.to(r), w.to(r), bias, y, smoothing)

    compare(ours, eager, torch.randn(17, 12), torch.randn(shape), floor=60)


def test_label_smoothing_is_that_of_torch():
    r, w, b, y = torch.randn(9, 5), torch.randn(6, 5), torch.randn(6), torch.randint(6, (9,))
    ours = fc.fastfill_loss(r, r, torch.zeros(9), w, b, y, reduction="none")
    theirs = F.cross_entropy(r @ w.T + b, y, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(2 * ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("classes", [0, 1, 5])
def test_every_row_is_ignored(backend, rows, classes):
    r, s = torch.randn(rows, 6, requires_grad=True), torch.randn(rows, requires_grad=True)
    w, b, y = torch.randn(classes, 6), torch.randn(classes), torch.full((rows,), -3)
    loss = fc.fastfill_loss(r, torch.randn(rows, 6), s, w, b, y, backend=backend)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (r, s)):
        assert grad.eq(0).all()


def test_the_classifier_and_the_target_are_frozen():
    r, n, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (4, 6), (5, 6), (5,)))
    fc.fastfill_loss(r, n, torch.zeros(4), w, b, torch.arange(4)).backward()
    assert r.grad is not None and n.grad is w.grad is b.grad is None
    fc.fct_loss(r, n).backward()
    assert n.grad is None


def test_fastfill_module():
    r, n, s, y = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4), torch.arange(4)
    w, b = torch.randn(5, 6), torch.randn(5)
    loss = losses.FastFillLoss(w, b, label_smoothing=0.2, reduction="sum")
    expected = fc.fastfill_loss(r, n, s, w, b, y, label_smoothing=0.2, reduction="sum")
    assert loss(r, n, s, y) == expected
    assert set(loss.state_dict()) == {"new_weight", "new_bias"} and not list(loss.parameters())
    assert set(losses.FastFillLoss(w).state_dict()) == {"new_weight"}
