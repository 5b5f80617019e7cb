"""What a gallery should say, computed in plain Python and float64: the truth of the tests of the store."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

WIDTH = {"v1": 6, "v2": 9, "v3": 5}


def vectors(model: str, ids: Any, turn: int = 0) -> np.ndarray[Any, Any]:
    """The vectors [M, D] of these items in this model: a function of their ids alone."""
    seeds = [zlib.crc32(i.encode()) if isinstance(i, str) else int(i) for i in ids]
    rows = [
        np.random.default_rng([s % 2**32, len(model), ord(model[-1]), turn]).standard_normal(WIDTH[model])
        for s in seeds
    ]
    return np.array(rows, np.float32).reshape(len(rows), WIDTH[model])


def queries(count: int = 4) -> dict[str, np.ndarray[Any, Any]]:
    """Queries [B, D] of every model."""
    return {
        m: np.random.default_rng([7, d]).standard_normal((count, d)).astype(np.float32)
        for m, d in WIDTH.items()
    }


class Model:
    """A gallery as a dictionary: item -> {model: vector}, in the order of addition."""

    def __init__(self, ids: Any, first: str = "v1") -> None:
        self.models = [first]
        self.items: dict[Any, dict[str, np.ndarray[Any, Any]]] = {
            i: {first: v} for i, v in zip(ids, vectors(first, ids), strict=True)
        }
        self.top = dict.fromkeys(ids, first)

    def put(self, ids: Any, values: np.ndarray[Any, Any], model: str) -> None:
        for i, v in zip(ids, values, strict=True):
            self.items[i][model], self.top[i] = v, model

    def add(self, ids: Any, values: np.ndarray[Any, Any], model: str) -> None:
        for i, v in zip(ids, values, strict=True):
            self.items.pop(i, None)
            self.items[i], self.top[i] = {model: v}, model

    def remove(self, ids: Any) -> None:
        for i in ids:
            del self.items[i], self.top[i]

    def rollback(self, ids: Any, to: str) -> None:
        newer = self.models[self.models.index(to) + 1 :]
        for i in ids:
            self.items[i] = {m: v for m, v in self.items[i].items() if m not in newer}
            self.top[i] = to

    def search(
        self, asked: dict[str, np.ndarray[Any, Any]], k: int, allowed: Any = None
    ) -> tuple[np.ndarray[Any, Any], list[list[Any]]]:
        """Cosines and ids of the best k; of equal scores the item that was added first."""
        names = [i for i in self.items if allowed is None or i in allowed]
        count = len(next(iter(asked.values())))
        scores = np.full((count, len(names)), -np.inf)
        for column, i in enumerate(names):
            q, x = asked[self.top[i]].astype(np.float64), self.items[i][self.top[i]].astype(np.float64)
            norms = np.linalg.norm(q, axis=1) * np.linalg.norm(x)
            scores[:, column] = np.divide(q @ x, norms, out=np.zeros(count), where=norms > 0)
        order = np.argsort(-scores.astype(np.float32), axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), [[names[c] for c in row] for row in order]


def agrees(gallery: Any, model: Model, k: int = 7, **named: Any) -> bool:
    """Whether the gallery finds what the model says."""
    asked = {m: q for m, q in queries().items() if m in model.models}
    scores, found = gallery.search(asked, k, **{n: v for n, v in named.items() if n != "allowed"})
    true_scores, true_ids = model.search(asked, k, named.get("allowed"))
    filled = true_scores.shape[1]
    return (
        [list(row[:filled]) for row in np.asarray(found).tolist()] == true_ids
        and np.allclose(scores[:, :filled], true_scores, atol=2e-6)
        and bool((np.asarray(scores)[:, filled:] == -np.inf).all())
        and len(gallery) == len(model.items)
        and list(gallery.ids.tolist()) == list(model.items)
        and gallery.models == model.models
        and np.isclose(
            gallery.fraction, sum(t == model.models[-1] for t in model.top.values()) / max(len(model.top), 1)
        )
    )
