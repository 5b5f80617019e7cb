"""The benchmark of the CUDA engine: `python bench/gpu.py OUT.json`; gpu.sh runs it after the tests.

Cases, inputs and baselines are those of the CPU's benchmark, made on the GPU, at the sizes of a GPU. Every
case runs in a process of its own, so that a kernel that fails takes nothing else with it; what time does not
suffice for is left out and said so. A time is the median of several calls, each between two events. Inputs
that fit into the second-level cache are found there, as in training.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from baselines import BASELINES, Call, build
from cases import BF16, FP32, TEMPERATURE, TOP, Case, Inputs, inputs
from machine import describe
from side import CONTEXT

DIMS = (128, 256, 512)
TIMED_S, CALLS = 0.3, (3, 50)  # seconds and numbers of timed calls
SAMPLE = 1024  # rows of a result that are compared


@dataclass
class Row:
    """What one side of a case did."""

    case: str
    side: str
    ms: float = 0.0
    tflops: float = 0.0
    share: float = 0.0  # of the measured bf16 matrix rate
    peak_mib: float = 0.0  # device memory beyond the inputs, results included
    difference: float | None = None  # from our result, relative norm
    error: str = ""
    spread: list[float] = field(default_factory=list)  # fastest and slowest call in ms


# --- what is measured ------------------------------------------------------------------------------------


def cases(tiny: bool) -> list[tuple[Case, tuple[str, ...]]]:
    """Return (case, baselines), what matters most first; `tiny` keeps the shapes of the work only."""
    b, n, items = (64, 512, 2_000) if tiny else (4_096, 65_536, 1_000_000)
    queries, many, huge = (64, 128, 1_000) if tiny else (10_000, 32_768, 1_000_000)
    loss = {"statistics": 1, "frozen": 2, "both": 4}
    training = [
        (Case(kind, b, n, dim, BF16, products=products), ("eager",))
        for kind, products in loss.items()
        for dim in DIMS
    ]
    search = [
        (Case("topk_ip", queries, items, 256, BF16, products=1), ("matmul+topk",)),
        (Case("topk_ip", queries, items, 128, BF16, products=1), ("matmul+topk",)),
        (Case("topk_ip", queries, items, 256, FP32, products=1), ("matmul+topk", "faiss-gpu")),
    ]
    large = [
        (Case("statistics", b, n, 1_024, BF16, products=1), ("eager",)),
        (Case("both", many, huge, 128, BF16, products=4), ()),
    ]
    rest = [
        (Case("overhead", 64, 64, 128, BF16, products=4), ("eager",)),
        (Case("frozen", b, n, 256, FP32, products=2), ("eager",)),
        (Case("both", b, n, 256, FP32, products=4), ("eager",)),
        (Case("mixed_topk", queries, items, 256, products=1), ("plain topk",)),
        (Case("ranks", queries // 10, items, 256, products=1), ("topk",)),
        (Case("backfill_curve", *((64, 800) if tiny else (1_000, 20_000)), 256), ("22 sorts",)),
    ]
    others = [
        (
            Case(kind, b, n, dim, BF16, products=loss[kind]),
            ("compile", "chunked", "cut cross-entropy", "Inf-CL"),
        )
        for dim in DIMS
        for kind in ("frozen", "both")
    ]
    return training + search + large + rest + others


def matmul_topk(x: Inputs) -> Call:
    """`torch.matmul` and `torch.topk`, a thousand queries at a time so that the scores fit."""

    def search() -> tuple[torch.Tensor, ...]:
        found = [(part @ x.keys.T).float().topk(TOP) for part in x.query.split(1_000)]
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    return search


def cut_cross_entropy(x: Inputs) -> Call:
    """Apple's kernels (not with 16-bit filtering of small gradients, which changes them)."""
    from cut_cross_entropy import linear_cross_entropy

    def step() -> tuple[torch.Tensor, ...]:
        loss = linear_cross_entropy(x.query / TEMPERATURE, x.keys, x.positive, filter_eps=None)
        return loss.detach(), *torch.autograd.grad(loss, x.wanted)

    return step


