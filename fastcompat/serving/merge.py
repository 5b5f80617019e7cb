"""One ranked list out of the results of several searches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _inputs
from .._types import Array, ArrayLike, Backend

Method = Literal["score", "rrf", "zscore", "minmax"]
METHODS = ("score", "rrf", "zscore", "minmax")
RRF_CONSTANT = 60


def merge_topk(
    results: Sequence[tuple[Array, ArrayLike]], k: int, *, method: Method = "score", backend: Backend = "auto"
) -> tuple[Array, Array]:
    """The best k items of several result lists of the same queries: shards, engines, embedding spaces.

    The merged score of an item, from its score s in a list and its place in it (1 = first filled slot)::

        "score"    s as given: scores of one kind, such as the shards of a gallery
        "rrf"      sum over the lists that hold the item of 1 / (60 + place)
        "zscore"   (s - mean) / standard deviation, of the query's filled slots in that list
        "minmax"   (s - min) / (max - min), of the query's filled slots in that list

    An item in several lists counts once: with its best merged score, or with the sum for "rrf" (there an
    item that one list names twice counts in it with its better place). Where all scores of a query in a list
    are equal, "zscore" gives 0 and "minmax" 1. Higher is better and every list is best first; "rrf" reads
    places alone, so distances will do there: negate them for the others. Computed in float64.

    Source of "rrf": Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion outperforms Condorcet and
    individual Rank Learning Methods" (SIGIR 2009; reconstructed from the paper's text).

    Args:
        results: list of (scores [B, k_i] of a floating dtype, ids [B, k_i] of an integer dtype below 2^63),
            best first, from any engine; id -1 marks an empty slot, whose score is not read. All of them
            [k_i] for a single query.
        k: how many items to return.
        method: "score", "rrf", "zscore" or "minmax".
        backend: "auto" or "reference": plain PyTorch in both cases.

    Returns:
        scores [B, k], float32 (float64 if a list has float64 scores), and ids int64 [B, k], best first; of
        two equal scores the smaller id first; score -inf and id -1 where there are fewer than k items. [k]
        for a single query. Tensors if the first scores are one, else NumPy arrays.

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in a filled slot, naming the first; a
            list that is not best first (but for "rrf").
    """
    lists, single = _checked(results)
    k = _checks.positive_int("k", k)
    _checks.choice("method", method, METHODS)
    _checks.no_kernel(backend, "`merge_topk`")
    if method != "rrf":
        _refuse_unsorted(lists)
    dtype = torch.float64 if any(s.dtype == torch.float64 for s, _ in lists) else torch.float32

    values = [_merged_scores(s, ids, method) for s, ids in lists]  # each [B, k_i]
    by_id, slot = torch.cat([ids for _, ids in lists], 1).sort(1)  # [B, M]
    # Items are numbered by ascending id within a query: a stable sort of their scores then breaks ties by id.
    item = F.pad((by_id[:, 1:] != by_id[:, :-1]).cumsum(1), (1, 0))
    item_of_slot = torch.empty_like(slot).scatter_(1, slot, item)
    item_id = torch.full_like(by_id, -1).scatter_(1, item, by_id)
    total = torch.zeros(by_id.shape, dtype=torch.float64, device=by_id.device)
    if method == "rrf":
        first = 0
        for value in values:
            at = item_of_slot[:, first : first + value.shape[1]]
            first += value.shape[1]
            total += torch.zeros_like(total).scatter_reduce_(1, at, value, "amax")
    else:
        total.scatter_reduce_(1, item_of_slot, torch.cat(values, 1), "amax", include_self=False)
    if method != "score":
        total = total.float()  # what ties by its formula ties again, whatever way the rounding went
    best = total.to(dtype).masked_fill(item_id == -1, -torch.inf)
    scores, place = best.sort(dim=1, descending=True, stable=True)
    missing = (0, max(0, k - scores.shape[1]))
    scores = F.pad(scores[:, :k], missing, value=-torch.inf)
    ids = F.pad(item_id.gather(1, place)[:, :k], missing, value=-1)
    if single:
        scores, ids = scores[0], ids[0]
    merged: tuple[Array, Array] = _checks.like_input((scores, ids), results[0][0])
    return merged


def _merged_scores(scores: Tensor, ids: Tensor, method: str) -> Tensor:
    """What each slot [B, k_i] adds to its item: float64, 0 or -inf where it is empty."""
    filled, s = ids != -1, scores.double()
    if method == "rrf":
        return torch.where(filled, 1 / (RRF_CONSTANT + filled.cumsum(1)).double(), 0.0)
    low, high = (s.masked_fill(~filled, end) for end in (torch.inf, -torch.inf))
    if method == "score":
        return high
    least, most = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    if method == "minmax":
        s = torch.where(most > least, (s - least) / (most - least), 1.0)
    else:
        count = filled.sum(1, keepdim=True)
        mean = torch.where(filled, s, 0).sum(1, keepdim=True) / count
        variance = torch.where(filled, (s - mean) ** 2, 0).sum(1, keepdim=True) / count
        s = torch.where(most > least, (s - mean) / variance.sqrt(), 0.0)
    return s.masked_fill(~filled, -torch.inf)


def _checked(results: Any) -> tuple[list[tuple[Tensor, Tensor]], bool]:
    """The lists [B, k_i], each with a spare empty slot, and whether they are of a single query [k_i]."""
    if not isinstance(results, (list, tuple)):
        raise TypeError(f"`results` must be a list of pairs (scores, ids): got {type(results).__name__}")
    if not results:
        raise ValueError("`results` must hold at least one pair (scores, ids): got none")
    lists: list[tuple[Tensor, Tensor]] = []
    single = False
    for i, pair in enumerate(results):
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise TypeError(f"`results[{i}]` must be a pair (scores, ids): got {type(pair).__name__}")
        names = f"results[{i}][0]", f"results[{i}][1]"
        scores = _inputs.vectors(names[0], pair[0])
        ids = _inputs.beside(_inputs.whole(names[1], pair[1], "ids"), pair[1], scores)
        single = scores.dim() == 1 if i == 0 else single
        if ids.shape != scores.shape:
            raise ValueError(
                f"`{names[1]}` must have the shape of `{names[0]}`: "
                f"got {list(ids.shape)} and {list(scores.shape)}"
            )
        if scores.dim() != (1 if single else 2):
            shape = "[k], as `results[0][0]` has" if single else "[queries, k]"
            raise ValueError(f"`{names[0]}` must have the shape {shape}: got {list(scores.shape)}")
        if single:
            scores, ids = scores[None], ids[None]
        _checks.rows(names[0], scores, "results[0][0]", lists[0][0] if lists else scores)
        for name, value in zip(names, (scores, ids), strict=True):
            _checks.same_device(name, value, "results[0][0]", lists[0][0] if lists else scores)
        # One spare empty slot: no list is without columns.
        lists.append((F.pad(scores.detach(), (0, 1)), F.pad(ids, (0, 1), value=-1)))
    finite = torch.stack([(s.isfinite() | (ids == -1)).all() for s, ids in lists])
    if not finite.all():
        i = int((~finite).nonzero()[0])
        scores, ids = lists[i]
        row = int((~scores.isfinite() & (ids != -1)).any(1).nonzero()[0])
        raise ValueError(
            f"`results[{i}][0]` must be finite: row {row} holds NaN or inf; give an empty slot the id -1"
        )
    return lists, single


def _refuse_unsorted(lists: list[tuple[Tensor, Tensor]]) -> None:
    """Scores that are not best first are not scores: distances, or places of another order."""
    for i, (scores, ids) in enumerate(lists):
        filled = ids != -1
        # The lowest score so far: an empty slot neither is one nor breaks the order.
        lowest = scores.masked_fill(~filled, torch.inf).cummin(1).values[:, :-1]
        worse = filled[:, 1:] & (scores[:, 1:] > lowest)
        if not worse.any():
            continue
        row = int(worse.any(1).nonzero()[0])
        one = scores[row][filled[row]]
        if (one[1:] >= one[:-1]).all():
            advice = "they ascend, as distances do: give minus the distances"
        else:
            advice = "sort them with their ids"
        raise ValueError(f"`results[{i}][0]` must be sorted best first: row {row} is not; {advice}")
