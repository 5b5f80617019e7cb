"""The folder of a gallery as one process sees it: its lock, its journal, and who may go on writing to it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import layout
from .layout import DamagedError, Head, Record
from .vectors import DTYPES, NAMES, MappedVectors


class NewEpochError(Exception):
    """The folder was compacted since: what this process knew was part of what was compacted."""


class StaleError(ValueError):
    """The folder holds another history than the one this process saw."""


class Folder:
    """Journal and files of one epoch. `end`: how far this process has read; `queue`: not applied yet."""

    def __init__(self, path: Path, *, writable: bool) -> None:
        self.path, self.writable = path, writable
        self._handles: list[int] = []
        self._vectors: dict[int, MappedVectors] = {}
        self._poll: tuple[Any, ...] = ()
        while True:
            stamp = self._stamp()
            self.manifest = layout.read_manifest(path)
            if self.manifest["version"] != layout.VERSION:
                raise ValueError(
                    f"`path` holds format 1, which `load` opens and `save` writes anew: `{path}`; write "
                    "MixedGallery.load(path).save(path) once"
                )
            try:
                self._open()
            except FileNotFoundError as error:
                self.close()
                if self._stamp() != stamp:
                    continue  # compacted meanwhile
                raise layout.damaged(Path(error.filename or path), "it is missing") from None
            except BaseException:
                self.close()
                raise
            self._seen = stamp
            return

    def _open(self) -> None:
        m, mode = self.manifest, os.O_RDWR if self.writable else os.O_RDONLY
        self.store, self.epoch = bytes.fromhex(m["store"]), int(m["epoch"])
        self._head, self._journal = self.path / m["head"], self.path / m["journal"]
        self.base = layout.map_base(self.path, m["base"])
        for file in (self._head, self._journal):
            self._handles.append(os.open(file, mode))
        start = layout.read_at(self.journal, layout.GENESIS.size, 0)
        if start != layout.genesis(self.store, self.epoch):
            raise layout.damaged(self._journal, "its first bytes")
        self.end, self.number, self.last = len(start), 0, start[-16:]
        self._last_at = 0
        self.queue: list[
            tuple[int, int, bytes]
        ] = []  # where a record that counts starts, its number, the one before
        self.files: dict[
            int, dict[str, Any]
        ] = {}  # per gid: name, width, dtype, end (of the slots that are taken)
        for g in m["generations"]:
            if g["gid"] is not None:
                self.files[g["gid"]] = {k: g[k] for k in ("name", "width", "dtype")} | {"end": g["slots"]}
        self.next_gid = int(m["next_gid"])
        self._read_on()

    @property
    def head(self) -> int:
        """The head's file handle."""
        return self._handles[0]

    @property
    def journal(self) -> int:
        """The journal's file handle."""
        return self._handles[1]

    def close(self) -> None:
        """Let head and journal go; the vectors' files close when nobody holds them any more."""
        for handle in self._handles:
            with suppress(OSError):
                os.close(handle)
        self._handles = []
        self._vectors = {}

    def __del__(self) -> None:
        self.close()

    # --- reading

    def _stamp(self) -> tuple[int, int, int]:
        found = os.stat(self.path / layout.MANIFEST)
        return found.st_ino, found.st_mtime_ns, found.st_size

    def replaced(self) -> bool:
        """Whether another epoch has come since."""
        return self._stamp() != self._seen

    def moved(self) -> bool:
        """Whether somebody committed since the last `catch_up`; two system calls."""
        now = (self._stamp(), layout.read_at(self.head, layout.HEAD_PLACES[1] + layout.HEAD.size, 0))
        return now != self._poll

    def catch_up(self) -> None:
        """Queue what others committed. NewEpochError: load anew; StaleError: this is another history."""
        poll = (self._stamp(), layout.read_at(self.head, layout.HEAD_PLACES[1] + layout.HEAD.size, 0))
        if poll[0] != self._seen:
            self._manifest_changed(poll[0])
        self._refuse_another_history()
        self._read_on()
        self._poll = poll

    def _manifest_changed(self, stamp: tuple[int, int, int]) -> None:
        m = layout.read_manifest(self.path)
        if m.get("store") == self.store.hex() and m["epoch"] == self.epoch:
            same = all(
                os.stat(self.path / m[name]).st_ino == os.fstat(handle).st_ino
                for name, handle in zip(("head", "journal"), self._handles, strict=True)
            )
            if same and m == self.manifest:
                self._seen = stamp
                return
        if m.get("store") == self.store.hex() and m["epoch"] > self.epoch:
            for epoch, length, last in m["ancestors"]:
                if epoch == self.epoch and self._leads_to(length, bytes.fromhex(last)):
                    raise NewEpochError
        raise stale(self.path)

    def _leads_to(self, length: int, last: bytes) -> bool:
        """Whether the old journal goes on from here to this digest: the new epoch holds what was seen."""
        at, number, before = self.end, self.number, self.last
        while at < length:
            record = layout.decode(self.journal, at, length, number, before)
            if record is None:
                return False
            at, number, before = record.end, number + 1, record.last
        return at == length and before == last

    def _refuse_another_history(self) -> None:
        size = os.fstat(self.journal).st_size
        if size < self.end:
            raise stale(self.path)
        if (
            self._last_at
            and layout.read_at(self.journal, layout.RECORD.size, self._last_at)[40:56] != self.last
        ):
            raise stale(self.path)

    def _read_on(self) -> None:
        committed, _, _ = layout.read_head(self.head, self._head)
        if committed.epoch != self.epoch:
            raise layout.damaged(self._head, f"it is of epoch {committed.epoch}, not {self.epoch}")
        size = os.fstat(self.journal).st_size
        while (record := layout.decode(self.journal, self.end, size, self.number, self.last)) is not None:
            self._take(record)
        if self.end < committed.length:
            what = f"record {self.number} at byte {self.end} of {committed.length}"
            raise layout.damaged(self._journal, what)

    def _take(self, record: Record) -> None:
        if record.kind == layout.RESERVE:
            it = record.what
            known = self.files.setdefault(
                it["gid"], {k: it[k] for k in ("name", "width", "dtype")} | {"end": 0}
            )
            known["end"] = max(known["end"], it["first"] + it["count"])
            known["taken"] = it["count"]  # by the latest
            self.next_gid = max(self.next_gid, it["gid"] + 1)
        else:
            self.queue.append((self.end, record.number, self.last))
        self._last_at, self.end, self.number, self.last = self.end, record.end, record.number + 1, record.last

    def queued(self) -> Iterator[Record]:
        """The queued records in their order; each leaves the queue once the caller asks for the next."""
        while self.queue:
            at, number, before = self.queue[0]
            record = layout.decode(self.journal, at, self.end, number, before)
            if record is None:
                raise layout.damaged(self._journal, f"record {number} at byte {at}")
            yield record
            self.queue.pop(0)

    def vectors(self, gid: int) -> MappedVectors:
        """The file of this number."""
        found = self._vectors.get(gid)
        if found is None:
            file = self.files[gid]
            found = MappedVectors(
                self.vector_path(gid), file["width"], DTYPES[file["dtype"]], writable=self.writable
            )
            self._vectors[gid] = found
        return found

    def refuse_missing(self, gid: int) -> None:
        """The file of a model that is in use must be there."""
        if self.vectors(gid).missing:
            if self.replaced():
                raise NewEpochError
            raise layout.damaged(self.vector_path(gid), "it is missing")

    def vector_path(self, gid: int) -> Path:
        """Where the vectors of this number are."""
        return self.path / f"vectors-{self.epoch}-{gid}.fcg"

    # --- writing

    def reserve(self, name: str, width: int, dtype: torch.dtype, count: int) -> tuple[int, int]:
        """Slots for `count` vectors of this model, under the lock: (gid, first slot)."""
        kind = NAMES[dtype]
        fits = [
            i for i, f in self.files.items() if (f["name"], f["width"], f["dtype"]) == (name, width, kind)
        ]
        gid = max(fits) if fits else self.next_gid
        if not fits:
            os.close(os.open(self.vector_path(gid), os.O_RDWR | os.O_CREAT, 0o666))
            layout.sync_folder(self.path)
        first = self.files[gid]["end"] if fits else 0
        if first + count > 2**31 - 1:
            raise ValueError(f"the vectors of `{name}` were written 2**31 times: call compact()")
        what = {"gid": gid, "name": name, "width": width, "dtype": kind, "first": first, "count": count}
        self._append(layout.RESERVE, what, [], sync=False)
        self.vectors(gid).reserve(first + count)
        return gid, first

    def give_back(self, gid: int, first: int) -> None:
        """Free the room of slots from this one on, which could not be written; under the lock, caught up.

        They stay taken. Where another writer has taken some behind them since, nothing is freed.
        """
        if self.files[gid]["end"] <= first + self.files[gid]["taken"]:
            self.vectors(gid).cut(first)

    def commit(self, what: dict[str, Any], arrays: list[np.ndarray[Any, Any]]) -> None:
        """Append a record that counts, under the lock, all caught up."""
        self._append(layout.COMMIT, what, arrays, sync=True)
        self.queue.pop()  # the caller has applied it
        try:
            self._write_head()
        except OSError as error:  # the record is whole and on the disk, so it counts; the next commit says so
            warnings.warn(f"the head of `{self.path}` could not be written ({error.strerror})", stacklevel=3)
        self._poll = (self._stamp(), layout.read_at(self.head, layout.HEAD_PLACES[1] + layout.HEAD.size, 0))

    def _append(
        self, kind: int, what: dict[str, Any], arrays: list[np.ndarray[Any, Any]], *, sync: bool
    ) -> None:
        record, last = layout.encode(kind, self.number, self.last, what, arrays)
        if os.fstat(self.journal).st_size > self.end:
            os.ftruncate(self.journal, self.end)  # what a killed writer left of its last record
        try:
            layout.write_at(self.journal, record, self.end)
            if sync:
                os.fdatasync(self.journal)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(self.journal, self.end)
            raise
        self._take(Record(kind, self.number, what, arrays, last, self.end + len(record)))

    def _write_head(self) -> None:
        newest, slot, bad = layout.read_head(self.head, self._head)
        slot = bad[0] if bad else 1 - slot
        head = Head(newest.number + 1, self.epoch, self.end, self.last)
        layout.write_at(self.head, layout.head_slot(head), layout.HEAD_PLACES[slot])
        os.fdatasync(self.head)

    def drop_file(self, gid: int) -> None:
        """A retired model's vectors go; who has them mapped keeps them."""
        self._vectors.pop(gid, None)
        with suppress(FileNotFoundError):
            os.unlink(self.vector_path(gid))

    def damages(self) -> list[str]:
        """What is wrong with head and journal as they are on the disk now."""
        found: list[str] = []
        try:
            layout.read_manifest(self.path)
            layout.map_base(self.path, self.manifest["base"])
            committed, _, bad = layout.read_head(self.head, self._head)
            found += [f"`{self._head}`: slot {slot} (the other one is whole)" for slot in bad]
            start = layout.genesis(self.store, self.epoch)
            if layout.read_at(self.journal, len(start), 0) != start:
                found.append(str(layout.damaged(self._journal, "its first bytes")))
            at, number, before = len(start), 0, start[-16:]
            while at < committed.length:
                record = layout.decode(self.journal, at, committed.length, number, before)
                if record is None:
                    found.append(str(layout.damaged(self._journal, f"record {number} at byte {at}")))
                    break
                at, number, before = record.end, number + 1, record.last
        except (DamagedError, FileNotFoundError) as error:
            found.append(str(error))
        return found


def stale(path: Path) -> StaleError:
    """The error for a folder of another history."""
    return StaleError(
        f"`path`: the folder `{path}` was replaced or put back from a backup since this gallery opened it; "
        "open it again, and apply the changes that are not in it once more"
    )
