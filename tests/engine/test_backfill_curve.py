"""`backfill_curve` against one independent evaluation per state, by brute force and by the kernels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from retrieval_oracle import exact_vectors, figures, ranking, scores, some_labels
from torch import Tensor

import fastcompat as fc
from fastcompat.judging import ranking as ranks

METRICS = ("cosine", "ip", "l2")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = ("auto", "reference")
KS = (1, 3, 10)
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def random_case(seed: int, queries: int = 15, items: int = 130, classes: int = 9) -> Case:
    torch.manual_seed(seed)
    vectors = (
        torch.randn(queries, 12),
        torch.randn(items, 12),
        torch.randn(queries, 19),
        torch.randn(items, 19),
    )
    return *vectors, torch.randint(-1, classes, (queries,)), torch.randint(-1, classes, (items,))


def same(a: fc.BackfillCurve, b: fc.BackfillCurve) -> bool:
    """Every value has the same bits."""
    one, other = a.to_dict(), b.to_dict()
    return all(np.array_equal(flat(one[name]), flat(other[name]), equal_nan=True) for name in one)


def flat(value: object) -> np.ndarray:
    return np.asarray(list(value.values()) if isinstance(value, dict) else value)


def cut(state: int, states: int, items: int) -> int:
    return state * items // (states - 1)


@examples(60)
@given(
    queries=st.integers(0, 7),
    items=st.integers(0, 45),
    dims=st.tuples(*[st.sampled_from((1, 4, 16))] * 2),
    states=st.integers(2, 12),
    metric=st.sampled_from(METRICS),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    backend=st.sampled_from(BACKENDS),
    classes=st.integers(1, 6),
    excluding=st.booleans(),
    own_baseline=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_equals_brute_force_with_heavy_ties(
    queries: int,
    items: int,
    dims: tuple[int, int],
    states: int,
    metric: str,
    dtypes: tuple[torch.dtype, torch.dtype],
    backend: str,
    classes: int,
    excluding: bool,
    own_baseline: bool,
    seed: int,
) -> None:
    sides = [
        [
            exact_vectors(seed + 2 * side + i, n, dims[side], metric, dtypes[side])
            for i, n in enumerate((queries, items))
        ]
        for side in (0, 1)
    ]
    base = [exact_vectors(seed + 4 + i, n, 16, metric) for i, n in enumerate((queries, items))]
    query_labels, labels = (some_labels(seed + i, n, classes) for i, n in enumerate((queries, items)))
    exclude = some_labels(seed + 9, queries, items) if excluding and items else None
    order = torch.randperm(items, generator=torch.Generator().manual_seed(seed))
    curve = fc.backfill_curve(
        *sides[0],
        *sides[1],
        query_labels,
        labels,
        order=order,
        states=states,
        ks=KS,
        metric=metric,
        baseline=tuple(base) if own_baseline else None,
        exclude=exclude,
        backend=backend,
    )

    def judged(table: np.ndarray) -> list:
        skip = [-1] * queries if exclude is None else exclude.tolist()
        found = [
            figures(ranking(row, skip[i]), int(query_labels[i]), labels, KS, None)
            for i, row in enumerate(table)
        ]
        return [one for one in found if one is not None]

    old, new = (scores(*side, metric) for side in sides)
    before = judged(scores(*base, metric) if own_baseline else old)
    assert curve.skipped == queries - len(before)
    for state in range(states):
        backfilled = np.isin(np.arange(items), order[: cut(state, states, items)])
        after = judged(np.where(backfilled, new, old))
        assert float(curve.fraction[state]) == (backfilled.mean() if items else 0)
        if not after:
            assert math.isnan(curve.map[state]) and math.isnan(curve.negative_flips[state])
            continue
        assert float(curve.map[state]) == pytest.approx(np.mean([one.ap for one in after]), abs=1e-14)
        for k in KS:
            assert float(curve.cmc[k][state]) == pytest.approx(
                np.mean([one.cmc[k] for one in after]), abs=1e-14
            )
        lost = [was.right and not now.right for was, now in zip(before, after, strict=True)]
        won = [now.right and not was.right for was, now in zip(before, after, strict=True)]
        assert float(curve.negative_flips[state]) == pytest.approx(np.mean(lost), abs=1e-14)
        assert float(curve.positive_flips[state]) == pytest.approx(np.mean(won), abs=1e-14)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_end_points_equal_the_pure_systems_exactly(metric: str, dtype: torch.dtype) -> None:
    *vectors, query_labels, labels = random_case(0)
    vectors = [value.to(dtype) for value in vectors]
    curve = fc.backfill_curve(*vectors, query_labels, labels, states=5, metric=metric)
    for state, side in ((0, vectors[:2]), (-1, vectors[2:])):
        pure = fc.retrieval_metrics(*side, query_labels, labels, metric=metric)
        assert float(curve.map[state]) == pure.map
        assert {k: float(curve.cmc[k][state]) for k in curve.cmc} == pure.cmc
        assert curve.skipped == pure.skipped > 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_state_ranks_as_mixed_topk_does(metric: str, dtype: torch.dtype) -> None:
    *vectors, query_labels, labels = random_case(1)
    vectors = [value.to(dtype) for value in vectors]
    order, states, exclude = torch.randperm(130), 7, torch.arange(15) * 3
    curve = fc.backfill_curve(
        *vectors, query_labels, labels, order=order, states=states, ks=KS, metric=metric, exclude=exclude
    )
    first: list = []
    for state in range(states):
        backfilled = torch.zeros(130, dtype=torch.bool)
        backfilled[order[: cut(state, states, 130)]] = True
        _, ids = fc.mixed_topk(*vectors, backfilled, 130, metric=metric)
        truth = [
            figures([j for j in row if j != skip], label, labels, KS, None)
            for row, skip, label in zip(ids.tolist(), exclude.tolist(), query_labels.tolist(), strict=True)
        ]
        counted = [one for one in truth if one is not None]
        first = first or counted
        lost = [was.right and not now.right for was, now in zip(first, counted, strict=True)]
        won = [now.right and not was.right for was, now in zip(first, counted, strict=True)]
        assert float(curve.map[state]) == pytest.approx(np.mean([one.ap for one in counted]), abs=1e-14)
        assert float(curve.negative_flips[state]) == sum(lost) / len(counted)
        assert float(curve.positive_flips[state]) == sum(won) / len(counted)
        for k in KS:
            assert float(curve.cmc[k][state]) == sum(one.cmc[k] for one in counted) / len(counted)


def test_duplicates_between_the_spaces_change_nothing() -> None:
    query, gallery, *_, query_labels, labels = random_case(2)
    gallery = gallery[torch.randint(0, 20, (130,))]
    curve = fc.backfill_curve(query, gallery, query.clone(), gallery.clone(), query_labels, labels, states=9)
    pure = fc.retrieval_metrics(query, gallery, query_labels, labels)
    assert curve.map.tolist() == [pure.map] * 9
    assert not curve.negative_flips.any() and not curve.positive_flips.any()


def test_flips_are_counted_against_the_baseline_in_its_own_space() -> None:
    case = random_case(3, queries=60)
    default = fc.backfill_curve(*case, states=4)
    against_old = fc.backfill_curve(*case, states=4, baseline=(case[0], case[1]))
    against_new = fc.backfill_curve(*case, states=4, baseline=(case[2], case[3]))
    assert same(default, against_old)
    assert default.negative_flips[0] == default.positive_flips[0] == 0
    assert against_new.negative_flips[-1] == against_new.positive_flips[-1] == 0
    assert against_new.positive_flips[0] == default.negative_flips[-1] > 0
    assert against_new.negative_flips[0] == default.positive_flips[-1] > 0


def test_random_order_follows_the_seed() -> None:
    case = random_case(4)
    drawn = torch.randperm(130, generator=torch.Generator().manual_seed(5))
    seeded = fc.backfill_curve(*case, seed=5)
    assert same(seeded, fc.backfill_curve(*case, order=drawn))
    assert not same(seeded, fc.backfill_curve(*case, seed=6))


def test_more_states_than_items() -> None:
    case = random_case(5, items=4, classes=2)
    curve = fc.backfill_curve(*case, states=11)
    assert curve.fraction.tolist() == [cut(state, 11, 4) / 4 for state in range(11)]
    five = fc.backfill_curve(*case, states=5)
    assert curve.map.tolist() == [float(five.map[cut(state, 11, 4)]) for state in range(11)]


def test_blocks_of_queries_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(6, queries=40, items=200, classes=5)
    whole = fc.backfill_curve(*case, states=6)
    for block in (1, 3000):
        monkeypatch.setattr(ranks, "BLOCK", block)
        assert same(fc.backfill_curve(*case, states=6), whole)


def test_numpy_in_numpy_out() -> None:
    case = random_case(7)
    order = torch.randperm(130)
    from_torch = fc.backfill_curve(*case, order=order, baseline=case[:2])
    arrays = [value.numpy() for value in case]
    from_numpy = fc.backfill_curve(*arrays, order=order.numpy(), baseline=tuple(arrays[:2]))
    assert same(from_torch, from_numpy)
    assert isinstance(from_torch.map, Tensor) and isinstance(from_torch.cmc[1], Tensor)
    for value in (from_numpy.fraction, from_numpy.map, from_numpy.cmc[1], from_numpy.negative_flips):
        assert isinstance(value, np.ndarray) and value.dtype == np.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(4))
def test_refuses_bad_rows(place: int, backend: str) -> None:
    case = random_case(8)
    case[4].clamp_(min=0)
    name = ("query_old", "old", "query_new", "new")[place]
    row = 11 if place % 2 == 0 else 77
    case[place][row:, 4] = math.nan
    with pytest.raises(ValueError, match=rf"`{name}` must be finite: row {row} "):
        fc.backfill_curve(*case, backend=backend)
    baseline = case[place // 2 * 2 : place // 2 * 2 + 2]
    clean = random_case(8)[:4]
    with pytest.raises(ValueError, match=rf"`baseline\[{place % 2}\]` must be finite: row {row} "):
        fc.backfill_curve(*clean, *case[4:], baseline=baseline, backend=backend)
