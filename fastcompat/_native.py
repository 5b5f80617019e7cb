"""The only importer of the native module: tensors become pointers, sizes and strides here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import METRICS, NATIVE_DTYPES, NonFiniteError

try:
    from . import _C  # type: ignore[attr-defined,unused-ignore]
except ImportError as error:
    raise ImportError(
        "fastcompat's native module is not built here. Install the package with `pip install .` "
        f"and import it from outside the source folder. ({error})"
    ) from error

__all__ = ["NonFiniteError", "build_info", "set_simd", "simd", "simd_levels"]

_DTYPE_CODES = {dtype: code for code, dtype in enumerate(NATIVE_DTYPES)}


def simd_levels() -> list[str]:
    """Instruction sets that are built in and usable on this machine, slowest first."""
    return list(_C.simd_levels())


def simd() -> str:
    """The instruction set in use."""
    return str(_C.simd())


def set_simd(name: str) -> None:
    """Use this instruction set from now on; ValueError where it cannot run."""
    _C.set_simd(name)


def build_info() -> dict[str, Any]:
    """What was built and what runs.

    Keys: version, compiler, cuda (None or the version), cuda_archs, simd_built (instruction sets in the
    module), simd_usable (those this machine can run), simd (the one in use), threads.
    """
    build = dict(_C.build())
    known = ("version", "compiler", "cuda", "cuda_archs", "simd_built")
    return {name: build[name] for name in known} | {
        "simd_usable": simd_levels(),
        "simd": simd(),
        "threads": torch.get_num_threads(),
    }


class _Call:
    """Turns tensors into pointers and keeps the contiguous copies alive until the kernel has returned."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def flat(self, x: Tensor | None) -> int:
        if x is None:
            return 0
        if not x.is_contiguous():
            x = x.contiguous()
            self.kept.append(x)
        return x.data_ptr()

    def rows(self, x: Tensor) -> Tensor:
        # The kernels take any row stride, but neighbours within a row must be neighbours in memory.
        if x.stride(1) != 1 and x.shape[1] > 1:
            x = x.contiguous()
            self.kept.append(x)
        return x

    def problem(self, arguments: Sequence[Any]) -> tuple[Any, ...]:
        """The nine arguments that describe a softmax problem, in the order of the operators' schemas."""
        query, keys, scale, scale_tensor, *vectors = arguments
        query, keys = self.rows(query), self.rows(keys)
        if scale_tensor is not None:
            scale *= scale_tensor.item()
        return (
            query.data_ptr(),
            keys.data_ptr(),
            _DTYPE_CODES[query.dtype],
            query.shape[0],
            keys.shape[0],
            query.shape[1],
            query.stride(0),
            keys.stride(0),
            scale,
            *map(self.flat, vectors),  # bias, query_labels, key_labels, positive, exclude
        )

    def segment(
        self, query: Tensor, keys: Tensor, rows: Tensor | None, scale: float = 1.0, offset: float = 0.0
    ) -> tuple[Any, ...]:
        query, keys = self.rows(query), self.rows(keys)
        return (
            query.data_ptr(),
            keys.data_ptr(),
            _DTYPE_CODES[query.dtype],
            query.shape[1],
            query.stride(0),
            keys.stride(0),
            keys.shape[0],
            self.flat(rows),
            keys.shape[0] if rows is None else rows.shape[0],
            scale,
            offset,
        )


def _search(kernel: Callable[..., None], *arguments: Any) -> None:
    try:
        kernel(*arguments, torch.get_num_threads())
    except _C.NonFinite as error:
        raise NonFiniteError(*error.args) from None


def softmax_stats(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op `fastcompat::softmax_stats` on the CPU."""
    *problem, want_mean = arguments
    query = problem[0]
    call = _Call()
    rows, dim = query.shape
    neg_lse, pos_lse, pos_sum = (torch.empty(rows, dtype=torch.float32) for _ in range(3))
    pos_count = torch.empty(rows, dtype=torch.int64)
    mean = torch.empty((rows if want_mean else 0, dim), dtype=torch.float32)
    _C.softmax_stats(
        call.problem(problem),
        want_mean,
        neg_lse.data_ptr(),
        pos_lse.data_ptr(),
        pos_sum.data_ptr(),
        pos_count.data_ptr(),
        mean.data_ptr(),
        torch.get_num_threads(),
    )
    return neg_lse, pos_lse, pos_sum, pos_count, mean


def softmax_query_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::softmax_query_grad` on the CPU."""
    problem, vectors = arguments[:9], arguments[9:]  # neg_lse, pos_lse, mean, three gradients
    query = problem[0]
    call = _Call()
    dquery = torch.empty(query.shape, dtype=query.dtype)
    dscale = torch.empty(query.shape[0], dtype=torch.float32)
    _C.softmax_query_grad(
        call.problem(problem),
        *map(call.flat, vectors),
        dquery.data_ptr(),
        dscale.data_ptr(),
        torch.get_num_threads(),
    )
    return dquery, dscale


def softmax_key_grad(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::softmax_key_grad` on the CPU."""
    problem, vectors, (want_keys, want_bias) = arguments[:9], arguments[9:-2], arguments[-2:]
    keys = problem[1]
    call = _Call()
    rows, dim = keys.shape
    dkeys = torch.empty((rows if want_keys else 0, dim), dtype=keys.dtype)
    dbias = torch.empty(rows if want_bias else 0, dtype=torch.float32)
    _C.softmax_key_grad(
        call.problem(problem),
        *map(call.flat, vectors),  # neg_lse, pos_lse, three gradients
        dkeys.data_ptr() if want_keys else 0,
        dbias.data_ptr() if want_bias else 0,
        torch.get_num_threads(),
    )
    return dkeys, dbias


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
) -> tuple[Tensor, Tensor]:
    """The op `fastcompat::topk` on the CPU."""
    call = _Call()
    every: Sequence[Tensor | None] = rows or [None]
    segments = [call.segment(*part) for part in zip(query, keys, every, scale, offset, strict=True)]
    count = query[0].shape[0]
    scores = torch.empty((count, k), dtype=torch.float32)
    ids = torch.empty((count, k), dtype=torch.int64)
    _search(
        _C.topk,
        segments,
        k,
        METRICS.index(metric),
        count,
        call.flat(query_labels),
        call.flat(key_labels),
        call.flat(exclude),
        scores.data_ptr(),
        ids.data_ptr(),
    )
    return scores, ids


def pair_scores(query: Tensor, keys: Tensor, ids: Tensor, metric: str) -> Tensor:
    """The op `fastcompat::pair_scores` on the CPU."""
    call = _Call()
    out = torch.empty(ids.shape, dtype=torch.float32)
    _search(
        _C.pair_scores,
        call.segment(query, keys, None),
        METRICS.index(metric),
        query.shape[0],
        call.flat(ids),
        ids.shape[1],
        out.data_ptr(),
    )
    return out


def count_beats(
    query: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    bounds: Tensor,
    thresholds: Tensor,
    threshold_ids: Tensor,
    metric: str,
    exclude: Tensor | None,
) -> Tensor:
    """The op `fastcompat::count_beats` on the CPU."""
    call = _Call()
    count, targets = threshold_ids.shape
    blocks = bounds.shape[0] - 1
    out = torch.empty((count, targets, blocks), dtype=torch.int64)
    _search(
        _C.count_beats,
        call.segment(query, keys, rows),
        METRICS.index(metric),
        count,
        call.flat(bounds),
        blocks,
        call.flat(thresholds),
        call.flat(threshold_ids),
        targets,
        call.flat(exclude),
        out.data_ptr(),
    )
    return out
