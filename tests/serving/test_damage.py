"""Damaged folders: what was committed, or a refusal that names the file; never something else."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model import queries, vectors

import fastcompat as fc
from fastcompat.serving import layout

N = 24


def everything(folder: Path) -> dict[str, Any]:
    """All that a gallery says, as plain values."""
    with fc.MixedGallery.open(folder) as gallery:
        asked = {m: q for m, q in queries().items() if m in gallery.models}
        scores, found = gallery.search(asked, 30)
        said: dict[str, Any] = {
            "models": gallery.models, "ids": gallery.ids.tolist(), "pending": gallery.pending().tolist(),
            "fraction": gallery.fraction, "scores": scores.tolist(), "found": found.tolist(),
        }  # fmt: skip
        for model in gallery.models:
            ids = [i for i in gallery.ids.tolist() if has(gallery, i, model)]
            said[model] = np.asarray(gallery.vectors(np.array(ids, gallery.ids.dtype), model)).tolist(), ids
        return said


def has(gallery: fc.MixedGallery, one: Any, model: str) -> bool:
    try:
        gallery.vectors(np.array([one], gallery.ids.dtype), model)
    except layout.DamagedError:
        raise
    except ValueError:
        return False
    return True


@pytest.fixture(scope="module", params=("int64", "str"))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base of two models and a journal of every kind of change."""
    path = tmp_path_factory.mktemp("store") / "gallery"
    ids = [10 * i for i in range(N)] if request.param == "int64" else [f"i{i}" for i in range(N)]

    def some(*places: int) -> Any:
        return [ids[p] for p in places]

    gallery = fc.MixedGallery.create(path, vectors("v1", range(N)), ids=ids, model="v1")
    gallery.begin("v2", metadata={"checkpoint": 3})
    gallery.update(some(1, 5, 7), vectors("v2", range(3)))
    gallery.compact()
    gallery.update(some(2, 5), vectors("v2", range(2), 1))
    gallery.commit()
    gallery.add([12345] if request.param == "int64" else ["new"], vectors("v1", [77]), "v1")
    gallery.remove(some(3))
    gallery.rollback(some(1), "v1")
    gallery.commit()
    gallery.begin("v3")
    gallery.replace(some(9), vectors("v3", range(1)))
    gallery.update(some(10, 11), vectors("v3", range(2)))
    gallery.commit()
    gallery.close()
    return path


def places(path: Path, rng: random.Random) -> list[int]:
    """Bytes to flip: those at both ends, and some of those that are not holes."""
    content = path.read_bytes()
    used = [i for i, byte in enumerate(content) if byte]
    ends = [*range(0, min(80, len(content)), 3), *range(max(0, len(content) - 16), len(content), 5)]
    return sorted({*ends, *rng.sample(used, min(40, len(used))), *rng.sample(range(len(content)), 5)})


def test_every_flipped_byte_is_refused_or_changes_nothing(folder: Path, tmp_path: Path) -> None:
    rng, good = random.Random(0), everything(folder)
    refused = reported = flips = 0
    for name in sorted(os.listdir(folder)):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        file = copy / name
        content = file.read_bytes()
        for at in places(file, rng):
            broken = bytearray(content)
            broken[at] ^= 1 << rng.randrange(8)
            file.write_bytes(broken)
            flips += 1
            try:
                assert everything(copy) == good, f"{name}: byte {at} gives something else without a word"
            except layout.DamagedError as error:
                assert str(copy) in str(error)
                refused += 1
                with pytest.raises(ValueError):
                    fc.MixedGallery.open(copy, verify=True)
            except ValueError as error:
                assert "`path` must" in str(error)
                refused += 1
            else:
                reported += bool(fc.MixedGallery.open(copy).verify())
            assert set(os.listdir(copy)) == set(os.listdir(folder))
        file.write_bytes(content)
        assert everything(copy) == good
        shutil.rmtree(copy)
    assert flips > 300 and refused > flips // 3 and reported


@pytest.mark.parametrize("cut", (0, 1, 40, 64, 100, -1, -9))
def test_a_truncated_file_is_refused_or_changes_nothing(cut: int, folder: Path, tmp_path: Path) -> None:
    good = everything(folder)
    for name in sorted(os.listdir(folder)):
        copy = tmp_path / name
        shutil.copytree(folder, copy)
        content = (copy / name).read_bytes()
        (copy / name).write_bytes(content[:cut])
        try:
            assert everything(copy) == good, name
        except ValueError as error:
            assert name in str(error) or name == layout.MANIFEST or name.startswith("base")
        (copy / name).write_bytes(content)
        assert everything(copy) == good


