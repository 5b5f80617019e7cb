"""Whatever is wrong in a file: a ValueError that names it, or what was saved, bit by bit. Nothing else."""

from __future__ import annotations

import io
import json
import os
import random
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompat as fc

N = 20
OLD, NEW, IDS = torch.randn(N, 3), torch.randn(N, 4), torch.randperm(N) * 7 + 3
SOME = torch.arange(0, N, 3)


def damaged(whole: bytes, count: int) -> Iterator[bytes]:
    """Contents that differ from `whole`: bits flipped, bytes replaced, cut, doubled, put in, and cut off."""
    rng = random.Random(len(whole))
    for turn in range(count):
        at, length = rng.randrange(len(whole)), rng.choice((1, 1, 2, 4, 16, 200))
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        noise = rng.choice((rng.randbytes(length), bytes(length), b"\xff" * length, b"9" * length))
        yield (
            whole[:at] + flipped + whole[at + 1 :],
            whole[:at] + noise + whole[at + length :],
            whole[:at],
            whole[:at] + noise + whole[at:],
            whole[:at] + whole[at + length :],
            whole + noise,
        )[turn % 6 if turn >= 6 else turn]
    yield b""


def parts(gallery: fc.MixedGallery) -> tuple[Any, ...]:
    """All that a gallery is, as bytes."""
    state, ids = gallery._state, gallery._ids
    assert state.new is not None and ids is not None
    arrays = [gallery._old, state.new, state.backfilled, ids.of_row]
    held = [
        (str(x.dtype), tuple(x.shape), x.contiguous().view(torch.uint8).numpy().tobytes()) for x in arrays
    ]
    return (*held, gallery._metric, gallery._scale, gallery._offset)


def without_vectors(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*(x[:2] for x in found[:2]), *found[2:])


def saved(folder: Path, dtype: torch.dtype = torch.float32) -> fc.MixedGallery:
    gallery = fc.MixedGallery(
        OLD.to(dtype), ids=IDS, metric="l2", scale=(0.123456789, 1e-7), offset=(0.0, -1 / 3)
    )
    gallery.update(IDS[SOME], NEW[SOME].to(dtype))
    gallery.save(folder)
    return gallery


