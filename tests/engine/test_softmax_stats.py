"""The four row statistics against float64."""

from __future__ import annotations

import math

import pytest
import torch
from engine.truth import Problem, check_stats, labels
from hypothesis import given
from hypothesis import strategies as st

import fastcompat as fc

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1, 1), (1, 33, 3), (31, 1, 8), (33, 31, 17), (128, 128, 64), (507, 123, 65), (9, 1000, 130)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "few", "many", "single", "negative"])
@pytest.mark.parametrize("size", SIZES)
def test_awkward_sizes_and_every_kind_of_labels(size, kind, dtype):
    rows, columns, dim = size
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    check_stats(Problem(query, keys, 0.5, torch.randn(columns), **labels(kind, rows, columns)))


@given(data=st.data())
def test_any_shape_and_any_combination_of_sets(data):
    rows, columns, dim = (data.draw(st.integers(1, size)) for size in (40, 150, 70))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    torch.set_num_threads(data.draw(st.integers(1, 3)))
    kind = data.draw(st.sampled_from(["none", "few", "many", "single", "negative"]))
    index = {
        name: torch.randint(-1, columns, (rows,)) if data.draw(st.booleans()) else None
        for name in ("positive", "exclude")
    }
    bias = torch.randn(columns) if data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from(DTYPES))
    query, keys = torch.randn(rows, dim).to(dtype), torch.randn(columns, dim).to(dtype)
    check_stats(Problem(query, keys, 0.3, bias, **labels(kind, rows, columns), **index))


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_low_temperature(dtype, temperature):
    query, keys = (torch.nn.functional.normalize(torch.randn(n, 48)).to(dtype) for n in (40, 300))
    check_stats(Problem(query, keys, 1 / temperature, **labels("many", 40, 300)))


@pytest.mark.parametrize("magnitude", [1e-18, 1e-4, 30.0, 1e3, 1e8])
def test_extreme_magnitudes(magnitude):
    query, keys = magnitude * torch.randn(20, 32), torch.randn(70, 32)
    check_stats(Problem(query, keys, 1.0, **labels("few", 20, 70)))


def test_one_huge_row_among_small_ones():
    query, keys = torch.randn(20, 32), torch.randn(70, 32)
    query[3] *= 1e4
    keys[11] *= 1e4
    check_stats(Problem(query, keys, 1.0, **labels("few", 20, 70)))


def test_bias_alone_and_masking_bias():
    bias = torch.tensor([0.0, 1.0, -torch.inf, 300.0])
    stats = fc.softmax_stats(torch.zeros(2, 3), torch.randn(4, 3), bias=bias, positive=torch.tensor([3, 2]))
    expected = [math.log(1 + math.e), 300.0]
    torch.testing.assert_close(stats.neg_lse, torch.tensor(expected))
    assert stats.pos_lse.tolist() == [300.0, -math.inf]
    assert stats.pos_count.tolist() == [1, 0]
    assert stats.pos_sum.tolist() == [300.0, 0.0]


def test_the_sets_of_a_hand_made_problem():
    """Key 1 is chosen, key 0 shares its label (ignored), the rest are negatives unless excluded."""
    query, keys = torch.ones(4, 1), torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    stats = fc.softmax_stats(
        query,
        keys,
        query_labels=torch.tensor([5, 5, 5, -1]),
        key_labels=torch.tensor([5, 5, 6, -1]),
        positive=torch.tensor([1, -1, 1, 1]),
        exclude=torch.tensor([-1, 3, 1, -1]),
        backend="native",
    )
    e = math.exp
    expected = [math.log(e(2) + e(3)), 2.0, math.log(e(2) + e(3)), math.log(1 + e(2) + e(3))]
    torch.testing.assert_close(stats.neg_lse, torch.tensor(expected))
    assert stats.pos_lse.tolist() == [1.0, -math.inf, -math.inf, 1.0]
    assert stats.pos_count.tolist() == [1, 0, 0, 1]
    assert stats.pos_sum.tolist() == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(("rows", "columns", "dim"), [(0, 5, 3), (4, 0, 3), (0, 0, 3), (4, 5, 0)])
def test_empty_inputs(rows, columns, dim):
    stats = check_stats(Problem(torch.randn(rows, dim), torch.randn(columns, dim)))
    assert stats.neg_lse.shape == (rows,)
    if not columns:
        assert stats.neg_lse.eq(-torch.inf).all()


def test_all_rows_masked():
    """One class on both sides and no other key: no row has a negative."""
    y = torch.zeros(6, dtype=torch.int64)
    stats = fc.softmax_stats(torch.randn(6, 4), torch.randn(6, 4), query_labels=y, key_labels=y)
    assert stats.neg_lse.eq(-torch.inf).all() and stats.pos_count.eq(6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_change_a_bit(dtype):
    wide_query, wide_keys = torch.randn(30, 50).to(dtype), torch.randn(90, 50).to(dtype)
    sets = labels("few", 30, 45)
    views = (wide_query[:, 3:40], wide_keys[::2, 3:40])
    columns = (wide_query.T.contiguous().T[:, 3:40], wide_keys.T.contiguous().T[::2, 3:40])
    expected = Problem(views[0].clone(), views[1].clone(), 0.5, **sets).fused()
    for query, keys in (views, columns):
        for mine, theirs in zip(Problem(query, keys, 0.5, **sets).fused(), expected, strict=True):
            assert torch.equal(mine, theirs)


def test_expanded_rows_and_strided_vectors():
    query, keys = torch.randn(1, 20).expand(7, 20), torch.randn(40, 20)
    bias, y = torch.randn(80)[::2], torch.randint(3, (80,))[::2]
    sets = {"query_labels": torch.ones(1, dtype=torch.int64).expand(7), "key_labels": y}
    mine = Problem(query, keys, 0.5, bias, **sets).fused()
    copied = {name: value.clone() for name, value in sets.items()}
    for a, b in zip(mine, Problem(query.clone(), keys, 0.5, bias.clone(), **copied).fused(), strict=True):
        assert torch.equal(a, b)


def test_nan_passes_through():
    query, keys = torch.randn(5, 8), torch.randn(20, 8)
    query[2, 3] = torch.nan
    assert Problem(query, keys).fused().neg_lse.isnan().tolist() == [False, False, True, False, False]
    keys[7, 0] = torch.nan
    assert Problem(query, keys).fused().neg_lse.isnan().all()


def test_scale_as_a_tensor_is_the_same_scale():
    query, keys = torch.randn(5, 8), torch.randn(20, 8)
    a, b = Problem(query, keys, 0.25).fused(), Problem(query, keys, torch.tensor(0.25)).fused()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["positive", "exclude"])
@pytest.mark.parametrize("bad", [-2, 20, 2**40])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_key_number_out_of_range_is_an_error(name, bad, backend):
    index = torch.tensor([0, 1, bad, 3, 19])
    with pytest.raises(ValueError, match=f"`{name}`.*{bad}"):
        fc.softmax_stats(torch.randn(5, 8), torch.randn(20, 8), **{name: index}, backend=backend)


def test_more_pairs_than_31_bits_can_number():
    torch.set_num_threads(2)
    rows, columns = 520, 2**22
    keys = torch.ones(1, 1).expand(columns, 1)
    positive = torch.full((rows,), columns - 1)
    stats = fc.softmax_stats(torch.zeros(rows, 1), keys, positive=positive, backend="native")
    torch.testing.assert_close(stats.neg_lse, torch.full((rows,), math.log(columns - 1)))
    assert stats.pos_lse.eq(0).all() and stats.pos_count.eq(1).all()
