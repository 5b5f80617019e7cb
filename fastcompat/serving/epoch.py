"""An epoch of a folder: written whole by `create`, `save`, `snapshot` and `compact`, read at opening."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from . import layout
from .ids import Ids
from .journal import Folder
from .layout import Head
from .state import Generation, Part, State
from .vectors import NAMES, PART, checksums, chunks, raw

Array = np.ndarray[Any, Any]


class NonFiniteRowError(ValueError):
    """A vector to be written holds NaN or inf: its model and item."""

    def __init__(self, model: str, item: int) -> None:
        super().__init__(f"NaN or inf in the vector of item {item} in `{model}`")
        self.model, self.item = model, item


def write(
    path: Path,
    state: State,
    values: Mapping[str, Any],
    *,
    epoch: int,
    store: bytes | None = None,
    ancestors: Sequence[Any] = (),
) -> None:
    """Write the state into new files of the folder and, last of all, the manifest that names them.

    Items are numbered anew in their order; a slot is written for each vector that an item still has. The
    caller holds the folder's lock. Whatever goes wrong, the folder holds what it held.
    """
    store = store or uuid.uuid4().bytes
    live = state.live_items()
    number = np.full(state.used, -1, np.int32)
    number[live] = np.arange(len(live), dtype=np.int32)
    written: list[Path] = []
    try:
        arrays: dict[str, Array] = {"level": state.level[live]}
        plain = state.ids.plain is not None and len(live) == state.used == state.ids.plain
        if not plain:
            every = state.ids.at(live)
            if state.ids.kind == "str":
                every = np.array(every.tolist(), object) if len(every) else np.empty(0, object)
            arrays |= Ids.arrays(every, state.ids.kind)
        generations = []
        for g in state.generations:
            about: dict[str, Any] = {
                "name": g.name, "serial": g.serial, "metadata": g.metadata, "scale": g.scale,
                "offset": g.offset, "gid": None, "canaries": [],
            }  # fmt: skip
            generations.append(about)
            if g.vectors is None:
                continue
            about["gid"] = g.serial
            slots = g.slots(live)
            has = np.flatnonzero(slots >= 0)
            extra: list[int] = []  # canaries' first vectors, where the item has another one by now
            for item, slot in g.canaries:
                if number[item] < 0:
                    continue
                at = int(np.searchsorted(has, number[item]))
                if at == len(has) or slots[has[at : at + 1]] != [slot]:
                    at = len(has) + len(extra)
                    extra.append(slot)
                about["canaries"].append([int(number[item]), at])
            arrays[f"items-{g.serial}"] = np.append(has, [-1] * len(extra)).astype(np.int32)
            file = path / f"vectors-{epoch}-{g.serial}.fcg"
            written.append(file)
            every_slot = np.append(slots[has], extra).astype(np.int64)
            arrays[f"crc-{g.serial}"] = _write_vectors(file, g, every_slot, live[has])
            about |= {"width": g.vectors.width, "dtype": NAMES[g.vectors.dtype], "slots": len(every_slot)}
        files = {name: f"{name}-{epoch}.fcg" for name in ("head", "journal", "base")}
        written += [path / file for file in files.values()]
        base = layout.write_base(path / files["base"], arrays)
        start = layout.genesis(store, epoch)
        layout.write_file(path / files["journal"], start)
        head = layout.head_slot(Head(1, epoch, len(start), start[-16:]))
        layout.write_file(path / files["head"], head.ljust(layout.HEAD_PLACES[1], b"\0") + head)
        layout.sync_folder(path)
        manifest = {
            "format": layout.FORMAT, "version": layout.VERSION, "store": store.hex(), "epoch": epoch,
            "ancestors": list(ancestors), "ids": state.ids.kind, "plain": len(live) if plain else None,
            "items": len(live), "generations": generations, "next_gid": state.next_serial,
            "next_serial": state.next_serial, "base": base, "head": files["head"],
            "journal": files["journal"], **values,
        }  # fmt: skip
        layout.write_manifest(path, manifest)
        layout.put_manifest(path)
    except BaseException:
        if not _may_count(path, store, epoch):
            for file in [*written, path / (layout.MANIFEST + ".new")]:
                with suppress(OSError):
                    file.unlink()
        raise
    kept = {layout.MANIFEST, *files.values()}
    kept |= {f"vectors-{epoch}-{g['gid']}.fcg" for g in generations if g["gid"] is not None}
    with suppress(OSError):  # what stays behind goes with the next epoch
        layout.remove_others(path, kept)


def _may_count(path: Path, store: bytes, epoch: int) -> bool:
    """Whether the manifest of this epoch may be in its place; also where that cannot be found out."""
    try:
        found = layout.read_manifest(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return (found.get("store"), found.get("epoch")) == (store.hex(), epoch)


def _write_vectors(file: Path, g: Generation, slots: Array, items: Array) -> Array:
    """Write these slots' vectors one after another; their checksums."""
    assert g.vectors is not None
    crcs = np.empty(len(slots), np.uint32)
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for some in chunks(len(slots), g.vectors.bytes):
            values = g.vectors.read(slots[some])
            if not g.clean:
                bad = ~values.isfinite().all(1)
                if bad.any():
                    raise NonFiniteRowError(g.name, int(items[some.start + int(bad.nonzero()[0])]))
            rows = raw(values)
            crcs[some] = checksums(rows)
            layout.write_at(handle, rows.reshape(-1).data, some.start * g.vectors.bytes)
        os.fsync(handle)
    finally:
        os.close(handle)
    return crcs


def read(folder: Folder) -> tuple[State, dict[int, list[tuple[Array | None, Array]]]]:
    """The state that the folder's epoch began with, and per file the checksums of its rows."""
    m, base = folder.manifest, folder.base
    ids = Ids(m["ids"], base, plain=m["plain"])
    state = State(ids)
    state.level[:] = base["level"]
    state.next_serial = m["next_serial"]
    state.alive = len(state.level)
    unchecked: dict[int, list[tuple[Array | None, Array]]] = {}
    for about in m["generations"]:
        g = Generation(about["name"], about["serial"], about["metadata"], about["scale"], about["offset"])
        state.begin(g)
        if about["gid"] is None:
            continue
        g.gid, g.vectors = about["gid"], folder.vectors(about["gid"])
        items = base[f"items-{g.serial}"]
        g.end = len(items)
        g.canaries = [(item, slot) for item, slot in about["canaries"]]
        g.slot_of = np.full(len(ids), -1, np.int32)
        for first in range(0, len(items), PART):
            its = items[first : first + PART]
            has = np.flatnonzero(its >= 0)
            g.slot_of[its[has]] = has + first
            counts = np.full(PART, -1, np.int32)
            counted = has[state.level[its[has]] == g.serial]
            counts[counted] = its[counted]
            g.parts.append(Part(counts))
            g.count += len(counted)
        unchecked[about["gid"]] = [(None, base[f"crc-{g.serial}"])]
    return state, unchecked
