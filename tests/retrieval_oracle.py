"""Retrieval by brute force in float64 NumPy: all scores, a full sort by (score, id), plain loops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def scores(query: Tensor, gallery: Tensor, metric: str) -> np.ndarray:
    q, g = query.double().numpy(), gallery.double().numpy()
    products = q @ g.T
    if metric == "ip":
        return products
    q_square, g_square = (q * q).sum(1)[:, None], (g * g).sum(1)
    if metric == "l2":
        return 2 * products - q_square - g_square
    norms = np.sqrt(q_square * g_square)
    return np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)


def ranking(row: np.ndarray, exclude: int = -1) -> list[int]:
    """Ids, best first; of two equal scores the smaller id first."""
    return [int(j) for j in np.lexsort((np.arange(len(row)), -row)) if j != exclude]


@dataclass
class Figures:
    ap: float
    ap_at_r: float
    cmc: dict[int, float]
    recall: dict[int, float]
    right: bool


def figures(
    ranked: list[int], label: int, labels: Tensor, ks: tuple[int, ...], map_at: int | None
) -> Figures | None:
    """The figures of one query, None if nothing is relevant to it."""
    hits = [label >= 0 and int(labels[j]) == label for j in ranked]
    relevant = sum(hits)
    if relevant == 0:
        return None

    def ap(cut: int) -> float:
        precisions = [sum(hits[: r + 1]) / (r + 1) for r in range(min(cut, len(hits))) if hits[r]]
        return sum(precisions) / min(relevant, cut)

    return Figures(
        ap=ap(map_at or len(hits)),
        ap_at_r=ap(relevant),
        cmc={k: float(any(hits[:k])) for k in ks},
        recall={k: sum(hits[:k]) / relevant for k in ks},
        right=hits[0],
    )


def exact_vectors(
    seed: int, rows: int, columns: int, metric: str, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Vectors, some zero, with many ties and scores exact in every arithmetic ("cosine": 4^n columns)."""
    random = torch.Generator().manual_seed(seed)
    if metric == "cosine":
        signs = 2 * torch.randint(0, 2, (rows, columns), generator=random) - 1
        return (signs * (torch.rand(rows, 1, generator=random) > 0.1)).to(dtype)
    return torch.randint(-2, 3, (rows, columns), generator=random).to(dtype)


def some_labels(seed: int, rows: int, classes: int) -> Tensor:
    """Labels from -1 (no label) to classes - 1."""
    return torch.randint(-1, classes, (rows,), generator=torch.Generator().manual_seed(seed))