def test_swapped_and_missing_files_are_refused(folder: Path, tmp_path: Path) -> None:
    good, names = everything(folder), sorted(os.listdir(folder))
    for a in names:
        for b in (*[n for n in names if n > a], None):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            if b is None:
                (copy / a).unlink()
            else:
                (copy / a).rename(copy / "x")
                (copy / b).rename(copy / a)
                (copy / "x").rename(copy / b)
            before = set(os.listdir(copy))
            with pytest.raises((ValueError, FileNotFoundError)):
                assert everything(copy) == good, (a, b)
                raise ValueError("the same")  # vectors of the same bytes
            assert set(os.listdir(copy)) == before
            shutil.rmtree(copy)


def test_rows_of_another_place_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    file = next(copy.glob("vectors-1-0.fcg"))
    content = file.read_bytes()
    size = 4 * 6
    file.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    with fc.MixedGallery.open(copy) as gallery:
        asked = {m: q for m, q in queries().items() if m in gallery.models}
        with pytest.raises(ValueError, match=r"row 0, the vector of item .* in model `v1`"):
            gallery.search(asked, 3)
        assert len(gallery.verify()) == 2 or "row 0" in gallery.verify()[0]


def torn(journal: Path, content: bytes) -> None:
    with journal.open("ab") as file:
        file.write(content)


@pytest.mark.parametrize(
    "tail",
    (
        lambda whole: b"\0" * 3,
        lambda whole: whole[-200:-100],
        lambda whole: whole[64:264],
        lambda whole: b"FCGR" + bytes(200),
    ),
)
def test_a_torn_tail_is_left_by_readers_and_cut_by_writers(
    tail: Callable[[bytes], bytes], folder: Path, tmp_path: Path
) -> None:
    copy, good = tmp_path / "copy", everything(folder)
    shutil.copytree(folder, copy)
    journal = next(copy.glob("journal-*"))
    whole = journal.read_bytes()
    torn(journal, tail(whole))
    size = journal.stat().st_size
    assert everything(copy) == good and journal.stat().st_size == size
    with fc.MixedGallery.open(copy, writable=True) as writer:
        assert journal.stat().st_size == size
        some = writer.ids[:1]
        writer.update(some, vectors("v3", range(1), 5))
        writer.commit()
        assert writer.verify() == []
    assert journal.read_bytes().startswith(whole)


def test_a_whole_record_behind_the_head_counts(folder: Path, tmp_path: Path) -> None:
    """Its writer was killed between the record and the head."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    head = next(copy.glob("head-*"))
    before = head.read_bytes()
    with fc.MixedGallery.open(copy, writable=True) as writer:
        writer.update(writer.ids[:1], vectors("v3", range(1), 5))
        writer.commit()
    after = everything(copy)
    head.write_bytes(before)
    assert everything(copy) == after != everything(folder)


def test_a_damaged_journal_is_not_cut(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    journal = next(copy.glob("journal-*"))
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"the file `.*journal-1.fcg` is damaged \(record \d+ at byte \d+ of"
    ):
        fc.MixedGallery.open(copy, writable=True)
    assert journal.read_bytes() == content


def test_newer_formats_are_refused_and_left_alone(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = copy / layout.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"version": 3}))
    before = {f: (copy / f).read_bytes() for f in os.listdir(copy)}
    for call in (
        lambda: fc.MixedGallery.open(copy),
        lambda: fc.MixedGallery.open(copy, writable=True),
        lambda: fc.MixedGallery.load(copy),
        lambda: fc.MixedGallery.create(copy, vectors("v1", range(3))),
        lambda: fc.MixedGallery(vectors("v1", range(3))).save(copy),
    ):
        with pytest.raises(ValueError, match="`path` must hold"):
            call()
    assert before == {f: (copy / f).read_bytes() for f in os.listdir(copy)}


def test_a_manifest_names_files_of_its_own_folder(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    manifest = copy / layout.MANIFEST
    found = json.loads(manifest.read_text())
    found.pop("checksum")
    found["journal"] = "../gallery/journal-1.fcg"
    sealed = {**found, "checksum": layout.digest(json.dumps(found, sort_keys=True).encode()).hex()}
    manifest.write_text(json.dumps(sealed))
    with pytest.raises(ValueError, match="which is no file of this folder"):
        fc.MixedGallery.open(copy)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fc.MixedGallery.open(tmp_path / "none")
    with pytest.raises(ValueError, match="`path` must be a folder that `save` wrote"):
        fc.MixedGallery.load(tmp_path / "none")
