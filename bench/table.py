"""Print the tables of a result as markdown: `python bench/table.py bench/results/MACHINE`, file or folder.

A folder holds the runs of one machine, in the order of their names. Of a case that several have, the one
counts around which the machine gave more of its best, whatever came out; the last, where they do not tell.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from result import Case, Run, read

MIB = 1 << 20
SHORT = {"float32": "fp32", "bfloat16": "bf16"}
TITLES = {
    "statistics": "statistics only",
    "frozen": "forward+backward, keys frozen",
    "both": "forward+backward, both",
    "overhead": "call overhead, forward+backward",
    "memory": "`softmax_stats` forward+backward",
    "topk_ip": "exact top-100, inner product",
    "topk_cosine": "exact top-100, cosine",
    "mixed_topk": "mixed gallery top-100",
    "ranks": "ranks of 10 targets",
    "ranks_100": "ranks of 100 targets, best and worst",
    "backfill_curve": "backfill curve",
}
# What is asked for beyond a baseline's time over ours (those targets stand in the result, case by case).
PEAK_SHARE = {128: 0.75, 256: 0.80, 512: 0.85}  # of the multiply-add peak, fp32 forward+backward
SCREENED = {128: 2.5, 256: 2.3, 512: 2.0}  # exact search screened in bf16, against faiss
TARGET_SIZE = [1024, 65_536]  # of the losses
# Of eager torch's peak extra memory, results not counted. Eager reaches that peak, three matrices of logits,
# before it has results: it is the same with the keys frozen and without.
MEMORY_SHARE = 0.05


def load(result: Path) -> Run:
    """Return a machine's result: of each case the measurement around which the machine was fastest."""
    files = sorted(result.glob("*.json")) if result.is_dir() else [result]
    first, *later = runs = [read(file) for file in files]
    assert all(run["machine"]["cpu"] == first["machine"]["cpu"] for run in later), "two machines"
    everything = [case for run in runs for case in run["cases"]]
    by_threads: dict[int, list[Case]] = {}
    for case in everything:
        by_threads.setdefault(case["threads"], []).append(case)
    best = {threads: best_speed(cases) for threads, cases in by_threads.items()}

    def speed(case: Case) -> float:
        return min(machine_shares(case, best[case["threads"]])) if case.get("speeds") else 0.0

    chosen: dict[tuple[Any, ...], Case] = {}
    for case in everything:
        key = (case["kind"], case["dtype"], *case["shape"], case["threads"])
        if key not in chosen or speed(case) >= speed(chosen[key]):
            chosen[key] = case
    # The best that the processor ever gave: a run that began in a busy minute must not flatter itself.
    peak: dict[str, dict[str, float]] = {}
    for run in runs:
        for threads, rates in run["machine"]["peak"].items():
            known = peak.setdefault(threads, {})
            known.update({name: max(rate, known.get(name, 0.0)) for name, rate in rates.items()})
    for case in chosen.values():
        case["peak"] = peak[str(case["threads"])]
    found = sorted(chosen.values(), key=lambda case: case["threads"])
    return {**first, "machine": {**first["machine"], "peak": peak}, "cases": found}


