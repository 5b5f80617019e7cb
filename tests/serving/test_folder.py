"""One folder, several processes: what each of them sees, whose change counts, and what a full disk leaves."""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from model import Model, agrees, queries, vectors

import fastcompat as fc
from fastcompat._files import locked
from fastcompat.serving import journal, layout

N = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A folder with v1 of all items and v2 begun."""
    gallery = fc.MixedGallery.create(tmp_path / "gallery", vectors("v1", range(N)), model="v1")
    gallery.begin("v2")
    gallery.commit()
    gallery.close()
    return tmp_path / "gallery"


def model() -> Model:
    truth = Model(range(N))
    truth.models.append("v2")
    return truth


def opened(path: Path) -> fc.MixedGallery:
    return fc.MixedGallery.open(path, writable=True)


def update(gallery: fc.MixedGallery, truth: Model | None, ids: Any, turn: int = 0) -> None:
    values = vectors("v2", ids, turn)
    gallery.update(list(ids), values, model="v2")
    if truth is not None:
        truth.put(ids, values, "v2")


def test_a_change_counts_at_once_here_and_elsewhere_after_commit(path: Path) -> None:
    writer, other, reader = opened(path), opened(path), fc.MixedGallery.open(path)
    before, after = model(), model()
    update(writer, after, range(5))
    assert agrees(writer, after) and agrees(other, before) and agrees(reader, before)
    writer.commit()
    assert agrees(other, after) and agrees(reader, after)  # a search looks by itself
    assert reader.fraction == 5 / N


def test_writers_keep_one_anothers_work(path: Path) -> None:
    """Also while their own changes are not committed, and whatever they touch."""
    one, two, truth = opened(path), opened(path), model()
    update(one, None, range(5))
    update(two, None, range(3, 9), turn=1)
    one.add([100], vectors("v1", [100]), "v1")
    two.add([200, 201], vectors("v1", [200, 201]), "v1")
    two.remove([20])
    two.remove([201])
    two.commit()
    truth.put(range(3, 9), vectors("v2", range(3, 9), 1), "v2")
    truth.add([200], vectors("v1", [200]), "v1")
    truth.remove([20])
    assert agrees(fc.MixedGallery.open(path), truth)
    truth.put(range(5), vectors("v2", range(5)), "v2")
    truth.add([100], vectors("v1", [100]), "v1")
    assert agrees(one, truth)  # on top of what was committed
    one.commit()
    assert agrees(two, truth) and agrees(fc.MixedGallery.open(path), truth)
    assert one.verify() == []


def test_two_workers_of_disjoint_halves_lose_nothing(tmp_path: Path) -> None:
    """Each loads the gallery, and saves it after every batch; and the same with commits."""
    fc.MixedGallery(vectors("v1", range(N)), model="v1").save(tmp_path / "saved")
    halves = np.split(np.arange(N), 2)
    galleries = [fc.MixedGallery.load(tmp_path / "saved") for _ in halves]
    steps = [
        g.backfill(half, lambda ids: vectors("v2", ids), batch=4)
        for g, half in zip(galleries, halves, strict=True)
    ]
    for fractions in zip(*steps, strict=True):
        assert fractions
        for gallery in galleries:
            gallery.save(tmp_path / "saved")
    found = fc.MixedGallery.load(tmp_path / "saved")
    assert found.fraction == 1 and found.models == ["v1", "new"]
    assert np.array_equal(found.vectors(np.arange(N), "new"), vectors("v2", range(N)))


def test_what_was_removed_by_another_stays_removed(path: Path) -> None:
    one, two, truth = opened(path), opened(path), model()
    update(one, None, [1, 2, 3])
    one.rollback([4], "v1")
    two.remove([2, 4])
    two.commit()
    one.commit()
    truth.remove([2, 4])
    truth.put([1, 3], vectors("v2", [1, 3]), "v2")
    assert agrees(one, truth) and agrees(two, truth)


def test_of_two_vectors_for_an_item_the_later_commit_counts(path: Path) -> None:
    one, two, truth = opened(path), opened(path), model()
    update(one, None, [1], turn=1)
    update(two, truth, [1], turn=2)
    one.commit()
    two.commit()
    assert agrees(one, truth) and agrees(two, truth)


def test_a_change_without_a_place_is_refused_and_the_rest_stays(path: Path) -> None:
    one, two, truth = opened(path), opened(path), model()
    one.add([100, 101], vectors("v1", [100, 101]), "v1")
    update(one, truth, [1])
    two.add([101], vectors("v1", [101], 5), "v1")
    two.commit()
    message = (
        "`ids`: item 101 was added by another writer; the 2 items that this gallery added with it are dropped"
    )
    with pytest.raises(ValueError, match=message):
        one.commit()
    truth.add([101], vectors("v1", [101], 5), "v1")
    one.commit()
    assert agrees(one, truth) and agrees(two, truth)


def test_a_model_begun_by_two_is_shared(path: Path) -> None:
    one, two = opened(path), opened(path)
    for gallery, ids in ((one, [0, 1]), (two, [2, 3])):
        gallery.begin("v3")
        gallery.update(ids, vectors("v3", ids))
    one.commit()
    two.commit()
    truth = model()
    truth.models.append("v3")
    truth.put(range(4), vectors("v3", range(4)), "v3")
    assert agrees(one, truth) and agrees(two, truth) and one.verify() == []


def test_a_model_begun_by_two_of_other_widths_is_refused(path: Path) -> None:
    one, two = opened(path), opened(path)
    one.begin("v3")
    one.update([0], vectors("v3", [0]))
    two.begin("v3")
    two.update([1], vectors("v2", [1]))
    one.commit()
    with pytest.raises(ValueError, match="`v3` was begun by another writer with vectors of 5 columns"):
        two.commit()
    two.commit()
    truth = model()
    truth.models.append("v3")
    truth.put([0], vectors("v3", [0]), "v3")
    assert agrees(one, truth) and agrees(two, truth)


def test_retired_by_one_while_another_writes_it(path: Path) -> None:
    one, two = opened(path), opened(path)
    update(one, None, [1])
    two.retire("v2")
    two.commit()
    assert two.models == ["v1"] and two.fraction == 1
    with pytest.raises(ValueError, match="`v2` was retired by another writer: 1 vectors or rollbacks"):
        one.commit()
    assert agrees(one, Model(range(N))) and agrees(two, Model(range(N)))


def test_the_files_of_a_retired_model_go_and_the_folder_opens(path: Path) -> None:
    writer, reader = opened(path), fc.MixedGallery.open(path)
    update(writer, None, range(N))
    writer.commit()
    asked = queries()
    reader.search({"v2": asked["v2"]}, 3)
    assert (path / "vectors-0-0.fcg").exists()
    writer.retire("v1")
    assert (path / "vectors-0-0.fcg").exists()
    writer.commit()
    assert not (path / "vectors-0-0.fcg").exists()
    for gallery in (writer, reader, fc.MixedGallery.open(path, verify=True)):
        assert gallery.search({"v2": asked["v2"]}, 3)[1].shape == (4, 3) and gallery.models == ["v2"]
        assert gallery.search(None, asked["v2"], 3)[1].shape == (4, 3)


def test_a_name_may_come_again_after_its_model_was_retired(path: Path) -> None:
    one, two, reader = opened(path), opened(path), fc.MixedGallery.open(path)
    update(one, None, [1, 2])
    update(two, None, [3])
    one.commit()
    two.commit()
    assert agrees(one, _with(1, 2, 3))
    one.rollback([1, 2, 3], "v1")
    one.retire("v2")
    one.commit()
    one.begin("v2")
    update(one, None, [4])
    one.commit()
    two.refresh()
    update(two, None, [5])
    two.commit()
    assert not (path / "vectors-0-1.fcg").exists()
    for gallery in (one, two, reader, fc.MixedGallery.open(path, verify=True)):
        assert agrees(gallery, _with(4, 5)) and gallery.verify() == []


def test_an_interrupt_behind_the_record_doubles_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, truth = opened(path), model()
    writer.add([100], vectors("v1", [100]), "v1")
    truth.add([100], vectors("v1", [100]), "v1")

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Folder, "_write_head", interrupt)
        writer.commit()
    writer.commit()
    assert agrees(writer, truth) and agrees(fc.MixedGallery.open(path), truth)


def test_compaction_beside_readers_and_writers(path: Path) -> None:
    one, two, reader, truth = opened(path), opened(path), fc.MixedGallery.open(path), model()
    update(one, truth, range(10))
    one.commit()
    update(one, truth, range(10), turn=1)
    one.remove([3])
    truth.remove([3])
    one.add([300], vectors("v1", [300]), "v1")
    truth.add([300], vectors("v1", [300]), "v1")
    one.commit()
    assert agrees(reader, truth)
    update(two, None, [11, 12], turn=2)  # not committed, and lagging
    two.add([400], vectors("v1", [400]), "v1")
    held = reader._core.view
    one.compact()
    assert {f.name for f in path.iterdir()} == {
        "manifest.json", "head-1.fcg", "journal-1.fcg", "base-1.fcg", "vectors-1-0.fcg", "vectors-1-1.fcg"
    }  # fmt: skip
    assert agrees(reader, truth) and held is not reader._core.view
    one.compact()
    two.commit()
    truth.put([11, 12], vectors("v2", [11, 12], 2), "v2")
    truth.add([400], vectors("v1", [400]), "v1")
    for gallery in (one, two, reader, fc.MixedGallery.open(path, verify=True)):
        assert agrees(gallery, truth)


def test_compaction_erases_what_was_removed(path: Path) -> None:
    writer = opened(path)
    secret = vectors("v1", [7])[0].tobytes()
    for erased in (False, True):
        held = [f.name for f in path.iterdir() if secret in f.read_bytes()]
        assert bool(held) is not erased
        writer.remove([7]) if not erased else None
        writer.commit()
        writer.compact()


@pytest.mark.parametrize("how", ("restored", "restored and written", "replaced", "copied back"))
def test_a_writer_of_another_history_is_refused(how: str, path: Path, tmp_path: Path) -> None:
    writer = opened(path)
    shutil.copytree(path, tmp_path / "backup")
    update(writer, None, [1])
    writer.commit()
    update(writer, None, [2])
    if how == "copied back":
        for file in (tmp_path / "backup").iterdir():
            shutil.copy2(file, path / file.name)
    else:
        shutil.rmtree(path)
        shutil.copytree(tmp_path / "backup", path)
    if how == "restored and written":
        with opened(path) as other:
            update(other, None, [5, 6, 7])
            other.commit()
            update(other, None, [5, 6, 7], 1)
            other.commit()
    if how == "replaced":
        fc.MixedGallery(vectors("v1", range(3)), model="v1").save(path)
    before = {f.name: f.read_bytes() for f in path.iterdir()}
    with pytest.raises(
        ValueError, match="was replaced or put back from a backup since this gallery opened it"
    ):
        writer.commit()
    assert before == {f.name: f.read_bytes() for f in path.iterdir()}
    assert fc.MixedGallery.open(path).verify() == []


def test_a_reader_goes_on_with_the_folder_that_is_there(path: Path, tmp_path: Path) -> None:
    reader, writer = fc.MixedGallery.open(path), opened(path)
    shutil.copytree(path, tmp_path / "backup")
    update(writer, None, [1])
    writer.commit()
    assert agrees(reader, _with(1))
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "backup", path)
    assert agrees(reader, model())


def _with(*ids: int) -> Model:
    truth = model()
    truth.put(ids, vectors("v2", ids), "v2")
    return truth


def test_a_snapshot_is_a_gallery_of_its_own(path: Path, tmp_path: Path) -> None:
    writer = opened(path)
    update(writer, None, [1])
    writer.snapshot(tmp_path / "copy")
    update(writer, None, [2])
    writer.commit()
    assert agrees(fc.MixedGallery.open(tmp_path / "copy", verify=True), _with(1))
    with pytest.raises(ValueError, match="`path` must hold no gallery"):
        writer.snapshot(tmp_path / "copy")
    with pytest.raises(ValueError, match="`path` must hold no gallery"):
        fc.MixedGallery.create(path, vectors("v1", range(3)))


def test_closed_and_read_only_galleries_say_so(path: Path) -> None:
    reader, writer = fc.MixedGallery.open(path), opened(path)
    with pytest.raises(ValueError, match="open it with writable=True to change it"):
        reader.update([0], vectors("v2", [0]))
    update(writer, None, [1])
    with pytest.warns(UserWarning, match="1 uncommitted changes are dropped"):
        writer.close()
    with pytest.raises(ValueError, match="this gallery is closed"):
        len(writer)
    with pytest.raises(ValueError, match="this gallery lives in a folder"):
        reader.save(path.parent / "elsewhere")


def test_a_pickled_gallery_is_its_path(path: Path) -> None:
    writer = opened(path)
    update(writer, None, [1])
    with pytest.raises(ValueError, match="commit before it is pickled"):
        pickle.dumps(writer)
    writer.commit()
    assert len(pickle.dumps(writer)) < 1000
    other = pickle.loads(pickle.dumps(writer))
    update(other, None, [2])
    other.commit()
    assert agrees(writer, _with(1, 2))


def test_the_umask_says_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        gallery = fc.MixedGallery.create(tmp_path / "g", vectors("v1", range(3)), model="v1")
        gallery.begin("v2")
        gallery.update([0], vectors("v2", [0]))
        gallery.commit()
        gallery.compact()
        gallery.begin("v3")
        gallery.update([0], vectors("v3", [0]))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "g").iterdir()} == {0o640}


FAULTS = [
    ("pwrite", errno.ENOSPC), ("fdatasync", errno.EIO), ("fsync", errno.ENOSPC), ("open", errno.EMFILE),
    ("open", errno.EROFS), ("ftruncate", errno.EFBIG), ("pread", errno.EIO), ("replace", errno.EACCES),
]  # fmt: skip


@pytest.mark.parametrize(("call", "code"), FAULTS)
@pytest.mark.parametrize("act", ("commit", "compact", "open", "save"))
def test_a_failing_system_call_leaves_the_store_as_it_was(
    act: str, call: str, code: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first such call fails, then the second, ...: an error with its reason, or done."""
    truth = model()
    for step in range(60):
        writer = opened(path) if act != "save" else fc.MixedGallery.load(path)
        after = pickle.loads(pickle.dumps(truth))
        real, seen = getattr(os, call), [0]

        def failing(
            *arguments: Any, real: Any = real, seen: list[int] = seen, step: int = step, **named: Any
        ) -> Any:
            seen[0] += 1
            if seen[0] == step + 1:
                raise OSError(code, os.strerror(code))
            return real(*arguments, **named)

        error: BaseException | None = None
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                if act == "open":
                    fc.MixedGallery.open(path, writable=True).close()
                else:
                    update(writer, after, [step % N], turn=step)
                    getattr(writer, act)(*[path] * (act == "save"))
            except (OSError, ValueError) as found:
                error = found
                assert os.strerror(code) in str(found) or isinstance(found, layout.DamagedError)
        assert not isinstance(error, layout.DamagedError), error
        with fc.MixedGallery.open(path) as reader:
            assert reader.verify() == []
            if not agrees(reader, truth):
                assert agrees(reader, after)
                truth = after
            else:
                assert error is not None or act == "open"
        if seen[0] <= step:
            break
    assert step < 59 or call == "pread"


