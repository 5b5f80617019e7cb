"""From features to figures: every state of the backfill, in random and in uncertainty order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc

STATES = 22


@dataclass(frozen=True)
class System:
    """What searches a half-upgraded gallery: a query and a gallery for the part that is old, and for the new.

    `orders` are further backfill orders [N], beside the random ones and the uncertainty order.
    """

    query_old: Tensor
    gallery_old: Tensor
    query_new: Tensor
    gallery_new: Tensor
    metric: str = "cosine"
    extractions: int = 1
    orders: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Judge:
    """The held-out labels, the old system that everything is measured against, and the orders."""

    query_labels: Tensor
    gallery_labels: Tensor
    query_old: Tensor
    gallery_old: Tensor
    uncertain: Tensor  # [N], most uncertain old feature first
    random_orders: int

    def figures(self, system: System) -> dict[str, Any]:
        """Plain numbers: both tests, and for each order areas, the worst share of lost queries, the curve."""
        count = len(self.gallery_labels)
        shuffled = [
            torch.randperm(count, generator=torch.Generator().manual_seed(s))
            for s in range(self.random_orders)
        ]
        walks = {"random": shuffled, "uncertainty": [self.uncertain]}
        walks |= {name: [order] for name, order in system.orders.items()}
        orders = {name: self._walk(system, some) for name, some in walks.items()}
        first = orders["random"]["curve"]
        return {
            "self": {"map": first["map"][-1], "cmc1": first["cmc1"][-1]},
            "cross": {"map": first["map"][0], "cmc1": first["cmc1"][0]},
            "extractions": system.extractions,
            "orders": orders,
        }

    def _walk(self, system: System, orders: list[Tensor]) -> dict[str, Any]:
        """Means over the orders; the worst state is looked for in each order by itself."""
        curves = [
            fc.backfill_curve(
                system.query_old,
                system.gallery_old,
                system.query_new,
                system.gallery_new,
                self.query_labels,
                self.gallery_labels,
                order=order,
                states=STATES,
                ks=(1,),
                metric=system.metric,
                # Normalised, so that the old system is ranked by cosine whatever `metric` is.
                baseline=(F.normalize(self.query_old), F.normalize(self.gallery_old)),
            )
            for order in orders
        ]
        quality, top1, lost = (
            torch.stack(values)
            for values in zip(*((c.map, c.cmc[1], c.negative_flips) for c in curves), strict=True)
        )  # [orders, T]

        def fall(values: Tensor) -> float:
            return float((values.cummax(1).values - values).max(1).values.mean())

        def rounded(values: Tensor) -> list[float]:
            return [round(value, 4) for value in values.mean(0).tolist()]

        return {
            "area_map": float(quality.mean()),
            "area_cmc1": float(top1.mean()),
            "lost": float(lost.max(1).values.mean()),
            "fall_map": fall(quality),
            "fall_cmc1": fall(top1),
            "curve": {"map": rounded(quality), "cmc1": rounded(top1), "lost": rounded(lost)},
        }
