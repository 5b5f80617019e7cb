"""What the operators accept, so that no call of them reaches foreign memory.

The public functions check more, in the words of their callers. `_native` refuses tensors on several devices.
The numbers in `rows`, `ids`, `bounds` and the like are checked by the kernels on the CPU; on a GPU only the
caller knows them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._native import DTYPES, METRICS
from ._types import SoftmaxOperands


def _matrix(name: str, x: Tensor | None) -> tuple[int, int]:
    if x is None:
        raise TypeError(f"`{name}` must be a tensor: got None")
    shape = x.shape
    if len(shape) != 2 or x.dtype not in DTYPES:
        raise ValueError(
            f"`{name}` must be float32, bfloat16 or float16 with 2 dimensions: "
            f"got {x.dtype}, shape {list(shape)}"
        )
    return shape


def _fits(name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x is not None and (x.dtype != dtype or x.shape != shape):
        raise ValueError(f"`{name}` must be {dtype} {list(shape)}: got {x.dtype} {list(x.shape)}")


def _needs(name: str, x: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if x is None:
        raise TypeError(f"`{name}` must be a tensor: got None")
    _fits(name, x, dtype, shape)


def _together(query_labels: Tensor | None, key_labels: Tensor | None) -> None:
    if (query_labels is None) != (key_labels is None):
        raise ValueError("`query_labels` and `key_labels` must be given together")


def _metric(metric: str) -> None:
    if metric not in METRICS:
        raise ValueError(f"`metric` must be one of {METRICS}: got {metric!r}")


def _width(x: Tensor | None) -> int:
    return x.shape[-1] if x is not None and x.dim() else 0


def _softmax(problem: SoftmaxOperands) -> tuple[int, int, int]:
    rows, dim = _matrix("query", problem.query)
    count = _matrix("keys", problem.keys)[0]
    _fits("keys", problem.keys, problem.query.dtype, (count, dim))
    _together(problem.query_labels, problem.key_labels)
    _fits("scale_tensor", problem.scale_tensor, torch.float32, ())
    _fits("bias", problem.bias, torch.float32, (count,))
    _fits("query_labels", problem.query_labels, torch.int64, (rows,))
    _fits("key_labels", problem.key_labels, torch.int64, (count,))
    _fits("positive", problem.positive, torch.int64, (rows,))
    _fits("exclude", problem.exclude, torch.int64, (rows,))
    return rows, count, dim


def _softmax_grad(
    rows: int, neg_lse: Tensor | None, pos_lse: Tensor | None, grads: Sequence[Tensor | None]
) -> None:
    _needs("neg_lse", neg_lse, torch.float32, (rows,))
    _needs("pos_lse", pos_lse, torch.float32, (rows,))
    for name, x in zip(("grad_neg", "grad_pos", "grad_sum"), grads, strict=True):
        _fits(name, x, torch.float32, (rows,))


def softmax_stats(problem: SoftmaxOperands, *_: Any) -> None:
    """Operands of `fastcompat::softmax_stats`."""
    _softmax(problem)


def softmax_loss(problem: SoftmaxOperands, *_: Any) -> None:
    """Operands of `fastcompat::softmax_loss`."""
    _softmax(problem)


def softmax_query_grad(problem: SoftmaxOperands, *vectors: Tensor | None) -> None:
    """Operands of `fastcompat::softmax_query_grad`."""
    neg_lse, pos_lse, mean, *grads = vectors
    rows, _, dim = _softmax(problem)
    _softmax_grad(rows, neg_lse, pos_lse, grads)
    _needs("mean", mean, torch.float32, (rows, dim))


def softmax_key_grad(problem: SoftmaxOperands, *rest: Any) -> None:
    """Operands of `fastcompat::softmax_key_grad`."""
    neg_lse, pos_lse, *grads, _, _ = rest
    rows, _, _ = _softmax(problem)
    _softmax_grad(rows, neg_lse, pos_lse, grads)


def _segment(query: Tensor, keys: Tensor, rows: Tensor | None, count: int) -> None:
    _, dim = _matrix("query", query)
    _fits("query", query, query.dtype, (count, dim))
    _fits("keys", keys, query.dtype, (_matrix("keys", keys)[0], dim))
    if rows is not None:
        _fits("rows", rows, torch.int64, (rows.numel(),))


def topk(
    query: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    scale: Sequence[float],
    offset: Sequence[float],
    k: int,
    metric: str,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    exclude: Tensor | None,
    packed: Sequence[Tensor],
    report: bool = True,
    items: Sequence[Tensor] | None = None,
) -> None:
    """Operands of `fastcompat::topk`."""
    _metric(metric)
    if k < 0:
        raise ValueError(f"`k` must be at least 0: got {k}")
    count = len(query)
    lengths = {"keys": len(keys), "scale": len(scale), "offset": len(offset)}
    lengths |= {"rows": len(rows) or count, "packed": len(packed) or count}
    lengths["items"] = count if items is None else len(items)
    if not count or any(length != count for length in lengths.values()):
        raise ValueError(
            f"the lists must have one entry per segment, at least one: got {count} of `query`, {lengths}"
        )
    first = query[0]
    number, _ = _matrix("query", first)
    every: Sequence[Tensor | None] = rows or [None] * count
    for q, x, chosen in zip(query, keys, every, strict=True):
        _segment(q, x, chosen, number)
    for x in packed:
        _needs("packed", x, torch.float32, (x.numel(),))
    for x, numbers in zip(keys, items or (), strict=False):
        _needs("items", numbers, torch.int32, (x.shape[0],))
    _together(query_labels, key_labels)
    _fits("query_labels", query_labels, torch.int64, (number,))
    # An id is an item's number, by default its row number in its segment's keys, and indexes the labels.
    labelled = max(x.shape[0] for x in keys) if items is None else _width(key_labels)
    _fits("key_labels", key_labels, torch.int64, (labelled,))
    for numbers in items or ():
        if key_labels is not None and numbers.is_cpu and numbers.numel() and int(numbers.max()) >= labelled:
            raise ValueError(
                f"`items` must be below {labelled}, the length of `key_labels`: got {int(numbers.max())}"
            )
    _fits("exclude", exclude, torch.int64, (number,))


def pair_scores(query: Tensor, keys: Tensor, ids: Tensor, metric: str) -> None:
    """Operands of `fastcompat::pair_scores`."""
    _metric(metric)
    count, _ = _matrix("query", query)
    _segment(query, keys, None, count)
    _needs("ids", ids, torch.int64, (count, _width(ids)))


def count_beats(
    query: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    bounds: Tensor,
    thresholds: Tensor,
    threshold_ids: Tensor,
    metric: str,
    exclude: Tensor | None,
) -> None:
    """Operands of `fastcompat::count_beats`."""
    _metric(metric)
    count, _ = _matrix("query", query)
    _segment(query, keys, rows, count)
    _needs("bounds", bounds, torch.int64, (max(1, _width(bounds)),))
    _needs("thresholds", thresholds, torch.float32, (count, _width(thresholds)))
    _needs("threshold_ids", threshold_ids, torch.int64, (count, _width(thresholds)))
    _fits("exclude", exclude, torch.int64, (count,))
