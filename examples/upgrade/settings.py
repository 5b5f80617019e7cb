"""What the experiment is run with. Chosen on classes (digits: images) held back from the training part."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fastcompat.demo.train import DIGITS as DIGITS_RECIPE
from fastcompat.demo.train import MANY as CHARACTERS_RECIPE
from fastcompat.demo.train import Recipe


@dataclass(frozen=True)
class Compatible:
    """The compatible losses beside the new models' cross-entropy, each with weight 1."""

    temperature: float = 0.1  # contra, RACT
    hardest: int = 10  # RACT
    prototype_temperature: float = 0.07
    bct_scale: float = 30.0
    ndpp_neighbours: int = 10
    odpp_threshold: float = 0.9
    odpp_threshold_everywhere: float = 0.5
    odpp_steps: int = 100


@dataclass(frozen=True)
class Mapped:
    """The transforms on top of the independent pair."""

    copies: int = 3  # augmented copies of the training images whose features they learn from
    epochs: int = 12
    batch: int = 256
    lr: float = 1e-3
    hidden: int = 256
    mcl_weight: float = 0.3  # beside the reverse query transform's loss
    mcl_temperature: float = 0.2
    rho_weight: float = 1.0
    rho_temperature: float = 0.1
    side_dim: int = 32
    side_epochs: int = 30
    side_lr: float = 1e-3
    side_temperature: float = 0.2


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result, except the data and the seed."""

    recipe: Recipe
    compatible: Compatible = field(default_factory=Compatible)
    mapped: Mapped = field(default_factory=Mapped)
    orders: int = 5  # random orders that a figure is averaged over


CHARACTERS = Settings(replace(CHARACTERS_RECIPE, new_epochs=6))
DIGITS = Settings(
    replace(DIGITS_RECIPE, old_epochs=200),  # of one step each
    Compatible(ndpp_neighbours=3, odpp_threshold=0.3, odpp_threshold_everywhere=0.3),
    Mapped(copies=8, side_epochs=200),
)


def quick(settings: Settings) -> Settings:
    """The same in about a fifth of the time: the code runs, the figures mean little."""
    recipe = settings.recipe
    return replace(
        settings,
        recipe=replace(
            recipe, old_epochs=max(1, recipe.old_epochs // 5), new_epochs=max(1, recipe.new_epochs // 5)
        ),
        mapped=replace(settings.mapped, copies=1, epochs=4, side_epochs=4),
        orders=1,
    )
