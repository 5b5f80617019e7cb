"""The engine in plain PyTorch: the specification of what the native kernels compute.

Runs on every device and in float64, is differentiable (twice, and through torch.func), and holds
all B x N logits at once. `backend="reference"` selects it in every public function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._autocast import exactly
from ._types import Segment, SoftmaxStats


class _Product(torch.autograd.Function):
    """`a @ b`, forward and backward as written: torch's own gradient would be rounded under autocast."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with exactly(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        want_a, want_b = ctx.needs_input_grad
        again: Any = _Product.apply  # differentiable once more
        return again(grad, b.T) if want_a else None, again(a.T, grad) if want_b else None

    @staticmethod
    def jvp(ctx: Any, a_tangent: Tensor, b_tangent: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        with exactly(a):
            tangent: Tensor = a_tangent @ b + a @ b_tangent
        return tangent


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` that no autocast rounds, neither here nor in its backward pass."""
    if torch.compiler.is_compiling() or a.is_meta or not torch.is_autocast_enabled(a.device.type):
        with exactly(a):
            return a @ b
    found: Tensor = _Product.apply(a, b)  # type: ignore[no-untyped-call]
    return found


def logits(query: Tensor, keys: Tensor, scale: float | Tensor = 1.0, bias: Tensor | None = None) -> Tensor:
    """`z_ij = scale * <query_i, keys_j> + bias_j` [B, N], in float32 (float64 for float64 inputs)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    query, keys = _checks.savable(query), _checks.savable(keys)
    z = scale * _product(query.to(wide), keys.to(wide).T)
    return z if bias is None else z + bias


def same_label(query_labels: Tensor, key_labels: Tensor) -> Tensor:
    """Boolean [B, N]: equal labels; a negative label equals no label, itself included."""
    return (query_labels[:, None] == key_labels) & (query_labels[:, None] >= 0)


def positives_and_negatives(
    z: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive: Tensor | None,
    exclude: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Two boolean masks [B, N]: which keys are the positives of a row, and which are its negatives."""
    column = torch.arange(z.shape[1], dtype=torch.int64, device=z.device)
    same = torch.zeros_like(z, dtype=torch.bool)
    if query_labels is not None and key_labels is not None:
        same = same_label(query_labels, key_labels)
    pos = same if positive is None else column == positive[:, None]
    neg = ~(same | pos)
    if exclude is not None:
        included = column != exclude[:, None]
        pos, neg = pos & included, neg & included
    return pos, neg


def log_sum_exp(z: Tensor, members: Tensor) -> Tensor:
    """Log-sum-exp over each row's members [B]; an empty set gives -inf and a zero gradient, never NaN."""
    members = members & (z != -torch.inf)
    some = members.any(1)
    # An empty row reads constants instead of logits, so nothing that arrives can leave through it.
    filler = torch.where(some, -torch.inf, 0.0)[:, None].to(z.dtype)
    return torch.where(some, torch.where(members, z, filler).logsumexp(1), -torch.inf)


def log_add_exp(a: Tensor, b: Tensor) -> Tensor:
    """`torch.logaddexp`, with a zero gradient (not NaN) where both are -inf."""
    some = torch.maximum(a, b) != -torch.inf
    return torch.where(some, torch.logaddexp(torch.where(some, a, 0.0), b), -torch.inf)


def masked_stats(z: Tensor, pos: Tensor, neg: Tensor) -> SoftmaxStats:
    """The statistics of logits [B, N] for given sets of positives and negatives [B, N]; -inf never counts."""
    pos = pos & (z != -torch.inf)
    pos_sum = torch.where(pos, z, 0.0).sum(1)
    return SoftmaxStats(log_sum_exp(z, neg), log_sum_exp(z, pos), pos_sum, pos.sum(1))


def softmax_stats(
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
) -> SoftmaxStats:
    """Log-sum-exp of negatives and positives, sum and count of positives: `fastcompat.softmax_stats`."""
    z = logits(query, keys, scale, bias)
    for name, index in (("positive", positive), ("exclude", exclude)):
        _checks.in_range(name, index, keys.shape[0])
        if index is not None and not _checks.values_readable(index):
            bad = (index < -1) | (index >= keys.shape[0])
            z = torch.where(bad[:, None], torch.nan, z)
            if positive is index:
                positive = torch.where(bad, 0, index)
    return masked_stats(z, *positives_and_negatives(z, query_labels, key_labels, positive, exclude))


def scores(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """Score of every pair [B, N]: "cosine" (0 for a zero vector), "ip", "l2" (minus the squared distance).

    Computed in float64 and rounded to float32 once (kept for float64 inputs), so equal pairs get equal
    scores. "l2" is the sum of squared differences: it keeps the distance of vectors far from the origin.
    """
    q, k = query.detach().double(), keys.detach().double()
    s = _SCORES[metric](q, k, query.dtype == torch.float64)
    return s if query.dtype == torch.float64 else s.float()


def _inner_products(q: Tensor, k: Tensor, by_rows: bool) -> Tensor:
    # A matrix product may add the same pair differently at its edges; a row-wise sum never does.
    return _by_rows(lambda row: (row * k).sum(1), q, len(k)) if by_rows else q @ k.T


def _cosines(q: Tensor, k: Tensor, by_rows: bool) -> Tensor:
    q, k = _lifted(q), _lifted(k)
    square = ((x * x).sum(1) for x in (q, k))
    q_inverse, k_inverse = (torch.where(x > 0, x.rsqrt(), 0.0) for x in square)
    return _inner_products(q, k, by_rows) * q_inverse[:, None] * k_inverse


def _minus_squared_distances(q: Tensor, k: Tensor, _: bool) -> Tensor:
    return _by_rows(lambda row: -(row - k).square().sum(1), q, len(k))


# Scores [B, N] in float64; the third argument says whether equal pairs must get equal bits of float64.
_SCORES = {"cosine": _cosines, "ip": _inner_products, "l2": _minus_squared_distances}


def _by_rows(score: Callable[[Tensor], Tensor], query: Tensor, keys: int) -> Tensor:
    return torch.stack([score(row) for row in query]) if len(query) else query.new_empty(0, keys)


def _lifted(x: Tensor) -> Tensor:
    """Rows multiplied by powers of two that bring their largest numbers near 1: no square is out of range."""
    if x.shape[1] == 0:
        return x
    exponent = torch.frexp(x.abs().amax(1, keepdim=True)).exponent
    return torch.ldexp(torch.ldexp(x, -exponent // 2), -exponent - (-exponent // 2))


def _count(stop: int, device: torch.device) -> Tensor:
    return torch.arange(stop, dtype=torch.int64, device=device)


def refuse_nonfinite(query: Tensor, keys: Tensor, rows: Tensor | None = None, segment: int = 0) -> None:
    """Raise NonFiniteError for the first bad row among all query rows and the key rows that count."""
    if not _checks.eager() or query.is_meta:
        return
    numbers = _count(keys.shape[0], keys.device) if rows is None else rows.sort().values
    everyone = _count(query.shape[0], query.device)
    for side, value, read in (("query", query, everyone), ("keys", keys, numbers)):
        bad = ~value.detach()[read].isfinite().all(1)
        if bad.any():
            raise _checks.NonFiniteError(side, segment, int(read[bad][0]))


def refuse_overflow(beyond: Tensor) -> None:
    """Raise ScoreOverflowError for the first query with a score [B, ...] that is beyond the numbers."""
    if _checks.eager() and not beyond.is_meta and beyond.any():
        raise _checks.ScoreOverflowError(int(beyond.flatten(1).any(1).nonzero()[0]))


def topk(
    segments: Sequence[Segment],
    k: int,
    metric: str,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Best k scores and ids [B, k] over all segments; ties: smaller id first; missing: -inf and -1.

    An id is an item's number, by default its row number in its segment's keys; `key_labels` is indexed by id,
    and keys with the query's label are skipped, as is `exclude`.
    """
    found, numbers = [], []
    for number, part in enumerate(segments):
        refuse_nonfinite(part.query, part.keys, part.rows, number)
        rows = _count(part.keys.shape[0], part.keys.device) if part.rows is None else part.rows
        score = part.scale * scores(part.query, part.keys, metric)[:, rows] + part.offset
        if part.items is None:
            ids = rows
        else:
            counted = part.items[rows] >= 0
            score, ids = score[:, counted], part.items[rows][counted].long()
        found.append(score)
        numbers.append(ids)
    ids, order = torch.cat(numbers).sort()
    score = torch.cat(found, 1)[:, order]  # [B, M], by ascending id
    left_out = torch.zeros_like(score, dtype=torch.bool)
    if query_labels is not None and key_labels is not None:
        left_out |= same_label(query_labels, key_labels[ids])
    if exclude is not None:
        if segments[0].items is None:
            _checks.in_range("exclude", exclude, segments[0].keys.shape[0])
        left_out |= ids == exclude[:, None]
    beyond = score.isinf() & ~left_out
    score = score.masked_fill(left_out, -torch.inf)
    lost = beyond & ((score > 0) | (score.isfinite().sum(1, keepdim=True) < k))
    refuse_overflow(lost)
    best, place = score.sort(dim=1, descending=True, stable=True)
    best, best_ids = best[:, :k], ids[place[:, :k]]
    missing = (0, max(0, k - best.shape[1]))
    best, best_ids = F.pad(best, missing, value=-torch.inf), F.pad(best_ids, missing, value=-1)
    return best, best_ids.masked_fill(best == -torch.inf, -1)


def pair_scores(query: Tensor, keys: Tensor, ids: Tensor, metric: str) -> Tensor:
    """Score of the pairs (i, ids[i, p]) [B, P]; -inf where the id is -1."""
    used = ids.unique()  # type: ignore[no-untyped-call]
    refuse_nonfinite(query, keys, used[used >= 0])
    if keys.shape[0] == 0:
        dtype = torch.promote_types(query.dtype, torch.float32)
        return torch.full(ids.shape, -torch.inf, dtype=dtype, device=ids.device)
    return scores(query, keys, metric).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)


def count_beats(
    query: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    bounds: Tensor,
    thresholds: Tensor,
    threshold_ids: Tensor,
    metric: str,
    exclude: Tensor | None = None,
) -> Tensor:
    """How many keys beat each threshold, per block of the walk over `rows` (None: all): int64 [B, P, T].

    Block t is the walk's positions bounds[t] .. bounds[t + 1]. A key beats a threshold with a greater score,
    or with an equal score and a smaller id; the threshold's own key is compared like any other. `exclude`
    never counts; id -1 counts nothing.
    """
    order = _count(keys.shape[0], keys.device) if rows is None else rows
    first, last = int(bounds[0]), int(bounds[-1])
    refuse_nonfinite(query, keys, order[first:last])
    order, bounds = order[first:last], bounds - first
    score = scores(query, keys, metric)[:, order]  # [B, M]
    counted = torch.ones_like(score, dtype=torch.bool) if exclude is None else order != exclude[:, None]
    counts = threshold_ids.new_zeros(*threshold_ids.shape, bounds.shape[0] - 1)  # [B, P, T]
    for p in range(threshold_ids.shape[1]):
        own, bar = threshold_ids[:, p, None], thresholds[:, p, None]
        beats = (score > bar) | ((score == bar) & (order < own))
        beats &= counted & (own >= 0)
        walked = F.pad(beats.cumsum(1), (1, 0))  # [B, M + 1]
        counts[:, p] = walked[:, bounds[1:]] - walked[:, bounds[:-1]]
    return counts
