"""What the losses share: temperature, targets, hard negatives, reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _search
from .._types import Segment, SoftmaxStats

POSITIVES = ("sum_in_log", "mean_out")


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
    """`matrix[target]` [B, D], an arbitrary row where a target is -1 or too large (to be replaced)."""
    if not matrix.shape[0]:
        return matrix.new_zeros(target.shape[0], matrix.shape[1])
    return matrix[target.clamp(0, matrix.shape[0] - 1)]


def contrastive_from_stats(stats: SoftmaxStats, positives: str, reduction: str) -> Tensor:
    """The contrastive loss as a function of row statistics; rows without positives are ignored."""
    counts = stats.pos_count > 0
    # In an ignored row -inf - -inf would be NaN, in its gradient too.
    pos = torch.where(counts, stats.pos_lse, 0.0)
    if positives == "sum_in_log":
        loss = log_odds_loss(stats.neg_lse, pos)
    else:
        loss = torch.logaddexp(stats.neg_lse, pos) - stats.pos_sum / stats.pos_count.clamp(min=1)
    return reduced(loss, counts, reduction)


def warn_without_positives(counts: Tensor) -> None:
    """Warn once where every row of a batch [B] is ignored: such a loss is 0 and teaches nothing."""
    if _checks.values_readable(counts) and len(counts) and not counts.any():
        _checks.warn_once(
            "no positive",
            "no row of this batch has a positive, so the loss is 0 with a zero gradient; sample several "
            "items of each class, or check the labels",
        )


def log_odds_loss(neg: Tensor, pos: Tensor) -> Tensor:
    """`logaddexp(neg, pos) - pos` without the cancellation."""
    return F.softplus(neg - pos, threshold=40.0)  # log(1 + e^-40) is 0 in float64 too


def reduced(loss: Tensor, counts: Tensor | None, reduction: str) -> Tensor:
    """Reduce [B] over the rows that count (None: all); no row at all gives 0."""
    if counts is None:
        return loss if reduction == "none" else loss.sum() / (max(len(loss), 1) if reduction == "mean" else 1)
    loss = torch.where(counts, loss, 0.0)
    if reduction == "none":
        warn_without_positives(counts)
        return loss
    total = loss.sum()
    if is_zero(total):
        warn_without_positives(counts)
    return total / counts.sum().clamp(min=1) if reduction == "mean" else total


def is_zero(loss: Tensor) -> bool:
    """Whether a loss is 0, as where every row is ignored; False where reading it would wait for a GPU."""
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
    # A search refuses NaN; a loss lets it through, so search finite copies and set NaN afterwards.
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
