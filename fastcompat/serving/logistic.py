"""Logistic regression on one feature, by Newton's method."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PRIOR = 1e-4  # weight of half the squared slope beside the mean loss: it bounds the slope of separable data
STEPS = 100


def logistic_fit(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope a and intercept c that minimise the mean of `log(1 + exp(v)) - y v`, `v = a x + c` (Platt, 1999).

    The feature is standardised, where the slope has a weak normal prior (`PRIOR`), so that separable data
    have a minimum; the intercept has none. Newton's method with step halving: the loss is convex and falls in
    every step.

    Args:
        x: [n] finite, not constant.
        y: [n] 0 or 1, with both among them.
    """
    x, y = x.double(), y.double()
    mean, deviation = x.mean(), x.std(unbiased=False)
    features = torch.stack([(x - mean) / deviation, torch.ones_like(x)], 1)  # [n, 2]
    prior = torch.tensor([PRIOR, 0.0], dtype=torch.float64, device=x.device)

    def loss(at: Tensor) -> Tensor:
        v = features @ at
        return (F.softplus(v) - y * v).mean() + 0.5 * (prior * at * at).sum()

    share = y.mean()
    at = torch.stack([torch.zeros_like(share), torch.log(share / (1 - share))])
    value = loss(at)
    for _ in range(STEPS):
        p = torch.sigmoid(features @ at)
        gradient = (p - y) @ features / len(x) + prior * at
        curvature = (features * (p * (1 - p))[:, None]).T @ features / len(x) + prior.diag()
        curvature += 1e-12 * torch.eye(2, dtype=torch.float64, device=x.device)
        direction = torch.linalg.solve(curvature, gradient)
        step = 1.0
        while step > 1e-9 and not loss(at - step * direction) <= value:
            step /= 2
        if step <= 1e-9:
            break
        at = at - step * direction
        before, value = value, loss(at)
        if before - value <= 1e-14:
            break
    slope = at[0] / deviation
    return float(slope), float(at[1] - slope * mean)
