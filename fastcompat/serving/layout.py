"""How a gallery's folder looks on the disk (format 2): every byte that counts is under a checksum.

::

    manifest.json         what the folder is, its models, and the files of this epoch; replaced in one step
    head-E.fcg            how far the journal is committed: two slots, written in turn
    journal-E.fcg         append-only: records, each with a checksum that covers the one before
    base-E.fcg            the state that the epoch began with, written once
    vectors-E-G.fcg       rows of one model; a row that ever counted is never written again

An epoch E begins with `create`, `save` or `compact`; only these write manifest and base.

Why not a store that exists: 200,000 x 128 float32, a commit per 1,024 rows in random order, on one machine.

=============  ==========================  ================  =========================================
store          bytes written / vectors     open, us an item  a flipped byte
=============  ==========================  ================  =========================================
this journal   1.04                        0.04              refused by name
SQLite (WAL)   5.65 (ids and slots alone)  1.51              other rows, without an error
LMDB           102                         -                 no checksums; rows are no strided matrix
Lance          1.05 (three files a batch)  -                 other vectors, without an error
zarr           195 (whole chunks)          -                 no transactions, no lock
=============  ==========================  ================  =========================================

None of them gives mapped float rows that kernels read in place, a checksum per row, or the refusal of a
writer whose folder was put back from a backup; those would be ours beside each of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .._files import read_file

FORMAT, VERSION = "fastcompat.MixedGallery", 2
MANIFEST = "manifest.json"
OURS = re.compile(r"(head|journal|base|vectors)-\d+(-\d+)?\.fcg(\.new)?|manifest\.json\.new")

RESERVE, COMMIT = 1, 2  # kinds of records
GENESIS = struct.Struct("<8s16sQ16s16s")  # magic, store, epoch, padding, digest
RECORD = struct.Struct("<4sIQQ16s16s8x")  # magic, kind, payload's bytes, number, digest before, digest
HEAD = struct.Struct("<8sQQQ16s16s")  # magic, number, epoch, journal's bytes, its last digest, digest
HEAD_PLACES = (0, 512)  # two sectors
BLOCK = 1 << 20  # bytes of a base file under one checksum


class DamagedError(ValueError):
    """A file of the gallery is not what was written: names it and the place."""


def damaged(path: Path, what: str) -> DamagedError:
    """The error for a damaged file."""
    return DamagedError(f"`path`: the file `{path}` is damaged ({what}); put it back from a snapshot")


def digest(*parts: bytes | memoryview) -> bytes:
    """128-bit checksum of the parts in a row."""
    sum_ = hashlib.blake2b(digest_size=16)
    for part in parts:
        sum_.update(part)
    return sum_.digest()


# --- whole reads and writes


def read_at(handle: int, size: int, at: int) -> bytes:
    """`size` bytes, fewer only at the file's end."""
    parts: list[bytes] = []
    while size > 0 and (part := os.pread(handle, min(size, 1 << 30), at)):
        parts.append(part)
        size, at = size - len(part), at + len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def write_at(handle: int, content: bytes | memoryview, at: int) -> None:
    """All of the content at this place of the file."""
    left = memoryview(content).cast("B")
    while len(left):
        done = os.pwrite(handle, left[: 1 << 30], at)
        left, at = left[done:], at + done


def sync_folder(folder: Path) -> None:
    """Put the folder's list of names on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, content: bytes) -> None:
    """A new file, on the disk when this returns; the process's umask says who may read it."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        write_at(handle, content, 0)
        os.fsync(handle)
    finally:
        os.close(handle)


# --- the manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest beside the one that counts, on the disk when this returns."""
    body = json.dumps(manifest, sort_keys=True)
    sealed = {**manifest, "checksum": digest(body.encode()).hex()}
    new = folder / (MANIFEST + ".new")
    write_file(new, json.dumps(sealed, sort_keys=True, indent=1).encode())
    sync_folder(folder)


