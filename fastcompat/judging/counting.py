"""By whom a score is beaten, read off sorted scores: what the kernels count, where sorting is quicker."""

from __future__ import annotations

import torch
from torch import Tensor

# Before every key of an item.
_FIRST = -(2**63)


def _keys(scores: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that rise with the rank: by float32 score, best first, then by id."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 makes one of the two zeros
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ((~rising).to(torch.int64) << 32) | ids


def sort(x: Tensor) -> Tensor:
    """`x` sorted along its last dimension. NumPy's sort uses the vector units of the processor."""
    if not x.is_cpu:
        return x.sort(-1).values
    x = x.contiguous().clone()
    x.numpy().sort(axis=-1)
    return x


def beaten_by(
    scores: Tensor, items: Tensor, block_of: Tensor, blocks: int, thresholds: Tensor, ids: Tensor
) -> Tensor:
    """How many items of each block beat each threshold, by one sort: int64 [B, P, blocks].

    Args:
        scores: float32 [B, M].
        items: int64 [B, M], their ids (-1: does not count).
        block_of: int64 [N], each item's block (`blocks`: does not count).
        blocks: how many blocks there are.
        thresholds: float32 [B, P].
        ids: int64 [B, P], the thresholds' own ids: of equal scores the smaller id beats (-1: 0 counts).
    """
    sorted_keys = sort(_keys(scores, items.clamp(min=0)).masked_fill_(items < 0, 2**63 - 1))  # [B, M]
    bars, back = _keys(thresholds, ids.clamp(min=0)).masked_fill_(ids < 0, _FIRST).sort(1)  # [B, P]
    block = block_of[(sorted_keys & 0xFFFFFFFF).clamp_(max=len(block_of) - 1)]  # [B, M]
    block.masked_fill_(sorted_keys == 2**63 - 1, blocks)
    places = torch.searchsorted(sorted_keys, bars)  # [B, P], how many keys stand before each bar
    rows, width = bars.shape[0], bars.shape[1]
    # Interval i of a row holds the keys behind i bars; a histogram over (row, interval, block).
    marks = torch.zeros(rows, sorted_keys.shape[1] + 1, dtype=torch.int64, device=bars.device)
    marks.scatter_add_(1, places, torch.ones_like(places))
    interval = marks[:, :-1].cumsum_(1)  # [B, M]
    row = torch.arange(rows, dtype=torch.int64, device=bars.device)[:, None]
    cell = ((row * (width + 1) + interval) * (blocks + 1) + block).flatten()
    counts = torch.bincount(cell, minlength=rows * (width + 1) * (blocks + 1))
    before = counts.view(rows, width + 1, blocks + 1)[:, :width, :blocks].cumsum(1)  # [B, P, blocks]
    return torch.empty_like(before).scatter_(1, back[..., None].expand_as(before), before)


def mixed_ranks(
    old: Tensor, new: Tensor, ids: Tensor, exclude: Tensor | None, turn: Tensor, cuts: Tensor
) -> Tensor:
    """Ranks of `ids` in every state of a backfill, from one sort of all scores: int64 [B, T, P].

    Both scores of every item are sorted together; in a state one of the two is live, and an item's rank is
    the number of live entries before its own.

    Args:
        old: float32 [B, N], scores in the old space.
        new: float32 [B, N], scores in the new space.
        ids: int64 [B, P], the items whose ranks are asked for (-1: none, rank -1).
        exclude: int64 [B, E], items that are not ranked (-1: none).
        turn: int64 [N], each item's place in the backfill order.
        cuts: int64 [T], how many items are backfilled in each state.
    """
    rows, count = old.shape
    doubled = 2 * torch.arange(count, dtype=torch.int64, device=old.device)
    low = sort(torch.cat([_keys(old, doubled), _keys(new, doubled + 1)], 1)) & 0xFFFFFFFF  # [B, 2N]
    item, is_new = low >> 1, (low & 1).bool()
    moved_at = turn[item]  # [B, 2N]
    shown = None
    if exclude is not None:
        shown = torch.ones(rows, count + 1, dtype=torch.bool, device=old.device)
        shown = shown.scatter_(1, exclude.masked_fill(exclude < 0, count), False).gather(1, item)
    column = torch.full((rows, count + 1), -1, dtype=torch.int64, device=old.device)
    numbers = torch.arange(ids.shape[1], dtype=torch.int64, device=old.device).expand_as(ids)
    column.scatter_(1, ids.masked_fill(ids < 0, count), numbers)
    column = column[:, :-1].gather(1, item)
    row, place = (column >= 0).nonzero().unbind(1)
    column = column[row, place]
    ranks = torch.full((rows, len(cuts), ids.shape[1]), -1, dtype=torch.int64, device=old.device)
    for state, cut in enumerate(cuts.tolist()):
        live = (moved_at < cut) == is_new
        if shown is not None:
            live &= shown
        before = live.cumsum(1, dtype=torch.int32)[row, place] - 1
        own = live[row, place]
        ranks[row[own], state, column[own]] = before[own].long()
    return ranks
