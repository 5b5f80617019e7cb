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
    ranks = ranks[..., :most]
    got = worth(grades if grades is None else grades[..., :most], ranks, gain) / (ranks + 2).double().log2()
    full = best(relevant, ideal, ks, ranks, gain)
    # A running sum adds from the left whatever the padding, so a figure has the same bits in every block.
    return {k: torch.where(ranks < k, got, 0.0).cumsum(-1)[..., -1] / full[k] for k in ks}


def best(
    relevant: Tensor, ideal: Tensor | None, ks: Sequence[int], like: Tensor, gain: str
) -> dict[int, Tensor]:
    """DCG@k of the best order: float64 [...]."""
    most = like.shape[-1]
    place = torch.arange(most, dtype=torch.float64, device=like.device)
    grades = worth(ideal if ideal is None else ideal[..., :most], like, gain)
    sums = (grades / (place + 2).log2()).cumsum(-1).expand(*relevant.shape, -1)  # [..., K]
    return {k: sums.gather(-1, (relevant.clamp(1, min(k, most)) - 1)[..., None])[..., 0] for k in ks}


def worth(grades: Tensor | None, like: Tensor, gain: str) -> Tensor:
    """What the grades are worth (None: 1)."""
    if grades is None:
        return torch.ones((), dtype=torch.float64, device=like.device)
    return grades.double() if gain == "linear" else grades.double().exp2() - 1
