"""Searches in which every query has a scale and an offset of its own, for every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcompat import _ops, _search, reference
from fastcompat._types import Segment

METRICS = ("cosine", "ip", "l2")
N, K = 1500, 9


def two_spaces(queries: int, dtype: torch.dtype = torch.float32) -> list[Segment]:
    """A gallery of which two fifths stand in the second space."""
    done = torch.rand(N) < 0.4
    return [
        Segment(torch.randn(queries, dim).to(dtype), torch.randn(N, dim).to(dtype), mask.nonzero()[:, 0])
        for dim, mask in ((24, ~done), (40, done))
    ]


def with_numbers(parts: list[Segment], scales: list[Tensor], offsets: list[Tensor]) -> list[Segment]:
    return [part._replace(scale=scales[s], offset=offsets[s]) for s, part in enumerate(parts)]


def every_score(part: Segment, metric: str) -> Tensor:
    """Score of every pair [B, N] by the kernel of single pairs."""
    ids = torch.arange(N).expand(len(part.query), N)
    return _ops.pair_scores(
        part.query, part.keys, ids, metric, _search.affine_of(part.scale, part.offset, part.query)
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", (1, 7, 70))
@pytest.mark.parametrize("sign", ("rising", "any"))
def test_screened_or_not_the_best_are_those_of_all_scores(metric: str, queries: int, sign: str) -> None:
    parts = two_spaces(queries)
    scales = [torch.randn(queries) for _ in parts]
    if sign == "rising":
        scales = [scale.abs() * 10 ** torch.linspace(-3, 3, queries) + 1e-4 for scale in scales]
    parts = with_numbers(parts, scales, [torch.randn(queries) for _ in parts])
    whole = torch.empty(queries, N)
    for part in parts:
        whole[:, part.rows] = every_score(part, metric)[:, part.rows]
    best, order = whole.sort(dim=1, descending=True, stable=True)
    scores, ids = _search.topk(parts, K, metric, native=True)
    assert torch.equal(scores, best[:, :K]) and torch.equal(ids, order[:, :K])
    for part, scale in zip(parts, scales, strict=True):  # against the definition, in double
        plain = reference.scores(part.query.double(), part.keys.double(), metric)
        mapped = scale.double()[:, None] * plain + part.offset.double()[:, None]
        error = (every_score(part, metric) - mapped).abs()
        assert (
            error <= 1e-5 * (scale.abs()[:, None] * plain.abs().clamp(min=1) + part.offset.abs()[:, None])
        ).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("queries", (3, 70))
def test_equal_numbers_give_the_bits_of_the_number(metric: str, dtype: torch.dtype, queries: int) -> None:
    parts = two_spaces(queries, dtype)
    numbers = [
        part._replace(scale=s, offset=o) for part, s, o in zip(parts, (2.3, 0.7), (-1.5, 0.3), strict=True)
    ]
    vectors = with_numbers(
        parts,
        [torch.full((queries,), s) for s in (2.3, 0.7)],
        [torch.full((queries,), o) for o in (-1.5, 0.3)],
    )
    for a, b in zip(*(_search.topk(x, K, metric, native=True) for x in (numbers, vectors)), strict=True):
        assert torch.equal(a, b)
    one = _search.topk([numbers[0], vectors[1]], K, metric, native=True)
    assert torch.equal(one[0], _search.topk(numbers, K, metric, native=True)[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", (3, 140))
def test_beats_are_counted_among_mapped_scores(metric: str, queries: int) -> None:
    part = two_spaces(queries)[0]._replace(rows=None)
    for scale in (torch.rand(queries) + 0.1, torch.randn(queries)):
        own = torch.stack([scale, torch.randn(queries)])
        targets, exclude = torch.randint(0, N, (queries, 5)), torch.randint(-1, N, (queries,))
        whole = every_score(part._replace(scale=own[0], offset=own[1]), metric)
        bars, bounds = whole.gather(1, targets), torch.tensor([0, 400, N])
        found = _ops.count_beats(part.query, part.keys, None, bounds, bars, targets, metric, exclude, own)
        number = torch.arange(N)
        beats = (whole[:, None] > bars[..., None]) | (
            (whole[:, None] == bars[..., None]) & (number < targets[..., None])
        )
        beats &= (number != exclude[:, None])[:, None]
        assert torch.equal(found, torch.stack([beats[..., :400].sum(-1), beats[..., 400:].sum(-1)], -1))


def test_the_operators_refuse_numbers_of_another_shape() -> None:
    query, keys = torch.randn(3, 4), torch.randn(5, 4)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    wrong = torch.ones(2, 4)
    with pytest.raises(ValueError, match="affine"):
        _ops.pair_scores(query, keys, ids, "ip", wrong)
    with pytest.raises(ValueError, match="affine"):
        _ops.count_beats(query, keys, None, torch.tensor([0, 5]), ids.float(), ids, "ip", None, wrong)
    with pytest.raises(ValueError, match="affine"):
        _ops.topk([query], [keys], [], [1.0], [0.0], 2, "ip", None, None, None, [], True, None, wrong[None])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("queries", (3, 70))
def test_rows_named_by_their_items_keep_the_numbers_of_each_query(metric: str, queries: int) -> None:
    """A store whose rows are in another order than its items, searched with the same numbers per query."""
    parts = with_numbers(
        two_spaces(queries),
        [torch.rand(queries) + 0.1 for _ in range(2)],
        [torch.randn(queries) for _ in range(2)],
    )
    stored = []
    for part in parts:
        assert part.rows is not None
        items = part.rows[torch.randperm(len(part.rows))]
        stored.append(part._replace(keys=part.keys[items], rows=None, items=items.int()))
    for a, b in zip(*(_search.topk(x, K, metric, native=True) for x in (parts, stored)), strict=True):
        assert torch.equal(a, b)
