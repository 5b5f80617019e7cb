"""Transforms on top of the old and the independent new model, learnt from their features alone."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import fastcompat as fc
from fastcompat.demo.train import Recipe, build

from .data import Parts
from .models import features
from .settings import Mapped

FORWARD = ("FCT", "FCT + side", "FastFill")
REVERSE = ("RQT", "RQT + MCL", "RQT + MCL, own negatives", "rho + MCL")

Features = dict[str, Tensor]


def side_information(parts: Parts, recipe: Recipe, seed: int, chosen: Mapped) -> Features:
    """A small self-supervised model on the old model's images: what to store beside each old feature."""
    torch.manual_seed(2 * seed)
    encoder = build(parts.learnt[0], recipe.old_widths, chosen.side_dim)
    side = fc.SideInformation(
        encoder.to(memory_format=torch.channels_last),
        views,
        projection=nn.Sequential(nn.ReLU(), nn.Linear(chosen.side_dim, chosen.side_dim)),
        temperature=chosen.side_temperature,
    )
    batch = min(256, len(parts.old_rows))
    steps = chosen.side_epochs * (len(parts.old_rows) // batch)
    adam = torch.optim.Adam(side.parameters(), lr=chosen.side_lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    side.train()
    for _ in trange(chosen.side_epochs, desc="        side", unit="epoch", disable=None):
        order = parts.old_rows[torch.randperm(len(parts.old_rows))]
        for rows in order[: len(order) // batch * batch].split(batch):
            loss = side(parts.learnt[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return features(side.eval().encoder, parts, recipe, chosen.copies)


def views(images: Tensor) -> Tensor:
    """Each image [B, C, H, W] turned, scaled and moved a little at random, with some noise."""
    count = len(images)
    turn = math.radians(15) * (2 * torch.rand(count) - 1)
    stretch = 0.85 + 0.3 * torch.rand(count, 2)
    move = 0.2 * (2 * torch.rand(count, 2) - 1)
    cos, sin = turn.cos(), turn.sin()
    matrix = torch.stack(
        [
            torch.stack([stretch[:, 0] * cos, -stretch[:, 1] * sin, move[:, 0]], 1),
            torch.stack([stretch[:, 0] * sin, stretch[:, 1] * cos, move[:, 1]], 1),
        ],
        1,
    )  # [B, 2, 3]
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    turned = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return turned + 0.1 * torch.randn_like(turned)


def procrustes(old: Features, new: Features) -> Features:
    """The best rotation of new queries into the old space, both normalised."""
    unit = {name: F.normalize(value) for name, value in new.items()}
    turn = fc.Procrustes().fit(unit["learnt"], F.normalize(old["learnt"]))
    return {
        "query_old": turn.transform(unit["query"]),
        "gallery_old": old["gallery"],
        "query_new": new["query"],
        "gallery_new": new["gallery"],
    }


def forward(
    name: str, labels: Tensor, old: Features, new: Features, side: Features, chosen: Mapped, seed: int
) -> Features:
    """FCT and FastFill: the old gallery is transformed into the new space, where the new query searches."""
    sure = name == "FastFill"
    beside = side if name == "FCT + side" else None
    transform = fc.ForwardTransform(
        old["gallery"].shape[1],
        new["gallery"].shape[1],
        None if beside is None else beside["gallery"].shape[1],
        hidden=chosen.hidden,
        log_variance=sure,
    )
    transform.fit(
        old["learnt"],
        new["learnt"],
        labels if sure else None,
        side=None if beside is None else beside["learnt"],
        new_weight=new["head"] if sure else None,
        **_training(chosen, seed),
    )
    inputs = [old["gallery"]] if beside is None else [old["gallery"], beside["gallery"]]
    made = transform.transform(*inputs)
    moved, order = (made[0], {"own": made[1].argsort(descending=True, stable=True)}) if sure else (made, {})
    return {
        "query_old": new["query"],
        "gallery_old": moved,
        "query_new": new["query"],
        "gallery_new": new["gallery"],
        **order,
    }


def reverse(name: str, labels: Tensor, old: Features, new: Features, chosen: Mapped, seed: int) -> Features:
    """RQT and MCL: the new query is sent back into the old space, where the old part of the gallery is."""
    psi = fc.ReverseQueryTransform(
        new["gallery"].shape[1], old["gallery"].shape[1], blocks=2, hidden=chosen.hidden
    )
    rho = fc.ResidualHead(new["gallery"].shape[1]) if name == "rho + MCL" else None
    options: dict[str, Any] = {}
    if name != "RQT":
        temperature = chosen.mcl_temperature if rho is None else chosen.rho_temperature
        options["compatible"] = fc.losses.MetricCompatibleLoss(
            temperature=temperature, shared_negatives=name != "RQT + MCL, own negatives"
        )
        options["weight"] = chosen.mcl_weight if rho is None else chosen.rho_weight
        options["labels"] = labels
    psi.fit(old["learnt"], new["learnt"], head=rho, **options, **_training(chosen, seed))
    query, gallery = (x if rho is None else rho.transform(x) for x in (new["query"], new["gallery"]))
    return {
        "query_old": psi.transform(query),
        "gallery_old": old["gallery"],
        "query_new": query,
        "gallery_new": gallery,
    }


def _training(chosen: Mapped, seed: int) -> dict[str, Any]:
    # Nothing is held out for early stopping: the number of epochs is a setting.
    return {
        "epochs": chosen.epochs,
        "batch_size": chosen.batch,
        "lr": chosen.lr,
        "held_out": 0.0,
        "seed": seed,
        "progress": False,
    }
