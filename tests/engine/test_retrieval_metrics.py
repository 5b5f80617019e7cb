"""`retrieval_metrics` against brute force, scikit-learn, `ranks` and an example worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from retrieval_oracle import exact_vectors, figures, ranking, scores, some_labels
from sklearn.metrics import average_precision_score
from torch import Tensor

import fastcompat as fc
from fastcompat import _ranking

METRICS = ("cosine", "ip", "l2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "reference")
KS = (1, 2, 5)


def random_case(
    seed: int, queries: int = 17, items: int = 90, dim: int = 11
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    labels = torch.randint(0, 7, (queries,)), torch.randint(0, 7, (items,))
    return torch.randn(queries, dim), torch.randn(items, dim), *labels


def same(a: fc.RetrievalMetrics, b: fc.RetrievalMetrics) -> bool:
    """Every figure, per query and in the mean, has the same bits."""
    pairs = [(a.map, b.map), (a.map_at_r, b.map_at_r), (a.per_query.map, b.per_query.map)]
    pairs += [(a.per_query.map_at_r, b.per_query.map_at_r)]
    for k in a.cmc:
        pairs += [(a.cmc[k], b.cmc[k]), (a.recall[k], b.recall[k])]
        pairs += [(a.per_query.cmc[k], b.per_query.cmc[k]), (a.per_query.recall[k], b.per_query.recall[k])]
    return a.skipped == b.skipped and all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


def test_example_by_hand() -> None:
    # Query 0 finds its items at ranks 0, 2, 3; query 1 has one, at rank 1; query 2 has none.
    gallery = torch.tensor([[9.0, 1.0], [7.0, 9.0], [8.0, 7.0], [6.0, 8.0]])
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    labels = torch.tensor([4, 4, 5, 4])
    found = fc.retrieval_metrics(
        query, gallery, torch.tensor([4, 4, 6]), labels, ks=(1, 2), metric="ip", map_at=2
    )
    whole = fc.retrieval_metrics(query, gallery, torch.tensor([4, 5, 6]), labels, ks=(1, 2), metric="ip")
    first, second = (1 + 2 / 3 + 3 / 4) / 3, 1 / 3
    assert whole.per_query.map.tolist()[:2] == pytest.approx([first, second], abs=1e-15)
    assert whole.map == pytest.approx((first + second) / 2, abs=1e-15)
    assert whole.map_at_r == pytest.approx(((1 + 2 / 3) / 3 + 0) / 2, abs=1e-15)
    assert whole.cmc == {1: 0.5, 2: 0.5}
    assert whole.recall == {1: pytest.approx(1 / 6), 2: pytest.approx(1 / 6)}
    assert whole.skipped == 1 and math.isnan(whole.per_query.map[2])
    assert found.per_query.map.tolist()[:2] == [1 / 2, 2 / 2]


@examples(60)
@given(
    queries=st.integers(0, 9),
    items=st.integers(0, 40),
    dim=st.sampled_from((1, 4, 16)),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
    backend=st.sampled_from(BACKENDS),
    classes=st.integers(1, 6),
    excluding=st.booleans(),
    map_at=st.none() | st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
def test_equals_brute_force_with_heavy_ties(
    queries: int,
    items: int,
    dim: int,
    metric: str,
    dtype: torch.dtype,
    backend: str,
    classes: int,
    excluding: bool,
    map_at: int | None,
    seed: int,
) -> None:
    query, gallery = (exact_vectors(seed + i, n, dim, metric, dtype) for i, n in enumerate((queries, items)))
    query_labels, gallery_labels = (some_labels(seed + i, n, classes) for i, n in enumerate((queries, items)))
    exclude = some_labels(seed + 9, queries, max(items, 0)) if excluding and items else None
    found = fc.retrieval_metrics(
        query,
        gallery,
        query_labels,
        gallery_labels,
        ks=KS,
        metric=metric,
        exclude=exclude,
        map_at=map_at,
        backend=backend,
    )
    table = scores(query, gallery, metric)
    counted = []
    for i in range(queries):
        ranked = ranking(table[i], -1 if exclude is None else int(exclude[i]))
        truth = figures(ranked, int(query_labels[i]), gallery_labels, KS, map_at)
        each = found.per_query
        if truth is None:
            assert math.isnan(each.map[i]) and math.isnan(each.map_at_r[i]) and math.isnan(each.cmc[1][i])
            continue
        counted.append(truth)
        assert float(each.map[i]) == pytest.approx(truth.ap, abs=1e-14)
        assert float(each.map_at_r[i]) == pytest.approx(truth.ap_at_r, abs=1e-14)
        assert {k: float(each.cmc[k][i]) for k in KS} == truth.cmc
        assert {k: float(each.recall[k][i]) for k in KS} == pytest.approx(truth.recall, abs=1e-14)
    assert found.skipped == queries - len(counted)
    if counted:
        assert found.map == pytest.approx(np.mean([truth.ap for truth in counted]), abs=1e-14)
        assert found.cmc[2] == pytest.approx(np.mean([truth.cmc[2] for truth in counted]), abs=1e-14)
        assert found.recall[5] == pytest.approx(np.mean([truth.recall[5] for truth in counted]), abs=1e-14)
    else:
        assert all(math.isnan(value) for value in (found.map, found.map_at_r, found.cmc[1], found.recall[1]))


@pytest.mark.parametrize("metric", METRICS)
def test_map_equals_scikit_learn_without_ties(metric: str) -> None:
    query, gallery, query_labels, gallery_labels = random_case(3)
    table = scores(query, gallery, metric)
    assert np.diff(np.sort(table, 1), axis=1).min() > 4e-6  # far above the rounding of one float32 score
    truth = [
        average_precision_score((gallery_labels == label).numpy(), row)
        for label, row in zip(query_labels, table, strict=True)
    ]
    found = fc.retrieval_metrics(query, gallery, query_labels, gallery_labels, metric=metric)
    np.testing.assert_allclose(found.per_query.map, truth, atol=1e-13)
    assert found.map == pytest.approx(np.mean(truth), abs=1e-13)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_uses_the_ranks_of_the_public_function(metric: str, dtype: torch.dtype) -> None:
    query, gallery, query_labels, gallery_labels = random_case(4)
    query, gallery = query.to(dtype), gallery.to(dtype)
    exclude = torch.arange(len(query))
    every = torch.arange(len(gallery)).expand(len(query), -1)
    ranks = fc.ranks(query, gallery, every, metric=metric, exclude=exclude)
    found = fc.retrieval_metrics(query, gallery, query_labels, gallery_labels, metric=metric, exclude=exclude)
    for i, row in enumerate(ranks.tolist()):
        ranked = sorted((j for j in range(len(row)) if row[j] >= 0), key=row.__getitem__)
        truth = figures(ranked, int(query_labels[i]), gallery_labels, (1, 5, 10), None)
        assert truth is not None
        assert float(found.per_query.map[i]) == pytest.approx(truth.ap, abs=1e-14)
        assert {k: float(found.per_query.cmc[k][i]) for k in truth.cmc} == truth.cmc


def test_blocks_of_queries_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    query, gallery, query_labels, _ = random_case(5, queries=60, items=300)
    gallery_labels = (torch.rand(300) ** 3 * 9).long()  # from many relevant items to few
    whole = fc.retrieval_metrics(query, gallery, query_labels, gallery_labels)
    for block in (1, 97, 1000):
        monkeypatch.setattr(_ranking, "BLOCK", block)
        assert same(fc.retrieval_metrics(query, gallery, query_labels, gallery_labels), whole)


@pytest.mark.one_simd
def test_blocks_hold_every_counted_query_once_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ranking, "BLOCK", 200)
    query, gallery, query_labels, _ = random_case(6, queries=50, items=300)
    gallery_labels = (torch.rand(300) ** 3 * 7).long()
    relevant = _ranking.Relevant(query, gallery, query_labels, gallery_labels, None)
    seen = []
    for q, ids, _ in relevant.blocks(per_item=1, per_query=3):
        assert len(q) == 1 or len(q) * (ids.shape[1] + 3) <= 200
        for i, row in zip(q.tolist(), ids, strict=True):
            assert row[row >= 0].tolist() == (gallery_labels == query_labels[i]).nonzero()[:, 0].tolist()
            seen.append(i)
    assert sorted(seen) == relevant.counted.tolist()


def test_duplicates_rank_by_id() -> None:
    gallery = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).expand(6, 7)
    labels = torch.tensor([1, 1, 0, 1, 0, 1])
    for metric in METRICS:
        found = fc.retrieval_metrics(gallery[:1] * 1.7, gallery, torch.tensor([0]), labels, metric=metric)
        assert found.map == pytest.approx((1 / 3 + 2 / 5) / 2, abs=1e-15)


def test_numpy_in_numpy_out() -> None:
    case = random_case(7)
    from_torch = fc.retrieval_metrics(*case, exclude=torch.arange(17))
    from_numpy = fc.retrieval_metrics(*(value.numpy() for value in case), exclude=np.arange(17))
    assert isinstance(from_numpy.per_query.map, np.ndarray) and isinstance(from_torch.per_query.map, Tensor)
    assert isinstance(from_numpy.per_query.recall[5], np.ndarray) and isinstance(from_numpy.map, float)
    assert same(from_torch, from_numpy)


def test_strided_inputs_change_no_bit() -> None:
    query, gallery, *labels = random_case(8)
    plain = fc.retrieval_metrics(query, gallery, *labels)
    columns_first = fc.retrieval_metrics(query.T.contiguous().T, gallery.T.contiguous().T, *labels)
    padded = torch.full((2 * len(gallery), 20), torch.nan)
    padded[::2, :11] = gallery
    assert same(columns_first, plain)
    assert same(fc.retrieval_metrics(query, padded[::2, :11], *labels), plain)


def test_embeddings_that_want_a_gradient_are_taken_as_values() -> None:
    query, gallery, *labels = random_case(9)
    found = fc.retrieval_metrics(query.requires_grad_(), gallery.requires_grad_(), *labels)
    assert not found.per_query.map.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", (math.nan, math.inf, -math.inf))
def test_refuses_bad_rows_that_are_read(backend: str, value: float) -> None:
    query, gallery, query_labels, gallery_labels = random_case(10)
    bad = gallery.clone()
    bad[[80, 41, 66], 3] = value
    with pytest.raises(ValueError, match=r"`gallery` must be finite: row 41"):
        fc.retrieval_metrics(query, bad, query_labels, gallery_labels, backend=backend)
    bad = query.clone()
    bad[[12, 5], 10] = value
    with pytest.raises(ValueError, match=r"`query` must be finite: row 5"):
        fc.retrieval_metrics(bad, gallery, query_labels, gallery_labels, backend=backend)
    query_labels[[12, 5]] = -1
    clean = fc.retrieval_metrics(query, gallery, query_labels, gallery_labels, backend=backend)
    assert same(fc.retrieval_metrics(bad, gallery, query_labels, gallery_labels, backend=backend), clean)
