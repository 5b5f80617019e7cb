"""What the store costs: commits, one update, searches of a mapped gallery, memory.

python bench/store.py commits DIR        # 1M x 128, a commit per 1,024 items: bytes written / vectors
python bench/store.py update DIR         # one item among 1M, without the commit
python bench/store.py search DIR         # from the second search on, against topk on the same mapped arrays
python bench/store.py larger DIR [GB]    # a gallery of so many GB; run it under a memory limit
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import torch

import fastcompat as fc
from fastcompat.serving.vectors import MappedVectors


def anonymous() -> int:
    """The process's anonymous memory now, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class Peak:
    """The most anonymous memory while it runs, above what there was before."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.mib = (self.most - self.start) / 2**20


def written() -> int:
    """Bytes that the process sent to the disk."""
    return int(Path("/proc/self/io").read_text().split("write_bytes: ")[1].split()[0])


def made(folder: Path, n: int, d: int) -> Path:
    """A folder with a gallery of n random vectors [n, d], each a window of one long list of numbers."""
    path = folder / f"{n}x{d}"
    if not path.exists():
        numbers = torch.randn(n + d, generator=torch.Generator().manual_seed(0))
        fc.MixedGallery.create(path, numbers.as_strided((n, d), (1, 1)), model="v1").close()
    return path


def commits(folder: Path) -> None:
    """Bytes written by a whole backfill."""
    n, d, batch = 1_000_000, 128, 1024
    path = made(folder, n, d)
    gallery = fc.MixedGallery.open(path, writable=True)
    gallery.begin("v2")
    block = torch.randn(batch, d)
    order = np.random.default_rng(1).permutation(n)
    before, start = written(), time.time()
    for first in range(0, n, batch):
        some = order[first : first + batch]
        gallery.update(some, block[: len(some)] + first, model="v2")
        gallery.commit()
    took = time.time() - start
    ratio = (written() - before) / (n * d * 4)
    print(f"{n} x {d}, a commit per {batch}: {ratio:.4f} x the vectors written, {took:.0f} s")
    gallery.close()


def update(folder: Path) -> None:
    """One item among a million."""
    gallery = fc.MixedGallery.open(made(folder, 1_000_000, 128), writable=True)
    if "v3" not in gallery.models:
        gallery.begin("v3")
    one, took = torch.randn(1, 128), []
    for item in np.random.default_rng(2).permutation(1_000_000)[:400].tolist():
        start = time.perf_counter()
        gallery.update([item], one, model="v3")
        took.append(time.perf_counter() - start)
    print(f"one item among 1M: median {1e3 * statistics.median(took):.3f} ms, worst {1e3 * max(took):.2f} ms")
    gallery.commit()
    gallery.close()


def search(folder: Path) -> None:
    """Searches of an opened gallery, and plain topk over its mapped rows."""
    n, d, queries, k = 1_000_000, 128, 64, 10
    path = made(folder, n, d)
    query = torch.randn(queries, d)
    warnings.simplefilter("ignore")  # items that were updated are left out
    for cache in (0, None):
        gallery = fc.MixedGallery.open(path, cache_bytes=cache)
        model = gallery.models[0]
        core = gallery._core
        vectors = core.state.generations[0].vectors
        assert isinstance(vectors, MappedVectors)
        keys = vectors.rows(n)[:n]
        start = time.perf_counter()
        gallery.search({model: query}, k, partial=True)
        first = time.perf_counter() - start
        gallery.search({model: query}, k, partial=True)
        ours, plain = [], []
        for _ in range(7):
            start = time.perf_counter()
            gallery.search({model: query}, k, partial=True)
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            fc.topk(query, keys, k)
            plain.append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(ours, plain, strict=True))
        print(
            f"{queries} queries, {n} x {d}, cache_bytes={cache}: first {first:.2f} s, then "
            f"{1e3 * statistics.median(ours):.1f} ms; topk {1e3 * statistics.median(plain):.1f} ms; "
            f"ratio {ratio:.3f}"
        )


def larger(folder: Path, gigabytes: float = 20) -> None:
    """A gallery that does not fit: search, update, verify."""
    d = 512
    n = int(gigabytes * 1e9 / (d * 4))
    path = made(folder, n, d)
    size = sum(f.stat().st_size for f in path.iterdir()) / 1e9
    print(f"{n} x {d} float32, {size:.1f} GB on disk", flush=True)
    query = torch.randn(8, d)
    with Peak() as peak:
        gallery = fc.MixedGallery.open(path, writable=True, cache_bytes=128 << 20)
        if "v2" not in gallery.models:
            gallery.begin("v2")
        acts = {
            "first search": lambda: gallery.search({"v1": query}, 10, partial=True),
            "second search": lambda: gallery.search({"v1": query}, 10, partial=True),
            "third search": lambda: gallery.search({"v1": query}, 10, partial=True),
            "update of 20 x 10,000": lambda: [
                gallery.update(np.arange(i, n, n // 10_000)[:10_000], torch.randn(10_000, d), model="v2")
                for i in range(20)
            ],
            "commit": gallery.commit,
            "search of both models": lambda: gallery.search({"v1": query, "v2": query}, 10),
            "verify": lambda: print("damages:", gallery.verify()),
        }
        for name, act in acts.items():
            with Peak() as one:
                start = time.time()
                act()
                took = time.time() - start
            print(
                f"{name}: {took:.1f} s, anonymous +{one.mib:.0f} MiB, in all {anonymous() >> 20} MiB",
                flush=True,
            )
    allowed = 64 + 128 + 24 * n / 2**20
    print(f"most: +{peak.mib:.0f} MiB; 64 MiB + cache + 24 bytes an item = {allowed:.0f} MiB")


if __name__ == "__main__":
    where = Path(sys.argv[2])
    where.mkdir(parents=True, exist_ok=True)
    {"commits": commits, "update": update, "search": search, "larger": larger}[sys.argv[1]](
        where, *map(float, sys.argv[3:])
    )
