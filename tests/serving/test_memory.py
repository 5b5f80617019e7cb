"""What a process holds of a gallery in a folder: no copy of its vectors, whatever is done with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastcompat as fc

N, D = 300_000, 64  # 77 MB of vectors

SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
import fastcompat as fc

def anonymous():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

n, d = int(sys.argv[2]), int(sys.argv[3])
query = torch.randn(4, d)
fc.topk(query, torch.randn(1000, d), 3)  # what torch and the kernels take once
start = anonymous()
gallery = fc.MixedGallery.open(sys.argv[1], writable=True, cache_bytes=0)
gallery.begin("v2")
for turn in range(3):
    gallery.update(np.arange(turn * 40_000, (turn + 1) * 40_000), torch.randn(40_000, d))
    gallery.commit()
    for _ in range(2):
        gallery.search({"v1": query, "v2": query}, 10)
assert gallery.verify() == []
print(anonymous() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    import torch

    numbers = torch.randn(N + D)
    fc.MixedGallery.create(tmp_path / "g", numbers.as_strided((N, D), (1, 1)), model="v1").close()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "g"), str(N), str(D)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(fc.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    held = int(done.stdout)
    assert held < (64 << 20) + 24 * N, held
