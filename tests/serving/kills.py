"""Kill writers at random and look at what they leave: `python kills.py FOLDER KILLS SEED`.

Four processes change one gallery, each its own items: batch n of a writer is the same whoever does it again.
A killed writer's items must be as after the last batch that was committed, or after the one under way, whole.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

import fastcompat as fc

WRITERS, OWN, WIDTH = 4, 300, 9


def batch(writer: int, n: int) -> tuple[list[int], int, list[int]]:
    """Batch n of a writer: items it updates, an item it adds, items it removes."""
    rng = random.Random(writer * 1_000_003 + n)
    added = 100_000 * (writer + 1) + n
    gone = [added - 5] if n > 5 and n % 3 else []
    return [writer * OWN + i for i in rng.sample(range(OWN), rng.randint(1, 30))], added, gone


def apply(state: dict[int, int], writer: int, n: int) -> dict[int, int]:
    """The writer's items [id -> number of the batch that wrote them] after batch n."""
    some, added, gone = batch(writer, n)
    state = state | dict.fromkeys([*some, added], n)
    return {item: turn for item, turn in state.items() if item not in gone}


def rows(ids: list[int], n: int) -> np.ndarray[Any, Any]:
    """What batch n writes for these items [M, D]."""
    return (np.array(ids)[:, None] * 0.001 + n + np.arange(WIDTH)).astype(np.float32)


def write(folder: Path, writer: int, n: int, counters: Any) -> None:
    """Batches from n on, until killed."""
    gallery = fc.MixedGallery.open(folder, writable=True)
    rng = random.Random(time.time_ns())
    while True:
        n += 1
        some, added, gone = batch(writer, n)
        gallery.update(some, rows(some, n), model="v2")
        gallery.add([added], rows([added], n))
        if gone:
            gallery.remove(gone)
        counters[writer, 0] = n
        gallery.commit()
        counters[writer, 1] = n
        if rng.random() < 0.02:
            gallery.compact()
        if rng.random() < 0.05:
            gallery.close()
            gallery = fc.MixedGallery.open(folder, writable=True)


def items_of(gallery: fc.MixedGallery, writer: int) -> dict[int, int]:
    """The writer's items in the gallery; every vector is what a batch wrote for that item."""
    ids = set(gallery.ids.tolist()) - set(gallery.pending().tolist())
    own = sorted(i for i in ids if (i // OWN == writer and i < 100_000) or i // 100_000 == writer + 1)
    if not own:
        return {}
    values = gallery.vectors(np.array(own, np.int64), "v2")
    turns = np.rint(values[:, 0] - np.array(own) * 0.001).astype(int).tolist()
    for item, turn, value in zip(own, turns, values, strict=True):
        assert np.array_equal(value, rows([item], turn)[0]), f"item {item} holds what nobody wrote"
    return dict(zip(own, turns, strict=True))


def main(folder: Path, kills: int, seed: int) -> None:
    """Kill, look, go on."""
    rng = random.Random(seed)
    old = np.random.default_rng(0).standard_normal((WRITERS * OWN, 4)).astype(np.float32)
    gallery = fc.MixedGallery.create(folder, old, model="v1")
    gallery.begin("v2")
    gallery.commit()
    gallery.close()
    shared = mmap.mmap(-1, WRITERS * 16)
    counters = np.frombuffer(shared, np.int64).reshape(WRITERS, 2)
    states: list[dict[int, int]] = [{} for _ in range(WRITERS)]  # after batch `known`
    known, pids, killed = [0] * WRITERS, [0] * WRITERS, 0

    def start(writer: int) -> None:
        counters[writer] = known[writer]
        pids[writer] = os.fork()
        if not pids[writer]:
            code = 1
            try:
                write(folder, writer, known[writer], counters)
            except BaseException as error:  # the parent finds the writer dead
                print(f"writer {writer}: {error!r}", flush=True)
            finally:
                os._exit(code)

    try:
        for writer in range(WRITERS):
            start(writer)
        while killed < kills:
            time.sleep(rng.random() * rng.choice((0.01, 0.05, 0.2)))
            victims = rng.sample(range(WRITERS), 4 if rng.random() < 0.1 else 1)
            for writer in victims:
                assert os.waitpid(pids[writer], os.WNOHANG)[0] == 0, f"writer {writer} died by itself"
                os.kill(pids[writer], signal.SIGKILL)
            for writer in victims:
                os.waitpid(pids[writer], 0)
                killed += 1
            with fc.MixedGallery.open(folder) as reader:
                ids = reader.ids
                assert len(set(ids.tolist())) == len(ids), "an item is there twice"
                if len(victims) == WRITERS:
                    assert reader.verify() == []
                for writer in victims:
                    started, done = counters[writer].tolist()
                    state = states[writer]
                    for n in range(known[writer] + 1, done + 1):
                        state = apply(state, writer, n)
                    found = items_of(reader, writer)
                    if found != state:
                        done = started
                        state = apply(state, writer, started)
                        assert found == state, (
                            f"writer {writer}: not the state after batch {started - 1} or {started}"
                        )
                    states[writer], known[writer] = state, done
            for writer in victims:
                start(writer)
    finally:
        for pid in filter(None, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    print(f"{killed} kills, batches {known}, {sum(len(s) for s in states)} items")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
