"""Losses of embeddings against class vectors: an old classifier, prototypes, a margin softmax."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._normalise import common_dtype, matched, normalised, paired_products
from .._types import Backend, Reduction, SoftmaxProblem
from . import parts
from .engine import contrastive, row_stats


def bct_loss(
    new: Tensor,
    labels: Tensor,
    old_weight: Tensor,
    old_bias: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """The influence loss of backward-compatible training: new features judged by the old classifier.

    `CE(W_old n' + b_old, y)`, `n'` the first `D_old` columns of the new feature (padded with zeros if it is
    shorter); with `scale`, `CE(scale * <n'^, w^> + b_old, y)` on L2-normalised features and weights. Shen et
    al., CVPR 2020, arXiv 2003.11942 (re-implementation by its first author). Added with weight 1 to the
    classification loss.

    Args:
        new: [B, D_new].
        labels: int64 [B]; a row with label < 0 or >= C_old is ignored (a class the old model never saw).
        old_weight: [C_old, D_old], frozen: it never gets a gradient.
        old_bias: [C_old], frozen.
        scale: None for the plain linear classifier, else the scale of a cosine classifier (a float or 0-dim
            tensor).
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" or "sum" over the rows that are not ignored, or "none" (an ignored row gives 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.matrix("new", new)
    _checks.matrix("old_weight", old_weight)
    _checks.same_device("old_weight", old_weight, "new", new)
    _checks.indices("labels", labels, "new", new)
    weight = old_weight.detach()
    shared = min(new.shape[1], weight.shape[1])
    features = new[:, :shared]
    dtype = common_dtype(features, weight)
    if scale is None:
        scale = 1.0
    else:
        scale = _checks.scalar("scale", scale, "new", new)
        weight, features = normalised(weight, eps), normalised(features, eps)
    features, weight = features.to(dtype), weight[:, :shared].to(dtype)
    bias = parts.frozen_bias("old_bias", old_bias, "old_weight", weight)
    _checks.warn_negative_labels("labels", labels)
    known = (labels >= 0) & (labels < weight.shape[0])
    target = torch.where(known, labels, -1)
    native = _checks.use_native(backend, features)
    problem = SoftmaxProblem(features, weight, scale, bias, positive=target)
    return contrastive(native, problem, "sum_in_log", reduction)


def prototype_loss(
    features: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    perturbed: Tensor | None = None,
    perturb_negatives: bool = False,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """New features pulled to the old model's class prototypes, or to perturbed ones that lie further apart.

    `L_b = CE(z_b, y_b)` with `z_bc = <f^_b, p_c> / temperature` for `c != y_b` and `z_by = <f^_b, p~_y> /
    temperature`; with `perturb_negatives` every column uses `p~`. Zhou et al., "Prototype Perturbation for
    Relaxing Alignment Constraints in Backward-Compatible Learning", arXiv 2503.14824 (code that the same
    authors left in a later repository; the paper's constants were not seen). Added with weight 1 to the
    classification loss. `p` comes from `class_prototypes`, `p~` from `ndpp` or `odpp`.

    Every row of `prototypes` is a column of the softmax, a zero row (an empty class) too. Give a class that
    the old model never saw the mean of its old-model features, or leave its samples out with label -1:
    `torch.where(prototypes.any(1)[labels], labels, -1)`.

    Args:
        features: [B, D], the new model's embeddings.
        prototypes: [C, D], frozen: they never get a gradient.
        labels: int64 [B] below C; a row with a negative label is ignored.
        perturbed: [C, D], frozen; default: `prototypes`.
        perturb_negatives: use `perturbed` for the other classes as well.
        temperature: above 0; a float or a 0-dim tensor that may require grad.
        normalize: L2-normalise features and prototypes first.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" or "sum" over the rows that are not ignored, or "none" (an ignored row gives 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit; a label of C or more (on the CPU; elsewhere its
            row is NaN).
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.embeddings("prototypes", prototypes, "features", features)
    _checks.indices("labels", labels, "features", features)
    if perturbed is None:
        if perturb_negatives:
            raise ValueError("`perturbed` must be given with `perturb_negatives`: got None")
        perturbed = prototypes
    _checks.embeddings("perturbed", perturbed, "features", features)
    _checks.rows("perturbed", perturbed, "prototypes", prototypes)
    scale = parts.inverse_temperature(temperature, "features", features)
    target = parts.class_targets(labels, prototypes.shape[0])
    columns = (perturbed if perturb_negatives else prototypes).detach()
    query, keys = matched(features, columns, normalize, eps)
    native = _checks.use_native(backend, query)
    problem = SoftmaxProblem(query, keys, scale, positive=target)
    if perturbed is prototypes or perturb_negatives:
        return contrastive(native, problem, "sum_in_log", reduction)
    neg = row_stats(native, problem).neg_lse
    pos = scale * paired_products(features, parts.class_rows(perturbed.detach(), target), normalize, eps)
    return parts.reduced(parts.log_odds_loss(neg, pos), target >= 0, reduction)


def margin_softmax_loss(
    features: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    kind: Literal["arcface", "cosface"] = "arcface",
    scale: float | Tensor = 30.0,
    margin: float = 0.3,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Cosine softmax with a margin on the true class, without the [B, C] logits: 10^5 classes and more fit.

    `CE(z, y)` with `z_c = scale * cos(theta_c)`, `cos(theta_c) = <f^, w^_c>`, and the true class's logit
    lowered:

    ```
    "arcface": scale * cos(theta + margin)                      where cos(theta) > -cos(margin)
               scale * (cos(theta) - margin * sin(margin))      elsewhere, so that it stays monotonic
    "cosface": scale * (cos(theta) - margin)
    ```
    ArcFace: Deng et al., CVPR 2019, arXiv 1801.07698. CosFace: Wang et al., CVPR 2018, arXiv 1801.09414.
    (Both re-implementations: the tests compare them with pytorch-metric-learning.)

    Args:
        features: [B, D].
        weight: [C, D], one row per class; gets a gradient if it requires one.
        labels: int64 [B] below C; a row with a negative label is ignored.
        kind: "arcface" or "cosface".
        scale: a float above 0 or a 0-dim tensor that may require grad.
        margin: for "arcface" an angle in radians, 0 to pi; for "cosface" a difference of cosines.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" or "sum" over the rows that are not ignored, or "none" (an ignored row gives 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit; a label of C or more (on the CPU; elsewhere its
            row is NaN).
    """
    _checks.choice("kind", kind, ("arcface", "cosface"))
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.embeddings("weight", weight, "features", features)
    _checks.indices("labels", labels, "features", features)
    scale = parts.above_zero("scale", scale, "features", features)
    if kind == "arcface" and not 0 <= margin <= math.pi:
        raise ValueError(f"`margin` must be an angle of 0 to pi radians: got {margin}")
    target = parts.class_targets(labels, weight.shape[0])
    query, keys = matched(features, weight, True, eps)
    native = _checks.use_native(backend, query)
    stats = row_stats(native, SoftmaxProblem(query, keys, scale, positive=target))
    cosine = stats.pos_sum / scale  # [B], 0 where there is no positive
    lowered = _arcface(cosine, margin) if kind == "arcface" else cosine - margin
    return parts.reduced(parts.log_odds_loss(stats.neg_lse, scale * lowered), target >= 0, reduction)


def _arcface(cosine: Tensor, margin: float) -> Tensor:
    square = (1 - cosine) * (1 + cosine)
    inside = square > 0  # a square root of 0 has no derivative, and rounding can pass it
    sine = torch.where(inside, torch.where(inside, square, 1.0).sqrt(), 0.0)
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin))
