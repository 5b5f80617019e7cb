"""e^x of the kernels over all of float32, read off the gradient of a bias: exp(bias - neg_lse)."""

from __future__ import annotations

import pytest
import torch

LARGEST_ERROR = 1.2e-7  # relative; what the kernels' own comment says


def exponential(x: torch.Tensor) -> torch.Tensor:
    """One query and keys of zeros: the logits are the biases, and the log-sum-exp is said to be 0."""
    nothing, zero = (None,) * 5, torch.zeros(1)
    vectors = (zero, torch.full((1,), -torch.inf), torch.ones(1), None, None)  # neg_lse, pos_lse, gradients
    keys = torch.zeros(len(x), 1)
    problem = (torch.zeros(1, 1), keys, 1.0, nothing[0], x, *nothing[1:])
    return torch.ops.fastcompat.softmax_key_grad(*problem, *vectors, False, True)[1]


@pytest.mark.parametrize(("low", "high"), [(-87.3, -20), (-20, -1), (-1, 1), (1, 20), (20, 88.7)])
def test_error(low, high):
    x = torch.linspace(low, high, 400_000)
    truth = x.double().exp()
    assert ((exponential(x).double() - truth) / truth).abs().max() <= LARGEST_ERROR


def test_around_whole_powers_of_two():
    """Where the integer part of x / ln 2 changes."""
    steps = torch.arange(-60, 61) * 2.0**-23
    whole = (torch.arange(-251, 255)[:, None] / 2 * torch.tensor(2.0).double().log()).float()
    x = (whole * (1 + steps)).flatten()
    truth = x.double().exp()
    assert ((exponential(x).double() - truth) / truth).abs().max() <= LARGEST_ERROR


def test_small_arguments():
    x = torch.logspace(-38, -1, 4000)
    x = torch.cat([-x, torch.tensor([-0.0, 0.0]), x])
    assert (exponential(x).double() - x.double().exp()).abs().max() <= LARGEST_ERROR * 1.11


def test_the_ends():
    x = torch.tensor([-torch.inf, -1e38, -1e6, -104.0, -88.0, 88.8, 89.0, 1e6, 1e38])
    assert exponential(x).tolist() == [0.0] * 5 + [torch.inf] * 4
    last = exponential(torch.linspace(-87.6, -87.2, 1000))
    assert (last.eq(0) | last.ge(2.0**-126)).all() and last.diff().ge(0).all()
