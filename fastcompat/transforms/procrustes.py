"""The closed-form baseline: the best rotation from one space to the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Transform, as_features


class Procrustes(Transform):
    """`x R` with `R` orthogonal, the closest fit to `dst`: the classical closed form (Schoenemann, 1966).

    ```
    U S V^T = src^T dst          R = U V^T = argmin over R of |src R - dst|^2
    ```
    Cosines and distances within a space stay as they are where `d_src <= d_dst`. For unequal widths R has
    orthonormal rows or columns; where `d_src > d_dst` it maximises `sum <x R, y>` (the least squares problem
    then has no closed form). Normalise the features first if they are compared by cosine.

    Args:
        d_src: columns of the source; `fit` sets it.
        d_dst: columns of the target; `fit` sets it.
    """

    rotation: Tensor

    def __init__(self, d_src: int = 0, d_dst: int = 0) -> None:
        super().__init__({"src": d_src}, ("dst",), {"d_src": d_src, "d_dst": d_dst})
        self.register_buffer("rotation", torch.eye(d_src, d_dst))

    def forward(self, src: Tensor) -> Tensor:
        """`src` [B, d_src] rotated into the other space [B, d_dst]."""
        self.check_fitted()
        self.check_inputs(src)
        return src @ self.rotation

    @torch.no_grad()
    def fit(self, src: Any, dst: Any) -> Procrustes:
        """Compute the rotation, in float64, from rows [N, d_src] and [N, d_dst] of the same items.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
        """
        x, y = as_features(src=src, dst=dst)
        y = y.to(x.device)
        if not len(x):
            raise ValueError("`src` must have at least 1 row: got 0")
        product = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
        for a, b in zip(torch.split(x, 65536), torch.split(y, 65536), strict=True):
            product += a.double().T @ b.double()
        left, _, right = torch.linalg.svd(product, full_matrices=False)
        self.inputs = {"src": x.shape[1]}
        self.options = {"d_src": x.shape[1], "d_dst": y.shape[1]}
        self.rotation = (left @ right).to(self.rotation)
        self.fitted = True
        return self
