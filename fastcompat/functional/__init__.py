"""The public functions: engine calls and losses, with their equations, shapes, units, errors and sources.

Everywhere: `query` [B, D] and `keys` [N, D] are float32, bfloat16 or float16 (any row stride, B = 0 and N = 0
included) and are accumulated in float32; float64 runs the reference. Labels are int64; a negative label
equals no label. `backend`: "auto" takes the native kernels where they cover the call, "native" raises where
they do not, "reference" is plain PyTorch.
"""

from .classes import bct_loss, margin_softmax_loss, prototype_loss
from .embeddings import contrastive_loss, metric_compatible_loss, ract_loss, simclr_loss
from .engine import ranks, softmax_stats, topk
from .regression import fastfill_loss, fct_loss

__all__ = [
    "bct_loss",
    "contrastive_loss",
    "fastfill_loss",
    "fct_loss",
    "margin_softmax_loss",
    "metric_compatible_loss",
    "prototype_loss",
    "ract_loss",
    "ranks",
    "simclr_loss",
    "softmax_stats",
    "topk",
]
