"""Items that keep both vectors: one segment that scores them by a blend of both models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._types import Segment

Numbers = float | Tensor


def blended(parts: list[Segment], rows: Tensor, weight: float, metric: str) -> Segment:
    """The segment of `rows` [M] with scores `(1 - weight) t_old + weight t_new`, `t = scale_i s + offset_i`.

    ip: rows (x_old, x_new), queries `((1 - w) scale_old q_old, w scale_new q_new)`. cosine: the same of
    normalised halves, with a further column that fills the norm of a row up to sqrt(2) (a zero half has none
    of its own), and the norms of both sides as the query's scale. l2, where the scales are numbers: halves
    times the roots of `(1 - w) scale`, so that both squared distances add up.
    """
    shares = 1 - weight, weight
    dtype = torch.promote_types(
        torch.promote_types(parts[0].query.dtype, parts[1].query.dtype), torch.float32
    )
    queries, keys = [part.query.double() for part in parts], [part.keys[rows].double() for part in parts]
    offsets = [share * _column(part.offset, part.query) for share, part in zip(shares, parts, strict=True)]
    scale: Numbers = 1.0
    if metric == "cosine":
        queries, keys = ([F.normalize(x, eps=1e-300) for x in side] for side in (queries, keys))
        own = keys[0].square().sum(1, keepdim=True) + keys[1].square().sum(1, keepdim=True)
        keys.append((2 - own).clamp(min=0).sqrt())
    if metric == "l2":
        roots = [(share * part.scale) ** 0.5 for share, part in zip(shares, parts, strict=True)]
        queries = [root * x for root, x in zip(roots, queries, strict=True)]
        keys = [root * x for root, x in zip(roots, keys, strict=True)]
    else:
        factors = [share * _column(part.scale, part.query) for share, part in zip(shares, parts, strict=True)]
        queries = [factor * x for factor, x in zip(factors, queries, strict=True)]
    query, some = torch.cat(queries, 1), torch.cat(keys, 1)
    if metric == "cosine":
        query = F.pad(query, (0, 1))
        scale = (2**0.5 * query.norm(dim=1)).float()
    whole = some.new_empty((len(parts[0].keys), some.shape[1]), dtype=dtype)
    whole[rows] = some.to(dtype)  # the other rows are never read
    return Segment(query.to(dtype), whole, rows, scale, (offsets[0] + offsets[1])[:, 0].float())


def _column(number: Numbers, query: Tensor) -> Tensor:
    """Float64 [B, 1]."""
    x = torch.as_tensor(number, dtype=torch.float64, device=query.device)
    return x.expand(len(query))[:, None]
