"""`fastcompat evaluate`: the figures of `backfill_curve`, from files, and a clear refusal of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import fastcompat as fc
from fastcompat.commands import evaluation
from fastcompat.commands.app import app

Arrays = dict[str, Any]


@pytest.fixture
def arrays() -> Arrays:
    rng = np.random.default_rng(0)
    labels, query_labels = rng.integers(0, 6, 60), rng.integers(0, 8, 23)  # two classes have no item
    centres = rng.standard_normal((8, 7))
    found = {"labels": labels, "query-labels": query_labels}
    for name, noise in (("old", 1.5), ("new", 1.0)):
        for side, which in (("", labels), ("query-", query_labels)):
            x = centres[which] + noise * rng.standard_normal((len(which), 7))
            found[f"{side}{name}"] = x.astype(np.float32)
    return found


def call(folder: Path, arrays: Arrays, *more: str):
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    options = [word for name in arrays for word in (f"--{name}", str(folder / f"{name}.npy"))]
    return CliRunner().invoke(app, ["evaluate", *options, "--out", str(folder / "r" / "report.html"), *more])


def curve(arrays: Arrays, query: str = "old", **named: Any) -> fc.BackfillCurve:
    sides = [arrays[f"query-{query}"], arrays["old"], arrays["query-new"], arrays["new"]]
    labels = arrays["query-labels"], arrays["labels"]
    baseline = arrays["query-old"], arrays["old"]
    return fc.backfill_curve(*sides, *labels, baseline=baseline, **named)


def check(found: dict[str, Any], expected: fc.BackfillCurve) -> None:
    expected_figures = json.loads(json.dumps(expected.to_dict()))
    assert found["skipped"] == expected_figures["skipped"]
    for name in ("fraction", "map", "negative_flips", "positive_flips"):
        np.testing.assert_allclose(found[name], expected_figures[name], rtol=1e-12, atol=1e-15)
    for k in ("1", "5", "10"):
        np.testing.assert_allclose(found["cmc"][k], expected_figures["cmc"][k], rtol=1e-12)


@pytest.mark.parametrize("block", (5, 1024))
def test_figures_are_those_of_the_curves(
    block: int, arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BLOCK", block)
    arrays["query-labels"][:5] = 7  # the first block counts for nothing
    result = call(tmp_path, arrays, "--metric", "l2", "--states", "6", "--seed", "3")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r" / "figures.json").read_text())
    named = {"metric": "l2", "states": 6, "seed": 3}
    check(found["curves"]["both models"], curve(arrays, **named))
    check(found["curves"]["new alone"], curve(arrays, "new", **named))
    assert found["area"]["both models"]["map"] == pytest.approx(curve(arrays, **named).auc())
    rows = [
        line.split() for line in result.output.splitlines() if line.startswith(("both models", "new alone"))
    ]
    expected = curve(arrays, **named)
    assert rows[2][2:5] == ["100%", f"{expected.map[-1]:.3f}", f"{expected.cmc[1][-1]:.3f}"]
    assert f"{int(expected.skipped)} queries without a relevant item" in " ".join(result.output.split())
    page = (tmp_path / "r" / "report.html").read_text()
    assert "60 items, 23 queries" in page and "new alone" in page
    with Image.open(tmp_path / "r" / "curves.png") as picture:
        assert picture.size == (1600, 800)


def test_without_queries_each_item_is_left_out_of_its_own_ranking(arrays: Arrays, tmp_path: Path) -> None:
    order = np.random.default_rng(1).permutation(60).astype(np.int32)
    np.save(tmp_path / "order.npy", order)
    given = {name: arrays[name] for name in ("old", "new", "labels")} | {
        "labels": arrays["labels"].astype("u1")
    }
    given["old"], given["new"] = given["old"].astype(np.float64), given["new"][:, :5]
    result = call(tmp_path, given, "--order", str(tmp_path / "order.npy"))
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "r" / "figures.json").read_text())["curves"]
    assert list(found) == ["both models"]  # the widths differ
    items = {"query-old": arrays["old"], "query-new": given["new"], "query-labels": arrays["labels"]}
    whole = arrays | items | {"new": given["new"]}
    check(found["both models"], curve(whole, order=order.astype(np.int64), exclude=np.arange(60)))
    assert "order order.npy" in " ".join(result.output.split())


def with_nan(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"old": lambda x: x[:-1]}, (), "`--new` must have one entry per row of `--old`: got 60 and 59"),
        (
            {"labels": lambda x: x[:-1]},
            (),
            "`--labels` must have one entry per row of `--old`: got 59 and 60",
        ),
        ({"query-new": lambda x: x[1:]}, (), "`--query-new` must have one entry per row of `--query-old`"),
        (
            {"query-new": lambda x: x[:, 1:]},
            (),
            "`--new` must have as many columns as `--query-new`: got 7 and 6",
        ),
        ({"new": with_nan}, (), "`--new` must be finite: row 3 holds NaN or inf"),
        ({"query-old": with_nan}, (), "`--query-old` must be finite: row 3 holds NaN or inf"),
        ({"old": lambda x: x[0]}, (), "`--old` must have the shape [rows, columns]: `"),
        ({"old": lambda x: x.astype(int)}, (), "`--old` must hold floating point numbers: `"),
        ({"labels": lambda x: x.reshape(6, 10)}, (), "`--labels` must have the shape [rows]: `"),
        ({"labels": lambda x: x.astype("u8") + 2**63}, (), "`--labels` must be below 2^63: `"),
        ({"labels": lambda x: x + 0.5}, (), "`--labels` must hold whole numbers: `"),
        (
            {"query-labels": lambda x: x.astype(str)},
            (),
            "`--labels` must hold strings as `--query-labels` does",
        ),
        (
            {"labels": lambda x: x.astype(object)},
            (),
            "holds Python objects; where it was made, stack the rows",
        ),
        ({"query-labels": lambda x: x + 100}, (), "`--labels` must make some item relevant"),
        (
            {"query-labels": lambda x: x[:0], "query-old": lambda x: x[:0], "query-new": lambda x: x[:0]},
            (),
            "some",
        ),
        ({}, ("--metric", "dot"), '`--metric` must be one of "cosine", "ip", "l2": got \'dot\''),
        ({}, ("--order", "none.npy"), "`--order`: cannot read `none.npy` (No such file or directory)"),
        ({}, ("--order", "LABELS"), "`--order` must be a permutation of the gallery ids 0 .. 59"),
        ({}, ("--out", "report.pdf"), "`--out` must end in .html: got `report.pdf`"),
    ],
)
def test_refuses(
    changed: dict[str, Any], more: tuple[str, ...], message: str, arrays: Arrays, tmp_path: Path
) -> None:
    arrays |= {name: change(arrays[name]) for name, change in changed.items()}
    labels = str(tmp_path / "labels.npy")
    result = call(tmp_path, arrays, *(labels if word == "LABELS" else word for word in more))
    assert result.exit_code == 2, result.output
    assert "error: " in result.output and message in result.output
    assert not (tmp_path / "r").exists()


def test_errors_of_leave_one_out_name_the_options_that_were_given(arrays: Arrays, tmp_path: Path) -> None:
    given = {"old": with_nan(arrays["old"]), "new": arrays["new"], "labels": arrays["labels"]}
    assert "`--old` must be finite: row 3" in call(tmp_path, given).output
    given |= {"old": arrays["old"], "labels": arrays["labels"][1:]}
    assert "`--labels` must have one entry per row of `--old`: got 59 and 60" in call(tmp_path, given).output


def test_some_of_the_queries_files(arrays: Arrays, tmp_path: Path) -> None:
    del arrays["query-new"]
    message = "`--query-new` must be given with `--query-old`: pass all three or none"
    assert message in call(tmp_path, arrays).output
