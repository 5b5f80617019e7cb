"""The losses as modules, with the call signature of pytorch-metric-learning.

`loss(embeddings, labels=None, indices_tuple=None, ref_emb=None, ref_labels=None)`: `ref_emb` are the old
model's embeddings. An `indices_tuple` is (anchors, positives, anchors, negatives) or (anchors, positives,
negatives), int64 numbers of rows of `embeddings` and of `ref_emb`. It replaces the labels: row i has exactly
the positives and negatives paired with it there (a pair named twice counts once), as in
pytorch-metric-learning's SupConLoss, and in its NTXentLoss with one positive per anchor. It runs the
reference; `backend="native"` refuses it. Losses that train more than one embedding at once
(`SimCLRLoss`, `MetricCompatibleLoss`, `FCTLoss`, `FastFillLoss`) are called like their functions.
"""

from .classes import BCTLoss, MarginSoftmaxLoss, PrototypeLoss
from .embeddings import ContrastiveLoss, MetricCompatibleLoss, RACTLoss, SimCLRLoss
from .memory import MemoryQueue
from .regression import FastFillLoss, FCTLoss

__all__ = [
    "BCTLoss",
    "ContrastiveLoss",
    "FCTLoss",
    "FastFillLoss",
    "MarginSoftmaxLoss",
    "MemoryQueue",
    "MetricCompatibleLoss",
    "PrototypeLoss",
    "RACTLoss",
    "SimCLRLoss",
]
