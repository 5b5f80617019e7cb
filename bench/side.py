"""One side of a case, in a fresh process of its own: it checks in with a result, then times calls on request.

The processes are forked from a server that has imported everything and started no thread: a fresh one costs
milliseconds, `torch.compile` starts from nothing in it, and faiss and torch run their threads apart.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import blas
import torch
from baselines import Call, build
from cases import Case, inputs

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["__main__", "side", "torch._dynamo"])

TIMED_S = 0.05  # a timing repeats the call for at least this long
SLOW_S = 6.0  # a call slower than this is called once in all, and that call is its timing
SETTLE_S = 0.02  # the OpenMP threads of the side before spin for some milliseconds
SAMPLE = 1024  # rows of a result that are compared


class Side:
    """A measured side: `seconds` gathers its timings (per call), `result` is a sample of its first result."""

    def __init__(self, case: Case, name: str, threads: int, core: str) -> None:
        """Start the process and wait for its first call."""
        self.name = name
        self._connection, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=_serve, args=(theirs, case, name, threads, core), daemon=True)
        self._process.start()
        theirs.close()
        self.result, self.output_bytes, self.peak_extra, self.first = self._receive()
        self.slow = self.first > SLOW_S
        self.seconds = [self.first] if self.slow else []

    def round(self) -> float:
        """Time one round; a slow side keeps the time of its first call."""
        if not self.slow:
            time.sleep(SETTLE_S)
            self._connection.send("time")
            self.seconds.append(self._receive())
        return self.seconds[-1]

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: process ended with code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name} failed:\n{answer}")
        return answer

    def __enter__(self) -> Side:
        """Return the started side."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, case: Case, name: str, threads: int, core: str) -> None:
    try:
        if name == "faiss":
            blas.apply(core)
        torch.set_num_threads(1 if name == "one thread" else threads)
        compiled = name == "compile"
        if not compiled:  # a second shape would make the compiled code dynamic
            build(name, case.kind, inputs(case.tiny()))()
        call = build(name, case.kind, inputs(case))
        if compiled:
            call()
        ctypes.CDLL(None).malloc_trim(0)
        before = _reset_peak()
        start = time.perf_counter()
        result = call()
        first = time.perf_counter() - start
        peak_extra = _status("VmHWM") - before
        sample = [(t[:: max(1, len(t) // SAMPLE)] if t.dim() else t).double().numpy() for t in result]
        connection.send((sample, sum(t.nbytes for t in result), peak_extra, first))
        del result, sample

        repeats = 1
        if first < TIMED_S:
            repeats = math.ceil(TIMED_S / max(_seconds(call, 3), 1e-6))
        while connection.recv():
            connection.send(_seconds(call, repeats))
    except EOFError:
        pass  # the other end has seen enough
    except BaseException:
        connection.send(traceback.format_exc())


def _seconds(call: Call, repeats: int) -> float:
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed / repeats


def _status(entry: str) -> int:
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(entry))
    return int(line.split()[1]) * 1024


def _reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
    return _status("VmRSS")
