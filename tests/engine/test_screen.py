"""`topk` is the sort of its own scores, bit for bit, whatever tries to mislead a screening in low precision.

The oracle are the engine's scores of all pairs, one by one, in a stable sort. The keys are hostile: they
differ in the last bit, repeat, have norms from 1e-18 to 1e18, or lie where bfloat16 or a 16-bit integer
overflows or is coarsest.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastcompat as fc
from fastcompat import _search
from fastcompat._types import Segment

METRICS = ("cosine", "ip", "l2")
DIMS = (1, 31, 128, 257)
KS = (1, 7, 100, 2048)
QUERIES = ("random", "near", "flat")


def all_scores(query: Tensor, keys: Tensor, metric: str) -> Tensor:
    """Score of every pair [B, N], each computed as a pair of its own."""
    everyone = torch.arange(len(keys)).expand(len(query), -1)
    return _search.pair_scores(query, keys, everyone, metric, native=True)


def check(
    query: Tensor, keys: Tensor, k: int, metric: str, allowed: Tensor | None = None, **filters: Tensor
) -> None:
    table = all_scores(query, keys, metric)
    assert table.isfinite().all()
    if allowed is not None:
        table = table.masked_fill(~allowed, -torch.inf)
    expected, order = table.sort(dim=1, descending=True, stable=True)
    order = order.masked_fill(expected == -torch.inf, -1)
    scores, ids = fc.topk(query, keys, k, metric=metric, backend="native", **filters)
    found = min(k, len(keys))
    assert torch.equal(ids[:, :found], order[:, :found])
    assert torch.equal(scores[:, :found], expected[:, :found])
    assert ids[:, found:].eq(-1).all() and scores[:, found:].eq(-torch.inf).all()


def last_bits(x: Tensor, steps: int = 2) -> Tensor:
    """Each number moved by up to so many of its own last bits."""
    moved = x.clone().view(torch.int32)
    return (moved + torch.randint(-steps, steps + 1, moved.shape, dtype=torch.int32)).view(torch.float32)


def crowd(rows: int, dim: int) -> Tensor:
    """Near-copies of one key: all their scores lie within bfloat16's error of one another."""
    return last_bits(torch.randn(1, dim).expand(rows, dim).contiguous())


