"""`MixedGallery`: always what `mixed_topk` says, through updates, crashes, restarts and many threads."""

from __future__ import annotations

import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_counts import examples
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastcompat as fc
from fastcompat import _promoted, _search
from fastcompat.serving import layout

N = 40
OLD, NEW, QUERY_OLD, QUERY_NEW = torch.randn(N, 6), torch.randn(N, 9), torch.randn(5, 6), torch.randn(5, 9)
NAMES = torch.randperm(N) * 1000 - 7000
SOME, OTHERS = torch.arange(0, N, 3), torch.arange(1, N, 3)


def same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def search(gallery: fc.MixedGallery, k: int = 12) -> tuple[Tensor, Tensor]:
    return gallery.search(QUERY_OLD, QUERY_NEW, k)


def half_done(**named: object) -> fc.MixedGallery:
    gallery = fc.MixedGallery(OLD, **named)  # type: ignore[arg-type]
    rows = NAMES[SOME] if "ids" in named else SOME
    gallery.update(rows, NEW[SOME])
    return gallery


@examples(60)
@given(
    batches=st.lists(st.sets(st.integers(0, N - 1)), max_size=4),
    k=st.integers(1, 50),
    metric=st.sampled_from(("cosine", "ip", "l2")),
    scale=st.tuples(*[st.sampled_from((1.0, 0.5))] * 2),
    offset=st.tuples(*[st.sampled_from((0.0, -1.0))] * 2),
    dtypes=st.tuples(*[st.sampled_from((torch.float32, torch.bfloat16, torch.float16))] * 2),
    backend=st.sampled_from(("auto", "reference")),
    named=st.booleans(),
    started=st.booleans(),
)
def test_is_mixed_topk_after_every_update(
    batches: list[set[int]],
    k: int,
    metric: str,
    scale: tuple[float, float],
    offset: tuple[float, float],
    dtypes: tuple[torch.dtype, torch.dtype],
    backend: str,
    named: bool,
    started: bool,
) -> None:
    old, query_old = OLD.to(dtypes[0]), QUERY_OLD.to(dtypes[0])
    new, query_new = torch.full((N, 9), torch.nan).to(dtypes[1]), QUERY_NEW.to(dtypes[1])
    mask = torch.zeros(N, dtype=torch.bool)
    if started:
        mask[::7], new[::7] = True, NEW[::7].to(dtypes[1])
    ids = NAMES if named else torch.arange(N)
    calls = {"metric": metric, "scale": scale, "offset": offset, "backend": backend}
    begun = (new.clone(), mask) if started else ()
    gallery = fc.MixedGallery(old, *begun, ids=ids if named else None, **calls)  # type: ignore[arg-type]
    mask = mask.clone()
    for turn, batch in enumerate([set(), *batches]):
        rows = torch.tensor(sorted(batch), dtype=torch.int64)
        vectors = NEW[rows].to(dtypes[1]) + turn
        mask[rows], new[rows] = True, vectors
        gallery.update(ids[rows], vectors)
        scores, found = fc.mixed_topk(query_old, old, query_new, new, mask, k, **calls)  # type: ignore[arg-type]
        expected = torch.where(found < 0, -1, ids[found])
        assert same(gallery.search(query_old, query_new, k), (scores, expected))
        assert gallery.fraction == int(mask.sum()) / N
    assert not started or begun[0].isnan().sum() == 9 * int(
        (~begun[1]).sum()
    )  # the caller's array is as it was


def test_a_side_without_items_needs_no_query() -> None:
    gallery = fc.MixedGallery(OLD)
    assert len(gallery) == N and gallery.fraction == 0
    assert same(gallery.search(QUERY_OLD, None, 4), fc.topk(QUERY_OLD, OLD, 4))
    gallery.update(SOME, NEW[SOME])
    for queries, name, count in (((QUERY_OLD, None), "new", 14), ((None, QUERY_NEW), "old", 26)):
        message = f"`query_{name}` must be given: got None, and {count} items need it"
        with pytest.raises(ValueError, match=re.escape(message)):
            gallery.search(*queries, 4)
    gallery.update(torch.arange(N), NEW)
    assert gallery.fraction == 1
    assert same(gallery.search(None, QUERY_NEW, 4), fc.topk(QUERY_NEW, NEW, 4))


def test_arrays_in_arrays_out() -> None:
    gallery = fc.MixedGallery(OLD.numpy(), ids=NAMES.numpy())
    gallery.update(NAMES[SOME].numpy(), NEW[SOME].numpy())
    found = gallery.search(QUERY_OLD.numpy(), QUERY_NEW.numpy(), 12)
    assert all(isinstance(part, np.ndarray) for part in found)
    assert same(tuple(map(torch.from_numpy, found)), search(half_done(ids=NAMES)))


