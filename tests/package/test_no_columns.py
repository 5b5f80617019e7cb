"""Embeddings without columns: every logit is 0 or its bias, and what needs a direction says so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastcompat as fc
from fastcompat import functional

LABELS = torch.tensor([0, 0, 1, 1])
OLD, CLASSES = torch.zeros(4, 0), torch.zeros(3, 0)
LOSSES: dict[str, Callable[[Tensor, str], Tensor]] = {
    "contrastive": lambda x, b: functional.contrastive_loss(
        x, OLD, query_labels=LABELS, key_labels=LABELS, backend=b
    ),
    "ract": lambda x, b: functional.ract_loss(x, OLD, LABELS, backend=b),
    "ract, all negatives": lambda x, b: functional.ract_loss(x, OLD, LABELS, k=None, backend=b),
    "metric_compatible": lambda x, b: functional.metric_compatible_loss(x, OLD, OLD, LABELS, backend=b),
    "bct": lambda x, b: functional.bct_loss(x, LABELS, CLASSES, backend=b),
    "prototype": lambda x, b: functional.prototype_loss(x, CLASSES, LABELS, backend=b),
    "margin": lambda x, b: functional.margin_softmax_loss(x, CLASSES, LABELS, backend=b),
    "fct": lambda x, b: functional.fct_loss(x, OLD, backend="auto"),
    "fastfill": lambda x, b: functional.fastfill_loss(
        x, OLD, torch.zeros(4), CLASSES, torch.zeros(3), LABELS, backend=b
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    found = []
    for backend in ("native", "reference"):
        x = torch.zeros(4, 0, requires_grad=True)
        loss = LOSSES[name](x, backend)
        loss.backward()
        assert loss.isfinite() and x.grad is not None and x.grad.shape == (4, 0)
        found.append(loss.detach())
    torch.testing.assert_close(found[0], found[1])


def test_the_value_of_a_loss() -> None:
    """Two of four keys are positives, and all logits are equal."""
    loss = LOSSES["contrastive"](torch.zeros(4, 0, requires_grad=True), "native")
    torch.testing.assert_close(loss.detach(), torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("kind", "value"), [("entropy", torch.tensor(3.0).log()), ("margin", 1.0), ("least_confidence", 2 / 3)]
)
def test_uncertainty(kind: str, value: float) -> None:
    found = fc.uncertainty(OLD, CLASSES, kind=kind)
    torch.testing.assert_close(found, torch.full((4,), float(value)))


@pytest.mark.parametrize("perturb", [fc.ndpp, fc.odpp])
def test_a_perturbation_needs_a_direction(perturb: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match="`old_prototypes` must have at least 1 column"):
        perturb(CLASSES, CLASSES)
