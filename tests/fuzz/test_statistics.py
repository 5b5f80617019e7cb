"""Random softmax problems on every instruction set, in value and gradient, against float64.

The error may be twice that of the reference in float32, plus what the documented roundings bring: of every
logit to float32, of the weights of a sum to bfloat16 where the keys are, of 16-bit results once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from example_counts import examples
from fuzz.drawn import DTYPES, LAYOUTS, LEVELS, SEEDS, THREADS, laid_out
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from fastcompat import _autograd, _native, reference
from fastcompat._types import SoftmaxProblem

EPSILON = 2.0**-23
# Around the widths of vectors, tiles, blocks and parts.
ROWS = st.sampled_from([1, 2, 3, 15, 16, 17, 32, 33, 64, 65, 129, 300, 530])
KEYS = st.sampled_from([1, 2, 31, 64, 65, 127, 128, 129, 300, 511, 512, 513, 1024, 1100, 1537])
DIMS = st.sampled_from([1, 2, 7, 8, 16, 17, 33, 64, 65, 130, 257])


@dataclass
class Drawn:
    """A problem as it was drawn; its tensors follow from the seed."""

    level: str
    threads: int
    dtype: torch.dtype
    rows: int
    keys: int
    dim: int
    spread: float  # of the embeddings
    scale: float
    bias: str
    sets: tuple[str, ...]  # of "labels", "positive", "exclude"
    labels: str
    layouts: tuple[str, str]
    seed: int
    wanted: tuple[bool, bool, bool]  # gradients of query, keys, bias
    mean: bool
    problem: SoftmaxProblem = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen)

        query, keys = (
            laid_out((self.spread * normal(n, self.dim)).to(self.dtype), layout)
            for n, layout in zip((self.rows, self.keys), self.layouts, strict=True)
        )
        bias = {
            "none": None,
            "normal": normal(self.keys),
            "-inf": normal(self.keys).masked_fill(normal(self.keys) > 1, -torch.inf),
        }
        shift = float(self.bias) if self.bias not in bias else None
        labels = self._labels(gen)
        self.problem = SoftmaxProblem(
            query,
            keys,
            self.scale,
            normal(self.keys) + shift if shift is not None else bias[self.bias],
            *(labels if "labels" in self.sets else (None, None)),
            *(
                torch.randint(-1, self.keys, (self.rows,), generator=gen) if name in self.sets else None
                for name in ("positive", "exclude")
            ),
        )

    def _labels(self, gen: torch.Generator) -> tuple[Tensor, Tensor]:
        counts = {"few": 3, "many": max(1, self.keys // 2), "one": 1, "sorted": 3, "of this row alone": 2}
        classes = counts[self.labels]
        y, w = (
            torch.randint(-1 if classes == 3 else 0, classes, (n,), generator=gen)
            for n in (self.rows, self.keys)
        )
        if self.labels == "sorted":
            y, w = y.sort().values, w.sort().values
        if self.labels == "of this row alone":  # all but the last key share the first row's label
            y[0], w[:] = 0, 0
            w[-1] = 1
        return y, w


DRAWN = st.builds(
    Drawn,
    level=LEVELS,
    threads=THREADS,
    dtype=DTYPES,
    rows=ROWS,
    keys=KEYS,
    dim=DIMS,
    spread=st.sampled_from([0.05, 0.3, 1.0, 4.0]),
    scale=st.sampled_from([1.0, -1.0, 0.0, 1e-3, 20.0]),
    bias=st.sampled_from(["none", "normal", "-inf", "-100", "-1000", "100", "1e30", "-1e30"]),
    sets=st.sets(st.sampled_from(["labels", "positive", "exclude"])).map(lambda x: tuple(sorted(x))),
    labels=st.sampled_from(["few", "many", "one", "sorted", "of this row alone"]),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    seed=SEEDS,
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any),
    mean=st.booleans(),
)


def leaves(drawn: Drawn, dtype: torch.dtype) -> tuple[SoftmaxProblem, list[Tensor]]:
    """The problem in another dtype, and what of it requires grad."""
    p = drawn.problem
    query, keys, bias = p.query.detach(), p.keys.detach(), p.bias
    if dtype != drawn.dtype:  # in its own dtype it stays where it lies
        query, keys = query.to(dtype), keys.to(dtype)
    if bias is not None:
        bias = bias.to(torch.float64 if dtype == torch.float64 else torch.float32)
    everything = [query, keys, bias]
    chosen = [
        x.requires_grad_() for x, w in zip(everything, drawn.wanted, strict=True) if w and x is not None
    ]
    return p._replace(query=query, keys=keys, bias=bias), chosen


def gradients(outputs: list[Tensor], arriving: list[Tensor], chosen: list[Tensor]) -> list[Tensor]:
    pairs = [(x, g.to(x)) for x, g in zip(outputs, arriving, strict=True) if x.requires_grad]
    if not pairs:
        return [torch.zeros_like(x) for x in chosen]
    results, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(results, chosen, grads, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(chosen, found, strict=True)]


def largest_logit(p: SoftmaxProblem) -> float:
    size = abs(p.scale) * _longest(p.query) * _longest(p.keys)
    bias = 0.0 if p.bias is None else float(p.bias.detach().double().nan_to_num(0, 0, 0).abs().max())
    return size + bias


def _longest(rows: Tensor) -> float:
    return float(rows.detach().double().norm(dim=1).max())


def close(name: str, ours: Tensor, plain: Tensor, truth: Tensor, floor: float) -> None:
    ours, plain, truth = (x.detach().double() for x in (ours, plain, truth))
    finite = truth.isfinite()
    assert not ours.isnan().any(), f"{name}: NaN"
    assert torch.equal(ours[~finite], truth[~finite]), f"{name}: infinities differ"
    if finite.any():
        error = (ours - truth)[finite].abs().max().item()
        allowed = 2 * (plain - truth)[finite].abs().nan_to_num(0, 0, 0).max().item() + floor
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def gradient_floor(p: SoftmaxProblem, arriving: float, out: Tensor, exact: Tensor) -> float:
    """Roundings of a gradient: a sum of coefficients, at most `arriving` in all, times rows and scale."""
    factor = 1.0 if out is p.bias else abs(p.scale) * max(x.double().abs().max().item() for x in p[:2])
    size = arriving * factor
    # The exponent's own rounding is relative in its exponential, which is at most 1.
    relative = 4 * EPSILON * (4 + p.query.shape[1] ** 0.5 + largest_logit(p))
    if p.query.dtype == torch.bfloat16:
        relative += 2.0**-8
    rounded = torch.finfo(out.dtype).eps * exact.abs().max().item() if exact.numel() else 0.0
    smallest = torch.finfo(out.dtype).smallest_normal if out.dtype == torch.float16 else 1e-37
    return min(relative, 2.0) * size + rounded + smallest


@given(DRAWN)
@examples(120)
def test_statistics_and_gradients(drawn: Drawn) -> None:
    _native.set_simd(drawn.level)
    torch.set_num_threads(drawn.threads)
    gen = torch.Generator().manual_seed(drawn.seed + 1)
    arriving = [torch.randn(drawn.rows, generator=gen) for _ in range(3)]

    reached = reference.softmax_stats(*drawn.problem).pos_sum.isfinite()
    arriving[2] *= reached  # the slope of -inf is anybody's

    def run(dtype: torch.dtype, kernel: Any) -> tuple[Any, list[Tensor], list[Tensor]]:
        p, chosen = leaves(drawn, dtype)
        stats = kernel(p)
        return stats, gradients(list(stats[:3]), arriving, chosen), chosen

    ours, mine, chosen = run(drawn.dtype, _autograd.softmax_stats)
    plain, theirs, _ = run(torch.float32, lambda p: reference.softmax_stats(*p))
    truth, exact, _ = run(torch.float64, lambda p: reference.softmax_stats(*p))
    p = drawn.problem
    assert torch.equal(ours.pos_count, truth.pos_count)
    most = max(1, int(truth.pos_count.max()))
    floor = 2 * EPSILON * (1 + largest_logit(p))
    for name, count in (("neg_lse", 1), ("pos_lse", 1), ("pos_sum", most)):
        close(name, *(getattr(x, name) for x in (ours, plain, truth)), floor * count)
    total = sum(x.abs().sum().item() for x in arriving[:2]) + most * arriving[2].abs().sum().item()
    for leaf, *found in zip(chosen, mine, theirs, exact, strict=True):
        name = "query" if leaf.shape == p.query.shape else "keys or bias"
        close(f"gradient of {name}", *found, gradient_floor(p, total, leaf, found[-1]))


def plain_loss(p: SoftmaxProblem, mean: bool) -> Tensor:
    stats = reference.softmax_stats(*p)
    rows = stats.pos_count > 0
    neg, pos = stats.neg_lse[rows], stats.pos_lse[rows]
    odds = torch.where(neg == -torch.inf, -torch.inf, neg - pos)  # no negatives: the loss is 0
    each = torch.where(odds > 0, odds, 0.0) + torch.log1p(torch.exp(-odds.abs()))
    return each.sum() / (rows.sum().clamp(min=1) if mean else 1)


@given(DRAWN.filter(lambda d: d.dtype != torch.float16 and any(d.wanted[:2]) and d.bias != "-inf"))
@examples(80)
def test_the_loss_with_its_gradients(drawn: Drawn) -> None:
    _native.set_simd(drawn.level)
    torch.set_num_threads(drawn.threads)
    drawn.wanted = (*drawn.wanted[:2], False)

    def run(dtype: torch.dtype, kernel: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        p, chosen = leaves(drawn, dtype)
        loss = kernel(p, drawn.mean)
        return loss, gradients([loss], [torch.ones(())], chosen), chosen

    ours, mine, chosen = run(drawn.dtype, _autograd.softmax_loss)
    plain, theirs, _ = run(torch.float32, plain_loss)
    truth, exact, _ = run(torch.float64, plain_loss)
    p = drawn.problem
    note(f"loss {truth.item()}")
    rows = 1 if drawn.mean else drawn.rows
    close("loss", ours, plain, truth, 4 * EPSILON * rows * (1 + largest_logit(p)))
    for leaf, *found in zip(chosen, mine, theirs, exact, strict=True):
        close("gradient", *found, gradient_floor(p, 2.0 * rows, leaf, found[-1]))
