"""What a user's type checker sees: this file is read by mypy and pyright, never run.

A line with `type: ignore` must be an error: an ignore without one is an error itself.
"""

from __future__ import annotations

from typing import assert_type

import numpy as np
import torch
from torch import Tensor

import fastcompat as fc

query, keys = torch.randn(8, 16), torch.randn(100, 16)
labels, key_labels = torch.arange(8), torch.arange(100)

# Losses return tensors.
assert_type(fc.functional.contrastive_loss(query, keys, positive=labels, temperature=0.07), Tensor)
assert_type(fc.functional.bct_loss(query, labels, keys), Tensor)
stats = fc.softmax_stats(query, keys, scale=10.0, positive=labels)
assert_type(stats.neg_lse, Tensor)

# Searches take arrays of either library.
scores, ids = fc.topk(query, keys, 10, metric="ip")
fc.topk(np.zeros((8, 16), np.float32), np.zeros((100, 16), np.float32), 10)
scores, ids = fc.mixed_topk(query, keys, query, keys, torch.rand(100) < 0.5, k=10)

metrics = fc.retrieval_metrics(query, keys, labels, key_labels)
curve: fc.BackfillCurve = fc.backfill_curve(query, keys, query, keys, labels, key_labels)

# Modules are modules.
module: torch.nn.Module = fc.losses.ContrastiveLoss()

fc.topk(query, keys, "ten")  # type: ignore
fc.functional.contrastive_loss(query, keys, temperatur=0.07)  # type: ignore
