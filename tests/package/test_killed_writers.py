"""Real processes: killed at any moment, working on one folder at once, with other rules for new files."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

KILLS = """
import os, random, signal, sys, time
import numpy as np, torch
import fastcompat as fc
from fastcompat.commands.output import OutputFolder

torch.set_num_threads(1)
folder, turns = sys.argv[1], int(sys.argv[2])
N = 4000  # 250 kB of old vectors and as much of new ones: a kill often meets a half-written file
vectors = np.arange(N, dtype=np.float32)[:, None] * np.ones((1, 16), np.float32)
rng = random.Random(0)

def weights(value):
    turn = fc.ReverseQueryTransform(64, 64)
    turn.load_state_dict({n: torch.full_like(v, value) for n, v in turn.state_dict().items()})
    return turn

def write(first):
    "States 0, 1, 2, ... of a gallery, a transform and the output of a command; state t says t everywhere."
    gallery = fc.MixedGallery.load(folder + "/gallery")
    with OutputFolder(__import__("pathlib").Path(folder), ("report",)) as out:
        for t in range(first, first + 10_000):
            gallery.update(np.arange(N), vectors + t)
            gallery.save(folder + "/gallery")
            weights(t % 1000).save(folder + "/turn.pt")
            out.write({"report": str(t).encode() * 100_000})

fc.MixedGallery(vectors, ids=np.arange(N)).save(folder + "/gallery")
weights(0.0).save(folder + "/turn.pt")
open(folder + "/report", "wb").write(b"0" * 100_000)
first, seen = 0, set()
for kill in range(turns):
    child = os.fork()
    if child == 0:
        write(first)
        os._exit(1)
    time.sleep(rng.uniform(0.0, 0.12))
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    gallery = fc.MixedGallery.load(folder + "/gallery", verify=True)
    if gallery.fraction:
        state = np.unique(gallery.vectors(np.arange(N), "new") - vectors)
        assert len(state) == 1 and gallery.fraction == 1 and state[0] >= first - 1, (kill, state)
        first = int(state[0]) + 1
    values = {float(x) for v in fc.ReverseQueryTransform.load(folder + "/turn.pt").state_dict().values()
              for x in v.double().flatten().unique()}
    assert len(values) == 1, (kill, values)
    report = open(folder + "/report", "rb").read()
    digits = len(report) // 100_000
    assert len(report) % 100_000 == 0 and report == report[:digits] * 100_000, kill
    seen.add((first, values.pop(), report[:digits]))
gallery.save(folder + "/gallery")
assert len(os.listdir(folder + "/gallery")) == (6 if gallery.fraction else 5), os.listdir(folder + "/gallery")
print(len(seen))
"""

TWO = """
import os, sys
import numpy as np
import fastcompat as fc

folder = sys.argv[1]
N = 200
old, new = np.random.randn(N, 8).astype(np.float32), np.random.randn(N, 8).astype(np.float32)
fc.MixedGallery(old).save(folder)
ready, go = os.pipe()
children = []
for half in (np.arange(0, N // 2), np.arange(N // 2, N)):
    child = os.fork()
    if child == 0:
        code = 9
        try:
            gallery = fc.MixedGallery.load(folder)
            os.read(ready, 1)  # both have loaded the same state
            for _ in gallery.backfill(half, lambda ids: new[ids], batch=10):
                gallery.save(folder)
            code = 0
        except ValueError:
            code = 8
        finally:
            os._exit(code)
    children.append(child)
os.write(go, b"gg")
print(sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
print(fc.MixedGallery.load(folder, verify=True).fraction)
"""

UMASK = """
import os, sys, torch
import fastcompat as fc
from fastcompat.commands.output import OutputFolder
from pathlib import Path

for umask in ("077", "022", "002"):
    os.umask(int(umask, 8))
    folder = Path(sys.argv[1]) / umask
    folder.mkdir()
    fc.MixedGallery(torch.randn(10, 4)).save(folder / "gallery")
    fc.Procrustes().fit(torch.randn(9, 4), torch.randn(9, 4)).save(folder / "turn.pt")
    with OutputFolder(folder / "out", ("report.html",)) as out:
        out.write({"report.html": b"text"})
    x, y = torch.randn(9, 4), torch.zeros(9, dtype=torch.int64)
    fc.backfill_curve(x, x, x, x, y, y, ks=(1,), states=2).plot(folder / "curve.png")
"""

NO_FCNTL = """
import sys
sys.modules["fcntl"] = None
import threading, torch
import fastcompat as fc
import fastcompat.commands.app

gallery = fc.MixedGallery(torch.randn(10, 4))
threads = [threading.Thread(target=gallery.save, args=(sys.argv[1],)) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(fc.MixedGallery.load(sys.argv[1], verify=True)) == 10
turn = fc.Procrustes().fit(torch.randn(9, 4), torch.randn(9, 4))
turn.save(sys.argv[1] + "/turn.pt")
fc.Procrustes.load(sys.argv[1] + "/turn.pt")
print("well")
"""


def run(script: str, *arguments: object) -> str:
    call = [sys.executable, "-c", script, *map(str, arguments)]
    folder = Path(__file__).parent  # not the root, where the source would be imported for the package
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    states = int(run(KILLS, tmp_path, 48))
    assert states > 8  # the kills came at different moments


def test_two_processes_do_not_undo_each_other_s_work(tmp_path: Path) -> None:
    codes, fraction = run(TWO, tmp_path / "gallery").splitlines()
    assert (codes, fraction) == ("[0, 0]", "1.0")


def test_new_files_have_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    run(UMASK, tmp_path)
    for umask, mode in (("077", 0o600), ("022", 0o644), ("002", 0o664)):
        files = [path for path in (tmp_path / umask).rglob("*") if path.is_file()]
        assert len(files) == 8
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


def test_without_fcntl_as_on_windows(tmp_path: Path) -> None:
    assert run(NO_FCNTL, tmp_path) == "well\n"
