"""Every loss of the package as `loss(new, old, labels, **options)`: embeddings [B, D], labels below B."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastcompat as fc
from fastcompat import functional as f
from fastcompat import losses

Loss = Callable[..., Tensor]


def _pairs(labels: Tensor) -> tuple[Tensor, ...]:
    """The 4-tuple of pytorch-metric-learning: every positive pair and every negative pair."""
    same = (labels[:, None] == labels) & (labels[:, None] >= 0)
    apart = ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return (*(same & apart).nonzero().T, *(~same).nonzero().T)


def _contrastive(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    return f.contrastive_loss(new, old, query_labels=y, key_labels=y, **options)


def _itself(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    own = torch.arange(len(y), dtype=torch.int64, device=y.device)
    return f.contrastive_loss(new, new, query_labels=y, key_labels=y, exclude=own, **options)


def _statistics(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    stats = fc.softmax_stats(new, old, scale=0.5, query_labels=y, key_labels=y, **options)
    return torch.where(stats.pos_count > 0, stats.pos_sum, 0.0).sum()


def _class_rows(old: Tensor, y: Tensor) -> Tensor:
    return torch.cat([old, -old.flip(0)])  # as many classes as labels can name, and more


def _bct(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    return f.bct_loss(new, y, _class_rows(old, y), **options)


def _prototype(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    rows = _class_rows(old, y)
    return f.prototype_loss(new, rows, y, perturbed=rows.roll(1, 1), **options)


def _fastfill(new: Tensor, old: Tensor, y: Tensor, **options: Any) -> Tensor:
    return f.fastfill_loss(new, old, new[:, 0].float(), _class_rows(old, y), None, y, **options)


NORMALISING: dict[str, Loss] = {
    "contrastive": _contrastive,
    "contrastive none": partial(_contrastive, reduction="none"),
    "contrastive mean_out": partial(_contrastive, positives="mean_out"),
    "contrastive itself": _itself,
    "simclr": lambda new, old, y, **options: f.simclr_loss(new, old, **options),
    "ract": partial(f.ract_loss, k=3, temperature=0.1),
    "ract all": partial(f.ract_loss, k=None, detach_keys=False),
    "metric-compatible": lambda new, old, y, **options: f.metric_compatible_loss(new, new, old, y, **options),
    "metric-compatible mean_out": lambda new, old, y, **options: f.metric_compatible_loss(
        new, new, old, y, positives="mean_out", shared_negatives=False, **options
    ),
    "prototype": _prototype,
    "margin": lambda new, old, y, **options: f.margin_softmax_loss(new, _class_rows(old, y), y, **options),
    "margin cosface": lambda new, old, y, **options: f.margin_softmax_loss(
        new, _class_rows(old, y), y, kind="cosface", **options
    ),
    "bct cosine": partial(_bct, scale=30.0),
}
PLAIN: dict[str, Loss] = {
    "statistics": _statistics,
    "contrastive plain": partial(_contrastive, normalize=False),
    "contrastive plain none": partial(_contrastive, normalize=False, reduction="none"),
    "ract plain": partial(f.ract_loss, k=3, normalize=False),
    "metric-compatible plain": lambda new, old, y, **options: f.metric_compatible_loss(
        new, new, old, y, normalize=False, **options
    ),
    "prototype plain": partial(_prototype, normalize=False),
    "bct": _bct,
    "fastfill": _fastfill,
}
LOSSES = NORMALISING | PLAIN
# Called with pairs instead of labels, which is plain PyTorch.
FROM_PAIRS: dict[str, Loss] = {
    "contrastive pairs": lambda new, old, y: losses.ContrastiveLoss()(new, None, _pairs(y), old),
    "contrastive pairs mean_out": lambda new, old, y: losses.ContrastiveLoss(positives="mean_out")(
        new, None, _pairs(y), old
    ),
    "ract pairs": lambda new, old, y: losses.RACTLoss(temperature=0.1, k=3)(new, None, _pairs(y), old),
}


def value_and_gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The summed loss and its gradients, both in float64; a leaf that is not used has the gradient 0."""
    found = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
    zeros = (torch.zeros_like(leaf) for leaf in leaves)
    grads = [(zero if grad is None else grad).double() for grad, zero in zip(found, zeros, strict=True)]
    return loss.detach().double().sum(), grads
