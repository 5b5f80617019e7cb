"""Pairs of an old and a new model: judged queries of some classes, served queries of the same or of others.

Text encoders come as vectors (`--text`), digits with scikit-learn, Omniglot as its archive (`--omniglot`).
"""

from __future__ import annotations

import io
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SEEN = (
    *(f"text:{split}:{old}:{new}" for split in ("open", "closed")
      for old, new in (("tfidf", "minilm"), ("wordllama", "minilm"), ("tfidf", "wordllama"))),
    "digits:half:whole", "digits:pca4:pca20", "digits:half:pca20",
    "omniglot:pixels:hog", "omniglot:hog:pcahog", "omniglot:pixels:pcahog", "omniglot:pca32:pcahog",
)  # fmt: skip
UNSEEN = (  # no form and no rule was chosen by these
    "text:open:minilm48:minilm", "text:open:tfidf32:wordllama", "text:closed:wordllama64:minilm",
    "digits:lower:whole", "digits:projection8:pca20",
    "omniglot:profiles:hog", "omniglot:pca8:pcahog",
)  # fmt: skip
# The new model was fitted on the judged classes, so that it looks better there than where it serves.
TRAPS = ("digits:whole:lda",)


class Side(NamedTuple):
    """Queries and gallery in both spaces, with labels."""

    query_old: Tensor
    old: Tensor
    query_new: Tensor
    new: Tensor
    query_labels: Tensor
    gallery_labels: Tensor


class Pair(NamedTuple):
    """Judged queries against other items, and those that are served."""

    judged: Side
    served: Side


def build(
    name: str, seed: int, judged: int, served: int, text: Path | None, omniglot: Path | None
) -> Pair | None:
    """A pair by name; None where its data are not given."""
    kind, *rest = name.split(":")
    if kind == "text":
        return None if text is None else _text(text, *rest, seed=seed, judged=judged, served=served)
    if kind == "omniglot" and omniglot is None:
        return None
    features, labels, groups = _digits() if kind == "digits" else _omniglot(omniglot)
    chosen = np.random.default_rng(seed).permutation(np.unique(groups))[: len(np.unique(groups)) // 2]
    first = np.isin(groups, chosen)
    old, new = (_features(x, features, labels, first) for x in rest)
    sides = []
    for mask, queries in ((first, judged), (~first, served)):
        at = torch.randperm(int(mask.sum()), generator=_generator(seed))
        at = torch.from_numpy(mask.nonzero()[0])[at]
        queries = min(queries, len(at) // 3)
        sides.append(_side(old, new, torch.from_numpy(labels), at[:queries], at[queries:]))
    return Pair(*sides)


def _side(old: Tensor, new: Tensor, labels: Tensor, q: Tensor, x: Tensor) -> Side:
    q = q[torch.isin(labels[q], labels[x])]
    return Side(old[q], old[x], new[q], new[x], labels[q], labels[x])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _text(folder: Path, split: str, old: str, new: str, *, seed: int, judged: int, served: int) -> Pair:
    def vectors(name: str, encoder: str) -> Tensor:
        base = encoder.rstrip("0123456789")
        x = torch.from_numpy(np.load(folder / f"{name}_{base}.npy")).float()
        return F.normalize(x[:, : int(encoder[len(base) :] or x.shape[1])])

    def labels(name: str) -> Tensor:
        return torch.from_numpy(np.load(folder / f"{name}_labels.npy"))

    at = torch.randperm(len(labels("train")), generator=_generator(seed))
    first = _side(vectors("train", old), vectors("train", new), labels("train"), at[:judged], at[judged:])
    names = f"{split}_query", f"{split}_gallery"
    both = [torch.cat([vectors(n, encoder) for n in names]) for encoder in (old, new)]
    queries = len(labels(names[0]))
    q = torch.randperm(queries, generator=_generator(seed))[:served]
    x = torch.arange(queries, len(both[0]))
    return Pair(first, _side(*both, torch.cat([labels(n) for n in names]), q, x))


@cache
def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype("f4"), data.target.astype("i8"), data.target


@cache
def _omniglot(archive: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from PIL import Image

    images, characters = [], []
    assert archive is not None
    with zipfile.ZipFile(archive) as file:
        for name in sorted(file.namelist()):
            if name.endswith(".png") and not name.startswith("__MACOSX"):
                image = (
                    Image.open(io.BytesIO(file.read(name)))
                    .convert("L")
                    .resize((28, 28), Image.Resampling.BILINEAR)
                )
                images.append(1 - np.asarray(image, dtype="f4") / 255)
                characters.append(name.rpartition("/")[0])
    labels = np.unique(characters, return_inverse=True)[1].astype("i8")
    return np.stack(images), labels, np.array([c.split("/")[-2] for c in characters])


def _features(name: str, images: np.ndarray, labels: np.ndarray, first: np.ndarray) -> Tensor:
    """Features of every image; what is fitted is fitted on the judged classes."""
    from sklearn.decomposition import PCA
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    n, height, _ = images.shape
    flat = images.reshape(n, -1)
    number = int("".join(filter(str.isdigit, name)) or 64)
    kind = name.rstrip("0123456789")
    if kind == "pixels":
        x = images.reshape(n, 7, 4, 7, 4).mean((2, 4)).reshape(n, -1)
    elif kind == "half":
        x = images[:, : height // 2].reshape(n, -1)
    elif kind == "lower":
        x = images[:, height // 2 :].reshape(n, -1)
    elif kind == "profiles":
        x = np.concatenate([images.sum(1), images.sum(2)], 1)
    elif kind == "projection":
        x = flat @ np.random.default_rng(0).normal(size=(flat.shape[1], number)).astype("f4")
    elif kind == "hog":
        x = _gradients(images)
    elif kind in ("pca", "pcahog"):
        x = flat if kind == "pca" else _gradients(images)
        x = PCA(number, random_state=0).fit(x[first]).transform(x)
    elif kind == "lda":
        noise = np.random.default_rng(0).normal(0, 0.1, flat[first].shape)  # constant pixels have no variance
        x = LinearDiscriminantAnalysis().fit(flat[first] + noise, labels[first]).transform(flat)
    else:
        assert kind == "whole", name
        x = flat
    return F.normalize(torch.from_numpy(np.ascontiguousarray(x, dtype="f4")))


def _gradients(images: np.ndarray) -> np.ndarray:
    """Histograms of 8 directions of the gradient in cells of 4 x 4 pixels."""
    dy, dx = np.gradient(images, axis=(1, 2))
    size, direction = np.hypot(dx, dy), ((np.arctan2(dy, dx) % np.pi) / np.pi * 8).astype(int) % 8
    cells = [
        (size * (direction == b)).reshape(len(images), 7, 4, 7, 4).sum((2, 4)).reshape(len(images), -1)
        for b in range(8)
    ]
    return np.concatenate(cells, 1)
