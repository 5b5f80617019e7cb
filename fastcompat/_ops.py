"""The torch operators `fastcompat::*`: schemas, shapes for torch.compile, and their kernels on CPUs and GPUs.

None of them is differentiable by itself; `_autograd` puts the gradient around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from . import _native, _operands, _torch_hooks
from ._types import SoftmaxOperands

_KINDS = {Tensor: "Tensor", float: "float", Tensor | None: "Tensor?"}
_PROBLEM = ", ".join(f"{_KINDS[kind]} {name}" for name, kind in get_type_hints(SoftmaxOperands).items())
_SCHEMAS = (
    f"softmax_stats({_PROBLEM}, bool want_mean) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    f"softmax_query_grad({_PROBLEM}, Tensor neg_lse, Tensor pos_lse, Tensor mean, Tensor? grad_neg, "
    "Tensor? grad_pos, Tensor? grad_sum) -> (Tensor, Tensor)",
    f"softmax_key_grad({_PROBLEM}, Tensor neg_lse, Tensor pos_lse, Tensor? grad_neg, Tensor? grad_pos, "
    "Tensor? grad_sum, bool want_keys, bool want_bias) -> (Tensor, Tensor)",
    f"softmax_loss({_PROBLEM}, bool mean, bool want_query, bool want_keys) -> (Tensor, Tensor, Tensor)",
    "topk(Tensor[] query, Tensor[] keys, Tensor?[] rows, float[] scale, float[] offset, SymInt k, "
    "str metric, Tensor? query_labels, Tensor? key_labels, Tensor? exclude, Tensor[] packed, "
    "bool report=True, Tensor[]? items=None) -> (Tensor, Tensor)",
    "pair_scores(Tensor query, Tensor keys, Tensor ids, str metric) -> Tensor",
    "count_beats(Tensor query, Tensor keys, Tensor? rows, Tensor bounds, Tensor thresholds, "
    "Tensor threshold_ids, str metric, Tensor? exclude) -> Tensor",
)

_CPU_ALONE = ("softmax_loss",)  # see `_autograd.fuses`


def observed(arguments: Iterable[Any]) -> bool:
    """Whether a call must go through torch's dispatcher: a mode listens, or a tensor is not a plain one."""
    if torch.compiler.is_compiling() or _torch_hooks.func_active() or _torch_hooks.dispatch_observed():
        return True
    for x in arguments:
        kind = type(x)
        if kind in _PLAIN:
            if _torch_hooks.stacked(x):
                return True
        elif kind not in _NO_TENSORS and (isinstance(x, Tensor) or observed(x)):
            return True
    return False


def _checked(name: str) -> Callable[..., Any]:
    """The kernel, for any operands."""
    check, kernel = getattr(_operands, name), getattr(_native, name)

    def run(*arguments: Any) -> Any:
        check(*arguments)
        return kernel(*arguments)

    return _of_problem(run) if name.startswith("softmax") else run


def _of_problem(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run(problem, *rest)` as a function of the operator's flat arguments."""
    count = len(SoftmaxOperands._fields)
    return lambda *arguments: run(SoftmaxOperands._make(arguments[:count]), *arguments[count:])


def _direct(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The operator, or its kernel itself: torch's dispatcher costs 5 % of a small problem's time."""
    operator = getattr(torch.ops.fastcompat, name).default

    def call(*arguments: Any) -> Any:
        return (operator if observed(arguments) else kernel)(*arguments)

    return call


_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((type(None), bool, int, float, str))
_library = torch.library.Library("fastcompat", "DEF")  # type: ignore[no-untyped-call]
for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _library.define(_schema)  # type: ignore[no-untyped-call]
    for _device in ("CPU",) if _name in _CPU_ALONE else ("CPU", "CUDA"):
        _library.impl(_name, _checked(_name), _device)  # type: ignore[no-untyped-call]


@torch.library.register_fake("fastcompat::softmax_stats")
def _(query, *rest):  # type: ignore[no-untyped-def]
    want_mean = rest[-1]
    rows, dim = query.shape
    vector = [query.new_empty(rows, dtype=torch.float32) for _ in range(3)]
    count = query.new_empty(rows, dtype=torch.int64)
    return (*vector, count, query.new_empty((rows if want_mean else 0, dim), dtype=torch.float32))


@torch.library.register_fake("fastcompat::softmax_query_grad")
def _(query, keys, *rest):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), query.new_empty(query.shape[0], dtype=torch.float32)


@torch.library.register_fake("fastcompat::softmax_key_grad")
def _(query, keys, *rest):  # type: ignore[no-untyped-def]
    want_keys, want_bias = rest[-2:]
    rows, dim = keys.shape
    dkeys = keys.new_empty((rows if want_keys else 0, dim))
    return dkeys, keys.new_empty(rows if want_bias else 0, dtype=torch.float32)


@torch.library.register_fake("fastcompat::softmax_loss")
def _(query, keys, *rest):  # type: ignore[no-untyped-def]
    want_query, want_keys = rest[-2:]
    dquery = query.new_empty((query.shape[0] if want_query else 0, query.shape[1]))
    dkeys = keys.new_empty((keys.shape[0] if want_keys else 0, keys.shape[1]))
    return query.new_empty((), dtype=torch.float32), dquery, dkeys


@torch.library.register_fake("fastcompat::topk")
def _(query, keys, rows, scale, offset, k, metric, query_labels, key_labels, exclude, *rest):  # type: ignore[no-untyped-def]
    shape = (query[0].shape[0], k)
    return query[0].new_empty(shape, dtype=torch.float32), query[0].new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("fastcompat::pair_scores")
def _(query, keys, ids, metric):  # type: ignore[no-untyped-def]
    return query.new_empty(ids.shape, dtype=torch.float32)


@torch.library.register_fake("fastcompat::count_beats")
def _(query, keys, rows, bounds, thresholds, threshold_ids, metric, exclude):  # type: ignore[no-untyped-def]
    return threshold_ids.new_empty((*threshold_ids.shape, bounds.shape[0] - 1))


softmax_stats = _direct("softmax_stats", _checked("softmax_stats"))
softmax_query_grad = _direct("softmax_query_grad", _checked("softmax_query_grad"))
softmax_key_grad = _direct("softmax_key_grad", _checked("softmax_key_grad"))
# Only for `_autograd`, whose callers have checked: the checks are 2 % of a small loss.
softmax_loss = _direct("softmax_loss", _of_problem(_native.softmax_loss))
topk = _direct("topk", _checked("topk"))
pair_scores = _direct("pair_scores", _checked("pair_scores"))
count_beats = _direct("count_beats", _checked("count_beats"))
