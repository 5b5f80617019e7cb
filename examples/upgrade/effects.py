"""Published and expected effects, each as one difference that is above zero where the effect holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .losses import TRAINED

Seed = dict[str, Any]


@dataclass(frozen=True)
class Effect:
    """A claim, where it comes from, and by how much it held for one seed."""

    claim: str
    source: str
    difference: Callable[[Seed], float]


def area(seed: Seed, name: str, order: str = "random", of: str = "map") -> float:
    """Area under one curve."""
    return seed["systems"][name]["orders"][order][f"area_{of}"]


def test(seed: Seed, name: str, which: str, of: str = "map") -> float:
    """Self or cross test."""
    return seed["systems"][name][which][of]


def lost(seed: Seed, name: str, state: int | None = None) -> float:
    """Share of lost queries in the worst state of a random order, or in one state."""
    walk = seed["systems"][name]["orders"]["random"]
    return walk["lost"] if state is None else walk["curve"]["lost"][state]


def _over(better: str, worse: str) -> Callable[[Seed], float]:
    return lambda seed: area(seed, better) - area(seed, worse)


def _entropy(of: str) -> Callable[[Seed], float]:
    def gain(seed: Seed) -> float:
        names = seed["systems"]
        return sum(area(seed, n, "uncertainty", of) - area(seed, n, "random", of) for n in names) / len(names)

    return gain


BCT_PAPER, RACT_PAPER, PERTURBATION = "Shen 2020", "Zhang 2022", "Zhou 2025"
FCT_PAPER, FASTFILL, ONLINE = "Ramanujan 2022", "Jaeckle 2023", "Seo 2023"

EFFECTS = (
    *(
        Effect(
            f"{name} is compatible: cross test above the old self test (mAP)",
            BCT_PAPER,
            lambda seed, name=name: test(seed, name, "cross") - seed["old"]["map"],
        )
        for name in TRAINED
    ),
    Effect(
        "compatible training costs self test: independent above BCT (mAP)",
        BCT_PAPER,
        lambda seed: test(seed, "DRM", "self") - test(seed, "BCT", "self"),
    ),
    Effect(
        "RACT loses fewer queries than contra before any backfill",
        RACT_PAPER,
        lambda seed: lost(seed, "contra", 0) - lost(seed, "RACT", 0),
    ),
    Effect(
        "RACT loses fewer queries than contra in the worst state",
        RACT_PAPER,
        lambda seed: lost(seed, "contra") - lost(seed, "RACT"),
    ),
    Effect(
        "RACT above contra in the cross test (top-1)",
        RACT_PAPER,
        lambda seed: test(seed, "RACT", "cross", "cmc1") - test(seed, "contra", "cross", "cmc1"),
    ),
    Effect(
        "... and pays in the self test (mAP)",
        "seen before",
        lambda seed: test(seed, "contra", "self") - test(seed, "RACT", "self"),
    ),
    *(
        Effect(
            f"{name} above plain prototypes in the {which} test (mAP)",
            PERTURBATION,
            lambda seed, name=name, which=which: test(seed, name, which) - test(seed, "prototypes", which),
        )
        for name in TRAINED[4:]
        for which in ("cross", "self")
    ),
    Effect(
        "FCT above BCT in the cross test (mAP)",
        FCT_PAPER,
        lambda seed: test(seed, "FCT", "cross") - test(seed, "BCT", "cross"),
    ),
    Effect(
        "side-information helps FCT in the cross test (mAP)",
        FCT_PAPER,
        lambda seed: test(seed, "FCT + side", "cross") - test(seed, "FCT", "cross"),
    ),
    Effect("FastFill above FCT, both in random order (area, mAP)", FASTFILL, _over("FastFill", "FCT")),
    Effect(
        "FastFill's own order above random order (area, mAP)",
        FASTFILL,
        lambda seed: area(seed, "FastFill", "own") - area(seed, "FastFill"),
    ),
    Effect(
        "FastFill in its own order above FCT in random order (area, mAP)",
        FASTFILL,
        lambda seed: area(seed, "FastFill", "own") - area(seed, "FCT"),
    ),
    Effect(
        "DRM never falls: deepest fall of mAP at most 0.003",
        ONLINE,
        lambda seed: 0.003 - seed["systems"]["DRM"]["orders"]["random"]["fall_map"],
    ),
    Effect("RQT + MCL above RQT (area, mAP)", ONLINE, _over("RQT + MCL", "RQT")),
    Effect(
        "shared negatives above own negatives (area, mAP)",
        ONLINE,
        _over("RQT + MCL", "RQT + MCL, own negatives"),
    ),
    Effect("rho + MCL above RQT + MCL (area, mAP)", ONLINE, _over("rho + MCL", "RQT + MCL")),
    Effect("RQT + MCL, one extraction, above DRM with two (area, mAP)", ONLINE, _over("RQT + MCL", "DRM")),
    Effect("rho + MCL above BCT (area, mAP)", ONLINE, _over("rho + MCL", "BCT")),
    Effect("entropy order above random, mean of all systems (area, mAP)", RACT_PAPER, _entropy("map")),
    Effect("entropy order above random, mean of all systems (area, top-1)", RACT_PAPER, _entropy("cmc1")),
)
