"""The compatible losses by name, on the public pieces of the package."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import fastcompat as fc

from .settings import Compatible

TRAINED = (
    "BCT",
    "contra",
    "RACT",
    "prototypes",
    "NDPP",
    "NDPP, all columns",
    "ODPP",
    "ODPP, all columns",
)
USES_OLD_FEATURES = ("contra", "RACT")  # of the same images; the others compare with class vectors


def compatible_loss(
    name: str, old: Tensor, labels: Tensor, chosen: Compatible
) -> Callable[..., Tensor] | None:
    """The loss called `name`, given the old features [N, D] of all training images and their labels."""
    classes = int(labels.max()) + 1
    prototypes = fc.class_prototypes(old, labels, classes)
    match name:
        case "independent":
            return None
        case "BCT":
            # The old classifier, extended to classes that the old model never saw: mean old features.
            return fc.losses.BCTLoss(prototypes, scale=chosen.bct_scale)
        case "contra":
            return partial(contra, temperature=chosen.temperature)
        case "RACT":
            return fc.losses.RACTLoss(temperature=chosen.temperature, k=chosen.hardest)
        case "prototypes":
            return fc.losses.PrototypeLoss(prototypes, temperature=chosen.prototype_temperature)
    everywhere = name.endswith("all columns")
    if name.startswith("NDPP"):
        perturb = partial(fc.ndpp, k=chosen.ndpp_neighbours)
    else:
        threshold = chosen.odpp_threshold_everywhere if everywhere else chosen.odpp_threshold
        perturb = partial(fc.odpp, threshold_old=threshold, threshold_new=threshold, steps=chosen.odpp_steps)
    return Perturbed(prototypes, perturb, everywhere, chosen.prototype_temperature)


def contra(new: Tensor, labels: Tensor, ref_emb: Tensor, *, temperature: float) -> Tensor:
    """The new feature against the old one of the same image and those of other classes."""
    own = torch.arange(len(new))
    return fc.functional.contrastive_loss(
        new, ref_emb, query_labels=labels, key_labels=labels, positive=own, temperature=temperature
    )


class Perturbed:
    """The prototype loss with perturbed prototypes, made anew at every epoch.

    They stand in the column of a row's own class, as published, or in all columns (`everywhere`).
    """

    def __init__(
        self,
        prototypes: Tensor,
        perturb: Callable[[Tensor, Tensor], Tensor],
        everywhere: bool,
        temperature: float,
    ) -> None:
        self.bank = fc.PrototypeBank(prototypes, perturb=perturb)
        self.loss = fc.losses.PrototypeLoss(self.bank, perturb_negatives=everywhere, temperature=temperature)
        self.new = fc.RunningPrototypes(len(prototypes))

    def refresh(self, epoch: int) -> None:
        """New prototypes are those of the last epoch's batches; before the first the old ones stand in."""
        with torch.random.fork_rng(devices=[]):  # ODPP draws; the batches stay those of the other models
            self.bank.refresh(self.new.prototypes() if epoch else self.bank.prototypes, epoch)
        self.new = fc.RunningPrototypes(len(self.bank.prototypes))

    def __call__(self, new: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch, which also counts towards the next new prototypes."""
        self.new.add(new, labels)
        return self.loss(new, labels)
