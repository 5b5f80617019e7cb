"""What functions hand to one another: tuples with names, and the types of arguments and results."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

Array = TypeVar("Array", Tensor, np.ndarray[Any, Any])  # results are of the type of the queries
ArrayLike = Tensor | npt.ArrayLike  # lists, columns of data frames and other libraries' arrays among them

Metric = Literal["cosine", "ip", "l2"]
Backend = Literal["auto", "native", "reference"]
Reduction = Literal["mean", "sum", "none"]
Positives = Literal["sum_in_log", "mean_out"]


class SoftmaxProblem(NamedTuple):
    """What the softmax statistics are of: the arguments of `reference.softmax_stats`."""

    query: Tensor
    keys: Tensor
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive: Tensor | None = None
    exclude: Tensor | None = None


class SoftmaxOperands(NamedTuple):
    """A softmax problem as the operators take it: their first arguments, in the order of their schemas."""

    query: Tensor
    keys: Tensor
    scale: float
    scale_tensor: Tensor | None
    bias: Tensor | None
    query_labels: Tensor | None
    key_labels: Tensor | None
    positive: Tensor | None
    exclude: Tensor | None


class SoftmaxStats(NamedTuple):
    """Row statistics of the logits: float32 [B] (float64 for float64 inputs), the count int64 [B]."""

    neg_lse: Tensor
    pos_lse: Tensor
    pos_sum: Tensor
    pos_count: Tensor


class Segment(NamedTuple):
    """Part of a gallery: query [B, D], keys [N, D], the rows that count (None: all); scale*score + offset.

    `items` int32 [N] says which item each row is of (-1: of none, the row is passed over); None: item = row.
    """

    query: Tensor
    keys: Tensor
    rows: Tensor | None = None
    scale: float = 1.0
    offset: float = 0.0
    items: Tensor | None = None