def as_first_written(folder: Path) -> None:
    """Make a folder look like one of the first version, without checksums."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["crc32"]
    for entry in manifest["arrays"].values():
        del entry["dtype"], entry["shape"], entry["crc32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_damaged_gallery(dtype: torch.dtype, tmp_path: Path) -> None:
    expected, counts = parts(saved(tmp_path, dtype)), {True: 0, False: 0}
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for content in damaged(whole, 400 if file.suffix == ".json" else 90):
            file.write_bytes(content)
            for verify in (True, False):
                try:
                    found = parts(fc.MixedGallery.load(tmp_path, verify=verify))
                except ValueError as error:
                    assert file.name in str(error), error
                    counts[True] += 1
                else:  # what only mapped vectors can hide is found by `verify`
                    if not verify:
                        found, wanted = without_vectors(found), without_vectors(expected)
                    assert found == (expected if verify else wanted), (file.name, content)
                    counts[False] += 1
        file.write_bytes(whole)
    assert parts(fc.MixedGallery.load(tmp_path, verify=True)) == expected
    assert min(counts.values()) > 20


def test_a_damaged_gallery_without_checksums(tmp_path: Path) -> None:
    """Less is noticed, but nothing crashes."""
    expected = parts(saved(tmp_path))
    as_first_written(tmp_path)
    assert parts(fc.MixedGallery.load(tmp_path)) == expected
    with pytest.raises(ValueError, match=r"manifest\.json` keeps no checksums, .*load it without `verify`"):
        fc.MixedGallery.load(tmp_path, verify=True)
    refused = 0
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for content in damaged(whole, 120):
            file.write_bytes(content)
            try:
                parts(fc.MixedGallery.load(tmp_path))
            except ValueError as error:
                assert str(tmp_path) in str(error), error
                refused += 1
            except AssertionError:  # an array left out altogether
                refused += 1
        file.write_bytes(whole)
    assert refused > 200
    again = fc.MixedGallery.load(tmp_path)
    again.save(tmp_path)  # from now on with checksums, for the old vectors too
    assert parts(fc.MixedGallery.load(tmp_path, verify=True)) == expected


def test_a_flipped_bit_in_the_vectors_is_found_by_verify(tmp_path: Path) -> None:
    saved(tmp_path)
    for name in ("old", "new"):
        file = next(tmp_path.glob(f"{name}-*"))
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        fc.MixedGallery.load(tmp_path)
        with pytest.raises(ValueError, match=rf"`{re.escape(str(file))}` is missing or damaged \(its"):
            fc.MixedGallery.load(tmp_path, verify=True)
        file.write_bytes(whole)
    for shape in ((0, 3), (0, 0), (5, 0)):
        fc.MixedGallery(torch.zeros(shape)).save(tmp_path / str(shape))
        assert fc.MixedGallery.load(tmp_path / str(shape), verify=True)._old.shape == shape


@pytest.mark.parametrize("checksums", (True, False))
def test_a_manifest_names_files_of_its_own_folder_alone(checksums: bool, tmp_path: Path) -> None:
    folder = tmp_path / "gallery"
    saved(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    entry, inside = manifest["arrays"]["old"], manifest["arrays"]["old"]["file"]
    outside = tmp_path / "outside.fastcompat.npy"
    outside.write_bytes((folder / inside).read_bytes())
    (folder / "sub").mkdir()
    (folder / "sub" / inside).write_bytes(outside.read_bytes())
    links = {"out": outside, "zero": "/dev/zero", "loop": "loop", "sub-link": folder / "sub" / inside}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "fifo")
    (folder / "in").symlink_to(inside)
    if not checksums:
        as_first_written(folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        entry = manifest["arrays"]["old"]

    def name_it(file: str) -> None:
        entry["file"] = file
        plain = {key: value for key, value in manifest.items() if key != "crc32"}
        if checksums:
            manifest["crc32"] = zlib.crc32(json.dumps(plain, sort_keys=True).encode())
        (folder / "manifest.json").write_text(json.dumps(manifest))

    bad = [str(outside), f"../{outside.name}", f"sub/{inside}", f"./{inside}", "", ".", "..", "a\0b", "fifo"]
    for file in (*bad, *links, "sub", "manifest.json", "x" * 300):
        name_it(file)
        with pytest.raises(ValueError, match=r"manifest\.json|the file `"):
            fc.MixedGallery.load(folder)
    name_it("in")
    assert torch.equal(fc.MixedGallery.load(folder, verify=checksums)._old, OLD)


def test_what_takes_the_place_of_the_manifest(tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "manifest.json"
    for content in (
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 10_000,
        b"null",
        b'"a"',
        b"\xff\xfe",
        b"\0" * 99,
    ):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json` is damaged"):
            fc.MixedGallery.load(tmp_path)
    for target in ("/dev/zero", "fifo"):
        manifest.unlink()
        manifest.symlink_to(target)
        if target == "fifo":
            os.mkfifo(tmp_path / target)
        with pytest.raises(ValueError, match=r"manifest\.json` is not a regular file"):
            fc.MixedGallery.load(tmp_path)


def weights(transform: fc.Procrustes | fc.ForwardTransform) -> dict[str, Any]:
    def plain(value: Tensor) -> tuple[Any, ...]:
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()

    return transform.options | {name: plain(value) for name, value in transform.state_dict().items()}


def some_transforms() -> Iterator[Any]:
    yield fc.Procrustes().fit(torch.randn(30, 5), torch.randn(30, 6))
    forward = fc.ForwardTransform(3, 4, 2, hidden=5, log_variance=True).to(torch.bfloat16)
    forward.fitted = True
    yield forward


@pytest.mark.parametrize("number", (0, 1))
def test_a_damaged_transform(number: int, tmp_path: Path) -> None:
    transform, file = list(some_transforms())[number], tmp_path / "it.pt"
    transform.save(file)
    whole, kept = file.read_bytes(), 0
    expected = weights(type(transform).load(file))
    for content in damaged(whole, 300):
        file.write_bytes(content)
        try:
            found = weights(type(transform).load(file))
        except ValueError as error:
            assert str(file) in str(error)
        else:
            assert found == expected
            kept += 1
    assert 0 < kept < 200  # padding says nothing
    saved = torch.load(io.BytesIO(whole), weights_only=True)
    assert set(saved) == {"kind", "options", "state", "sha256"}
    del saved["sha256"]
    torch.save(saved, file)  # as it was first written
    assert weights(type(transform).load(file)) == expected
    first = file.read_bytes()
    for content in damaged(first, 100):
        file.write_bytes(content)
        try:
            type(transform).load(file)
        except ValueError as error:
            assert str(file) in str(error)
    wrong = ({"options": {}}, {"options": None}, {"state": {}}, {"state": [1]}, {"kind": 3}, {"x": 1})
    for part in wrong:
        torch.save(saved | part, file)
        with pytest.raises(ValueError, match="`path` must .*" + re.escape(str(file))):
            type(transform).load(file)


def test_the_file_of_a_transform_is_a_regular_one(tmp_path: Path) -> None:
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    for name in ("zero", "fifo"):
        with pytest.raises(ValueError, match=f"{name}` is not a regular file"):
            fc.Procrustes.load(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        fc.Procrustes.load(tmp_path)
    turn = next(some_transforms())
    (tmp_path / "link.pt").symlink_to(tmp_path / "it.pt")
    turn.save(tmp_path / "link.pt")  # a link is followed, not replaced
    assert (tmp_path / "link.pt").is_symlink() and weights(fc.Procrustes.load(tmp_path / "it.pt"))
    with (tmp_path / "open.pt").open("wb") as file:
        turn.save(file)
    with (tmp_path / "open.pt").open("rb") as file:
        assert weights(fc.Procrustes.load(file)) == weights(turn)


def test_sizes_given_as_numpy_numbers_come_back(tmp_path: Path) -> None:
    size = np.int64(3)
    for transform in (
        fc.ForwardTransform(size, size, size, hidden=size),
        fc.ReverseQueryTransform(size, size, blocks=size, hidden=size),
        fc.ResidualHead(size, hidden=size),
    ):
        transform.fitted = True
        transform.save(tmp_path / "it.pt")
        assert weights(type(transform).load(tmp_path / "it.pt")) == weights(transform)
