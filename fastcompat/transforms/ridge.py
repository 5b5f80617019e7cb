"""The closed-form baseline without a constraint: the linear map that fits best."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Transform, as_features

REGULARISATION = tuple(10.0**e for e in range(-6, 3))  # of the mean squared singular value


class Ridge(Transform):
    """`(x - m) W + b`, the linear map with the least squared error, in closed form.

    ```
    W = argmin over W of |X W - Y|^2 + l |W|^2      X = src - m, Y = dst - b, m and b the means
      = V diag(s / (s^2 + l)) U^T Y                 X = U S V^T
    ```
    l is the one of nine values, from 1e-6 to 100 times the mean of s^2, with the least leave-one-out error,
    which needs no second fit: `e_i = (Y - X W)_i / (1 - h_i)`, `h_i` the leverage of row i (Allen's PRESS;
    Golub, Heath and Wahba, "Generalized cross-validation as a method for choosing a good ridge parameter",
    Technometrics 1979). Map new queries to the old space, `Ridge().fit(new, old)`, or old items to the new
    one, `Ridge().fit(old, new)`. Normalise the features first if they are compared by cosine.

    Args:
        d_src: columns of the source; `fit` sets it.
        d_dst: columns of the target; `fit` sets it.

    Attributes:
        regularisation: l as it was chosen; None after `load`.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, d_src: int = 0, d_dst: int = 0) -> None:
        super().__init__({"src": d_src}, ("dst",), {"d_src": d_src, "d_dst": d_dst})
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        self.register_buffer("weight", torch.eye(d_src, d_dst, dtype=dtype, device=device))
        self.register_buffer("bias", torch.zeros(d_dst, dtype=dtype, device=device))
        self.regularisation: float | None = None

    def forward(self, src: Tensor) -> Tensor:
        """`src` [B, d_src] mapped into the other space [B, d_dst]."""
        self.check_fitted()
        self.check_inputs(src)
        return src @ self.weight + self.bias

    @torch.no_grad()
    def fit(self, src: Any, dst: Any) -> Ridge:
        """Compute the map, in float64, from rows [N, d_src] and [N, d_dst] of the same items, two or more.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
        """
        x, y = as_features(src=src, dst=dst)
        if len(x) < 2:
            raise ValueError(f"`src` must have at least 2 rows: got {len(x)}")
        x, y = x.double(), y.to(x.device).double()
        middle, bias = x.mean(0), y.mean(0)
        left, sizes, right = torch.linalg.svd(x - middle, full_matrices=False)
        target = left.T @ (y - bias)  # [r, d_dst]
        mean_square = float(sizes.square().mean()) or 1.0
        best = (torch.inf, 0.0)
        for part in REGULARISATION:
            shrink = sizes.square() / (sizes.square() + part * mean_square)
            leverage = left.square() @ shrink + 1 / len(x)  # the means are fitted too
            residual = (y - bias) - left @ (shrink[:, None] * target)
            error = float((residual.square().sum(1) / (1 - leverage).clamp(min=1e-6).square()).sum())
            best = min(best, (error, part * mean_square))
        weight = right.T @ ((sizes / (sizes.square() + best[1]))[:, None] * target)
        self.inputs = {"src": x.shape[1]}
        self.options = {"d_src": x.shape[1], "d_dst": y.shape[1]}
        self.weight, self.bias = weight.to(self.weight), (bias - middle @ weight).to(self.bias)
        self.regularisation, self.fitted = best[1], True
        return self
