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


def _softmax(arguments: Sequence[Any]) -> tuple[int, int, int]:
    query, keys, _, scale, bias, query_labels, key_labels, positive, exclude = arguments[:9]
    rows, dim = _matrix("query", query)
    count = _matrix("keys", keys)[0]
    _fits("keys", keys, query.dtype, (count, dim))
    if scale is not None:
        _fits("scale_tensor", scale, torch.float32, ())
    if bias is not None:
        _fits("bias", bias, torch.float32, (count,))
    if query_labels is not None or key_labels is not None:
        _together(query_labels, key_labels)
        _fits("query_labels", query_labels, torch.int64, (rows,))
        _fits("key_labels", key_labels, torch.int64, (count,))
    if positive is not None:
        _fits("positive", positive, torch.int64, (rows,))
    if exclude is not None:
        _fits("exclude", exclude, torch.int64, (rows,))
    return rows, count, dim


def _softmax_grad(rows: int, vectors: Sequence[Tensor | None]) -> None:
    for name, x in zip(("neg_lse", "pos_lse"), vectors, strict=False):
        _needs(name, x, torch.float32, (rows,))
    for name, x in zip(("grad_neg", "grad_pos", "grad_sum"), vectors[-3:], strict=True):
        _fits(name, x, torch.float32, (rows,))


def softmax_stats(*arguments: Any) -> None:
    """Operands of `fastcompat::softmax_stats`."""
    _softmax(arguments)


def softmax_loss(*arguments: Any) -> None:
    """Operands of `fastcompat::softmax_loss`."""
    _softmax(arguments)


def softmax_query_grad(*arguments: Any) -> None:
    """Operands of `fastcompat::softmax_query_grad`."""
    rows, _, dim = _softmax(arguments)
    _softmax_grad(rows, arguments[9:])
    _needs("mean", arguments[11], torch.float32, (rows, dim))


def softmax_key_grad(*arguments: Any) -> None:
    """Operands of `fastcompat::softmax_key_grad`."""
    rows, _, _ = _softmax(arguments)
    _softmax_grad(rows, arguments[9:-2])


def _segment(query: Tensor, keys: Tensor, rows: Tensor | None, count: int) -> None:
    _, dim = _matrix("query", query)
    _fits("query", query, query.dtype, (count, dim))
    _fits("keys", keys, query.dtype, (_matrix("keys", keys)[0], dim))
    if rows is not None:
        _fits("rows", rows, torch.int64, (rows.numel(),))


def topk(
    query: Sequence[Tensor],
    keys: Sequence[Tensor],
    rows: Sequence[Tensor],
    scale: Sequence[float],
    offset: Sequence[float],
    k: int,
    metric: str,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    exclude: Tensor | None,
    packed: Sequence[Tensor],
    report: bool = True,
    affine: Tensor | None = None,
) -> None:
    """Operands of `fastcompat::topk`."""
    _metric(metric)
    if k < 0:
        raise ValueError(f"`k` must be at least 0: got {k}")
    count = len(query)
    lengths = {"keys": len(keys), "scale": len(scale), "offset": len(offset)}
    lengths |= {"rows": len(rows) or count, "packed": len(packed) or count}
    if not count or any(length != count for length in lengths.values()):
        raise ValueError(
            f"the lists must have one entry per segment, at least one: got {count} of `query`, {lengths}"
        )
    first = query[0]
    number, _ = _matrix("query", first)
    every: Sequence[Tensor | None] = rows or [None] * count
    for q, x, chosen in zip(query, keys, every, strict=True):
        _segment(q, x, chosen, number)
    _fits("affine", affine, torch.float32, (count, 2, number))
    for x in packed:
        _needs("packed", x, torch.float32, (x.numel(),))
    _together(query_labels, key_labels)
    _fits("query_labels", query_labels, torch.int64, (number,))
    # An id is a row number of its segment's keys and indexes the labels.
    _fits("key_labels", key_labels, torch.int64, (max(x.shape[0] for x in keys),))
    _fits("exclude", exclude, torch.int64, (number,))


def pair_scores(query: Tensor, keys: Tensor, ids: Tensor, metric: str, affine: Tensor | None = None) -> None:
    """Operands of `fastcompat::pair_scores`."""
    _metric(metric)
    count, _ = _matrix("query", query)
    _segment(query, keys, None, count)
    _fits("affine", affine, torch.float32, (2, count))
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
    affine: Tensor | None = None,
) -> None:
    """Operands of `fastcompat::count_beats`."""
    _metric(metric)
    count, _ = _matrix("query", query)
    _segment(query, keys, rows, count)
    _fits("affine", affine, torch.float32, (2, count))
    _needs("bounds", bounds, torch.int64, (max(1, _width(bounds)),))
    _needs("thresholds", thresholds, torch.float32, (count, _width(thresholds)))
    _needs("threshold_ids", threshold_ids, torch.int64, (count, _width(thresholds)))
    _fits("exclude", exclude, torch.int64, (count,))
