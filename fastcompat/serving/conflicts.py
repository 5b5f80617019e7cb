"""What becomes of uncommitted changes after what another writer committed."""

from __future__ import annotations

from typing import Any

import numpy as np

from .changes import Change
from .ids import shown
from .state import Generation, State

Array = np.ndarray[Any, Any]


class ConflictError(ValueError):
    """What another writer committed leaves no place for a change of this gallery."""


def resolve(state: State, change: Change) -> Array | None:
    """The items of an uncommitted change after what others committed; None: nothing is left to do."""
    generation = state.generation(change.model)
    none = np.empty(0, np.int64)
    if change.kind == "begin":
        return none if generation is None else None  # begun by two, it is shared
    if change.kind == "retire":
        if generation is None:
            return None
        if generation.count:
            raise ConflictError(
                f"`{change.model}` cannot be retired any more: {generation.count} items count with it "
                "since another writer's commit; this change is dropped"
            )
        return none
    assert change.ids is not None
    if change.kind != "remove" and generation is None:
        raise ConflictError(
            f"`{change.model}` was retired by another writer: {len(change.ids)} vectors or rollbacks of "
            "this gallery are dropped"
        )
    if change.gid is not None and generation is not None and generation.gid not in (None, change.gid):
        raise ConflictError(
            f"`{change.model}` was begun by another writer with vectors of {_shape(generation)}: "
            f"{len(change.ids)} vectors of this gallery are dropped; begin a model of another name"
        )
    items = state.find(change.ids)
    if change.kind == "add":
        if (items >= 0).any():
            again = change.ids[items >= 0][0]
            raise ConflictError(
                f"`ids`: item {shown(again)} was added by another writer; the {len(items)} items that "
                "this gallery added with it are dropped"
            )
        return none
    there = items >= 0  # removed by another writer is removed
    if change.kind == "rollback":
        assert generation is not None
        there &= generation.slots(np.maximum(items, 0)) >= 0
    if not there.all():
        change.ids = change.ids[there]
        if len(change.slots):
            change.slots, change.crcs = change.slots[there], change.crcs[there]
    return items[there] if there.any() else None


def _shape(generation: Generation) -> str:
    assert generation.vectors is not None
    return f"{generation.vectors.width} columns, {generation.vectors.dtype}"
