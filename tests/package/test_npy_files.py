"""Files that a user names: what is none is told apart before any work, and the advice makes one of it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from typer.testing import CliRunner

from fastcompat._arrays import NpyFile
from fastcompat.commands import evaluation
from fastcompat.commands.app import app
from fastcompat.commands.npy_files import read_npy

X = np.arange(12, dtype="f4").reshape(4, 3) / 4


def parquet(path: Path) -> None:
    pandas.DataFrame({"COLUMN": list(X)}).to_parquet(path)


def feather(path: Path) -> None:
    pandas.DataFrame({"COLUMN": list(X)}).to_feather(path)


def matlab(path: Path) -> None:
    import scipy.io

    with path.open("wb") as file:
        scipy.io.savemat(file, {"VARIABLE": X})


def faiss_index(path: Path) -> None:
    import faiss

    index = faiss.IndexFlatIP(3)
    index.add(X)
    faiss.write_index(index, str(path))


def npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, it_s=X, other=X[0])


def text(mark: str, header: str = "") -> Callable[[Path], None]:
    return lambda path: np.savetxt(path, X, delimiter=mark, header=header, comments="")


def table(path: Path) -> None:
    path.write_text(json.dumps(X.tolist()))


CONVERTED: dict[str, tuple[str, Callable[[Path], None]]] = {
    "parquet": ("is a Parquet file", parquet),
    "feather": ("is an Arrow file", feather),
    "mat": ("is a MATLAB file", matlab),
    "index": ("is a faiss index", faiss_index),
    "npz": ("is an .npz archive of it_s, other", npz),
    "pt": ("is a file of torch.save", lambda path: torch.save(torch.tensor(X), path)),
    "csv": ("is text", text(",")),
    "names.csv": ("is text", text(";", "a;b;c")),
    "tsv": ("is text", text("\t")),
    "txt": ("is text", text(" ")),
    "json": ("is text, JSON perhaps", table),
    "raw": (
        "is of no kind known here; if it is raw numbers, convert",
        lambda path: path.write_bytes((X - 1).tobytes()),
    ),
    "npy": ("is text", text(",")),  # the name alone makes no file
}


@pytest.mark.parametrize("ending", CONVERTED)
def test_advice_followed_to_the_letter_makes_a_file(ending: str, tmp_path: Path) -> None:
    told, write = CONVERTED[ending]
    path = tmp_path / f"my vectors.{ending}"
    write(path)
    with pytest.raises(ValueError, match=f"`--new` must be a .npy file of numbers: `{path}` {told}") as e:
        read_npy("--new", path, vectors=True)
    assert "pickle" not in str(e.value)
    code = re.findall("`(.*?)`", str(e.value))[-1].replace("COLUMNS", "3")
    import scipy.io

    names: dict[str, Any] = {"numpy": np, "torch": torch, "pandas": pandas, "scipy": scipy, "json": json}
    if "faiss" in code:
        names["faiss"] = pytest.importorskip("faiss")
    exec(code, names)
    expected = X - 1 if ending == "raw" else X
    np.testing.assert_array_equal(read_npy("--new", path.with_suffix(".npy"), vectors=True).array, expected)


def test_labels_in_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("cat\ndog\ncat\n")
    with pytest.raises(ValueError, match="is text; convert it with") as caught:
        read_npy("--labels", path, vectors=False)
    exec(re.findall("`(.*?)`", str(caught.value))[-1], {"numpy": np})
    found = read_npy("--labels", path.with_suffix(".npy"), vectors=False)
    assert found.array.tolist() == ["cat", "dog", "cat"]


SAFETENSORS = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
HEADER = b"\x93NUMPY\x01\x00v\x00"


def objects(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{}, 1]), allow_pickle=True)


def cut(path: Path) -> None:
    np.save(path, X)
    path.write_bytes(path.read_bytes()[:-5])


def huge(path: Path) -> None:
    """A header that speaks of more than there is in the world."""
    np.save(path, X)
    path.write_bytes(
        path.read_bytes().replace(b"(4, 3)", b"(4000000000000, 3)").replace(b"        \n", b"\n")
    )


TOLD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "gzip": (
        lambda p: p.write_bytes(gzip.compress(X.tobytes())),
        "is compressed by gzip; unpack it with `gzip -d`",
    ),
    "pickle": (lambda p: p.write_bytes(pickle.dumps(X)), "is a pickle, which may run any code"),
    "HDF5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
    "safetensors": (
        lambda p: p.write_bytes(struct.pack("<Q", len(SAFETENSORS)) + SAFETENSORS + bytes(4)),
        "is a safetensors file",
    ),
    "Git LFS": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a pointer of Git LFS",
    ),
    "zip": (lambda p: p.write_bytes(b"PK\x03\x04 and no more"), "is a damaged zip archive"),
    "header": (lambda p: p.write_bytes(HEADER), "has a damaged header"),
    "header of noise": (lambda p: p.write_bytes(HEADER + bytes(range(256))), "has a damaged header"),
    "version": (lambda p: p.write_bytes(b"\x93NUMPY\x09\x00v\x00"), "has a damaged header"),
    "long header": (
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00\xff\xff" + b" " * 65535),
        "has a damaged header",
    ),
    "objects": (objects, "holds Python objects; where it was made, stack the rows"),
    "cut off": (cut, r"is cut off: [4, 3] of float32 take 176 bytes, and there are 171"),
    "folder": (lambda p: p.mkdir(), "is a folder"),
    "pipe": (lambda p: os.mkfifo(p), "is a pipe or a device"),
    "endless": (lambda p: p.symlink_to("/dev/zero"), "is a pipe or a device"),
    "nothing": (lambda p: None, "(No such file or directory)"),
    "circle": (lambda p: p.symlink_to(p), "(Too many levels of symbolic links)"),
}


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_not_an_array_is_described(kind: str, tmp_path: Path) -> None:
    make, told = TOLD[kind]
    path = tmp_path / "old.npy"
    make(path)
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        read_npy("--old", path, vectors=True)
    assert str(caught.value).startswith("`--old`") and f"`{path}`" in str(caught.value)
    assert "allow_pickle" not in str(caught.value) and "max_header_size" not in str(caught.value)


def test_a_header_larger_than_the_file(tmp_path: Path) -> None:
    huge(tmp_path / "old.npy")
    with pytest.raises(ValueError, match=r"(is cut off|has a damaged header)"):
        read_npy("--old", tmp_path / "old.npy", vectors=True)


def upgrade(folder: Path, **arrays: np.ndarray) -> evaluation.Upgrade:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    paths = [folder / f"{name}.npy" for name in ("old", "new", "labels")]
    queries = [
        folder / f"{name}.npy" if name in arrays else None
        for name in ("query_old", "query_new", "query_labels")
    ]
    return evaluation.load(*paths, *queries)


def test_float16_stays_in_its_file(tmp_path: Path) -> None:
    half = np.random.default_rng(0).standard_normal((300_000, 32)).astype("f2")
    labels = np.arange(len(half))
    before = resident()
    found = upgrade(tmp_path, old=half, new=half, labels=labels)
    assert found.arrays["old"].dtype == found.arrays["new"].dtype == np.float16
    # Two galleries of 19 MB: as float32 they would take 77 MB.
    assert resident() - before < 30e6
    found = upgrade(tmp_path, old=half[:9], new=half[:9].astype("f4"), labels=labels[:9])
    assert found.arrays["old"].dtype == np.float32


def resident() -> int:
    """Private memory of this process in bytes."""
    fields = dict(
        line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    return int(fields["RssAnon"].split()[0]) * 1024


def test_names_of_classes(tmp_path: Path) -> None:
    words, numbers = np.array(["b", "a", "c", "a"]), np.array([1, 0, 2, 0])
    for labels, queries in (
        (words, words[:3]),
        (words[:, None], words[:3].astype("S")),
        (numbers.astype("f8"), numbers[:3, None]),
    ):
        sides = {"old": X, "new": X, "query_old": X[:3], "query_new": X[:3]}
        found = upgrade(tmp_path, **sides, labels=labels, query_labels=queries).arrays
        assert found["gallery_labels"].tolist() == [1, 0, 2, 0] and found["query_labels"].tolist() == [
            1,
            0,
            2,
        ]


def test_hashes_of_classes_are_warned_of_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat._checks._warned", set(), raising=False)  # of once in a process
    pytest.importorskip("matplotlib")
    hashes = np.array([-(2**40), 7, -3])[np.arange(12) % 3]
    for name, array in {"old": X.repeat(3, 0), "new": X.repeat(3, 0), "labels": hashes}.items():
        np.save(tmp_path / f"{name}.npy", array)
    options = [
        word for key in ("old", "new", "labels") for word in (f"--{key}", str(tmp_path / f"{key}.npy"))
    ]
    with pytest.warns(UserWarning, match="`--labels` holds negative labels other than -1") as caught:
        result = CliRunner().invoke(app, ["evaluate", *options, "--out", str(tmp_path / "report.html")])
    assert result.exit_code == 0 and len(caught) == 1


@pytest.mark.parametrize("name", (b"caf\xe9.npy", b"$x^2$ and $.npy", b"new\nline.npy", "数.npy".encode()))
def test_names_are_shown_and_stop_nothing(name: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    labels = np.arange(12) % 3
    x = np.random.default_rng(0).standard_normal((12, 3)).astype("f4")
    arrays = {"old": x, "new": x, "labels": labels}
    for key, array in arrays.items():
        np.save(tmp_path / f"{key}.npy", array)
    order = tmp_path / os.fsdecode(name)
    with open(order, "wb") as file:
        np.save(file, np.arange(12))
    out = tmp_path / os.fsdecode(name.replace(b".npy", b".html"))
    options = [word for key in arrays for word in (f"--{key}", str(tmp_path / f"{key}.npy"))]
    result = CliRunner().invoke(app, ["evaluate", *options, "--order", str(order), "--out", str(out)])
    assert result.exit_code == 0, result.output
    shown = name.decode(errors="backslashreplace").replace("\n", "\\n")
    page = out.read_text(encoding="utf-8")
    assert f"order {shown}" in page and shown in "".join(result.output.split("\n"))
    stem = out.name.removesuffix(".html")
    written = {path.name for path in tmp_path.iterdir()} - {order.name, "old.npy", "new.npy", "labels.npy"}
    assert written == {out.name, f"{stem}-figures.json", f"{stem}-curves.png"}
    assert f"order {shown}" in json.loads((tmp_path / f"{stem}-figures.json").read_text())["description"]


def test_a_file_is_what_the_array_is(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", X)
    found = read_npy("--old", tmp_path / "x.npy", vectors=True)
    assert isinstance(found, NpyFile) and isinstance(found.array, np.memmap)