def test_an_empty_gallery(tmp_path: Path) -> None:
    gallery = fc.MixedGallery(OLD[:0], ids=NAMES[:0])
    gallery.save(tmp_path)
    for each in (gallery, fc.MixedGallery.load(tmp_path)):
        each.update(NAMES[:0], NEW[:0])
        scores, ids = search(each, 3)
        assert len(each) == each.fraction == 0
        assert scores.eq(-torch.inf).all() and ids.eq(-1).all() and ids.shape == (5, 3)


BAD = torch.cat([NEW[:2], torch.full((1, 9), torch.nan)])


@pytest.mark.parametrize(
    ("rows", "vectors", "error", "message"),
    [
        ([0, 1], BAD, ValueError, "`ids` must have one entry per row of `vectors`: got 2 and 3"),
        ([0, 1, 2], BAD, ValueError, "`vectors` must be finite: row 2 holds NaN or inf"),
        ([0, 1, 0], NEW[:3], ValueError, "`ids` must name each item once: got 0 twice"),
        ([0, N], NEW[:2], ValueError, "`ids` must name items of this gallery: it holds no item 40"),
        ([0, -1], NEW[:2], ValueError, "`ids` must name items of this gallery: it holds no item -1"),
        ([0], NEW[:1, :8], ValueError, "`new` must have as many columns as `vectors`: got 9 and 8"),
        (
            [0],
            NEW[:1].double() + 1e39,
            ValueError,
            "`vectors` must fit torch.float32, the dtype of the new vectors",
        ),
        ([0], NEW[0], ValueError, "`vectors` must have 2 dimensions"),
        ([0], {}, TypeError, "`vectors` must be a tensor, an array, a list or a column of a data frame: got"),
        ([0.5], NEW[:1], TypeError, "`ids` must hold whole numbers: got 0.5"),
        ([0], NEW[:1].to("meta"), ValueError, "`vectors` must be on the device of `old`: got meta and cpu"),
    ],
)
def test_a_bad_update_changes_nothing(
    rows: list[float], vectors: Tensor, error: type[Exception], message: str
) -> None:
    gallery = half_done()
    before = search(gallery)
    with pytest.raises(error, match=re.escape(message)):
        gallery.update(torch.tensor(rows), vectors)
    assert same(search(gallery), before) and gallery.fraction == len(SOME) / N


