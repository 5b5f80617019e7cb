"""What search accepts and returns: NumPy arrays, and a refusal of NaN that names the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcompat as fc

BACKENDS = ["native", "reference"]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("side", "row"), [("query", 3), ("keys", 0), ("keys", 517), ("keys", 599)])
def test_nan_and_inf_are_refused_by_name_and_row(side, row, dtype, backend, bad):
    given = {"query": torch.randn(9, 33).to(dtype), "keys": torch.randn(600, 33).to(dtype)}
    given[side][row, 32] = bad
    given[side][row + 1 :, 5] = bad
    with pytest.raises(ValueError, match=rf"`{side}` must be finite: row {row} holds NaN or inf"):
        fc.topk(**given, k=5, backend=backend)
    targets = torch.zeros(9, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"`{side}` must be finite: row {row} holds NaN or inf"):
        fc.ranks(**given, targets=targets, backend=backend)


def test_numbers_of_numpy_are_numbers():
    query, keys = torch.randn(4, 6), torch.randn(9, 6)
    assert torch.equal(fc.topk(query, keys, np.int32(3))[1], fc.topk(query, keys, 3)[1])
    found = fc.softmax_stats(query, keys, scale=np.float32(0.5)).neg_lse
    assert torch.equal(found, fc.softmax_stats(query, keys, scale=0.5).neg_lse)
    labels = torch.zeros(4, dtype=torch.int64), torch.arange(9) % 2
    found = fc.retrieval_metrics(query, keys, *labels, ks=np.array([1, 3]), map_at=np.int64(2))
    expected = fc.retrieval_metrics(query, keys, *labels, ks=(1, 3), map_at=2)
    assert (found.map, found.cmc, found.recall) == (expected.map, expected.cmc, expected.recall)


def unaligned(x):
    table = np.zeros(len(x), dtype=[("number", "i1"), ("vector", "f4", x.shape[1])])
    table["vector"] = x
    return table["vector"]


@pytest.mark.parametrize(
    "kind", [lambda x: x[::-1][::-1], lambda x: x.astype(">f4"), unaligned, np.asfortranarray]
)
def test_any_layout_of_a_numpy_array(kind):
    rng = np.random.default_rng(0)
    query, keys = (rng.standard_normal((n, 7), dtype=np.float32) for n in (5, 20))
    expected = fc.topk(query, keys, 3)
    for found, each in zip(fc.topk(kind(query), kind(keys), 3), expected, strict=True):
        assert np.array_equal(found, each)


def test_a_squared_distance_is_never_negative_in_the_reference():
    x = torch.randn(40, 33) * 100
    assert (fc.topk(x, x, 3, metric="l2", backend="reference")[0] <= 0).all()


def test_transforms_name_the_way_out():
    def best(x, backend="auto"):
        return fc.topk(x, keys, 2, backend=backend)[1]

    queries, keys = torch.randn(3, 5, 8), torch.randn(9, 8)
    with pytest.raises(RuntimeError, match='backend="reference"'):
        torch.func.vmap(best)(queries)
    expected = torch.stack([best(x) for x in queries])
    assert torch.equal(torch.func.vmap(lambda x: best(x, "reference"))(queries), expected)


def test_the_engine_works_after_a_refusal():
    keys = torch.randn(600, 33)
    bad = keys.clone()
    bad[77] = torch.nan
    before = fc.topk(keys, keys, 5)
    with pytest.raises(ValueError, match="row 77"):
        fc.topk(keys, bad, 5)
    assert torch.equal(fc.topk(keys, keys, 5)[1], before[1])


def test_numpy_in_numpy_out(tmp_path):
    query, keys = torch.randn(5, 8), torch.randn(40, 8)
    y, w = torch.randint(3, (5,)), torch.randint(3, (40,))
    expected = fc.topk(query, keys, 4, query_labels=y, key_labels=w)
    np.save(tmp_path / "keys.npy", keys.numpy())
    mapped = np.load(tmp_path / "keys.npy", mmap_mode="r")
    for gallery in (keys.numpy(), mapped, keys.numpy()[::-1].copy()[::-1]):
        found = fc.topk(query.numpy(), gallery, 4, query_labels=y.numpy(), key_labels=w.numpy())
        assert all(isinstance(part, np.ndarray) for part in found)
        assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    targets = expected[1].numpy()
    ranks = fc.ranks(query.numpy(), mapped, targets)
    assert isinstance(ranks, np.ndarray)
    assert np.array_equal(ranks, fc.ranks(query, keys, expected[1]))


def test_a_read_only_gallery_gives_no_warning(recwarn):
    keys = np.random.default_rng(0).standard_normal((40, 8), dtype=np.float32)
    keys.flags.writeable = False
    fc.topk(keys, keys, 2)
    assert not recwarn.list
