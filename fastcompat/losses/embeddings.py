"""Modules that compare embeddings with embeddings: contrastive, SimCLR, RACT, metric-compatible."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import _checks, functional, reference
from .._normalise import matched
from .._types import Backend, Positives, Reduction, SoftmaxStats
from ..functional import parts


class ContrastiveLoss(nn.Module):
    """`functional.contrastive_loss` of embeddings against `ref_emb`, or against the batch itself without it.

    Without `ref_emb` a row is neither positive nor negative of itself. With `ref_emb` and no labels, row i of
    `ref_emb` is the positive of row i. `ref_labels` defaults to `labels` where the row counts agree.

    Args:
        temperature: a float, or an `nn.Parameter` to be learned.
        positives: "sum_in_log" or "mean_out".
        normalize: L2-normalise both sides first.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        positives: Positives = "sum_in_log",
        normalize: bool = True,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.positives, self.normalize = temperature, positives, normalize
        self.eps, self.reduction, self.backend = eps, reduction, backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` [B, D] against `ref_emb` [N, D]."""
        _checks.matrix("embeddings", embeddings)
        keys = embeddings
        if ref_emb is not None:
            _checks.embeddings("ref_emb", ref_emb, "embeddings", embeddings)
            keys = ref_emb
        if indices_tuple is not None:
            _checks.choice("positives", self.positives, parts.POSITIVES)
            _check_options_for_pairs(self.reduction, self.backend)
            scale = parts.inverse_temperature(self.temperature, "embeddings", embeddings)
            query, keys = matched(embeddings, keys, self.normalize, self.eps)
            z = reference.logits(query, keys, scale)
            stats = reference.masked_stats(z, *pair_masks(indices_tuple, z))
            return parts.contrastive_from_stats(stats, self.positives, self.reduction)
        if ref_labels is not None and (ref_emb is None or labels is None):
            missing = "ref_emb" if ref_emb is None else "labels"
            raise ValueError(f"`{missing}` must be given with `ref_labels`: got None")
        row = torch.arange(embeddings.shape[0], dtype=torch.int64, device=embeddings.device)
        positive, key_labels = None, labels
        if labels is None:
            if ref_emb is None:
                raise ValueError("`labels` must be given without `ref_emb` and `indices_tuple`: got None")
            _checks.rows("ref_emb", ref_emb, "embeddings", embeddings)
            positive = row
        else:
            _checks.indices("labels", labels, "embeddings", embeddings)
            key_labels = _labels_of_keys(labels, ref_emb, ref_labels)
        return functional.contrastive_loss(
            embeddings,
            keys,
            query_labels=labels,
            key_labels=key_labels,
            positive=positive,
            exclude=row if ref_emb is None else None,
            temperature=self.temperature,
            positives=self.positives,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class SimCLRLoss(nn.Module):
    """`functional.simclr_loss`, called `loss(first, second)` as the function is.

    Args:
        temperature: a float, or an `nn.Parameter` to be learned.
        normalize: L2-normalise the embeddings first.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.1,
        normalize: bool = True,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.normalize = temperature, normalize
        self.eps, self.reduction, self.backend = eps, reduction, backend

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views `first` and `second` [B, D] of the same images."""
        return functional.simclr_loss(
            first,
            second,
            temperature=self.temperature,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class RACTLoss(nn.Module):
    """`functional.ract_loss` within the batch; row i of `ref_emb` is the old embedding of image i.

    With an `indices_tuple` the positives and negatives of row i are the pairs named there: positives among
    the old embeddings, the k hardest negatives among the old and among the new ones (row i itself never is a
    new negative); rows without a positive are ignored.

    Args:
        temperature: a float, or an `nn.Parameter` to be learned.
        k: how many negatives of each kind; None takes all.
        detach_keys: no gradient into the new embeddings as keys.
        normalize: L2-normalise everything first.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.01,
        k: int | None = 10,
        detach_keys: bool = True,
        normalize: bool = True,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.k, self.detach_keys = temperature, k, detach_keys
        self.normalize, self.eps, self.reduction, self.backend = normalize, eps, reduction, backend

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` [B, D] beside the old embeddings `ref_emb` [B, D] of the same images."""
        _checks.matrix("embeddings", embeddings)
        if ref_emb is None:
            raise ValueError(
                "`ref_emb` must be given: got None; pass the old model's embeddings of the same images"
            )
        _checks.embeddings("ref_emb", ref_emb, "embeddings", embeddings)
        _checks.rows("ref_emb", ref_emb, "embeddings", embeddings)
        if indices_tuple is not None:
            return self._from_pairs(embeddings, ref_emb, indices_tuple)
        if labels is None:
            raise ValueError("`labels` must be given without an `indices_tuple`: got None")
        _checks.indices("labels", labels, "embeddings", embeddings)
        if ref_labels is not None and ref_labels is not labels:
            raise ValueError(
                "`ref_labels` must be left out: row i of `ref_emb` is the old embedding of row i "
                "of `embeddings`, so it has the same label"
            )
        return functional.ract_loss(
            embeddings,
            ref_emb,
            labels,
            temperature=self.temperature,
            k=self.k,
            detach_keys=self.detach_keys,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )

    def _from_pairs(self, new: Tensor, old: Tensor, indices_tuple: Sequence[Tensor]) -> Tensor:
        _check_options_for_pairs(self.reduction, self.backend)
        k = new.shape[0] if self.k is None else min(_checks.positive_int("k", self.k), new.shape[0])
        scale = parts.inverse_temperature(self.temperature, "embeddings", new)
        own = new.detach() if self.detach_keys else new
        to_old, to_new = (
            reference.logits(*matched(new, keys, self.normalize, self.eps), scale)
            for keys in (old.detach(), own)
        )
        pos, neg = pair_masks(indices_tuple, to_old)
        itself = torch.eye(len(neg), dtype=torch.bool, device=neg.device)
        hardest = []
        for z, members in ((to_old, neg), (to_new, neg & ~itself)):
            hardest.append(torch.where(members, z, -torch.inf).topk(k).values)
        everything = torch.cat(hardest, 1)
        used = torch.ones_like(everything, dtype=torch.bool)
        pos_sum = torch.where(pos, to_old, 0.0).sum(1)
        stats = SoftmaxStats(
            reference.log_sum_exp(everything, used), reference.log_sum_exp(to_old, pos), pos_sum, pos.sum(1)
        )
        return parts.contrastive_from_stats(stats, "sum_in_log", self.reduction)


class MetricCompatibleLoss(nn.Module):
    """`functional.metric_compatible_loss`, called `loss(reverse, new, old, labels)` as the function is.

    Args:
        temperature: a float, or an `nn.Parameter` to be learned.
        positives: "sum_in_log" or "mean_out".
        shared_negatives: False for the single-system ablation.
        normalize: L2-normalise everything first.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 0.07,
        positives: Positives = "sum_in_log",
        shared_negatives: bool = True,
        normalize: bool = True,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.temperature, self.positives, self.normalize = temperature, positives, normalize
        self.shared_negatives, self.eps = shared_negatives, eps
        self.reduction, self.backend = reduction, backend

    def forward(self, reverse: Tensor, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
        """The loss of `reverse` [B, D_old] and `new` [B, D_new] beside the old embeddings [B, D_old]."""
        return functional.metric_compatible_loss(
            reverse,
            new,
            old,
            labels,
            temperature=self.temperature,
            positives=self.positives,
            shared_negatives=self.shared_negatives,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


def pair_masks(indices_tuple: Sequence[Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    """Boolean masks [B, N] of the positive and of the negative pairs in a 4-tuple or 3-tuple."""
    if not isinstance(indices_tuple, (tuple, list)):
        raise TypeError(f"`indices_tuple` must be a tuple of tensors: got {type(indices_tuple).__name__}")
    if len(indices_tuple) not in (3, 4):
        raise ValueError(
            "`indices_tuple` must be (anchors, positives, anchors, negatives) or "
            f"(anchors, positives, negatives): got {len(indices_tuple)} tensors"
        )
    anchors, positives, *middle, negatives = indices_tuple
    masks = []
    for rows, columns in ((anchors, positives), (middle[0] if middle else anchors, negatives)):
        for value, size in ((rows, z.shape[0]), (columns, z.shape[1])):
            _checks.indices("indices_tuple", value, "indices_tuple", rows)
            _checks.in_range("indices_tuple", value, size, none=False)
        mask = torch.zeros_like(z, dtype=torch.bool)
        mask[rows, columns] = True
        masks.append(mask)
    return masks[0], masks[1]


def _check_options_for_pairs(reduction: str, backend: str) -> None:
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.no_kernel(backend, "an `indices_tuple`")


def _labels_of_keys(labels: Tensor, ref_emb: Tensor | None, ref_labels: Tensor | None) -> Tensor:
    if ref_emb is None:
        return labels
    if ref_labels is None:
        if ref_emb.shape[0] != labels.shape[0]:
            raise ValueError(
                f"`ref_labels` must be given where `ref_emb` has other rows than `embeddings`: got None for "
                f"{ref_emb.shape[0]} and {labels.shape[0]} rows"
            )
        return labels
    _checks.indices("ref_labels", ref_labels, "ref_emb", ref_emb)
    return ref_labels
