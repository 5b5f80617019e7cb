"""A living gallery of several models: always what a dictionary of vectors would say."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule
from model import Model, agrees, queries, vectors

import fastcompat as fc
from fastcompat.serving.vectors import MemoryVectors

KINDS = {
    "int64": [(i - 5) * 1000 for i in range(30) if i != 4],
    "uint64": [2**63 + 7 * i for i in range(30)],
    "str": [f"é{i:x}" for i in range(30)],
}


def given(kind: str, ids: Any) -> Any:
    """Ids as a user has them."""
    return list(ids) if kind == "str" else np.array(ids, kind)


class Machine(RuleBasedStateMachine):
    """Random changes, commits, compactions, copies and reopenings."""

    ids = Bundle("ids")

    @initialize(
        kind=st.sampled_from(sorted(KINDS)), where=st.sampled_from(("memory", "folder")), n=st.integers(0, 12)
    )
    def start(self, kind: str, where: str, n: int) -> None:
        import tempfile

        self.kind, self.where = kind, where
        first, self.fresh = KINDS[kind][:n], KINDS[kind][n:]
        self.folder = Path(tempfile.mkdtemp()) / "gallery"
        old = vectors("v1", first)
        named: dict[str, Any] = {"ids": given(kind, first), "model": "v1"}
        if where == "folder":
            self.gallery = fc.MixedGallery.create(self.folder, old, **named)
        else:
            self.gallery = fc.MixedGallery(old, **named)
        if not n and kind == "str":
            assert self.gallery._core.state.ids.kind == "int64"
            self.kind, self.fresh = "int64", KINDS["int64"]
        if not n and kind == "uint64":
            assert self.gallery._core.state.ids.kind == "uint64"
        self.model, self.turn = Model(first), 0
        self.gallery.begin("v2")
        self.model.models.append("v2")

    def some(self, data: Any, least: int = 0) -> list[Any]:
        every = list(self.model.items)
        if len(every) < least:
            return []
        return (
            data.draw(st.lists(st.sampled_from(every), unique=True, min_size=least, max_size=6))
            if every
            else []
        )

    @rule(data=st.data())
    def update(self, data: Any) -> None:
        some, newest = self.some(data), self.model.models[-1]
        self.turn += 1
        values = vectors(newest, some, self.turn)
        self.gallery.update(given(self.kind, some), values, model=newest)
        self.model.put(some, values, newest)

    @rule(data=st.data(), count=st.integers(1, 4))
    def add(self, data: Any, count: int) -> None:
        some, self.fresh = self.fresh[:count], self.fresh[count:]
        model = data.draw(st.sampled_from(self.model.models))
        values = vectors(model, some)
        self.gallery.add(given(self.kind, some), values, model)
        self.model.add(some, values, model)

    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        some = self.some(data)
        self.gallery.remove(given(self.kind, some))
        self.model.remove(some)
        self.fresh = self.fresh + some  # the same ids may come again

    @rule(data=st.data())
    def replace(self, data: Any) -> None:
        some, model = self.some(data), data.draw(st.sampled_from(self.model.models))
        self.turn += 1
        values = vectors(model, some, self.turn)
        self.gallery.replace(given(self.kind, some), values, model)
        for i, v in zip(some, values, strict=True):
            self.model.items[i], self.model.top[i] = {model: v}, model

    @rule(data=st.data())
    def rollback(self, data: Any) -> None:
        to = data.draw(st.sampled_from(self.model.models))
        some = [i for i in self.some(data) if to in self.model.items[i]]
        self.gallery.rollback(given(self.kind, some), to)
        self.model.rollback(some, to)

    @precondition(lambda self: len(self.model.models) < 3 and "v3" not in self.model.models)
    @rule()
    def begin(self) -> None:
        self.gallery.begin("v3")
        self.model.models.append("v3")

    @precondition(lambda self: len(self.model.models) > 1)
    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        model = data.draw(st.sampled_from(self.model.models))
        if model in self.model.top.values():
            with pytest.raises(ValueError, match=f"items count with `{model}`"):
                self.gallery.retire(model)
            return
        self.gallery.retire(model)
        self.model.models.remove(model)
        for held in self.model.items.values():
            held.pop(model, None)

    @rule(data=st.data())
    def filtered(self, data: Any) -> None:
        some = self.some(data)
        assert agrees(self.gallery, self.model, allow=given(self.kind, some), allowed=set(some))
        rest = set(self.model.items) - set(some)
        assert agrees(self.gallery, self.model, exclude=given(self.kind, some), allowed=rest)
        mask = np.array([i in some for i in self.model.items], bool)
        assert agrees(self.gallery, self.model, allow=mask, allowed=set(some))

    @precondition(lambda self: self.where == "folder")
    @rule(how=st.sampled_from(("commit", "compact", "reopen", "snapshot", "pickle")))
    def keep(self, how: str) -> None:
        self.gallery.commit()
        if how == "compact":
            self.gallery.compact()
        elif how == "snapshot":
            copy_ = self.folder.parent / f"copy{self.turn}-{len(list(self.folder.parent.iterdir()))}"
            self.gallery.snapshot(copy_)
            assert agrees(fc.MixedGallery.open(copy_, verify=True), self.model)
        elif how == "pickle":
            self.gallery = pickle.loads(pickle.dumps(self.gallery))
        elif how == "reopen":
            self.gallery.close()
            self.gallery = fc.MixedGallery.open(self.folder, writable=True, verify=True)
        assert self.gallery.verify() == []

    @precondition(lambda self: self.where == "memory")
    @rule(how=st.sampled_from(("save", "load", "deepcopy")))
    def save(self, how: str) -> None:
        if how == "deepcopy":
            self.gallery = copy.deepcopy(self.gallery)
            return
        self.gallery.save(self.folder)
        if how == "load":
            self.gallery = fc.MixedGallery.load(self.folder)
        assert agrees(fc.MixedGallery.open(self.folder, verify=True), self.model)

    @rule(k=st.integers(1, 9))
    def search(self, k: int) -> None:
        assert agrees(self.gallery, self.model, k)

    @rule()
    def read(self) -> None:
        for model in self.model.models:
            its = [i for i, held in self.model.items.items() if model in held]
            if its:
                expected = np.array([self.model.items[i][model] for i in its])
                assert np.array_equal(
                    np.asarray(self.gallery.vectors(given(self.kind, its), model)), expected
                )
        left = [i for i, top in self.model.top.items() if top != self.model.models[-1]]
        assert self.gallery.pending().tolist() == left

    def teardown(self) -> None:
        if hasattr(self, "gallery"):
            assert agrees(self.gallery, self.model)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.gallery.close()
            import shutil

            shutil.rmtree(self.folder.parent)


Machine.TestCase.settings = settings(
    max_examples=15,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestMachine = Machine.TestCase


def test_the_second_model_comes_with_the_first_update(tmp_path: Path) -> None:
    for gallery in (
        fc.MixedGallery(vectors("v1", range(9)), model="v1"),
        fc.MixedGallery.create(tmp_path, vectors("v1", range(9)), model="v1", scale=(1.0, 0.5)),
    ):
        assert (
            gallery.models == ["v1"]
            and gallery.fraction == 0
            and gallery.pending().tolist() == list(range(9))
        )
        gallery.update(np.arange(3), vectors("v2", range(3)))
        assert gallery.models == ["v1", "new"] and gallery.fraction == 3 / 9
        scores, _ = gallery.search(queries()["v1"], queries()["v2"], 9)
        assert scores.shape == (4, 9)


def test_a_model_that_is_down() -> None:
    gallery = fc.MixedGallery(vectors("v1", range(9)), model="v1")
    gallery.begin("v2")
    gallery.update(np.arange(3), vectors("v2", range(3)))
    asked = queries()
    with pytest.raises(
        ValueError, match=re.escape('`queries["v1"]` must be given: got None, and 6 items need it')
    ):
        gallery.search({"v2": asked["v2"]}, 2)
    with pytest.warns(UserWarning, match="6 of 9 items count with models whose query was not given"):
        _, found = gallery.search({"v2": asked["v2"]}, 9, partial=True)
    assert all(sorted(row) == [-1] * 6 + [0, 1, 2] for row in found.tolist())
    gallery.search({"v2": asked["v2"]}, 2, allow=[0, 1, 2])  # nothing that may be found counts with v1


def bad() -> fc.MixedGallery:
    gallery = fc.MixedGallery(vectors("v1", range(9)), model="v1")
    gallery.begin("v2")
    gallery.update(np.arange(3), vectors("v2", range(3)))
    return gallery


NAN = vectors("v2", [0]) * np.nan


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda g: g.update([0], vectors("v2", [0]), model="v1"),
            ValueError,
            "`model` must be the newest model `v2`",
        ),
        (
            lambda g: g.update([0], vectors("v2", [0]), model="v9"),
            ValueError,
            '`model` must be a model of this gallery ("v1", "v2"): got \'v9\'',
        ),
        (
            lambda g: g.update([0], vectors("v1", [0])),
            ValueError,
            "`v2` must have as many columns as `vectors`: got 9 and 6",
        ),
        (
            lambda g: g.update([0], vectors("v2", [0]).astype(np.float64) * 1e300),
            ValueError,
            "`vectors` must fit torch.float32, the dtype of the v2 vectors: row 0 does not",
        ),
        (lambda g: g.update([0], NAN), ValueError, "`vectors` must be finite: row 0 holds NaN or inf"),
        (
            lambda g: g.update([77], vectors("v2", [0])),
            ValueError,
            "`ids` must name items of this gallery: it holds no item 77",
        ),
        (
            lambda g: g.update([1, 1], vectors("v2", [0, 1])),
            ValueError,
            "`ids` must name each item once: got 1 twice",
        ),
        (lambda g: g.update(["a"], vectors("v2", [0])), TypeError, "`ids` must hold whole numbers: got"),
        (
            lambda g: g.update([0.5], vectors("v2", [0])),
            TypeError,
            "`ids` must hold whole numbers: got 0.5",
        ),
        (
            lambda g: g.update({3}, vectors("v2", [0])),
            TypeError,
            "`ids` must be a tensor, an array, a list or a column of a data frame: got set",
        ),
        (
            lambda g: g.add([1], vectors("v2", [0])),
            ValueError,
            "`ids` must be new: the gallery holds item 1",
        ),
        (lambda g: g.add([-1], vectors("v2", [0])), ValueError, "`ids` must not hold -1"),
        (
            lambda g: g.add([50, 50], vectors("v2", [0, 1])),
            ValueError,
            "`ids` must name each item once: got 50 twice",
        ),
        (lambda g: g.add([50], NAN), ValueError, "`vectors` must be finite"),
        (
            lambda g: g.remove([50]),
            ValueError,
            "`ids` must name items of this gallery: it holds no item 50",
        ),
        (lambda g: g.replace([50], vectors("v2", [0])), ValueError, "it holds no item 50"),
        (lambda g: g.rollback([0], "v9"), ValueError, "`to` must be a model of this gallery"),
        (lambda g: g.rollback([5], "v2"), ValueError, "`ids`: item 5 has no vector of `v2` to go back to"),
        (lambda g: g.retire("v1"), ValueError, "`model`: 6 items count with `v1`"),
        (lambda g: g.begin("v2"), ValueError, '`model` must be a new name: the gallery has "v1", "v2"'),
        (lambda g: g.begin(""), ValueError, "`model` must be the name of a model: got ''"),
        (lambda g: g.commit(), ValueError, "this gallery is in memory"),
        (lambda g: g.compact(), ValueError, "this gallery is in memory"),
        (lambda g: g.vectors([5], "v2"), ValueError, "`ids`: item 5 has no vector of `v2`"),
        (lambda g: g.search({}, 3), ValueError, '`queries` must hold queries for "v1", "v2": got none'),
        (lambda g: g.search({"v3": NAN}, 3), ValueError, "`queries` must be a model of this gallery"),
        (lambda g: g.search(queries(), 0), ValueError, "`queries` must be a model"),
        (
            lambda g: g.search(queries()["v1"], queries()["v2"], 3, allow=np.ones(8, bool)),
            ValueError,
            "`allow` as a mask must have one entry per item",
        ),
        (
            lambda g: g.search(queries()["v1"], queries()["v2"], 3, exclude=["a"]),
            TypeError,
            "`exclude` must hold whole numbers: got strings",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_changes_nothing(call: Any, error: type[Exception], message: str) -> None:
    gallery, asked = bad(), queries()
    before = gallery.search(asked["v1"], asked["v2"], 9)
    with pytest.raises(error, match=re.escape(message)):
        call(gallery)
    after = gallery.search(asked["v1"], asked["v2"], 9)
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True)) and gallery.models == [
        "v1",
        "v2",
    ]


@pytest.mark.parametrize("kind", ("uint64", "str"))
def test_ids_come_back_in_their_type_with_empty_places(kind: str) -> None:
    its = given(kind, KINDS[kind][:3])
    gallery = fc.MixedGallery(vectors("v1", KINDS[kind][:3]), ids=its)
    scores, found = gallery.search(torch.from_numpy(queries()["v1"]), None, 5)
    assert isinstance(scores, torch.Tensor) and isinstance(found, np.ndarray)
    empty = {"uint64": 2**64 - 1, "str": ""}[kind]
    assert (found[:, 3:] == empty).all() and {*found[0, :3].tolist()} == {*KINDS[kind][:3]}
    with pytest.raises(ValueError, match="which marks an empty place"):
        gallery.add(given(kind, [empty]), vectors("v1", [5]))


def test_equal_scores_come_in_the_order_of_addition(tmp_path: Path) -> None:
    """Through updates in any order, rollback, removal, addition and compaction."""
    same = np.repeat(vectors("v1", [3]), 40, 0)
    gallery = fc.MixedGallery.create(tmp_path, same, ids=np.arange(40)[::-1].copy(), model="v1")
    gallery.begin("v2")
    for some in ([5, 20], [39, 1, 0], [20]):
        gallery.update(some, np.repeat(vectors("v1", [3]), len(some), 0))
    gallery.rollback([1], "v1")
    gallery.remove([30])
    gallery.add([30, 77], np.repeat(vectors("v1", [3]), 2, 0), "v1")
    expected = [i for i in range(39, -1, -1) if i != 30] + [30, 77]
    for _ in range(2):
        for k in (41, 7):
            _, found = gallery.search({"v1": queries()["v1"], "v2": queries()["v1"]}, k)
            assert all(row == expected[:k] for row in found.tolist())
        gallery.commit()
        gallery.compact()


def test_the_model_is_known_again(tmp_path: Path) -> None:
    gallery = fc.MixedGallery.create(tmp_path, vectors("v1", range(50)), model="v1", metric="ip")
    gallery.begin("v2", metadata={"checkpoint": "abc"})
    assert np.isnan(gallery.check(lambda ids: vectors("v2", ids), "v2"))
    gallery.update(np.arange(40), vectors("v2", range(40)))
    gallery.update(np.arange(40), vectors("v2", range(40), 1))  # by another model of the same name
    for _ in range(2):
        assert gallery.check(lambda ids: vectors("v2", ids), "v2") > 0.999
        assert gallery.check(lambda ids: torch.from_numpy(vectors("v1", ids)), "v1") > 0.999
        with pytest.raises(
            ValueError, match=r"`encoder` is not the one that made the vectors of `v2`: item .* has cosine"
        ):
            gallery.check(lambda ids: vectors("v2", ids, 1), "v2")
        with pytest.raises(ValueError, match=r"`encoder` is not the one .* differs by 0.100 of its norm"):
            gallery.check(lambda ids: vectors("v2", ids) * 1.1, "v2")
        with pytest.raises(ValueError, match="`encoder` must give vectors of `v2`: got shape"):
            gallery.check(lambda ids: vectors("v1", ids), "v2")
        gallery.commit()
        gallery.compact()
    seen: list[int] = []
    gallery.remove(np.arange(5))
    gallery.replace(np.arange(5, 10), vectors("v2", range(5, 10)))  # from now on these
    gallery.check(lambda ids: seen.extend(ids.tolist()) or vectors("v2", ids), "v2")
    assert sorted(seen) == list(range(5, 32))


def test_zero_vectors_are_counted() -> None:
    gallery = fc.MixedGallery(vectors("v1", range(5)))
    with pytest.warns(UserWarning, match="1 of 2 vectors are zero"):
        gallery.update([0, 1], np.array([[0, 0], [1, 2]], np.float32))


def test_what_updates_leave_in_memory_is_given_back() -> None:
    """Items that are updated for ever take the room of a few parts."""
    n = 60_000
    gallery = fc.MixedGallery(np.ones((n, 2), np.float32), model="v1")
    gallery.begin("v2")
    for turn in range(12):
        gallery.update(np.arange(n), np.full((n, 3), turn, np.float32) + np.arange(n)[:, None])
    held = gallery._core.state.generations[1].vectors
    assert isinstance(held, MemoryVectors) and len(held._more) <= 5
    assert gallery.vectors(np.array([0, n - 1]), "v2").tolist() == [[11] * 3, [n + 10] * 3]
    assert gallery.fraction == 1


def test_segments_by_the_dozen_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the engine takes only so many of them at once."""
    from fastcompat.serving import queries as searching

    rng = np.random.default_rng(0)
    n = 300_000
    old = rng.integers(-1, 2, (n, 4)).astype(np.float32)  # ties by the thousand
    gallery = fc.MixedGallery(old, model="v1", metric="ip")
    gallery.begin("v2")
    some = rng.permutation(n)[:3000]
    gallery.update(some, rng.integers(-1, 2, (3000, 4)).astype(np.float32))
    asked = {m: np.ones((3, 4), np.float32) for m in ("v1", "v2")}
    whole = gallery.search(asked, 500)
    monkeypatch.setattr(searching, "_segments_at_once", lambda _: 2)
    parts = gallery.search(asked, 500)
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
