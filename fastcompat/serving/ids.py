"""The items' own ids: int64, uint64 or str, and the item number of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .. import _arrays, _inputs

Array = np.ndarray[Any, Any]
KINDS = ("int64", "uint64", "str")
EMPTY = {"int64": -1, "uint64": 2**64 - 1, "str": ""}  # what marks an empty place in a result


def kind_of(name: str, ids: Any) -> str:
    """What kind of ids these are: texts, unsigned numbers of 64 bits, or other whole numbers."""
    found = _arrays.read(name, ids)
    if _arrays.is_text(found):
        return "str"
    return "uint64" if found.dtype in (torch.uint64, np.dtype(np.uint64)) else "int64"


def as_ids(name: str, ids: Any, kind: str) -> Array:
    """Ids of a gallery of this kind [M]: an array of int64 or uint64, or an object array of str."""
    found = _arrays.read(name, ids)
    if kind == "str":
        if not _arrays.is_text(found) and len(found):
            raise TypeError(
                f"`{name}` must be str: got {found.dtype}; the ids of one gallery are of one type"
            )
        return _texts(name, ids, found)
    if kind == "uint64" and found.dtype in (torch.uint64, np.dtype(np.uint64)):
        whole = np.asarray(found.cpu() if isinstance(found, torch.Tensor) else found)
        if whole.ndim != 1:
            raise ValueError(f"`{name}` must have 1 dimension: got shape {list(whole.shape)}")
        return whole
    whole = _inputs.rows(name, ids, None, "ids").detach().cpu().numpy()
    if kind == "uint64" and (whole < 0).any():
        raise ValueError(f"`{name}` must be uint64: got {whole[whole < 0][0]}")
    return whole.astype(kind, copy=False)


def _texts(name: str, ids: Any, found: Any) -> Array:
    """Texts [M] as they were given: NumPy's own strings lose zeros at their ends."""
    if found.ndim != 1:
        raise ValueError(f"`{name}` must have 1 dimension: got shape {list(found.shape)}")
    listed = list(ids) if isinstance(ids, (list, tuple, np.ndarray)) else found.tolist()
    if listed and isinstance(listed[0], bytes):
        raise TypeError(f"`{name}` must be str: got bytes; decode them first")
    texts = np.empty(len(listed), object)
    texts[:] = [str(text) for text in listed]
    return texts


def shown(one: Any) -> str:
    """An id in a message: a text in quotes."""
    return repr(str(one)) if isinstance(one, str) else str(one)


def refuse_double(name: str, ids: Array) -> None:
    """Every id once."""
    in_order = np.sort(ids)
    again = in_order[1:] == in_order[:-1]
    if again.any():
        raise ValueError(f"`{name}` must name each item once: got {shown(in_order[1:][again][0])} twice")


def refuse_reserved(name: str, ids: Array, kind: str) -> None:
    """No id that marks an empty place."""
    if (ids == EMPTY[kind]).any():
        raise ValueError(
            f"`{name}` must not hold {shown(EMPTY[kind])}, which marks an empty place in a result"
        )


def pack_text(ids: Array) -> tuple[Array, Array]:
    """Strings as offsets int64 [M + 1] and UTF-8 bytes."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in ids]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=ends[1:])
    return ends, np.frombuffer(b"".join(encoded), np.uint8)


def unpack_text(ends: Array, text: Array, which: Array) -> Array:
    """Some of the strings that `pack_text` packed."""
    found = np.empty(len(which), object)
    for place, (first, end) in enumerate(zip(ends[which], ends[which + 1], strict=True)):
        found[place] = text[first:end].tobytes().decode("utf-8", "surrogatepass")
    return found


def keys_of(ids: Array, kind: str) -> Array:
    """A number per id to sort by: the id itself, or 64 bits of a text's hash."""
    if kind == "str":
        hashes = (
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in ids
        )
        return np.frombuffer(b"".join(hashes), np.uint64)
    return ids.view(np.uint64) if len(ids) else np.empty(0, np.uint64)


class _Text:
    """Strings in the order of the items, in blocks."""

    def __init__(self, ends: Array, text: Array) -> None:
        self._blocks = [(0, ends, text)]
        self.count = len(ends) - 1

    def __getitem__(self, which: Array) -> Array:
        found = np.empty(len(which), object)
        for first, ends, text in self._blocks:
            mine = np.flatnonzero((which >= first) & (which < first + len(ends) - 1))
            found[mine] = unpack_text(ends, text, which[mine] - first)
        return found

    def append(self, ids: Array) -> None:
        first, ends, text = self.count, *pack_text(ids)
        if self._blocks and len(self._blocks) > 1 and self.count - self._blocks[-1][0] <= 4 * len(ids):
            first, e, t = self._blocks.pop()  # small ones are joined, so that there are few
            ends, text = np.concatenate([e, ends[1:] + e[-1]]), np.concatenate([t, text])
        self._blocks.append((first, ends, text))
        self.count = first + len(ends) - 1

    def cut(self, count: int) -> None:
        while self._blocks and self._blocks[-1][0] >= count and len(self._blocks) > 1:
            self._blocks.pop()
        first, ends, text = self._blocks[-1]
        if first + len(ends) - 1 > count:
            self._blocks[-1] = (first, ends[: count - first + 1], text[: ends[count - first]])
        self.count = count


