"""Replace an embedding model without downtime: compatible training, mixed galleries, backfill curves."""

from . import functional, losses
from ._native import build_info
from .backfill import BackfillCurve, backfill_curve
from .evaluate import RetrievalMetrics, retrieval_metrics
from .functional import ranks, softmax_stats, topk
from .gallery import mixed_topk
from .reference import SoftmaxStats

__all__ = [
    "BackfillCurve",
    "RetrievalMetrics",
    "SoftmaxStats",
    "backfill_curve",
    "build_info",
    "functional",
    "losses",
    "mixed_topk",
    "ranks",
    "retrieval_metrics",
    "softmax_stats",
    "topk",
]
