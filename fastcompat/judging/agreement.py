"""How much of what users see changes with the model, without any judgement of what is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, _search
from .._ranking import Space
from ..reference import Segment
from .excluded import Excluded


class Agreement(NamedTuple):
    """What `agreement` returns: means over the queries (NaN if there is none).

    Attributes:
        overlap: share of the first k results that both models return.
        rank_biased_overlap: the same with more weight on the first places.
        first_changes: share of the queries whose first result is another one.
    """

    overlap: float
    rank_biased_overlap: float
    first_changes: float


def agreement(
    query_old: Any,
    old: Any,
    query_new: Any,
    new: Any,
    k: int = 10,
    *,
    persistence: float = 0.9,
    metric: str = "cosine",
    exclude: Any = None,
    backend: str = "auto",
) -> Agreement:
    """Compare the first k results of two models on the same queries and gallery; needs no labels at all.

    With `X_d` the number of items among the first d of both lists, per query::

        overlap@k = X_k / k
        RBO       = X_k / k * p^k + (1 - p) / p * sum over d = 1 .. k of X_d / d * p^d

    and the means over the queries. RBO is Webber et al.'s extrapolated rank-biased overlap (TOIS 2010, eq.
    30) of two lists of k; with `p` = 0.9 the first 10 places carry 86 % of the weight.

    Args:
        query_old: [Q, D_old], the queries in the old space.
        old: [N, D_old], the gallery.
        query_new: [Q, D_new], the same queries in the new space.
        new: [N, D_new], the same items.
        k: depth of the lists; of a smaller gallery the whole ranking.
        persistence: `p`, between 0 and 1: how likely a reader goes on from one result to the next.
        metric: "cosine", "ip" or "l2".
        exclude: [Q] or [Q, E] int64, gallery ids that are not ranked, such as the query itself (-1: none).
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
    """
    before = Space(query_old, old, ("query_old", "old"), metric, backend)
    after = Space(query_new, new, ("query_new", "new"), metric, backend)
    _checks.rows("query_new", after.query, "query_old", before.query)
    _checks.rows("new", after.gallery, "old", before.gallery)
    _checks.same_device("new", after.gallery, "old", before.gallery)
    k = _checks.positive_int("k", k)
    if isinstance(persistence, bool) or not isinstance(persistence, (int, float)) or not 0 < persistence < 1:
        raise ValueError(f"`persistence` must be a number between 0 and 1: got {persistence!r}")
    sides = ("query_old", before.query), ("old", before.gallery)
    left_out = Excluded(exclude, None, sides).of(torch.arange(len(before.query), device=before.query.device))
    lists = [_first(space, k, left_out) for space in (before, after)]
    k = min(k, lists[0].shape[1])
    a, b = (ids[:, :k] for ids in lists)
    length = (a >= 0).sum(1)  # [Q], below k where the gallery ends
    seen = length > 0
    if not seen.any():
        return Agreement(*[float("nan")] * 3)
    a, b, length = a[seen], b[seen], length[seen]
    depth = torch.arange(k, dtype=torch.int64, device=a.device)
    # The depth from which on an item of one list is in both: the later of its two places.
    both = (a[:, :, None] == b[:, None, :]) & (a >= 0)[:, :, None]  # [Q, K, K]
    later = torch.maximum(depth[:, None], depth)  # [K, K]
    common = torch.zeros(len(a), k, dtype=torch.float64, device=a.device)
    common.scatter_add_(1, later.flatten().expand(len(a), -1), both.flatten(1).double())
    common = common.cumsum(1)  # X_d [Q, K]
    d = (depth + 1).double()
    terms = (common / d * persistence**d).masked_fill(depth >= length[:, None], 0)
    overlap = common[:, -1] / length
    rbo = overlap * persistence ** length.double() + (1 - persistence) / persistence * terms.sum(1)
    return Agreement(float(overlap.mean()), float(rbo.mean()), float((a[:, 0] != b[:, 0]).double().mean()))


def _first(space: Space, k: int, left_out: Tensor | None) -> Tensor:
    """Ids of the first k results [Q, K], without what is left out."""
    more = 0 if left_out is None else left_out.shape[1]
    depth = min(k + more, len(space.gallery))
    if not depth:
        return torch.empty(len(space.query), 0, dtype=torch.int64, device=space.query.device)
    ids = _search.topk(
        [Segment(space.query, space.gallery)], depth, space.metric, native=space.native, names=(space.names,)
    )[1]
    if left_out is None:
        return ids
    hidden = torch.zeros_like(ids, dtype=torch.bool)
    for column in left_out.unbind(1):
        hidden |= ids == column[:, None]
    # The others first, in their order.
    order = hidden.to(torch.int8).sort(dim=1, stable=True).indices
    return ids.masked_fill(hidden, -1).gather(1, order)[:, :k]
