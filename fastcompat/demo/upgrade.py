"""One model upgrade from end to end: train, embed, judge, and walk through the backfill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat.demo import train
from fastcompat.demo.data import DIGITS, ImageSet, Split, describe, split
from fastcompat.demo.train import Recipe, build, embed, fit
from fastcompat.judging.curve import BackfillCurve

STATES = 22


@dataclass(frozen=True)
class Score:
    """Mean average precision and the share of queries whose first result is right."""

    map: float
    top1: float


@dataclass(frozen=True)
class Candidate:
    """A new model: tests before and after the backfill, and every state between.

    `both` says that the mixed gallery needs the old model's embedding of a query too. `gain` is the update
    gain: the share of the independent model's improvement that the cross test already has (NaN: no meaning).
    """

    name: str
    both: bool
    self_test: Score
    cross_test: Score
    gain: float
    curve: BackfillCurve[Tensor]


@dataclass(frozen=True)
class Upgrade:
    """All that the demonstration found; `chance` is the mAP of a random order."""

    data: str
    description: str
    unseen: bool
    seed: int
    queries: int
    chance: float
    old: Score
    candidates: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Every figure as plain numbers, ready for JSON (no value: None)."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        found["old"] = asdict(self.old)
        found["candidates"] = [
            {
                "name": new.name,
                "query_extractions": 2 if new.both else 1,
                "self_test": asdict(new.self_test),
                "cross_test": asdict(new.cross_test),
                "update_gain": None if math.isnan(new.gain) else new.gain,
                "area": {name: new.curve.auc(name) for name in ("map", "cmc@1")},
                "curve": new.curve.to_dict(),
            }
            for new in self.candidates
        ]
        return found


def run(data: ImageSet, seed: int = 0, recipe: Recipe | None = None) -> Upgrade:
    """Train the old and the new models on `data` and judge the upgrade. Leaves torch's random state alone."""
    parts = split(data, seed)
    if recipe is None:
        recipe = train.DIGITS if data.name == DIGITS else train.MANY if parts.unseen else train.FEW
    with torch.random.fork_rng(devices=[]):
        return _run(data, parts, seed, recipe)


def _run(data: ImageSet, parts: Split, seed: int, recipe: Recipe) -> Upgrade:
    images = data.images
    if data.name != DIGITS:
        seen = images[parts.train]
        images = (images - seen.mean()) / seen.std().clamp_min(1e-3)
    query, gallery = images[parts.query], images[parts.gallery]
    query_labels, gallery_labels = parts.labels[parts.query], parts.labels[parts.gallery]

    old = _network(images[0], recipe.old_widths, recipe, seed)
    fit(
        old,
        images[parts.old_train],
        parts.labels[parts.old_train],
        epochs=recipe.old_epochs,
        lr=recipe.old_lr,
        recipe=recipe,
        seed=2 * seed,
        title="old",
    )
    query_old, gallery_old = embed(old, query), embed(old, gallery)

    learnt, labels, classes = images[parts.train], parts.labels[parts.train], parts.num_classes
    if recipe.rotations:
        learnt = torch.cat([torch.rot90(learnt, turn, (2, 3)) for turn in range(4)])
        labels = torch.cat([labels + turn * classes for turn in range(4)])
    losses = _compatible_losses(embed(old, learnt), labels)  # old features are made once

    def judge(query_side: Tensor, gallery_side: Tensor) -> Score:
        found = fc.retrieval_metrics(query_side, gallery_side, query_labels, gallery_labels, ks=(1,))
        return Score(found.map, found.cmc[1])

    old_score = judge(query_old, gallery_old)
    candidates: list[Candidate] = []
    for name, compatible in losses.items():
        # Same seed for all: they differ only in the loss. Not the old model's: equal initial heads would
        # align an "independent" model with the old one.
        new = _network(images[0], recipe.new_widths, recipe, seed + 1)
        fit(
            new,
            learnt,
            labels,
            epochs=recipe.new_epochs,
            lr=recipe.new_lr,
            recipe=recipe,
            seed=2 * seed + 1,
            title=name,
            compatible=compatible,
        )
        query_new, gallery_new = embed(new, query), embed(new, gallery)
        self_test, cross_test = judge(query_new, gallery_new), judge(query_new, gallery_old)
        best = candidates[0].self_test if candidates else self_test
        curve = fc.backfill_curve(
            # A compatible model searches old items with its own query. An independent one cannot: there both
            # models embed the query, and the two halves are merged by distance.
            query_old if compatible is None else query_new,
            gallery_old,
            query_new,
            gallery_new,
            query_labels,
            gallery_labels,
            states=STATES,
            ks=(1,),
            baseline=(query_old, gallery_old),
            seed=seed,
        )
        possible = best.map - old_score.map
        if compatible is None or possible <= 0:  # unrelated spaces, or nothing to be gained
            gain = math.nan
        else:
            gain = (cross_test.map - old_score.map) / possible
        candidates.append(Candidate(name, compatible is None, self_test, cross_test, gain, curve))

    relevant = (query_labels[:, None] == gallery_labels).double().mean().item()
    return Upgrade(
        data=data.name,
        description=describe(data, parts),
        unseen=parts.unseen,
        seed=seed,
        queries=len(query),
        chance=relevant,
        old=old_score,
        candidates=candidates,
    )


def _network(image: Tensor, widths: tuple[int, ...], recipe: Recipe, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build(image, widths, recipe.dim)


def _compatible_losses(
    old: Tensor,  # [N, D] old features of the training images
    labels: Tensor,  # [N]
) -> dict[str, Callable[[Tensor, Tensor], Tensor] | None]:
    # BCT's old classifier, extended to classes the old model never saw: each class's mean old feature.
    means = old.new_zeros(int(labels.max()) + 1, old.shape[1])  # [C, D]
    means = F.normalize(means.index_add_(0, labels, F.normalize(old)))
    bct = fc.losses.BCTLoss(means, scale=30.0)
    ract = fc.losses.RACTLoss(temperature=0.1, k=10)

    def with_bct(features: Tensor, rows: Tensor) -> Tensor:
        loss: Tensor = bct(features, labels[rows])
        return loss

    def with_ract(features: Tensor, rows: Tensor) -> Tensor:
        loss: Tensor = ract(features, labels[rows], ref_emb=old[rows])
        return loss

    return {"independent": None, "BCT": with_bct, "RACT": with_ract}
