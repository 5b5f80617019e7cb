"""`merge_topk` against plain loops over exact fractions."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from itertools import permutations

import faiss
import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastcompat as fc

METHODS = ("score", "rrf", "zscore", "minmax")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
List = tuple[list[list[float]], list[list[int]]]  # scores, ids; one row a query


def of_one_list(slots: list[tuple[float, int]], method: str) -> dict[int, float | Fraction]:
    """What one list gives to each of its items: the better of several slots."""
    filled = [(Fraction(s), item) for s, item in slots if item != -1]
    found: dict[int, float | Fraction] = {}
    scores = [s for s, _ in filled]
    for place, (s, item) in enumerate(filled, 1):
        value: float | Fraction = s
        if method == "rrf":
            value = Fraction(1, 60 + place)
        elif method == "minmax":
            value = (
                (s - min(scores)) / (max(scores) - min(scores)) if max(scores) > min(scores) else Fraction(1)
            )
        elif method == "zscore":
            mean = sum(scores) / len(scores)
            variance = sum((x - mean) ** 2 for x in scores) / len(scores)
            value = float(s - mean) / math.sqrt(variance) if variance else 0.0
        found[item] = max(found.get(item, value), value)
    return found


def merged(lists: list[List], row: int, k: int, method: str) -> tuple[list[float], list[int]]:
    """The best k of one query, as rounded to float32."""
    total: dict[int, float | Fraction] = {}
    for scores, ids in lists:
        for item, value in of_one_list(list(zip(scores[row], ids[row], strict=True)), method).items():
            seen = total.get(item)
            if seen is None:
                total[item] = value
            else:
                total[item] = seen + value if method == "rrf" else max(seen, value)
    rounded = [(-float(np.float32(float(value))), item) for item, value in total.items()]
    best = sorted(rounded)[:k]
    missing = k - len(best)
    return [-s for s, _ in best] + [-math.inf] * missing, [item for _, item in best] + [-1] * missing


@st.composite
def result_lists(draw: st.DrawFn) -> list[List]:
    """Few scores and few ids, so that ties, repeats and empty slots are everywhere."""
    queries = draw(st.integers(0, 3))
    score = st.sampled_from((-3.0, -0.25, 0.0, 0.5, 1.0, 1.75, 2.0, 40.0))
    item = st.sampled_from((-1, -1, -7, 0, 1, 2, 3, 4, 5, 6, 2**40, 2**62))
    lists = []
    for width in draw(st.lists(st.integers(0, 6), min_size=1, max_size=5)):
        row = st.lists(score, min_size=width, max_size=width)
        names = st.lists(item, min_size=width, max_size=width)
        scores = [sorted(draw(row), reverse=True) for _ in range(queries)]
        lists.append((scores, [draw(names) for _ in range(queries)]))
    return lists


def as_tensors(lists: list[List], dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """An empty slot holds NaN, which must not be read."""
    found = []
    for scores, ids in lists:
        shape = len(scores), len(scores[0]) if scores else 2
        names = torch.tensor(ids, dtype=torch.int64).reshape(shape)
        values = torch.tensor(scores, dtype=dtype).reshape(shape)
        found.append((values.masked_fill(names == -1, math.nan), names))
    return found


@examples(400)
@given(
    lists=result_lists(), k=st.integers(1, 9), method=st.sampled_from(METHODS), dtype=st.sampled_from(DTYPES)
)
def test_equals_plain_loops(lists: list[List], k: int, method: str, dtype: torch.dtype) -> None:
    scores, ids = fc.merge_topk(as_tensors(lists, dtype), k, method=method)
    queries = len(lists[0][0])
    assert scores.shape == ids.shape == (queries, k) and ids.dtype == torch.int64
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for row in range(queries):
        expected, expected_ids = merged(lists, row, k, method)
        assert ids[row].tolist() == expected_ids
        assert scores[row].float().tolist() == expected


def test_the_order_of_three_places_makes_no_difference() -> None:
    """Places 1, 2 and 7 in any order tie, though the sum of 1/61, 1/62 and 1/67 depends on the order."""
    assert len({sum(1 / (60 + place) for place in order) for order in permutations((1, 2, 7))}) > 1
    for dtype in (torch.float32, torch.float64):
        lists = []
        for items in ([5, 4, 3], [4, 3, 5], [3, 5, 4]):
            others = torch.arange(10, 14) + 10 * len(lists)
            ids = torch.cat([torch.tensor(items[:2]), others, torch.tensor(items[2:])])[None]
            lists.append((torch.zeros(1, 7, dtype=dtype), ids))
        scores, ids = fc.merge_topk(lists, 3, method="rrf")
        assert ids.tolist() == [[3, 4, 5]] and len(scores.unique()) == 1


@pytest.mark.parametrize("method", ("score", "rrf"))
def test_one_list_keeps_its_order(method: str) -> None:
    query, keys = torch.randn(5, 8), torch.randn(60, 8)
    found = fc.topk(query, keys, 20)
    scores, ids = fc.merge_topk([found], 25, method=method)
    assert torch.equal(ids[:, :20], found[1]) and ids[:, 20:].eq(-1).all()
    assert method == "rrf" or torch.equal(scores[:, :20], found[0])


@pytest.mark.parametrize("metric", ("cosine", "ip", "l2"))
def test_shards_equal_one_search(metric: str) -> None:
    query, keys = torch.randn(7, 12), torch.randn(5, 12)[torch.randint(5, (90,))]
    shards = []
    for start in range(0, 90, 30):
        scores, ids = fc.topk(query, keys[start : start + 30], 10, metric=metric)
        shards.append((scores, torch.where(ids < 0, -1, ids + start)))
    for a, b in zip(fc.merge_topk(shards, 10), fc.topk(query, keys, 10, metric=metric), strict=True):
        assert torch.equal(a, b)


def test_results_of_faiss() -> None:
    """Arrays in, arrays out; faiss marks missing neighbours with -1 and a huge negative score."""
    rng = np.random.default_rng(0)
    query, keys = (rng.standard_normal((n, 8), dtype=np.float32) for n in (4, 6))
    index = faiss.IndexFlatIP(8)
    index.add(keys)
    theirs, ours = index.search(query, 9), fc.topk(query, keys, 9, metric="ip")
    for method in METHODS:
        scores, ids = fc.merge_topk([theirs, ours], 9, method=method)
        assert isinstance(scores, np.ndarray) and isinstance(ids, np.ndarray)
        assert np.array_equal(ids, ours[1]), method


def test_other_integer_types() -> None:
    scores = np.array([[2.0, 1.0, 0.5]], dtype=np.float32)
    for ids in (np.array([[4, 9, -1]], dtype=np.int32), np.array([[4.0, 9, -1]]), [[4, 9, -1]]):
        assert fc.merge_topk([(scores, ids)], 3)[1].tolist() == [[4, 9, -1]]
    assert fc.merge_topk([(scores, np.array([[4, 9, 2**63 - 1]], np.uint64))], 3)[1][0, 2] == 2**63 - 1


@pytest.mark.parametrize("id", (2**63, 2**63 + 5, 2**64 - 1))
def test_hashes_that_int64_does_not_hold(id: int) -> None:
    scores = np.array([[2.0, 1.0]], dtype=np.float32)
    for ids in (np.array([[id, 3]], np.uint64), torch.tensor(np.array([[id, 3]], np.uint64)), [[id, 3]]):
        with pytest.raises(ValueError, match=rf"`results\[0\]\[1\]` must be below 2\^63: got {id}; "):
            fc.merge_topk([(scores, ids)], 2)


def test_a_single_query() -> None:
    query, keys = torch.randn(8), torch.randn(30, 8)
    for shards in ([fc.topk(query, keys, 5)], [fc.topk(query[None], keys, 5)]):
        found = fc.merge_topk(shards * 2, 3)
        assert all(torch.equal(a, b[..., :3]) for a, b in zip(found, shards[0], strict=True))


def test_distances_are_refused_where_scores_are_read() -> None:
    """Ascending lists, as engines give distances; places alone are right as they are."""
    near, far = np.array([[0.1, 0.5, 0.5]]), np.array([[7.0, 0.0, 9.0]])
    ids = np.array([[4, 5, 6]])
    for method in ("score", "zscore", "minmax"):
        with pytest.raises(ValueError, match=r"`results\[1\]\[0\]` .* ascend, as distances do: give minus"):
            fc.merge_topk([(-near, ids), (near, ids)], 2, method=method)
        with pytest.raises(ValueError, match="ascend, as distances do"):  # around an empty slot
            fc.merge_topk([(far, np.array([[4, -1, 6]]))], 2, method=method)
        with pytest.raises(ValueError, match="row 0 is not; sort them with their ids"):
            fc.merge_topk([(far, ids)], 2, method=method)
        fc.merge_topk([(far, np.array([[4, 5, -1]]))], 2, method=method)
    assert fc.merge_topk([(near, ids), (near, ids)], 2, method="rrf")[1].tolist() == [[4, 5]]


S, IDS = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
BAD = torch.tensor([[0.0, 0, 0], [0, math.inf, 0]])


@pytest.mark.parametrize(
    ("results", "named", "error", "message"),
    [
        (S, {}, TypeError, "`results` must be a list of pairs (scores, ids): got Tensor"),
        ([], {}, ValueError, "`results` must hold at least one pair (scores, ids): got none"),
        ([S], {}, TypeError, "`results[0]` must be a pair (scores, ids): got Tensor"),
        ([(S, IDS), (S, IDS, IDS)], {}, TypeError, "`results[1]` must be a pair"),
        ([({1.0}, IDS)], {}, TypeError, "`results[0][0]` must be a tensor, an array, a list or a column"),
        ([(IDS, S)], {}, TypeError, "`results[0][0]` must be float32"),
        ([(S, S + 0.5)], {}, TypeError, "`results[0][1]` must hold whole numbers: got 0.5"),
        ([(S, IDS > 0)], {}, TypeError, "`results[0][1]` must hold whole numbers: got torch.bool"),
        ([(S[0], IDS)], {}, ValueError, "`results[0][1]` must have the shape of `results[0][0]`"),
        ([(S, IDS), (S[0], IDS[0])], {}, ValueError, "`results[1][0]` must have the shape [queries, k]"),
        ([(S[0], IDS[0]), (S, IDS)], {}, ValueError, "`results[1][0]` must have the shape [k], as"),
        (
            [(S, IDS[:, 1:])],
            {},
            ValueError,
            "`results[0][1]` must have the shape of `results[0][0]`: got [2, 2]",
        ),
        ([(S, IDS), (S[1:], IDS[1:])], {}, ValueError, "`results[1][0]` must have one entry per row of"),
        ([(S, IDS), (S, IDS.to("meta"))], {}, ValueError, "`results[1][1]` must be on the device of"),
        ([(S, IDS), (BAD, IDS)], {}, ValueError, "`results[1][0]` must be finite: row 1 holds NaN or inf"),
        ([(S, IDS)], {"k": 0}, ValueError, "`k` must be at least 1: got 0"),
        ([(S, IDS)], {"method": "sum"}, ValueError, '`method` must be one of "score", "rrf", "zscore"'),
        ([(S, IDS)], {"backend": "native"}, ValueError, '`backend="native"` does not cover `merge_topk`'),
    ],
)
def test_refuses(results: object, named: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fc.merge_topk(results, **{"k": 3, **named})  # type: ignore[arg-type]
