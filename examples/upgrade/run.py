"""The experiment from end to end, stage by stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcompat as fc
from fastcompat.demo import ImageSet

from . import mapped, models
from .cache import Cache, Stage
from .data import Parts, divide
from .judge import Judge, System
from .losses import TRAINED
from .settings import Settings


def run(
    data: ImageSet, settings: Settings, seeds: int, folder: Path, validation: bool = False
) -> dict[str, Any]:
    """All seeds. What `folder` already holds, made from the same data with the same settings, is recalled."""
    digest = hashlib.sha256(data.images.numpy().tobytes() + data.labels.numpy().tobytes()).hexdigest()
    found = []
    for seed in range(seeds):
        parts = divide(data, seed, rotations=settings.recipe.rotations, validation=validation)
        cache = Cache(folder / f"seed{seed}", [digest, seed, validation])
        found.append(_one(parts, settings, seed, cache))
    return {
        "data": data.name,
        "validation": validation,
        "settings": asdict(settings),
        "queries": len(parts.query),
        "gallery": len(parts.gallery),
        "classes": {
            "old": len(parts.labels[parts.old_rows].unique()),
            "new": len(parts.labels.unique()),
            "judged": len(parts.gallery_labels.unique()),
        },
        "seeds": found,
    }


def _one(parts: Parts, settings: Settings, seed: int, cache: Cache) -> dict[str, Any]:
    recipe, chosen, copies = settings.recipe, settings.compatible, settings.mapped.copies
    image, transform = asdict(recipe), asdict(settings.mapped)
    stages: dict[str, Stage] = {}

    def stage(name: str, make: Callable[[], Any], settings: Any, *after: str) -> Any:
        made = cache.stage(name, make, settings=settings, after=tuple(stages[other] for other in after))
        stages[name] = made
        return made.value

    old = stage("old", lambda: models.old_model(parts, recipe, seed, copies), [image, copies])
    new = {
        name: stage(
            name,
            lambda name=name: models.new_model(
                name, parts, recipe, seed, copies if name == "independent" else 0, old, chosen
            ),
            [image, asdict(chosen)],
            "old",
        )
        for name in ("independent", *TRAINED)
    }
    alone, labels = new["independent"], parts.labels.repeat(copies)
    side = stage(
        "side", lambda: mapped.side_information(parts, recipe, seed, settings.mapped), [image, transform]
    )

    def transformed(name: str, make: Callable[[], dict[str, Tensor]], *after: str) -> dict[str, Tensor]:
        return stage(name, make, transform, "old", "independent", *after)

    systems = {
        "DRM": System(old["query"], old["gallery"], alone["query"], alone["gallery"], extractions=2),
        **{
            name: System(new[name]["query"], old["gallery"], new[name]["query"], new[name]["gallery"])
            for name in TRAINED
        },
        "Procrustes": System(**transformed("Procrustes", lambda: mapped.procrustes(old, alone))),
    }
    for name in mapped.FORWARD:
        made = transformed(
            name,
            lambda name=name: mapped.forward(name, labels, old, alone, side, settings.mapped, seed),
            *(["side"] if name == "FCT + side" else []),
        )
        orders = {"own": made.pop("own")} if "own" in made else {}
        systems[name] = System(**made, metric="l2", orders=orders)
    for name in mapped.REVERSE:
        made = transformed(
            name, lambda name=name: mapped.reverse(name, labels, old, alone, settings.mapped, seed)
        )
        systems[name] = System(**made)

    judge = Judge(
        parts.query_labels,
        parts.gallery_labels,
        old["query"],
        old["gallery"],
        _most_uncertain(parts, old),
        settings.orders,
    )
    before = ["old", *new, "side", "Procrustes", *mapped.FORWARD, *mapped.REVERSE]
    figures = stage(
        "figures",
        lambda: {name: judge.figures(system) for name, system in systems.items()},
        settings.orders,
        *before,
    )
    base = fc.retrieval_metrics(
        old["query"], old["gallery"], parts.query_labels, parts.gallery_labels, ks=(1,)
    )
    for system in figures.values():
        possible = figures["DRM"]["self"]["map"] - base.map
        system["gain"] = (system["cross"]["map"] - base.map) / possible
    seconds = {name: round(made.seconds, 1) for name, made in stages.items()}
    return {"old": {"map": base.map, "cmc1": base.cmc[1]}, "systems": figures, "cpu_seconds": seconds}


def _most_uncertain(parts: Parts, old: dict[str, Tensor]) -> Tensor:
    """The gallery by the entropy of its old features over the old model's own classes."""
    rows = parts.old_rows
    classes = int(parts.labels[rows].max()) + 1
    prototypes = fc.class_prototypes(old["learnt"][: len(parts.learnt)][rows], parts.labels[rows], classes)
    return torch.argsort(fc.uncertainty(old["gallery"], prototypes), descending=True, stable=True)
