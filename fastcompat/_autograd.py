"""Gradients around the native softmax statistics.

d neg_lse_i / d q_i = scale * mean_i, with mean_i the softmax-weighted mean key of the negatives: the forward
pass already knows it, so the query's gradient costs no second pass over the keys. Keys or a bias that require
grad cost one key-stationary pass.

The loss `mean or sum of log(1 + exp(neg_lse - pos_lse))` is one number, so its gradients are known up to a
factor as soon as it is: one call computes both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks, _ops, _torch_hooks
from ._autocast import runs_exactly
from ._normalise import UnitRows, normalised
from ._types import SoftmaxOperands, SoftmaxProblem, SoftmaxStats

_OPERANDS = SoftmaxOperands._fields
_SCALE = _OPERANDS.index("scale")  # the one that is not a tensor
_TWICE = (
    "fastcompat's native kernels have no second derivative; call the function with "
    'backend="reference" to differentiate twice'
)


def _save(ctx: Any, *tensors: Tensor | None) -> None:
    """`save_for_backward`, which refuses tensors made in inference mode: `ctx` holds those itself."""
    eager = _checks.eager()
    ctx.from_inference = [x if eager and x is not None and x.is_inference() else None for x in tensors]
    ctx.save_for_backward(
        *(x if y is None else None for x, y in zip(tensors, ctx.from_inference, strict=True))
    )


def _saved(ctx: Any) -> tuple[Tensor | None, ...]:
    return tuple(x if y is None else y for x, y in zip(ctx.saved_tensors, ctx.from_inference, strict=True))


class _SoftmaxStats(torch.autograd.Function):
    @staticmethod
    @runs_exactly
    def forward(ctx: Any, want_mean: bool, *operands: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        neg_lse, pos_lse, pos_sum, pos_count, mean = _ops.softmax_stats(*operands, want_mean)
        ctx.scale = operands[_SCALE]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pos_count)
        _save(ctx, *operands[:_SCALE], None, *operands[_SCALE + 1 :], neg_lse, pos_lse, mean)
        return neg_lse, pos_lse, pos_sum, pos_count

    @staticmethod
    @runs_exactly
    def backward(
        ctx: Any, grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        *operands, neg_lse, pos_lse, mean = saved
        problem = (*operands[:_SCALE], ctx.scale, *operands[_SCALE + 1 :])
        want = dict(zip(_OPERANDS, ctx.needs_input_grad[1:], strict=True))
        found: dict[str, Tensor | None] = {}
        grads = (grad_neg, grad_pos, grad_sum)
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(_OPERANDS))
        with torch.no_grad():
            if want["query"] or want["scale_tensor"]:
                dquery, by_row = _ops.softmax_query_grad(*problem, neg_lse, pos_lse, mean, *grads)
                found["query"] = dquery if want["query"] else None
                found["scale_tensor"] = ctx.scale * by_row.sum() if want["scale_tensor"] else None
            if want["keys"] or want["bias"]:
                wanted = (want["keys"], want["bias"])
                dkeys, dbias = _ops.softmax_key_grad(*problem, neg_lse, pos_lse, *grads, *wanted)
                found["keys"] = dkeys if want["keys"] else None
                found["bias"] = dbias if want["bias"] else None
        result = tuple(found.get(name) for name in _OPERANDS)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            result = _NoDoubleBackward.apply(len(result), *result, *saved, *grads)  # type: ignore[no-untyped-call]
        return None, *result


class _NoDoubleBackward(torch.autograd.Function):
    """Hands first derivatives through and refuses the second."""

    @staticmethod
    def forward(ctx: Any, count: int, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return inputs[:count]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    @runs_exactly
    def forward(ctx: Any, query: Tensor, keys: Tensor, rest: tuple[Any, ...], eps: float | None) -> Tensor:
        loss: Tensor
        if eps is not None:  # normalise first
            units = UnitRows.of(query, eps), UnitRows.of(keys, eps)
            loss, *found = _ops.softmax_loss(*(unit.rows for unit in units), *rest)
            dquery, dkeys = (
                unit.gradient(grad) if wanted else grad
                for unit, grad, wanted in zip(units, found, rest[-2:], strict=True)
            )
        else:
            loss, dquery, dkeys = _ops.softmax_loss(query, keys, *rest)
        want_query, want_keys = rest[-2:]
        # The leaves are saved only for `_NoDoubleBackward`.
        ctx.save_for_backward(query if want_query else None, keys if want_keys else None, dquery, dkeys)
        return loss

    @staticmethod
    @runs_exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, dquery, dkeys = ctx.saved_tensors
        readable = _checks.values_readable(grad) and not _torch_hooks.stacked(grad)
        if readable and not _torch_hooks.keeps_graph():
            number = grad.item()
            if number != 1:  # these gradients cannot be asked for again: no copy
                for found in (dquery, dkeys):
                    nothing = None if math.isfinite(number) else found == 0
                    found.mul_(number)
                    if nothing is not None:  # what is ignored has a zero gradient, whatever arrives
                        found.masked_fill_(nothing, 0)
        else:
            with torch.no_grad():
                dquery, dkeys = (torch.where(found == 0, 0, found * grad) for found in (dquery, dkeys))
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dquery, dkeys = _NoDoubleBackward.apply(2, dquery, dkeys, query, keys, grad)  # type: ignore[no-untyped-call]
        want_query, want_keys, *_ = ctx.needs_input_grad
        return (dquery if want_query else None, dkeys if want_keys else None, None, None)


def _requires_grad(value: float | Tensor | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _operands(problem: SoftmaxProblem) -> SoftmaxOperands:
    """A softmax problem as the operators take it."""
    _checks.no_transforms()
    query, keys, scale, *rest = problem
    factor, scale_tensor = (1.0, scale.float()) if isinstance(scale, Tensor) else (scale, None)
    operands = SoftmaxOperands(query, keys, factor, scale_tensor, *rest)
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # Dynamo refuses one tensor in two places (one label vector for both sides): pass views.
        operands = SoftmaxOperands._make(x.view_as(x) if isinstance(x, Tensor) else x for x in operands)
    return operands


def softmax_stats(problem: SoftmaxProblem) -> SoftmaxStats:
    """The native statistics, differentiable once in query, keys, scale and bias."""
    operands = _operands(problem)
    want_mean = problem.query.requires_grad or _requires_grad(problem.scale)
    if torch.is_grad_enabled() and (want_mean or problem.keys.requires_grad or _requires_grad(problem.bias)):
        return SoftmaxStats(*_SoftmaxStats.apply(want_mean, *operands))  # type: ignore[no-untyped-call]
    return SoftmaxStats(*_ops.softmax_stats(*operands, False)[:4])


def fuses(problem: SoftmaxProblem) -> bool:
    """Whether `softmax_loss` covers this: float16 needs the number that arrives early, to stay in range."""
    return (
        problem.query.device.type == "cpu"
        and problem.query.dtype != torch.float16
        and not (_requires_grad(problem.scale) or _requires_grad(problem.bias))
    )


def softmax_loss(problem: SoftmaxProblem, mean: bool, eps: float | None = None) -> Tensor:
    """`log(1 + exp(neg_lse - pos_lse))`, mean or sum over the rows with positives; differentiable once.

    With `eps` query and keys are float32 and are normalised first: divided by their norms, or by `eps` where
    that is more.
    """
    query, keys, *rest = _operands(problem)
    wanted = (query.requires_grad, keys.requires_grad)
    training = torch.is_grad_enabled() and any(wanted)
    inside = training and _checks.eager()  # one node of the graph instead of three
    if eps is not None and not inside:
        query, keys, eps = normalised(query, eps), normalised(keys, eps), None
    if training:
        loss: Tensor = _SoftmaxLoss.apply(query, keys, (*rest, mean, *wanted), eps)  # type: ignore[no-untyped-call]
    else:
        loss = _ops.softmax_loss(query, keys, *rest, mean, False, False)[0]
    return loss
