"""Replace an embedding model without downtime: compatible training, mixed galleries, backfill curves."""

from . import functional, losses
from ._native import VERSION as __version__
from ._native import build_info
from ._types import SoftmaxStats
from .functional import ranks, softmax_stats, topk
from .judging.agreement import agreement
from .judging.curve import BackfillCurve, backfill_curve
from .judging.forecast import forecast_curve
from .judging.metrics import RetrievalMetrics, retrieval_metrics
from .judging.relevance import Relevance
from .judging.statistics import compare, wilson
from .judging.uncertainty import uncertainty
from .prototypes import PrototypeBank, RunningPrototypes, class_prototypes, ndpp, odpp
from .serving.gallery import MixedGallery
from .serving.merge import merge_topk
from .serving.mixed_topk import mixed_topk
from .transforms import ForwardTransform, Procrustes, ResidualHead, ReverseQueryTransform, SideInformation

__all__ = [
    "BackfillCurve",
    "ForwardTransform",
    "MixedGallery",
    "Procrustes",
    "PrototypeBank",
    "Relevance",
    "ResidualHead",
    "RetrievalMetrics",
    "ReverseQueryTransform",
    "RunningPrototypes",
    "SideInformation",
    "SoftmaxStats",
    "__version__",
    "agreement",
    "backfill_curve",
    "build_info",
    "class_prototypes",
    "compare",
    "forecast_curve",
    "functional",
    "losses",
    "merge_topk",
    "mixed_topk",
    "ndpp",
    "odpp",
    "ranks",
    "retrieval_metrics",
    "softmax_stats",
    "topk",
    "uncertainty",
    "wilson",
]
