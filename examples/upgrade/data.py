"""Who sees what: held-out classes that never train, and the classes of the old and of the new models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcompat.demo import ImageSet
from fastcompat.demo.data import DIGITS, MANY_CLASSES

OLD_IMAGES = 30  # of each class that the old model knows, where classes are few


@dataclass(frozen=True)
class Parts:
    """Images [N, C, H, W] and labels int64 [N]; `learnt[old_rows]` trained the old model."""

    learnt: Tensor
    labels: Tensor
    old_rows: Tensor
    query: Tensor
    query_labels: Tensor
    gallery: Tensor
    gallery_labels: Tensor


def divide(data: ImageSet, seed: int, *, rotations: bool, validation: bool) -> Parts:
    """Divide a data set.

    With many classes 30 % of them are held out, the same ones for every seed, so that no seed trains on
    another's. With few classes half of each one's images are held out, the same way. `validation` forgets
    what is held out and divides the training part again in the same manner (a third of the images of few
    classes): choices are made there. What is left trains the new models; the old model gets half of the
    classes (`OLD_IMAGES` of each, if classes are few). A third of the held-out images are queries, the rest
    is the gallery. With `rotations` quarter turns count as further classes to learn.
    """
    many = len(data.classes) >= MANY_CLASSES
    train, judged = _hold_out(data.labels, torch.arange(len(data.labels)), many, 0.3 if many else 0.5)
    if validation:
        train, judged = _hold_out(data.labels, train, many, 0.3 if many else 1 / 3)

    gen = torch.Generator().manual_seed(seed)
    kinds = data.labels[train].unique()
    if many:
        kinds = kinds[torch.randperm(len(kinds), generator=gen)]
    number = torch.full((len(data.classes),), -1)
    number[kinds] = torch.arange(len(kinds))  # the old model's classes come first
    labels, old_classes = number[data.labels[train]], len(kinds) // 2
    old_rows = []
    for c in range(old_classes):
        members = (labels == c).nonzero()[:, 0]
        if not many:
            members = members[torch.randperm(len(members), generator=gen)[:OLD_IMAGES]]
        old_rows.append(members)

    images = data.images
    if data.name != DIGITS:
        images = (images - images[train].mean()) / images[train].std().clamp_min(1e-3)
    learnt = images[train]
    if rotations:
        learnt = torch.cat([torch.rot90(learnt, turn, (2, 3)) for turn in range(4)])
        labels = torch.cat([labels + turn * len(kinds) for turn in range(4)])

    query, gallery = [], []
    for c in data.labels[judged].unique():
        members = judged[data.labels[judged] == c]
        members = members[torch.randperm(len(members), generator=gen)]
        queries = max(1, round(len(members) / 3))
        query.append(members[:queries])
        gallery.append(members[queries:])
    q, g = torch.cat(query), torch.cat(gallery)
    return Parts(learnt, labels, torch.cat(old_rows), images[q], data.labels[q], images[g], data.labels[g])


def _hold_out(labels: Tensor, rows: Tensor, many: bool, share: float) -> tuple[Tensor, Tensor]:
    """(kept, held out) of `rows`: whole classes if there are many, else a share of each class's images."""
    gen = torch.Generator().manual_seed(0)
    if many:
        kinds = labels[rows].unique()
        held = kinds[torch.randperm(len(kinds), generator=gen)[: round(share * len(kinds))]]
        out = torch.isin(labels[rows], held)
    else:
        out = torch.zeros(len(rows), dtype=torch.bool)
        for c in labels[rows].unique():
            members = (labels[rows] == c).nonzero()[:, 0]
            members = members[torch.randperm(len(members), generator=gen)]
            out[members[: round(share * len(members))]] = True
    return rows[~out], rows[out]
