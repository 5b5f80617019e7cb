"""Ranks against a full sort, and against top-k, with which they must agree always."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from engine.search_truth import DTYPES, METRICS, exact_scores
from hypothesis import given
from hypothesis import strategies as st

import fastcompat as fc
from fastcompat import _ops


def from_topk(query, keys, targets, metric, exclude):
    """Where each target stands in the full ranking."""
    _, ids = fc.topk(query, keys, max(1, len(keys)), metric=metric, exclude=exclude, backend="native")
    place = (ids[:, None] == targets[:, :, None]) & (targets[:, :, None] >= 0)
    return torch.where(place.any(2), place.int().argmax(2), -1)


@given(data=st.data())
def test_ranks_are_the_places_in_topk(data):
    rows, columns, dim, count = (data.draw(st.integers(1, size)) for size in (30, 300, 70, 9))
    metric, dtype = data.draw(st.sampled_from(METRICS)), data.draw(st.sampled_from(DTYPES))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    if data.draw(st.booleans()):
        keys = keys[torch.randint(columns, (columns,))]
    targets = torch.randint(-1, columns, (rows, count))
    exclude = torch.randint(-1, columns, (rows,)) if data.draw(st.booleans()) else None
    ours = fc.ranks(query, keys, targets, metric=metric, exclude=exclude, backend="native")
    assert ours.dtype == torch.int64
    assert torch.equal(ours, from_topk(query, keys, targets, metric, exclude))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_near_ties_agree_with_topk(metric, dtype):
    query = torch.randn(6, 64).to(dtype)
    keys = (torch.randn(1, 64) + 1e-6 * torch.randn(700, 64)).to(dtype)
    targets = torch.arange(700).expand(6, 700)
    ours = fc.ranks(query, keys, targets, metric=metric)
    assert torch.equal(ours, from_topk(query, keys, targets, metric, None))
    assert torch.equal(ours.sort(dim=1).values, targets)


def ordinary(rows, dim):
    return torch.randn(rows, dim)


def few_values(rows, dim):
    """Scores tie in large groups, at zero above all."""
    return torch.randint(-1, 2, (rows, dim)) * (torch.arange(dim) < 3).float()


def clustered(rows, dim):
    """Scores differ by little beyond rounding, but for one far away."""
    vectors = torch.ones(rows, dim) + 1e-6 * torch.randn(rows, dim)
    vectors[rows // 2] = 1e3 * torch.randn(dim)
    return vectors


def extreme(rows, dim):
    """Products vanish, overflow, and are the difference of two infinities."""
    return torch.randn(rows, dim) * 10.0 ** torch.randint(-25, 25, (rows, 1)).float()


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 3000])
@pytest.mark.parametrize("vectors", [ordinary, few_values, clustered, extreme])
@pytest.mark.parametrize("metric", METRICS)
def test_beats_are_those_of_their_definition(metric, vectors, count):
    """In every block: keys with a greater score, or an equal one and a smaller id, that are not excluded."""
    rows, columns, dim = 71, 700, 37
    query, keys = vectors(rows, dim), vectors(columns, dim)
    walk, bounds = torch.randperm(columns), torch.tensor([0, 3, 3, 300, 500, columns])
    targets, exclude = torch.randint(-1, columns, (rows, count)), torch.randint(-1, columns, (rows,))
    scores = _ops.pair_scores(query, keys, torch.arange(columns).expand(rows, columns), metric)
    thresholds = _ops.pair_scores(query, keys, targets, metric)
    if count == 100:  # on both tails, where bounds of scores decide almost everything
        order = scores.argsort(1)
        targets = torch.cat([order[:, :50], order[:, -50:]], 1)
        thresholds = scores.gather(1, targets)
    ours = _ops.count_beats(query, keys, walk, bounds, thresholds, targets, metric, exclude)
    for i in range(0, rows, 1 + count // 500):
        score, bar = scores[i, walk][:, None], thresholds[i]
        better = (score > bar) | ((score == bar) & (walk[:, None] < targets[i]))  # [N, P]
        better &= (targets[i] >= 0) & (walk[:, None] != exclude[i])
        blocks = [better[a:b].sum(0) for a, b in pairwise(bounds)]
        assert torch.equal(ours[i], torch.stack(blocks, 1))


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_small_whole_numbers_are_a_stable_sort(metric, backend):
    query, keys = torch.randint(-2, 3, (25, 6)).float(), torch.randint(-2, 3, (300, 6)).float()
    targets = torch.randint(300, (25, 40))
    order = exact_scores(query, keys, metric).argsort(dim=1, descending=True, stable=True)
    assert torch.equal(
        fc.ranks(query, keys, targets, metric=metric, backend=backend), order.argsort(1).gather(1, targets)
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_padding_exclusion_and_ties(backend):
    """Keys 1, 2 and 4 are one vector; key 2 does not count."""
    query, keys = torch.tensor([[1.0]]), torch.tensor([[3.0], [2.0], [2.0], [1.0], [2.0]])
    targets = torch.tensor([[0, 1, 2, 3, 4, -1]])
    ours = fc.ranks(query, keys, targets, metric="ip", exclude=torch.tensor([2]), backend=backend)
    assert ours.tolist() == [[0, 1, -1, 3, 2, -1]]
    ours = fc.ranks(query, keys, targets, metric="ip", backend=backend)
    assert ours.tolist() == [[0, 1, 2, 4, 3, -1]]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("columns", [0, 5])
@pytest.mark.parametrize("count", [0, 2])
def test_empty_inputs(rows, columns, count):
    targets = torch.full((rows, count), -1)
    ours = fc.ranks(torch.randn(rows, 4), torch.randn(columns, 4), targets)
    assert torch.equal(ours, targets)


def test_float64_takes_the_reference():
    query, keys = torch.randn(9, 24).double(), torch.randn(80, 24).double()
    targets = torch.arange(80).expand(9, 80)
    order = exact_scores(query, keys, "cosine").argsort(dim=1, descending=True, stable=True)
    assert torch.equal(fc.ranks(query, keys, targets), order.argsort(1))
