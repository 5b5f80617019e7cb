"""Class prototypes of the old model, and their perturbation where old classes lie too close together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _checks, _search
from ._autocast import exactly
from ._normalise import normalised
from ._types import Array, ArrayLike, Backend, Segment

_BLOCK = 2**24  # numbers in the largest temporary of a blockwise computation (64 MiB in float32)


def class_prototypes(
    features: Array, labels: ArrayLike, num_classes: int, *, eps: float | None = None
) -> Array:
    """The mean of each class's normalised features, normalised: `p_c = normalize(mean of f^_i with y_i = c)`.

    `RunningPrototypes` does the same batch by batch.

    Args:
        features: [N, D], a tensor or a NumPy array.
        labels: int64 [N] below `num_classes`, likewise; a row with a negative label is left out.
        num_classes: C.
        eps: a feature shorter than this is divided by it; default: 1e-12, for float16 1e-3.

    Returns:
        float32 [C, D] (float64 for float64 features), without gradient, a tensor or a NumPy array as
        `features`; a class without a sample is a zero row.

    Raises:
        ValueError, TypeError: arguments that do not fit; a label of C or more.
    """
    running = RunningPrototypes(num_classes, eps=eps)
    running.add(features, labels)
    result: Array = _checks.like_input((running.prototypes(),), features)[0]
    return result


class RunningPrototypes:
    """`class_prototypes` of features that come in batches, in the memory of the result.

    ::

        running = fc.RunningPrototypes(num_classes)
        for images, labels in loader:
            running.add(old_model(images), labels)
        prototypes = running.prototypes()

    Args:
        num_classes: C.
        eps: a feature shorter than this is divided by it; default: 1e-12, for float16 1e-3.
    """

    def __init__(self, num_classes: int, *, eps: float | None = None) -> None:
        self.num_classes, self.eps = _checks.positive_int("num_classes", num_classes), eps
        self._sums: Tensor | None = None  # float64 [C, D]; the length of a sum does not matter, so no counts
        self._dtype = torch.float32

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, features: ArrayLike, labels: ArrayLike) -> None:
        """Count features [B, D] with labels int64 [B]; a negative label leaves its row out."""
        features, labels = _checks.as_tensor("features", features), _checks.as_tensor("labels", labels)
        _checks.matrix("features", features)
        _checks.indices("labels", labels, "features", features)
        _checks.warn_negative_labels("labels", labels)
        if labels.numel() and (highest := int(labels.max())) >= self.num_classes:
            raise ValueError(
                f"`labels` must be below `num_classes`, which is {self.num_classes}: got {highest}; "
                "give a row without a class the label -1"
            )
        if self._sums is None:
            shape = (self.num_classes, features.shape[1])
            self._sums = torch.zeros(shape, dtype=torch.float64, device=features.device)
            self._dtype = torch.promote_types(features.dtype, torch.float32)
        _checks.columns("features", features, "earlier features", self._sums)
        rows = max(1, _BLOCK // max(1, features.shape[1]))
        for x, y in zip(torch.split(features, rows), torch.split(labels, rows), strict=True):
            self._sums.index_add_(0, y[y >= 0], normalised(x[y >= 0], self.eps).double())

    def prototypes(self) -> Tensor:
        """The prototypes [C, D] of everything added so far; a class without a sample is a zero row."""
        if self._sums is None:
            raise ValueError("`prototypes()` needs features: call `add` at least once")
        return F.normalize(self._sums, dim=1).to(self._dtype)


@torch.inference_mode(False)  # the result is trained against
@torch.no_grad()
def ndpp(
    old_prototypes: Tensor,
    new_prototypes: Tensor,
    *,
    k: int = 100,
    alpha_old: float = 0.16,
    alpha_new: float = 0.004,
    exclude_new_self: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """Neighbour-driven perturbation: each old prototype moves away from its nearest old and new prototypes.

    With `n(i,k)` the k nearest old neighbours of `p_i` (never itself) at cosine `s_ik` and `m(i,k)` its k
    nearest new prototypes at cosine `t_ik`:

    ```
    delta_old_i = sum_k s_ik (p_i - p_n(i,k)) / sum_k s_ik
    delta_new_i = sum_k t_ik (p_i - q_m(i,k)) / sum_k t_ik
    p~_i = normalize(p_i + alpha_old * delta_old_i + alpha_new * delta_new_i)
    ```
    Denominators + 1e-8: they are meant to be sums of positive cosines, so take k small enough that far
    classes stay out. Zhou et al., arXiv 2503.14824 (code that the same authors left in a later repository,
    whose effective alphas are the defaults; the paper's constants were not seen). The search is exact, in
    memory linear in C.

    Args:
        old_prototypes: [C, D]; normalised here. A zero row (an empty class) stays zero and is no one's
            neighbour.
        new_prototypes: [C, D], those of the current new model; zero rows are nobody's neighbour.
        k: how many neighbours of each kind; fewer where there are fewer.
        alpha_old: step away from the old neighbours.
        alpha_new: step away from the new prototypes.
        exclude_new_self: leave the class's own new prototype out of `m` (the authors' code keeps it).
        backend: "auto", "native" or "reference".

    Returns:
        float32 [C, D] (float64 for float64 prototypes), without gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit, such as an old and a new model of different widths;
            NaN or inf, naming the first bad row.
    """
    _checks.positive_int("k", k)
    old, new = _pair(old_prototypes, new_prototypes)
    native = _checks.use_native(backend, old)
    itself = torch.arange(old.shape[0], dtype=torch.int64, device=old.device)
    moved = old.clone()
    sides = (
        ("old_prototypes", old, alpha_old, itself),
        ("new_prototypes", new, alpha_new, itself if exclude_new_self else None),
    )
    for name, keys, alpha, exclude in sides:
        present = keys.any(1).nonzero()[:, 0]
        rows = None if len(present) == len(keys) else present
        weight, ids = _search.topk(
            [Segment(old, keys, rows)],
            max(1, min(k, keys.shape[0])),
            "cosine",
            exclude=exclude,
            native=native,
            names=(("old_prototypes", name),),
        )
        weight = weight.masked_fill_(ids < 0, 0.0)  # [C, k]
        total = weight.sum(1, keepdim=True)
        pulled = F.embedding_bag(ids.clamp_(min=0), keys, per_sample_weights=weight, mode="sum")  # [C, D]
        moved += alpha * (total * old - pulled) / (total + 1e-8)
    return F.normalize(moved, dim=1)


@torch.inference_mode(False)
@torch.no_grad()
def odpp(
    old_prototypes: Tensor,
    new_prototypes: Tensor,
    *,
    threshold_old: float = 0.9,
    threshold_new: float = 0.9,
    steps: int = 100,
    lr: float = 1e-3,
    batch: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Optimisation-driven perturbation: old prototypes learn to keep apart, and away from other new ones.

    Adam from `Delta = 0` on `p~ = normalize(p + Delta)`:

    ```
    L = mean over i != j of [<p~_i, p~_j> - threshold_old]_+
      + mean over i != j of [<p~_i, q_j> - threshold_new]_+
    ```
    Zhou et al., arXiv 2503.14824 (code that the same authors left in a later repository; unlike it, norms
    are kept at 1, i = j is left out and every pair counts). Plain PyTorch, block by block with the cosines
    recomputed: memory linear in C, time `steps * (batch or C) * C * D`.

    Args:
        old_prototypes: [C, D]; normalised here. A zero row (an empty class) stays zero, and the class takes
            no part, whatever its new prototype.
        new_prototypes: [C, D], those of the current new model; a zero row moves nobody and is left out of its
            mean.
        threshold_old: the cosine above which two old prototypes push each other away.
        threshold_new: the cosine above which an old prototype leaves another class's new one.
        steps: of Adam.
        lr: its learning rate.
        batch: None for every class in every step; else each step draws that many classes i (in turn, in
            random order, from torch's generator) and takes every j: an unbiased estimate of L for very many
            classes.
        backend: "auto" or "reference"; it has no native kernel, so "native" raises.

    Returns:
        float32 [C, D] (float64 for float64 prototypes), without gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit, such as an old and a new model of different widths;
            NaN or inf, naming the first bad row.
    """
    _checks.no_kernel(backend, "`odpp`")
    _checks.positive_int("steps", steps)
    if batch is not None:
        _checks.positive_int("batch", batch)
    old, new = _pair(old_prototypes, new_prototypes)
    _search.refuse_nonfinite(old, new, ("old_prototypes", "new_prototypes"))
    present = old.any(1).nonzero()[:, 0]
    old_known, new_known = old[present], new[present]
    classes = len(present)
    if classes < 2:
        return old
    moved = _push_apart(old_known, new_known, threshold_old, threshold_new, steps, lr, batch)
    return torch.zeros_like(old).index_copy_(0, present, moved)


