"""Rows of unit length and one dtype for both sides, with the gradient of both."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _torch_hooks
from ._autocast import runs_exactly


def smallest_norm(dtype: torch.dtype, eps: float | None) -> float:
    """What rows of this type are divided by at least: `eps`, by default as in `F.normalize`.

    The gradient of a zero row is divided by it too, and float16 ends at 65,504.
    """
    if eps is None:
        return 1e-3 if dtype == torch.float16 else 1e-12
    if not eps > 0:
        raise ValueError(f"`eps` must be above 0: got {eps}")
    return eps


class UnitRows(NamedTuple):
    """`F.normalize` of rows, with what its gradient needs."""

    rows: Tensor  # [B, D]
    norm: Tensor  # [B, 1]
    length: Tensor  # [B, 1] what the rows were divided by

    @classmethod
    def of(cls, x: Tensor, eps: float) -> UnitRows:
        """The rows of `x` over their norms, or over `eps` where that is more."""
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        length = norm.clamp(min=eps)
        return cls(x / length, norm, length)

    def gradient(self, grad: Tensor) -> Tensor:
        """`(g - x^ <x^, g>) / |x|`, in five operators instead of twelve."""
        along = torch.linalg.vecdot(self.rows, grad, dim=1)[:, None] * (self.norm >= self.length)
        return torch.addcmul(grad, self.rows, along, value=-1).div_(self.length)


class _Normalise(torch.autograd.Function):
    @staticmethod
    @runs_exactly
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        unit = UnitRows.of(x, eps)
        ctx.save_for_backward(x, *unit)
        ctx.eps = eps
        return unit.rows

    @staticmethod
    @runs_exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, *unit = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            (again,) = torch.autograd.grad(F.normalize(x, dim=1, eps=ctx.eps), x, grad, create_graph=True)
            return again, None
        return UnitRows(*unit).gradient(grad), None


def normalised(x: Tensor, eps: float | None = None) -> Tensor:
    """Rows of unit length (a zero row stays zero), computed and returned in float32 or wider.

    Rows shorter than `eps` are divided by it (`smallest_norm`).
    """
    eps = smallest_norm(x.dtype, eps)
    x = x if x.dtype == torch.float64 else x.float()
    if x.requires_grad and _checks.eager() and not _torch_hooks.forward_mode():
        unit: Tensor = _Normalise.apply(x, eps)  # type: ignore[no-untyped-call]
        return unit
    return F.normalize(x, dim=1, eps=eps)


def common_dtype(query: Tensor, keys: Tensor) -> torch.dtype:
    """The promoted dtype; under autocast frozen keys follow the query."""
    if query.dtype == keys.dtype:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type) and not keys.requires_grad:
        return query.dtype
    return torch.promote_types(query.dtype, keys.dtype)


def matched(query: Tensor, keys: Tensor, normalize: bool, eps: float | None = None) -> tuple[Tensor, Tensor]:
    """Both sides in one dtype, and of unit length if asked; each is rounded at most once."""
    if query.dtype == keys.dtype and not normalize:
        return query, keys
    dtype = common_dtype(query, keys)
    if normalize:
        query, keys = normalised(query, eps), normalised(keys, eps)
    return query.to(dtype), keys.to(dtype)


def matched_or_deferred(
    query: Tensor, keys: Tensor, normalize: bool, eps: float | None
) -> tuple[Tensor, Tensor, float | None]:
    """`matched`, or float32 sides as they are and the `eps` to normalise them by.

    The fused loss knows its gradient, and takes that of the normalisation along at less cost.
    """
    if normalize and query.dtype == keys.dtype == torch.float32:
        return query, keys, smallest_norm(query.dtype, eps)
    return *matched(query, keys, normalize, eps), None


def paired_products(a: Tensor, b: Tensor, normalize: bool, eps: float | None = None) -> Tensor:
    """`<a_i, b_i>` [B] in float32 or wider, of the same rounded values that `matched` gives to the engine."""
    a, b = (_checks.savable(x) for x in matched(a, b, normalize, eps))
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(1)
