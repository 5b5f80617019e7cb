"""Whatever call of the system fails: the old state or the new one, the reason said, the next try works."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults import ERRORS, Faults
from torch import Tensor

import fastcompat as fc
from fastcompat import _files
from fastcompat.commands.output import OutputFolder

N = 12
OLD, NEW, QUERY_OLD, QUERY_NEW = torch.randn(N, 6), torch.randn(N, 9), torch.randn(3, 6), torch.randn(3, 9)
IDS = torch.arange(N) + 100


def every_fault(
    work: Callable[[], None], *, lasting: bool = False
) -> Iterator[tuple[Faults, Exception | None]]:
    """Call `work` with its first call of the system failing, its second, ... until it needs no more calls."""
    for at in itertools.count():
        number = ERRORS[at % len(ERRORS)]
        raised: Exception | None = None
        with Faults(at, number, lasting=lasting) as faults:
            try:
                work()
            except Exception as error:
                raised = error
        if faults.failed is None:
            assert at > 3 and raised is None
            return
        if raised is not None:
            assert os.strerror(number) in str(raised), (faults.failed, raised)
        yield faults, raised


def state(gallery: fc.MixedGallery) -> tuple[float, Tensor]:
    return gallery.fraction, gallery.search(QUERY_OLD, QUERY_NEW, 5)[1]


def same(a: tuple[float, Tensor], b: tuple[float, Tensor]) -> bool:
    return a[0] == b[0] and torch.equal(a[1], b[1])


def started() -> fc.MixedGallery:
    gallery = fc.MixedGallery(OLD, ids=IDS)
    gallery.update(IDS[:3], NEW[:3])
    return gallery


@pytest.mark.parametrize("lasting", (False, True))
@pytest.mark.parametrize("loaded", (False, True))
def test_a_failed_save_of_a_gallery(loaded: bool, lasting: bool, tmp_path: Path) -> None:
    folder, turns = tmp_path / "gallery", itertools.count(3)
    gallery = started()
    gallery.save(folder)
    if loaded:
        gallery = fc.MixedGallery.load(folder)
    kept = state(gallery)
    outcomes = set()
    for faults, raised in every_fault(lambda: gallery.save(folder), lasting=lasting):
        assert raised is None or type(raised) is ValueError
        there = fc.MixedGallery.load(folder, verify=True)
        assert same(state(there), kept) or same(state(there), state(gallery)), faults.failed
        outcomes.add((raised is None, same(state(there), state(gallery))))
        if raised is None:
            assert same(state(there), state(gallery)), faults.failed
        row = next(turns) % N
        gallery.update(IDS[row : row + 1], NEW[row : row + 1] + faults.at)
        gallery.save(folder)  # the next save works, and tidies up
        kept = state(gallery)
        assert same(state(fc.MixedGallery.load(folder, verify=True)), kept)
        assert len(os.listdir(folder)) == 5
        row = next(turns) % N
        gallery.update(IDS[row : row + 1], NEW[row : row + 1] - faults.at)
    assert outcomes >= {(False, False), (False, True)}  # stopped before and after the step that counts


def test_a_failed_first_save_leaves_nothing_but_perhaps_the_folder(tmp_path: Path) -> None:
    gallery, names = started(), itertools.count()
    folder = tmp_path / "0" / "gallery"

    def save() -> None:
        nonlocal folder
        folder = tmp_path / str(next(names)) / "gallery"
        gallery.save(folder)

    for faults, _ in every_fault(save):
        if (folder / "manifest.json").exists():
            assert same(state(fc.MixedGallery.load(folder, verify=True)), state(gallery))
        else:
            left = list(folder.rglob("*.npy"))
            assert len(left) <= (faults.failed in ("unlink", "listdir")), (faults.failed, left)
        gallery.save(folder)
        assert same(state(fc.MixedGallery.load(folder, verify=True)), state(gallery))


def test_a_failed_load_of_a_gallery(tmp_path: Path) -> None:
    started().save(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    found: list[fc.MixedGallery] = []
    for _, raised in every_fault(lambda: found.append(fc.MixedGallery.load(tmp_path, verify=True))):
        if raised is not None:
            assert type(raised) is ValueError and str(tmp_path) in str(raised)
    assert all(same(state(gallery), state(started())) for gallery in found)
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}


def transform(seed: int) -> fc.Procrustes:
    torch.manual_seed(seed)
    return fc.Procrustes().fit(torch.randn(9, 4), torch.randn(9, 5))


def test_a_failed_save_of_a_transform(tmp_path: Path) -> None:
    file = tmp_path / "turn.pt"
    transform(0).save(file)
    for faults, raised in every_fault(lambda: transform(1).save(file)):
        assert raised is None or (isinstance(raised, OSError) and str(raised).endswith(f": '{file}'"))
        rotation = fc.Procrustes.load(file).rotation
        new = torch.equal(rotation, transform(1).rotation)
        assert new or (raised is not None and torch.equal(rotation, transform(0).rotation)), faults.failed
        assert len(os.listdir(tmp_path)) == 1
        transform(0).save(file)
    transform(0).save(file)
    for _, raised in every_fault(lambda: fc.Procrustes.load(file)):
        assert isinstance(raised, OSError)
    assert torch.equal(fc.Procrustes.load(file).rotation, transform(0).rotation)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: '.*missing/turn\.pt'$"):
        transform(0).save(tmp_path / "missing" / "turn.pt")


def test_a_failed_output_of_a_command(tmp_path: Path) -> None:
    folder = tmp_path / "made" / "report"

    def run() -> None:
        with OutputFolder(folder) as out:
            out.write({"a": b"new a", "b": b"new b"})

    for faults, raised in every_fault(run):
        assert raised is None or type(raised) is ValueError
        if raised is not None:
            assert str(raised).startswith("`--out`: cannot write to the folder"), faults.failed
        there = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}
        assert all(there[name] in (f"new {name}".encode(), f"old {name}".encode()) for name in there)
        folder.mkdir(parents=True, exist_ok=True)
        for name in "ab":
            (folder / name).write_text(f"old {name}")


def test_a_failed_picture_of_a_curve(tmp_path: Path) -> None:
    x, y = torch.randn(20, 4), torch.arange(20) % 4
    curve = fc.backfill_curve(x, x, x, x, y, y, ks=(1,), states=3)
    file = tmp_path / "curve.png"
    curve.plot(file)
    whole = file.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(OSError, match="No space left"):
            curve.plot(file)
    assert file.read_bytes() == whole and os.listdir(tmp_path) == ["curve.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount")
def test_a_full_disk(tmp_path: Path) -> None:
    """A real one: NumPy's own writer says how many elements were missing, and not why."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        gallery = fc.MixedGallery(torch.randn(1000, 32))  # 128 kB
        gallery.save(tmp_path / "gallery")
        big = fc.ReverseQueryTransform(100, 100, hidden=1000)
        big.fitted = True
        gallery.update(torch.arange(1000), torch.randn(1000, 80))  # 320 kB: too much
        with pytest.raises(ValueError, match=r"cannot write to the folder .*\(No space left on device\)"):
            gallery.save(tmp_path / "gallery")
        assert fc.MixedGallery.load(tmp_path / "gallery", verify=True).fraction == 0
        assert len(os.listdir(tmp_path / "gallery")) == 2
        (tmp_path / "it.pt").write_bytes(b"before")
        with pytest.raises(OSError, match="No space left on device"):
            big.save(tmp_path / "it.pt")
        with (
            OutputFolder(tmp_path) as out,
            pytest.raises(ValueError, match=r"`--out`: .*\(No space left on device\)"),
        ):
            out.write({"it.pt": bytes(500_000)})
        assert (tmp_path / "it.pt").read_bytes() == b"before"
        assert sorted(os.listdir(tmp_path)) == ["gallery", "it.pt"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


def test_an_error_without_a_number_still_has_a_reason() -> None:
    assert _files.reason(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert _files.reason(OSError("7 requested and 0 written")) == "7 requested and 0 written"
    assert _files.reason(OSError()) == "OSError"
