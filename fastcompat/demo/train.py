"""The demonstration's networks and its training loop: a linear head, plus any compatible loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastcompat.demo.data import SIZE

BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """How one kind of data is trained: widths, embedding size, steps, learning rates, augmentation."""

    old_widths: tuple[int, ...]
    new_widths: tuple[int, ...]
    dim: int
    old_epochs: int
    new_epochs: int
    old_lr: float
    new_lr: float = 0.1
    steps: tuple[int, int] = (200, 600)  # fewest and most, whatever the epochs come to
    noise: float = 0.0
    shift: int = 0  # pixels
    rotations: bool = False  # quarter turns of an image count as further classes for the new models


DIGITS = Recipe((24,), (256, 128), dim=32, old_epochs=40, new_epochs=40, old_lr=0.05, noise=0.15)
FEW = Recipe((8, 16, 32), (24, 48, 64), dim=64, old_epochs=30, new_epochs=30, old_lr=0.05, shift=2)
MANY = Recipe(
    (8, 16, 32), (24, 48, 64), dim=64, old_epochs=30, new_epochs=5, old_lr=0.05, shift=2, rotations=True
)


def mlp(pixels: int, widths: tuple[int, ...], dim: int) -> nn.Module:
    """Linear-BatchNorm-ReLU blocks and a last Linear, on flattened images."""
    layers: list[nn.Module] = [nn.Flatten()]
    for wide in widths:
        layers += [nn.Linear(pixels, wide, bias=False), nn.BatchNorm1d(wide), nn.ReLU()]
        pixels = wide
    return nn.Sequential(*layers, nn.Linear(pixels, dim))


def conv_net(channels: int, widths: tuple[int, ...], dim: int) -> nn.Module:
    """Conv-BatchNorm-ReLU-MaxPool blocks and a last Linear, for images of SIZE x SIZE."""
    layers: list[nn.Module] = []
    for wide in widths:
        layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
        channels = wide
    side = SIZE // 2 ** len(widths)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, dim))


def build(image: Tensor, widths: tuple[int, ...], dim: int) -> nn.Module:
    """The network for images like `image` [C, H, W]."""
    if image.shape[-1] != SIZE:
        return mlp(image.numel(), widths, dim)
    return conv_net(image.shape[0], widths, dim)


def fit(
    model: nn.Module,
    images: Tensor,  # [N, C, H, W]
    labels: Tensor,  # [N]
    *,
    epochs: int,
    lr: float,
    recipe: Recipe,
    seed: int,
    title: str,
    compatible: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Train `model` with cross-entropy and, weight 1, `compatible(features [B, D], rows [B])`.

    SGD with momentum; warm-up and clipped gradients, without which a compatible loss can diverge early.
    """
    torch.manual_seed(seed)
    head = nn.Linear(recipe.dim, int(labels.max()) + 1, bias=False)
    weights = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(weights, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = min(BATCH, len(images))
    steps = min(max(epochs * len(images) // batch, recipe.steps[0]), recipe.steps[1])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.15, cycle_momentum=False, div_factor=50
    )
    model.train()
    rows = torch.empty(0, dtype=torch.int64, device="cpu")
    for _ in tqdm(range(steps), desc=f"{title:>11}", unit="step", disable=None):
        if len(rows) < batch:
            rows = torch.randperm(len(images), dtype=torch.int64, device="cpu")
        chosen, rows = rows[:batch], rows[batch:]
        features = model(augment(images[chosen], recipe))
        loss = F.cross_entropy(head(features), labels[chosen])
        if compatible is not None:
            loss = loss + compatible(features, chosen)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(weights, 2.0)
        optimiser.step()
        schedule.step()
    model.eval()


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Noise and a small shift, the same shift for the whole batch."""
    if recipe.noise:
        images = images + recipe.noise * torch.randn_like(images)
    if recipe.shift:
        down, right = torch.randint(
            -recipe.shift, recipe.shift + 1, (2,), dtype=torch.int64, device="cpu"
        ).tolist()
        images = images.roll((down, right), (2, 3))
    return images


@torch.no_grad()
def embed(model: nn.Module, images: Tensor) -> Tensor:
    """Features [N, D] of images [N, C, H, W]."""
    return torch.cat([model(chunk) for chunk in torch.split(images, 1024)])
