"""Options of the benchmark run, its grid of cases, and what is written about the machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import blas
import pytest
import result
from cases import table
from machine import Speed, commit, cpu_flags, describe, now, peaks, speed
from side import CONTEXT

PEAKS = pytest.StashKey[dict[int, dict[str, float]]]()
FAISS = pytest.StashKey[dict[int, dict[str, Any]]]()
CASES = pytest.StashKey[list[result.Case]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of a run."""
    group = parser.getgroup("fastcompat bench")
    group.addoption("--quick", action="store_true", help="small sizes, one thread: a smoke test")
    group.addoption("--threads", help="thread counts to measure (default: 1,2; with --quick: 1)")
    group.addoption("--result", type=Path, help="file to write: see result.py")


def pytest_configure(config: pytest.Config) -> None:
    """Start with nothing measured."""
    config.stash[PEAKS], config.stash[FAISS], config.stash[CASES] = {}, {}, []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every case at every thread count."""
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        quick = config.getoption("quick")
        counts = [int(n) for n in (config.getoption("threads") or ("1" if quick else "1,2")).split(",")]
        cases = table(quick)
        metafunc.parametrize("threads", counts, ids=lambda n: f"{n}t", scope="session")
        metafunc.parametrize("case", cases, ids=lambda case: case.id)


@pytest.fixture(scope="session")
def peak(request: pytest.FixtureRequest, threads: int) -> dict[str, float]:
    """Peak rates at this thread count, measured in the same run."""
    known = request.config.stash[PEAKS]
    if threads not in known:
        with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
            known[threads] = pool.submit(peaks, threads).result()
    return known[threads]


@pytest.fixture(scope="session")
def faiss_core(request: pytest.FixtureRequest, threads: int) -> str:
    """Return the setting under which faiss is fastest at this thread count."""
    known = request.config.stash[FAISS]
    if threads not in known:
        known[threads] = blas.best_for_faiss(threads, cpu_flags(), CONTEXT)
    return str(known[threads].get("core", blas.UNSET))


@pytest.fixture(scope="session")
def machine_speed(threads: int) -> Iterator[Speed]:
    """Return what tells how fast the machine is at this moment."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        yield Speed(lambda: pool.submit(speed, threads).result())


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> list[result.Case]:
    """Return where a case's figures go."""
    return request.config.stash[CASES]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the file, what stands in it of the machine included."""
    stash, path = session.config.stash, session.config.getoption("result")
    if path is None or not stash[CASES]:
        return
    found = {f"faiss, {n} thread(s)": blas.sentence(x) for n, x in stash[FAISS].items() if x}
    baselines = {"torch": blas.torch_kernels(), **found}
    machine = {**describe(), "peak": stash[PEAKS], "baselines": baselines}
    result.write(path, {"date": now(), "commit": commit(), "machine": machine, "cases": stash[CASES]})
