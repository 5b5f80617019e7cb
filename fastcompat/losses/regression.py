"""Modules that compare transformed old features with new ones: FCT and FastFill."""

from __future__ import annotations

from torch import Tensor, nn

from .. import functional
from .._types import Backend, Reduction


class FCTLoss(nn.Module):
    """`functional.fct_loss`, called `loss(pred, target)`.

    Args:
        reduction: "mean", "sum" or "none".
        backend: "auto" or "reference".
    """

    def __init__(self, *, reduction: Reduction = "mean", backend: Backend = "auto") -> None:
        super().__init__()
        self.reduction, self.backend = reduction, backend

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The loss of transformed old features `pred` [B, D] against the new features `target` [B, D]."""
        return functional.fct_loss(pred, target, reduction=self.reduction, backend=self.backend)


class FastFillLoss(nn.Module):
    """`functional.fastfill_loss` with the new classifier held as frozen buffers.

    Args:
        new_weight: [C, D].
        new_bias: [C] or None.
        label_smoothing: 0 to 1.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    new_weight: Tensor
    new_bias: Tensor | None

    def __init__(
        self,
        new_weight: Tensor,
        new_bias: Tensor | None = None,
        *,
        label_smoothing: float = 0.1,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.register_buffer("new_weight", new_weight.detach())
        self.register_buffer("new_bias", None if new_bias is None else new_bias.detach())
        self.label_smoothing, self.reduction, self.backend = label_smoothing, reduction, backend

    def forward(self, pred: Tensor, target: Tensor, log_var: Tensor, labels: Tensor) -> Tensor:
        """The loss of `pred` [B, D] against `target` [B, D] with log-variances [B] or [B, 1]."""
        return functional.fastfill_loss(
            pred,
            target,
            log_var,
            self.new_weight,
            self.new_bias,
            labels,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
            backend=self.backend,
        )
