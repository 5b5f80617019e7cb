"""What `mixed_topk`, `retrieval_metrics` and `backfill_curve` refuse, and what a curve offers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastcompat as fc

OLD, NEW, LABELS = torch.randn(20, 6), torch.randn(20, 8), torch.arange(20) % 4
QUERY_OLD, QUERY_NEW, QUERY_LABELS = OLD[:5] + 0.1, NEW[:5] + 0.1, LABELS[:5]
MASK = LABELS == 1
TOPK = dict(query_old=QUERY_OLD, old=OLD, query_new=QUERY_NEW, new=NEW, backfilled=MASK, k=3)
METRICS = dict(query=QUERY_OLD, gallery=OLD, query_labels=QUERY_LABELS, gallery_labels=LABELS)
CURVE = dict(
    query_old=QUERY_OLD,
    old=OLD,
    query_new=QUERY_NEW,
    new=NEW,
    query_labels=QUERY_LABELS,
    gallery_labels=LABELS,
)
TWICE = torch.arange(20).clamp(min=1)


@pytest.mark.parametrize(
    ("function", "valid", "changed", "kind", "message"),
    [
        (
            fc.mixed_topk,
            TOPK,
            {"old": {"vectors": OLD}},
            TypeError,
            "`old` must be a tensor, an array, a list or a column of a data frame: got dict",
        ),
        (fc.mixed_topk, TOPK, {"new": NEW[0]}, ValueError, "`new` must have 2 dimensions"),
        (
            fc.mixed_topk,
            TOPK,
            {"new": OLD},
            ValueError,
            "`new` must have as many columns as `query_new`: got 6 and 8",
        ),
        (
            fc.mixed_topk,
            TOPK,
            {"new": NEW[1:]},
            ValueError,
            "`new` must have one entry per row of `old`: got 19 and 20",
        ),
        (
            fc.mixed_topk,
            TOPK,
            {"query_new": QUERY_NEW[1:]},
            ValueError,
            "`query_new` must have one entry per row",
        ),
        (fc.mixed_topk, TOPK, {"new": NEW.int()}, TypeError, "`new` must be float32"),
        (
            fc.mixed_topk,
            TOPK,
            {"backfilled": MASK.long()},
            TypeError,
            "`backfilled` must be bool: got torch.int64",
        ),
        (
            fc.mixed_topk,
            TOPK,
            {"backfilled": MASK[1:]},
            ValueError,
            "`backfilled` must have one entry per row of `old`",
        ),
        (
            fc.mixed_topk,
            TOPK,
            {"backfilled": MASK.reshape(4, 5)},
            ValueError,
            "`backfilled` must have 1 dimension",
        ),
        (fc.mixed_topk, TOPK, {"k": 0}, ValueError, "`k` must be at least 1: got 0"),
        (fc.mixed_topk, TOPK, {"k": 2.0}, TypeError, "`k` must be an int: got float"),
        (fc.mixed_topk, TOPK, {"metric": "dot"}, ValueError, "`metric` must be one of"),
        (fc.mixed_topk, TOPK, {"backend": "cuda"}, ValueError, "`backend` must be one of"),
        (fc.mixed_topk, TOPK, {"scale": 2.0}, ValueError, "`scale` must be two numbers"),
        (fc.mixed_topk, TOPK, {"offset": (0, 1, 2)}, ValueError, "`offset` must be two numbers"),
        (fc.mixed_topk, TOPK, {"offset": (0, float("inf"))}, ValueError, "`offset` must be finite"),
        (
            fc.retrieval_metrics,
            METRICS,
            {"gallery": NEW},
            ValueError,
            "`gallery` must have as many columns as `query`",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"query_labels": LABELS},
            ValueError,
            "`query_labels` must have one entry per",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"gallery_labels": LABELS[1:]},
            ValueError,
            "per row of `gallery`: got 19 and",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"gallery_labels": LABELS / 2},
            TypeError,
            "`gallery_labels` must hold whole numbers: got 0.5",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"exclude": LABELS},
            ValueError,
            "`exclude` must have one entry per row of `q",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"exclude": torch.arange(16, 21)},
            ValueError,
            "row numbers below 20: got 20",
        ),
        (
            fc.retrieval_metrics,
            METRICS,
            {"exclude": torch.arange(-2, 3)},
            ValueError,
            "row numbers below 20: got -2",
        ),
        (fc.retrieval_metrics, METRICS, {"ks": 5}, TypeError, "`ks` must be a sequence of ints: got int"),
        (fc.retrieval_metrics, METRICS, {"ks": (1, 0)}, ValueError, "`ks` must be at least 1: got 0"),
        (fc.retrieval_metrics, METRICS, {"map_at": 0}, ValueError, "`map_at` must be at least 1: got 0"),
        (fc.retrieval_metrics, METRICS, {"metric": "l1"}, ValueError, "`metric` must be one of"),
        (fc.backfill_curve, CURVE, {"states": 1}, ValueError, "`states` must be at least 2"),
        (
            fc.backfill_curve,
            CURVE,
            {"new": NEW[:9]},
            ValueError,
            "`new` must have one entry per row of `old`: got 9",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"query_new": QUERY_NEW[:2]},
            ValueError,
            "`query_new` must have one entry per row",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"gallery_labels": LABELS[:9]},
            ValueError,
            "per row of `old`: got 9 and 20",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"order": torch.arange(19)},
            ValueError,
            "`order` must hold each of the 20 gallery",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"order": TWICE},
            ValueError,
            "`order` must be a permutation of the gallery ids 0 ..",
        ),
        (fc.backfill_curve, CURVE, {"order": TWICE}, ValueError, "id 0 is missing"),
        (fc.backfill_curve, CURVE, {"order": torch.arange(1, 21)}, ValueError, "id 0 is missing"),
        (fc.backfill_curve, CURVE, {"order": torch.rand(20)}, TypeError, "`order` must hold whole numbers"),
        (
            fc.backfill_curve,
            CURVE,
            {"baseline": OLD},
            TypeError,
            "`baseline` must be a pair (query, gallery)",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"baseline": (OLD, OLD)},
            ValueError,
            "`baseline[0]` must have one entry per row",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"baseline": (QUERY_OLD, OLD[:3])},
            ValueError,
            "`baseline[1]` must have one entry",
        ),
        (
            fc.backfill_curve,
            CURVE,
            {"baseline": (QUERY_OLD, NEW)},
            ValueError,
            "as many columns as `baseline[0]`",
        ),
    ],
)
def test_refuses(
    function: Any, valid: dict[str, Any], changed: dict[str, Any], kind: type, message: str
) -> None:
    function(**valid)
    with pytest.raises(kind, match=re.escape(message)):
        function(**(valid | changed))


def test_native_backend_refuses_float64() -> None:
    for function, valid, names in (
        (fc.mixed_topk, TOPK, ("query_new", "new")),
        (fc.retrieval_metrics, METRICS, ("query", "gallery")),
        (fc.backfill_curve, CURVE, ("query_new", "new")),
    ):
        double = {name: valid[name].double() for name in names}
        function(**(valid | double))
        with pytest.raises(ValueError, match=r"does not cover torch\.float64"):
            function(**(valid | double), backend="native")


@pytest.fixture
def curve() -> fc.BackfillCurve:
    return fc.backfill_curve(**CURVE, states=5, ks=(1, 2))


def test_area_is_the_mean_over_the_states(curve: fc.BackfillCurve) -> None:
    assert curve.auc() == curve.auc("map") == pytest.approx(float(curve.map.mean()))
    assert curve.auc("cmc@2") == pytest.approx(sum(curve.cmc[2].tolist()) / 5)
    with pytest.raises(
        ValueError,
        match=re.escape(
            '`name` must be one of "map", "cmc@1", "cmc@2", "ndcg@1", "ndcg@2", "mrr": got \'cmc@3\''
        ),
    ):
        curve.auc("cmc@3")


def test_dictionary_holds_plain_numbers(curve: fc.BackfillCurve) -> None:
    data = json.loads(json.dumps(curve.to_dict()))
    assert set(data) == {
        "fraction",
        "map",
        "cmc",
        "negative_flips",
        "positive_flips",
        "ndcg",
        "mrr",
        "skipped",
    }
    assert data["fraction"] == [0, 0.25, 0.5, 0.75, 1] and data["skipped"] == 0
    assert data["map"] == curve.map.tolist() and data["cmc"]["2"] == curve.cmc[2].tolist()


def test_plot_writes_a_picture(curve: fc.BackfillCurve, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = curve.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    quality, flips = figure.axes
    np.testing.assert_allclose(quality.lines[0].get_xydata()[:, 1], curve.map)
    np.testing.assert_allclose(flips.lines[0].get_xydata()[:, 1], 100 * curve.negative_flips)
    assert curve.plot() is not figure
