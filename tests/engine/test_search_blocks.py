"""The operators under the evaluation: several segments, subsets of rows, and beat counts per block."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastcompat import _ops, reference
from fastcompat._types import Segment

METRICS = ["cosine", "ip", "l2"]


def whole_numbers(rows, dim):
    """Small whole numbers: every score is exact, and ties are many."""
    return torch.randint(-2, 3, (rows, dim)).float()


def native_topk(segments, k, metric, **sets):
    query, keys, rows, scale, offset = map(list, zip(*segments, strict=True))
    named = [sets.get(name) for name in ("query_labels", "key_labels", "exclude")]
    return _ops.topk(query, keys, rows, scale, offset, k, metric, *named, [])


@given(data=st.data())
def test_two_segments_of_different_width(data):
    rows, columns, k = (data.draw(st.integers(1, size)) for size in (20, 200, 50))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    metric = data.draw(st.sampled_from(["ip", "l2"]))
    turned = torch.rand(columns) < data.draw(st.sampled_from([0.0, 0.4, 1.0]))
    parts = [
        Segment(whole_numbers(rows, dim), whole_numbers(columns, dim), mask.nonzero()[:, 0], scale, offset)
        for dim, mask, scale, offset in ((5, ~turned, 1.0, 0.0), (9, turned, 2.0, -3.0))
    ]
    sets = {}
    if data.draw(st.booleans()):
        sets["exclude"] = torch.randint(-1, columns, (rows,))
    if data.draw(st.booleans()):
        sets |= {
            "query_labels": torch.randint(-1, 3, (rows,)),
            "key_labels": torch.randint(-1, 3, (columns,)),
        }
    ours, theirs = native_topk(parts, k, metric, **sets), reference.topk(parts, k, metric, **sets)
    assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[0], theirs[0])


def test_rows_outside_the_subset_are_never_read():
    query, keys = whole_numbers(4, 6), whole_numbers(50, 6)
    keys[10:20] = torch.nan
    rows = torch.cat([torch.arange(10), torch.arange(20, 50)])
    part = Segment(query, keys, rows)
    for metric in METRICS:
        assert torch.equal(native_topk([part], 40, metric)[1], reference.topk([part], 40, metric)[1])


@given(data=st.data())
def test_beat_counts_per_block(data):
    rows, columns, count = (data.draw(st.integers(1, size)) for size in (20, 200, 6))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    metric = data.draw(st.sampled_from(["ip", "l2"]))
    query, keys = whole_numbers(rows, 5), whole_numbers(columns, 5)
    order = torch.randperm(columns)[: data.draw(st.integers(0, columns))]
    bounds = torch.randint(0, len(order) + 1, (data.draw(st.integers(2, 8)),)).sort().values
    ids = torch.randint(-1, columns, (rows, count))
    bars = reference.pair_scores(query, keys, ids, metric)
    exclude = torch.randint(-1, columns, (rows,)) if data.draw(st.booleans()) else None
    arguments = (query, keys, order, bounds, bars, ids, metric, exclude)
    assert torch.equal(_ops.count_beats(*arguments), reference.count_beats(*arguments))
    assert torch.equal(_ops.pair_scores(query, keys, ids, metric), bars)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pair_scores_are_the_scores_of_topk(metric, dtype):
    query, keys = torch.randn(30, 77).to(dtype), torch.randn(400, 77).to(dtype)
    scores, ids = native_topk([Segment(query, keys, torch.arange(400))], 60, metric)
    assert torch.equal(_ops.pair_scores(query, keys, ids, metric), scores)


@pytest.mark.parametrize("metric", METRICS)
def test_blocks_add_up_to_the_whole(metric):
    query, keys = torch.randn(12, 33), torch.randn(300, 33)
    ids = torch.randint(300, (12, 8))
    bars = _ops.pair_scores(query, keys, ids, metric)
    cut = torch.tensor([0, 3, 3, 150, 299, 300])
    parts = _ops.count_beats(query, keys, torch.randperm(300), cut, bars, ids, metric, None)
    parts_in_order = _ops.count_beats(query, keys, None, cut, bars, ids, metric, None)
    whole = _ops.count_beats(query, keys, None, torch.tensor([0, 300]), bars, ids, metric, None)
    assert torch.equal(parts.sum(2), whole[:, :, 0]) and torch.equal(parts_in_order.sum(2), whole[:, :, 0])
