"""`fastcompat backfill`: planned, stopped, killed, resumed; nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fastcompat as fc
from fastcompat.commands.app import app
from fastcompat.serving import job

COMMAND = "from fastcompat.commands.app import main; main()"
N = 3000
ENCODER = """
import os, time
import numpy as np

def embed(ids):
    with open("calls", "a") as file:
        file.write("".join(f"{i}\\n" for i in ids.tolist()))
    if os.path.exists("slow"):
        time.sleep(0.05)
    bad = os.path.exists("bad")
    if bad and np.isin(ids, [7, 77]).any():
        raise RuntimeError("no image")
    return (ids[:, None] + np.arange(5)).astype(np.float32) * (-1 if os.path.exists("other") else 1)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a gallery and an encoder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "encoder_of_test.py").write_text(ENCODER)
    old = np.random.default_rng(0).standard_normal((N, 6)).astype(np.float32)
    fc.MixedGallery.create("gallery", old, model="v1").close()
    return tmp_path


def call(*arguments: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["backfill", *arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def started(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(fc.__file__).parents[1]), str(Path(__file__).parent)])
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, "backfill", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


RUN = ("run", "gallery", "--encoder", "encoder_of_test:embed", "--model", "v2")


def done_right() -> None:
    with fc.MixedGallery.open("gallery", verify=True) as gallery:
        assert gallery.fraction == 1 and gallery.models == ["v1", "v2"]
        ids = np.arange(N)
        assert np.array_equal(gallery.vectors(ids, "v2"), (ids[:, None] + np.arange(5)).astype(np.float32))


def calls() -> list[int]:
    return [int(line) for line in Path("calls").read_text().split()]


def test_a_whole_job(here: Path) -> None:
    code, said = call("plan", *RUN[1:], "--price-per-item", "0.5")
    assert code == 0 and "items:  3,000 to embed" in said and "money:  1,500.00" in said and "hours:" in said
    assert f"bytes:  {N * (20 + 12):,} to write" in said
    assert fc.MixedGallery.open("gallery").models == ["v1"]  # nothing was written
    Path("calls").unlink()
    code, said = call(*RUN, "--batch", "300")
    assert code == 0, said
    assert "100.00 % of 3,000 items" in said
    assert sorted(calls()) == list(range(N))
    assert call(*RUN)[0] == 0  # again: nothing is left
    done_right()
    code, said = call("status", "gallery")
    assert code == 0 and "fraction:  1.0000" in said
    assert call("verify", "gallery") == (0, "sound\n")


def test_stopped_killed_and_run_again(here: Path) -> None:
    """SIGTERM, then SIGKILL, then two workers: each goes on where the one before committed."""
    Path("slow").touch()
    for number in (signal.SIGTERM, signal.SIGKILL):
        before = fc.MixedGallery.open("gallery").fraction
        process = started(*RUN, "--batch", "50")
        end = time.monotonic() + 100
        while fc.MixedGallery.open("gallery").fraction < before + 0.1:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.05)
        code, said = call("status", "gallery")  # while it runs
        assert code == 3 and "left:" in said
        process.send_signal(number)
        said = process.communicate(timeout=60)[0]
        if number == signal.SIGTERM:
            assert process.returncode == 130 and "interrupted; run the command again" in said
    Path("slow").unlink()
    process = started(*RUN, "--workers", "2", "--batch", "100")
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    done_right()
    assert len(calls()) <= N + 50 + 32 * 3  # one batch was killed; each start looks at the canaries


def test_items_that_fail_are_set_aside(here: Path) -> None:
    Path("bad").touch()
    code, said = call(*RUN, "--retries", "0", "--batch", "500")
    assert code == 3 and "2 items set aside, listed in gallery/set-aside.jsonl" in said
    assert "RuntimeError: no image" in said
    listed = [json.loads(line) for line in Path("gallery/set-aside.jsonl").read_text().splitlines()]
    assert sorted(item["id"] for item in listed) == [7, 77]
    assert fc.MixedGallery.open("gallery").pending().tolist() == [7, 77]
    code, said = call("status", "gallery")
    assert code == 3 and "left:      2, 2 of them set aside" in said and "7: RuntimeError: no image" in said
    Path("bad").unlink()
    Path("gallery/set-aside.jsonl").unlink()
    assert call(*RUN)[0] == 0
    done_right()