class _Numbers:
    """Numbers in the order of the items: a base that may be mapped, and what was added."""

    def __init__(self, base: Array) -> None:
        self._base, self._more = base, np.empty(0, base.dtype)
        self.count = len(base)

    def __getitem__(self, which: Array) -> Array:
        n = len(self._base)
        if self.count == n:
            return np.asarray(self._base[which])
        late = which >= n
        found = np.empty(len(which), self._base.dtype)
        found[~late] = self._base[which[~late]]
        found[late] = self._more[which[late] - n]
        return found

    def append(self, ids: Array) -> None:
        used, n = self.count - len(self._base), len(ids)
        if used + n > len(self._more):
            self._more = np.concatenate([self._more[:used], np.empty(max(n, used, 1024), ids.dtype)])
        self._more[used : used + n] = ids
        self.count += n

    def cut(self, count: int) -> None:
        self.count = count


class Ids:
    """Item number -> id, and id -> item number: sorted runs, the newest one last.

    Item numbers are given in the order of addition and never again; an id that was removed and added again
    has its newest number.
    """

    def __init__(self, kind: str, arrays: Mapping[str, Array], *, plain: int | None = None) -> None:
        self.kind, self.plain = kind, plain  # plain: the first so many ids are the numbers themselves
        if plain is not None:
            self._values: _Text | _Numbers | None = None
            self._runs: list[tuple[Array, Array, int]] = []  # keys, items, and the newest item
            self._base = plain
            self._late = _Numbers(np.empty(0, np.int64))
            return
        self._base = 0
        if kind == "str":
            self._late = _Text(arrays["id_ends"], arrays["id_text"])  # type: ignore[assignment]
        else:
            self._late = _Numbers(arrays["ids"])
        self._runs = [(arrays["id_keys"], arrays["id_items"], self._late.count - 1)]

    @classmethod
    def of(cls, ids: Array, kind: str) -> Ids:
        """The index over these ids."""
        return cls(kind, cls.arrays(ids, kind))

    @staticmethod
    def arrays(ids: Array, kind: str) -> dict[str, Array]:
        """What an index over these ids is made of: arrays that may be written and mapped."""
        keys = keys_of(ids, kind)
        order = np.argsort(keys, kind="stable").astype(np.int32)
        found = {"id_keys": keys[order], "id_items": order}
        if kind == "str":
            found["id_ends"], found["id_text"] = pack_text(ids)
        else:
            found["ids"] = ids
        return found

    def __len__(self) -> int:
        return self._base + self._late.count

    def at(self, items: Array) -> Array:
        """The ids of these items; -1 gives what marks an empty place."""
        flat = items.reshape(-1).astype(np.int64)
        found = np.empty(len(flat), object if self.kind == "str" else self.kind)
        none, late = flat < 0, flat >= self._base
        found[none] = EMPTY[self.kind]
        early = ~none & ~late
        found[early] = flat[early]
        found[late] = self._late[flat[late] - self._base]
        if self.kind == "str":
            return (
                np.array(found.tolist(), dtype=str).reshape(items.shape) if len(found) else found.astype(str)
            )
        return found.reshape(items.shape)

    def find(self, ids: Array) -> Array:
        """The newest item number of each id; -1 where there never was one. int64."""
        found = np.full(len(ids), -1, np.int64)
        if self._base:
            early = (ids >= 0) & (ids < self._base)
            found[early] = ids[early]
        keys = keys_of(ids, self.kind)
        for sorted_keys, items, _ in self._runs:  # later runs overwrite
            if not len(sorted_keys):
                continue
            at = np.searchsorted(sorted_keys, keys)
            hit = np.flatnonzero(sorted_keys[np.minimum(at, len(sorted_keys) - 1)] == keys)
            if self.kind != "str":
                found[hit] = items[at[hit]]
                continue
            for place in hit:  # two texts may have one hash
                where = int(at[place])
                while where < len(sorted_keys) and sorted_keys[where] == keys[place]:
                    item = int(items[where])
                    if self._late[np.array([item - self._base])][0] == ids[place]:
                        found[place] = item
                        break
                    where += 1
        return found

    def append(self, ids: Array) -> Array:
        """New items with these ids; their numbers."""
        first = len(self)
        self._late.append(ids)
        items = np.arange(first, first + len(ids))
        keys = keys_of(ids, self.kind)
        order = np.argsort(keys, kind="stable")
        run = keys[order], items[order].astype(np.int32)
        while len(self._runs) > (self.plain is None) and len(self._runs[-1][0]) <= 2 * len(run[0]):
            older = self._runs.pop()
            keys, both = np.concatenate([older[0], run[0]]), np.concatenate([older[1], run[1]])
            order = np.lexsort((-both.astype(np.int64), keys))  # of one id, the newest item first
            run = keys[order], both[order]
        self._runs.append((*run, len(self) - 1))
        return items

    def cut(self, count: int) -> None:
        """Forget the items from this number on."""
        self._late.cut(count - self._base)
        self._runs = [
            (keys[items < count], items[items < count], count - 1) if top >= count else (keys, items, top)
            for keys, items, top in self._runs
        ]