def _push_apart(
    old: Tensor,
    new: Tensor,
    threshold_old: float,
    threshold_new: float,
    steps: int,
    lr: float,
    batch: int | None,
) -> Tensor:
    """`odpp` of classes [C, D] that all have an old prototype; a zero row of `new` is not a class."""
    classes = len(old)
    drawn = classes if batch is None else min(batch, classes)
    pairs = drawn * (classes - 1)
    has_new = new.any(1)
    # Of the second mean: over j whose new prototype exists, for each i one less if its own does.
    new_pairs = drawn * (int(has_new.sum()) - float(has_new.double().mean()))
    delta = torch.zeros_like(old)
    # The mean over very many pairs is so small that Adam's usual eps would stop it: eps shrinks with it.
    adam = torch.optim.Adam([delta], lr=lr, eps=1e-8 * min(1.0, 1e6 / pairs))
    every = [
        torch.randperm(classes, dtype=torch.int64, device="cpu") for _ in range(-(-steps * drawn // classes))
    ]
    for rows in torch.split(torch.cat(every)[: steps * drawn], drawn):
        length = (old + delta).norm(dim=1, keepdim=True).clamp_(min=1e-12)
        x = (old + delta) / length
        rows = rows.to(old.device)
        grad = _hinge_gradient(x, x, rows, threshold_old, both=True) / pairs
        if new_pairs > 0:
            grad += _hinge_gradient(x, new, rows, threshold_new, both=False) / new_pairs
        delta.grad = (grad - (grad * x).sum(1, keepdim=True) * x) / length  # through the normalisation
        adam.step()
    return F.normalize(old + delta, dim=1)


def _hinge_gradient(x: Tensor, others: Tensor, rows: Tensor, threshold: float, both: bool) -> Tensor:
    """d/dx [C, D] of the sum over i in rows, j != i of one hinge; with `both`, through `others = x` too."""
    grad = torch.zeros_like(x)
    with exactly(x):
        for i in torch.split(rows, max(1, _BLOCK // x.shape[0])):
            own = torch.arange(len(i), dtype=torch.int64, device=i.device)
            close = (x[i] @ others.T > threshold).to(x.dtype)  # [block, C]
            close[own, i] = 0.0
            grad.index_add_(0, i, close @ others)
            if both:
                grad.addmm_(close.T, x[i])
    return grad


def _pair(old_prototypes: Tensor, new_prototypes: Tensor) -> tuple[Tensor, Tensor]:
    _checks.embeddings("new_prototypes", new_prototypes, "old_prototypes", old_prototypes)
    _checks.rows("new_prototypes", new_prototypes, "old_prototypes", old_prototypes)
    if not old_prototypes.shape[1]:
        raise ValueError("`old_prototypes` must have at least 1 column, since a perturbation has a direction")
    dtype = torch.promote_types(old_prototypes.dtype, new_prototypes.dtype)
    old, new = (
        normalised(old_prototypes.detach().to(dtype)),
        normalised(new_prototypes.detach().to(dtype)),
    )
    return old, new


class PrototypeBank(nn.Module):
    """Old prototypes and their perturbed form, refreshed on a schedule of epochs; both are in the state_dict.

    ::

        bank = fc.PrototypeBank(old_prototypes, perturb=fc.odpp, every=1)
        loss = fc.losses.PrototypeLoss(bank)
        for epoch in range(epochs):
            if bank.due(epoch):
                bank.refresh(fc.class_prototypes(new_features, labels, num_classes), epoch)
            ...

    Args:
        prototypes: [C, D], those of the old model.
        perturbed: [C, D], to start from; default: `prototypes`.
        perturb: `perturb(prototypes, new_prototypes) -> [C, D]`: `ndpp`, `odpp`, or one of them with options
            (`functools.partial(fc.odpp, batch=1024)`).
        every: refresh every so many epochs.

    Attributes:
        prototypes: [C, D].
        perturbed: [C, D].
        epoch: int64, that of the last refresh; -1 before the first.
    """

    prototypes: Tensor
    perturbed: Tensor
    epoch: Tensor

    @torch.inference_mode(False)
    def __init__(
        self,
        prototypes: Tensor,
        perturbed: Tensor | None = None,
        *,
        perturb: Callable[[Tensor, Tensor], Tensor] = ndpp,
        every: int = 1,
    ) -> None:
        super().__init__()
        _checks.matrix("prototypes", prototypes)
        _checks.positive_int("every", every)
        if perturbed is None:
            perturbed = prototypes
        _checks.embeddings("perturbed", perturbed, "prototypes", prototypes)
        _checks.rows("perturbed", perturbed, "prototypes", prototypes)
        self.perturb, self.every = perturb, every
        self.register_buffer("prototypes", prototypes.detach().clone())
        self.register_buffer("perturbed", perturbed.detach().clone())
        self.register_buffer("epoch", torch.tensor(-1, dtype=torch.int64, device=prototypes.device))

    def due(self, epoch: int) -> bool:
        """Whether `every` epochs have passed since the last refresh, or none has happened."""
        last = int(self.epoch)
        return last < 0 or epoch - last >= self.every

    @torch.inference_mode(False)
    def refresh(self, new_prototypes: Tensor, epoch: int) -> None:
        """Perturb the old prototypes anew, given those of the current new model [C, D]."""
        perturbed = self.perturb(self.prototypes, new_prototypes.to(self.prototypes))
        self.perturbed = perturbed.detach()
        self.epoch.fill_(epoch)

    @torch.inference_mode(False)
    def replace(self, name: str, value: Tensor) -> None:
        """Hold a copy of `value` [C, D] as "prototypes" or as "perturbed", in the bank's dtype and place."""
        _checks.choice("name", name, ("prototypes", "perturbed"))
        _checks.matrix(name, value)
        held: Tensor = getattr(self, name)
        if value.shape != held.shape:
            raise ValueError(
                f"`{name}` must have the shape {list(held.shape)} of the bank: got {list(value.shape)}"
            )
        setattr(self, name, value.detach().to(held, copy=True))