def test_another_encoder_is_refused(here: Path) -> None:
    with fc.MixedGallery.open("gallery", writable=True) as gallery:
        gallery.begin("v2")
        gallery.update(np.arange(40), (np.arange(40)[:, None] + np.arange(5)).astype(np.float32))
        gallery.commit()
    Path("other").touch()
    code, said = call(*RUN)
    assert code == 2 and "`encoder` is not the one that made the vectors of `v2`" in said
    assert fc.MixedGallery.open("gallery").fraction == 40 / N


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none", *RUN[2:]), "No such file or directory"),
        ((*RUN[:3], "encoder_of_test"), "`--encoder` must be package.module:function: got 'encoder_of_test'"),
        ((*RUN[:3], "encoder_of_test:nothing"), "`--encoder`: cannot import 'encoder_of_test:nothing'"),
        ((*RUN[:5], "v1"), "`--model` must be the newest model"),
        ((*RUN, "--order", "demand"), "`--order demand` needs `--queries`"),
        ((*RUN, "--order", "uncertainty"), "`--order uncertainty` needs `--class-weight`"),
        (
            (*RUN, "--order", "none.npy"),
            "`--order` must be random, uncertainty, demand or an .npy file",
        ),
        ((*RUN, "--order", "ids.npy"), "`--order` must name items of this gallery: it holds no item 5000"),
        ((*RUN, "--batch", "0"), "--batch"),
    ],
)
def test_wrong_arguments(arguments: tuple[str, ...], message: str, here: Path) -> None:
    with fc.MixedGallery.open("gallery", writable=True) as gallery:
        gallery.begin("v2")
        gallery.commit()
    np.save("ids.npy", np.array([3, 5000]))
    code, said = call(*arguments)
    assert code in (1, 2) and message in re.sub(r"\s+", " ", said.replace("│", "")), said


def test_orders(here: Path) -> None:
    """A random sample first, then what the order says; each item once."""
    rng = np.random.default_rng(1)
    with fc.MixedGallery.open("gallery") as gallery:
        old = gallery.vectors(np.arange(N), "v1")
        np.save("ids.npy", np.arange(N)[::-1].copy())
        np.save("queries.npy", old[2000:2010])
        np.save("weight.npy", rng.standard_normal((7, 6)).astype(np.float32))
        base = job.Job(Path("gallery"), "encoder_of_test:embed", batch=10)
        sample = job.in_order(gallery, base)[: job.SAMPLE]
        rest = {}
        for order in ("random", "ids.npy", "demand", "uncertainty"):
            its = base._replace(order=order, queries=Path("queries.npy"), class_weight=Path("weight.npy"))
            found = job.in_order(gallery, its)
            assert np.array_equal(found[: job.SAMPLE], sample) and sorted(found.tolist()) == list(range(N))
            rest[order] = found[job.SAMPLE :].tolist()
            shares = [job.in_order(gallery, its, (i, 3)).tolist() for i in range(3)]
            assert sorted(i for share in shares for i in share) == list(range(N))
        assert rest["ids.npy"] == sorted(rest["ids.npy"], reverse=True)
        wanted = fc.topk(old[2000:2010], old, job.FOUND)[1]
        counts = np.bincount(wanted.ravel(), minlength=N)
        assert (np.diff(counts[rest["demand"]]) <= 0).all() and counts[rest["demand"][0]] > 0
        unsure = fc.uncertainty(old, np.load("weight.npy"))
        assert (np.diff(unsure[rest["uncertainty"]]) <= 1e-6).all()


def test_the_rate_is_kept(here: Path) -> None:
    start = time.monotonic()
    steps = job.work(
        job.Job(Path("gallery"), "encoder_of_test:embed", batch=100, rate=1000), "new", (0, 1), lambda: False
    )
    with fc.MixedGallery.open("gallery", writable=True) as gallery:
        gallery.begin("new")
        gallery.commit()
    assert [next(steps) for _ in range(5)] == [100] * 5
    assert time.monotonic() - start > 0.39
