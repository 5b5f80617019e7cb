"""Random searches on every instruction set: against float64, and by every road, bit for bit.

A score may be off by the documented rounding (`engine.search_truth`). What led to it may not show: threads,
segments, packed keys, pairs one by one, ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from engine.search_truth import METRICS, check
from example_counts import examples
from fuzz.drawn import DTYPES, LAYOUTS, LEVELS, SEEDS, THREADS, laid_out
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastcompat as fc
from fastcompat import _native, _search
from fastcompat._types import Segment

ROWS = st.sampled_from([1, 2, 8, 9, 16, 17, 33, 65, 70])
KEYS = st.sampled_from([1, 2, 31, 64, 65, 129, 300, 700, 1500, 3300, 5000])
DIMS = st.sampled_from([1, 2, 7, 8, 16, 17, 33, 64, 65, 130])
KINDS = (
    "normal",
    "whole numbers",
    "few different rows",
    "a crowd",
    "far from the origin",
    "many sizes",
    "zeros",
)


@dataclass
class Drawn:
    """A search as it was drawn; its tensors follow from the seed."""

    level: str
    threads: int
    dtype: torch.dtype
    metric: str
    rows: int
    keys: int
    dim: int
    k: int
    kind: str
    labels: bool
    exclude: bool
    layouts: tuple[str, str]
    seed: int
    q: Tensor = field(init=False, repr=False)
    x: Tensor = field(init=False, repr=False)
    filters: dict[str, Tensor] = field(init=False, repr=False)
    allowed: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        gen = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=gen)

        def whole(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, generator=gen)

        query, keys = normal(self.rows, self.dim), normal(self.keys, self.dim)
        if self.kind == "whole numbers":
            query, keys = (whole(-3, 4, n, self.dim).float() for n in (self.rows, self.keys))
        elif self.kind == "few different rows":
            keys = keys[whole(0, max(1, self.keys // 20), self.keys)]
        elif self.kind == "a crowd":
            keys = normal(self.dim) + 2.0 ** float(-whole(1, 20, 1)) * keys
        elif self.kind == "far from the origin":
            far = 30 * normal(self.dim)
            query, keys = query + far, keys + far
        elif self.kind == "many sizes":
            query, keys = (x * 10 ** (3 * torch.rand(len(x), 1, generator=gen) - 1.5) for x in (query, keys))
        elif self.kind == "zeros":
            query[::2], keys[::3] = 0, 0
        self.q, self.x = (
            laid_out(x.to(self.dtype), layout) for x, layout in zip((query, keys), self.layouts, strict=True)
        )
        y, w = whole(-1, 3, self.rows), whole(-1, 3, self.keys)
        hole = whole(-1, self.keys, self.rows)
        self.filters = {"query_labels": y, "key_labels": w} if self.labels else {}
        self.filters |= {"exclude": hole} if self.exclude else {}
        self.allowed = torch.ones(self.rows, self.keys, dtype=torch.bool)
        if self.labels:
            self.allowed &= (y[:, None] != w) | (y[:, None] < 0)
        if self.exclude:
            self.allowed &= torch.arange(self.keys) != hole[:, None]


DRAWN = st.builds(
    Drawn,
    level=LEVELS,
    threads=THREADS,
    dtype=DTYPES,
    metric=st.sampled_from(METRICS),
    rows=ROWS,
    keys=KEYS,
    dim=DIMS,
    k=st.sampled_from([1, 2, 3, 10, 33, 100, 400]),
    kind=st.sampled_from(KINDS),
    labels=st.booleans(),
    exclude=st.booleans(),
    layouts=st.tuples(LAYOUTS, LAYOUTS),
    seed=SEEDS,
)


def set_up(drawn: Drawn) -> None:
    _native.set_simd(drawn.level)
    torch.set_num_threads(drawn.threads)


@given(DRAWN)
@examples(100)
def test_the_best_keys(drawn: Drawn) -> None:
    set_up(drawn)
    found = fc.topk(drawn.q, drawn.x, drawn.k, metric=drawn.metric, **drawn.filters)
    check(drawn.q, drawn.x, drawn.k, drawn.metric, found, drawn.allowed)


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...], what: str) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), what


@given(DRAWN, st.integers(1, 3))
@examples(100)
def test_every_road_leads_to_the_same_bits(drawn: Drawn, parts: int) -> None:
    set_up(drawn)
    q, x, k, metric = drawn.q, drawn.x, drawn.k, drawn.metric
    found = fc.topk(q, x, k, metric=metric, **drawn.filters)
    score, ids = found
    torch.set_num_threads(1)
    same(fc.topk(q, x, k, metric=metric, **drawn.filters), found, "one thread")
    alone = fc.topk(
        q[-1:],
        x,
        k,
        metric=metric,
        **{n: f if n == "key_labels" else f[-1:] for n, f in drawn.filters.items()},
    )
    same(alone, (score[-1:], ids[-1:]), "one query alone")
    pairs = _search.pair_scores(q, x, ids, metric, native=True)
    same((pairs,), (score,), "pairs one by one")

    gen = torch.Generator().manual_seed(drawn.seed + 1)
    of = torch.randint(parts, (drawn.keys,), generator=gen)
    cut = [Segment(q, x, (of == part).nonzero()[:, 0]) for part in range(parts)]
    found_cut = _search.topk(cut, k, metric, **drawn.filters, native=True, names=[("query", "keys")] * parts)
    same(found_cut, found, f"{parts} segments")
    whole = [Segment(q, x)]
    for segments in (whole, cut):
        packed = [_search.pack(segment, metric, ("query", "keys")) for segment in segments]
        names = [("query", "keys")] * len(segments)
        again = _search.topk(segments, k, metric, **drawn.filters, native=True, names=names, packed=packed)
        same(again, found, f"{len(segments)} packed segments")

    if not drawn.labels:  # then a key's place among the best is its rank
        hole = drawn.filters.get("exclude")
        expected = torch.arange(k).expand_as(ids).masked_fill(ids < 0, -1)
        same((fc.ranks(q, x, ids, metric=metric, exclude=hole),), (expected,), "ranks of the best")
