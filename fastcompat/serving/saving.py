"""A gallery's whole state into a folder and out of it."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .._files import locked
from . import epoch, layout
from .changes import Change
from .conflicts import resolve
from .core import Core
from .ids import Ids, shown
from .journal import Folder, NewEpochError, stale
from .layout import DamagedError
from .state import Generation, State
from .vectors import MappedVectors, MemoryVectors, chunks


class Origin(NamedTuple):
    """A folder that an in-memory gallery was saved to or loaded from, and the history that it knows."""

    path: Path
    folder: Folder | None
    manifest: dict[str, Any]  # of format 1, which has no history


Origins = dict[Path, Origin]  # the latest one last


def create(path: Path, core: Core) -> None:
    """Write the state into a folder that holds no gallery."""
    path.mkdir(parents=True, exist_ok=True)
    with core.mutex, locked(path):
        if (path / layout.MANIFEST).exists():
            raise ValueError(f"`path` must hold no gallery: `{path}` does; open it, or name another folder")
        core.check_all()
        _write(path, core, number=0)


def _write(path: Path, core: Core, number: int) -> None:
    try:
        epoch.write(path, core.state, {"settings": core.settings}, epoch=number)
    except epoch.NonFiniteRowError as error:
        name = core.state.ids.at(np.array([error.item]))[0]
        raise ValueError(
            f"`{error.model}` must be finite: row {error.item} (item {shown(name)}) holds NaN or inf; repair "
            "or remove that row first"
        ) from None


def save(path: Path, core: Core, origins: Origins) -> None:
    """Bring the state into a folder: what changed, where it is the one of the last save or load; else all."""
    if core.folder is not None:
        raise ValueError("this gallery lives in a folder: `commit` it there, or write a `snapshot` elsewhere")
    path.mkdir(parents=True, exist_ok=True)
    path = path.resolve()
    with core.mutex:
        known, found = origins.get(path), _there(path)
        if known is not None and known.folder is None and found not in (None, known.manifest):
            raise stale(path)
        if known is not None and known.folder is not None and found is not None:
            if found.get("store") != known.folder.store.hex():
                raise stale(path)
            end = known.folder.end
            with suppress(NewEpochError):
                known.folder.catch_up()
            if path == next(reversed(origins)):
                _append(path, core)
            elif (known.folder.end, known.folder.epoch) == (end, found["epoch"]):
                _replace(path, core)
            else:
                raise stale(path)
        else:
            _replace(path, core)
        core.pending, core.keeps_changes = [], True
        origins.pop(path, None)
        origins[path] = Origin(path, Folder(path, writable=False), {})


def _replace(path: Path, core: Core) -> None:
    """Write all of the state, and let the files of what was there go."""
    core.check_all()
    with locked(path):
        found = _there(path)
        _write(path, core, number=0 if found is None else int(found.get("epoch", 0)) + 1)
        for entry in (found or {}).get("arrays", {}).values():  # of format 1
            name = str(entry["file"])
            if name.endswith(".fastcompat.npy") and "/" not in name:
                with suppress(OSError):  # what stays behind is only in the way
                    (path / name).unlink()


def _there(path: Path) -> dict[str, Any] | None:
    """The manifest of the gallery in this folder; only a missing one is none."""
    try:
        return layout.read_manifest(path)
    except FileNotFoundError:
        return None


def _append(path: Path, core: Core) -> None:
    """Do the changes of an in-memory gallery again, in the folder, and commit them."""
    other = Core.open(path, writable=True)
    try:
        for change in core.pending:
            _again(core, other, change)
        other.commit()
    finally:
        other.close()


def _again(core: Core, other: Core, change: Change) -> None:
    copy = Change(change.kind, change.model, change.ids, about=change.about)
    if change.kind in ("put", "add", "replace") and change.ids is not None:
        source, target = core.state.generation(change.model), other.state.generation(change.model)
        if source is None or target is None:
            return
        now = source.slots(change.items) == change.slots  # a later change brings the others
        if change.kind == "add":
            now[:] = change.slots >= 0
        ids, slots = change.ids[now], change.slots[now]
        there = other.state.find(ids) >= 0
        keep = ~there if change.kind == "add" else there
        if change.kind == "add" and there.any():
            warnings.warn(
                f"{int(there.sum())} items were added to `{other.folder_path()}` by another writer: "
                "theirs stay there",
                stacklevel=5,
            )
        ids, slots = ids[keep], slots[keep]
        vectors = core.attach(change.gid if change.gid is not None else -1)
        for some in chunks(len(ids), vectors.bytes):
            gid, fresh, crcs = other.write(target, vectors.read(slots[some]))
            part = Change(change.kind, change.model, ids[some], fresh, crcs, gid)
            items = other.state.find(ids[some]) if change.kind != "add" else np.empty(0, np.int64)
            other.do(part, items)
        return
    left = resolve(other.state, copy)
    if left is not None:
        if change.kind == "retire":
            generation = other.state.generation(change.model)
            copy.gid = None if generation is None else generation.gid
        other.do(copy, left)


def load(path: Path, device: torch.device) -> tuple[Core, Origin]:
    """The state of a folder with its vectors mapped, to be changed in memory."""
    core = Core.open(path, writable=False)
    folder = core.folder
    assert folder is not None
    core.folder, core.keeps_changes = None, True
    for g in core.state.generations:
        vectors = g.vectors
        if g.gid is None or vectors is None:
            continue
        assert isinstance(vectors, MappedVectors)
        if device.type == "cpu":
            core.adopt(g.gid, MemoryVectors(vectors, g.end))
        else:
            core.check(g)
            core.adopt(g.gid, MemoryVectors(vectors.rows(g.end)[: g.end].to(device), g.end))
        g.vectors = core.attach(g.gid)
    core.publish()
    path = path.resolve()
    return core, Origin(path, folder, {})


def damages(path: Path) -> list[str]:
    """All that is wrong with a folder, by name; [] = sound."""
    while True:
        try:
            core = Core.open(path, writable=False)
        except DamagedError as error:
            return [str(error)]
        folder = core.folder
        assert folder is not None
        try:
            found = folder.damages()
            for g in core.state.generations:
                for slots, crcs in core.unchecked.get(-1 if g.gid is None else g.gid, []):
                    found += [
                        str(layout.damaged(*core.describe(g, s))) for s in core.bad_rows(g, slots, crcs)
                    ]
        except DamagedError as error:
            found = [str(error)]
        finally:
            core.close()
        if not found or not folder.replaced():
            return found


def dump(core: Core) -> dict[str, Any]:
    """An in-memory gallery as arrays."""
    with core.mutex:
        core.check_all()
        state = core.state
        live = state.live_items()
        models: list[tuple[Any, ...]] = []
        for g in state.generations:
            slots = g.slots(live)
            has = slots >= 0
            kept = None if g.vectors is None else g.vectors.read(slots[has])
            models.append((g.name, g.serial, g.metadata, g.scale, g.offset, has, kept))
        names = state.ids.at(live)
        return {
            "settings": core.settings, "kind": state.ids.kind, "ids": names, "level": state.level[live],
            "next_serial": state.next_serial, "models": models,
        }  # fmt: skip


def undump(found: dict[str, Any]) -> Core:
    """The gallery that `dump` described."""
    names = found["ids"]
    if found["kind"] == "str":
        names = np.array(names.tolist(), object) if len(names) else np.empty(0, object)
    state = State(Ids.of(names, found["kind"]))
    core = Core(state, found["settings"])
    level = found["level"]
    for gid, (name, serial, metadata, scale, offset, has, values) in enumerate(found["models"]):
        g = Generation(name, serial, metadata, scale, offset)
        state.begin(g)
        if values is None:
            continue
        core.adopt(gid, MemoryVectors(values, len(values)))
        g.gid, g.vectors, g.clean = gid, core.attach(gid), False
        items = np.flatnonzero(has)
        g.place(items, np.arange(len(items)))
        g.end = len(items)
        counted = level[items] == serial
        g.mark(np.flatnonzero(counted), items[counted].astype(np.int32))
        g.count = int(counted.sum())
        state.remember(g, items, np.arange(len(items)))
    state.level[: len(level)] = level
    state.alive = len(level)
    state.next_serial = found["next_serial"]
    core.publish()
    return core
