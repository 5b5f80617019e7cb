"""Modules that compare embeddings with class vectors: an old classifier, prototypes, a margin softmax."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from .. import _checks, functional
from .._types import Backend, Reduction
from ..prototypes import PrototypeBank


class _ClassVectorLoss(nn.Module, ABC):
    """The call of pytorch-metric-learning for losses whose only second argument is `labels`."""

    @abstractmethod
    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor: ...

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Sequence[Tensor] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of `embeddings` [B, D] whose `labels` int64 [B] are row numbers of the class vectors."""
        if labels is None:
            raise ValueError("`labels` must be given: got None; they are class numbers")
        for name, value in (
            ("indices_tuple", indices_tuple),
            ("ref_emb", ref_emb),
            ("ref_labels", ref_labels),
        ):
            if value is not None:
                raise ValueError(
                    f"`{name}` must be None: this loss compares with class vectors, not with pairs"
                )
        _checks.matrix("embeddings", embeddings)
        _checks.indices("labels", labels, "embeddings", embeddings)
        return self._loss(embeddings, labels)


class BCTLoss(_ClassVectorLoss):
    """`functional.bct_loss` with the old classifier held as frozen buffers.

    Args:
        old_weight: [C_old, D_old].
        old_bias: [C_old] or None.
        scale: None for the plain linear classifier, else the scale of a cosine classifier.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    old_weight: Tensor
    old_bias: Tensor | None

    def __init__(
        self,
        old_weight: Tensor,
        old_bias: Tensor | None = None,
        *,
        scale: float | Tensor | None = None,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        _checks.matrix("old_weight", old_weight)
        if old_bias is not None:
            _checks.tensor("old_bias", old_bias)
        self.register_buffer("old_weight", old_weight.detach())
        self.register_buffer("old_bias", None if old_bias is None else old_bias.detach())
        self.scale, self.eps, self.reduction, self.backend = scale, eps, reduction, backend

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.bct_loss(
            embeddings,
            labels,
            self.old_weight,
            self.old_bias,
            scale=self.scale,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class PrototypeLoss(_ClassVectorLoss):
    """`functional.prototype_loss` with the prototypes held in a `fastcompat.PrototypeBank`, `bank`.

    `prototypes` and `perturbed` are the bank's, to read and to set: `loss.perturbed = fc.ndpp(old, new)`.

    Args:
        prototypes: [C, D], kept as a frozen buffer; or a bank, whose prototypes and perturbed prototypes are
            read at every call.
        perturbed: [C, D], beside a tensor of prototypes; a bank has its own.
        perturb_negatives: use the perturbed prototypes for the other classes as well.
        temperature: a float, or an `nn.Parameter` to be learned.
        normalize: L2-normalise features and prototypes first.
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        prototypes: Tensor | PrototypeBank,
        *,
        perturbed: Tensor | None = None,
        perturb_negatives: bool = False,
        temperature: float | Tensor = 0.07,
        normalize: bool = True,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if isinstance(prototypes, PrototypeBank) and perturbed is not None:
            raise ValueError("`perturbed` must be left out beside a PrototypeBank, which holds its own")
        bank = prototypes if isinstance(prototypes, PrototypeBank) else PrototypeBank(prototypes, perturbed)
        self.bank: PrototypeBank = bank
        self.perturb_negatives, self.temperature, self.normalize = perturb_negatives, temperature, normalize
        self.eps, self.reduction, self.backend = eps, reduction, backend

    @property
    def prototypes(self) -> Tensor:
        """The old prototypes [C, D] of the bank."""
        return self.bank.prototypes

    @prototypes.setter
    def prototypes(self, value: Tensor) -> None:
        self.bank.replace("prototypes", value)

    @property
    def perturbed(self) -> Tensor:
        """The perturbed prototypes [C, D] of the bank."""
        return self.bank.perturbed

    @perturbed.setter
    def perturbed(self, value: Tensor) -> None:
        self.bank.replace("perturbed", value)

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.prototype_loss(
            embeddings,
            self.bank.prototypes,
            labels,
            perturbed=self.bank.perturbed,
            perturb_negatives=self.perturb_negatives,
            temperature=self.temperature,
            normalize=self.normalize,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )


class MarginSoftmaxLoss(_ClassVectorLoss):
    """`functional.margin_softmax_loss` with the class weights as its parameter.

    Args:
        weight: [C, D], one row per class; a tensor becomes an `nn.Parameter`, a parameter (e.g. that of an
            `nn.Linear`) stays shared.
        kind: "arcface" or "cosface".
        scale: a float, or an `nn.Parameter` to be learned.
        margin: radians for "arcface", a difference of cosines for "cosface".
        eps: rows shorter than this are divided by it; default: 1e-12, for float16 1e-3.
        reduction: "mean", "sum" or "none".
        backend: "auto", "native" or "reference".
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        kind: Literal["arcface", "cosface"] = "arcface",
        scale: float | Tensor = 30.0,
        margin: float = 0.3,
        eps: float | None = None,
        reduction: Reduction = "mean",
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        self.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
        self.kind, self.scale, self.margin = kind, scale, margin
        self.eps, self.reduction, self.backend = eps, reduction, backend

    def _loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return functional.margin_softmax_loss(
            embeddings,
            self.weight,
            labels,
            kind=self.kind,
            scale=self.scale,
            margin=self.margin,
            eps=self.eps,
            reduction=self.reduction,
            backend=self.backend,
        )
