"""Discounted cumulative gain: what graded relevance is worth at each rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GAINS = ("linear", "exp")


def ndcg(
    ranks: Tensor, grades: Tensor | None, relevant: Tensor, ideal: Tensor | None, ks: Sequence[int], gain: str
) -> dict[int, Tensor]:
    """nDCG at each of `ks`: float64 [...].

    Args:
        ranks: [..., P] ascending, the padding behind all ranks.
        grades: [..., P] of the same items (None: 1 each).
        relevant: [...], how many are no padding.
        ideal: [..., P], the grades in descending order, 0 for padding (None: 1 each).
        ks: the cut-offs.
        gain: what a grade g is worth: "linear" g, "exp" 2^g - 1.
    """
    most = min(max(ks, default=1), ranks.shape[-1])
    place = torch.arange(1, most + 1, dtype=torch.float64, device=ranks.device)
    discount = 1 / (place + 1).log2()  # [K]
    ranks = ranks[..., :most]
    grades = None if grades is None else grades[..., :most]
    got = 1 / (ranks + 2).double().log2() * _worth(grades, ranks, gain)
    # Running sums add from the left whatever the padding, so a figure has the same bits in every block.
    best = discount.cumsum(0)  # [K]
    if ideal is not None:
        best = (discount * _worth(ideal[..., :most], ranks, gain)).cumsum(-1)  # [..., K]
    found = {}
    for k in ks:
        dcg = torch.where(ranks < k, got, 0.0).cumsum(-1)[..., -1]
        at = relevant.clamp(min=1, max=min(k, most)) - 1
        if ideal is None:
            found[k] = dcg / best[at]
        else:
            full = best.expand(*at.shape, -1)
            found[k] = dcg / full.gather(-1, at[..., None])[..., 0]
    return found


def _worth(grades: Tensor | None, like: Tensor, gain: str) -> Tensor:
    if grades is None:
        return torch.ones((), dtype=torch.float64, device=like.device)
    return grades.double() if gain == "linear" else grades.double().exp2() - 1
