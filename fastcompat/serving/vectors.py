"""Where the vectors of one model live: a mapped file, or memory. A slot is a row's place in it."""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks
from . import layout

PART = 1 << 17  # slots of a part: what is packed, copied on a change and searched together
GROWTH = PART // 8  # slots by which a file grows
CHUNK = 8 << 20  # bytes of vectors that are read or written at once

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def row_bytes(width: int, dtype: torch.dtype) -> int:
    """Bytes of one vector."""
    return width * dtype.itemsize


def raw(values: Tensor) -> np.ndarray[Any, Any]:
    """The bytes of vectors [M, D] as an array [M, D * itemsize]."""
    plain = values.detach().cpu().contiguous()
    width = row_bytes(plain.shape[1], plain.dtype)
    if not plain.numel():
        return np.empty((len(plain), width), np.uint8)
    return plain.view(torch.uint8).numpy().reshape(len(plain), width)


def checksums(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The crc32 of each row of bytes."""
    crc = zlib.crc32
    return np.fromiter((crc(row) for row in rows), np.uint32, len(rows))


def chunks(count: int, width: int) -> Iterator[slice]:
    """Slices of `count` rows of `width` bytes, each of about CHUNK bytes."""
    step = max(1, CHUNK // max(1, width))
    for first in range(0, count, step):
        yield slice(first, min(count, first + step))


class MappedVectors:
    """Vectors in a file of the gallery's folder, mapped as far as they are needed."""

    def __init__(self, path: Path, width: int, dtype: torch.dtype, *, writable: bool) -> None:
        self.path, self.width, self.dtype = path, width, dtype
        self.bytes = row_bytes(width, dtype)
        self._handle = -1
        with suppress(FileNotFoundError):  # of a model that was retired later in the journal
            self._handle = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        self.missing = self._handle < 0
        self._whole = torch.empty(0, width, dtype=dtype, device="cpu")

    def rows(self, count: int) -> Tensor:
        """The first `count` slots [>= count, D]; a file that is too short is damaged."""
        whole = self._whole
        if len(whole) < count:
            there = os.fstat(self._handle).st_size // self.bytes if self.bytes else count
            if there < count:
                raise layout.damaged(self.path, f"it holds {there} rows, and {count} are in use")
            if self.bytes:
                kept = mmap.mmap(self._handle, there * self.bytes, mmap.MAP_SHARED, mmap.PROT_READ)
                flat = _checks.as_tensor("vectors", np.frombuffer(kept, np.uint8))
                whole = flat.view(self.dtype).view(there, self.width)
            else:
                whole = torch.empty(there, 0, dtype=self.dtype, device="cpu")
            self._whole = whole
        return whole

    def span(self, start: int, count: int) -> Tensor:
        """`count` slots from this one on."""
        return self.rows(start + count)[start : start + count]

    def read(self, slots: np.ndarray[Any, Any]) -> Tensor:
        """Copies of these slots."""
        if not len(slots):
            return torch.empty(0, self.width, dtype=self.dtype, device="cpu")
        return self.rows(int(slots.max()) + 1)[torch.from_numpy(slots.astype(np.int64))]

    def reserve(self, end: int) -> None:
        """Make the file long enough for slots below `end`; takes no room on the disk."""
        if os.fstat(self._handle).st_size < end * self.bytes:
            end += -end % GROWTH  # so that it is mapped again only now and then
            os.ftruncate(self._handle, end * self.bytes)

    def cut(self, end: int) -> None:
        """Give back the room from this slot on."""
        os.ftruncate(self._handle, end * self.bytes)
        self._whole = self._whole[:end]

    def write(self, slots: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> None:
        """Write rows of bytes into slots that nothing reads; neighbours go in one piece."""
        starts = np.flatnonzero(np.diff(slots, prepend=-2) != 1)
        for first, end in zip(starts, [*starts[1:], len(slots)], strict=True):
            layout.write_at(self._handle, rows[first:end].tobytes(), int(slots[first]) * self.bytes)

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fdatasync(self._handle)

    def __del__(self) -> None:
        with suppress(OSError):
            if self._handle >= 0:
                os.close(self._handle)  # what is mapped stays as long as a search reads it


class MemoryVectors:
    """Vectors in memory, behind those that were given or mapped, which are never written to."""

    def __init__(self, base: Tensor | MappedVectors, count: int) -> None:
        self._base, self.count = base, count
        self.width = base.width if isinstance(base, MappedVectors) else base.shape[1]
        self.dtype = base.dtype
        self.device = torch.device("cpu") if isinstance(base, MappedVectors) else base.device
        self.bytes = row_bytes(self.width, self.dtype)
        # Parts behind the base start at the next multiple of a part.
        self.first = self.next = -(-count // PART) * PART
        self._more: list[Tensor] = []
        self._look = 2 * PART

    @property
    def mapped(self) -> MappedVectors | None:
        """The file behind the base, if there is one."""
        return self._base if isinstance(self._base, MappedVectors) else None

    def emptied(self) -> MemoryVectors:
        """The same base with nothing behind it."""
        return MemoryVectors(self._base, self.count)

    def crowded(self, slot_of: np.ndarray[Any, Any]) -> bool:
        """Whether most of what came behind the base is used no more; looked at now and then."""
        used = self.next - self.first
        if used < self._look:
            return False
        live = int(np.count_nonzero(slot_of >= self.first))
        self._look = used + max(live, PART) // 2
        return used > 2 * live + PART

    def base_rows(self) -> Tensor:
        """The slots that were there first."""
        return self._base.rows(self.count) if isinstance(self._base, MappedVectors) else self._base

    def rows(self, _count: int) -> Tensor:
        """Some of its slots: what they are like."""
        return self.base_rows() if isinstance(self._base, Tensor) else self._base.rows(0)

    def span(self, start: int, count: int) -> Tensor:
        """`count` slots from the start of a part on, all in the base or all in that part."""
        if start < self.first:
            return self.base_rows()[start : start + count]
        return self._more[(start - self.first) // PART][:count]

    def read(self, slots: np.ndarray[Any, Any]) -> Tensor:
        """Copies of these slots."""
        out = torch.empty(len(slots), self.width, dtype=self.dtype, device=self.device)
        for number in np.unique(slots // PART).tolist():
            mine = np.flatnonzero(slots // PART == number)
            size = min(PART, self.count - number * PART) if number * PART < self.first else PART
            rows = torch.from_numpy((slots[mine] % PART).astype(np.int64)).to(self.device)
            out[torch.from_numpy(mine).to(self.device)] = self.span(number * PART, size)[rows]
        return out

    def put(self, values: Tensor) -> np.ndarray[Any, Any]:
        """Write vectors into fresh slots, which nothing reads yet; the slots."""
        slots = np.arange(self.next, self.next + len(values))
        done = 0
        while done < len(values):
            number, row = divmod(self.next - self.first, PART)
            if number == len(self._more):  # the system gives the pages when they are written
                self._more.append(torch.empty(PART, self.width, dtype=self.dtype, device=self.device))
            some = values[done : done + PART - row]
            self._more[number][row : row + len(some)] = some
            done, self.next = done + len(some), self.next + len(some)
        return slots
