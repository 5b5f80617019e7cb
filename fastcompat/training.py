"""A thin helper for compatible training, optional: a plain loop of 15 lines does the same.

The old model's features are made once (`cached_features`); then every step adds a compatible loss to the
ordinary one (`CompatibleStep`). The loop, the schedule and the validation stay yours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .transforms.base import evaluating


@torch.no_grad()
def cached_features(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> Tensor:
    """The features [N, D] of every batch, in the order in which they come, made once and without gradient.

    Args:
        model: embeds a batch of images. It runs in evaluation mode and is left in the mode it was in.
        batches: tensors, or tuples whose first entry is the images, such as a `DataLoader` gives; not
            shuffled, so that row i belongs to image i. They are moved to the model's device.

    Raises:
        ValueError: there is no batch.
    """
    device = next((weight.device for weight in model.parameters()), None)
    with evaluating(model):
        features = [
            model((batch if isinstance(batch, Tensor) else batch[0]).to(device)).detach() for batch in batches
        ]
    if not features:
        raise ValueError("`batches` must hold at least one batch of images: got none")
    return torch.cat(features)


class CompatibleStep:
    """One training step: `L = ordinary(f, y) + weight * compatible(f, y, ref_emb=old)`, clipped, applied.

    ::

        step = CompatibleStep(new_model, optimiser, ordinary, fc.losses.RACTLoss(), clip_norm=2)
        old = cached_features(old_model, DataLoader(images, 256))
        for rows in batches:
            step(images[rows], labels[rows], old[rows])

    Args:
        model: embeds a batch of images: `f = model(images)` [B, D].
        optimiser: holds the model's parameters and those of `ordinary` (a classification head).
        ordinary: `ordinary(features, labels)`, the loss you would train with anyway.
        compatible: a module of `fastcompat.losses`, or anything called like one; None trains without it.
        weight: of the compatible loss.
        clip_norm: the largest norm of the gradient over all of the optimiser's parameters; None: no limit.
        autocast: torch.bfloat16 or torch.float16, the type of the forward pass (float16 with a gradient
            scaler); None: as the parameters are.
        log: called after each step with `{"step", "loss", "ordinary", "compatible", "grad_norm"}`: the number
            of the step from 1, and 0-dim tensors, so that only a logger that reads them waits for the device
            (no "compatible" without that loss, no "grad_norm" without `clip_norm`).
    """

    def __init__(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        ordinary: Callable[[Tensor, Tensor], Tensor],
        compatible: Callable[..., Tensor] | None = None,
        *,
        weight: float = 1.0,
        clip_norm: float | None = None,
        autocast: torch.dtype | None = None,
        log: Callable[[Mapping[str, Any]], object] | None = None,
    ) -> None:
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"`autocast` must be torch.bfloat16, torch.float16 or None: got {autocast}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"`clip_norm` must be above 0 or None: got {clip_norm}")
        self.model, self.optimiser = model, optimiser
        self.ordinary, self.compatible, self.weight = ordinary, compatible, weight
        self.clip_norm, self.autocast, self.log = clip_norm, autocast, log
        self.weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        self.device = self.weights[0].device.type
        self.scaler = torch.amp.GradScaler(self.device, enabled=autocast == torch.float16)
        self.steps = 0

    def __call__(self, images: Tensor, labels: Tensor, old: Tensor | None = None) -> Tensor:
        """Train on images of labels int64 [B], whose old features `old` [B, D_old] go to `compatible`.

        Without `old` the compatible loss is called with features and labels only, as those that compare with
        class vectors (BCT, prototypes) are. Returns the loss, 0-dim, detached.
        """
        self.model.train()
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            features = self.model(images)
            loss = ordinary = self.ordinary(features, labels)
            entry = {"ordinary": ordinary.detach()}
            if self.compatible is not None:
                reference = {} if old is None else {"ref_emb": old}
                compatible = self.compatible(features, labels, **reference)
                loss = ordinary + self.weight * compatible
                entry["compatible"] = compatible.detach()
        self.optimiser.zero_grad()
        torch.autograd.backward(self.scaler.scale(loss))
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimiser)
            entry["grad_norm"] = nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.steps += 1
        if self.log is not None:
            self.log({"step": self.steps, "loss": loss.detach(), **entry})
        return loss.detach()
