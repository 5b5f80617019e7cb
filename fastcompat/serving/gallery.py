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

from .. import _checks, _inputs, _native, _promoted, _search
from .._types import Array, Segment
from . import folder as folders
from .mixed_topk import one_or_many, two_numbers

FORMAT = "fastcompat.MixedGallery"
CONSTANT = ("old", "ids")  # arrays that no update changes
READ = ("backfilled", "ids")  # arrays that a gallery reads at once
Given = Tensor | np.ndarray[Any, Any]


class _State:
    """What one search sees: the new vectors [N, D_new], and which items [N] count with them."""

    def __init__(self, new: Tensor | None, backfilled: Tensor) -> None:
        self.new, self.backfilled = new, backfilled
        self._packed: dict[tuple[tuple[str, str], str], Tensor | None] = {}  # None: asked for once

    def __reduce__(self) -> tuple[Any, ...]:
        return _State, (self.new, self.backfilled)

    @cached_property
    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows that count with their old and with their new vector."""
        return (~self.backfilled).nonzero()[:, 0], self.backfilled.nonzero()[:, 0]

    def packed(self, part: Segment, metric: str, names: tuple[str, str]) -> Tensor:
        """The keys in the form that the kernels read, from the second search of this state on; else empty."""
        name = (names, _native.simd())
        packed = self._packed.get(name)
        if packed is None and name in self._packed:
            packed = _search.pack(part, metric, names)
        self._packed[name] = packed
        return torch.empty(0, dtype=torch.float32, device="cpu") if packed is None else packed


class MixedGallery:
    """A gallery on its way from an old to a new embedding model: search it, re-embed items, save it.

    Every item counts with its old vector until `update` sets its new one; `search` is exactly
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
            ones included, is not copied and must not change. Lists and data frames are copied.
        new: [N, D_new], rows of items not backfilled hold anything (None: nothing is backfilled yet, and the
            first update says D_new). Never written to: the first update copies it.
        backfilled: [N] bool, given with `new`: which items count with their new vector.
        metric: "cosine", "ip" or "l2" (score = minus the squared distance).
        scale: factors of the old and of the new scores.
        offset: numbers added to the old and to the new scores.
        ids: [N] whole numbers below 2^63, the items' own ids, each once and none -1 (None: 0 .. N-1). Of two
            equal scores the item that is earlier in the gallery comes first.
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
        self._old = _inputs.matrix("old", old).detach()
        if (new is None) != (backfilled is None):
            given, missing = ("new", "backfilled") if backfilled is None else ("backfilled", "new")
            raise ValueError(f"`{missing}` must be given with `{given}`: got None; pass both or neither")
        mask = torch.zeros(len(self._old), dtype=torch.bool, device=self._old.device)
        if new is not None:
            new = _inputs.beside(_inputs.matrix("new", new), new, self._old).detach()
            _checks.rows("new", new, "old", self._old)
            _checks.same_device("new", new, "old", self._old)
            mask = _inputs.flags("backfilled", backfilled, ("old", self._old)).clone()
        _checks.choice("metric", metric, _checks.METRICS)
        _checks.choice("backend", backend, _checks.BACKENDS)
        self._metric, self._backend = metric, backend
        self._scale, self._offset = two_numbers("scale", scale), two_numbers("offset", offset)
        self._ids = None if ids is None else _Ids(ids, self._old)
        self._state = _State(new, mask)
        self._may_write = False  # into the new vectors' memory
        self._updating = threading.Lock()
        self._known: folders.Known = {}  # its own last state in the folders it was loaded from or saved to

    def __getstate__(self) -> dict[str, Any]:
        # A copy shares no lock, and must not write into new vectors that it may share.
        own = {name: value for name, value in vars(self).items() if name != "_updating"}
        return own | {"_may_write": False, "_known": dict(self._known)}

    def __setstate__(self, own: dict[str, Any]) -> None:
        vars(self).update(own, _updating=threading.Lock())

    def __len__(self) -> int:
        return len(self._old)

    def __repr__(self) -> str:
        sides = [f"old {_form(self._old)}"]
        if self._state.new is not None:
            sides.append(f"new {_form(self._state.new)}")
        done = f"{self.fraction:.1%} backfilled"
        return f"MixedGallery({len(self)} items: {', '.join(sides)}; {done}; metric {self._metric})"

    @property
    def fraction(self) -> float:
        """Share of the items that count with their new vector; 0 for an empty gallery."""
        return int(self._state.backfilled.sum()) / max(len(self), 1)

    def search(self, query_old: Array | None, query_new: Array | None, k: int) -> tuple[Array, Array]:
        """The best k items of every query, each ranked by the score in its own space (`mixed_topk`).

        Args:
            query_old: [B, D_old], or one vector [D_old]; may be None once every item is backfilled. A query
                of another dtype than the vectors costs time: the wider dtype is computed in, block by block.
            query_new: [B, D_new], or [D_new], the same queries in the new space; may be None while no item is
                backfilled.
            k: how many items to return.

        Returns:
            scores [B, k] and ids [B, k] (int64), best first; score -inf and id -1 where there are fewer than
            k items. [k] for one vector; tensors if the first query given is one, else NumPy arrays.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read, naming the
                first.
        """
        state, names = self._state, (("query_old", "old"), ("query_new", "new"))
        sides = zip((query_old, query_new), (self._old, state.new), state.rows, strict=True)
        parts: list[Segment] = []
        used: list[tuple[str, str]] = []
        queries: list[tuple[str, Tensor]] = []
        singles: list[bool] = []
        for s, (given, keys, rows) in enumerate(sides):
            needed = len(rows) > 0 or (s == 0 and len(self) == 0)
            if given is None:
                if needed:
                    raise ValueError(
                        f"`{names[s][0]}` must be given: got None, and {len(rows)} items need it"
                    )
                continue
            if keys is None:
                query, single = _inputs.queries(names[s][0], given)
            else:
                query, keys, single = _inputs.pair(names[s], given, keys, single=True)
            singles.append(single)
            queries.append((names[s][0], query))
            one_or_many(singles[0], single, queries[0][0], names[s][0])
            _checks.rows(*queries[-1], *queries[0])
            if keys is not None and needed:
                every = len(rows) == len(self)
                parts.append(Segment(query, keys, None if every else rows, self._scale[s], self._offset[s]))
                used.append(names[s])
        k = _checks.positive_int("k", k)
        native = all([_checks.use_native(self._backend, part.query) for part in parts])
        packed: list[Tensor] = []
        one_dtype = all(part.keys.dtype == part.query.dtype for part in parts)
        if native and one_dtype and not self._old.is_cuda:
            packed = [state.packed(part, self._metric, name) for part, name in zip(parts, used, strict=True)]
        scores, ids = _promoted.topk(parts, k, self._metric, native=native, names=used, packed=packed)
        if self._ids is not None:
            ids = self._ids.of_row[ids]
        if singles[0]:
            scores, ids = scores[0], ids[0]
        found: tuple[Array, Array] = _checks.like_input(
            (scores, ids), query_new if query_old is None else query_old
        )
        return found

    def update(self, ids: Given, vectors: Given) -> None:
        """From now on these items count with these new vectors. Bad input leaves the gallery as it was.

        Items that already had a new vector get another one; then all new vectors are copied once, so that
        searches under way keep what they read.

        Args:
            ids: [M] int64, items of the gallery, each once.
            vectors: [M, D_new], rounded to the dtype of the new vectors there are (the first update says
                dtype and D_new).

        Raises:
            ValueError, TypeError: arguments that do not fit; an unknown id; NaN or inf, naming the first row.
        """
        values = _inputs.beside(_inputs.matrix("vectors", vectors), vectors, self._old).detach()
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
                _checks.columns("new", new, "vectors", values)
                values = values.to(new.dtype)
                if not values.isfinite().all():
                    row = int((~values.isfinite().all(1)).nonzero()[0])
                    raise ValueError(
                        f"`vectors` must fit {new.dtype}, the dtype of the new vectors: row {row} does not"
                    )
                if not self._may_write or state.backfilled[rows].any():
                    new = new.clone()
            new[rows] = values  # rows that no search reads
            mask = state.backfilled.clone()
            mask[rows] = True
            self._may_write, self._state = True, _State(new, mask)

    def backfill(self, order: Given, embed: Callable[[Any], Given], *, batch: int = 1024) -> Iterator[float]:
        """Re-embed items in the given order, a batch at a time, leaving out those that are backfilled.

        A generator of `fraction` after each batch; between two batches save the gallery, show progress or
        stop. The same call on the loaded gallery resumes where it was saved::

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
        wanted = _inputs.rows("order", order, None, "ids")
        done = self._state.backfilled[self._rows("order", wanted)].to(wanted.device)
        left = _checks.like_input((wanted[~done],), order)[0]
        return self._batches(left, embed, _checks.positive_int("batch", batch))

    def _batches(self, ids: Any, embed: Callable[[Any], Given], batch: int) -> Iterator[float]:
        for first in range(0, len(ids), batch):
            some = ids[first : first + batch]
            self.update(some, embed(some))
            yield self.fraction

    def save(self, path: str | Path) -> None:
        """Write the gallery into a folder (made if missing): `.npy` files and `manifest.json`.

        The gallery that was saved there before stays whole until the new one is on the disk; then it is
        replaced, in one step. Saved again into the same folder, the old vectors are not written again.
        Bfloat16 is stored as int16 of the same bits. Saves into one folder wait for one another.

        A gallery that was loaded from this folder, or saved to it before, builds on that state alone:
        where someone else has saved there since, it is refused, so that no writer undoes another's work. The
        first save of a gallery that was made anew replaces what is there: load a gallery to continue it.

        Raises:
            ValueError: the folder cannot be made or written; someone else has saved there since; its
                `manifest.json` is of another program or another version. The gallery there stays whole.
        """

        def contents() -> tuple[dict[str, Tensor], dict[str, Any]]:
            state = self._state
            arrays = {"old": self._old}
            if state.new is not None:
                arrays |= {"new": state.new, "backfilled": state.backfilled}
            if self._ids is not None:
                arrays["ids"] = self._ids.of_row[:-1]
            return arrays, {"metric": self._metric, "scale": self._scale, "offset": self._offset}

        folders.save(Path(path), FORMAT, contents, CONSTANT, self._known)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        backend: str = "auto",
        verify: bool = False,
    ) -> MixedGallery:
        """The gallery that `save` wrote into this folder, memory-mapped: vectors are read when needed.

        Updates stay in memory until they are saved. The manifest, the ids, which items are backfilled, and
        dtype, shape and length of the vectors are always checked against what was saved.

        Args:
            path: the folder.
            device: where the vectors go; other devices than the CPU read them all.
            backend: "auto", "native" or "reference".
            verify: read all vectors too and check every byte (a checksum of each array, CRC-32).

        Raises:
            ValueError: no gallery there, one of another version, or a damaged file, by name.
        """
        _checks.choice("backend", backend, _checks.BACKENDS)
        folder = Path(path)
        arrays, values, known = folders.load(folder, FORMAT, None if verify else READ)
        values |= {name: array.to(device) for name, array in arrays.items()}
        try:
            gallery = cls(**values, backend=backend)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`path`: `{folder / folders.MANIFEST}` is damaged ({error})") from error
        gallery._may_write = True  # into private copies of the file's pages
        gallery._known = known
        return gallery

    def _rows(self, name: str, ids: Any, like: tuple[str, Tensor] | None = None) -> Tensor:
        """The rows of these items, each of them known and named once."""
        wanted = _inputs.rows(name, ids, like, "ids")
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


def _form(x: Tensor) -> str:
    return f"{x.shape[1]} dimensions of {str(x.dtype).removeprefix('torch.')}"


class _Ids:
    """The items' own ids, and their rows."""

    def __init__(self, ids: Any, old: Tensor) -> None:
        given = _inputs.rows("ids", ids, ("old", old), "ids")
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
