"""The scale's (temperature's) gradient where the positives' share of it cancels, against float64."""

from __future__ import annotations

import pytest
import torch
from engine.truth import EPSILON, Problem, check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SLIGHTLY_MORE = 1 + 2**-6


def by_label(dtype: torch.dtype) -> Problem:
    """In every row the positives come in pairs of nearly opposite keys."""
    half = torch.randn(60, 48).to(dtype).float()
    keys, labels = torch.cat([half, -SLIGHTLY_MORE * half]).to(dtype), torch.arange(60) % 3
    query = torch.randn(33, 48).to(dtype)
    return Problem(query, keys, query_labels=torch.arange(33) % 4, key_labels=torch.cat([labels, labels]))


def by_index(dtype: torch.dtype) -> Problem:
    """Every other row is nearly the opposite of the one before, with the same positive."""
    half = torch.randn(30, 48).to(dtype).float()
    query = torch.stack([half, -SLIGHTLY_MORE * half], 1).reshape(60, 48).to(dtype)
    positive = torch.randint(120, (30,)).repeat_interleave(2)
    return Problem(query, torch.randn(120, 48).to(dtype), positive=positive)


def scale_gradient(p: Problem, outputs: tuple[int, ...], *, fused: bool) -> torch.Tensor:
    scale = p.scale.detach().requires_grad_()
    p = Problem(**{**vars(p), "scale": scale})
    stats = p.fused() if fused else p.eager()
    total = sum(torch.where(stats[i].isfinite(), stats[i], 0).sum() for i in outputs)
    return torch.autograd.grad(total, scale)[0]


@pytest.mark.parametrize("outputs", [(2,), (1, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("made", [by_label, by_index])
def test_what_cancels_is_not_lost(made, dtype, bias, outputs):
    """As accurate as eager in float32 on the same numbers, whatever their dtype."""
    p = made(dtype)
    p.scale, p.bias = torch.tensor(0.05), 30 * torch.randn(len(p.keys)) if bias else None
    ours = scale_gradient(p, outputs, fused=True)
    eager, truth = (
        scale_gradient(p.to(wide), outputs, fused=False) for wide in (torch.float32, torch.float64)
    )
    members, _ = p.members()
    terms = float((p.query.double() @ p.keys.double().T)[members].abs().sum())
    check(ours, eager, truth, EPSILON / 4 * terms * len(outputs), "scale")