def test_a_manifest_that_cannot_be_read_deletes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, before = Path.read_bytes, {f.name for f in path.iterdir()}

    def failing(self: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    gallery = fc.MixedGallery.load(path)
    gallery.update([0], vectors("v2", [0]))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing)
        for call in (lambda: gallery.save(path), lambda: fc.MixedGallery(vectors("v1", range(3))).save(path)):
            with pytest.raises(ValueError, match="Too many open files"):
                call()
        with pytest.raises(OSError, match="Too many open files"):
            fc.MixedGallery.open(path)
    assert Path.read_bytes is read and {f.name for f in path.iterdir()} == before
    gallery.save(path)
    assert agrees(fc.MixedGallery.open(path), _with(0))


def test_searching_threads_and_a_reader_process_see_committed_states(path: Path, seconds: float = 3) -> None:
    """A continuous updater, threads that search its gallery, another process: each answer is of one state."""
    script = Path(__file__).with_name("watch.py")
    asked = {m: queries()[m] for m in ("v1", "v2")}
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(fc.__file__).parents[1]), str(script.parent)])
    }
    process = subprocess.Popen(
        [sys.executable, str(script), str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        bufsize=1,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    writer, done, wrong = opened(path), threading.Event(), []
    states: list[str] = [_answer(writer, asked)]

    def watch() -> None:
        earliest = 0
        while not done.is_set():
            answer = _answer(writer, asked)
            known = len(states)
            while answer not in states[earliest:] and not done.is_set() and len(states) < known + 3:
                time.sleep(0.001)  # the updater has not noted it yet
            if answer not in states[earliest:]:
                wrong.append(answer)
                return
            earliest = states.index(answer, earliest)

    threads = [threading.Thread(target=watch) for _ in range(4)]
    for thread in threads:
        thread.start()
    rng, end, turn = np.random.default_rng(0), time.monotonic() + seconds, 0
    committed = [states[0]]
    while time.monotonic() < end:
        turn += 1
        update(writer, None, rng.choice(N, 3, replace=False).tolist(), turn)
        states.append(_answer(writer, asked))
        if turn % 3 == 0:
            writer.commit()
            committed.append(states[-1])
    writer.commit()
    committed.append(states[-1])
    done.set()
    for thread in threads:
        thread.join()
    (path.parent / "stop").touch()
    seen = process.communicate(timeout=60)[0].split("\n")[:-1]
    assert not wrong and turn > 5
    assert seen and set(seen) <= set(committed) and seen[-1] == committed[-1]
    order = [committed.index(answer) for answer in seen]
    assert order == sorted(order)


def _answer(gallery: fc.MixedGallery, asked: dict[str, Any]) -> str:
    scores, found = gallery.search(asked, 9)
    return layout.digest(scores.tobytes(), found.tobytes()).hex()


def test_killed_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    script = Path(__file__).with_name("kills.py")
    environment = os.environ | {"PYTHONPATH": str(Path(fc.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "g"), "60", "3"],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(r"6\d kills", done.stdout), done.stdout


def test_the_lock_dies_with_its_holder(path: Path) -> None:
    pid = os.fork()
    if not pid:
        with locked(path):
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    with opened(path) as writer:
        update(writer, None, [0])
        writer.commit()
