"""A curve query by query: its means, who wins and loses, the file of all, and bands over orders."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastcompat as fc

random = torch.Generator().manual_seed(0)
OLD, NEW = torch.randn(150, 6, generator=random), torch.randn(150, 9, generator=random)
LABELS = torch.randint(-1, 12, (150,), generator=random)
SIDES = OLD[:40], OLD, NEW[:40], NEW, LABELS[:40], LABELS
OWN = torch.arange(40)


@pytest.fixture(scope="module")
def curve() -> fc.BackfillCurve:
    return fc.backfill_curve(*SIDES, states=6, ks=(1, 5), exclude=OWN, seed=3)


def test_the_curves_are_the_means_of_their_queries(curve: fc.BackfillCurve) -> None:
    each = curve.per_query
    counted = ~each.ap[0].isnan()
    assert 0 < curve.skipped == int((~counted).sum())
    assert curve.map.tolist() == each.ap[:, counted].mean(1).tolist()
    assert curve.mrr.tolist() == pytest.approx(each.rr[:, counted].mean(1).tolist())
    assert curve.ndcg[5].tolist() == pytest.approx(each.ndcg[5][:, counted].mean(1).tolist())
    assert curve.cmc[1].tolist() == each.top1[:, counted].double().mean(1).tolist()
    assert curve.negative_flips.tolist() == each.lost[:, counted].double().mean(1).tolist()
    assert curve.positive_flips.tolist() == each.won[:, counted].double().mean(1).tolist()
    assert torch.equal(each.lost, each.top1[0] & ~each.top1)
    assert not each.top1[:, ~counted].any()
    assert curve.auc("mrr") == float(curve.mrr.mean()) and curve.auc("ndcg@5") == float(curve.ndcg[5].mean())


@pytest.mark.parametrize(("state", "side"), ((0, (OLD, OLD)), (-1, (NEW, NEW))))
def test_its_ends_are_the_pure_systems(curve: fc.BackfillCurve, state: int, side: tuple) -> None:
    pure = fc.retrieval_metrics(side[0][:40], side[1], *SIDES[4:], ks=(1, 5), exclude=OWN)
    np.testing.assert_array_equal(curve.per_query.ap[state], pure.per_query.map)
    np.testing.assert_array_equal(curve.per_query.rr[state], pure.per_query.mrr)
    np.testing.assert_array_equal(curve.per_query.ndcg[5][state], pure.per_query.ndcg[5])
    assert float(curve.mrr[state]) == pytest.approx(pure.mrr)


def test_winners_and_losers(curve: fc.BackfillCurve) -> None:
    change = (curve.per_query.ap[2] - curve.per_query.ap[0]).numpy()
    losers, winners = curve.per_query.losers(100, state=2), curve.per_query.winners(5, state=2)
    assert losers == sorted(np.flatnonzero(change < 0).tolist(), key=lambda q: change[q])
    assert len(winners) == 5 and change[winners[0]] == np.nanmax(change)
    with pytest.raises(ValueError, match="`state` must be one of 6 states, from 0: got 6"):
        curve.per_query.losers(state=6)


def test_csv_holds_every_query(curve: fc.BackfillCurve, tmp_path: Path) -> None:
    names = [f'query "{q}", $x' for q in range(40)]
    curve.per_query.to_csv(tmp_path / "queries.csv", names)
    with (tmp_path / "queries.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == names
    for q, row in enumerate(rows):
        ap = curve.per_query.ap[:, q].tolist()
        if math.isnan(ap[0]):
            assert row["ap_old"] == row["states_lost"] == ""
            continue
        assert (float(row["ap_old"]), float(row["ap_new"])) == (ap[0], ap[-1])
        assert float(row["worst_ap"]) == min(ap)
        assert float(row["worst_at_fraction"]) == float(curve.fraction[ap.index(min(ap))])
        assert int(row["states_lost"]) == int(curve.per_query.lost[:, q].sum())
    with pytest.raises(ValueError, match="`ids` must have one entry per query: got 3 and 40"):
        curve.per_query.to_csv(tmp_path / "other.csv", names[:3])


@pytest.mark.parametrize("as_numpy", (False, True))
def test_several_orders_give_a_mean_and_a_band(as_numpy: bool) -> None:
    sides = [x.numpy() for x in SIDES] if as_numpy else SIDES
    found = fc.backfill_curve(*sides, states=6, ks=(1, 5), orders=3, seed=4)
    alone = [fc.backfill_curve(*sides, states=6, ks=(1, 5), seed=4 + i) for i in range(3)]
    assert found.low is not None and found.high is not None
    for name in ("map", "mrr", "negative_flips"):
        each = np.stack([getattr(one, name) for one in alone])
        np.testing.assert_allclose(getattr(found, name), each.mean(0), atol=1e-15)
        np.testing.assert_array_equal(getattr(found.low, name), each.min(0))
        np.testing.assert_array_equal(getattr(found.high, name), each.max(0))
    each = np.stack([one.ndcg[5] for one in alone])
    np.testing.assert_array_equal(found.high.ndcg[5], each.max(0))
    np.testing.assert_array_equal(found.per_query.ap, alone[0].per_query.ap)
    assert found.to_dict()["low"]["map"] == found.low.map.tolist()
    assert isinstance(found.low.map, np.ndarray) is as_numpy
    with pytest.raises(ValueError, match="`orders` must be 1 where `order` is given"):
        fc.backfill_curve(*sides, orders=2, order=np.arange(150))
