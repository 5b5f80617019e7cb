"""Intervals and tests against SciPy, and how often an interval holds what it promises."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import fastcompat as fc

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    ("count", "total"), [(0, 1), (1, 1), (0, 200), (3, 200), (100, 200), (200, 200), (7, 12345)]
)
@pytest.mark.parametrize("level", (0.8, 0.95, 0.999))
def test_wilson_equals_scipy(count: int, total: int, level: float) -> None:
    truth = stats.binomtest(count, total).proportion_ci(level, method="wilson")
    assert fc.wilson(count, total, level) == pytest.approx((truth.low, truth.high), abs=1e-12)


def test_wilson_of_nothing() -> None:
    assert fc.wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("count", (2, 7, 13))
def test_few_queries_are_tested_exactly(count: int) -> None:
    random = np.random.default_rng(count)
    a, b = random.random(count), random.random(count)
    truth = stats.permutation_test(
        (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", vectorized=True
    )
    found = fc.compare(a, b)
    assert found.difference == pytest.approx((a - b).mean(), abs=1e-15)
    assert found.p == pytest.approx(truth.pvalue, abs=1e-12)


def test_many_queries_agree_with_scipy() -> None:
    random = np.random.default_rng(0)
    a = random.random(300)
    b = a + random.normal(0.012, 0.1, 300)
    found = fc.compare(torch.from_numpy(a), torch.from_numpy(b))
    test = stats.permutation_test(
        (a, b),
        lambda x, y, axis: (x - y).mean(axis),
        permutation_type="samples",
        vectorized=True,
        batch=500,
        rng=np.random.default_rng(1),
    )
    truth = stats.bootstrap(
        (a - b,), np.mean, method="percentile", n_resamples=20_000, batch=500, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.p == pytest.approx(test.pvalue, abs=4 * math.sqrt(2 * found.p / 10_000))
    assert found[1:3] == pytest.approx((truth.low, truth.high), abs=5e-4)
    assert fc.compare(a, b) == found == fc.compare(a, b, seed=0) != fc.compare(a, b, seed=1)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 12), (12, 3), (40, 40), (700, 820)])
def test_flags_get_the_exact_test_of_mcnemar(lost: int, won: int) -> None:
    before = np.array([True] * lost + [False] * won + [True] * 30 + [False] * 9)
    after = np.array([False] * lost + [True] * won + [True] * 30 + [False] * 9)
    found = fc.compare(after, before)
    truth = stats.binomtest(won, lost + won).pvalue if lost + won else 1.0
    assert found.p == pytest.approx(truth, rel=1e-10)
    assert found.difference == pytest.approx((won - lost) / len(before), abs=1e-15)


def test_intervals_cover_the_truth() -> None:
    random = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        gain = random.beta(0.4, 0.5, 150) - random.beta(0.4, 0.6, 150)  # as skewed as APs are
        found = fc.compare(gain, np.zeros(150), samples=800, seed=trial)
        covered += found.low <= 0.4 / 0.9 - 0.4 <= found.high
    assert covered >= 300 * 0.95 - 3 * math.sqrt(300 * 0.95 * 0.05)


def test_skipped_queries_are_left_out_and_one_query_has_no_interval() -> None:
    a, b = [0.5, math.nan, 0.25], [0.25, math.nan, 0.5]
    assert fc.compare(a, b) == fc.compare([0.5, 0.25], [0.25, 0.5])
    with pytest.warns(UserWarning, match="one query has no interval"):
        found = fc.compare([0.5, math.nan], [0.25, math.nan])
    assert found.difference == 0.25 and all(map(math.isnan, found[1:]))


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "message"),
    [
        (([0.5, 0.5], [0.5]), {}, ValueError, "`b` must have one entry per entry of `a`: got 1 and 2"),
        (([0.5, math.nan], [0.5, 0.5]), {}, ValueError, "query 1 is NaN in one of them only"),
        (([math.nan], [math.nan]), {}, ValueError, "`a` must hold at least 1 figure that is not NaN"),
        (([[0.5]], [0.5]), {}, ValueError, "`a` must have 1 dimension, one figure a query"),
        (([0.5], [math.inf]), {}, ValueError, "`b` must not hold inf: query 0 does"),
        (
            ([0.5, 1], [0.5, 0]),
            {"level": 95},
            ValueError,
            "`level` must be between 0 and 1, such as 0.95: got 95",
        ),
        (([0.5, 1], [0.5, 0]), {"samples": 0}, ValueError, "`samples` must be at least 1"),
        ((["a"], [0.5]), {}, TypeError, "`a` must hold numbers"),
    ],
)
def test_compare_refuses(arguments: tuple, options: dict[str, Any], kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        fc.compare(*arguments, **options)


@pytest.mark.parametrize(("count", "total"), [(3, 2), (-1, 5)])
def test_wilson_refuses(count: int, total: int) -> None:
    with pytest.raises(ValueError, match="`count` must be from 0 to `total`"):
        fc.wilson(count, total)
