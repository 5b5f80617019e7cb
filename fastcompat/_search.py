"""Search by the native kernels or by the reference; bad rows are reported under the caller's names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    names: Names | None = (("query", "keys"),),
    report: bool = True,
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Best k over one or more segments (`reference.topk`); `names[s]` is what the caller calls segment s
    (None: NonFiniteError goes to the caller as it is).

    Without `report` a GPU is not waited for, and NaN or inf there goes unnoticed. `packed` is what `pack`
    made of the segments, on the CPU.
    """
    segments = [p._replace(query=p.query.detach(), keys=p.keys.detach()) for p in segments]
    try:
        if not native:
            return reference.topk(segments, k, metric, query_labels, key_labels, exclude)
        query, keys, rows, scale, offset, items = map(list, zip(*segments, strict=True))
        its = None if items[0] is None else items
        _checks.no_transforms(forward_mode=False)
        sets = (query_labels, key_labels, exclude)
        found: tuple[Tensor, Tensor] = _ops.topk(
            query, keys, rows, scale, offset, k, metric, *sets, packed, report, its
        )
        return found
    except _checks.NonFiniteError as error:
        if names is None:
            raise
        _checks.refuse_nonfinite(error, names)
    except _checks.ScoreOverflowError as error:
        if names is None:
            raise
        _checks.refuse_overflow(error.row, names[0][0])


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