def test_unknown_names() -> None:
    gallery = half_done(ids=NAMES)
    for name in (NAMES.min() - 1, NAMES.min() + 1, NAMES.max() + 1):
        with pytest.raises(
            ValueError, match=f"`ids` must name items of this gallery: it holds no item {name}"
        ):
            gallery.update(name[None], NEW[:1])


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ({"old": OLD[0]}, ValueError, "`old` must have 2 dimensions"),
        ({"new": NEW}, ValueError, "`backfilled` must be given with `new`: got None; pass both or neither"),
        ({"backfilled": SOME > 0}, ValueError, "`new` must be given with `backfilled`: got None"),
        ({"new": NEW[1:], "backfilled": NAMES > 0}, ValueError, "`new` must have one entry per row of `old`"),
        ({"new": NEW, "backfilled": NAMES}, TypeError, "`backfilled` must be bool"),
        ({"metric": "dot"}, ValueError, "`metric` must be one of"),
        ({"backend": "gpu"}, ValueError, "`backend` must be one of"),
        ({"scale": (1.0,)}, ValueError, "`scale` must be two numbers"),
        ({"offset": (0, float("nan"))}, ValueError, "`offset` must be finite"),
        ({"ids": NAMES[1:]}, ValueError, "`ids` must have one entry per row of `old`: got 39 and 40"),
        ({"ids": NAMES / 7}, TypeError, "`ids` must hold whole numbers"),
        ({"ids": NAMES.clamp(min=0)}, ValueError, "`ids` must name each item once: got 0 twice"),
        ({"ids": torch.arange(N) - 1}, ValueError, "`ids` must not hold -1"),
    ],
)
def test_refuses(named: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        fc.MixedGallery(**{"old": OLD, **named})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (QUERY_NEW, QUERY_NEW, 3),
            ValueError,
            "`old` must have as many columns as `query_old`: got 6 and 9",
        ),
        ((QUERY_OLD, QUERY_NEW[1:], 3), ValueError, "`query_new` must have one entry per row of `query_old`"),
        ((QUERY_OLD[0], QUERY_NEW, 3), ValueError, "`query_old` must have 2 dimensions, as `query_new` has"),
        ((QUERY_OLD, QUERY_NEW, 0), ValueError, "`k` must be at least 1: got 0"),
        ((QUERY_OLD, QUERY_NEW * torch.inf, 3), ValueError, "`query_new` must be finite: row 0 holds"),
    ],
)
def test_search_refuses(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        half_done().search(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", ("cosine", "ip", "l2"))
def test_wider_queries_are_searched_block_by_block(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties over blocks and parts go to the item that was added first, as in one search."""
    coarse = (OLD.round().half(), NEW.round().half())
    narrow, wide = (fc.MixedGallery(old, ids=NAMES, metric=metric) for old in (coarse[0], coarse[0].float()))
    for gallery, new in ((narrow, coarse[1]), (wide, coarse[1].float())):
        gallery.update(NAMES[SOME.flip(0)], new[SOME])
        gallery.remove(NAMES[5:7])
    queries = QUERY_OLD.round(), QUERY_NEW.round()
    monkeypatch.setattr(_promoted, "BLOCK", 32)
    for _ in range(3):
        assert same(narrow.search(*queries, 12), wide.search(*queries, 12))
    with pytest.raises(ValueError, match="`query_new` must be finite: row 3 holds"):
        narrow.search(queries[0], torch.where(torch.arange(5)[:, None] == 3, torch.nan, queries[1]), 12)
    allow = NAMES[::2]
    assert same(narrow.search(*queries, 12, allow=allow), wide.search(*queries, 12, allow=allow))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("started", (False, True))
def test_what_is_saved_comes_back(dtype: torch.dtype, started: bool, tmp_path: Path) -> None:
    named = {"metric": "l2", "scale": (0.5, 2.0), "offset": (0.0, -1.0)}
    gallery = fc.MixedGallery(OLD.to(dtype), ids=NAMES, **named)  # type: ignore[arg-type]
    if started:
        gallery.update(NAMES[SOME], NEW[SOME].to(dtype))
    gallery.save(tmp_path / "a" / "gallery")
    again = fc.MixedGallery.load(tmp_path / "a" / "gallery")
    queries = QUERY_OLD.to(dtype), QUERY_NEW.to(dtype)
    assert same(again.search(*queries, 12), gallery.search(*queries, 12))
    assert again.fraction == gallery.fraction and len(again) == N
    for each in (gallery, again):
        each.update(NAMES[OTHERS], NEW[OTHERS].to(dtype))
    assert same(again.search(*queries, 12), gallery.search(*queries, 12))
    assert again.verify() == []


def names_in(path: Path) -> set[str]:
    return {file.name for file in path.iterdir()}


def test_saving_again_writes_what_changed(tmp_path: Path) -> None:
    (tmp_path / "old-mine.npy").write_text("kept")
    gallery = half_done(ids=NAMES)
    gallery.save(tmp_path)
    first = names_in(tmp_path)
    old = tmp_path / "vectors-0-0.fcg"
    stamp = old.stat().st_mtime_ns
    again = fc.MixedGallery.load(tmp_path)
    for rows, turn in ((OTHERS, 0), (SOME, 3)):
        again.update(NAMES[rows], NEW[rows] + turn)
        before = search(again)
        again.save(tmp_path)
        assert same(search(again), before) and same(search(fc.MixedGallery.load(tmp_path)), before)
    assert names_in(tmp_path) == first and old.stat().st_mtime_ns == stamp
    gallery.save(tmp_path / "elsewhere")
    assert same(search(fc.MixedGallery.load(tmp_path / "elsewhere")), search(gallery))


def test_another_gallery_saved_there_replaces_it(tmp_path: Path) -> None:
    half_done().save(tmp_path)
    other = fc.MixedGallery(OLD + 1)
    other.save(tmp_path)
    assert same(search(fc.MixedGallery.load(tmp_path)), search(other))
    assert {name.partition("-")[0] for name in names_in(tmp_path)} == {
        "manifest.json", "head", "journal", "base", "vectors"
    } and len(names_in(tmp_path)) == 5  # fmt: skip


@pytest.mark.parametrize("again", (False, True))
@pytest.mark.parametrize("stop", (KeyboardInterrupt, OSError(28, "No space left on device")))
def test_an_interrupted_save_leaves_the_gallery_of_before_or_the_new_one(
    again: bool, stop: BaseException | type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that writes all, or what changed, stopped before each time that it waits for the disk."""
    half_done(ids=NAMES).save(tmp_path)
    before, states = search(half_done(ids=NAMES)), set()
    for step in range(40):
        other = fc.MixedGallery.load(tmp_path) if again else half_done(ids=NAMES)
        other.update(NAMES[OTHERS], NEW[OTHERS])
        calls = iter(range(step + 1))

        def interrupt(*_: object, calls: Any = calls, step: int = step) -> None:
            if next(calls) == step:
                raise stop

        with monkeypatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(os, "fsync", interrupt)
            patch.setattr(os, "fdatasync", interrupt)
            try:
                other.save(tmp_path)
                done = True
            except (KeyboardInterrupt, ValueError):
                done = False
        assert same(search(other), search(other)) and fc.MixedGallery.load(tmp_path).verify() == []
        found = search(fc.MixedGallery.load(tmp_path))
        states.add((done, same(found, before)))
        assert same(found, before) or same(found, search(other))
        if done:
            break
    assert done and (False, True) in states and (True, False) in states


def test_what_a_killed_save_left_behind_goes_with_the_next(tmp_path: Path) -> None:
    half_done().save(tmp_path)
    for left in ("vectors-7-0.fcg", "manifest.json.new"):
        (tmp_path / left).write_bytes(b"half of it")
    mine = tmp_path / "new-20260101.npy"
    mine.write_bytes(b"kept")
    other = half_done()
    other.update(OTHERS, NEW[OTHERS])
    other.save(tmp_path)
    assert len(names_in(tmp_path)) == 7 and mine.exists()
    assert same(search(fc.MixedGallery.load(tmp_path)), search(other))


def test_saves_into_one_folder_wait_for_one_another(tmp_path: Path) -> None:
    """Of galleries that know nothing of one another the last stays; of one gallery, the latest state."""
    wrong: list[BaseException] = []
    one = fc.MixedGallery(OLD)

    def anew(turn: int) -> None:
        for again in range(10):
            fc.MixedGallery(OLD + (turn + 4 * again)).save(tmp_path / "many")

    def on(turn: int) -> None:
        for row in range(turn, N, 4):
            one.update(torch.tensor([row]), NEW[row][None])
            one.save(tmp_path / "one")

    def run(work: Callable[[int], None], turn: int) -> None:
        try:
            work(turn)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(work, turn)) for work in (anew, on) for turn in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    found = fc.MixedGallery.load(tmp_path / "many", verify=True).search(QUERY_OLD, None, 9)
    assert any(same(found, fc.topk(QUERY_OLD, OLD + shift, 9)) for shift in range(36, 40))
    assert len(names_in(tmp_path / "many")) == 5
    last = fc.MixedGallery.load(tmp_path / "one", verify=True)
    assert last.fraction == 1 and same(last.search(None, QUERY_NEW, 9), fc.topk(QUERY_NEW, NEW, 9))


def test_a_gallery_that_was_replaced_is_refused(tmp_path: Path) -> None:
    """What is known of one folder is not forgotten in another."""
    refused = pytest.raises(ValueError, match="was replaced or put back from a backup since")
    fc.MixedGallery(OLD).save(tmp_path / "a")
    first, second = (fc.MixedGallery.load(tmp_path / "a") for _ in range(2))
    for gallery, rows in ((first, SOME), (second, OTHERS)):
        gallery.update(rows, NEW[rows])
        gallery.save(tmp_path / "a")  # the later one keeps the earlier one's work
    both = fc.MixedGallery.load(tmp_path / "a", verify=True)
    assert both.fraction == len([*SOME, *OTHERS]) / N
    both.save(tmp_path / "b")
    first.update(SOME[:1], NEW[:1])
    first.save(tmp_path / "a")
    both.update(SOME[1:2], NEW[:1])
    with refused:
        both.save(str(tmp_path) + "/a/.")
    half_done().save(tmp_path / "a")
    with refused:
        first.save(tmp_path / "a")
    for file in (tmp_path / "a").iterdir():
        file.unlink()
    first.save(tmp_path / "a")  # nothing is there that could be lost
    assert same(search(fc.MixedGallery.load(tmp_path / "a")), search(first))


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"`path`: cannot write to the folder `.*file` "):
        half_done().save(tmp_path / "file")


def test_load_refuses_what_is_no_gallery(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            fc.MixedGallery.load(tmp_path)

    refused("`path` must be a folder that `save` wrote: no fastcompat.MixedGallery in")
    manifest = tmp_path / "manifest.json"
    manifest.write_text("[]")
    refused("`path`: the file `.*manifest.json` is damaged .no JSON object.")
    manifest.unlink()
    half_done().save(tmp_path)
    good = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(good) | {"version": 3}))
    refused("`path` must hold version 1 or 2 of fastcompat.MixedGallery: got 3; open it with the version")
    manifest.write_text(good)
    file = tmp_path / "vectors-0-1.fcg"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=f"`path`: the file `{file}` is damaged"):
        search(fc.MixedGallery.load(tmp_path))
    file.unlink()
    refused(f"`path`: the file `{file}` is damaged \\(it is missing\\)")


