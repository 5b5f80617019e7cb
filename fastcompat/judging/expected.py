"""Expected figures of a ranking in which some competitors are counted and the others are a share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import gains

_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.laguerre.laggauss(10))


def figures(
    ahead: Tensor,
    unknown: Tensor,
    share: Tensor,
    grades: Tensor | None,
    relevant: Tensor,
    ideal: Tensor | None,
    ks: Sequence[int],
    gain: str,
) -> dict[str, Any]:
    """Expected AP, reciprocal rank, nDCG@k, success@k and top-1 of rankings: float64 [...].

    The m-th relevant item has rank `ahead + X`, X binomial with `unknown` trials of probability `share`.

    Args:
        ahead: [..., P] counted items before each relevant item, by rank; padding is behind `relevant`.
        unknown: [..., 1], how many further items could stand before them.
        share: [..., P], expected share of them that does.
        grades: [..., P] (None: 1 each).
        relevant: [...], how many are no padding.
        ideal: [..., P], the grades in descending order (None: 1 each).
        ks: the cut-offs.
        gain: "linear" or "exp".
    """
    unknown = unknown.double()
    place = torch.arange(ahead.shape[-1], dtype=torch.float64, device=ahead.device)
    real = place < relevant[..., None]
    inverse = _inverse(ahead.double(), unknown, share)  # E[1 / (rank + 1)]
    ap = (inverse * (place + 1)).masked_fill(~real, 0).sum(-1) / relevant
    most = max(ks, default=1)
    first = slice(0, min(most, ahead.shape[-1]))
    ahead, share, real = ahead[..., first], share[..., first], real[..., first]
    chance = ((1 - share).clamp(min=1e-300).log() * unknown).exp()  # P(X = 0)
    odds = share / (1 - share).clamp(min=1e-12)
    cut = {k: torch.zeros_like(ap) for k in ks}
    dcg = {k: torch.zeros_like(ap) for k in ks}
    worth = gains.worth(grades if grades is None else grades[..., first], ahead, gain)
    top1 = torch.zeros_like(ap)
    for extra in range(most):
        rank = ahead + extra
        got = (chance * worth / (rank + 2).double().log2()).masked_fill(~real, 0)
        for k in ks:
            inside = rank < k
            dcg[k] += (got * inside).sum(-1)
            cut[k] += (chance * inside)[..., 0]
        if extra == 0:
            top1 = chance[..., 0] * (ahead[..., 0] == 0)
        chance = chance * odds * ((unknown - extra).clamp(min=0) / (extra + 1))
    best = gains.best(relevant, ideal, ks, ahead, gain)
    return {
        "ap": ap,
        "rr": inverse[..., 0],
        "ndcg": {k: dcg[k] / best[k] for k in ks},
        "cmc": cut,
        "top1": top1,
    }


def _inverse(ahead: Tensor, unknown: Tensor, share: Tensor) -> Tensor:
    """E[1 / (ahead + 1 + X)], the integral of exp(-(ahead + 1) z) E[exp(-z X)] over z >= 0.

    By Gauss and Laguerre, in units of the expected rank, where the integrand is close to exp(-y).
    """
    mean = ahead + 1 + unknown * share
    total = torch.zeros_like(mean)
    for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
        z = node / mean
        no_beat = torch.log1p(share * torch.expm1(-z)) * unknown
        total += weight * (node - (ahead + 1) * z + no_beat).exp()
    return total / mean
