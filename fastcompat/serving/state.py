"""What a gallery holds at a moment: its items, its models, and which vector every item counts with.

Nothing here knows files. Every change is one call of `State.set`, which returns how to take it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .ids import Ids
from .vectors import PART, MappedVectors, MemoryVectors

Array = np.ndarray[Any, Any]
Undo = Callable[[], None]

REMOVED = -1
MOST_ITEMS = 2**31 - 1
CANARIES = 32


class Part:
    """Which item counts with each slot of a part: int32 [PART], -1: none. Never changed once seen."""

    def __init__(self, items: Array) -> None:
        self.items = items
        self.searched = False
        self._copy: tuple[Tensor, Tensor] | None = None

    @cached_property
    def alive(self) -> int:
        """How many slots count."""
        return int(np.count_nonzero(self.items >= 0))

    @cached_property
    def rows(self) -> Tensor:
        """The slots that count, as rows of the part."""
        return torch.from_numpy(np.flatnonzero(self.items >= 0))

    def rows_on(self, device: torch.device) -> Tensor:
        """`rows` on this device."""
        return self.rows if device.type == "cpu" else self._on(device)[1]

    def items_on(self, device: torch.device) -> Tensor:
        """`items` on this device."""
        return torch.from_numpy(self.items) if device.type == "cpu" else self._on(device)[0]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if self._copy is None or self._copy[0].device != device:
            self._copy = torch.from_numpy(self.items).to(device), self.rows.to(device)
        return self._copy

    @cached_property
    def end(self) -> int:
        """One past the last slot that counts."""
        if not len(self.items) or self.items[-1] >= 0:
            return len(self.items)
        rows = np.flatnonzero(self.items >= 0)
        return int(rows[-1]) + 1 if len(rows) else 0


class Generation:
    """The vectors of one model: `slot_of` item -> slot (-1: none), `parts` slot -> item that counts."""

    def __init__(
        self,
        name: str,
        serial: int,
        metadata: Mapping[str, Any] | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        self.name, self.serial = name, serial
        self.metadata, self.scale, self.offset = dict(metadata or {}), scale, offset
        self.gid: int | None = None  # the number of its file
        self.vectors: MappedVectors | MemoryVectors | None = None
        self.slot_of = np.empty(0, np.int32)
        self.parts: list[Part] = []
        self.own: set[int] = set()  # parts that nobody else has seen
        self.count = 0  # items that count with it
        self.end = 0  # one past the last slot that was ever put
        self.canaries: list[tuple[int, int]] = []  # (item, slot): its first vectors, to know the model again
        self.clean = True  # every slot that was put is finite

    def slots(self, items: Array) -> Array:
        """The slot of each item; -1 where it has none."""
        found = np.full(len(items), -1, np.int64)
        known = items < len(self.slot_of)
        found[known] = self.slot_of[items[known]]
        return found

    def place(self, items: Array, slots: Array) -> None:
        """The items' slots from now on."""
        if not len(items):
            return
        most = int(items.max()) + 1
        if most > len(self.slot_of):
            if not (slots >= 0).any():  # it has none of them anyway
                known = items < len(self.slot_of)
                self.slot_of[items[known]] = -1
                return
            more = np.full(max(most, len(self.slot_of) * 5 // 4, 1024), -1, np.int32)
            more[: len(self.slot_of)] = self.slot_of
            self.slot_of = more
        self.slot_of[items] = slots

    def mark(self, slots: Array, items: Array | int) -> None:
        """Which items count with these slots (-1: none any more)."""
        numbers = slots // PART
        for number in np.unique(numbers).tolist():
            while len(self.parts) <= number:
                self.own.add(len(self.parts))
                self.parts.append(Part(np.full(PART, -1, np.int32)))
            mine = numbers == number
            part = Part(self.parts[number].items if number in self.own else self.parts[number].items.copy())
            part.items[slots[mine] % PART] = items if isinstance(items, int) else items[mine]
            self.own.add(number)
            self.parts[number] = part


class State:
    """Items and generations. `level` [items] int8: the serial of the generation an item counts with."""

    def __init__(self, ids: Ids) -> None:
        self.ids = ids
        self.level = np.full(len(ids), REMOVED, np.int8)
        self.used = len(ids)  # entries of `level`
        self.generations: list[Generation] = []
        self.next_serial = 0
        self.alive = 0  # items not removed

    def generation(self, name: str) -> Generation | None:
        """The generation of this name."""
        return next((g for g in self.generations if g.name == name), None)

    def of_serial(self, serial: int) -> Generation | None:
        """The generation of this serial."""
        return next((g for g in self.generations if g.serial == serial), None)

    def find(self, ids: Array) -> Array:
        """Item numbers; -1 for ids that are unknown or removed."""
        items = self.ids.find(ids)
        known = items >= 0
        items[known] = np.where(self.level[items[known]] == REMOVED, -1, items[known])
        return items

    def set(self, items: Array, levels: Array | int, slots: Mapping[int, Array | int]) -> Undo:
        """From now on these items have these levels, and these slots in these generations (by serial)."""
        before = self.level[items].copy()
        touched = [g for g in self.generations if g.serial in slots]
        kept = {g.serial: g.slots(items) for g in touched}
        after = np.broadcast_to(np.asarray(levels, np.int8), len(items))
        ends = {g.serial: (g.end, list(g.canaries)) for g in touched}
        self._move(
            items, before, after, {g.serial: np.broadcast_to(slots[g.serial], len(items)) for g in touched}
        )

        def undo() -> None:
            self._move(items, self.level[items].copy(), before, kept)
            for g in touched:
                g.end, g.canaries = ends[g.serial]

        return undo

    def _move(self, items: Array, before: Array, after: Array, slots: Mapping[int, Array]) -> None:
        for g in self.generations:
            mine = before == g.serial
            if mine.any():
                g.mark(g.slots(items[mine]), -1)
                g.count -= int(mine.sum())
        for serial, where in slots.items():
            g_ = self.of_serial(serial)
            assert g_ is not None
            g_.place(items, where)
            if len(where):
                g_.end = max(g_.end, int(where.max()) + 1)
        self.level[items] = after
        for g in self.generations:
            mine = after == g.serial
            if mine.any():
                g.mark(g.slots(items[mine]), items[mine].astype(np.int32))
                g.count += int(mine.sum())
        self.alive += int(np.count_nonzero(after != REMOVED)) - int(np.count_nonzero(before != REMOVED))

    def append(self, ids: Array) -> tuple[Array, Undo]:
        """New items with these ids, which count with nothing yet."""
        first = len(self.ids)
        if first + len(ids) > MOST_ITEMS:
            raise ValueError(
                f"a gallery holds at most 2**31 - 1 items: got {first + len(ids)}; "
                "share them out over several galleries (fc.ShardedGallery) and merge what they find"
            )
        items = self.ids.append(ids)
        if first + len(ids) > len(self.level):
            more = np.full(max(first + len(ids), len(self.level) * 5 // 4, 1024), REMOVED, np.int8)
            more[:first] = self.level[:first]
            self.level = more
        self.level[first : first + len(ids)] = REMOVED
        self.used = len(self.ids)

        def undo() -> None:
            self.ids.cut(first)
            self.used = first

        return items, undo

    def begin(self, generation: Generation) -> Undo:
        """A further, newest generation."""
        self.generations.append(generation)
        self.next_serial = max(self.next_serial, generation.serial + 1)
        return lambda: self.generations.remove(generation)

    def retire(self, generation: Generation) -> Undo:
        """A generation that nothing counts with is gone, and its vectors with it."""
        at = self.generations.index(generation)
        self.generations.remove(generation)
        return lambda: self.generations.insert(at, generation)

    def remember(self, generation: Generation, items: Array, slots: Array) -> None:
        """The first vectors of a generation are kept to know its model again."""
        room = CANARIES - len(generation.canaries)
        if room > 0:
            known = {item for item, _ in generation.canaries}
            fresh = [
                (int(i), int(s))
                for i, s in zip(items[:room], slots[:room], strict=True)
                if int(i) not in known
            ]
            generation.canaries = generation.canaries + fresh

    def forget(self, items: Array) -> None:
        """Their content changed or they are gone: they can be no canaries."""
        gone = set(items.tolist()) if len(items) else set()
        for g in self.generations:
            if g.canaries:
                g.canaries = [(item, slot) for item, slot in g.canaries if item not in gone]

    def publish(self) -> list[tuple[Generation, Any, list[Part]]]:
        """What a search sees: from now on these parts are copied before they change."""
        for g in self.generations:
            g.own.clear()
        return [(g, g.vectors, list(g.parts)) for g in self.generations]

    def live_items(self) -> Array:
        """The items that were not removed, in the order of addition."""
        return np.flatnonzero(self.level[: self.used] != REMOVED)