def inf_cl(x: Inputs) -> Call:
    """Inf-CL's Triton kernels on one GPU: gradients of both sides, whether or not they are wanted."""
    from inf_cl import cal_flash_loss

    def step() -> tuple[torch.Tensor, ...]:
        columns = min(x.query.shape[1], 256)
        loss = cal_flash_loss(x.query, x.keys, x.positive, 1 / TEMPERATURE, columns).mean()
        return loss.detach(), *torch.autograd.grad(loss, x.wanted)

    return step


def faiss_gpu(x: Inputs) -> Call:
    """Exact search of a flat faiss index on the GPU."""
    import faiss
    import faiss.contrib.torch_utils  # lets faiss take tensors

    index = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), x.keys.shape[1])
    index.add(x.keys)
    return lambda: index.search(x.query, TOP)


BASELINES["faiss-gpu"] = {"topk_ip": faiss_gpu}
BASELINES["matmul+topk"] = {"topk_ip": matmul_topk}
BASELINES["cut cross-entropy"] = dict.fromkeys(("frozen", "both"), cut_cross_entropy)
BASELINES["Inf-CL"] = dict.fromkeys(("frozen", "both"), inf_cl)
NEEDED = {"faiss-gpu": "faiss", "cut cross-entropy": "cut_cross_entropy", "Inf-CL": "inf_cl"}


# --- how it is measured ----------------------------------------------------------------------------------


class Clock:
    """Times calls on the device: events on a GPU, the host's clock on the CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device != "cpu"

    def wait(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def once(self, call: Callable[[], Any]) -> float:
        """Milliseconds of one call."""
        if not self.gpu:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e3
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def times(self, call: Callable[[], Any]) -> list[float]:
        """Milliseconds of several calls, after two that are not counted."""
        call()
        first = self.once(call)
        count = int(min(max(TIMED_S * 1e3 / max(first, 1e-3), CALLS[0]), CALLS[1]))
        return [self.once(call) for _ in range(count)]

    def peak(self, call: Callable[[], Any]) -> tuple[Any, float]:
        """The call's result and the MiB that it needed at once."""
        if not self.gpu:
            return call(), 0.0
        self.wait()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        self.wait()
        return result, (torch.cuda.max_memory_allocated() - before) / 2**20


