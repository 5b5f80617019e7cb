"""A band around the curves of a backfill: the ends of an interval, or of what several orders gave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

NAMES = ("map", "cmc", "negative_flips", "positive_flips", "ndcg", "mrr")


@dataclass(frozen=True)
class Bound:
    """One side of the band, under the names of `BackfillCurve`: float64 [T] each."""

    map: Any
    cmc: dict[int, Any]
    negative_flips: Any
    positive_flips: Any
    ndcg: dict[int, Any]
    mrr: Any


def over(curves: Sequence[Any]) -> tuple[Bound, Bound, Bound]:
    """Mean, least and greatest of several curves, state by state."""

    def bound(torch_way: Callable[[Any], Any], numpy_way: Callable[[Any], Any]) -> Bound:
        def of(values: list[Any]) -> Any:
            if isinstance(values[0], dict):
                return {k: of([each[k] for each in values]) for k in values[0]}
            if isinstance(values[0], torch.Tensor):
                return torch_way(torch.stack(values))
            return numpy_way(np.stack(values))

        return Bound(**{name: of([getattr(curve, name) for curve in curves]) for name in NAMES})

    return (
        bound(lambda x: x.mean(0), lambda x: x.mean(0)),
        bound(lambda x: x.amin(0), lambda x: x.min(0)),
        bound(lambda x: x.amax(0), lambda x: x.max(0)),
    )
