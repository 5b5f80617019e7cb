"""Copies of parts in the form that the search kernels read, within a budget."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import Any

from torch import Tensor

from .. import _native
from .state import Part


class Packed:
    """A packed copy of the rows of a part that counted when it was made (None: all of the first `count`)."""

    def __init__(self, part: Part, count: int, rows: Tensor | None, values: Tensor) -> None:
        self.rows, self.values, self.count = rows, values, count
        self._made_of, self._covers = part, part

    @property
    def size(self) -> int:
        """Bytes."""
        return self.values.nbytes + (0 if self.rows is None else self.rows.nbytes)

    def covers(self, part: Part) -> bool:
        """Whether all that counts now is in the copy, and most of the copy counts."""
        if part is not self._covers:
            its = self._made_of.items
            if part.end > self.count or 2 * part.alive < self._made_of.alive:
                return False
            if bool(((part.items >= 0) & (its < 0)).any()):
                return False
            self._covers = part
        return True


class PackedCache:
    """Packed copies by model, part, metric and instruction set.

    A slot that counts never changes, so a copy serves until a slot counts that is not in it, whatever
    happens to other parts. When the budget is spent, copies that the running search has no use for go first;
    what does not fit then is converted by each search anew.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used = budget, 0
        self._kept: OrderedDict[Any, tuple[Packed, int]] = OrderedDict()
        self._lock = threading.Lock()
        self._search = 0
        self.joined: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()  # of `queries`

    def begin(self) -> int:
        """A search begins: its number."""
        with self._lock:
            self._search += 1
            return self._search

    def get(
        self, owner: object, start: int, part: Part, keys: Tensor, metric: str, search: int
    ) -> Packed | None:
        """The copy of this part, made in the second search of it; None where there is none."""
        name = (owner, start, metric, _native.simd())
        with self._lock:
            found = self._kept.get(name)
            if found is not None and found[0].covers(part):
                self._kept[name] = found[0], search
                self._kept.move_to_end(name)
                return found[0]
        if not part.searched:
            part.searched = True
            return None
        rows = None if part.alive == len(keys) else part.rows
        expected = part.alive * (keys.shape[1] * 2 + 8) + (0 if rows is None else rows.nbytes)
        if not self._room(expected, search, name):
            return None
        values = _native.pack(keys, rows, metric)
        if not values.numel():
            return None
        made = Packed(part, len(keys), rows, values)
        with self._lock:
            self._drop(name)
            self._kept[name] = made, search
            self.used += made.size
        return made

    def _room(self, size: int, search: int, name: Any) -> bool:
        with self._lock:
            for other, (_, last) in list(self._kept.items()):
                if self.used + size <= self.budget:
                    break
                if other == name or last < search - 1:
                    self._drop(other)
            return self.used + size <= self.budget

    def _drop(self, name: Any) -> None:
        old = self._kept.pop(name, None)
        if old is not None:
            self.used -= old[0].size

    def clear(self) -> None:
        """Forget all copies."""
        with self._lock:
            self._kept.clear()
            self.joined.clear()
            self.used = 0
