"""What changes a gallery: models, items, vectors; at once in this object, elsewhere with `commit`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _inputs
from .changes import Change
from .core import Core
from .ids import as_ids, refuse_double, refuse_reserved, shown
from .reading import Given, Reading, listed
from .state import Generation
from .vectors import MemoryVectors

SECOND = "new"  # the name of the second model where none is begun


class Changing(Reading):
    """The part of `MixedGallery` that changes it."""

    def _changing(self) -> Core:
        core = self._open()
        if core.folder is not None and not core.folder.writable:
            raise ValueError("this gallery is open for reading: open it with writable=True to change it")
        return core

    # --- changes

    def begin(
        self,
        model: str,
        *,
        metadata: Mapping[str, Any] | None = None,
        scale: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        """A further, newest model; its width and dtype come with its first vectors.

        Args:
            model: its name. Two writers that begin a model of one name, width and dtype share it.
            metadata: anything JSON knows, kept with the name.
            scale: factor of its scores.
            offset: number added to its scores.

        Raises:
            ValueError: a model of this name is there.
        """
        core = self._changing()
        with core.mutex:
            name = model_name("model", model)
            if core.state.generation(name) is not None:
                raise ValueError(f"`model` must be a new name: the gallery has {listed(self.models)}")
            if core.state.next_serial > 126:
                raise ValueError("126 models were begun since the last compact(): call it first")
            about = {"metadata": dict(metadata or {}), "scale": float(scale), "offset": float(offset)}
            core.do(Change("begin", name, about=about), _NONE)

    def update(self, ids: Any, vectors: Given, model: str | None = None) -> None:
        """From now on these items count with these vectors of the newest model.

        Without a `begin`, the first update of a gallery of one model brings the second, called "new".

        Args:
            ids: [M] items of the gallery, each once.
            vectors: [M, D], rounded to the dtype of the model's vectors that there are (its first ones say
                dtype and D).
            model: the name of the newest model, as a check; vectors of another one are refused.

        Raises:
            ValueError, TypeError: arguments that do not fit; an unknown id; NaN or inf, naming the first row.
                The gallery is as it was.
            OSError: no room on the disk, and the like; the gallery is as it was.
        """
        core = self._changing()
        with core.mutex:
            if self._second_to_come() and model in (None, SECOND):
                self._checked(ids, vectors, None, new=False)
                second = core.settings["second"]
                self.begin(SECOND, scale=second["scale"], offset=second["offset"])
            newest = core.state.generations[-1]
            if model is not None and model != newest.name:
                self._generation("model", model)
                raise ValueError(
                    f"`model` must be the newest model `{newest.name}`: got {model!r}; `replace` and `add` "
                    "take vectors of older ones"
                )
            self._put("put", ids, vectors, newest)

    def replace(self, ids: Any, vectors: Given, model: str | None = None) -> None:
        """The items' content changed: these are their vectors, and all others of theirs are dropped.

        Args and raises as `update`, but for `model`: any model of the gallery (None: the newest).
        """
        core = self._changing()
        with core.mutex:
            self._put("replace", ids, vectors, self._chosen(model))

    def add(self, ids: Any, vectors: Given, model: str | None = None) -> None:
        """New items, which come behind those that are there.

        Args:
            ids: [M] ids that the gallery does not hold, each once.
            vectors: [M, D].
            model: whose vectors they are (None: the newest model's).

        Raises:
            ValueError, TypeError, OSError: as `update`.
        """
        core = self._changing()
        with core.mutex:
            self._put("add", ids, vectors, self._chosen(model))

    def remove(self, ids: Any) -> None:
        """These items are gone at once; `compact` erases their bytes.

        Raises:
            ValueError, TypeError: an unknown id.
        """
        core = self._changing()
        with core.mutex:
            wanted = _ids("ids", ids, core)
            core.do(Change("remove", ids=wanted), self._known("ids", wanted))

    def rollback(self, ids: Any, to: str) -> None:
        """The items count with this model again, until a later update; their newer vectors are dropped.

        Raises:
            ValueError, TypeError: an unknown id or model; an item without a vector of that model.
        """
        core = self._changing()
        with core.mutex:
            wanted, generation = _ids("ids", ids, core), self._generation("to", to)
            items = self._known("ids", wanted)
            without = generation.slots(items) < 0
            if without.any():
                raise ValueError(
                    f"`ids`: item {shown(wanted[without][0])} has no vector of `{to}` to go back to"
                )
            core.do(Change("rollback", to, ids=wanted), items)

    def retire(self, model: str) -> None:
        """A model that nothing counts with is gone with its vectors, the newest one as well.

        Raises:
            ValueError: items count with it; the only model.
        """
        core = self._changing()
        with core.mutex:
            generation = self._generation("model", model)
            if generation.count:
                raise ValueError(
                    f"`model`: {generation.count} items count with `{model}`; update or roll back those first"
                )
            if len(core.state.generations) == 1:
                raise ValueError(f"`model`: `{model}` is the only model of the gallery")
            core.do(Change("retire", model, gid=generation.gid), _NONE)

    def backfill(self, order: Any, embed: Callable[[Any], Given], *, batch: int = 1024) -> Iterator[float]:
        """Re-embed items in the given order, a batch at a time, leaving out those that are backfilled.

        A generator of `fraction` after each batch; between two batches commit, show progress or stop. The
        same call on the gallery opened again goes on where it was committed::

            for fraction in gallery.backfill(order, embed):
                gallery.commit()

        Args:
            order: [M] ids of items, each once, first to be backfilled first.
            embed: called with ids [batch], a tensor if `order` is one, else a NumPy array; returns their new
                vectors [batch, D_new], as `update` takes them.
            batch: how many items to embed at once.

        Raises:
            ValueError, TypeError: arguments that do not fit, at once; what `update` refuses, at that batch.
        """
        core = self._changing()
        with core.mutex:
            wanted = _ids("order", order, core)
            items = self._known("order", wanted)
            newest = 1 if self._second_to_come() else core.state.generations[-1].serial
            todo = core.state.level[items] != newest
        left: Any = wanted[todo]
        if isinstance(order, Tensor):
            left = torch.from_numpy(left).to(order.device)
        return self._batches(left, embed, _checks.positive_int("batch", batch))

    def _batches(self, left: Any, embed: Callable[[Any], Given], batch: int) -> Iterator[float]:
        for first in range(0, len(left), batch):
            some = left[first : first + batch]
            self.update(some, embed(some))
            yield self.fraction

    def _chosen(self, model: str | None) -> Generation:
        return self._core.state.generations[-1] if model is None else self._generation("model", model)

    def _values(self, vectors: Any, generation: Generation | None) -> Tensor:
        values = self._beside(_inputs.matrix("vectors", vectors), vectors).detach()
        first = self._core.state.generations[0]
        if isinstance(first.vectors, MemoryVectors):
            like = torch.empty(0, dtype=values.dtype, device=first.vectors.device)
            _checks.same_device("vectors", values, first.name, like)
        if generation is not None and (there := generation.vectors) is not None:
            like = torch.empty(0, there.width, dtype=there.dtype, device=values.device)
            _checks.columns(generation.name, like, "vectors", values)
        return values

    def _wanted(self, ids: Any, values: Tensor, *, new: bool = False) -> np.ndarray[Any, Any]:
        core = self._core
        wanted = _ids("ids", ids, core)
        if len(wanted) != len(values):
            raise ValueError(
                f"`ids` must have one entry per row of `vectors`: got {len(wanted)} and {len(values)}"
            )
        if not new:
            self._known("ids", wanted)
            return wanted
        refuse_reserved("ids", wanted, core.state.ids.kind)
        refuse_double("ids", wanted)
        there = core.state.find(wanted) >= 0
        if there.any():
            raise ValueError(
                f"`ids` must be new: the gallery holds item {shown(wanted[there][0])}; `replace` its vectors"
            )
        return wanted

    def _checked(
        self, ids: Any, vectors: Any, generation: Generation | None, *, new: bool
    ) -> tuple[np.ndarray[Any, Any], Tensor]:
        values = self._values(vectors, generation)
        wanted = self._wanted(ids, values, new=new)
        bad = ~values.isfinite().all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(f"`vectors` must be finite: row {row} holds NaN or inf; embed that item again")
        if generation is not None and (there := generation.vectors) is not None:
            values = values.to(there.dtype)
            if not values.isfinite().all():
                row = int((~values.isfinite().all(1)).nonzero()[0])
                raise ValueError(
                    f"`vectors` must fit {there.dtype}, the dtype of the {generation.name} vectors: "
                    f"row {row} does not"
                )
        return wanted, values

    def _put(self, kind: str, ids: Any, vectors: Any, generation: Generation) -> None:
        core = self._core
        wanted, values = self._checked(ids, vectors, generation, new=kind == "add")
        if core.settings["metric"] == "cosine" and len(values):
            zeros = int((values == 0).all(1).sum())
            if zeros:
                warnings.warn(
                    f"{zeros} of {len(values)} vectors are zero: their cosine is 0 with everything",
                    stacklevel=3,
                )
        if not len(values) and core.folder is not None:
            return
        gid, slots, crcs = core.write(generation, values)
        change = Change(kind, generation.name, wanted, slots, crcs, gid)
        items = _NONE if kind == "add" else core.state.find(wanted)
        core.do(change, items)

    def commit(self) -> None:
        """Bring this object's changes into the folder: on the disk, and visible to all, when it returns.

        Writes what changed. Changes that others committed meanwhile come first: an item that another writer
        removed stays removed; of two vectors for one item the later commit's counts.

        Raises:
            ValueError: the gallery is in memory or open for reading; the folder was replaced or put back from
                a backup; a change that another writer's leaves no place for, which is dropped.
            OSError: no room on the disk, and the like; the changes stay uncommitted.
        """
        core = self._changing()
        if core.folder is None:
            raise ValueError("this gallery is in memory: `save` it, or make it with `create` to commit")
        core.commit()

    def compact(self) -> None:
        """Commit, and write what counts into new files: removed items and old vectors are erased.

        Readers keep the files that they have open until their next search.
        """
        core = self._changing()
        if core.folder is None:
            raise ValueError("this gallery is in memory: there is nothing to compact")
        core.compact()
        self._cache.clear()


_NONE = np.empty(0, np.int64)


def _ids(name: str, value: Any, core: Core) -> np.ndarray[Any, Any]:
    return as_ids(name, value, core.state.ids.kind)


def model_name(argument: str, name: Any) -> str:
    """The name of a model, checked."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{argument}` must be the name of a model: got {name!r}")
    return name
