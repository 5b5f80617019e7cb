"""How losses are compared in value and gradient: with float64 and eager lines, or with another library."""

from __future__ import annotations

import torch
from engine.truth import EPSILON, check

BACKENDS = ["native", "reference"]
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def compare(ours, eager, *inputs, floor=20.0):
    """Value and gradients of `ours` against float64, no worse than `eager` in float32."""

    def run(function, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        loss = function(*leaves)
        return [loss, *torch.autograd.grad(loss.sum(), leaves)]

    results = run(ours, torch.float32), run(eager, torch.float32), run(eager, torch.float64)
    for place, (mine, theirs, exact) in enumerate(zip(*results, strict=True)):
        size = exact.abs().max().item() if exact.numel() else 0.0
        check(mine, theirs, exact, floor * EPSILON * max(size, EPSILON), f"result {place}")


def value_and_gradient(loss, embeddings, *rest, **named):
    x = embeddings.clone().requires_grad_()
    value = loss(x, *rest, **named)
    return value.detach(), torch.autograd.grad(value, x)[0]


def same(a, b):
    for mine, theirs in zip(a, b, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
