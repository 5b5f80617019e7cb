"""A gallery that is searched while it is being re-embedded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks, _folder, _native, _search
from .functional import Array
from .gallery import backfilled_mask, two_numbers
from .reference import Segment

FORMAT = "fastcompat.MixedGallery"
CONSTANT = ("old", "ids")  # arrays that no update changes
Given = Tensor | np.ndarray[Any, Any]


class _State:
    """What one search sees: the new vectors [N, D_new], and which items [N] count with them."""

    def __init__(self, new: Tensor | None, backfilled: Tensor) -> None:
        self.new, self.backfilled = new, backfilled
        self._packed: dict[tuple[tuple[str, str], str], Tensor | None] = {}  # None: asked for once

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows that count with their old and with their new vector."""
        return (~self.backfilled).nonzero()[:, 0], self.backfilled.nonzero()[:, 0]

    def packed(self, part: Segment, metric: str, names: tuple[str, str]) -> Tensor:
        """The keys as the search kernels want them, from the second search of this state on; else empty."""
        name = (names, _native.simd())
        kept = self._packed.get(name)
        if kept is None and name in self._packed:
            kept = _search.pack(part, metric, names)
        self._packed[name] = kept
        return torch.empty(0) if kept is None else kept


class MixedGallery:
    """A gallery on its way from an old to a new embedding model: search it, re-embed items, save it.

    Every item counts with its old vector until `update` brings its new one; `search` is exactly
    `fastcompat.mixed_topk` on the state of that moment. The old model can be retired when `fraction` is 1: a
    side without items needs no query.

    From the second search of one state on, the vectors are kept in the form that the CPU kernels read, so
    that small batches of queries need not convert them again. It takes 2 bytes a number and 20 an item: of
    float32 vectors 0.66 at D = 32, 0.58 at 64, 0.54 at 128, 0.51 at 768 (with AMX, D counts in whole 32s).
    Where that is more than 0.75 of float32 vectors (up to D = 19), or nothing needs converting, nothing is
    kept.

    Searches may run in any number of threads beside one another and beside updates: each sees the gallery
    before an update or after it, never half of one.

    Args:
        old: [N, D_old] float32, bfloat16, float16 or float64; a torch tensor or a NumPy array, memory-mapped
            ones included. It is not copied and must not change.
        new: [N, D_new], rows of items not backfilled hold anything (None: nothing is backfilled yet, and the
            first update says D_new). Never written to: the first update copies it.
        backfilled: [N] bool, given with `new`: which items count with their new vector.
        metric: "cosine", "ip" or "l2" (score = minus the squared distance).
        scale: factors of the old and of the new scores.
        offset: numbers added to the old and to the new scores.
        ids: [N] int64, the items' own ids, each once and none -1 (None: 0 .. N-1). Of two equal scores the
            item that stands first in the gallery comes first.
        backend: "auto", "native" or "reference".

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """

    def __init__(
        self,
        old: Given,
        new: Given | None = None,
        backfilled: Given | None = None,
        *,
        metric: str = "cosine",
        scale: Sequence[float] = (1.0, 1.0),
        offset: Sequence[float] = (0.0, 0.0),
        ids: Given | None = None,
        backend: str = "auto",
    ) -> None:
        self._old = _checks.as_tensor("old", old).detach()
        _checks.matrix("old", self._old)
        if (new is None) != (backfilled is None):
            given, missing = ("new", "backfilled") if backfilled is None else ("backfilled", "new")
            raise ValueError(f"`{missing}` must be given with `{given}`: got None; pass both or neither")
        mask = torch.zeros(len(self._old), dtype=torch.bool, device=self._old.device)
        if new is not None:
            new = _checks.as_tensor("new", new).detach()
            _checks.matrix("new", new)
            _checks.rows("new", new, "old", self._old)
            _checks.same_device("new", new, "old", self._old)
            mask = backfilled_mask(backfilled, self._old).clone()
        _checks.choice("metric", metric, _checks.METRICS)
        _checks.choice("backend", backend, _checks.BACKENDS)
        self._metric, self._backend = metric, backend
        self._scale, self._offset = two_numbers("scale", scale), two_numbers("offset", offset)
        self._ids = None if ids is None else _Ids(ids, self._old)
        self._state = _State(new, mask)
        self._may_write = False  # into the new vectors' memory
        self._updating = threading.Lock()
        self._written: dict[str, str] = {}  # files that hold what never changes

    def __len__(self) -> int:
        return len(self._old)

    @property
    def fraction(self) -> float:
        """Share of the items that count with their new vector; 0 for an empty gallery."""
        return int(self._state.backfilled.sum()) / max(len(self), 1)

    def search(self, query_old: Array | None, query_new: Array | None, k: int) -> tuple[Array, Array]:
        """The best k items of every query, each ranked by the score in its own space (`mixed_topk`).

        Args:
            query_old: [B, D_old], of the dtype of the old vectors; may be None once every item is backfilled.
            query_new: [B, D_new], the same queries in the new space; may be None while no item is backfilled.
            k: how many items to return.

        Returns:
            scores [B, k] and ids [B, k] (int64), best first; score -inf and id -1 where there are fewer than
            k items. NumPy arrays for NumPy queries.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read, naming the
                first.
        """
        state, names = self._state, (("query_old", "old"), ("query_new", "new"))
        sides = zip((query_old, query_new), (self._old, state.new), state.rows, strict=True)
        parts: list[Segment] = []
        used: list[tuple[str, str]] = []
        queries: list[tuple[str, Tensor]] = []
        for s, (given, keys, rows) in enumerate(sides):
            needed = len(rows) > 0 or (s == 0 and len(self) == 0)
            if given is None:
                if needed:
                    raise ValueError(
                        f"`{names[s][0]}` must be given: got None, and {len(rows)} items need it"
                    )
                continue
            query = _checks.as_tensor(names[s][0], given)
            _checks.matrix(names[s][0], query)
            queries.append((names[s][0], query))
            _checks.rows(*queries[-1], *queries[0])
            if keys is None:
                continue
            _checks.pair(query, keys, names[s])
            if needed:
                every = len(rows) == len(self)
                parts.append(Segment(query, keys, None if every else rows, self._scale[s], self._offset[s]))
                used.append(names[s])
        k = _checks.positive_int("k", k)
        native = all([_checks.takes_native(self._backend, part.query) for part in parts])
        packed: list[Tensor] = []
        if native and not self._old.is_cuda:
            packed = [state.packed(part, self._metric, name) for part, name in zip(parts, used, strict=True)]
        scores, ids = _search.topk(parts, k, self._metric, native=native, names=used, packed=packed)
        if self._ids is not None:
            ids = self._ids.of_row[ids]
        found: tuple[Array, Array] = _checks.give_back(
            (scores, ids), query_new if query_old is None else query_old
        )
        return found

    def update(self, ids: Given, vectors: Given) -> None:
        """From now on these items count with these new vectors. Bad input leaves the gallery as it was.

        Items that already had a new vector get another one; then all new vectors are copied once, so that
        searches under way keep what they read.

        Args:
            ids: [M] int64, items of the gallery, each once.
            vectors: [M, D_new], of the dtype of the new vectors there are (the first update says dtype and
                D_new).

        Raises:
            ValueError, TypeError: arguments that do not fit; an unknown id; NaN or inf, naming the first row.
        """
        values = _checks.as_tensor("vectors", vectors).detach()
        _checks.matrix("vectors", values)
        _checks.same_device("vectors", values, "old", self._old)
        rows = self._rows("ids", ids, ("vectors", values))
        bad = ~values.isfinite().all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"`vectors` must be finite: row {row} holds NaN or inf; embed that item again")
        with self._updating:
            state = self._state
            new = state.new
            if new is None:
                new = values.new_zeros(len(self), values.shape[1])
            else:
                _checks.pair(values, new, ("vectors", "new"))
                if not self._may_write or state.backfilled[rows].any():
                    new = new.clone()
            new[rows] = values  # rows that no search reads
            mask = state.backfilled.clone()
            mask[rows] = True
            self._may_write, self._state = True, _State(new, mask)

    def backfill(self, order: Given, embed: Callable[[Any], Given], *, batch: int = 1024) -> Iterator[float]:
        """Re-embed items in the given order, a batch at a time, leaving out those that are backfilled.

        A generator of `fraction` after each batch; between two batches save the gallery, show progress or
        stop. The same call on the loaded gallery goes on where it was saved::

            for fraction in gallery.backfill(order, embed):
                gallery.save(path)

        Args:
            order: [M] int64, ids of items, each once, first to be backfilled first.
            embed: called with ids [batch] (an array if `order` is one); returns their new vectors
                [batch, D_new], as `update` takes them.
            batch: how many items to embed at once.

        Raises:
            ValueError, TypeError: arguments that do not fit, at once; what `update` refuses, at that batch.
        """
        wanted = _checks.as_tensor("order", order)
        done = self._state.backfilled[self._rows("order", wanted)].to(wanted.device)
        left = _checks.give_back((wanted[~done],), order)[0]
        return self._batches(left, embed, _checks.positive_int("batch", batch))

    def _batches(self, ids: Any, embed: Callable[[Any], Given], batch: int) -> Iterator[float]:
        for first in range(0, len(ids), batch):
            some = ids[first : first + batch]
            self.update(some, embed(some))
            yield self.fraction

    def save(self, path: str | Path) -> None:
        """Write the gallery into a folder (made if missing): `.npy` files and `manifest.json`.

        The gallery that was saved there before stays whole until the new one is; then it is replaced. Saved
        again into the same folder, the old vectors are not written again. Bfloat16 is stored as int16 of the
        same bits. Saves into one folder wait for one another.

        Raises:
            ValueError: the folder cannot be made or written.
        """
        state = self._state
        arrays = {"old": self._old}
        if state.new is not None:
            arrays |= {"new": state.new, "backfilled": state.backfilled}
        if self._ids is not None:
            arrays["ids"] = self._ids.of_row[:-1]
        values = {"metric": self._metric, "scale": self._scale, "offset": self._offset}
        files = _folder.save(Path(path), FORMAT, arrays, values, self._written)
        self._written = {name: files[name] for name in CONSTANT if name in files}

    @classmethod
    def load(
        cls, path: str | Path, *, device: torch.device | str = "cpu", backend: str = "auto"
    ) -> MixedGallery:
        """The gallery that `save` wrote into this folder, memory-mapped: nothing is read before it is needed.

        Updates stay in memory until they are saved.

        Raises:
            ValueError: no gallery there, one of another version, or a damaged file.
        """
        arrays, values, files = _folder.load(Path(path), FORMAT)
        values |= {name: array.to(device) for name, array in arrays.items()}
        gallery = cls(**values, backend=backend)
        gallery._may_write = True  # into private copies of the file's pages
        gallery._written = {name: files[name] for name in CONSTANT if name in files}
        return gallery

    def _rows(self, name: str, ids: Any, like: tuple[str, Tensor] | None = None) -> Tensor:
        """The rows of these items, each of them known and named once."""
        wanted = _checks.as_tensor(name, ids)
        _checks.indices(name, wanted, *(like or (name, wanted)))
        wanted = wanted.to(self._old.device)
        if self._ids is None:
            rows, known = wanted, (wanted >= 0) & (wanted < len(self))
        else:
            rows, known = self._ids.rows(wanted)
        if not known.all():
            raise ValueError(
                f"`{name}` must name items of this gallery: it holds no item {int(wanted[~known][0])}"
            )
        in_order = wanted.sort().values
        again = in_order[1:] == in_order[:-1]
        if again.any():
            raise ValueError(f"`{name}` must name each item once: got {int(in_order[1:][again][0])} twice")
        return rows


class _Ids:
    """The items' own ids, and their rows."""

    def __init__(self, ids: Any, old: Tensor) -> None:
        given = _checks.as_tensor("ids", ids)
        _checks.indices("ids", given, "old", old)
        self._ascending, self._row = given.sort()
        again = self._ascending[1:] == self._ascending[:-1]
        if again.any():
            raise ValueError(
                f"`ids` must name each item once: got {int(self._ascending[1:][again][0])} twice"
            )
        if (given == -1).any():
            raise ValueError("`ids` must not hold -1, which marks an empty place in a result")
        self.of_row = torch.cat([given, given.new_tensor([-1])])  # [N + 1]: row -1 is an empty place

    def rows(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of these items, and which of the items there are."""
        if len(self._row) == 0:
            return ids, torch.zeros_like(ids, dtype=torch.bool)
        at = torch.searchsorted(self._ascending, ids).clamp(max=len(self._row) - 1)
        return self._row[at], self._ascending[at] == ids
