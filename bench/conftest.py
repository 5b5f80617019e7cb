"""Options of the benchmark run, its grid of cases, and what is written about the machine."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from cases import table
from machine import Speed, describe, peaks, speed
from side import CONTEXT

MEASURED_PEAKS = pytest.StashKey[dict[int, dict[str, float]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the two options of a run."""
    group = parser.getgroup("fastcompat bench")
    group.addoption("--quick", action="store_true", help="small sizes, one thread: a smoke test")
    group.addoption("--threads", help="thread counts to measure (default: 1,2; with --quick: 1)")


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
    known = request.config.stash.setdefault(MEASURED_PEAKS, {})
    if threads not in known:
        with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
            known[threads] = pool.submit(peaks, threads).result()
    return known[threads]


@pytest.fixture(scope="session")
def machine_speed(threads: int) -> Iterator[Speed]:
    """Return what tells how fast the machine is at this moment."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        yield Speed(lambda: pool.submit(speed, threads).result())


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """Add what matters about the machine, and leave out the host's name."""
    machine_info.pop("node", None)
    machine_info.update(describe(), peak=config.stash.get(MEASURED_PEAKS, {}))
