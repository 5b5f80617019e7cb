"""`fastcompat align`: what it writes is what the library fits, and it refuses bad files before any work."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transform_cases import spaces
from typer.testing import CliRunner

import fastcompat as fc
from fastcompat.commands.app import app

METHODS = ("mcl", "rqt", "fct", "fastfill", "procrustes")
Arrays = dict[str, Any]


@pytest.fixture
def arrays() -> Arrays:
    seen, _ = spaces()
    return {name: seen[name][:400].numpy() for name in ("old", "new", "labels")}


def call(folder: Path, arrays: Arrays, *more: str):
    for name, value in arrays.items():
        np.save(folder / f"{name}.npy", value)
    options = [word for name in arrays for word in (f"--{name}", str(folder / f"{name}.npy"))]
    return CliRunner().invoke(app, ["align", *options, "--out", str(folder / "to" / "adapter"), *more])


def split(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[count // 5 :], order[: count // 5]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_what_the_library_fits(method: str, arrays: Arrays, tmp_path: Path):
    result = call(tmp_path, arrays, "--method", method, "--seed", "5")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "to" / "adapter"
    assert sorted(path.name for path in folder.iterdir()) == ["figures.json", "transform.pt"]

    old, new, labels = (torch.from_numpy(arrays[name]) for name in ("old", "new", "labels"))
    seen, held_out = split(400, 5)
    given, quiet = (old[seen], new[seen], labels[seen]), {"seed": 5, "progress": False}
    kind, expected = {
        "mcl": lambda: (fc.ReverseQueryTransform, fc.ReverseQueryTransform(24, 16).fit(*given, **quiet)),
        "rqt": lambda: (fc.ReverseQueryTransform, fc.ReverseQueryTransform(24, 16).fit(*given[:2], **quiet)),
        "fct": lambda: (
            fc.ForwardTransform,
            fc.ForwardTransform(16, 24, hidden=16 * 24).fit(*given, **quiet),
        ),
        "fastfill": lambda: (
            fc.ForwardTransform,
            fc.ForwardTransform(16, 24, hidden=16 * 24, log_variance=True).fit(*given, **quiet),
        ),
        "procrustes": lambda: (
            fc.Procrustes,
            fc.Procrustes().fit(F.normalize(new[seen]), F.normalize(old[seen])),
        ),
    }[method]()
    ours = kind.load(folder / "transform.pt").state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in expected.state_dict().items())

    o, n, y = old[held_out], new[held_out], labels[held_out]
    itself = torch.arange(len(y))
    mapped = expected.transform(o if method in ("fct", "fastfill") else n)
    if method == "fastfill":
        mapped, log_var = mapped
    sides = (n, mapped) if method in ("fct", "fastfill") else (mapped, o)
    named = {"ks": (1,), "baseline": (o, o), "exclude": itself, "seed": 5}
    figures = json.loads((folder / "figures.json").read_text())
    curves = {f"new and {method}": fc.backfill_curve(*sides, n, n, y, y, **named)}
    if method == "fastfill":
        order = log_var.argsort(descending=True, stable=True)
        curves["the same, in fastfill's order"] = fc.backfill_curve(*sides, n, n, y, y, order=order, **named)
    curves["both models"] = fc.backfill_curve(o, o, n, n, y, y, **named)
    assert set(figures["curves"]) == set(curves)  # the widths differ: no "new alone"
    for way, curve in curves.items():
        np.testing.assert_allclose(figures["curves"][way]["map"], curve.map, rtol=1e-6)
        (row,) = (line for line in result.output.splitlines() if line.startswith(way + "  "))
        shown = [f"{curve.map[0]:.3f}", f"{curve.cmc[1][0]:.3f}", f"{curve.auc():.3f}"]
        assert row.removeprefix(way).split() == [*shown, f"{float(curve.negative_flips.max()):.1%}"]
    assert "fitted to 320 items, judged on 80 others" in " ".join(result.output.split())
    (line,) = (line for line in result.output.splitlines() if "load(" in line)
    vectors = old if method in ("fct", "fastfill") else new
    out = eval(line.strip(), {"fastcompat": fc, "vectors": vectors[held_out]})  # copied as it stands
    assert torch.equal(out[0] if isinstance(out, tuple) else out, mapped)


def test_equal_widths_are_also_judged_without_a_transform(arrays: Arrays, tmp_path: Path):
    arrays["new"] = arrays["new"][:, :16].astype(np.float16)
    arrays["labels"] = arrays["labels"].astype("u2")
    result = call(tmp_path, arrays, "--method", "procrustes")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "to" / "adapter" / "figures.json").read_text())
    old, new, labels = (torch.from_numpy(arrays[name].astype("f4")) for name in ("old", "new", "labels"))
    _, held_out = split(400, 0)
    o, n, y = old[held_out], new[held_out], labels[held_out].long()
    curve = fc.backfill_curve(n, o, n, n, y, y, ks=(1,), exclude=torch.arange(80))
    np.testing.assert_allclose(figures["curves"]["new alone"]["map"], curve.map, rtol=1e-12)


def spoiled(x: np.ndarray) -> np.ndarray:
    x = x.copy()
    x[-1, 1] = np.inf
    return x


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({}, ("--method", "bct"), '`--method` must be one of "mcl", "rqt", "fct", "fastfill", "procrustes"'),
        ({"old": lambda x: x[:-1]}, (), "`--new` must have one entry per row of `--old`: got 400 and 399"),
        (
            {"labels": lambda x: x[:-1]},
            (),
            "`--labels` must have one entry per row of `--old`: got 399 and 400",
        ),
        ({"labels": lambda x: x.reshape(20, 20)}, (), "`--labels` must have the shape [rows]"),
        ({"labels": lambda x: x / 2}, (), "`--labels` must hold whole numbers"),
        ({"old": lambda x: x[0]}, (), "`--old` must have the shape [rows, columns]"),
        ({"new": lambda x: x.astype(int)}, (), "`--new` must hold floating point numbers"),
        ({"old": spoiled}, (), "`--old` must be finite: row 399 holds NaN or inf"),
        (
            {"labels": lambda x: np.arange(400)},
            (),
            "`--labels` must make some item relevant: no two of the 80",
        ),
        ({"labels": lambda x: x - 99}, (), "`--labels` must make some item relevant"),
        (dict.fromkeys(("old", "new", "labels"), lambda x: x[:9]), (), "`--old` must have at least 10 rows"),
    ],
)
def test_bad_files_are_refused(changed, more, message: str, arrays: Arrays, tmp_path: Path):
    arrays |= {name: change(arrays[name]) for name, change in changed.items()}
    result = call(tmp_path, arrays, *more)
    assert result.exit_code == 2
    assert result.output.startswith(f"error: {message}")
    assert not (tmp_path / "to").exists()


def test_files_that_are_none(arrays: Arrays, tmp_path: Path):
    call(tmp_path, arrays, "--method", "none")
    options = [word for name in arrays for word in (f"--{name}", str(tmp_path / f"{name}.npy"))]
    np.save(tmp_path / "old.npy", np.array([{}]), allow_pickle=True)
    result = CliRunner().invoke(app, ["align", *options, "--out", str(tmp_path / "to")])
    assert (result.exit_code, result.output[:14]) == (2, "error: `--old`")
    (tmp_path / "old.npy").unlink()
    result = CliRunner().invoke(app, ["align", *options, "--out", str(tmp_path / "to")])
    assert result.exit_code == 2 and "No such file" in result.output
    (tmp_path / "to").write_text("a file")
    result = CliRunner().invoke(app, ["align", *options, "--out", str(tmp_path / "to")])
    assert result.exit_code == 2 and "`--out`: cannot write to the folder" in result.output


def test_a_disk_that_is_full_in_the_end(arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = call(tmp_path, arrays, "--method", "procrustes")
    assert result.exit_code == 2
    assert "error: `--out`: cannot write to the folder" in result.output
    assert "(No space left on device); name another one" in result.output
    assert not (tmp_path / "to").exists()


def test_needs_no_extra(arrays: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for extra in ("sklearn", "matplotlib", "jinja2", "PIL", "onnx", "onnxscript"):
        monkeypatch.setitem(__import__("sys").modules, extra, None)
    assert call(tmp_path, arrays, "--method", "procrustes").exit_code == 0
