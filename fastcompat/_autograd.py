"""Gradients around the native softmax statistics.

d neg_lse_i / d q_i = scale * mean_i, with mean_i the softmax-weighted mean key of the negatives: the forward
pass already knows it, so the query's gradient costs no second pass over the keys. Keys or a bias that want a
gradient cost one key-stationary pass.

The loss `mean or sum of log(1 + exp(neg_lse - pos_lse))` is one number, so its gradients are known up to a
factor as soon as it is: one call computes both.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import _checks, _ops, _torch_hooks
from ._loss_parts import UnitRows, exactly, normalised
from .reference import SoftmaxProblem, SoftmaxStats

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
    @exactly
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        scale: float,
        scale_tensor: Tensor | None,
        bias: Tensor | None,
        query_labels: Tensor | None,
        key_labels: Tensor | None,
        positive: Tensor | None,
        exclude: Tensor | None,
        want_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        indices = (query_labels, key_labels, positive, exclude)
        neg_lse, pos_lse, pos_sum, pos_count, mean = _ops.softmax_stats(
            query, keys, scale, scale_tensor, bias, *indices, want_mean
        )
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(pos_count)
        _save(ctx, query, keys, scale_tensor, bias, *indices, neg_lse, pos_lse, mean)
        return neg_lse, pos_lse, pos_sum, pos_count

    @staticmethod
    @exactly
    def backward(
        ctx: Any, grad_neg: Tensor | None, grad_pos: Tensor | None, grad_sum: Tensor | None, _: None
    ) -> tuple[Tensor | None, ...]:
        saved = _saved(ctx)
        query, keys, scale_tensor, bias, *indices, neg_lse, pos_lse, mean = saved
        want_query, want_keys, _, want_scale, want_bias, *_ = ctx.needs_input_grad
        grads = (grad_neg, grad_pos, grad_sum)
        if all(grad is None for grad in grads):
            return (None,) * 10
        problem = (query, keys, ctx.scale, scale_tensor, bias, *indices, neg_lse, pos_lse)
        dquery = dkeys = dscale = dbias = None
        with torch.no_grad():
            if want_query or want_scale:
                dquery, by_row = _ops.softmax_query_grad(*problem, mean, *grads)
                dquery = dquery if want_query else None
                dscale = ctx.scale * by_row.sum() if want_scale else None
            if want_keys or want_bias:
                dkeys, dbias = _ops.softmax_key_grad(*problem, *grads, want_keys, want_bias)
                dkeys, dbias = dkeys if want_keys else None, dbias if want_bias else None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found = (dquery, dkeys, dscale, dbias)
            dquery, dkeys, dscale, dbias = _Once.apply(*found, *saved, *grads)  # type: ignore[no-untyped-call]
        return (dquery, dkeys, None, dscale, dbias, None, None, None, None, None)


class _Once(torch.autograd.Function):
    """Hands first derivatives through and refuses the second."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return inputs[:4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    @exactly
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
        # The leaves are for `_Once` alone.
        ctx.save_for_backward(query if want_query else None, keys if want_keys else None, dquery, dkeys)
        return loss

    @staticmethod
    @exactly
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, dquery, dkeys = ctx.saved_tensors
        readable = _checks.values_readable(grad) and not _torch_hooks.stacked(grad)
        if readable and not _torch_hooks.keeps_graph():
            number = grad.item()
            if number != 1:  # nobody can ask for these gradients again: no copy
                for found in (dquery, dkeys):
                    nothing = None if math.isfinite(number) else found == 0
                    found.mul_(number)
                    if nothing is not None:  # what takes no part sends nothing, whatever arrives
                        found.masked_fill_(nothing, 0)
        else:
            with torch.no_grad():
                dquery, dkeys = (torch.where(found == 0, 0, found * grad) for found in (dquery, dkeys))
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                dquery, dkeys, *_ = _Once.apply(dquery, dkeys, None, None, query, keys, grad)  # type: ignore[no-untyped-call]
        want_query, want_keys, *_ = ctx.needs_input_grad
        return (dquery if want_query else None, dkeys if want_keys else None, None, None)


def _wants_grad(value: float | Tensor | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _arguments(problem: SoftmaxProblem) -> tuple[Any, ...]:
    """The nine arguments that describe a softmax problem, as the operators take them."""
    _checks.no_transforms()
    query, keys, scale, *rest = problem
    factor, scale_tensor = (1.0, scale.float()) if isinstance(scale, Tensor) else (scale, None)
    arguments = (query, keys, factor, scale_tensor, *rest)
    if torch.compiler.is_compiling() and torch.is_grad_enabled():
        # Dynamo refuses one tensor in two places (one label vector for both sides): pass views.
        arguments = tuple(x.view_as(x) if isinstance(x, Tensor) else x for x in arguments)
    return arguments


def softmax_stats(problem: SoftmaxProblem) -> SoftmaxStats:
    """The native statistics, differentiable once in query, keys, scale and bias."""
    arguments = _arguments(problem)
    want_mean = problem.query.requires_grad or _wants_grad(problem.scale)
    if torch.is_grad_enabled() and (want_mean or problem.keys.requires_grad or _wants_grad(problem.bias)):
        return SoftmaxStats(*_SoftmaxStats.apply(*arguments, want_mean))  # type: ignore[no-untyped-call]
    return SoftmaxStats(*_ops.softmax_stats(*arguments, False)[:4])


def fuses(problem: SoftmaxProblem) -> bool:
    """Whether `softmax_loss` covers this: float16 needs the number that arrives early, to stay in range."""
    return (
        problem.query.device.type == "cpu"
        and problem.query.dtype != torch.float16
        and not (_wants_grad(problem.scale) or _wants_grad(problem.bias))
    )


def softmax_loss(problem: SoftmaxProblem, mean: bool, eps: float | None = None) -> Tensor:
    """`log(1 + exp(neg_lse - pos_lse))`, mean or sum over the rows with positives; differentiable once.

    With `eps` query and keys are float32 and are normalised first: divided by their norms, or by `eps` where
    that is more.
    """
    query, keys, *rest = _arguments(problem)
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
