"""A gallery on its way from model to model: search it, re-embed items, add and remove them, commit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _folder
from ..gallery import backfilled_mask, two_numbers
from . import layout, queries, saving
from .changes import Change
from .core import Core
from .ids import Ids, as_ids, kind_of, refuse_double, refuse_reserved, shown
from .layout import DamagedError
from .packed import PackedCache
from .state import Generation, State
from .vectors import MemoryVectors

Given = Tensor | np.ndarray[Any, Any]
CACHE = 1 << 30
FORMAT_1_READ = ("backfilled", "ids")  # arrays that are checked when such a gallery is loaded
SECOND = "new"  # the name of the second model where none is begun


class MixedGallery:
    """A gallery on its way from an old to a new embedding model: search it, re-embed items, save or commit.

    It holds an ordered list of models ("generations"). Every item counts with the vector of the newest model
    that it has one of, unless rolled back; `search` ranks all items in one exact pass, each by the score in
    its own space: with two models exactly what `fastcompat.mixed_topk` says of that moment. A model can be
    retired when nothing counts with it any more.

    In memory (this constructor, `load`) or in a folder (`create`, `open`), where any number of processes read
    and write beside one another: a change counts at once in this object, elsewhere after `commit`.

    Searches may run in any number of threads beside one another and beside changes: each sees the gallery
    before a change or after it, never half of one. From the second search of a part on, its vectors are kept
    in the form that the CPU kernels read, within `cache_bytes`.

    Example::

        gallery = fc.MixedGallery.create("gallery", old, ids=ids, model="v1")
        gallery.begin("v2")
        for batch in np.array_split(gallery.pending(), 100):
            gallery.update(batch, embed(batch), model="v2")
            gallery.commit()
        scores, found = gallery.search({"v1": query_old, "v2": query_new}, 10)

    Args:
        old: [N, D_old] float32, bfloat16, float16 or float64; a torch tensor or a NumPy array, memory-mapped
            ones included. It is not copied and must not change.
        new: [N, D_new], rows of items not backfilled hold anything (None: nothing is backfilled yet, and the
            first update says D_new). Never written to. Its model is called "new".
        backfilled: [N] bool, given with `new`: which items count with their new vector.
        metric: "cosine", "ip" or "l2" (score = minus the squared distance).
        scale: factors of the scores of the first and of the second model.
        offset: numbers added to the scores of the first and of the second model.
        ids: [N] the items' own ids, each once: int64, uint64 or str (None: 0 .. N-1). Not -1, 2^64-1 and "",
            which mark an empty place in a result. Of two equal scores the item that was added first comes
            first.
        model: the name of the first model.
        metadata: anything JSON knows, kept with the first model.
        cache_bytes: memory for packed copies; 0: none.
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
        ids: Any = None,
        model: str = "old",
        metadata: Mapping[str, Any] | None = None,
        cache_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        values = _checks.as_tensor("old", old).detach()
        _checks.matrix("old", values)
        if (new is None) != (backfilled is None):
            given, missing = ("new", "backfilled") if backfilled is None else ("backfilled", "new")
            raise ValueError(f"`{missing}` must be given with `{given}`: got None; pass both or neither")
        second = done = None
        if new is not None:
            second = _checks.as_tensor("new", new).detach()
            _checks.matrix("new", second)
            _checks.rows("new", second, "old", values)
            _checks.same_device("new", second, "old", values)
            done = backfilled_mask(backfilled, values).cpu().numpy()
        _checks.choice("metric", metric, _checks.METRICS)
        scales, offsets = two_numbers("scale", scale), two_numbers("offset", offset)
        state = State(_index(ids, values))
        settings = {"metric": metric, "second": {"scale": scales[1], "offset": offsets[1]}}
        core = Core(state, settings)
        _first_model(core, 0, _name("model", model), metadata, (scales[0], offsets[0]), values, None)
        if second is not None:
            if model == SECOND:
                raise ValueError(
                    f'`model` must not be "{SECOND}", the name of the second model: got "{SECOND}"'
                )
            _first_model(core, 1, SECOND, None, (scales[1], offsets[1]), second, done)
        state.alive = len(values)
        core.publish()
        self._finish(core, cache_bytes, backend)

    def _finish(self, core: Core, cache_bytes: int | None, backend: str) -> None:
        _checks.choice("backend", backend, _checks.BACKENDS)
        budget = CACHE if cache_bytes is None else _checks.whole("cache_bytes", cache_bytes)
        if budget < 0:
            raise ValueError(f"`cache_bytes` must be at least 0: got {budget}")
        self._core, self._backend = core, backend
        self._cache_bytes, self._cache = cache_bytes, PackedCache(budget)
        self._origins: saving.Origins = {}  # where an in-memory gallery was saved or loaded
        self._closed = False

    # --- in a folder

    @classmethod
    def create(
        cls,
        path: str | Path,
        old: Given,
        new: Given | None = None,
        backfilled: Given | None = None,
        *,
        cache_bytes: int | None = None,
        backend: str = "auto",
        **named: Any,
    ) -> MixedGallery:
        """A gallery that lives in a folder (made if missing), open for writing; arguments as above.

        Raises:
            ValueError: arguments that do not fit; NaN or inf in a vector; a gallery in the folder already.
            OSError: the folder cannot be written; what is there is as it was.
        """
        gallery = cls(old, new, backfilled, **named)
        _warn_of_zeros("old", gallery._core)
        saving.create(Path(path), gallery._core)
        return cls.open(path, writable=True, cache_bytes=cache_bytes, backend=backend)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        writable: bool = False,
        verify: bool = False,
        cache_bytes: int | None = None,
        backend: str = "auto",
    ) -> MixedGallery:
        """The gallery in a folder, memory-mapped; any number of readers beside any number of writers.

        A reader follows the others' commits by itself at the next search. `with` closes it.

        Args:
            path: the folder.
            writable: whether this object may change and commit.
            verify: check every byte now; otherwise each vector when it is first read.
            cache_bytes: memory for packed copies (None: 1 GiB; 0: none).
            backend: "auto", "native" or "reference".

        Raises:
            FileNotFoundError: nothing there.
            ValueError: no gallery of this format, or a damaged file, by its name.
            OSError: a file cannot be read.
        """
        if verify and (found := saving.damages(Path(path))):
            raise DamagedError(f"`path`: {len(found)} damages in `{path}`; the first: {found[0]}")
        gallery = cls.__new__(cls)
        gallery._finish(Core.open(Path(path), writable=writable), cache_bytes, backend)
        return gallery

    def __enter__(self) -> MixedGallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the folder's files go; uncommitted changes are dropped, with a warning."""
        core = self._core
        if core.folder is not None and not self._closed:
            if core.pending:
                warnings.warn(f"{len(core.pending)} uncommitted changes are dropped", stacklevel=2)
            core.close()
            self._closed = True

    def _open(self) -> Core:
        if self._closed:
            raise ValueError("this gallery is closed: open it again")
        return self._core

    def _changing(self) -> Core:
        core = self._open()
        if core.folder is not None and not core.folder.writable:
            raise ValueError("this gallery is open for reading: open it with writable=True to change it")
        return core

    # --- what it holds

    def __len__(self) -> int:
        return self._open().state.alive

    @property
    def models(self) -> list[str]:
        """The names of the models, the oldest first."""
        return [g.name for g in self._open().state.generations]

    @property
    def metric(self) -> str:
        """ "cosine", "ip" or "l2"."""
        return str(self._open().settings["metric"])

    @property
    def ids(self) -> np.ndarray[Any, Any]:
        """The items' ids, in the order in which they were added."""
        state = self._open().state
        return state.ids.at(state.live_items())

    @property
    def fraction(self) -> float:
        """Share of the items that count with the newest model; 0 for an empty gallery."""
        core = self._open()
        if self._second_to_come():
            return 0.0
        return core.state.generations[-1].count / max(core.state.alive, 1)

    def pending(self, model: str | None = None) -> np.ndarray[Any, Any]:
        """The ids of the items that do not count with this model (None: the newest) or a newer one yet."""
        core = self._open()
        with core.mutex:
            state = core.state
            live = state.live_items()
            if model is None and self._second_to_come():
                return state.ids.at(live)
            generation = state.generations[-1] if model is None else self._generation("model", model)
            return state.ids.at(live[state.level[live] < generation.serial])

    def vectors(self, ids: Any, model: str) -> Any:
        """The vectors [M, D] of these items in this model, copied; a NumPy array if `ids` is one."""
        core = self._open()
        with core.mutex:
            wanted = as_ids("ids", ids, core.state.ids.kind)
            items = self._known("ids", wanted)
            generation = self._generation("model", model)
            slots = generation.slots(items)
            if (slots < 0).any():
                without = wanted[slots < 0][0]
                raise ValueError(f"`ids`: item {shown(without)} has no vector of `{model}`")
            vectors = generation.vectors
            assert vectors is not None or not len(slots)
        if vectors is None:
            raise ValueError(f"`model`: `{model}` has no vectors yet")
        core.check(generation)
        found = vectors.read(slots)
        if isinstance(ids, np.ndarray) and found.dtype != torch.bfloat16:
            return found.numpy()
        return found

    def _second_to_come(self) -> bool:
        """Whether the second model is the one that the first update brings."""
        state = self._core.state
        return state.next_serial == 1 and len(state.generations) == 1 and bool(self._core.settings["second"])

    def _generation(self, name: str, model: Any) -> Generation:
        found = self._core.state.generation(model) if isinstance(model, str) else None
        if found is None:
            raise ValueError(
                f"`{name}` must be a model of this gallery ({_listed(self.models)}): got {model!r}"
            )
        return found

    def _known(self, name: str, wanted: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The items of these ids, each of them known and named once."""
        items = self._core.state.find(wanted)
        if (items < 0).any():
            missing = wanted[items < 0][0]
            raise ValueError(f"`{name}` must name items of this gallery: it holds no item {shown(missing)}")
        refuse_double(name, wanted)
        return items

    # --- search

    def search(
        self,
        query_old: Any,
        query_new: Any = None,
        k: int | None = None,
        *,
        allow: Any = None,
        exclude: Any = None,
        partial: bool = False,
    ) -> tuple[Any, Any]:
        """The best k items of every query, each ranked by the score in its own space.

        `search(query_old, query_new, k)` while there are at most two models, or
        `search({"v1": query_v1, "v2": query_v2}, k)`; both say the same. A model that nothing counts with
        needs no query.

        Args:
            query_old: [B, D_old], of the dtype of the oldest model's vectors, or a mapping of models to
                queries of the same B (then `k` comes next).
            query_new: [B, D_new], the same queries in the newest model's space.
            k: how many items to return.
            allow: ids, or a mask [len(gallery)] in the order of `ids`: only these are searched. Ids that the
                gallery does not hold are passed over.
            exclude: ids or a mask, of items that are not searched.
            partial: search only the models whose query is given (a model is down), with a warning that says
                how many items were left out.

        Returns:
            scores [B, k] and ids [B, k], best first; score -inf and id -1 (2^64-1 for uint64, "" for str)
            where there are fewer than k items. NumPy arrays for NumPy queries; ids of uint64 and str are
            always NumPy arrays.

        Raises:
            ValueError, TypeError: arguments that do not fit; NaN or inf in a row that is read; a damaged row.
        """
        core = self._open()
        if isinstance(query_old, Mapping):
            k, given = query_new if k is None else k, dict(query_old)
        else:
            given = None
        core.refresh()
        while True:
            view = core.view
            asked, like = self._asked(given, query_old, query_new)
            count = _checks.positive_int("k", k)
            scores, items = queries.topk(
                core, view, asked, count, core.settings["metric"], cache=self._cache, backend=self._backend,
                allowed=queries.mask(core, view, allow, exclude), partial=partial,
            )  # fmt: skip
            with core.mutex:  # numbers of uncommitted items change when another writer's come in between
                if view.renumbered == core.renumbered or view.state is not core.state:
                    found = self._idsof(view.state.ids, items)
                    break
        if isinstance(like, np.ndarray):
            return scores.cpu().numpy(), found
        if isinstance(found, np.ndarray) and found.dtype == np.int64:
            return scores, torch.from_numpy(found).to(scores.device)
        return scores, found

    @staticmethod
    def _idsof(index: Ids, items: Tensor) -> np.ndarray[Any, Any]:
        return index.at(items.cpu().numpy())

    def _asked(
        self, given: dict[str, Any] | None, query_old: Any, query_new: Any
    ) -> tuple[dict[str, queries.Query], Any]:
        """The queries by model, and the first one as it came."""
        models = self.models
        if given is None:
            if len(models) > 2:
                raise ValueError(
                    f"`query_old` must be a mapping with queries for {_listed(models)}: got one of two"
                )
            names = [("query_old", models[0]), ("query_new", models[-1])]
            if len(models) == 1:
                lone = 0 if self._second_to_come() else 1
                names = [(name, models[0] if place == lone else "") for place, (name, _) in enumerate(names)]
            sides = [
                (n, m, q) for (n, m), q in zip(names, (query_old, query_new), strict=True) if q is not None
            ]
            if not sides:
                raise ValueError("`query_old` or `query_new` must be given: got None twice")
        else:
            for model in given:
                self._generation("queries", model)
            sides = [(f'queries["{m}"]', m, q) for m, q in given.items() if q is not None]
            if not sides:
                raise ValueError(f"`queries` must hold queries for {_listed(models)}: got none")
        asked: dict[str, queries.Query] = {}
        first: tuple[str, Tensor] | None = None
        for name, model, value in sides:
            query = _checks.as_tensor(name, value)
            _checks.matrix(name, query)
            first = first or (name, query)
            _checks.rows(name, query, *first)
            if model or len(sides) == 1:
                asked[model or "?"] = queries.Query(name, query)
        return asked, sides[0][2]

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
            name = _name("model", model)
            if core.state.generation(name) is not None:
                raise ValueError(f"`model` must be a new name: the gallery has {_listed(self.models)}")
            if core.state.next_serial > 126:
                raise ValueError("126 models were begun since the last compact(): call it first")
            about = {"metadata": dict(metadata or {}), "scale": float(scale), "offset": float(offset)}
            core.do(Change("begin", name, about=about), _NONE)

    def update(self, ids: Any, vectors: Given, model: str | None = None) -> None:
        """From now on these items count with these vectors of the newest model.

        Without a `begin`, the first update of a gallery of one model brings the second, called "new".

        Args:
            ids: [M] items of the gallery, each once.
            vectors: [M, D], of the width and dtype of the model's vectors that there are (its first ones say
                which).
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
            embed: called with ids [batch] (an array if `order` is one); returns their new vectors
                [batch, D_new], as `update` takes them.
            batch: how many items to embed at once.

        Raises:
            ValueError, TypeError: arguments that do not fit, at once; what `update` refuses, at that batch.
        """
        core = self._changing()
        with core.mutex:
            items = self._known("order", _ids("order", order, core))
            newest = 1 if self._second_to_come() else core.state.generations[-1].serial
            todo = core.state.level[items] != newest
        if isinstance(order, (Tensor, np.ndarray)):
            left = order[torch.from_numpy(todo).to(order.device) if isinstance(order, Tensor) else todo]
        else:
            left = [one for one, wanted in zip(order, todo, strict=True) if wanted]
        return self._batches(left, embed, _checks.positive_int("batch", batch))

    def _batches(self, left: Any, embed: Callable[[Any], Given], batch: int) -> Iterator[float]:
        for first in range(0, len(left), batch):
            some = left[first : first + batch]
            self.update(some, embed(some))
            yield self.fraction

    def _chosen(self, model: str | None) -> Generation:
        return self._core.state.generations[-1] if model is None else self._generation("model", model)

    def _values(self, vectors: Any, generation: Generation | None) -> Tensor:
        values = _checks.as_tensor("vectors", vectors).detach()
        _checks.matrix("vectors", values)
        first = self._core.state.generations[0]
        if isinstance(first.vectors, MemoryVectors):
            like = torch.empty(0, device=first.vectors.device)
            _checks.same_device("vectors", values, first.name, like)
        if generation is not None and (there := generation.vectors) is not None:
            like = torch.empty(0, there.width, dtype=there.dtype, device=values.device)
            _checks.pair(values, like, ("vectors", generation.name))
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

    # --- the folder

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

    def refresh(self) -> None:
        """See what others committed; a search does so by itself."""
        self._open().refresh()

    def compact(self) -> None:
        """Commit, and write what counts into new files: removed items and old vectors are erased.

        Readers keep the files that they have open until their next search.
        """
        core = self._changing()
        if core.folder is None:
            raise ValueError("this gallery is in memory: there is nothing to compact")
        core.compact()
        self._cache.clear()

    def snapshot(self, path: str | Path) -> None:
        """Write the state of now into another folder: how a live gallery is backed up.

        Raises:
            ValueError: a gallery in that folder; a damaged file of this one.
            OSError: the folder cannot be written.
        """
        saving.create(Path(path), self._open())

    def save(self, path: str | Path) -> None:
        """Write the gallery into a folder (made if missing), format 2.

        Saved again into the folder that it was saved to or loaded from last, only what changed since is
        written, after what other writers committed there. Another gallery is replaced, and stays whole until
        the new one is on the disk; but a folder that this gallery was saved to or loaded from, and that holds
        another history now, is refused.

        Raises:
            ValueError: the folder cannot be made or written, holds a newer format, or was replaced or put
                back from a backup meanwhile. What is there stays whole.
        """
        try:
            saving.save(Path(path), self._open(), self._origins)
        except OSError as error:
            raise ValueError(
                f"`path`: cannot write to the folder `{path}` ({error.strerror}); name another one"
            ) from error

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        cache_bytes: int | None = None,
        backend: str = "auto",
        verify: bool = False,
    ) -> MixedGallery:
        """The gallery of a folder (formats 1 and 2), memory-mapped; updates stay in memory until saved.

        Args:
            path: the folder.
            device: where the vectors go; other devices than the CPU read them all.
            cache_bytes: memory for packed copies (None: 1 GiB; 0: none).
            backend: "auto", "native" or "reference".
            verify: read and check every byte now; otherwise each vector when it is first read (of format 1:
                never).

        Raises:
            ValueError: no gallery there, one of another version, or a damaged file, by name.
        """
        _checks.choice("backend", backend, _checks.BACKENDS)
        folder = Path(path)
        try:
            found = layout.read_manifest(folder)
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"`path` must be a folder that `save` wrote: no {layout.FORMAT} in `{path}`"
            ) from None
        except OSError as error:
            raise ValueError(
                f"`path`: cannot read `{folder / layout.MANIFEST}` ({error.strerror})"
            ) from error
        if found.get("version") == 1:
            arrays, values, _ = _folder.load(folder, layout.FORMAT, None if verify else FORMAT_1_READ)
            values |= {name: array.to(device) for name, array in arrays.items()}
            try:
                gallery = cls(**values, cache_bytes=cache_bytes, backend=backend)
            except (ValueError, TypeError) as error:
                raise ValueError(f"`path`: `{folder / layout.MANIFEST}` is damaged ({error})") from error
            gallery._origins[folder.resolve()] = saving.Origin(folder.resolve(), None, found)
            return gallery
        try:
            if verify and (wrong := saving.damages(folder)):
                raise DamagedError(f"`path`: {len(wrong)} damages in `{path}`; the first: {wrong[0]}")
            core, origin = saving.load(folder, torch.device(device))
        except OSError as error:
            raise ValueError(f"`path`: cannot read the folder `{path}` ({error.strerror})") from error
        gallery = cls.__new__(cls)
        gallery._finish(core, cache_bytes, backend)
        gallery._origins[origin.path] = origin
        return gallery

    def verify(self) -> list[str]:
        """What is damaged in the gallery's folder, by name; [] = sound. Reads every byte that counts."""
        core = self._open()
        folders = (
            [core.folder.path]
            if core.folder is not None
            else [origin.path for origin in self._origins.values() if origin.folder is not None]
        )
        return [one for folder in folders for one in saving.damages(folder)]

    def check(self, encoder: Callable[[Any], Given], model: str) -> float:
        """Re-embed up to 32 items and refuse an encoder that is not the one that made this model's vectors.

        Args:
            encoder: `encoder(ids) -> [M, D]`.
            model: whose vectors it should give.

        Returns:
            The lowest cosine between a stored and a fresh vector; NaN while the model has no vectors.

        Raises:
            ValueError: a cosine below 0.999, or for "ip" and "l2" a relative difference above 0.045; another
                shape.
        """
        core = self._open()
        with core.mutex:
            generation = self._generation("model", model)
            items = np.array([item for item, _ in generation.canaries], np.int64)
            slots = np.array([slot for _, slot in generation.canaries], np.int64)
            names, vectors = core.state.ids.at(items), generation.vectors
        if not len(items) or vectors is None:
            return float("nan")
        core.check(generation)
        stored = vectors.read(slots).double().cpu()
        fresh = _checks.as_tensor("encoder(ids)", encoder(names)).detach().double().cpu()
        if fresh.shape != stored.shape:
            raise ValueError(
                f"`encoder` must give vectors of `{model}`: got shape {list(fresh.shape)} "
                f"and not {list(stored.shape)}"
            )
        cosine = torch.nn.functional.cosine_similarity(stored, fresh)
        cosine = torch.where((stored == 0).all(1) & (fresh == 0).all(1), 1.0, cosine)
        moved = (fresh - stored).norm(dim=1) / stored.norm(dim=1).clamp(min=1e-30)
        worst = int(cosine.argmin())
        if not float(cosine[worst]) >= 0.999:
            raise ValueError(
                f"`encoder` is not the one that made the vectors of `{model}`: item "
                f"{shown(names[worst])} has cosine {float(cosine[worst]):.4f} "
                "with its stored vector (at least 0.999 expected)"
            )
        if core.settings["metric"] != "cosine" and float(moved.max()) > 0.045:
            worst = int(moved.argmax())
            raise ValueError(
                f"`encoder` is not the one that made the vectors of `{model}`: item {shown(names[worst])} "
                f"differs by {float(moved[worst]):.3f} of its norm (at most 0.045 expected)"
            )
        return float(cosine[worst])

    # --- copies

    def __getstate__(self) -> dict[str, Any]:
        core = self._open()
        rest = {"cache_bytes": self._cache_bytes, "backend": self._backend}
        if core.folder is not None:
            if core.pending:
                raise ValueError(
                    "this gallery has uncommitted changes: commit before it is pickled or copied"
                )
            return rest | {"path": str(core.folder.path), "writable": core.folder.writable}
        return rest | {"memory": saving.dump(core)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "memory" in state:
            core = saving.undump(state["memory"])
        else:
            core = Core.open(Path(state["path"]), writable=state["writable"])
        self._finish(core, state["cache_bytes"], state["backend"])


_NONE = np.empty(0, np.int64)


def _ids(name: str, value: Any, core: Core) -> np.ndarray[Any, Any]:
    return as_ids(name, value, core.state.ids.kind)


def _index(given: Any, old: Tensor) -> Ids:
    if given is None:
        return Ids("int64", {}, plain=len(old))
    kind = kind_of("ids", given)
    found = as_ids("ids", given, kind)
    if len(found) != len(old):
        raise ValueError(f"`ids` must have one entry per row of `old`: got {len(found)} and {len(old)}")
    if isinstance(given, Tensor):
        _checks.same_device("ids", given, "old", old)
    refuse_double("ids", found)
    refuse_reserved("ids", found, kind)
    return Ids.of(found, kind)


def _name(argument: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"`{argument}` must be the name of a model: got {name!r}")
    return name


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _first_model(
    core: Core,
    gid: int,
    name: str,
    metadata: Mapping[str, Any] | None,
    terms: tuple[float, float],
    values: Tensor,
    counts: np.ndarray[Any, Any] | None,
) -> None:
    """A model whose vectors are given: row = item = slot."""
    state = core.state
    generation = Generation(name, state.next_serial, metadata, *terms)
    state.begin(generation)
    core.adopt(gid, MemoryVectors(values, len(values)))
    generation.gid, generation.vectors, generation.clean = gid, core.attach(gid), False
    items = np.arange(len(values)) if counts is None else np.flatnonzero(counts)
    state.set(items, generation.serial, {generation.serial: items})
    state.remember(generation, items, items)


def _warn_of_zeros(name: str, core: Core) -> None:
    if core.settings["metric"] != "cosine":
        return
    vectors = core.state.generations[0].vectors
    assert isinstance(vectors, MemoryVectors)
    rows, step = vectors.base_rows(), 65536
    blocks = (rows[first : first + step] for first in range(0, len(rows), step))
    zeros = sum((int((block == 0).all(1).sum()) for block in blocks), 0)
    if zeros:
        warnings.warn(
            f"{zeros} of {vectors.count} rows of `{name}` are zero: their cosine is 0 with everything",
            stacklevel=3,
        )