def ceilings(device: str, tiny: bool) -> dict[str, float]:
    """Bytes a second of a large copy (read and written) and operations a second of a large bf16 product."""
    torch.set_default_device(device)
    clock, size, side = Clock(device), 2**20 if tiny else 2**32, 256 if tiny else 8192
    source, target = torch.randn(size // 4), torch.empty(size // 4)
    copy_ms = median(clock.times(lambda: target.copy_(source)))
    a, b = (torch.randn(side, side, dtype=BF16) for _ in range(2))
    matmul_ms = median(clock.times(lambda: a @ b))
    return {"copy TB/s": 2 * size / copy_ms / 1e9, "bf16 matmul TF/s": 2 * side**3 / matmul_ms / 1e9}


def _sample(result: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [(t[:: max(1, len(t) // SAMPLE)] if t.dim() else t).detach().double().cpu() for t in result]


def _difference(kind: str, mine: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Largest relative difference of two results; of a search, only of its scores (near-ties)."""
    pairs = list(zip(mine, other, strict=True))[: 1 if kind.startswith("topk") else None]
    return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def measure(connection: Connection, case: Case, sides: tuple[str, ...], device: str) -> None:
    """Send a row for each side of a case, ours last: if it brings the process down, the others are known."""
    torch.set_default_device(device)
    clock = Clock(device)
    samples: dict[str, list[torch.Tensor]] = {}
    for side in (*sides, "ours"):
        row = Row(case.id, side)
        try:
            if side in NEEDED and importlib.util.find_spec(NEEDED[side]) is None:
                raise ImportError(f"{NEEDED[side]} is not installed")
            x = inputs(case)
            call = build(side, case.kind, x)
            if side == "compile":
                call()
            result, row.peak_mib = clock.peak(call)
            samples[side] = _sample(result)
            del result
            spread = clock.times(call)
            row.ms, row.spread = median(spread), [min(spread), max(spread)]
            row.tflops = case.operations / row.ms / 1e9
            del call, x
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            traceback.print_exc()
        if row.side == "ours" and not row.error:
            theirs = {name: _difference(case.kind, samples["ours"], found) for name, found in samples.items()}
            connection.send(theirs)
        connection.send(row)
    connection.send(None)


def run(case: Case, sides: tuple[str, ...], device: str, seconds: float) -> list[Row]:
    """Rows of one case from a process of its own."""
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=measure, args=(theirs, case, sides, device))
    process.start()
    theirs.close()
    rows: dict[str, Row] = {}
    differences: dict[str, float] = {}
    problem, deadline = "", time.monotonic() + seconds
    try:
        while True:
            if not mine.poll(max(0.0, deadline - time.monotonic())):
                problem = f"stopped after {seconds:.0f} s"
                break
            if (message := mine.recv()) is None:
                break
            if isinstance(message, Row):
                rows[message.side] = message
            else:
                differences = message
    except EOFError:
        problem = "the process ended"
    if problem:
        process.kill()
    process.join()
    for side in (*sides, "ours"):
        row = rows.setdefault(side, Row(case.id, side, error=problem))
        row.difference = differences.get(side) if side != "ours" else None
    return [rows["ours"], *(rows[side] for side in sides)]


# --- the report ------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "  ".join(f"{name}: {value:.4g}" for name, value in report["ceilings"].items())
    line = "{:34} {:18} {:>10} {:>8} {:>7} {:>10} {:>8} {:>9}"
    yield line.format("case", "side", "ms", "TF/s", "share", "peak MiB", "/ ours", "difference")
    ours = 0.0
    for row in report["rows"]:
        if row["side"] == "ours":  # it stands before what it is compared with
            ours = row["ms"]
        if row["error"]:
            yield f"{row['case']:34} {row['side']:18} {row['error']}"
            continue
        ratio = f"{row['ms'] / ours:.2f}x" if ours else ""
        off = "" if row["difference"] is None else f"{row['difference']:.1e}"
        rate = (f"{row['tflops']:.0f}", f"{row['share']:.0%}") if row["tflops"] else ("", "")
        size = f"{row['peak_mib']:.0f}"
        yield line.format(row["case"], row["side"], f"{row['ms']:.4g}", *rate, size, ratio, off)


def main() -> None:
    """Measure within the time given, write the report, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seconds", type=float, default=240, help="time for everything (default: 240)")
    parser.add_argument("--device", default="cuda", help="cpu: a stand-in with tiny sizes, to try the script")
    parser.add_argument("--table", action="store_true", help="only print the table of OUT")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(json.loads(given.out.read_text()))))
        return
    tiny, start = given.device == "cpu", time.monotonic()
    report: dict[str, Any] = {"machine": describe(), "device": given.device, "ceilings": {}, "rows": []}
    if not tiny:
        report["device"] = torch.cuda.get_device_name()
    try:
        report["ceilings"] = ceilings(given.device, tiny)
    except Exception as error:
        report["ceilings_error"] = str(error)
    rate = report["ceilings"].get("bf16 matmul TF/s", 0.0)
    for case, sides in cases(tiny):
        left = given.seconds - (time.monotonic() - start)
        rows = (
            run(case, sides, given.device, min(60.0, left))
            if left > 5
            else [Row(case.id, side, error="no time left") for side in ("ours", *sides)]
        )
        for row in rows:
            row.share = row.tflops / rate if rate else 0.0
        report["rows"] += map(asdict, rows)
        written = given.out.with_suffix(".part")
        written.write_text(json.dumps(report, indent=1, default=str))
        written.replace(given.out)  # what is known survives what comes
    print("\n".join(table(report)))
    sys.exit(any(row["error"] for row in report["rows"] if row["side"] == "ours"))


if __name__ == "__main__":
    main()
