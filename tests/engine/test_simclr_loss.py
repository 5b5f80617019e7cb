"""SimCLR's loss against its definition and against pytorch-metric-learning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS, compare
from pytorch_metric_learning.losses import NTXentLoss

from fastcompat import functional as fc
from fastcompat import losses


def pair_by_pair(first, second, temperature):
    x = F.normalize(torch.cat([first, second]))
    z = x @ x.T / temperature
    rows = []
    for i in range(len(x)):
        partner = (i + len(first)) % len(x)
        others = [j for j in range(len(x)) if j != i]
        rows.append(z[i, others].logsumexp(0) - z[i, partner])
    return torch.stack(rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 5), (2, 17), (33, 12)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_values_and_gradients(backend, rows, dim, reduction):
    def ours(first, second, tau):
        return fc.simclr_loss(first, second, temperature=tau, reduction=reduction, backend=backend)

    def eager(first, second, tau):
        each = pair_by_pair(first, second, tau)
        return {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]

    floor = 20.0 * 2 * rows if reduction == "sum" else 20.0
    compare(ours, eager, torch.randn(rows, dim), torch.randn(rows, dim), torch.tensor(0.2), floor=floor)


def test_is_ntxent_of_pytorch_metric_learning():
    first, second = torch.randn(19, 8), torch.randn(19, 8)
    pairs = torch.arange(19).repeat(2)
    theirs = NTXentLoss(temperature=0.1)(torch.cat([first, second]), pairs)
    torch.testing.assert_close(fc.simclr_loss(first, second), theirs)


def test_without_normalisation_and_without_rows():
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    unit = F.normalize(first), F.normalize(second)
    found = losses.SimCLRLoss(normalize=False)(*unit)
    torch.testing.assert_close(found, fc.simclr_loss(first, second))
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = fc.simclr_loss(empty, empty)
    assert loss == 0 and torch.autograd.grad(loss, empty)[0].shape == (0, 4)


@pytest.mark.one_simd
def test_module():
    first, second = torch.randn(6, 4), torch.randn(6, 4)
    named = {"temperature": 0.3, "reduction": "sum", "backend": "reference"}
    assert losses.SimCLRLoss(**named)(first, second) == fc.simclr_loss(first, second, **named)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.zeros(6, 5), "`second` must have as many columns as `first`: got 5 and 4"),
        (torch.zeros(5, 4), "`second` must have one entry per row of `first`: got 5 and 6"),
    ],
)
@pytest.mark.one_simd
def test_errors(second, message):
    with pytest.raises(ValueError, match=message):
        fc.simclr_loss(torch.zeros(6, 4), second)
