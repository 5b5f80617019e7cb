"""Does every native kernel compute what the reference computes, on every instruction set and GPU here?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import _native, _ops, reference

# Awkward on purpose: no multiple of any vector or tile width.
QUERIES, KEYS, DIM, CLASSES, SCALE = 37, 301, 45, 7, 3.0
# Largest error relative to the largest value; the inputs' own rounding is not part of it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Check:
    """One kernel on one instruction set or GPU and one dtype; `problem` is empty if it is right."""

    kernel: str
    where: str
    dtype: str
    problem: str


def run() -> Iterator[Check]:
    """Check every kernel on every usable instruction set and GPU, and leave the set in use as it was."""
    before = _native.simd()
    try:
        for simd in _native.simd_levels():
            _native.set_simd(simd)
            yield from _everything(simd, torch.device("cpu"))
    finally:
        _native.set_simd(before)
    for index in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", index)
        if not _native.not_covered(gpu):
            yield from _everything(str(gpu), gpu)


def _everything(where: str, device: torch.device) -> Iterator[Check]:
    for dtype in TOLERANCE:
        for kernel, check in CHECKS.items():
            try:
                problem = check(dtype, device)
            except Exception as error:  # a kernel that raises is a kernel that fails
                problem = f"{type(error).__name__}: {error}"
            yield Check(kernel, where, str(dtype).removeprefix("torch."), problem)


def _on(device: torch.device, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """What the kernel returns on `device`, brought back."""
    there = tree_map_only(Tensor, lambda x: x.to(device), arguments)
    return tree_map_only(Tensor, Tensor.cpu, kernel(*there))


def _far(found: Tensor, truth: Tensor, dtype: torch.dtype) -> str:
    error = ((found.double() - truth.double()).abs().max() / truth.abs().max().clamp_min(1e-30)).item()
    return "" if error <= TOLERANCE[dtype] else f"relative error {error:.1e}"  # NaN fails too


class _Softmax:
    """One problem with labels, positives by index, exclusions and a bias, and its float64 truth."""

    def __init__(self, dtype: torch.dtype) -> None:
        gen = torch.Generator().manual_seed(0)
        query, keys = (torch.randn(n, DIM, generator=gen).mul(0.3).to(dtype) for n in (QUERIES, KEYS))
        bias = torch.randn(KEYS, generator=gen)
        query_labels, key_labels = (torch.randint(CLASSES, (n,), generator=gen) for n in (QUERIES, KEYS))
        exclude = torch.randint(-1, KEYS, (QUERIES,), generator=gen)
        sets = (query_labels, key_labels, None, exclude)
        self.dtype = dtype
        self.problem = (query, keys, SCALE, None, bias, *sets)
        leaves = [query.double(), keys.double(), torch.full((QUERIES, 1), SCALE).double(), bias.double()]
        for leaf in leaves:
            leaf.requires_grad_()
        q, k, scale, b = leaves
        truth = reference.softmax_stats(q, k, scale, b, *sets)
        self.truth = [x.detach() for x in truth]
        self.mean = torch.autograd.grad(truth.neg_lse.sum(), q, retain_graph=True)[0] / SCALE
        self.arriving = torch.randn(3, QUERIES, generator=gen)  # gradients of neg_lse, pos_lse, pos_sum
        self.gradients = torch.autograd.grad([*truth[:3]], leaves, [*self.arriving.double()])

    def worst(self, *pairs: tuple[Tensor, Tensor]) -> str:
        return next(filter(None, (_far(found, truth, self.dtype) for found, truth in pairs)), "")


def _softmax_stats(dtype: torch.dtype, device: torch.device) -> str:
    case = _Softmax(dtype)
    found = _on(device, _ops.softmax_stats, *case.problem, True)
    return case.worst(*zip(found, (*case.truth, case.mean), strict=True))


def _softmax_query_grad(dtype: torch.dtype, device: torch.device) -> str:
    case = _Softmax(dtype)
    neg, pos, *_ = (x.float() for x in case.truth)
    dquery, dscale = _on(
        device, _ops.softmax_query_grad, *case.problem, neg, pos, case.mean.float(), *case.arriving
    )
    return case.worst((dquery, case.gradients[0]), (dscale, case.gradients[2][:, 0]))


def _softmax_key_grad(dtype: torch.dtype, device: torch.device) -> str:
    case = _Softmax(dtype)
    neg, pos, *_ = (x.float() for x in case.truth)
    dkeys, dbias = _on(device, _ops.softmax_key_grad, *case.problem, neg, pos, *case.arriving, True, True)
    return case.worst((dkeys, case.gradients[1]), (dbias, case.gradients[3]))


def _whole_numbers(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Small whole numbers make every score exact in float32: ids and counts must then be equal, ties included.
    gen = torch.Generator().manual_seed(1)
    query, keys = (torch.randint(-3, 4, (n, DIM), generator=gen).to(dtype) for n in (QUERIES, KEYS))
    return query, keys


def _topk(dtype: torch.dtype, device: torch.device) -> str:
    query, keys = _whole_numbers(dtype)
    rows = torch.arange(KEYS)
    for metric in ("ip", "l2"):
        for parts in ([], [rows[::2], rows[1::2]]):
            sides = max(len(parts), 1)
            scale, offset = [1.0] * sides, [0.0] * sides
            found = _on(
                device,
                _ops.topk,
                [query] * sides,
                [keys] * sides,
                parts,
                scale,
                offset,
                10,
                metric,
                None,
                None,
                None,
                [],
            )
            truth = reference.topk([reference.Segment(query, keys)], 10, metric)
            if not (torch.equal(found[0], truth[0]) and torch.equal(found[1], truth[1])):
                return f"wrong results with metric {metric}, {sides} segment(s)"
    return ""


def _pair_scores(dtype: torch.dtype, device: torch.device) -> str:
    query, keys = _whole_numbers(dtype)
    ids = torch.arange(KEYS).repeat(QUERIES, 1)
    for metric in ("cosine", "ip", "l2"):
        problem = _far(
            _on(device, _ops.pair_scores, query, keys, ids, metric),
            reference.scores(query, keys, metric),
            torch.float32,
        )
        if problem:
            return f"{problem} with metric {metric}"
    return ""


def _count_beats(dtype: torch.dtype, device: torch.device) -> str:
    query, keys = _whole_numbers(dtype)
    gen = torch.Generator().manual_seed(2)
    order, targets = torch.randperm(KEYS, generator=gen), torch.randint(KEYS, (QUERIES, 5), generator=gen)
    bounds = torch.tensor([0, 64, 64, 129, KEYS])
    for metric in ("ip", "l2"):
        bars = reference.pair_scores(query, keys, targets, metric)
        problem = (query, keys, order, bounds, bars, targets, metric, None)
        if not torch.equal(_on(device, _ops.count_beats, *problem), reference.count_beats(*problem)):
            return f"wrong counts with metric {metric}"
    return ""


CHECKS: dict[str, Callable[[torch.dtype, torch.device], str]] = {
    "softmax_stats": _softmax_stats,
    "softmax_query_grad": _softmax_query_grad,
    "softmax_key_grad": _softmax_key_grad,
    "topk": _topk,
    "pair_scores": _pair_scores,
    "count_beats": _count_beats,
}
