"""Exact retrieval quality from the rank of every relevant item, without a table of all scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _checks
from ._ranking import Relevant, Space, average_precision, best_first, best_grades, cutoffs
from .functional import Array
from .judging import gains
from .judging.relevance import Relevance


@dataclass(frozen=True, repr=False)
class QueryMetrics:
    """The figures of `RetrievalMetrics` for every query: float64 [Q] each, NaN for a skipped query.

    Tensors or NumPy arrays, as the query was given.
    """

    map: Any
    cmc: dict[int, Any]
    recall: dict[int, Any]
    map_at_r: Any
    ndcg: dict[int, Any]
    mrr: Any

    def __repr__(self) -> str:
        cutoffs = ", ".join(map(str, self.cmc))
        return f"QueryMetrics({len(self.map)} queries: map, cmc, recall and ndcg at {cutoffs}, map_at_r, mrr)"


@dataclass(frozen=True, repr=False)
class RetrievalMetrics:
    """What `retrieval_metrics` returns: means over the counted queries (NaN if there is none).

    Attributes:
        map: mean average precision, mAP (mAP@K if `map_at=K` was given).
        cmc: `cmc[k]`, share of the queries with a relevant item among the first k.
        recall: `recall[k]`, share of a query's relevant items that stand among its first k, averaged.
        map_at_r: mAP@R.
        ndcg: `ndcg[k]`, normalised discounted cumulative gain of the first k.
        mrr: mean reciprocal rank of the first relevant item.
        skipped: number of queries with no relevant item, left out of every figure.
        per_query: the same figures query by query.
    """

    map: float
    cmc: dict[int, float]
    recall: dict[int, float]
    map_at_r: float
    ndcg: dict[int, float]
    mrr: float
    skipped: int
    per_query: QueryMetrics

    def __repr__(self) -> str:
        figures = [("mAP", self.map)]
        for name, values in (("CMC", self.cmc), ("recall", self.recall), ("nDCG", self.ndcg)):
            figures += [(f"{name}@{k}", value) for k, value in values.items()]
        figures += [("mAP@R", self.map_at_r), ("MRR", self.mrr)]
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures)
        queries = len(self.per_query.map)
        return f"RetrievalMetrics({queries} queries, {self.skipped} of them skipped: {shown})"


def retrieval_metrics(
    query: Array,
    gallery: Array,
    query_labels: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    relevance: Relevance | None = None,
    ks: Sequence[int] = (1, 5, 10),
    metric: str = "cosine",
    exclude: Array | None = None,
    exclude_groups: tuple[Array, Array] | None = None,
    map_at: int | None = None,
    gain: str = "linear",
    backend: str = "auto",
) -> RetrievalMetrics:
    """Exact mAP, CMC, recall, mAP@R, nDCG and MRR of a gallery, in memory that does not grow with Q * N.

    A gallery item is relevant to a query if their labels are equal (a negative label equals no label), or if
    `relevance` grades the pair 1 or more. Let query i have `R` relevant items of grades `g_m` (1 by label),
    and let `r_1 < r_2 < ... < r_R` be their ranks in the whole gallery (0 = best; what `exclude` names is not
    in it; of two equal scores the smaller gallery id ranks first). Then, per query::

        AP       = 1/R * sum over m of m / (r_m + 1)
        AP@K     = 1/min(R, K) * sum over m with r_m < K of m / (r_m + 1)
        AP@R     = 1/R * sum over m with r_m < R of m / (r_m + 1)
        CMC@k    = 1 if r_1 < k, else 0
        Recall@k = (number of m with r_m < k) / R
        nDCG@k   = (sum over m with r_m < k of gain(g_m) / log2(r_m + 2)) / (the same, best order)
        RR       = 1 / (r_1 + 1)

    and every figure is the mean over the queries with `R > 0`; the others are counted in `.skipped` and
    never read. The ranks are those of `fastcompat.ranks` and agree with `fastcompat.topk`; the figures are
    computed in float64. AP@R follows Musgrave et al., "A Metric Learning Reality Check" (ECCV 2020); nDCG is
    Järvelin & Kekäläinen's (TOIS 2002) in trec_eval's form. trec_eval orders equal scores by descending
    document id instead, and scikit-learn averages over the orders of a tie: figures differ where scores tie.

    Args:
        query: [Q, D] float32, bfloat16, float16 or float64 (float64 runs the reference). What
            `fastcompat.topk` takes; anything but a tensor gives NumPy arrays in `.per_query`.
        gallery: [N, D]. Of two dtypes the wider one is computed in; a narrower gallery is copied into it.
        query_labels: [Q] whole numbers, or strings on both sides. A negative label equals no label (a warning
            says so where there are others than -1).
        gallery_labels: [N].
        relevance: judged pairs instead of labels.
        ks: the cut-offs k of CMC@k, Recall@k and nDCG@k.
        metric: "cosine", "ip" or "l2".
        exclude: [Q] or [Q, E] whole numbers, for each query gallery ids that are neither ranked nor relevant,
            such as the query itself (-1: none).
        exclude_groups: (query_groups [Q], gallery_groups [N]), labels of both sides: items of the query's
            group are neither ranked nor relevant, such as those of the same camera (negative: no group).
        map_at: K, to get mAP@K as `.map` (None: over the whole ranking).
        gain: what a grade g is worth in nDCG: "linear" g, "exp" 2^g - 1.
        backend: "auto", "native" or "reference" (a full stable sort of all scores of a query).

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read, naming the first.
    """
    space = Space(query, gallery, ("query", "gallery"), metric, backend)
    ks = cutoffs(ks)
    if map_at is not None:
        map_at = _checks.positive_int("map_at", map_at)
    _checks.choice("gain", gain, gains.GAINS)
    relevant = Relevant(
        space.query,
        space.gallery,
        query_labels,
        gallery_labels,
        exclude,
        relevance=relevance,
        exclude_groups=exclude_groups,
    )
    space.refuse_nonfinite(relevant.counted)

    def blank() -> Tensor:
        return torch.full((len(space.query),), torch.nan, dtype=torch.float64, device=space.query.device)

    ap, ap_at_r, rr = blank(), blank(), blank()  # [Q]
    cmc, recall, ndcg = ({k: blank() for k in ks} for _ in range(3))
    for q, ids, grades in relevant.blocks(per_query=0 if space.native else len(space.gallery)):
        ranks, count, sorted_grades = best_first(space.ranks(q, ids, relevant.excluded(q)), grades)  # [B, P]
        ap[q] = average_precision(ranks, count, map_at)
        ap_at_r[q] = average_precision(ranks, count, count)
        rr[q] = 1 / (ranks[:, 0] + 1).double()
        ideal = best_grades(ids, grades)
        for k, values in gains.ndcg(ranks, sorted_grades, count, ideal, ks, gain).items():
            ndcg[k][q] = values
        for k in ks:
            hits = (ranks < k).sum(1)
            cmc[k][q] = (hits > 0).double()
            recall[k][q] = hits / count.double()

    def mean(values: Tensor) -> float:
        return float(values[relevant.counted].mean())

    def as_given(values: Tensor) -> Any:
        return _checks.give_back((values,), query)[0]

    return RetrievalMetrics(
        map=mean(ap),
        cmc={k: mean(values) for k, values in cmc.items()},
        recall={k: mean(values) for k, values in recall.items()},
        map_at_r=mean(ap_at_r),
        ndcg={k: mean(values) for k, values in ndcg.items()},
        mrr=mean(rr),
        skipped=relevant.skipped,
        per_query=QueryMetrics(
            map=as_given(ap),
            cmc={k: as_given(values) for k, values in cmc.items()},
            recall={k: as_given(values) for k, values in recall.items()},
            map_at_r=as_given(ap_at_r),
            ndcg={k: as_given(values) for k, values in ndcg.items()},
            mrr=as_given(rr),
        ),
    )
