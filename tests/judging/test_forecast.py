"""`forecast_curve` against `backfill_curve`: equal where everything is known, close and covered elsewhere."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompat as fc
from fastcompat.judging import expected

Q, N = 40, 900


def clusters(seed: int, queries: int = Q) -> tuple[list[Tensor], fc.Relevance, Tensor]:
    """Two models of points around 30 centres; each query's centre has 3 judged items."""
    random = torch.Generator().manual_seed(seed)
    of_query, of_item = (torch.randint(0, 30, (n,), generator=random) for n in (queries, N))
    of_item[:90] = torch.arange(90) % 30
    sides = []
    for width, noise in ((8, 1.2), (16, 0.9)):
        centres = torch.randn(30, width, generator=random)
        for of in (of_query, of_item):
            sides.append(centres[of] + noise * torch.randn(len(of), width, generator=random))
    pairs = (of_query[:, None] == of_item[:90]).nonzero()
    grades = torch.randint(1, 4, (len(pairs),), generator=random)
    return sides, fc.Relevance(*pairs.T, grades), torch.arange(90)


def forecast(sides: list[Tensor], sample: Tensor, judged: Tensor, **options: Any) -> fc.BackfillCurve:
    query_old, old, query_new, new = sides
    return fc.forecast_curve(
        query_old,
        old,
        query_new,
        sample,
        new[sample.clamp(max=N - 1)],
        relevant_new=new[judged],
        relevant_ids=judged,
        **options,
    )


@pytest.mark.parametrize("metric", ("cosine", "ip", "l2"))
@pytest.mark.parametrize("excluding", (False, True))
def test_equals_the_curve_where_everything_was_embedded(metric: str, excluding: bool) -> None:
    sides, relevance, _ = clusters(0)
    random = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {
        "relevance": relevance,
        "states": 7,
        "ks": (1, 4, 30),
        "metric": metric,
        "seed": 5,
    }
    if excluding:
        options["exclude"] = torch.randint(-1, N, (Q, 2), generator=random)
        options["exclude_groups"] = torch.arange(Q) % 7, torch.arange(N) % 50
    options |= {"gain": "exp", "seed": 5}
    everything = torch.randperm(N, generator=random)
    found = fc.forecast_curve(*sides[:3], everything, sides[3][everything], **options)
    truth = fc.backfill_curve(*sides, **options)
    assert found.skipped == truth.skipped
    for name in ("fraction", "map", "mrr", "negative_flips", "positive_flips"):
        np.testing.assert_allclose(getattr(found, name), getattr(truth, name), atol=1e-12)
    for k in (1, 4, 30):
        np.testing.assert_allclose(found.ndcg[k], truth.ndcg[k], atol=1e-12)
        np.testing.assert_allclose(found.cmc[k], truth.cmc[k], atol=1e-12)
    np.testing.assert_allclose(found.per_query.ap, truth.per_query.ap, atol=1e-12)
    np.testing.assert_allclose(found.per_query.lost, truth.per_query.lost.double(), atol=1e-12)


def test_expected_figures_equal_the_sum_over_all_outcomes() -> None:
    stats = pytest.importorskip("scipy.stats")
    ahead, share = torch.tensor([[0, 3, 3, 40]]), torch.tensor([[0.0, 0.002, 0.01, 0.3]], dtype=torch.float64)
    grades, trials = torch.tensor([[3, 1, 2, 1]]), 90
    ideal = torch.tensor([[3, 2, 1, 1]])
    for n in (0, 1, trials):
        found = expected.figures(
            ahead, torch.tensor([[n]]), share, grades, torch.tensor([4]), ideal, (1, 5, 60), "linear"
        )
        x = np.arange(n + 1)
        chances = stats.binom.pmf(x, n, share[0, :, None].numpy())  # [P, n + 1]
        ranks = ahead[0, :, None].numpy() + x
        inverse = (chances / (ranks + 1)).sum(1)
        assert float(found["ap"]) == pytest.approx((inverse * [1, 2, 3, 4]).mean(), rel=2e-5)
        assert float(found["rr"]) == pytest.approx(inverse[0], rel=1e-5)
        assert float(found["top1"]) == pytest.approx(chances[0, 0])
        for k in (1, 5, 60):
            gain = (chances * (ranks < k) / np.log2(ranks + 2)).sum(1) @ grades[0].double().numpy()
            best = (ideal[0].numpy() / np.log2(np.arange(4) + 2))[:k].sum()
            assert float(found["ndcg"][k]) == pytest.approx(gain / best, rel=1e-9)
            assert float(found["cmc"][k]) == pytest.approx((chances * (ranks < k))[0].sum())


