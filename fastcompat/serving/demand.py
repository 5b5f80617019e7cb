"""Which items a query log asks for: they are worth backfilling first."""

from __future__ import annotations

import torch

from .. import _checks, _inputs, _promoted
from .._types import Array, ArrayLike, Backend, Metric, Segment

_QUERIES = 8192  # at a time


def demand(
    query_log: ArrayLike,
    gallery: Array,
    k: int = 100,
    *,
    metric: Metric = "cosine",
    backend: Backend = "auto",
) -> Array:
    """How often, and how high, a query log retrieves each item in the old space; backfill high values first.

    ```
    demand_j = sum over queries i with item j among the best k of 1 / log2(1 + rank_ij)        rank from 1
    ```
    What no query reaches has demand 0; the discount is that of DCG (Jarvelin and Kekalainen, ACM TOIS 2002).
    The order itself::

        order = fc.demand(log, old).argsort(descending=True, stable=True)      # for backfill_curve(order=)

    Args:
        query_log: [Q, D], logged queries in the old space, repeated as often as they were asked.
        gallery: [N, D], the old vectors.
        k: how deep a list counts; its places weigh less and less, so there is little to tune.
        metric: "cosine", "ip" or "l2", that of the search.
        backend: "auto", "native" or "reference".

    Returns:
        float32 [N], a tensor or a NumPy array as `gallery`.

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf, naming the first bad row.
    """
    k = _checks.positive_int("k", k)
    _checks.choice("metric", metric, _checks.METRICS)
    names = ("query_log", "gallery")
    q, x, _ = _inputs.pair(names, query_log, gallery)
    native = _checks.use_native(backend, q)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    worth = 1 / torch.log2(torch.arange(2, k + 2, dtype=torch.float64, device=x.device))
    for block in torch.split(q, _QUERIES):
        _, ids = _promoted.topk([Segment(block, x)], k, metric, native=native, names=(names,))
        found = ids >= 0
        total.index_add_(0, ids[found], worth.expand_as(ids)[found])
    result: Array = _checks.like_input((total.float(),), gallery)[0]
    return result