def put_manifest(folder: Path) -> None:
    """From now on the manifest that was written counts."""
    os.replace(folder / (MANIFEST + ".new"), folder / MANIFEST)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of any format; only a missing one is FileNotFoundError."""
    path = folder / MANIFEST
    try:
        found = json.loads(read_file(path))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise damaged(path, "not JSON") from None
    except ValueError as error:  # a number of too many digits, a device
        raise damaged(path, str(error)) from None
    if not isinstance(found, dict):
        raise damaged(path, "no JSON object")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"`path` must be a folder that `save` wrote: no {FORMAT} in `{folder}` (`{MANIFEST}` says "
            f"{found.get('format')!r})"
        )
    version = found.get("version")
    if version == 1:
        return found
    if version != VERSION:
        raise ValueError(
            f"`path` must hold version 1 or {VERSION} of {FORMAT}: got {version!r}; "
            f"open it with the version of fastcompat that wrote it (`{path}`)"
        )
    sum_ = found.pop("checksum", None)
    if sum_ != digest(json.dumps(found, sort_keys=True).encode()).hex():
        raise damaged(path, "its checksum does not fit its content")
    names = [found["base"]["file"], found["head"], found["journal"]]
    for name in names:
        if not OURS.fullmatch(name):
            raise damaged(path, f"it names `{name}`, which is no file of this folder")
    return found


# --- the base: arrays written once


def write_base(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, Any]:
    """Write the arrays one after another; returns what the manifest has to know of them."""
    sections, sums, at, held = [], [], 0, bytearray()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:

        def flush(least: int) -> None:
            nonlocal at
            while len(held) >= least and held:
                block = bytes(held[:BLOCK])
                write_at(handle, block, at)
                sums.append(digest(block).hex())
                at += len(block)
                del held[:BLOCK]

        for name, array in arrays.items():
            start = at + len(held)
            sections.append({"name": name, "dtype": array.dtype.str, "count": len(array), "offset": start})
            step = max(1, BLOCK // max(1, array.dtype.itemsize))
            for first in range(0, len(array), step):
                held += np.ascontiguousarray(array[first : first + step]).tobytes()
                flush(BLOCK)
            held += bytes(-len(held) % 8)
        flush(1)
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"file": path.name, "bytes": at, "sections": sections, "blocks": sums}


def map_base(folder: Path, base: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of a base file, memory-mapped, once every block's checksum fits."""
    path = folder / base["file"]
    handle = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(handle).st_size
        if size != base["bytes"]:
            raise damaged(path, f"{size} bytes instead of {base['bytes']}")
        for number, sum_ in enumerate(base["blocks"]):
            if digest(read_at(handle, min(BLOCK, size - number * BLOCK), number * BLOCK)).hex() != sum_:
                raise damaged(path, f"block {number} of {BLOCK} bytes")
    finally:
        os.close(handle)
    whole = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    found = {}
    for section in base["sections"]:
        dtype, at = np.dtype(section["dtype"]), section["offset"]
        found[section["name"]] = whole[at : at + section["count"] * dtype.itemsize].view(dtype)
    return found


# --- the head


class Head(NamedTuple):
    """How far the journal is committed."""

    number: int
    epoch: int
    length: int
    last: bytes


def head_slot(head: Head) -> bytes:
    """The head as it stands in its slot."""
    body = HEAD.pack(b"FCGHEAD2", head.number, head.epoch, head.length, head.last, bytes(16))[:-16]
    return body + digest(body)


def read_head(handle: int, path: Path) -> tuple[Head, int, list[int]]:
    """The newest whole head, its slot, and the slots that are damaged."""
    found, bad = [], []
    for slot, at in enumerate(HEAD_PLACES):
        content = read_at(handle, HEAD.size, at)
        if len(content) < HEAD.size or content[-16:] != digest(content[:-16]):
            bad.append(slot)
        else:
            _, number, epoch, length, last, _ = HEAD.unpack(content)
            found.append((Head(number, epoch, length, last), slot))
    if not found:
        raise damaged(path, "neither of its two slots is whole")
    return *max(found), bad


# --- records


class Record(NamedTuple):
    """A record of the journal, and where the next one starts."""

    kind: int
    number: int
    what: dict[str, Any]
    arrays: list[np.ndarray[Any, Any]]
    last: bytes
    end: int


def genesis(store: bytes, epoch: int) -> bytes:
    """How a journal starts; its last 16 bytes are the digest that the first record follows."""
    body = GENESIS.pack(b"FCGJRNL2", store, epoch, bytes(16), bytes(16))[:-16]
    return body + digest(body)


def encode(
    kind: int, number: int, before: bytes, what: Mapping[str, Any], arrays: Sequence[np.ndarray[Any, Any]]
) -> tuple[bytes, bytes]:
    """A record and its digest."""
    shapes = [[array.dtype.str, len(array)] for array in arrays]
    text = json.dumps({"what": what, "arrays": shapes}).encode()
    parts = [struct.pack("<Q", len(text)) + text + bytes(-len(text) % 8)]
    for array in arrays:
        raw = np.ascontiguousarray(array).tobytes()
        parts.append(raw + bytes(-len(raw) % 8))
    payload = b"".join(parts)
    start = RECORD.pack(b"FCGR", kind, len(payload), number, before, bytes(16))
    last = digest(start, payload)
    return RECORD.pack(b"FCGR", kind, len(payload), number, before, last) + payload, last


def decode(handle: int, at: int, size: int, number: int, before: bytes) -> Record | None:
    """The record at this place if a whole one is there that follows `before`."""
    start = read_at(handle, RECORD.size, at) if at + RECORD.size <= size else b""
    if len(start) < RECORD.size:
        return None
    magic, kind, length, its_number, its_before, last = RECORD.unpack(start)
    if magic != b"FCGR" or its_number != number or its_before != before or any(start[56:]):
        return None
    end = at + RECORD.size + length
    if end > size:
        return None
    payload = read_at(handle, length, at + RECORD.size)
    if len(payload) < length:
        return None
    if digest(RECORD.pack(magic, kind, length, number, before, bytes(16)), payload) != last:
        return None
    (text,) = struct.unpack_from("<Q", payload)
    about = json.loads(payload[8 : 8 + text])
    place, arrays = 8 + text + -text % 8, []
    for dtype, count in about["arrays"]:
        arrays.append(np.frombuffer(payload, dtype, count, place))
        place += arrays[-1].nbytes + -arrays[-1].nbytes % 8
    return Record(kind, number, about["what"], arrays, last, end)


def remove_others(folder: Path, kept: set[str]) -> None:
    """Remove files of ours that nothing names: what an earlier epoch or a killed writer left."""
    for file in os.listdir(folder):
        if OURS.fullmatch(file) and file not in kept:
            with suppress(FileNotFoundError):
                os.unlink(folder / file)
