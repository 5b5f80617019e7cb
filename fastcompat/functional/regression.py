"""Losses of old features transformed into the new space: FCT and FastFill."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from .._normalise import matched
from .._types import Backend, Reduction, SoftmaxProblem
from . import parts
from .engine import row_stats


def fct_loss(
    pred: Tensor, target: Tensor, *, reduction: Reduction = "mean", backend: Backend = "auto"
) -> Tensor:
    """Forward-compatible training: the mean squared error of transformed old features.

    `L_i = mean over d of (n_id - r_id)^2`, `r = h(o, s)`; the features are not normalised. Ramanujan et al.,
    "Forward Compatible Training for Large-Scale Embedding Retrieval Systems", CVPR 2022, arXiv 2112.02805
    (code).

    Args:
        pred: [B, D], `r`, the transformed old features.
        target: [B, D], `n`, the new model's features of the same items; never gets a gradient.
        reduction: "mean", "sum" or "none" over the rows.
        backend: "auto" or "reference"; it has no native kernel, so "native" raises.

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.no_kernel(backend, "`fct_loss`")
    _check_prediction(pred, target)
    return parts.reduced(_squared_error(pred, target), None, reduction)


def fastfill_loss(
    pred: Tensor,
    target: Tensor,
    log_var: Tensor,
    new_weight: Tensor,
    new_bias: Tensor | None,
    labels: Tensor,
    *,
    label_smoothing: float = 0.1,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """FastFill: a transformation that also predicts how wrong it is, which gives the order of the backfill.

    ```
    l_i = mean over d of (n_id - r_id)^2 + LSCE(W_new r_i + b_new, y_i)
    L_i = 0.5 * exp(-s_i) * l_i + 0.5 * s_i
    ```
    with LSCE the cross-entropy with label smoothing under the frozen new classifier and `s_i` the predicted
    log-variance: backfill the largest `s` first. Jaeckle et al., "FastFill: Efficient Compatible Model
    Update", ICLR 2023, arXiv 2303.04766 (code).

    Args:
        pred: [B, D], `r`, the transformed old features.
        target: [B, D], `n`, the new model's features; never gets a gradient.
        log_var: [B] or [B, 1], `s`.
        new_weight: [C, D], frozen: it never gets a gradient.
        new_bias: [C], frozen, or None.
        labels: int64 [B] below C; a row with a negative label is ignored.
        label_smoothing: the share of the target spread evenly over all classes, 0 to 1.
        reduction: "mean" or "sum" over the rows that are not ignored, or "none" (an ignored row gives 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit; a label of C or more (on the CPU; elsewhere its
            row is NaN).
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"`label_smoothing` must be 0 to 1: got {label_smoothing}")
    _check_prediction(pred, target)
    _checks.tensor("log_var", log_var)
    if log_var.shape not in ((pred.shape[0],), (pred.shape[0], 1)):
        raise ValueError(
            f"`log_var` must have shape [{pred.shape[0]}] or [{pred.shape[0]}, 1], one number per row of "
            f"`pred`: got shape {list(log_var.shape)}"
        )
    _checks.embeddings("new_weight", new_weight, "pred", pred)
    _checks.indices("labels", labels, "pred", pred)
    target_class = parts.class_targets(labels, new_weight.shape[0])
    query, weight = matched(pred, new_weight.detach(), False)
    bias = parts.frozen_bias("new_bias", new_bias, "new_weight", weight)
    native = _checks.use_native(backend, query)
    stats = row_stats(native, SoftmaxProblem(query, weight, bias=bias, positive=target_class))
    wide = torch.promote_types(query.dtype, torch.float32)
    classes = max(weight.shape[0], 1)
    mean_logit = (query.to(wide) * (weight.to(wide).sum(0) / classes)).sum(1)  # [B]
    if bias is not None:
        mean_logit = mean_logit + bias.sum() / classes
    true_logit = stats.pos_sum  # of the one positive; finite where there is none
    entropy = parts.log_odds_loss(stats.neg_lse, true_logit) + label_smoothing * (true_logit - mean_logit)
    error = _squared_error(pred, target) + entropy
    spread = log_var.flatten().to(error.dtype)
    return parts.reduced(0.5 * (-spread).exp() * error + 0.5 * spread, target_class >= 0, reduction)


def _check_prediction(pred: Tensor, target: Tensor) -> None:
    _checks.embeddings("target", target, "pred", pred)
    _checks.rows("target", target, "pred", pred)


def _squared_error(pred: Tensor, target: Tensor) -> Tensor:
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    squares = (pred.to(wide) - target.detach().to(wide)).square()  # [B, D]
    return squares.mean(1) if squares.shape[1] else squares.sum(1)
