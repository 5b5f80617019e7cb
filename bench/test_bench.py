"""The benchmark run: every side of a case in its own process, rounds interleaved, medians kept."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from cases import SCALING, Case, eager_fits
from machine import HOPELESS, Speed
from pytest_benchmark.fixture import BenchmarkFixture
from side import Side

ROUNDS = {True: (2, 3), False: (5, 15)}
CASE_S = {True: 0.2, False: 8.0}  # seconds of rounds per case, quick or not: few rounds where calls are slow
PATIENCE_S = {True: 0.0, False: 8.0}  # seconds in all that the rounds of a case may wait for a quiet machine

_measured = 0.0


def worker_clock() -> float:
    """Seconds our side has measured for itself, so that talking to its process is not counted."""
    return _measured


def _difference(ours: Side, theirs: Side) -> float:
    """Return the largest relative difference between the results of two sides."""
    largest = 0.0
    for i, (a, b) in enumerate(zip(ours.result, theirs.result, strict=True)):
        if i == 1 and theirs.name == "faiss":  # ids: keys closer than rounding may change places
            assert (a == b).mean() > 0.999, f"ids differ from {theirs.name}'s"
            continue
        size = np.linalg.norm(b) if b.ndim else max(abs(b), 1.0)  # a loss is a difference of logits of size 1
        largest = max(largest, float(np.linalg.norm(a - b) / (size or 1.0)))
    return largest


@pytest.mark.benchmark(timer=worker_clock)
def test_case(
    case: Case,
    threads: int,
    peak: dict[str, float],
    machine_speed: Speed,
    faiss_core: str,
    measured: list[dict[str, Any]],
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
) -> None:
    """Check that all sides of a case agree, then time them in turn."""
    if case.dtype == torch.bfloat16 and peak["bf16 torch.mm"] < HOPELESS:
        case = replace(case, against={})  # torch's side would take hours
    assert not case.against or eager_fits(case.queries, case.keys), "eager side would not fit"
    if threads > 1:
        case = replace(case, against=case.against | SCALING.get(case.kind, {}))
    with ExitStack() as stack:
        ours, *others = (
            stack.enter_context(Side(case, name, threads, faiss_core)) for name in ("ours", *case.against)
        )
        differences = {side.name: _difference(ours, side) for side in others}
        for name, difference in differences.items():
            inexact = (
                name == "chunked" and case.dtype == torch.bfloat16
            )  # it sums its logits in bf16; recorded
            tolerance = 0 if name == "one thread" else case.tolerance
            assert inexact or difference <= tolerance, f"differs from {name}'s by {difference:.1e}"

        def time_ours() -> None:
            global _measured
            _measured += ours.round()

        quick = request.config.getoption("quick")
        patience, speeds = PATIENCE_S[quick], []

        def time_others() -> None:
            nonlocal patience
            start = time.monotonic()
            speeds.append(machine_speed.when_quiet(start + patience))
            patience -= time.monotonic() - start
            for side in others:
                side.round()

        a_round = sum(max(side.first, 0.05) for side in (ours, *others) if not side.slow) or ours.first
        rounds = int(np.clip(CASE_S[quick] / a_round, *ROUNDS[quick]))
        benchmark.pedantic(time_ours, setup=time_others, rounds=rounds)

    benchmark.group = case.kind
    measured.append(
        {
            "kind": case.kind,
            "dtype": str(case.dtype).removeprefix("torch."),
            "shape": [case.queries, case.keys, case.dim],
            "threads": threads,
            "operations": case.operations,
            "speeds": speeds,
            "targets": case.against,
            "output_bytes": ours.output_bytes,
            "sides": {
                side.name: {
                    "rounds": side.seconds,
                    "peak_extra": side.peak_extra,
                    "difference": differences.get(side.name),
                }
                for side in (ours, *others)
            },
        }
    )
    if case.extra_limit is not None:
        extra = ours.peak_extra - ours.output_bytes
        assert extra <= case.extra_limit, f"{extra >> 20} MiB beyond inputs and outputs"
