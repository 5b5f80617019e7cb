"""The backfill as a job: in an order, at a rate, with retries, resumed by being run again."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import _inputs
from ..functional import topk
from ..judging.uncertainty import uncertainty
from .gallery import MixedGallery

SAMPLE = 1000  # items of a random sample, which come first: what is known of the new model early is unbiased
SET_ASIDE = "set-aside.jsonl"  # in the gallery's folder: items that kept failing, with the error
FOUND = 100  # results of a query that count as demand
READ = 8192  # old vectors at a time

Encoder = Callable[[Any], Any]


class Job(NamedTuple):
    """What is to be done: arguments of `fastcompat backfill`."""

    folder: Path
    encoder: str
    model: str | None = None
    order: str = "random"
    batch: int = 1024
    rate: float = 0.0
    retries: int = 3
    queries: Path | None = None
    class_weight: Path | None = None


def load_encoder(name: str) -> Encoder:
    """The function `package.module:function`; modules of the current folder are found too."""
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"`--encoder` must be package.module:function: got {name!r}")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"`--encoder`: cannot import {name!r} ({error})") from error
    if not callable(found):
        raise ValueError(f"`--encoder` must name a function: {name!r} is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def prepare(job: Job) -> str:
    """Begin the model where it is new, and refuse an encoder that is not the one before; its name."""
    encoder = load_encoder(job.encoder)
    with MixedGallery.open(job.folder, writable=True) as gallery:
        model = job.model or (gallery.models[-1] if len(gallery.models) > 1 else "new")
        if model not in gallery.models:
            gallery.begin(model, metadata={"encoder": job.encoder})
            gallery.commit()
        if model != gallery.models[-1]:
            raise ValueError(f"`--model` must be the newest model {gallery.models[-1]!r}: got {model!r}")
        gallery.check(encoder, model)
    return model


def in_order(gallery: MixedGallery, job: Job, share: tuple[int, int] = (0, 1)) -> np.ndarray[Any, Any]:
    """The ids that are to be embedded, first to be embedded first: a random sample, then the order.

    Share i of n: every n-th batch of the whole order, whatever is done of it already.
    """
    rng = np.random.default_rng(0)
    every = gallery.ids
    shuffled = every[rng.permutation(len(every))]
    if job.order == "random":
        order = shuffled
    elif job.order == "demand":
        order = every[np.argsort(-_demand(gallery, job), kind="stable")]
    elif job.order == "uncertainty":
        order = every[np.argsort(-_uncertainty(gallery, job), kind="stable")]
    else:
        order = _file(job.order, every)
    left = set(gallery.pending().tolist()) - {item["id"] for item in set_aside(job.folder)}
    first = dict.fromkeys([*shuffled[:SAMPLE].tolist(), *order.tolist()])
    mine = (item for place, item in enumerate(first) if place // job.batch % share[1] == share[0])
    return np.array([item for item in mine if item in left], every.dtype)


def _file(path: str, every: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`--order` must be random, uncertainty, demand or an .npy file of ids: got `{path}` ({error})"
        ) from None
    if found.ndim != 1 or found.dtype.kind != every.dtype.kind:
        raise ValueError(f"`--order` must hold ids {every.dtype} [M]: got {found.dtype} {list(found.shape)}")
    unknown = set(found.tolist()) - set(every.tolist())
    if unknown:
        raise ValueError(f"`--order` must name items of this gallery: it holds no item {min(unknown)}")
    return np.asarray(found)


def _old_rows(gallery: MixedGallery) -> Iterator[tuple[slice, torch.Tensor]]:
    ids, model = gallery.ids, gallery.models[0]
    for first in range(0, len(ids), READ):
        some = slice(first, min(len(ids), first + READ))
        yield some, _inputs.matrix("vectors", gallery.vectors(ids[some], model))


def _demand(gallery: MixedGallery, job: Job) -> np.ndarray[Any, Any]:
    """How many of the logged queries have an item among their first results in the oldest model."""
    if job.queries is None:
        raise ValueError("`--order demand` needs `--queries`: an .npy file of old query vectors")
    query = torch.from_numpy(np.load(job.queries, allow_pickle=False))
    metric: Any = gallery.metric
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    for some, rows in _old_rows(gallery):
        scores, ids = topk(query, rows, FOUND, metric=metric)
        best.append((scores, torch.where(ids < 0, -1, ids + some.start)))
        scores, ids = (torch.cat(part, 1) for part in zip(*best, strict=True))
        scores, place = scores.topk(min(FOUND, scores.shape[1]), 1)
        best = [(scores, ids.gather(1, place))]
    counts = np.zeros(len(gallery) + 1, np.int64)
    np.add.at(counts, best[0][1].numpy().ravel(), 1)
    return counts[:-1]


def _uncertainty(gallery: MixedGallery, job: Job) -> np.ndarray[Any, Any]:
    """How unsure the oldest model is of each item."""
    if job.class_weight is None:
        raise ValueError("`--order uncertainty` needs `--class-weight`: an .npy file [C, D_old]")
    weight = torch.from_numpy(np.load(job.class_weight, allow_pickle=False))
    return np.concatenate([np.asarray(uncertainty(rows, weight)) for _, rows in _old_rows(gallery)])


def set_aside(folder: Path) -> list[dict[str, Any]]:
    """The items that kept failing: id and error."""
    try:
        lines = (folder / SET_ASIDE).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = {}
    for line in lines:
        item = json.loads(line)
        found[item["id"]] = item
    return list(found.values())


def _put_aside(folder: Path, item: Any, error: BaseException) -> None:
    line = json.dumps({"id": item, "error": f"{type(error).__name__}: {error}"}) + "\n"
    handle = os.open(folder / SET_ASIDE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(handle, line.encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def plan(job: Job, items: int = 256) -> dict[str, float]:
    """Time a sample; what the rest will take: items, bytes, seconds. Nothing is written."""
    encoder = load_encoder(job.encoder)
    with MixedGallery.open(job.folder) as gallery:
        model = job.model or (gallery.models[-1] if len(gallery.models) > 1 else None)
        ids = in_order(gallery, job) if model is None or model in gallery.models else gallery.ids
        some = ids[: min(items, len(ids))]
        start, took, width = time.perf_counter(), 0.0, 0
        for first in range(0, len(some), job.batch):
            values = _inputs.matrix("encoder(ids)", encoder(some[first : first + job.batch]))
            width = values.shape[1] * values.element_size()
        took = time.perf_counter() - start
        seconds = took / max(len(some), 1) * len(ids)
        if job.rate:
            seconds = max(seconds, len(ids) / job.rate)
        return {"items": len(ids), "bytes": len(ids) * (width + 12), "seconds": seconds, "sample": len(some)}


def work(job: Job, model: str, share: tuple[int, int], stopped: Callable[[], bool]) -> Iterator[int]:
    """Embed this share (i of n) of what is left, batch by batch, and commit; how many items, each time."""
    encoder = load_encoder(job.encoder)
    with MixedGallery.open(job.folder, writable=True) as gallery:
        ids, start, done = in_order(gallery, job, share), time.monotonic(), 0
        for first in range(0, len(ids), job.batch):
            if stopped():
                return
            some = ids[first : first + job.batch]
            _embed(gallery, job, model, encoder, some, stopped)
            gallery.commit()
            done += len(some)
            yield len(some)
            if job.rate:
                ahead = start + done * share[1] / job.rate - time.monotonic()
                while ahead > 0 and not stopped():
                    time.sleep(min(ahead, 0.2))
                    ahead = start + done * share[1] / job.rate - time.monotonic()


def _embed(
    gallery: MixedGallery, job: Job, model: str, encoder: Encoder, ids: Any, stopped: Callable[[], bool]
) -> None:
    """Update these items; those that keep failing are set aside, the others are not held up by them."""
    for attempt in range(job.retries + 1):
        try:
            gallery.update(ids, encoder(ids), model=model)
            return
        except OSError as error:
            if error.filename is not None and str(error.filename).startswith(str(job.folder)):
                raise  # the folder's trouble, not the items'
            failure: Exception = error
        except Exception as error:  # whatever the encoder raises, the job goes on
            failure = error
        if attempt < job.retries and not stopped():
            time.sleep(min(0.1 * 2**attempt, 5.0))
    if stopped():
        return
    if len(ids) == 1:
        _put_aside(job.folder, ids.tolist()[0], failure)
        return
    for part in np.array_split(ids, 2):
        _embed(gallery, job._replace(retries=min(job.retries, 1)), model, encoder, part, stopped)
