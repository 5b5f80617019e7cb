"""What the losses share: temperature, normalisation, dtypes, hard negatives, reduction."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _search, _torch_hooks, reference
from .reference import Segment, SoftmaxStats

POSITIVES = ("sum_in_log", "mean_out")


def exactly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Forward or backward of an autograd function that runs as written under any autocast around it."""

    @functools.wraps(method)
    def run(ctx: Any, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _torch_hooks.autocast_anywhere():
            tensor = next((x for x in arguments if isinstance(x, Tensor)), None)
            with nullcontext() if tensor is None else reference.exactly(tensor):
                return method(ctx, *arguments)
        return method(ctx, *arguments)

    return run


def inverse_temperature(temperature: float | Tensor, name: str, beside: Tensor) -> float | Tensor:
    """The scale `1 / temperature` for the embeddings `beside`, called `name`."""
    return 1.0 / above_zero("temperature", temperature, name, beside)


def above_zero(name: str, value: float | Tensor, other_name: str, other: Tensor) -> float | Tensor:
    """A temperature or a scale above 0; a tensor's value is read where that costs no synchronisation."""
    value = _checks.scalar(name, value, other_name, other)
    if isinstance(value, Tensor):
        if _checks.values_readable(value) and not (number := value.item()) > 0:
            raise ValueError(
                f"`{name}` must be above 0: got {number}; to learn one, train its logarithm and pass "
                "log_value.exp(), or clamp it after each step"
            )
    elif not value > 0:
        raise ValueError(f"`{name}` must be above 0: got {value}")
    return value


def smallest_norm(dtype: torch.dtype, eps: float | None) -> float:
    """What rows of this type are divided by at least: `eps`, by default as in `F.normalize`.

    The gradient of a zero row is divided by it too, and float16 ends at 65,504.
    """
    if eps is None:
        return 1e-3 if dtype == torch.float16 else 1e-12
    if not eps > 0:
        raise ValueError(f"`eps` must be above 0: got {eps}")
    return eps


class UnitRows(NamedTuple):
    """`F.normalize` of rows, with what its gradient needs."""

    rows: Tensor  # [B, D]
    norm: Tensor  # [B, 1]
    length: Tensor  # [B, 1] what the rows were divided by

    @classmethod
    def of(cls, x: Tensor, eps: float) -> UnitRows:
        """The rows of `x` over their norms, or over `eps` where that is more."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        length = norm.clamp(min=eps)
        return cls(x / length, norm, length)

    def gradient(self, grad: Tensor) -> Tensor:
        """`(g - x^ <x^, g>) / |x|`, in five operators instead of twelve."""
        along = torch.linalg.vecdot(self.rows, grad, dim=1)[:, None] * (self.norm >= self.length)
        return torch.addcmul(grad, self.rows, along, value=-1).div_(self.length)


class _Normalise(torch.autograd.Function):
    @staticmethod
    @exactly
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        unit = UnitRows.of(x, eps)
        ctx.save_for_backward(x, *unit)
        ctx.eps = eps
        return unit.rows

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, *unit = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            (again,) = torch.autograd.grad(F.normalize(x, dim=1, eps=ctx.eps), x, grad, create_graph=True)
            return again, None
        return UnitRows(*unit).gradient(grad), None


def normalised(x: Tensor, eps: float | None = None) -> Tensor:
    """Rows of unit length (a zero row stays zero), computed and returned in float32 or wider.

    Rows shorter than `eps` are divided by it (`smallest_norm`).
    """
    eps = smallest_norm(x.dtype, eps)
    x = x if x.dtype == torch.float64 else x.float()
    if x.requires_grad and _checks.eager() and not _torch_hooks.forward_mode():
        unit: Tensor = _Normalise.apply(x, eps)  # type: ignore[no-untyped-call]
        return unit
    return F.normalize(x, dim=1, eps=eps)


def common_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """The promoted dtype; under autocast frozen keys follow the query."""
    if query.dtype == keys.dtype:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type) and not keys.requires_grad:
        return query.dtype
    return torch.promote_types(query.dtype, keys.dtype)


def matched(query: Tensor, keys: Tensor, normalize: bool, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Both sides in one dtype, and of unit length if asked; each is rounded at most once."""
    if query.dtype == keys.dtype and not normalize:
        return query, keys
    dtype = common_dtype(query, keys)
    if normalize:
        query, keys = normalised(query, eps), normalised(keys, eps)
    return query.to(dtype), keys.to(dtype)


def paired_products(a: Tensor, b: Tensor, normalize: bool, eps: float | None = None) -> Tensor:
    """`<a_i, b_i>` [B] in float32 or wider, of the same rounded values that `matched` gives to the engine."""
    a, b = (_checks.savable(x) for x in matched(a, b, normalize, eps))
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(1)


def frozen_bias(name: str, value: Tensor | None, weight_name: str, weight: Tensor) -> Tensor | None:
    """A frozen classifier's bias beside its `weight`: no gradient, float32 or wider."""
    if value is None:
        return None
    _checks.tensor(name, value)
    bias = value.detach().to(torch.promote_types(weight.dtype, torch.float32))
    _checks.bias(bias, weight, (name, weight_name))
    return bias


def class_targets(labels: Tensor, classes: int) -> Tensor:
    """The column of each row's class [B], -1 for a negative label; a label of `classes` or more raises."""
    _checks.warn_negative_labels("labels", labels)
    target = labels.clamp(min=-1)
    _checks.in_range("labels", target, classes)
    return target


def class_rows(matrix: Tensor, target: Tensor) -> Tensor:
    """`matrix[target]` [B, D], any row where a target is -1 or too large (the caller spoils those)."""
    if not matrix.shape[0]:
        return matrix.new_zeros(target.shape[0], matrix.shape[1])
    return matrix[target.clamp(0, matrix.shape[0] - 1)]


def contrastive_from_stats(stats: SoftmaxStats, positives: str, reduction: str) -> Tensor:
    """The contrastive loss as a function of row statistics; rows without positives take no part."""
    takes_part = stats.pos_count > 0
    # Of a row that takes no part -inf - -inf would be NaN, in its gradient too.
    pos = torch.where(takes_part, stats.pos_lse, 0.0)
    if positives == "sum_in_log":
        loss = log_odds_loss(stats.neg_lse, pos)
    else:
        loss = torch.logaddexp(stats.neg_lse, pos) - stats.pos_sum / stats.pos_count.clamp(min=1)
    return reduced(loss, takes_part, reduction)


def warn_without_positives(takes_part: Tensor) -> None:
    """Warn once where no row of a batch [B] takes part: such a loss is 0 and teaches nothing."""
    if _checks.values_readable(takes_part) and len(takes_part) and not takes_part.any():
        _checks.warn_once(
            "no positive",
            "no row of this batch has a positive, so the loss is 0 with a zero gradient; sample several "
            "items of each class, or check the labels",
        )


def log_odds_loss(neg: Tensor, pos: Tensor) -> Tensor:
    """`logaddexp(neg, pos) - pos` without the cancellation."""
    return F.softplus(neg - pos, threshold=40.0)  # log(1 + e^-40) is 0 in float64 too


def reduced(loss: Tensor, takes_part: Tensor | None, reduction: str) -> Tensor:
    """Reduce [B] over the rows that take part (None: all); no row at all gives 0."""
    if takes_part is None:
        return loss if reduction == "none" else loss.sum() / (max(len(loss), 1) if reduction == "mean" else 1)
    loss = torch.where(takes_part, loss, 0.0)
    if reduction == "none":
        warn_without_positives(takes_part)
        return loss
    total = loss.sum()
    if is_zero(total):
        warn_without_positives(takes_part)
    return total / takes_part.sum().clamp(min=1) if reduction == "mean" else total


def is_zero(loss: Tensor) -> bool:
    """Whether a loss is 0, as it is where no row takes part; False where reading it would wait for a GPU."""
    return _checks.values_readable(loss) and not loss


def hardest_logits(
    native: bool,
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    labels: Tensor,
    key_labels: Tensor,
    key_index: Tensor | None,
    k: int,
) -> Tensor:
    """The logits of each row's k hardest negatives [B, k], -inf where there are fewer."""
    # A search refuses NaN; a loss lets it through, so search finite copies and spoil the result afterwards.
    finite = [torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0) for x in (query, keys)]
    _, ids = _search.topk(
        [Segment(finite[0], finite[1])],
        min(k, keys.shape[0]),
        "ip",
        query_labels=labels,
        key_labels=key_labels,
        exclude=key_index,
        native=native,
        report=False,
    )
    wide = torch.promote_types(query.dtype, torch.float32)
    picked = keys[ids.clamp(min=0)]  # [B, k, D]
    z = scale * (_checks.savable(query).to(wide)[:, None] * picked.to(wide)).sum(2)
    z = torch.where(ids < 0, -torch.inf, z)
    return torch.where(keys.detach().isfinite().all(), z, torch.nan)
