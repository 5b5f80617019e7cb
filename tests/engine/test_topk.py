"""Exact search: against a full stable sort in float64, against faiss, and against its own tie rule."""

from __future__ import annotations

import pytest
import torch
from engine.search_truth import DTYPES, METRICS, check, exact_scores
from hypothesis import given
from hypothesis import strategies as st

import fastcompat as fc

BACKENDS = ["native", "reference"]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "columns", "dim", "k"),
    [(1, 1, 1, 1), (1, 33, 3, 40), (31, 1, 5, 2), (33, 500, 31, 10), (65, 123, 130, 123), (3, 5000, 17, 100)],
)
def test_sizes_dtypes_metrics(rows, columns, dim, k, dtype, metric):
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    check(query, keys, k, metric, fc.topk(query, keys, k, metric=metric, backend="native"))


@given(data=st.data())
def test_any_shape_with_labels_and_exclusions(data):
    rows, columns, dim = (data.draw(st.integers(1, size)) for size in (40, 300, 70))
    k = data.draw(st.integers(1, 120))
    metric, dtype = data.draw(st.sampled_from(METRICS)), data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    named, allowed = {}, torch.ones(rows, columns, dtype=torch.bool)
    if data.draw(st.booleans()):
        y, w = torch.randint(-1, 4, (rows,)), torch.randint(-1, 4, (columns,))
        named |= {"query_labels": y, "key_labels": w}
        allowed &= (y[:, None] != w) | (y[:, None] < 0)
    if data.draw(st.booleans()):
        named["exclude"] = torch.randint(-1, columns, (rows,))
        allowed &= torch.arange(columns) != named["exclude"][:, None]
    found = fc.topk(query, keys, k, metric=metric, **named, backend="native")
    check(query, keys, k, metric, found, allowed)


@pytest.mark.parametrize("metric", METRICS)
def test_norms_over_four_decades(metric):
    query, keys = torch.randn(20, 48), torch.randn(2000, 48) * 10 ** (4 * torch.rand(2000, 1) - 2)
    check(query, keys, 50, metric, fc.topk(query, keys, 50, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties(metric, dtype):
    """A crowd of keys whose scores differ by a few roundings."""
    query = torch.randn(10, 64).to(dtype)
    keys = (torch.randn(1, 64) + 1e-6 * torch.randn(900, 64)).to(dtype)
    check(query, keys, 60, metric, fc.topk(query, keys, 60, metric=metric))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 7, 300])
def test_small_whole_numbers_are_a_stable_sort(metric, dtype, backend, k):
    """Every product and sum is exact, ties are many: ids must be those of a stable sort."""
    query, keys = torch.randint(-2, 3, (25, 6)).to(dtype), torch.randint(-2, 3, (300, 6)).to(dtype)
    exact, order = exact_scores(query, keys, metric).sort(dim=1, descending=True, stable=True)
    scores, ids = fc.topk(query, keys, k, metric=metric, backend=backend)
    assert torch.equal(ids, order[:, :k])
    assert torch.equal(scores, exact[:, :k].float())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_exact_duplicates_tie(metric, dtype, backend):
    base = torch.randn(37, 45).to(dtype)
    keys = base[torch.arange(370) % 37]
    scores, ids = fc.topk(base[:9], keys, 30, metric=metric, backend=backend)
    groups = ids.reshape(9, 3, 10)
    assert (groups % 37 == groups[:, :, :1] % 37).all()
    assert torch.equal(groups // 37, torch.arange(10).expand(9, 3, 10))
    assert (scores.reshape(9, 3, 10) == scores.reshape(9, 3, 10)[:, :, :1]).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_vectors_have_cosine_zero(backend):
    query, keys = torch.randn(3, 8), torch.randn(5, 8)
    query[1], keys[2] = 0, 0
    scores, ids = fc.topk(query, keys, 5, backend=backend)
    assert scores[1].tolist() == [0.0] * 5 and ids[1].tolist() == [0, 1, 2, 3, 4]
    assert scores[ids == 2].eq(0).all()


@pytest.mark.parametrize("size", [1e-18, 1e15])
def test_extreme_magnitudes_have_a_cosine(size):
    query, keys = size * torch.randn(5, 16), torch.randn(70, 16)
    found = fc.topk(query, keys, 10)
    check(query, keys, 10, "cosine", found)


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (0, 0)])
def test_empty_inputs(rows, columns):
    scores, ids = fc.topk(torch.randn(rows, 4), torch.randn(columns, 4), 3)
    assert scores.shape == ids.shape == (rows, 3)
    assert columns or (scores.eq(-torch.inf).all() and ids.eq(-1).all())


def test_many_neighbours():
    query, keys = torch.randn(2, 8), torch.randn(5000, 8)
    check(query, keys, 4000, "ip", fc.topk(query, keys, 4000, metric="ip"))


@pytest.mark.parametrize("metric", METRICS)
def test_strides_do_not_change_a_bit(metric):
    query, keys = torch.randn(12, 60)[:, 5:40], torch.randn(400, 60)[::2, 5:40]
    expected = fc.topk(query.clone(), keys.clone(), 20, metric=metric)
    by_column = fc.topk(query.T.contiguous().T, keys.T.contiguous().T, 20, metric=metric)
    for mine, other, theirs in zip(fc.topk(query, keys, 20, metric=metric), by_column, expected, strict=True):
        assert torch.equal(mine, theirs) and torch.equal(other, theirs)


def test_a_pair_has_one_score_whatever_stands_beside_it():
    """The arithmetic of a pair depends neither on the number of queries nor on its place among the keys."""
    query, keys = torch.randn(70, 33), torch.randn(333, 33)
    scores, ids = fc.topk(query, keys, 333, metric="ip")
    table = torch.empty(70, 333).scatter_(1, ids, scores)
    for rows, columns in [
        (slice(3, 4), slice(None)),
        (slice(None), slice(100, 131)),
        (slice(9, 20), slice(5, 6)),
    ]:
        part = keys[columns]
        scores, ids = fc.topk(query[rows], part, len(part), metric="ip")
        again = torch.empty_like(scores).scatter_(1, ids, scores)
        assert torch.equal(again, table[rows, columns])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_faiss_agrees(metric):
    import faiss  # a machine with a GPU may be without it

    query, keys = torch.randn(40, 24), torch.randn(1500, 24)
    index = {"ip": faiss.IndexFlatIP, "l2": faiss.IndexFlatL2}[metric](24)
    index.add(keys.numpy())
    theirs, their_ids = index.search(query.numpy(), 15)
    scores, ids = fc.topk(query, keys, 15, metric=metric)
    sign = -1 if metric == "l2" else 1
    torch.testing.assert_close(scores, sign * torch.from_numpy(theirs), rtol=1e-5, atol=1e-4)
    assert (ids == torch.from_numpy(their_ids)).float().mean() > 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_float64_takes_the_reference(metric):
    query, keys = torch.randn(9, 24).double(), torch.randn(80, 24).double()
    scores, ids = fc.topk(query, keys, 80, metric=metric)
    exact, order = exact_scores(query, keys, metric).sort(dim=1, descending=True, stable=True)
    assert scores.dtype == torch.float64 and torch.equal(ids, order)
    torch.testing.assert_close(scores, exact, rtol=1e-12, atol=1e-12)


def test_no_gradient_is_recorded():
    scores, _ = fc.topk(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True), 2)
    assert not scores.requires_grad
