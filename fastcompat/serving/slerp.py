"""Spherical interpolation between a query's two sides."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _checks, _inputs

Given = TypeVar("Given", Tensor, "np.ndarray")


def slerp(query_old: Given, mapped_query: Given, alpha: float) -> Given:
    """The point at share `alpha` of the way from one unit vector to another, along the great circle.

    ```
    slerp = sin((1 - alpha) w) / sin w * a + sin(alpha w) / sin w * b      a = query_old / |query_old|,
                                                        b = mapped_query / |mapped_query|, cos w = <a, b>
    ```
    One query for a gallery of old vectors, made of the old query and of the new query mapped into the old
    space: `fc.slerp(query_old, fc.Procrustes().fit(new, old).transform(query_new), alpha)`. alpha is chosen
    on judged queries; 0 is the old query, 1 the mapped one. Shoemake, "Animating rotation with quaternion
    curves" (SIGGRAPH 1985), for embeddings of two models Ricci et al. (2026; reconstructed). Near w = 0 the
    straight line is taken; opposite vectors have no shortest way, and the nearer of the two is given back.

    Args:
        query_old: [B, D].
        mapped_query: [B, D], in the same space.
        alpha: from 0 to 1.

    Returns:
        float32 [B, D] of length 1 (float64 for float64 inputs; a zero vector gives the other side), a tensor
        or a NumPy array as `query_old`.

    Raises:
        ValueError, TypeError: shapes that do not fit; alpha outside [0, 1].
    """
    a, b = _inputs.matrix("query_old", query_old), _inputs.matrix("mapped_query", mapped_query)
    b = _inputs.beside(b, mapped_query, a)
    _checks.embeddings("mapped_query", b, "query_old", a)
    _checks.rows("mapped_query", b, "query_old", a)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must be a number from 0 to 1: got {alpha!r}")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = (F.normalize(x.double(), eps=1e-300) for x in (a, b))
    angle = 2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))  # exact for angles near 0 and pi
    sine = angle.sin()
    straight = sine < 1e-9
    sine = sine.masked_fill(straight, 1.0)
    first = torch.where(straight, 1.0 - alpha, ((1 - alpha) * angle).sin() / sine)
    second = torch.where(straight, float(alpha), (alpha * angle).sin() / sine)
    opposite = straight & (angle > 1)
    first = torch.where(opposite, float(alpha <= 0.5), first)
    second = torch.where(opposite, float(alpha > 0.5), second)
    found = F.normalize(first[:, None] * a + second[:, None] * b, eps=1e-300).to(wide)
    result: Given = _checks.like_input((found,), query_old)[0]
    return result
