"""A gallery on its way from model to model: search it, re-embed items, add and remove them, commit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _inputs
from . import folder as format_1
from . import layout, saving
from .changing import SECOND, Changing, model_name
from .core import Core
from .ids import Ids, as_ids, kind_of, refuse_double, refuse_reserved
from .layout import DamagedError
from .mixed_topk import two_numbers
from .packed import PackedCache
from .reading import Given
from .state import Generation, State
from .vectors import MemoryVectors

CACHE = 1 << 30
FORMAT_1_READ = ("backfilled", "ids")  # arrays that are checked when such a gallery is loaded


class MixedGallery(Changing):
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
            ones included, is not copied and must not change. Lists and data frames are copied.
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
        values = _inputs.matrix("old", old).detach()
        if (new is None) != (backfilled is None):
            given, missing = ("new", "backfilled") if backfilled is None else ("backfilled", "new")
            raise ValueError(f"`{missing}` must be given with `{given}`: got None; pass both or neither")
        second = done = None
        if new is not None:
            second = _inputs.beside(_inputs.matrix("new", new), new, values).detach()
            _checks.rows("new", second, "old", values)
            _checks.same_device("new", second, "old", values)
            done = _inputs.flags("backfilled", backfilled, ("old", values)).cpu().numpy()
        _checks.choice("metric", metric, _checks.METRICS)
        scales, offsets = two_numbers("scale", scale), two_numbers("offset", offset)
        state = State(_index(ids, values))
        settings = {"metric": metric, "second": {"scale": scales[1], "offset": offsets[1]}}
        core = Core(state, settings)
        _first_model(core, 0, model_name("model", model), metadata, (scales[0], offsets[0]), values, None)
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
        self._origins = {}
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

    # --- the folder

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
            arrays, values, _ = format_1.load(folder, layout.FORMAT, None if verify else FORMAT_1_READ)
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
