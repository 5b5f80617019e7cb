"""The image models: the old one, the side-information's, and new ones with every compatible loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fastcompat.demo.train import BATCH, Recipe, augment, build, embed
from fastcompat.training import CompatibleStep

from .data import Parts
from .losses import USES_OLD_FEATURES, Perturbed, compatible_loss
from .settings import Compatible


def network(images: Tensor, widths: tuple[int, ...], dim: int, seed: int) -> nn.Module:
    """A fresh network for such images; channels last, which small convolutions on a CPU prefer."""
    torch.manual_seed(seed)
    return build(images[0], widths, dim).to(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    parts: Parts,
    rows: Tensor,  # of the training images
    recipe: Recipe,
    *,
    epochs: int,
    lr: float,
    seed: int,
    title: str,
    compatible: Callable[..., Tensor] | None = None,
    old: Tensor | None = None,  # [N, D] old features of all training images
) -> Tensor:
    """Train with cross-entropy and, weight 1, a compatible loss; return the classifier [C, D].

    SGD with Nesterov momentum, a warm-up and a cosine, and clipped gradients, without which a compatible
    loss can diverge in the first steps.
    """
    torch.manual_seed(seed)
    head = nn.Linear(recipe.dim, int(parts.labels[rows].max()) + 1, bias=False)
    weights = [*model.parameters(), *head.parameters()]
    optimiser = torch.optim.SGD(weights, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    batch = min(BATCH, len(rows))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        lr,
        total_steps=epochs * (len(rows) // batch),
        pct_start=0.15,
        cycle_momentum=False,
        div_factor=50,
    )
    step = CompatibleStep(
        model, optimiser, lambda f, y: F.cross_entropy(head(f), y), compatible, clip_norm=2.0
    )
    for epoch in tqdm(range(epochs), desc=f"{title:>12}", unit="epoch", disable=None):
        if isinstance(compatible, Perturbed):
            compatible.refresh(epoch)
        order = rows[torch.randperm(len(rows))]
        for chosen in order[: len(rows) // batch * batch].split(batch):
            images = augment(parts.learnt[chosen], recipe)
            step(images, parts.labels[chosen], None if old is None else old[chosen])
            schedule.step()
    model.eval()
    return head.weight.detach()


def copies(parts: Parts, recipe: Recipe, count: int) -> Iterator[Tensor]:
    """The training images as they are, then `count - 1` times augmented: the same ones for every model."""
    yield parts.learnt
    torch.manual_seed(0)
    for _ in range(count - 1):
        yield torch.cat([augment(few, recipe) for few in parts.learnt.split(16)])


def features(model: nn.Module, parts: Parts, recipe: Recipe, count: int) -> dict[str, Tensor]:
    """Features of the queries, the gallery, and (count > 0) of copies of the training images."""
    found = {"query": embed(model, parts.query), "gallery": embed(model, parts.gallery)}
    if count:
        found["learnt"] = torch.cat([embed(model, images) for images in copies(parts, recipe, count)])
    return found


def old_model(parts: Parts, recipe: Recipe, seed: int, count: int) -> dict[str, Tensor]:
    """The model in production: a smaller network, on part of the classes."""
    model = network(parts.learnt, recipe.old_widths, recipe.dim, 2 * seed)
    options: dict[str, Any] = {"epochs": recipe.old_epochs, "lr": recipe.old_lr}
    head = train(model, parts, parts.old_rows, recipe, **options, seed=2 * seed, title="old")
    return {"head": head, **features(model, parts, recipe, count)}


def new_model(
    name: str, parts: Parts, recipe: Recipe, seed: int, count: int, old: dict[str, Tensor], chosen: Compatible
) -> dict[str, Tensor]:
    """A new model, all from the same start and the same batches; they differ in the compatible loss alone."""
    # Not the old model's seed: equal initial heads would align an "independent" model with the old one.
    model = network(parts.learnt, recipe.new_widths, recipe.dim, 2 * seed + 1)
    old_features = old["learnt"][: len(parts.learnt)]  # of the plain images
    loss = compatible_loss(name, old_features, parts.labels, chosen)
    head = train(
        model,
        parts,
        torch.arange(len(parts.learnt)),
        recipe,
        epochs=recipe.new_epochs,
        lr=recipe.new_lr,
        seed=2 * seed + 1,
        title=name,
        compatible=loss,
        old=old_features if name in USES_OLD_FEATURES else None,
    )
    return {"head": head, **features(model, parts, recipe, count)}