def test_a_small_sample_comes_close_and_its_band_holds_the_curve_of_other_queries() -> None:
    sides, relevance, judged = clusters(2, queries=1000)
    truth = fc.backfill_curve(*sides, relevance=relevance)
    held, off = 0, []
    for seed in range(15):
        random = np.random.default_rng(seed)
        drawn = np.sort(random.choice(1000, 60, replace=False))
        row = np.full(1000, -1)
        row[drawn] = np.arange(60)
        mine = row[relevance.query] >= 0
        own = fc.Relevance(row[relevance.query[mine]], relevance.item[mine])
        sample = torch.from_numpy(random.choice(N, N // 20, replace=False))
        found = forecast(
            [sides[0][drawn], sides[1], sides[2][drawn], sides[3]], sample, judged, relevance=own, samples=300
        )
        assert found.low is not None and found.high is not None
        others = np.setdiff1d(np.arange(1000), drawn)
        target = truth.per_query.ap[:, others].nanmean(1)
        held += bool(((found.low.map <= target) & (target <= found.high.map)).all())
        off.append(float(found.map.mean() - truth.per_query.ap[:, drawn].nanmean()))
        assert (found.low.map <= found.map).all() and (found.map <= found.high.map).all()
    assert held >= 12  # of 15; 95 % are promised
    assert np.mean(np.abs(off)) <= 0.01
    assert abs(np.mean(off)) <= 0.005


def test_labels_numpy_and_float64_do_too() -> None:
    random = np.random.default_rng(0)
    old, new = random.normal(size=(300, 5)), random.normal(size=(300, 6))
    labels = random.integers(0, 100, 300)
    sample = random.choice(300, 60, replace=False)
    judged = np.flatnonzero(np.isin(labels, labels[:9]))
    options: dict[str, Any] = {"exclude": np.arange(9), "states": 4}
    found = fc.forecast_curve(
        old[:9], old, new[:9], sample, new[sample], labels[:9], labels, relevant_new=new[judged],
        relevant_ids=judged, **options,
    )  # fmt: skip
    assert isinstance(found.map, np.ndarray) and found.low is not None and found.low.map.shape == (4,)
    again = fc.forecast_curve(
        old[:9], old, new[:9], sample, new[sample], labels[:9], labels, relevant_new=new[judged],
        relevant_ids=judged, **options,
    )  # fmt: skip
    assert found.to_dict() == again.to_dict()
    exact = fc.backfill_curve(old[:9], old, new[:9], new, labels[:9], labels, **options)
    assert found.map[0] == pytest.approx(exact.map[0], abs=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sample": torch.arange(100, 112)}, "got 12; embed 8 more, drawn at random"),
        ({"sample": torch.tensor([1, 1])}, "`sample_ids` must name each item once"),
        ({"sample": torch.tensor([5, N])}, "`sample_ids` must hold row numbers below 900: got 900"),
        ({"judged": torch.arange(80)}, "of 90 have no new vector, such as item 80"),
        ({"level": 95}, "`level` must be a number between 0 and 1, such as 0.95: got 95"),
        ({"relevance": fc.Relevance([0], [1])}, "must hold at least 2 queries with a relevant item"),
        ({"states": 1}, "`states` must be at least 2"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    sides, relevance, judged = clusters(0, queries=400)
    options = {"sample": torch.arange(90, 200), "judged": judged, "relevance": relevance} | changed
    sample, judged = options.pop("sample"), options.pop("judged")
    old_queries = [
        x if i % 2 else x[: 1 + int(options["relevance"].query.max())] for i, x in enumerate(sides)
    ]
    with pytest.raises(ValueError, match=re.escape(message)):
        forecast(old_queries, sample, judged, **options)


def test_refuses_another_number_of_relevant_vectors() -> None:
    (query_old, old, query_new, new), relevance, _ = clusters(0)
    with pytest.raises(ValueError, match=r"one vector for each of the \d+ items .*: got 7; name others"):
        fc.forecast_curve(
            query_old,
            old,
            query_new,
            torch.arange(90, 200),
            new[90:200],
            relevant_new=new[:7],
            relevance=relevance,
        )
    bad = new.clone()
    bad[95, 3] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        forecast(
            [query_old, old, query_new, bad], torch.arange(90, 200), torch.arange(90), relevance=relevance
        )
