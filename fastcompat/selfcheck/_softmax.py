"""The softmax kernels against the reference in float64, on problems that reach each of their branches."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ops, reference
from ._compare import TOLERANCE, far, on

DIM, CLASSES = 45, 7  # no multiple of any vector's or tile's width
SCALE, FACTOR = 1.5, 2.0  # a number and a tensor, which are multiplied


class Sets(NamedTuple):
    """Which keys are positives and negatives, as the operators take it."""

    query_labels: Tensor | None
    key_labels: Tensor | None
    positive: Tensor | None
    exclude: Tensor | None


@dataclass(frozen=True)
class Case:
    """A problem, what arrives at its three statistics, and the truth in float64."""

    name: str
    problem: tuple[Any, ...]  # the nine arguments of every softmax operator
    arriving: Tensor  # [3, B] gradients of neg_lse, pos_lse and pos_sum
    stats: tuple[Tensor, ...]
    mean: Tensor  # [B, D]
    gradients: tuple[Tensor, ...]  # of query, keys, the scale by row, bias
    losses: dict[bool, tuple[Tensor, ...]]  # by `mean`: the loss, and its gradients of query and keys
    rounding: (
        float  # what the float32 logits themselves may be off by, which is relative in their exponentials
    )


def _random(rows: int, keys: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Sets]:
    query, bank = (
        torch.randn(n, DIM, generator=gen, dtype=torch.float32, device="cpu").mul(0.3) for n in (rows, keys)
    )
    bias = torch.randn(keys, generator=gen, dtype=torch.float32, device="cpu")
    labels = [
        torch.randint(-1, CLASSES, (n,), generator=gen, dtype=torch.int64, device="cpu") for n in (rows, keys)
    ]
    positive, exclude = (
        torch.randint(-1, keys, (rows,), generator=gen, dtype=torch.int64, device="cpu") for _ in range(2)
    )
    return query, bank, bias, Sets(labels[0], labels[1], positive, exclude)


def _problems() -> Iterator[tuple[str, Tensor, Tensor, Tensor | None, Sets]]:
    gen = torch.Generator("cpu").manual_seed(0)
    query, keys, bias, sets = _random(37, 301, gen)
    yield "positives by label", query, keys, bias, sets._replace(positive=None)
    yield "positives by index", query, keys, bias, sets
    yield "nothing but embeddings", query, keys, None, Sets(None, None, None, None)
    # Two passes over the queries, two parts of them in the keys' gradient, a maximum that keeps moving.
    query, keys, bias, sets = _random(700, 301, gen)
    keys *= torch.linspace(0.1, 20, 301)[:, None].to(keys)
    yield "logits that grow along the keys", query, keys, bias, sets
    # A bank sorted by class, as people keep it: whole parts and blocks of it hold no negative of a query.
    query, keys, bias, sets = _random(9, 1300, gen)
    sets = sets._replace(
        query_labels=torch.arange(9, dtype=torch.int64, device="cpu") % 3 - 1,
        key_labels=torch.arange(1300, dtype=torch.int64, device="cpu") // 650,
    )
    for size in (-100.0, -1000.0, 3000.0):
        shift, name = torch.full_like(bias, size), f"a sorted bank, logits near {size:.0f}"
        yield f"{name}, by index", query, keys, shift, sets
        yield f"{name}, by label", query, keys, shift, sets._replace(positive=None)


def _solved(
    name: str, query: Tensor, keys: Tensor, bias: Tensor | None, sets: Sets, dtype: torch.dtype
) -> Case:
    query, keys = query.to(dtype), keys.to(dtype)
    problem = (query, keys, SCALE, torch.tensor(FACTOR, dtype=torch.float32, device="cpu"), bias, *sets)
    scale = torch.full((len(query), 1), SCALE * FACTOR, dtype=torch.float64, device="cpu")
    leaves = [query.double(), keys.double(), scale, torch.zeros(len(keys), dtype=torch.float64, device="cpu")]
    if bias is not None:
        leaves[3] = bias.double()
    q, k, scale, b = (leaf.requires_grad_() for leaf in leaves)
    stats = reference.softmax_stats(q, k, scale, b, *sets)
    (mean,) = torch.autograd.grad(stats.neg_lse.sum(), q, retain_graph=True)
    gen = torch.Generator("cpu").manual_seed(1)
    arriving = torch.randn(3, len(query), generator=gen, dtype=torch.float32, device="cpu")
    gradients = torch.autograd.grad(
        [*stats[:3]], leaves, [*arriving.double()], retain_graph=True, allow_unused=True
    )
    counted = stats.pos_count > 0
    each = torch.nn.functional.softplus(stats.neg_lse[counted] - stats.pos_lse[counted], threshold=700)
    losses = {}
    for reduced in (True, False):
        loss = each.sum() / (counted.sum().clamp(min=1) if reduced else 1)
        losses[reduced] = (loss.detach(), *torch.autograd.grad(loss, (q, k), retain_graph=True))
    return Case(
        name,
        problem,
        arriving,
        tuple(x.detach() for x in stats),
        mean / (SCALE * FACTOR),
        tuple(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)),
        losses,
        rounding=2.0**-22 * stats.neg_lse.detach().nan_to_num(0, 0, 0).abs().max().item(),
    )


@functools.cache
def cases(dtype: torch.dtype) -> list[Case]:
    """Every problem with inputs of this dtype, solved once for all instruction sets."""
    with torch.enable_grad():
        return [_solved(*problem, dtype) for problem in _problems()]


def _worst(case: Case, dtype: torch.dtype, **found_and_truth: tuple[Tensor, Tensor]) -> str:
    for output, (found, truth) in found_and_truth.items():
        if problem := far(found, truth, TOLERANCE[dtype] + case.rounding):
            return f"{output}: {problem} ({case.name})"
    return ""


def _first(problems: Iterator[str]) -> str:
    return next(filter(None, problems), "")


def stats(dtype: torch.dtype, device: torch.device) -> str:
    """`softmax_stats`: all five outputs."""

    def problems() -> Iterator[str]:
        for case in cases(dtype):
            found = on(device, _ops.softmax_stats, *case.problem, True)
            names, truth = ("neg_lse", "pos_lse", "pos_sum", "pos_count", "mean"), (*case.stats, case.mean)
            yield _worst(case, dtype, **dict(zip(names, zip(found, truth, strict=True), strict=True)))

    return _first(problems())


def query_grad(dtype: torch.dtype, device: torch.device) -> str:
    """`softmax_query_grad`: the gradients of query and scale."""

    def problems() -> Iterator[str]:
        for case in cases(dtype):
            neg, pos, *_ = (x.float() for x in case.stats)
            dquery, dscale = on(
                device, _ops.softmax_query_grad, *case.problem, neg, pos, case.mean.float(), *case.arriving
            )
            truth = case.gradients
            yield _worst(case, dtype, dquery=(dquery, truth[0]), dscale=(dscale, truth[2][:, 0]))

    return _first(problems())


def key_grad(dtype: torch.dtype, device: torch.device) -> str:
    """`softmax_key_grad`: the gradients of keys and bias."""

    def problems() -> Iterator[str]:
        for case in cases(dtype):
            neg, pos, *_ = (x.float() for x in case.stats)
            dkeys, dbias = on(
                device, _ops.softmax_key_grad, *case.problem, neg, pos, *case.arriving, True, True
            )
            yield _worst(case, dtype, dkeys=(dkeys, case.gradients[1]), dbias=(dbias, case.gradients[3]))

    return _first(problems())


def loss(dtype: torch.dtype, device: torch.device) -> str:
    """`softmax_loss`: its value and both gradients, as a mean and as a sum."""

    def problems() -> Iterator[str]:
        for case in cases(dtype):
            for mean, truth in case.losses.items():
                found = on(device, _ops.softmax_loss, *case.problem, mean, True, True)
                pairs = dict(zip(("loss", "dquery", "dkeys"), zip(found, truth, strict=True), strict=True))
                yield _worst(case, dtype, **pairs)

    return _first(problems())
