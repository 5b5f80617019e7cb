"""Scores in float64, what float32 may change in them, and whether a result is the top k up to that."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
METRICS = ["cosine", "ip", "l2"]


def exact_scores(query, keys, metric):
    q, k = query.double(), keys.double()
    if metric == "l2":
        return -((q[:, None] - k) ** 2).sum(2)
    if metric == "cosine":
        q, k = F.normalize(q, eps=1e-300), F.normalize(k, eps=1e-300)
    return q @ k.T


def rounding(query, keys, metric):
    """What float32 may change in one score [B, N]: D products of the two rows, added up."""
    q, k = query.double().norm(dim=1)[:, None], keys.double().norm(dim=1)
    size = {"ip": q * k, "cosine": torch.ones_like(q * k), "l2": (q + k) ** 2}[metric]
    return 2 * (query.shape[1] + 4) * 2.0**-24 * size


def check(query, keys, k, metric, found, allowed=None):
    """`found` is the top k of the allowed pairs, except among keys closer than the rounding of a score."""
    scores, ids = found
    rows, columns = len(query), len(keys)
    allowed = torch.ones(rows, columns, dtype=torch.bool) if allowed is None else allowed
    assert scores.shape == ids.shape == (rows, k)
    assert scores.dtype == torch.float32 and ids.dtype == torch.int64
    exact, slack = exact_scores(query, keys, metric), rounding(query, keys, metric)
    for i in range(rows):
        count = min(k, int(allowed[i].sum()))
        best, who = scores[i, :count], ids[i, :count]
        assert scores[i, count:].eq(-torch.inf).all() and ids[i, count:].eq(-1).all()
        assert allowed[i, who].all() and len(who.unique()) == count
        assert ((best.double() - exact[i, who]).abs() <= slack[i, who]).all()
        falling = best[:-1] > best[1:]
        tied = (best[:-1] == best[1:]) & (who[:-1] < who[1:])
        assert (falling | tied).all()
        left = allowed[i].clone()
        left[who] = False
        if count and left.any():
            assert (exact[i, left] - slack[i, left] <= best[-1] + 1e-30).all()
