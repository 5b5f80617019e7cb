"""How often a forecast's band holds the curve of other queries, and how far its area is off.

    python bench/forecast_coverage.py --text DIR --omniglot FILE.zip [--simulations 200]

Prints one line a case for docs/forecast.md. Every simulation draws its judged queries and its 5 % sample
anew; the truth is `backfill_curve` of all queries that were not drawn, over the same gallery and order.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch import Tensor

import fastcompat as fc

ASKS, FOUND = slice(200, 700), slice(700, None)  # rows of the digits; the first 200 train


class Data(NamedTuple):
    name: str
    query_old: Tensor
    old: Tensor
    query_new: Tensor
    new: Tensor
    query_labels: np.ndarray
    labels: np.ndarray
    judged: int  # gallery items per class that are judged relevant


def text(folder: Path, split: str, old: str, new: str) -> Data:
    def read(kind: str) -> np.ndarray:
        return np.load(folder / f"{split}_{kind}.npy")

    vectors = [
        torch.from_numpy(read(f"{side}_{model}")).float()
        for model in (old, new)
        for side in ("query", "gallery")
    ]
    return Data(f"text, {split} ({old} to {new})", *vectors, read("query_labels"), read("gallery_labels"), 5)


def digits() -> Data:
    found = load_digits()
    coarse = found.images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16)
    images, labels = found.data, found.target
    model = LinearDiscriminantAnalysis().fit(images[:200], labels[:200])
    fine = np.concatenate([model.transform(images), 0.02 * images], 1)
    vectors = [torch.from_numpy(x[part]).float() for x in (coarse, fine) for part in (ASKS, FOUND)]
    return Data("digits (4 x 4 pixels to discriminants)", *vectors, labels[ASKS], labels[FOUND], 5)


def omniglot(path: Path) -> Data:
    images, names = [], []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".png")):
            images.append(1.0 - np.asarray(Image.open(io.BytesIO(archive.read(name))), dtype=np.float64))
            names.append(name.rpartition("/")[0])
    pixels = np.stack(images)
    labels = np.unique(names, return_inverse=True)[1]
    coarse = pixels.reshape(-1, 15, 7, 15, 7).mean((2, 4)).reshape(len(pixels), -1)
    smooth = torch.nn.functional.avg_pool2d(torch.from_numpy(pixels)[:, None], 9, 1, 4)[:, 0].numpy()
    down, right = np.gradient(smooth, axis=(1, 2))
    angle = np.floor((np.arctan2(down, right) % np.pi) / np.pi * 8).clip(0, 7).astype(int)
    strength = np.hypot(down, right)
    cells = [
        (strength * (angle == a)).reshape(-1, 7, 15, 7, 15).sum((2, 4)).reshape(len(pixels), -1)
        for a in range(8)
    ]
    old, new = (torch.from_numpy(x).float() for x in (coarse, np.concatenate(cells, 1)))
    asks = np.arange(len(labels)) % 20 < 10  # half of the 20 drawers
    sides = old[asks], old[~asks], new[asks], new[~asks]
    return Data("Omniglot (pixels to oriented gradients)", *sides, labels[asks], labels[~asks], 2)


def narrowed(data: Data, complete: bool) -> tuple[Data, fc.Relevance, Tensor]:
    """A few judged items a class; `complete`: half of the classes ask, and so do their unjudged items."""
    random = np.random.default_rng(0)
    classes = random.permutation(np.unique(data.labels))
    asking = classes[: len(classes) // 2] if complete else classes
    judged = np.zeros(len(data.labels), dtype=bool)
    for one in asking:
        judged[random.permutation(np.flatnonzero(data.labels == one))[: data.judged]] = True
    stays = judged | ~np.isin(data.labels, asking) if complete else np.ones_like(judged)
    asks = np.isin(data.query_labels, asking)

    def all_queries(asked: Tensor, items: Tensor) -> Tensor:  # what leaves the gallery asks too
        return torch.cat([asked[asks], items[~stays]])

    kept = data._replace(
        name=f"{data.name}, {'complete' if complete else 'sparse'}",
        query_old=all_queries(data.query_old, data.old),
        query_new=all_queries(data.query_new, data.new),
        query_labels=np.concatenate([data.query_labels[asks], data.labels[~stays]]),
        old=data.old[stays],
        new=data.new[stays],
        labels=data.labels[stays],
    )
    items = np.flatnonzero(judged[stays])
    q, at = np.nonzero(kept.query_labels[:, None] == kept.labels[items])
    return kept, fc.Relevance(q, items[at]), torch.from_numpy(items)


def simulate(data: Data, complete: bool, simulations: int, queries: int, share: float) -> str:
    data, relevance, items = narrowed(data, complete)
    sides = data.query_old, data.old, data.query_new, data.new
    count, asking = len(data.old), len(data.query_old)
    truth = fc.backfill_curve(*sides, relevance=relevance).per_query
    measures = ("map", "ndcg@10", "lost")
    tables = dict(zip(measures, (truth.ap, truth.ndcg[10], truth.lost.double()), strict=True))
    whole = {name: 0 for name in measures}
    points = {name: 0.0 for name in measures}
    errors, widths = [], []
    for seed in range(simulations):
        random = np.random.default_rng(seed)
        drawn = np.sort(random.choice(asking, queries, replace=False))
        others = np.setdiff1d(np.arange(asking), drawn)
        sample = torch.from_numpy(random.choice(count, round(share * count), replace=False))
        row = np.full(asking, -1)
        row[drawn] = np.arange(queries)
        mine = row[relevance.query] >= 0
        judged = fc.Relevance(row[relevance.query[mine]], relevance.item[mine])
        wanted = judged.item.unique()
        curve = fc.forecast_curve(
            data.query_old[drawn], data.old, data.query_new[drawn], sample, data.new[sample],
            relevant_new=data.new[wanted], relevance=judged, order=None,
        )  # fmt: skip
        bands = {
            "map": (curve.low.map, curve.high.map),
            "ndcg@10": (curve.low.ndcg[10], curve.high.ndcg[10]),
            "lost": (curve.low.negative_flips, curve.high.negative_flips),
        }
        for name, (low, high) in bands.items():
            target = tables[name][:, others].nanmean(1)
            inside = (low <= target + 1e-12) & (target <= high + 1e-12)
            whole[name] += bool(inside.all())
            points[name] += float(inside.double().mean())
        errors.append(abs(float(curve.map.mean() - tables["map"][:, drawn].nanmean())))
        widths.append(float((curve.high.map - curve.low.map).mean()) / 2)
    cells = [data.name, f"{count:,}", f"{queries} of {asking}", f"{len(items)} + {round(share * count)}"]
    cells += [f"{whole[n] / simulations:.1%} ({points[n] / simulations:.1%})" for n in measures]
    area = float(tables["map"].nanmean())
    cells += [
        f"{area:.3f}",
        f"{np.mean(errors):.4f}",
        f"{np.quantile(errors, 0.95):.4f}",
        f"{np.mean(widths):.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--text", type=Path, required=True)
    options.add_argument("--omniglot", type=Path, required=True)
    options.add_argument("--simulations", type=int, default=200)
    options.add_argument("--queries", type=int, default=60)
    options.add_argument("--share", type=float, default=0.05)
    options.add_argument("--only", default="")
    given = options.parse_args()
    makers = (
        lambda: text(given.text, "closed", "tfidf", "minilm"),
        lambda: text(given.text, "open", "wordllama", "minilm"),
        digits,
        lambda: omniglot(given.omniglot),
    )
    for make in makers:
        data = make()
        for complete in (False, True):
            if given.only in data.name:
                print(simulate(data, complete, given.simulations, given.queries, given.share), flush=True)


if __name__ == "__main__":
    main()
