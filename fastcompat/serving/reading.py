"""What a gallery says: what it holds, what it finds, whether it is whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _inputs
from . import queries, saving
from .core import Core
from .ids import as_ids, refuse_double, shown
from .mixed_topk import one_or_many
from .packed import PackedCache
from .state import Generation
from .vectors import NAMES, MemoryVectors

if TYPE_CHECKING:
    from typing_extensions import Self

Given = Tensor | np.ndarray[Any, Any]


class Reading:
    """The part of `MixedGallery` that changes nothing."""

    _core: Core
    _backend: str
    _cache: PackedCache
    _origins: saving.Origins  # the folders where an in-memory gallery was saved or loaded
    _closed: bool

    def __enter__(self) -> Self:
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

    def _beside(self, x: Tensor, value: Any) -> Tensor:
        """What was given as anything but a tensor, on the device of the vectors."""
        first = self._core.state.generations[0].vectors
        if not isinstance(first, MemoryVectors):
            return x
        return _inputs.beside(x, value, torch.empty(0, dtype=x.dtype, device=first.device))

    # --- what it holds

    def __repr__(self) -> str:
        if self._closed:
            return "MixedGallery(closed)"
        models = [
            g.name
            if g.vectors is None
            else f"{g.name} {g.vectors.width} dimensions of {NAMES[g.vectors.dtype]}"
            for g in self._core.state.generations
        ]
        done = f"{self.fraction:.1%} backfilled"
        return f"MixedGallery({len(self)} items: {', '.join(models)}; {done}; metric {self.metric})"

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
                f"`{name}` must be a model of this gallery ({listed(self.models)}): got {model!r}"
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
            query_old: [B, D_old], or one vector [D_old], or a mapping of models to queries of the same B
                (then `k` comes next). A query of another dtype than the vectors costs time: the wider dtype
                is computed in, block by block.
            query_new: [B, D_new], or [D_new], the same queries in the newest model's space.
            k: how many items to return.
            allow: ids, or a mask [len(gallery)] in the order of `ids`: only these are searched. Ids that the
                gallery does not hold are passed over.
            exclude: ids or a mask, of items that are not searched.
            partial: search only the models whose query is given (a model is down), with a warning that says
                how many items were left out.

        Returns:
            scores [B, k] and ids [B, k], best first; score -inf and id -1 (2^64-1 for uint64, "" for str)
            where there are fewer than k items. [k] for one vector; tensors if the first query given is one,
            else NumPy arrays; ids of uint64 and str are always NumPy arrays.

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
            asked, like, single = self._asked(given, query_old, query_new)
            count = _checks.positive_int("k", k)
            scores, items = queries.topk(
                core, view, asked, count, core.settings["metric"], cache=self._cache, backend=self._backend,
                allowed=queries.mask(core, view, allow, exclude), partial=partial,
            )  # fmt: skip
            with core.mutex:  # numbers of uncommitted items change when another writer's come in between
                if view.renumbered == core.renumbered or view.state is not core.state:
                    found = view.state.ids.at(items.cpu().numpy())
                    break
        if single:
            scores, found = scores[0], found[0]
        if not isinstance(like, Tensor):
            return scores.cpu().numpy(), found
        if isinstance(found, np.ndarray) and found.dtype == np.int64:
            return scores, torch.from_numpy(found).to(scores.device)
        return scores, found

    def _asked(
        self, given: dict[str, Any] | None, query_old: Any, query_new: Any
    ) -> tuple[dict[str, queries.Query], Any, bool]:
        """The queries by model, the first one as it came, and whether each is a single vector."""
        models = self.models
        if given is None:
            if len(models) > 2:
                raise ValueError(
                    f"`query_old` must be a mapping with queries for {listed(models)}: got one of two"
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
                raise ValueError(f"`queries` must hold queries for {listed(models)}: got none")
        asked: dict[str, queries.Query] = {}
        first: tuple[str, Tensor] | None = None
        singles: list[bool] = []
        for name, model, value in sides:
            query, single = _inputs.queries(name, value)
            query = self._beside(query, value)
            singles.append(single)
            one_or_many(singles[0], single, sides[0][0], name)
            first = first or (name, query)
            _checks.rows(name, query, *first)
            if model or len(sides) == 1:
                asked[model or "?"] = queries.Query(name, query)
        return asked, sides[0][2], singles[0]

    def refresh(self) -> None:
        """See what others committed; a search does so by itself."""
        self._open().refresh()

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
        fresh = _inputs.matrix("encoder(ids)", encoder(names)).detach().double().cpu()
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


def listed(names: Sequence[str]) -> str:
    """Names in a message."""
    return ", ".join(f'"{name}"' for name in names)
