"""`agreement` against plain loops and against examples worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from retrieval_oracle import exact_vectors, ranking, scores

import fastcompat as fc


def plain(before: list[int], after: list[int], k: int, p: float) -> tuple[float, float, float]:
    common = [len(set(before[:d]) & set(after[:d])) for d in range(1, k + 1)]
    rbo = common[-1] / k * p**k + (1 - p) / p * sum(x / d * p**d for d, x in enumerate(common, 1))
    return common[-1] / k, rbo, float(before[0] != after[0])


@pytest.mark.parametrize("backend", ("auto", "reference"))
@pytest.mark.parametrize("excluded", (0, 1, 4))
@pytest.mark.parametrize("k", (1, 7, 60))
def test_equals_plain_loops_with_heavy_ties(backend: str, excluded: int, k: int) -> None:
    sides = [exact_vectors(seed, n, 4, "ip") for seed, n in ((0, 12), (1, 50), (2, 12), (3, 50))]
    exclude = torch.randint(-1, 50, (12, excluded), generator=torch.Generator().manual_seed(4))
    found = fc.agreement(*sides, k, metric="ip", exclude=exclude if excluded else None, backend=backend)
    each = []
    for q in range(12):
        lists = [
            [j for j in ranking(scores(*side, "ip")[q]) if j not in exclude[q].tolist()]
            for side in (sides[:2], sides[2:])
        ]
        each.append(plain(*lists, min(k, len(lists[0])), 0.9))
    assert found == pytest.approx(np.mean(each, axis=0), abs=1e-12)


def test_the_same_model_agrees_with_itself_and_another_does_not() -> None:
    torch.manual_seed(0)
    query, gallery = torch.randn(9, 5), torch.randn(40, 5)
    assert fc.agreement(query, gallery, query, gallery) == pytest.approx((1, 1, 0))
    far = fc.agreement(query, gallery, -query, gallery, 20)
    assert far == pytest.approx((0, 0, 1))
    empty = fc.agreement(query[:0], gallery, query[:0], gallery)
    assert all(map(math.isnan, empty))


def test_refuses_bad_persistence() -> None:
    x = torch.eye(3)
    with pytest.raises(ValueError, match="`persistence` must be a number between 0 and 1: got 1"):
        fc.agreement(x, x, x, x, persistence=1)