def copies(rows: int, dim: int) -> Tensor:
    """A few keys, each many times, half of the copies with one last bit changed."""
    few = torch.randn(max(1, rows // 50), dim)
    keys = few[torch.randint(len(few), (rows,))]
    changed = torch.rand(rows) < 0.5
    keys[changed] = torch.where(
        torch.rand(int(changed.sum()), dim) < 1 / dim, last_bits(keys[changed], 1), keys[changed]
    )
    return keys


def norms(rows: int, dim: int) -> Tensor:
    """Norms from 1e-18 to 1e18 in one gallery."""
    return F.normalize(torch.randn(rows, dim)) * 10 ** (36 * torch.rand(rows, 1) - 18)


def norms_within(rows: int, dim: int) -> Tensor:
    """Numbers from 1e-16 to 1e16 in one vector: the large ones drown the others in low precision."""
    return torch.randn(rows, dim) * 10 ** (32 * torch.rand(rows, dim) - 16)


def halfway(rows: int, dim: int) -> Tensor:
    """Every number lies halfway between two of bfloat16, where the rounding is largest."""
    bits = torch.randn(rows, dim).view(torch.int32)
    return ((bits & ~0xFFFF) | 0x8000).view(torch.float32) * (1 - 2**-24 * torch.randint(0, 3, (rows, 1)))


def half_steps(rows: int, dim: int) -> Tensor:
    """Every number but the last lies halfway between two multiples of the norm / 32,766."""
    keys = torch.randint(-4000, 4000, (rows, dim)).double().clamp(-30000 / dim**0.5, 30000 / dim**0.5) + 0.5
    keys[:, -1] = (32766.0**2 - keys[:, :-1].square().sum(1)).sqrt()
    return keys.float()


def spikes(rows: int, dim: int) -> Tensor:
    """One number holds nearly all of the norm; the order is decided by the others."""
    keys = 1e-4 * torch.randn(rows, dim)
    keys[:, 0] = 1.0
    return keys


def cancelling(rows: int, dim: int) -> Tensor:
    """Pairs of large numbers that cancel against a flat query; the rest is below their error."""
    keys = torch.randn(rows, dim)
    half = dim // 2
    keys[:, :half] *= 1000
    keys[:, half : 2 * half] = -keys[:, :half] + torch.randn(rows, half) * 1e-3
    return keys


def shuffled(rows: int, dim: int) -> Tensor:
    """One key in many orders: against a flat query the scores differ by the rounding of their sums alone."""
    return torch.randn(dim)[torch.rand(rows, dim).argsort(1)]


def plain(rows: int, dim: int) -> Tensor:
    """Nothing special."""
    return torch.randn(rows, dim)


def queries(kind: str, count: int, keys: Tensor) -> Tensor:
    """Anything; beside a key, so that the best keys are those nearest to each other; or all numbers equal."""
    if kind == "near":
        return last_bits(keys[torch.randint(len(keys), (count,))])
    return (
        torch.randn(count, 1 if kind == "flat" else keys.shape[1]).expand(count, keys.shape[1]).contiguous()
    )


HOSTILE: tuple[Callable[[int, int], Tensor], ...] = (
    crowd,
    copies,
    norms,
    norms_within,
    halfway,
    half_steps,
    spikes,
    cancelling,
    shuffled,
    plain,
)


@pytest.mark.parametrize("queries", [1, 3, 8])
@pytest.mark.parametrize("metric", METRICS)
def test_few_queries_give_ties_to_the_smallest_ids(queries: int, metric: str) -> None:
    """Bounds of zero scores leave no room, and few queries do not take the keys in their order."""
    keys = torch.zeros(4000, 20)
    keys[:1900] = -torch.rand(1900, 20)  # worse than the ties after them
    check(torch.rand(queries, 20), keys, 7, metric)


@pytest.mark.parametrize("hostile", HOSTILE)
@examples(9)
@given(data=st.data())
def test_hostile_keys(hostile: Callable[[int, int], Tensor], data: st.DataObject) -> None:
    dim, k = data.draw(st.sampled_from(DIMS)), data.draw(st.sampled_from(KS))
    rows = data.draw(st.sampled_from((1, 130, 700, 6000) if k < 2048 else (2100,)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    torch.set_num_threads(data.draw(st.sampled_from((1, 2))))
    keys = hostile(rows, dim)
    query = queries(data.draw(st.sampled_from(QUERIES)), data.draw(st.sampled_from((1, 5, 20))), keys)
    check(query, keys, k, data.draw(st.sampled_from(METRICS)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("hostile", "kind", "exact"),
    [
        (plain, "random", "keys"),
        (plain, "near", "keys"),
        (plain, "random", "queries"),
        (plain, "near", "queries"),
        (shuffled, "flat", "both"),
    ],
)
def test_one_side_loses_nothing_in_bfloat16(
    hostile: Callable[[int, int], Tensor], kind: str, exact: str, metric: str
) -> None:
    """Then all of a screening's error is the other side's, or the summation's."""
    keys = hostile(700, 128)
    query = queries(kind, 20, keys)
    if exact != "queries":
        keys = keys.bfloat16().float()
    if exact != "keys":
        query = query.bfloat16().float()
    check(query, keys, 30, metric)


@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("metric", METRICS)
def test_more_near_ties_than_any_list_of_candidates_holds(metric: str, k: int) -> None:
    """The crowd is larger than k everywhere, and the best of it comes last."""
    query = torch.randn(3, 64)
    keys = torch.cat([torch.randn(300, 64), crowd(3000, 64)])
    keys = keys[all_scores(query[:1], keys, metric)[0].argsort(stable=True)]
    check(query, keys, k, metric)


SEARCH = Path(__file__).parents[2] / "csrc" / "cpu" / "search.cpp"


def sampled(rows: int) -> Tensor:
    """The keys from which `topk` tells beforehand how good the best will be (csrc/cpu/search.cpp)."""
    starts = range(0, rows - 199, 200)
    return torch.tensor([at + ((at + 1) * 0x9E3779B97F4A7C15 % 2**64 >> 32) % 200 for at in starts])


def test_the_sample_is_drawn_as_the_engine_draws_it() -> None:
    """Whoever changes the engine's lines changes `sampled` too, or the tests below aim at nothing."""
    code = " ".join(SEARCH.read_text().split())
    for line in (
        "constexpr int64_t kStride = 200;",
        "for (int64_t from = 0; from + kStride <= s.count; from += kStride)",
        "mixed = static_cast<uint64_t>(from + 1) * 0x9E3779B97F4A7C15u >> 32;",
        "at = from + static_cast<int64_t>(mixed % kStride);",
    ):
        assert line in code, f"csrc/cpu/search.cpp has lost: {line}"


@pytest.mark.parametrize("k", (1, 7, 100))
@pytest.mark.parametrize("best", (3, 29, 30))
def test_a_sample_that_holds_the_best_keys(best: int, k: int) -> None:
    """Fewer than k keys are as good as the sample promises, for every second query."""
    query, keys = torch.randn(20, 31), torch.randn(6000, 31)
    keys[sampled(6000)[:best]] = query[::2].mean(0) * 10 + 0.1 * torch.randn(best, 31)
    query[::2] = query[::2].mean(0) + 0.01 * torch.randn(10, 31)
    for metric in METRICS:
        check(query, keys, k, metric)
        others = torch.ones(6000, dtype=torch.int64)
        others[sampled(6000)[: best // 2]] = 0
        labels = (torch.arange(20) % 3 > 0).long()
        check(query, keys, k, metric, labels[:, None] != others, query_labels=labels, key_labels=others)


@pytest.mark.parametrize("left", (0, 1, 60, 100))
def test_fewer_keys_left_than_the_sample_promises(left: int) -> None:
    """A query may have almost no keys of another label, all of them in the sample."""
    query, keys = torch.randn(9, 31), torch.randn(20_000, 31)
    w = torch.zeros(20_000, dtype=torch.int64)
    w[sampled(20_000)[:left]] = 1
    check(query, keys, 100, "ip", (w > 0).expand(9, -1), query_labels=torch.zeros(9).long(), key_labels=w)


def test_all_scores_tie_with_the_sample() -> None:
    check(torch.zeros(9, 31), torch.randn(6000, 31), 100, "ip")
    check(torch.randn(9, 31), torch.randn(1, 31).repeat(6000, 1), 100, "l2")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("metric", METRICS)
def test_labels_and_exclusions_among_near_ties(metric: str, dtype: torch.dtype) -> None:
    query, keys = torch.randn(20, 31).to(dtype), copies(900, 31).to(dtype)
    y, w, hole = torch.randint(-1, 3, (20,)), torch.randint(-1, 3, (900,)), torch.randint(-1, 900, (20,))
    allowed = ((y[:, None] != w) | (y[:, None] < 0)) & (torch.arange(900) != hole[:, None])
    check(query, keys, 100, metric, allowed, query_labels=y, key_labels=w, exclude=hole)


@pytest.mark.parametrize(
    ("key_size", "query_size"),
    [(3.4e38, 1e-25), (1e-41, 1e30), (1e-38, 1e-3), (3e38, 1e-44)],
    ids=("bfloat16 overflows", "denormal keys", "denormal products", "denormal queries"),
)
def test_ends_of_the_range(key_size: float, query_size: float) -> None:
    """Half of the keys lie at the end, the others a little way from it."""
    sizes = key_size * torch.tensor([0.9, 1.0]).repeat(400)[:, None]
    keys = (1 - 0.002 * torch.rand(800, 31)) * sizes * (2 * torch.randint(0, 2, (800, 31)) - 1)
    assert keys.isfinite().all() and keys.abs().min() > 0
    check(torch.randn(7, 31) * query_size, keys, 100, "ip")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("sizes", ((1.0, 1.0), (1e15, 1e-15)))
def test_a_mixed_gallery_of_near_ties(metric: str, sizes: tuple[float, float]) -> None:
    """Two segments of one ranking; with factors that are powers of two nothing is rounded twice."""
    queries = [torch.randn(9, dim) for dim in (31, 64)]
    sides = [copies(900, dim) * size for dim, size in zip((31, 64), sizes, strict=True)]
    backfilled = torch.rand(900) < 0.4
    old, new = (all_scores(q, keys, metric) for q, keys in zip(queries, sides, strict=True))
    table = torch.where(backfilled, 2 * new, 0.5 * old)
    expected, order = table.sort(dim=1, descending=True, stable=True)
    scores, ids = fc.mixed_topk(
        queries[0], sides[0], queries[1], sides[1], backfilled, 100, metric=metric, scale=(0.5, 2.0)
    )
    assert torch.equal(ids, order[:, :100]) and torch.equal(scores, expected[:, :100])


@pytest.mark.parametrize("count", (5, 20))
@pytest.mark.parametrize(
    "sizes", ((500, 40, 700), (40, 500, 700), (500, 700, 40), (500, 300, 400, 40), (3000, 2500, 700))
)
def test_segments_of_their_own_vectors_whether_screened_or_too_short_for_it(
    sizes: tuple[int, ...], count: int
) -> None:
    items = sum(sizes)
    galleries = [copies(items, 31) for _ in sizes]
    queries = [torch.randn(count, 31) for _ in sizes]
    rows = [part.sort().values for part in torch.randperm(items).split(sizes)]
    segments = [Segment(q, keys, part) for q, keys, part in zip(queries, galleries, rows, strict=True)]
    for metric in METRICS:
        table = torch.empty(count, items)
        for q, keys, part in zip(queries, galleries, rows, strict=True):
            table[:, part] = all_scores(q, keys, metric)[:, part]
        expected, order = table.sort(dim=1, descending=True, stable=True)
        scores, ids = _search.topk(segments, 12, metric, native=True, names=(("query", "keys"),) * len(sizes))
        assert torch.equal(ids, order[:, :12]) and torch.equal(scores, expected[:, :12])