def rows(header: Iterable[str], body: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield a markdown table."""
    header = list(header)
    yield f"| {' | '.join(header)} |"
    yield f"|{'---|' * len(header)}"
    for row in body:
        yield f"| {' | '.join(row)} |"
    yield ""


def title(case: Case) -> str:
    """Return what is computed, and at which size."""
    queries, keys, _ = case["shape"]
    return f"{SHORT[case['dtype']]} {TITLES[case['kind']]}, {queries:,} x {keys:,}"


def machine(info: dict[str, Any]) -> Iterator[str]:
    """Yield who measured, with what."""
    versions = ", ".join(f"{name} {number}" for name, number in info["versions"].items())
    yield f"{info['cpu']} (family/model/stepping {info['cpu_model']}), {info['cores']} cores,"
    caches = ", ".join(f"{level} {size}" for level, size in info["cache"].items())
    yield f"caches {caches}, {' '.join(info['instructions'])};"
    yield f"SIMD in use: {info['build'].get('simd', '?')}. {versions}."
    for threads, rates in info["peak"].items():
        peaks = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items() if not name.startswith("read"))
        reads = f"; reads {rates['read GB/s']:.0f} GB/s" if "read GB/s" in rates else ""
        yield f"Peak GF/s, {threads} thread(s): {peaks}{reads}."
    for baseline, kernels in info.get("baselines", {}).items():
        yield f"Kernels of {baseline}: {kernels}."
    yield ""


def cell(value: str, wanted: str, met: bool) -> str:
    """Return a measured figure with its target in brackets, bold where it is met."""
    return f"{f'**{value}**' if met else value} ({wanted})"


def targets(everything: list[Case]) -> Iterator[str]:
    """Yield every target with the figure that was measured, dimension by dimension."""
    cells: dict[tuple[str, str, str], dict[int, str]] = defaultdict(dict)
    for case in everything:
        name, threads, dim = title(case), str(case["threads"]), case["shape"][2]
        sides, mine = case["sides"], case["sides"]["ours"]
        trained = case["kind"] in ("frozen", "both")
        wanted = {side: [target] for side, target in case["targets"].items() if target}
        if case["kind"] == "topk_ip" and case["shape"][0] == 1024:
            wanted["faiss"].append(SCREENED[dim])
        for side, levels in wanted.items():
            ratio = sides[side]["median"] / mine["median"]
            for i, target in enumerate(levels):
                what = f"{side}, screened in bf16" if i else side
                cells[name, what, threads][dim] = cell(
                    f"{ratio:.2f}", f"{target:.3g}", reached(ratio, target)
                )
        if trained and case["dtype"] == "float32" and best_peak(case) and case["shape"][:2] == TARGET_SIZE:
            share = case["operations"] / mine["median"] / 1e9 / best_peak(case)
            goal = PEAK_SHARE[dim]
            cells[name, "the multiply-add peak", threads][dim] = cell(
                f"{share:.0%}", f"{goal:.0%}", share >= goal
            )
        if trained and "eager" in sides and case["shape"][:2] == TARGET_SIZE:
            share = (mine["peak_extra"] - case["output_bytes"]) / sides["eager"]["peak_extra"]
            within = share <= MEMORY_SHARE
            cells[name, "eager's memory", threads][dim] = cell(f"{share:.1%}", f"{MEMORY_SHARE:.0%}", within)
    dims = sorted({dim for found in cells.values() for dim in found})
    header = ["case", "against", "threads", *(f"D={dim}" for dim in dims)]
    return rows(header, ([*key, *(found.get(dim, "") for dim in dims)] for key, found in cells.items()))


def reached(ratio: float, target: float) -> bool:
    """Return whether a target is met at the precision it is stated with."""
    return round(ratio, 2) >= round(target, 2)


def ratios(cases: list[Case]) -> Iterator[str]:
    """Yield the baseline's time over ours, with the target in brackets."""
    dims = sorted({case["shape"][2] for case in cases})
    cells: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for case in cases:
        mine = case["sides"]["ours"]["median"]
        for name, target in case["targets"].items():
            ratio = case["sides"][name]["median"] / mine
            met = bool(target and reached(ratio, target))
            found = cell(f"{ratio:.2f}", f"{target:.3g}", met) if target else f"{ratio:.2f}"
            cells[title(case), name][case["shape"][2]] = found
    header = ["case", "against", *(f"D={dim}" for dim in dims)]
    return rows(header, ([*key, *(found.get(dim, "") for dim in dims)] for key, found in cells.items()))


def floors(cases: list[Case]) -> Iterator[str]:
    """Yield our times, those of the same operations at the measured peak, and how fast the machine was."""
    body = []
    best = best_speed(cases)
    for case in cases:
        seconds, operations = case["sides"]["ours"]["median"], case["operations"]
        cells = [title(case), str(case["shape"][2]), f"{seconds * 1e3:.4g}"]
        peak = best_peak(case)
        if operations and peak:
            floor = operations / peak / 1e9
            rate = operations / seconds / 1e9
            cells += [f"{floor * 1e3:.4g}", f"{seconds / floor:.2f}", f"{rate:.0f}", f"{rate / peak:.0%}"]
        cells += [""] * (7 - len(cells))
        if best:
            cells.append(" ".join(f"{share:.0%}" for share in machine_shares(case, best)))
        body.append(cells)
    header = ["case", "D", "ours ms", "floor ms", "time / floor", "GF/s", "of peak"]
    return rows([*header, "machine"] if best else header, body)


def best_speed(cases: list[Case]) -> list[float]:
    """Return the best of each rate that tells how fast the machine was; nothing where no case has them."""
    return [max(rates) for rates in zip(*(r for case in cases for r in case.get("speeds", [])), strict=True)]


def machine_shares(case: Case, best: list[float]) -> list[float]:
    """Return what the machine gave around the rounds of a case, as shares of its best."""
    return [median(rates) / most for rates, most in zip(zip(*case["speeds"], strict=True), best, strict=True)]


def best_peak(case: Case) -> float:
    """Return the peak rate of the case's products: bf16 may also be widened to fp32, whichever is faster."""
    rates = case["peak"]
    fp32 = rates.get("fp32") or rates["fp32 torch.mm"]
    return float(max(fp32, rates.get("bf16", 0.0)) if case["dtype"] == "bfloat16" else fp32)


def memory(cases: list[Case]) -> Iterator[str]:
    """Yield the growth of the peak resident set in the first call, results included."""
    body = []
    for case in cases:
        sides = case["sides"]
        mine = sides["ours"]["peak_extra"]
        eager = sides.get("eager", {}).get("peak_extra")
        body.append(
            [
                title(case),
                str(case["shape"][2]),
                f"{mine / MIB:.0f}",
                f"{case['output_bytes'] / MIB:.0f}",
                f"{eager / MIB:.0f}" if eager else "",
                f"{mine / eager:.1%}" if eager else "",
            ]
        )
    return rows(["case", "D", "ours MiB", "of which results", "eager MiB", "ours / eager"], body)


def tables(run: Run) -> list[str]:
    """Return everything a result holds, line by line."""
    lines = list(machine(run["machine"]))
    everything = run["cases"]
    counts = sorted({case["threads"] for case in everything})
    lines += ["### Targets: measured (wanted), **bold** = met", ""]
    lines += targets(everything)
    for threads in counts:
        cases = [case for case in everything if case["threads"] == threads]
        lines += [f"### Ratios, {threads} thread(s): baseline / ours (target), **bold** = target met", ""]
        lines += ratios(cases)
        lines += [f"### Time and floor, {threads} thread(s)", ""]
        lines += floors(cases)
    losses = [
        c for c in everything if c["threads"] == counts[0] and c["kind"] in ("frozen", "both", "memory")
    ]
    return [*lines, "### Peak extra memory of one call", "", *memory(losses)]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("\n".join(tables(load(Path(sys.argv[1])))))
