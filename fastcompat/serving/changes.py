"""The changes of a gallery: what a journal's record says, and what it does to the state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import ids as ids_
from .state import REMOVED, Generation, State, Undo
from .vectors import MappedVectors, MemoryVectors

Array = np.ndarray[Any, Any]
Vectors = MappedVectors | MemoryVectors


@dataclass
class Change:
    """One change. `ids` names the items; a record of the journal has their numbers instead.

    kind: "begin", "add", "put" (a vector for items that there are), "replace" (their content changed: all
    other vectors go), "remove", "rollback", "retire".
    """

    kind: str
    model: str = ""
    ids: Array | None = None
    slots: Array = field(default_factory=lambda: np.empty(0, np.int64))
    crcs: Array = field(default_factory=lambda: np.empty(0, np.uint32))
    gid: int | None = None
    about: dict[str, Any] = field(default_factory=dict)  # of "begin": metadata, scale, offset
    undo: Undo | None = None
    items: Array = field(default_factory=lambda: np.empty(0, np.int64))  # as they were when it was applied

    def record(self, kind_of_ids: str) -> tuple[dict[str, Any], list[Array]]:
        """What the journal says of it."""
        what = {"kind": self.kind, "model": self.model, "gid": self.gid, "about": self.about}
        if self.kind in ("begin", "retire"):
            return what, []
        assert self.ids is not None
        named = [self.items.astype(np.int32)]
        if self.kind == "add":
            named = list(ids_.pack_text(self.ids)) if kind_of_ids == "str" else [self.ids]
        if self.kind in ("remove", "rollback"):
            return what, named
        return what, [*named, self.slots.astype(np.int32), self.crcs]


def from_record(what: dict[str, Any], arrays: list[Array], kind_of_ids: str) -> tuple[Change, Array]:
    """A change out of its record, and the item numbers (of "add": none)."""
    change = Change(what["kind"], what["model"], gid=what["gid"], about=what["about"])
    items = np.empty(0, np.int64)
    if change.kind == "add" and kind_of_ids == "str":
        ends, text, *rest = arrays
        change.ids = ids_.unpack_text(ends, text, np.arange(len(ends) - 1))
    elif change.kind == "add":
        change.ids, *rest = arrays
    elif change.kind in ("begin", "retire"):
        return change, items
    else:
        items, *rest = arrays
        items = items.astype(np.int64)
    if rest:
        change.slots, change.crcs = rest[0].astype(np.int64), rest[1]
    return change, items


def count_of_arrays(what: dict[str, Any], kind_of_ids: str) -> int:
    """How many arrays a change's record has."""
    if what["kind"] in ("begin", "retire"):
        return 0
    if what["kind"] in ("remove", "rollback"):
        return 1
    return 4 if what["kind"] == "add" and kind_of_ids == "str" else 3


def apply(state: State, change: Change, items: Array, attach: Callable[[int], Vectors]) -> None:
    """Do it, and keep how to take it back."""
    canaries = [(g, g.canaries) for g in state.generations]
    done: list[Undo] = []

    def undo() -> None:
        for step in reversed(done):
            step()
        for g, kept in canaries:
            g.canaries = kept

    change.undo, change.items = undo, items
    generation = state.generation(change.model)
    if change.kind == "begin":
        it = change.about
        generation = Generation(change.model, state.next_serial, it["metadata"], it["scale"], it["offset"])
        done.append(state.begin(generation))
    elif change.kind == "remove":
        done.append(state.set(items, REMOVED, {g.serial: -1 for g in state.generations}))
        state.forget(items)
    elif change.kind == "retire":
        assert generation is not None
        done.append(state.retire(generation))
    elif change.kind == "rollback":
        assert generation is not None
        newer = state.generations[state.generations.index(generation) + 1 :]
        done.append(state.set(items, generation.serial, {g.serial: -1 for g in newer}))
    else:
        assert generation is not None
        _put(state, change, generation, attach, done)


def _put(
    state: State, change: Change, generation: Generation, attach: Callable[[int], Vectors], done: list[Undo]
) -> None:
    if generation.vectors is None and change.gid is not None:
        before = generation.gid
        generation.gid, generation.vectors = change.gid, attach(change.gid)

        def let_go() -> None:
            generation.gid, generation.vectors = before, None

        done.append(let_go)
    if change.kind == "add":
        assert change.ids is not None
        change.items, added = state.append(change.ids)
        done.append(added)
    slots: dict[int, Any] = {generation.serial: change.slots}
    levels: Any = generation.serial
    if change.kind == "put":  # an item that has a newer vector by now keeps it
        levels = np.maximum(state.level[change.items], generation.serial)
    if change.kind == "replace":
        slots = {g.serial: -1 for g in state.generations} | slots
        state.forget(change.items)
    done.append(state.set(change.items, levels, slots))
    state.remember(generation, change.items, change.slots)
