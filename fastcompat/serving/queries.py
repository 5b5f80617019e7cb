"""One search over what a view shows: a segment of the engine per part of a model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _arrays, _checks, _promoted
from .._types import Segment
from .core import Core, View
from .ids import as_ids
from .packed import PackedCache
from .state import Generation, Part
from .vectors import PART, MemoryVectors

Array = np.ndarray[Any, Any]


class Query:
    """The queries of one model [B, D], and what the caller calls them."""

    def __init__(self, name: str, values: Tensor) -> None:
        self.name, self.values = name, values


def topk(
    core: Core,
    view: View,
    queries: Mapping[str, Query],
    k: int,
    metric: str,
    *,
    cache: PackedCache,
    backend: str,
    allowed: Array | None,
    partial: bool,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k] and item numbers [B, k] of the best; -inf and -1 where there are fewer."""
    first = next(iter(queries.values())).values
    chosen: list[tuple[Query, Generation, Any, int, Part]] = []
    left_out = 0
    for g, vectors, parts in view.parts:
        if allowed is not None:
            parts = [Part(np.where(allowed[part.items], part.items, np.int32(-1))) for part in parts]
        needed = _spans(vectors, parts, {} if allowed is not None else cache.joined)
        query = queries.get(g.name)
        count = sum(part.alive for _, part in needed)
        if query is None:
            if count and not partial:
                raise ValueError(
                    f"{_asked(queries, g.name)} must be given: got None, and {count} items need it"
                )
            left_out += count
            continue
        if vectors is not None:
            empty = torch.empty(0, vectors.width, dtype=vectors.dtype, device=query.values.device)
            _checks.embeddings(g.name, empty, query.name, query.values)
        if not needed:
            continue
        core.check(g)
        chosen += [(query, g, vectors, start, part) for start, part in needed]
    if left_out:
        warnings.warn(
            f"{left_out} of {view.state.alive} items count with models whose query was not given, and were "
            "not searched",
            stacklevel=4,
        )
    if not chosen:
        shape = len(first), k
        dtype = torch.promote_types(first.dtype, torch.float32)
        return first.new_full(shape, -torch.inf, dtype=dtype), first.new_full(shape, -1, dtype=torch.int64)
    wide = {g.name: query.values.to(torch.promote_types(query.values.dtype, vectors.dtype))
            for query, g, vectors, _, _ in chosen}  # fmt: skip
    native = all([_checks.use_native(backend, values) for values in wide.values()])
    one_dtype = all(wide[g.name].dtype == vectors.dtype for _, g, vectors, _, _ in chosen)
    search, segments, packed, places = cache.begin(), [], [], []
    for query, g, vectors, start, part in chosen:
        _checks.same_device(query.name, query.values, g.name, vectors.rows(1))
        keys, copy = vectors.span(start, part.end), None
        if native and one_dtype and not keys.is_cuda and allowed is None:
            try:
                copy = cache.get(vectors, start, part, keys, metric, search)
            except _checks.NonFiniteError as error:
                error.row += start
                _checks.refuse_nonfinite(error, [(query.name, g.name)])
        if copy is not None:
            rows = copy.rows
            keys = vectors.span(start, copy.count)
        else:
            rows = None if part.alive == part.end else part.rows_on(keys.device)
        items = part.items_on(keys.device)[: len(keys)]
        segments.append(Segment(wide[g.name], keys, rows, g.scale, g.offset, items))
        packed.append(torch.empty(0, dtype=torch.float32, device="cpu") if copy is None else copy.values)
        places.append((query.name, g.name, start))
    # Widened keys take memory: one part of a model at a time.
    found, step = [], _segments_at_once(first) if one_dtype else 1
    for at in range(0, len(segments), step):
        some = slice(at, at + step)
        try:
            found.append(
                _promoted.topk(segments[some], k, metric, native=native, names=None, packed=packed[some])
            )
        except _checks.NonFiniteError as error:
            query_name, key_name, start = places[at + error.segment]
            if error.side == "keys":
                error.row += start
            _checks.refuse_nonfinite(error, [(query_name, key_name)] * len(places))
        except _checks.ScoreOverflowError as error:
            _checks.refuse_overflow(error.row, places[0][0])
    return found[0] if len(found) == 1 else _promoted.merged(found, k)


def _segments_at_once(query: Tensor) -> int:
    """How many segments the engine takes: any number on the CPU."""
    return 16 if query.is_cuda else 2**31


def _spans(vectors: Any, parts: list[Part], joined: MutableMapping[Any, Any]) -> list[tuple[int, Part]]:
    """Parts that count, with their first slots; on a GPU those of the base are joined."""
    if not (isinstance(vectors, MemoryVectors) and vectors.device.type == "cuda"):
        return [(PART * number, part) for number, part in enumerate(parts) if part.alive]
    base = parts[: vectors.first // PART]
    kept = joined.get(vectors)
    if (
        kept is None
        or len(kept[0]) != len(base)
        or any(a is not b for a, b in zip(kept[0], base, strict=True))
    ):
        items = np.concatenate([part.items for part in base] or [np.empty(0, np.int32)])
        kept = joined[vectors] = base, Part(items[: vectors.count])
    more = [(PART * (len(base) + number), part) for number, part in enumerate(parts[len(base) :])]
    return [(start, part) for start, part in [(0, kept[1]), *more] if part.alive]


def _asked(queries: Mapping[str, Query], name: str) -> str:
    """What the caller would have to give: one of a pair of arguments, or an entry of a mapping."""
    if any(query.name.startswith("queries[") for query in queries.values()):
        return f'`queries["{name}"]`'
    given = next(iter(queries.values())).name
    return "`query_new`" if given == "query_old" else "`query_old`"


def mask(core: Core, view: View, allow: Any, exclude: Any) -> Array | None:
    """Which items may be found, by number, with one entry more for -1 (False); None: all."""
    if allow is None and exclude is None:
        return None
    allowed = np.zeros(view.state.used + 1, bool)
    allowed[: view.state.used] = allow is None
    for name, given, value in (("allow", allow, True), ("exclude", exclude, False)):
        if given is None:
            continue
        its = _arrays.read(name, given)
        if its.dtype in (torch.bool, np.dtype(bool)):
            chosen = its.cpu().numpy() if isinstance(its, Tensor) else its
            live = view.state.live_items()
            if chosen.shape != live.shape:
                raise ValueError(
                    f"`{name}` as a mask must have one entry per item of the gallery, in the order of `ids`: "
                    f"got shape {list(chosen.shape)} for {len(live)} items"
                )
            allowed[live[chosen]] = value
        else:
            items = view.state.find(as_ids(name, given, view.state.ids.kind))
            allowed[items[items >= 0]] = value
    allowed[-1] = False
    return allowed
