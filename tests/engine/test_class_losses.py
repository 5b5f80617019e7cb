"""Prototype and margin-softmax losses: definitions in float64, and pytorch-metric-learning."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS, compare
from pytorch_metric_learning import losses as pml
from torch import nn

import fastcompat
from fastcompat import functional as fc
from fastcompat import losses

KINDS = ["arcface", "cosface"]


def prototype_columns(f, p, moved, y, tau, everywhere):
    """The table of logits, column by column, and its cross-entropy."""
    f, p, moved = F.normalize(f), F.normalize(p), F.normalize(moved)
    columns = []
    for c in range(len(p)):
        plain, perturbed = f @ p[c], f @ moved[c]
        columns.append(torch.where((y == c) | everywhere, perturbed, plain) / tau)
    return F.cross_entropy(torch.stack(columns, 1)[y >= 0], y[y >= 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("with_perturbed", "everywhere"), [(True, True), (True, False), (False, False)])
def test_prototype_loss(backend, everywhere, with_perturbed):
    p, y = torch.randn(13, 20), torch.randint(-2, 13, (31,))
    p[4] = 0  # an empty class
    moved = p + 0.2 * torch.randn(13, 20) if with_perturbed else p

    def ours(f, tau):
        named = {"perturbed": moved.to(f)} if with_perturbed else {}
        named |= {"perturb_negatives": everywhere, "temperature": tau, "backend": backend}
        return fc.prototype_loss(f, p.to(f), y, **named)

    def eager(f, tau):
        return prototype_columns(f, p.to(f), moved.to(f), y, tau, torch.tensor(everywhere))

    compare(ours, eager, torch.randn(31, 20), torch.tensor(0.1), floor=60)


def test_prototype_loss_without_normalisation():
    p, moved, y = torch.randn(6, 5), torch.randn(6, 5), torch.randint(6, (9,))

    def eager(f):
        z = f @ p.to(f).T
        z[torch.arange(9), y] = (f * moved.to(f)[y]).sum(1)
        return F.cross_entropy(z / 2.0, y)

    compare(
        lambda f: fc.prototype_loss(f, p.to(f), y, perturbed=moved.to(f), temperature=2.0, normalize=False),
        eager,
        torch.randn(9, 5),
        floor=60,
    )


@pytest.mark.parametrize("perturb_negatives", [False, True])
def test_prototypes_never_get_a_gradient(perturb_negatives):
    p, moved, f = (torch.randn(6, 5, requires_grad=True) for _ in range(3))
    fc.prototype_loss(f, p, torch.arange(6), perturbed=moved, perturb_negatives=perturb_negatives).backward()
    assert p.grad is None and moved.grad is None and f.grad.ne(0).all()


def cosine_classifier(f, w, y, kind, scale, margin):
    """Angles by arc cosine, and the whole table of logits."""
    cosine = F.normalize(f) @ F.normalize(w).T
    rows = (y >= 0).nonzero()[:, 0]
    true = cosine[rows, y[rows]]
    if kind == "arcface":
        angle = true.acos()
        lowered = torch.where(
            angle < math.pi - margin, (angle + margin).cos(), true - margin * math.sin(margin)
        )
    else:
        lowered = true - margin
    z = cosine[rows].index_put((torch.arange(len(rows)), y[rows]), lowered)
    return F.cross_entropy(scale * z, y[rows])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("margin", [0.0, 0.3, 1.5])
def test_margin_softmax_loss(backend, kind, margin):
    y = torch.randint(-1, 13, (31,))
    named = {"kind": kind, "margin": margin}
    compare(
        lambda f, w, s: fc.margin_softmax_loss(f, w, y, scale=s, **named, backend=backend),
        lambda f, w, s: cosine_classifier(f, w, y, scale=s, **named),
        torch.randn(31, 20),
        torch.randn(13, 20),
        torch.tensor(30.0),
        floor=120,
    )


@pytest.mark.one_simd
def test_beyond_the_angle_where_arcface_would_turn():
    """At pi - margin and above the logit keeps falling with the angle."""
    angle = torch.linspace(0.01, math.pi - 0.01, 200, dtype=torch.float64)
    f = torch.stack([angle.cos(), angle.sin()], 1).requires_grad_()
    w = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    loss = fc.margin_softmax_loss(f, w, torch.zeros(200, dtype=torch.int64), margin=1.0, reduction="none")
    assert loss.diff().gt(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_feature_on_top_of_its_class_has_a_finite_gradient(backend, dtype, sign):
    w = torch.randn(5, 8).to(dtype).requires_grad_()
    f = (sign * w.detach()).requires_grad_()
    loss = fc.margin_softmax_loss(f, w, torch.arange(5), backend=backend)
    assert loss.isfinite() and loss.dtype == torch.float32
    for grad in torch.autograd.grad(loss, (f, w)):
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_as_in_pytorch_metric_learning(kind):
    x, y, w = torch.randn(40, 16), torch.randint(7, (40,)), torch.randn(7, 16)
    if kind == "arcface":
        theirs = pml.ArcFaceLoss(7, 16, margin=math.degrees(0.4), scale=20.0)
    else:
        theirs = pml.CosFaceLoss(7, 16, margin=0.4, scale=20.0)
    theirs.W.data = w.T.contiguous()
    ours = losses.MarginSoftmaxLoss(w.clone(), kind=kind, margin=0.4, scale=20.0)
    found = []
    for loss, weight in ((ours, ours.weight), (theirs, theirs.W)):
        leaf = x.clone().requires_grad_()
        value = loss(leaf, y)
        found.append([value, *torch.autograd.grad(value, (leaf, weight))])
    found[1][2] = found[1][2].T
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("classes", [0, 1, 5])
def test_every_row_is_ignored(backend, rows, classes):
    f, w, y = torch.randn(rows, 6, requires_grad=True), torch.randn(classes, 6), torch.full((rows,), -1)
    named = {"perturbed": w + 1, "backend": backend}
    for loss in (
        fc.prototype_loss(f, w, y, **named),
        fc.margin_softmax_loss(f, w, y, backend=backend),
        fc.margin_softmax_loss(f, w, y, backend=backend, kind="cosface"),
    ):
        (grad,) = torch.autograd.grad(loss, f)
        assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(reduction):
    f, w, y = torch.randn(9, 6), torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 4, -1, -7, 0, 1])
    for loss in (fc.prototype_loss, fc.margin_softmax_loss):
        each, found = loss(f, w, y, reduction="none"), loss(f, w, y, reduction=reduction)
        assert each.eq(0).tolist() == [False] * 5 + [True] * 2 + [False] * 2
        torch.testing.assert_close(loss(f, w, y), each.sum() / 7)
        torch.testing.assert_close(found.sum(), each.sum())


def test_prototype_module_follows_its_bank():
    p, new, x, y = torch.randn(6, 5), torch.randn(6, 5), torch.randn(9, 5), torch.randint(6, (9,))
    bank = fastcompat.PrototypeBank(p)
    loss = losses.PrototypeLoss(bank, temperature=0.2)
    torch.testing.assert_close(loss(x, y), fc.prototype_loss(x, p, y, temperature=0.2))
    bank.refresh(new, 0)
    expected = fc.prototype_loss(x, p, y, perturbed=fastcompat.ndpp(p, new), temperature=0.2)
    torch.testing.assert_close(loss(x, y), expected)
    fixed = losses.PrototypeLoss(p, perturbed=new, perturb_negatives=True)
    torch.testing.assert_close(fixed(x, y), fc.prototype_loss(x, p, y, perturbed=new, perturb_negatives=True))
    assert not list(fixed.parameters()) and "bank.perturbed" in fixed.state_dict()


def test_margin_module_shares_a_classifier():
    classifier = nn.Linear(6, 5, bias=False)
    loss = losses.MarginSoftmaxLoss(classifier.weight, kind="cosface", margin=0.2)
    loss(torch.randn(4, 6), torch.arange(4)).backward()
    assert loss.weight is classifier.weight and classifier.weight.grad.ne(0).any()
