"""`mixed_topk` against brute force, `topk` on the pure sides and faiss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from retrieval_oracle import exact_vectors, ranking, scores
from torch import Tensor

import fastcompat as fc

METRICS = ("cosine", "ip", "l2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "reference")


def random_case(
    seed: int, queries: int = 9, items: int = 120
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    vectors = (
        torch.randn(queries, 13),
        torch.randn(items, 13),
        torch.randn(queries, 22),
        torch.randn(items, 22),
    )
    return *vectors, torch.rand(items) < 0.4


@examples(60)
@given(
    queries=st.integers(0, 7),
    items=st.integers(0, 60),
    dims=st.tuples(*[st.sampled_from((1, 4, 16))] * 2),
    k=st.integers(1, 70),
    metric=st.sampled_from(METRICS),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    share=st.sampled_from((0.0, 0.3, 0.8, 1.0)),
    scale=st.tuples(*[st.sampled_from((1.0, 0.5, 4.0))] * 2),
    offset=st.tuples(*[st.sampled_from((0.0, -1.0, 0.25))] * 2),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**16),
)
def test_equals_brute_force_with_heavy_ties(
    queries: int,
    items: int,
    dims: tuple[int, int],
    k: int,
    metric: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    share: float,
    scale: tuple[float, float],
    offset: tuple[float, float],
    backend: str,
    seed: int,
) -> None:
    sides = [
        [
            exact_vectors(seed + 2 * side + i, n, dims[side], metric, dtypes[side])
            for i, n in enumerate((queries, items))
        ]
        for side in (0, 1)
    ]
    backfilled = torch.rand(items, generator=torch.Generator().manual_seed(seed)) < share
    old, new = (scale[s] * scores(*sides[s], metric) + offset[s] for s in (0, 1))
    table = np.where(backfilled.numpy(), new, old)
    for side, unread in ((0, backfilled), (1, ~backfilled)):
        sides[side][1][unread] = math.nan
    found, ids = fc.mixed_topk(
        *sides[0], *sides[1], backfilled, k, metric=metric, scale=scale, offset=offset, backend=backend
    )
    assert found.shape == ids.shape == (queries, k)
    for i in range(queries):
        ranked = ranking(table[i])[:k]
        missing = k - len(ranked)
        assert ids[i].tolist() == ranked + [-1] * missing
        assert found[i].tolist() == table[i][ranked].tolist() + [-math.inf] * missing


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pure_galleries_equal_topk_exactly(metric: str, dtype: torch.dtype) -> None:
    query_old, old, query_new, new, _ = (value.to(dtype) for value in random_case(0))
    nothing, everything = torch.zeros(120, dtype=torch.bool), torch.ones(120, dtype=torch.bool)
    unread = [torch.full_like(value, math.nan) for value in (query_old, old, query_new, new)]
    for given_arrays, mask, plain in (
        ((query_old, old, *unread[2:]), nothing, (query_old, old)),
        ((*unread[:2], query_new, new), everything, (query_new, new)),
    ):
        mixed = fc.mixed_topk(*given_arrays, mask, 10, metric=metric)
        for a, b in zip(mixed, fc.topk(*plain, 10, metric=metric), strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("metric", METRICS)
def test_every_item_has_the_score_that_topk_gives_it(metric: str) -> None:
    *vectors, backfilled = random_case(1)
    table = torch.empty(9, 120)
    for side, mask in ((0, ~backfilled), (1, backfilled)):
        found, ids = fc.topk(vectors[2 * side], vectors[2 * side + 1], 120, metric=metric)
        whole = torch.empty_like(found).scatter_(1, ids, found)
        table[:, mask] = whole[:, mask]
    expected, order = table.sort(dim=1, descending=True, stable=True)
    mixed, ids = fc.mixed_topk(*vectors, backfilled, 120, metric=metric)
    assert torch.equal(mixed, expected) and torch.equal(ids, order)


@pytest.mark.parametrize("metric", ("ip", "l2"))
def test_pure_sides_equal_faiss(metric: str) -> None:
    import faiss  # a machine with a GPU may be without it

    query_old, old, query_new, new, _ = random_case(2)
    mask = torch.ones(120, dtype=torch.bool)
    for query, gallery, backfilled in ((query_old, old, ~mask), (query_new, new, mask)):
        gaps = np.diff(np.sort(scores(query, gallery, metric), 1), axis=1)
        assert gaps.min() > 1e-5  # no near-tie that rounding could turn round
        index = (faiss.IndexFlatIP if metric == "ip" else faiss.IndexFlatL2)(gallery.shape[1])
        index.add(gallery.numpy())
        distances, ids = index.search(query.numpy(), 20)
        mixed, mixed_ids = fc.mixed_topk(query_old, old, query_new, new, backfilled, 20, metric=metric)
        assert mixed_ids.numpy().tolist() == ids.tolist()
        np.testing.assert_allclose(mixed, distances if metric == "ip" else -distances, rtol=1e-5, atol=2e-5)


def test_ties_across_the_spaces_go_to_the_smaller_id() -> None:
    query, gallery = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]]).expand(40, 2)
    backfilled = torch.arange(40) % 3 == 1
    for metric in METRICS:
        _, ids = fc.mixed_topk(query, gallery, query.clone(), gallery.clone(), backfilled, 40, metric=metric)
        assert ids.tolist() == [list(range(40))]


def test_numpy_in_numpy_out() -> None:
    case = random_case(3)
    from_torch, from_numpy = fc.mixed_topk(*case, 5), fc.mixed_topk(*(value.numpy() for value in case), 5)
    for a, b in zip(from_torch, from_numpy, strict=True):
        assert isinstance(a, Tensor) and isinstance(b, np.ndarray) and np.array_equal(a, b)


def test_strided_inputs_change_no_bit() -> None:
    *vectors, backfilled = random_case(4)
    plain = fc.mixed_topk(*vectors, backfilled, 7)
    strided = fc.mixed_topk(*(value.T.contiguous().T for value in vectors), backfilled, 7)
    assert all(torch.equal(a, b) for a, b in zip(plain, strided, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (math.nan, math.inf))
@pytest.mark.parametrize("name", ("query_old", "old", "query_new", "new"))
def test_refuses_bad_rows_that_are_read(name: str, value: float, backend: str) -> None:
    *vectors, backfilled = random_case(5)
    place = ("query_old", "old", "query_new", "new").index(name)
    read = (
        torch.arange(9)
        if name.startswith("query")
        else (backfilled if name == "new" else ~backfilled).nonzero()[:, 0]
    )
    row = int(read[-2])
    vectors[place][row, 2] = value
    with pytest.raises(ValueError, match=rf"`{name}` must be finite: row {row} "):
        fc.mixed_topk(*vectors, backfilled, 5, backend=backend)
