"""Search by queries of a wider dtype than the keys have, such as float32 queries in a float16 store.

The keys are widened block by block, so that a memory-mapped gallery needs no second copy in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _search
from ._types import Segment

BLOCK = 2**24  # numbers of a block of keys in the wider dtype (64 MiB of float32)


def topk(
    parts: Sequence[Segment],
    k: int,
    metric: str,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    exclude: Tensor | None = None,
    native: bool,
    names: _search.Names = (("query", "keys"),),
    packed: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor]:
    """`_search.topk` of segments whose keys may be narrower than their queries."""
    if all(part.keys.dtype == part.query.dtype for part in parts):
        return _search.topk(
            parts,
            k,
            metric,
            query_labels=query_labels,
            key_labels=key_labels,
            exclude=exclude,
            native=native,
            names=names,
            packed=packed,
        )
    count = len(parts[0].keys)
    step = max(1, BLOCK // max(1, *(part.keys.shape[1] for part in parts)))
    best: list[tuple[Tensor, Tensor]] = []
    for first in range(0, max(count, 1), step):
        stop = min(first + step, count)
        left_out = exclude
        if exclude is not None:
            left_out = torch.where((exclude >= first) & (exclude < stop), exclude - first, -1)
        scores, ids = _search.topk(
            [_block(part, s, first, stop, names) for s, part in enumerate(parts)],
            k,
            metric,
            query_labels=query_labels,
            key_labels=None if key_labels is None else key_labels[first:stop],
            exclude=left_out,
            native=native,
            names=names,
        )
        best.append((scores, torch.where(ids < 0, -1, ids + first)))
        # Earlier blocks hold the smaller ids: a stable sort keeps them in front where scores are equal.
        scores, ids = (torch.cat(each, 1) for each in zip(*best, strict=True))
        scores, place = scores.sort(dim=1, descending=True, stable=True)
        best = [(scores[:, :k], ids.gather(1, place)[:, :k])]
    return best[0]


def _block(part: Segment, segment: int, first: int, stop: int, names: _search.Names) -> Segment:
    """The items `first` to `stop` of a segment, numbered from 0, in the dtype of the queries."""
    rows = part.rows
    if rows is not None:
        rows = rows[(rows >= first) & (rows < stop)] - first
    keys = part.keys[first:stop].detach().to(part.query.dtype)
    bad = ~(keys if rows is None else keys[rows]).isfinite().all(1)
    if bad.any():  # here, where the row's number in the whole gallery is known
        row = int(bad.nonzero()[0])
        row = first + (row if rows is None else int(rows[row]))
        _checks.refuse_nonfinite(_checks.NonFiniteError("keys", segment, row), names)
    return part._replace(keys=keys, rows=rows)
