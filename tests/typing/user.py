"""What a user's type checker sees: this file is read by mypy and pyright, never run.

A line with `type: ignore` must be an error: an ignore without one is an error itself.
"""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor

import fastcompat as fc

Numpy = np.ndarray[Any, Any]

query, keys = torch.randn(8, 16), torch.randn(100, 16)
labels, key_labels = torch.arange(8), torch.arange(100)
np_query: Numpy = np.zeros((8, 16), np.float32)
np_keys: Numpy = np.zeros((100, 16), np.float32)
np_labels: Numpy = np.arange(8)
names, key_names = ["cat"] * 8, np.array(["cat", "dog"] * 50)

# Losses return tensors.
assert_type(fc.functional.contrastive_loss(query, keys, positive=labels, temperature=0.07), Tensor)
assert_type(fc.functional.bct_loss(query, labels, keys), Tensor)
stats = fc.softmax_stats(query, keys, scale=10.0, positive=labels)
assert_type(stats.neg_lse, Tensor)

# Searches return what the queries are; keys, labels and row numbers may be of another library, or lists.
assert_type(fc.topk(query, keys, 10, metric="ip"), tuple[Tensor, Tensor])
assert_type(fc.topk(np_query, np_keys, 10), tuple[Numpy, Numpy])
assert_type(fc.topk(np_query, keys, 10, query_labels=names, key_labels=key_names), tuple[Numpy, Numpy])
assert_type(fc.ranks(query, np_keys, [[1]] * 8, exclude=np_labels), Tensor)
assert_type(fc.mixed_topk(query, keys, query, keys, np_keys[:, 0] > 0, k=10), tuple[Tensor, Tensor])
assert_type(fc.merge_topk([fc.topk(query, keys, 10)] * 2, 10, method="rrf"), tuple[Tensor, Tensor])

# Figures are floats; what there is for each query or state is an array of the queries' library.
metrics = fc.retrieval_metrics(query, np_keys, names, key_names, ks=(1, 10))
assert_type(metrics.map, float)
assert_type(metrics.cmc, dict[int, float])
assert_type(metrics.per_query.map, Tensor)
assert_type(fc.retrieval_metrics(np_query, keys, labels, key_labels).per_query.recall, dict[int, Numpy])
curve: fc.BackfillCurve[Tensor] = fc.backfill_curve(query, keys, query, keys, labels, key_labels)
assert_type(curve.map, Tensor)
assert_type(curve.auc("cmc@1"), float)
order = fc.uncertainty(np_keys, keys[:5], kind="margin").argsort()
assert_type(fc.backfill_curve(np_query, keys, query, keys, names, key_names, order=order).map, Numpy)
assert_type(fc.class_prototypes(np_keys, list(range(100)), 100), Numpy)
assert_type(fc.build_info()["simd_usable"], list[str])

# Modules are modules.
module: torch.nn.Module = fc.losses.ContrastiveLoss(positives="mean_out", reduction="sum")

fc.topk(query, keys, "ten")  # type: ignore
fc.topk(query, keys, 10, metric="dot")  # type: ignore
fc.retrieval_metrics(query, keys, labels, key_labels, backend="cuda")  # type: ignore
fc.functional.contrastive_loss(query, keys, temperatur=0.07)  # type: ignore
fc.functional.contrastive_loss(query, keys, reduction="average")  # type: ignore
fc.losses.ContrastiveLoss(positives="sum")  # type: ignore
