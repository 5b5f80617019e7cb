"""Search by the native kernels or by the reference; bad rows are reported under the caller's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import _checks, _native, _ops, reference
from .reference import Segment

Names = Sequence[tuple[str, str]]


def _kernel(name: str, native: bool) -> Callable[..., Tensor]:
    if native:
        _checks.no_transforms(forward_mode=False)
    kernel: Callable[..., Tensor] = getattr(_ops if native else reference, name)
    return kernel


def topk(
    segments: Sequence[Segment],
    k: int,
    metric: str,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    native: bool,
    names: Names = (("query", "keys"),),
    report: bool = True,
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Best k over one or more segments (`reference.topk`); `names[s]` is what the caller calls segment s.

    Without `report` a GPU is not waited for, and NaN or inf there goes unnoticed. `packed` is what `pack`
    made of the segments, on the CPU.
    """
    segments = [Segment(p.query.detach(), p.keys.detach(), p.rows, p.scale, p.offset) for p in segments]
    try:
        if not native:
            return reference.topk(segments, k, metric, query_labels, key_labels, exclude)
        query, keys, rows, scale, offset = map(list, zip(*segments, strict=True))
        chosen = [part for part in rows if part is not None]
        own = None
        if any(isinstance(x, Tensor) for x in (*scale, *offset)):
            both = zip(scale, offset, strict=True)
            own = torch.stack([affine(*numbers, query[0]) for numbers in both])  # [S, 2, B]
            scale, offset = [1.0] * len(query), [0.0] * len(query)
        _checks.no_transforms(forward_mode=False)
        sets = (query_labels, key_labels, exclude)
        found: tuple[Tensor, Tensor] = _ops.topk(
            query, keys, chosen, scale, offset, k, metric, *sets, packed, report, own
        )
        return found
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, names)
    except _checks.ScoreOverflowError as error:
        _checks.refuse_overflow(error.row, names[0][0])


def affine(scale: float | Tensor, offset: float | Tensor, query: Tensor) -> Tensor:
    """Scale and offset of every query, float32 [2, B], from numbers or vectors."""
    count = len(query)
    vectors = (
        torch.as_tensor(x, dtype=torch.float32, device=query.device).expand(count) for x in (scale, offset)
    )
    return torch.stack(list(vectors))


def pack(segment: Segment, metric: str, names: tuple[str, str]) -> Tensor:
    """The segment's keys as the native search on the CPU wants them (`_native.pack`)."""
    try:
        return _native.pack(segment.keys.detach(), segment.rows, metric)
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, (names,))


def pair_scores(
    query: Tensor,
    keys: Tensor,
    ids: Tensor,
    metric: str,
    *,
    native: bool,
    names: Names = (("query", "keys"),),
) -> Tensor:
    """Score of the pairs (i, ids[i, p]) (`reference.pair_scores`)."""
    kernel = _kernel("pair_scores", native)
    try:
        found = kernel(query.detach(), keys.detach(), ids, metric)
        reference.refuse_overflow(found.isinf() & (ids >= 0))
        return found
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, names)
    except _checks.ScoreOverflowError as error:
        _checks.refuse_overflow(error.row, names[0][0])


def count_beats(
    query: Tensor,
    keys: Tensor,
    rows: Tensor | None,
    bounds: Tensor,
    thresholds: Tensor,
    threshold_ids: Tensor,
    metric: str,
    *,
    exclude: Tensor | None = None,
    native: bool,
    names: Names = (("query", "keys"),),
) -> Tensor:
    """How many keys beat each threshold, per block of the walk (`reference.count_beats`)."""
    kernel = _kernel("count_beats", native)
    try:
        return kernel(query.detach(), keys.detach(), rows, bounds, thresholds, threshold_ids, metric, exclude)
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, names)
