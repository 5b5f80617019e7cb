"""A gallery's state with its changes: at once in this object, in the folder with `commit`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._files import locked
from . import changes, epoch, layout
from .changes import Change
from .conflicts import ConflictError, resolve
from .ids import Ids, shown
from .journal import Folder, NewEpochError, StaleError
from .state import Generation, Part, State
from .vectors import PART, MappedVectors, MemoryVectors, checksums, chunks, raw

Array = np.ndarray[Any, Any]
RESERVED = 64  # slots that are taken at once, at least


class View(NamedTuple):
    """What one search sees."""

    state: State
    renumbered: int
    parts: list[tuple[Generation, changes.Vectors | None, list[Part]]]


class Core:
    """State, files and uncommitted changes. `folder` is None in memory; `settings` go into the manifest."""

    def __init__(self, state: State, settings: dict[str, Any], folder: Folder | None = None) -> None:
        self.state, self.settings, self.folder = state, settings, folder
        self.mutex = threading.RLock()
        self.pending: list[Change] = []
        self.keeps_changes = folder is not None  # in memory: once there is a folder to bring them to
        self.renumbered = 0
        self._memory: dict[int, MemoryVectors] = {}
        self._free: dict[tuple[str, int, torch.dtype], tuple[int, int, int]] = {}  # gid, next slot, end
        self._dirty: set[int] = set()  # files with vectors that are not on the disk yet
        self._held = 0
        self._retired: set[int | None] = set()  # files to be removed once that is committed
        self._checking = threading.Lock()
        self.unchecked: dict[int, list[tuple[Array | None, Array]]] = {}
        self.view = View(state, 0, [])
        self.publish()

    @classmethod
    def open(cls, path: Path, *, writable: bool) -> Core:
        """The gallery of a folder, all that is committed."""
        while True:
            folder = Folder(path, writable=writable)
            try:
                core = cls(State(Ids("int64", {}, plain=0)), dict(folder.manifest["settings"]), folder)
                core._load()
                return core
            except NewEpochError:
                folder.close()
            except BaseException:
                folder.close()
                raise

    def _load(self) -> None:
        assert self.folder is not None
        self.state, self.unchecked = epoch.read(self.folder)
        self._free, self._dirty = {}, set()
        self._replay()
        self._refuse_missing()
        self.publish()

    def _refuse_missing(self) -> None:
        assert self.folder is not None
        for g in self.state.generations:
            if isinstance(g.vectors, MappedVectors) and g.gid is not None:
                self.folder.refuse_missing(g.gid)

    def publish(self) -> None:
        """From now on searches see the state of now."""
        self.view = View(self.state, self.renumbered, self.state.publish())

    # --- changes

    def attach(self, gid: int) -> changes.Vectors:
        """The vectors of this number."""
        return self._memory[gid] if gid in self._memory else self._folder().vectors(gid)

    def _folder(self) -> Folder:
        assert self.folder is not None
        return self.folder

    def folder_path(self) -> Path:
        """Where the gallery lives."""
        return self._folder().path

    def do(self, change: Change, items: Array) -> None:
        """A change of this gallery, visible at once."""
        changes.apply(self.state, change, items, self.attach)
        if change.kind == "retire":
            self._retired.add(change.gid)
        if self.folder is None:
            change.undo = None
        if self.keeps_changes:
            self.pending.append(change)
        self.publish()

    def write(self, generation: Generation, values: Tensor) -> tuple[int, Array, Array]:
        """Vectors [M, D] into fresh slots, which count with nothing yet: gid, slots [M] and checksums [M]."""
        if self.folder is None:
            gid, slots = self._write_in_memory(generation, values)
            return gid, slots, np.empty(0, np.uint32)
        name, width, dtype = generation.name, values.shape[1], values.dtype
        gid, slots = self._reserved(name, width, dtype, len(values))
        rows = raw(values)
        vectors = self.folder.vectors(gid)
        try:
            vectors.write(slots, rows)
        except OSError:
            self._free.clear()
            with suppress(OSError, ValueError), self._locked():
                self._caught_up()
                self._folder().give_back(gid, int(slots[0]))
            raise
        self._dirty.add(gid)
        return gid, slots, checksums(rows)

    def _reserved(self, name: str, width: int, dtype: torch.dtype, count: int) -> tuple[int, Array]:
        key = name, width, dtype
        gid, first, end = self._free.get(key, (-1, 0, 0))
        if count > end - first:
            with self._locked():
                self._caught_up()
                folder = self._folder()
                gid, first = folder.reserve(name, width, dtype, max(count, RESERVED))
                end = first + max(count, RESERVED)
        self._free[key] = gid, first + count, end
        return gid, np.arange(first, first + count)

    def _write_in_memory(self, generation: Generation, values: Tensor) -> tuple[int, Array]:
        gid = generation.gid
        if gid is None:
            gid = max(self._memory, default=-1) + 1
            self.adopt(gid, MemoryVectors(values[:0], 0))
        elif self._memory[gid].crowded(generation.slot_of):
            self._reclaim(generation, gid)
        return gid, self._memory[gid].put(values)

    def _reclaim(self, generation: Generation, gid: int) -> None:
        """Copy what is still used of the vectors of updates; searches under way keep the old ones."""
        old = self._memory[gid]
        items = np.flatnonzero(generation.slot_of >= old.first)
        before = generation.slot_of[items].astype(np.int64)
        fresh = old.emptied()
        after = np.concatenate([fresh.put(old.read(before[some])) for some in chunks(len(before), old.bytes)])
        self._memory[gid] = generation.vectors = fresh
        generation.slot_of[items] = after
        counted = self.state.level[items] == generation.serial
        del generation.parts[old.first // PART :]
        generation.mark(after[counted], items[counted].astype(np.int32))
        moved = dict(zip(before.tolist(), after.tolist(), strict=True))
        for change in self.pending:
            if change.gid == gid:
                change.slots = np.array(
                    [moved.get(s, s if s < old.first else -1) for s in change.slots.tolist()]
                )
        generation.canaries = [
            (i, moved.get(s, s)) for i, s in generation.canaries if s in moved or s < old.first
        ]

    def adopt(self, gid: int, vectors: MemoryVectors) -> None:
        """Vectors in memory under this number."""
        self._memory[gid] = vectors

    # --- what others commit

    def refresh(self) -> None:
        """See what others committed since."""
        if self.folder is None or not self.folder.moved():
            return
        with self.mutex:
            try:
                self._caught_up()
            except StaleError:
                if self.folder.writable:
                    raise
                self._reopen()
            self._replay()
            self.publish()

    def _caught_up(self) -> None:
        try:
            self._folder().catch_up()
        except NewEpochError:
            self._reopen()

    def _reopen(self) -> None:
        """Load the folder anew and do the uncommitted changes again, in its new files."""
        old, pending = self._folder(), self.pending
        values = [self._vectors_of(change) for change in pending]
        while True:
            folder = Folder(old.path, writable=old.writable)
            self.folder, self.pending = folder, []
            try:
                self._load()
                break
            except NewEpochError:
                folder.close()
        self.settings = dict(folder.manifest["settings"])
        with self._locked() if pending else _nothing():
            for change, read in zip(pending, values, strict=True):
                if read is not None:
                    parts = [
                        self.write(Generation(change.model, 0), read(some))
                        for some in chunks(len(change.slots), 1)
                    ]
                    change.gid = parts[0][0] if parts else None
                    change.slots = np.concatenate([part[1] for part in parts]) if parts else change.slots
                self.pending.append(change)
            self._redo()
        old.close()
        self.publish()

    def _vectors_of(self, change: Change) -> Callable[[slice], Tensor] | None:
        if change.gid is None:
            return None
        vectors, slots = self.attach(change.gid), change.slots
        if isinstance(vectors, MappedVectors) and len(slots):
            vectors.rows(int(slots.max()) + 1)  # mapped, it stays readable
        return lambda some: vectors.read(slots[some])

    def _replay(self) -> None:
        """Apply what is queued before the uncommitted changes of this gallery."""
        folder = self._folder()
        if not folder.queue:
            return
        self._undo()
        kind, retired = self.state.ids.kind, set[int | None]()
        for record in folder.queued():
            arrays = list(record.arrays)
            for what in record.what["changes"]:
                count = changes.count_of_arrays(what, kind)
                change, items = changes.from_record(what, arrays[:count], kind)
                arrays = arrays[count:]
                changes.apply(self.state, change, items, self.attach)
                if change.kind == "retire":
                    retired.add(change.gid)
                if change.gid is not None and len(change.slots):
                    self.unchecked.setdefault(change.gid, []).append(
                        (change.slots.astype(np.int32), change.crcs)
                    )
        self._forget_files(retired)
        self._redo()
        self._refuse_missing()

    def _undo(self) -> None:
        for change in reversed(self.pending):
            if change.undo is not None:
                change.undo()
                change.undo = None
                if change.kind == "add":
                    self.renumbered += 1

    def _redo(self) -> None:
        kept, refused = [], None
        for change in self.pending:
            try:
                items = resolve(self.state, change)
            except ConflictError as error:
                refused = refused or error
                continue
            if items is None:
                continue
            changes.apply(self.state, change, items, self.attach)
            kept.append(change)
        self.pending = kept
        if refused is not None:
            self.publish()
            raise refused

    # --- commit

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder; within this thread as often as it likes."""
        with self.mutex:
            if self._held:
                yield
                return
            with locked(self._folder().path):
                self._held = 1
                try:
                    yield
                finally:
                    self._held = 0

    def commit(self) -> None:
        """Bring the changes into the folder: vectors, then the record, then the head."""
        with self.mutex:
            if not self.pending:
                return
            self._sync()  # the long part, while others may commit
            with self._locked():
                self._caught_up()
                self._replay()
                self._sync()
                folder, kind = self._folder(), self.state.ids.kind
                what, arrays = [], []
                for change in self.pending:
                    said, its = change.record(kind)
                    what.append(said)
                    arrays += its
                if what:
                    self._commit(folder, {"changes": what}, arrays)
                self._drop_retired()
            self.publish()

    def _commit(self, folder: Folder, what: dict[str, Any], arrays: list[Array]) -> None:
        number = folder.number
        try:
            folder.commit(what, arrays)
        finally:
            if folder.number > number:  # also where it was interrupted afterwards
                done, self.pending = self.pending, []
                for change in done:
                    change.undo = None

    def _forget_files(self, gids: set[int | None]) -> set[int]:
        """Of these, files that no model has any more: nothing is written to them again."""
        gone = {gid for gid in gids if gid is not None} - {g.gid for g in self.state.generations}
        for gid in gone:
            self._folder().files.pop(gid, None)
        self._free = {key: held for key, held in self._free.items() if held[0] not in gone}
        return gone

    def _drop_retired(self) -> None:
        """The files of models that this gallery retired go."""
        for gid in self._forget_files(self._retired):
            self._folder().drop_file(gid)
        self._retired.clear()

    def _sync(self) -> None:
        for gid in sorted(self._dirty):
            self._folder().vectors(gid).sync()
        self._dirty.clear()

    # --- whole epochs

    def compact(self) -> None:
        """Commit, and write what is left into new files."""
        self.commit()
        self.check_all()
        with self._locked():
            self._caught_up()
            self._replay()
            self.check_all()
            folder = self._folder()
            ancestors = [*folder.manifest["ancestors"], [folder.epoch, folder.end, folder.last.hex()]]
            epoch.write(
                folder.path,
                self.state,
                {"settings": self.settings},
                epoch=folder.epoch + 1,
                store=folder.store,
                ancestors=ancestors,
            )
            self._reopen()

    # --- checksums

    def check(self, generation: Generation) -> None:
        """Every row of this model that is read for the first time is what was written."""
        gid = generation.gid
        if gid is None or not self.unchecked.get(gid):
            return
        with self._checking:
            left = self.unchecked.get(gid, [])
            while left:
                slots, crcs = left[0]
                for bad in self.bad_rows(generation, slots, crcs):
                    raise layout.damaged(*self.describe(generation, bad))
                left.pop(0)

    def bad_rows(self, generation: Generation, slots: Array | None, crcs: Array) -> Iterator[int]:
        """The slots, of those that some item has, whose bytes are not those that were written."""
        vectors = generation.vectors
        assert vectors is not None
        for some in chunks(len(crcs), vectors.bytes):
            which = np.arange(some.start, some.stop) if slots is None else slots[some].astype(np.int64)
            contiguous = slots is None or (
                int(which[-1]) - int(which[0]) == len(which) - 1 and (np.diff(which) == 1).all()
            )
            if contiguous and isinstance(vectors, MappedVectors):
                values = vectors.rows(int(which[-1]) + 1)[int(which[0]) : int(which[-1]) + 1]
            else:
                values = vectors.read(which)
            wrong = np.flatnonzero(checksums(raw(values)) != crcs[some])
            for slot in which[wrong].tolist():
                if self.item_of(generation, slot) is not None:
                    yield slot

    def item_of(self, generation: Generation, slot: int) -> int | None:
        """The item whose vector, or canary, this slot holds."""
        found = np.flatnonzero(generation.slot_of == slot)
        if len(found):
            return int(found[0])
        return next((item for item, its in generation.canaries if its == slot), None)

    def describe(self, generation: Generation, slot: int) -> tuple[Path, str]:
        """File and row of a slot, in words."""
        item = self.item_of(generation, slot)
        name = self.state.ids.at(np.array([item]))[0] if item is not None else None
        path = self._file_of(generation)
        return path, f"row {slot}, the vector of item {shown(name)} in model `{generation.name}`"

    def _file_of(self, generation: Generation) -> Path:
        vectors = generation.vectors
        if isinstance(vectors, MemoryVectors):
            vectors = vectors.mapped
        assert vectors is not None
        return vectors.path

    def check_all(self) -> None:
        """`check` of every model."""
        for generation in list(self.state.generations):
            self.check(generation)

    def close(self) -> None:
        """Let the files go."""
        with self.mutex:
            if self.folder is not None:
                self.folder.close()
                self.state = State(Ids("int64", {}, plain=0))
                self.publish()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
