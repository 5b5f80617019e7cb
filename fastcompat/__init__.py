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
from .serving.blend import bounded_blend
from .serving.calibration import Calibrator
from .serving.choice import choose_calibration
from .serving.demand import demand
from .serving.gallery import MixedGallery
from .serving.merge import merge_topk
from .serving.mixed_topk import mixed_topk
from .serving.slerp import slerp
from .transforms import (
    ForwardTransform,
    Procrustes,
    ResidualHead,
    ReverseQueryTransform,
    Ridge,
    SideInformation,
)

__all__ = [
    "BackfillCurve",
    "Calibrator",
    "ForwardTransform",
    "MixedGallery",
    "Procrustes",
    "PrototypeBank",
    "Relevance",
    "ResidualHead",
    "RetrievalMetrics",
    "ReverseQueryTransform",
    "Ridge",
    "RunningPrototypes",
    "SideInformation",
    "SoftmaxStats",
    "__version__",
    "agreement",
    "backfill_curve",
    "bounded_blend",
    "build_info",
    "choose_calibration",
    "class_prototypes",
    "compare",
    "demand",
    "forecast_curve",
    "functional",
    "losses",
    "merge_topk",
    "mixed_topk",
    "ndpp",
    "odpp",
    "ranks",
    "retrieval_metrics",
    "slerp",
    "softmax_stats",
    "topk",
    "uncertainty",
    "wilson",
]