def test_a_gallery_saved_while_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done().save(tmp_path)
    last = half_done()
    last.update(OTHERS, NEW[OTHERS])
    read, saved = layout.map_base, []

    def slow_read(*arguments: Any) -> Any:
        if not saved:
            saved.append(True)
            fc.MixedGallery(OLD + 1).save(tmp_path)
            last.save(tmp_path)
        return read(*arguments)

    monkeypatch.setattr(layout, "map_base", slow_read)
    assert same(search(fc.MixedGallery.load(tmp_path)), search(last))


@pytest.mark.parametrize("array", (False, True))
def test_a_backfill_goes_on_where_it_was_saved(array: bool, tmp_path: Path) -> None:
    order = NAMES[torch.randperm(N)[:33]]
    row_of = {int(name): row for row, name in enumerate(NAMES)}
    seen: list[int] = []

    def embed(ids: Tensor | np.ndarray) -> Tensor:
        assert isinstance(ids, np.ndarray) == array and len(ids) <= 4
        seen.extend(ids.tolist())
        return NEW[[row_of[name] for name in ids.tolist()]]

    gallery = fc.MixedGallery(OLD, ids=NAMES)
    gallery.update(order[5:6], NEW[row_of[int(order[5])]][None])
    given = order.numpy() if array else order
    fractions = []
    for fraction in gallery.backfill(given, embed, batch=4):
        fractions.append(fraction)
        gallery.save(tmp_path)
        if fraction > 0.3:
            break
    assert fractions == [5 / N, 9 / N, 13 / N]
    again = fc.MixedGallery.load(tmp_path)
    assert list(again.backfill(given, embed, batch=4))[-1] == again.fraction == 33 / N
    assert seen == [int(name) for place, name in enumerate(order) if place != 5]
    assert list(again.backfill(given, embed)) == []
    with pytest.raises(ValueError, match="`order` must name items of this gallery: it holds no item 1"):
        gallery.backfill(torch.tensor([1]), embed)
    with pytest.raises(ValueError, match="`batch` must be at least 1"):
        gallery.backfill(given, embed, batch=0)


