"""The one front of every search: native kernels or reference, and errors in the words of the caller.

An error names a row of a tensor. `names[s]` is what the caller calls the query and the keys of segment s;
`query_rows` [B] are the rows of the caller's query where only some of them are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from . import _checks, _native, _ops, reference
from ._types import Segment

Names = Sequence[tuple[str, str]]
_ERRORS = (_checks.NonFiniteError, _checks.ScoreOverflowError)
_NAMES: Names = (("query", "keys"),)


def _kernel(name: str, native: bool) -> Callable[..., Tensor]:
    if native:
        _checks.no_transforms(forward_mode=False)
    kernel: Callable[..., Tensor] = getattr(_ops if native else reference, name)
    return kernel


def _refuse(
    error: Exception, names: Names, query_rows: Tensor | None = None, keys: Tensor | None = None
) -> NoReturn:
    """Raise what a search met in the caller's words; of bad `keys` the first of them all."""
    if isinstance(error, _checks.ScoreOverflowError):
        row = error.row if query_rows is None else int(query_rows[error.row])
        _checks.refuse_overflow(row, names[0][0])
    assert isinstance(error, _checks.NonFiniteError)
    row = error.row
    if error.side == "query" and query_rows is not None:
        row = int(query_rows[row])
    elif error.side == "keys" and keys is not None:
        row = int((~keys.isfinite().all(1)).nonzero()[0])
    _checks.refuse_nonfinite(_checks.NonFiniteError(error.side, error.segment, row), names)


def refuse_nonfinite(query: Tensor, keys: Tensor, names: tuple[str, str]) -> None:
    """ValueError for the first row of `query`, then of `keys`, that holds NaN or inf."""
    try:
        reference.refuse_nonfinite(query, keys)
    except _checks.NonFiniteError as error:
        _refuse(error, (names,))


def topk(
    segments: Sequence[Segment],
    k: int,
    metric: str,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    native: bool,
    names: Names | None = _NAMES,
    report: bool = True,
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """Best k over one or more segments (`reference.topk`).

    Without `names` what a search met goes to the caller as it is.

    Without `report` a GPU is not waited for, and NaN or inf there goes unnoticed. `packed` is what `pack`
    made of the segments, on the CPU.
    """
    segments = [part._replace(query=part.query.detach(), keys=part.keys.detach()) for part in segments]
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
    except _ERRORS as error:
        if names is None:
            raise
        _refuse(error, names)


def pack(segment: Segment, metric: str, names: tuple[str, str]) -> Tensor:
    """The segment's keys in the form that the native search on the CPU reads (`_native.pack`)."""
    try:
        return _native.pack(segment.keys.detach(), segment.rows, metric)
    except _ERRORS as error:
        _refuse(error, (names,))


def pair_scores(
    query: Tensor,
    keys: Tensor,
    ids: Tensor,
    metric: str,
    *,
    native: bool,
    names: Names = _NAMES,
    query_rows: Tensor | None = None,
) -> Tensor:
    """Score of the pairs (i, ids[i, p]) (`reference.pair_scores`)."""
    kernel, query, keys = _kernel("pair_scores", native), query.detach(), keys.detach()
    try:
        found = kernel(query, keys, ids, metric)
        reference.refuse_overflow(found.isinf() & (ids >= 0))
        return found
    except _ERRORS as error:
        _refuse(error, names, query_rows, keys)


def all_scores(
    query: Tensor,
    keys: Tensor,
    ids: Tensor,
    metric: str,
    *,
    names: Names = _NAMES,
    query_rows: Tensor | None = None,
) -> Tensor:
    """Every score [B, N] of the reference, those of the keys `ids` [B, P] known to be numbers."""
    found = reference.scores(query, keys, metric)
    try:
        reference.refuse_overflow(found.gather(1, ids.clamp(min=0)).isinf() & (ids >= 0))
        return found
    except _ERRORS as error:
        _refuse(error, names, query_rows)


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
    names: Names = _NAMES,
    query_rows: Tensor | None = None,
) -> Tensor:
    """How many keys beat each threshold, per block of the walk (`reference.count_beats`)."""
    kernel, query, keys = _kernel("count_beats", native), query.detach(), keys.detach()
    try:
        return kernel(query, keys, rows, bounds, thresholds, threshold_ids, metric, exclude)
    except _ERRORS as error:
        _refuse(error, names, query_rows, keys)


def ranks(
    query: Tensor,
    keys: Tensor,
    ids: Tensor,
    metric: str,
    *,
    exclude: Tensor | None = None,
    native: bool,
    names: Names = _NAMES,
    query_rows: Tensor | None = None,
) -> Tensor:
    """How many keys beat each of the keys `ids` [B, P]; -1 where the id is -1."""
    score = pair_scores(query, keys, ids, metric, native=native, names=names, query_rows=query_rows)
    everything = torch.tensor([0, keys.shape[0]], dtype=torch.int64, device=ids.device)
    beaten_by = count_beats(
        query,
        keys,
        None,
        everything,
        score,
        ids,
        metric,
        exclude=exclude,
        native=native,
        names=names,
        query_rows=query_rows,
    )
    return beaten_by[:, :, 0].masked_fill(ids < 0, -1)
