"""Side-information: a self-supervised feature, stored with each item, that helps later transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import functional
from .base import evaluating


class SideInformation(nn.Module):
    """A contrastive (SimCLR) model trained beside the old one, and its loss as one line of any training loop.

    ::

        side = fc.SideInformation(encoder, augment, projection=nn.Linear(64, 32))
        optimiser = torch.optim.SGD([*old_model.parameters(), *side.parameters()], lr=0.1)
        for images, labels in loader:
            loss = F.cross_entropy(old_model(images), labels) + side(images)
            ...
        stored = side.embed(images)        # [N, d_side], beside the old features

    What a classifier throws away may be what the new model needs: two random views of an image have equal
    side-information, other images have other. Ramanujan et al., CVPR 2022, arXiv 2112.02805 (code), with
    the loss of SimCLR, Chen et al., ICML 2020, arXiv 2002.05709.

    Args:
        encoder: images -> [B, d_side].
        augment: images -> one random view of each.
        projection: [B, d_side] -> [B, d], used only by the loss, as in SimCLR; None: no projection.
        temperature: of the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        augment: Callable[[Tensor], Tensor],
        *,
        projection: nn.Module | None = None,
        temperature: float | Tensor = 0.1,
    ) -> None:
        super().__init__()
        self.encoder, self.augment, self.temperature = encoder, augment, temperature
        self.projection = nn.Identity() if projection is None else projection

    def forward(self, images: Tensor) -> Tensor:
        """`functional.simclr_loss` of two random views of a batch of images."""
        first, second = (self.projection(self.encoder(self.augment(images))) for _ in range(2))
        return functional.simclr_loss(first, second, temperature=self.temperature)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """The side-information [B, d_side] of images as they are, in eval mode."""
        with evaluating(self):
            found: Tensor = self.encoder(images)
        return found