def test_an_update_leaves_the_searches_under_way_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    gallery = half_done()
    before, topk = search(gallery), _search.topk
    seen = [part.rows.clone() for _, _, parts in gallery._core.view.parts for part in parts]
    parts = [part for _, _, parts in gallery._core.view.parts for part in parts]

    def late(*arguments: Any, **named: Any) -> Any:
        for rows in (SOME, OTHERS, SOME):
            gallery.update(rows, NEW[rows] + 5)
        return topk(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(_search, "topk", late)
        assert same(search(gallery), before)
    assert all(
        torch.equal(torch.from_numpy(np.flatnonzero(part.items >= 0)), rows)
        for part, rows in zip(parts, seen, strict=True)
    )
    assert not same(search(gallery), before)


def test_searches_during_updates_see_one_state_each() -> None:
    """Items are re-embedded, some of them twice, while other threads search."""
    turns = [(rows, NEW[rows] + turn) for turn, rows in enumerate((SOME, OTHERS, SOME, torch.arange(N)))] * 5
    states, replay = [], fc.MixedGallery(OLD)
    for rows, vectors in [(SOME[:0], NEW[:0]), *turns]:
        replay.update(rows, vectors)
        states.append(search(replay))
    gallery, wrong, done = fc.MixedGallery(OLD), [], threading.Event()

    def watch() -> None:
        earliest = 0
        while not done.is_set():
            found = search(gallery)
            matching = [t for t, state in enumerate(states) if t >= earliest and same(state, found)]
            if not matching:
                wrong.append(found)
                return
            earliest = matching[0]

    watchers = [threading.Thread(target=watch) for _ in range(3)]
    for thread in watchers:
        thread.start()
    for rows, vectors in turns:
        gallery.update(rows, vectors)
        search(gallery)
    done.set()
    for thread in watchers:
        thread.join()
    assert not wrong and same(search(gallery), states[-1])
