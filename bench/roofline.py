"""The roofline picture: every kernel of a result as a point under the peaks measured in the same run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from result import Case, Run
from table import SHORT, TITLES

# Okabe and Ito's colours, safe for colour-blind readers.
COLOURS = {
    "statistics": "#0072B2",
    "frozen": "#D55E00",
    "both": "#CC79A7",
    "memory": "#E69F00",
    "topk_ip": "#009E73",
    "topk_cosine": "#56B4E9",
    "mixed_topk": "#000000",
    "ranks": "#8A8A8A",
    "ranks_100": "#5A5A5A",
    "overhead": "#B59F00",
}
MARKERS = {"float32": "o", "bfloat16": "s"}
CEILINGS = {
    "fp32": ("fp32 multiply-adds", "-"),
    "bf16": ("bf16 dot products", "--"),
    "fp32 torch.mm": ("torch matrix product, fp32", ":"),
    "bf16 torch.mm": ("torch matrix product, bf16", "-."),
}
GREY = "#8A8A8A"
BYTES = {"float32": 4, "bfloat16": 2}


def draw(run: Run, path: Path) -> None:
    """Draw the kernels on one thread: by dimension, and search by what it computes per byte."""
    cases = [case for case in run["cases"] if case["threads"] == 1 and case["operations"]]
    peaks = run["machine"]["peak"]["1"]
    figure = Figure(figsize=(11, 6), dpi=130, facecolor="white", layout="constrained")
    by_dim, by_intensity = figure.subplots(1, 2, sharey=True, width_ratios=(1.3, 1))
    search = [case for case in cases if case["kind"] == "topk_ip"]
    whole = [case for case in cases if case["shape"][0] == 1024 or case["kind"] == "overhead"]
    _panel(by_dim, whole, lambda case: case["shape"][2], peaks, 0.06)
    _panel(by_intensity, [case for case in search if case["shape"][2] == 256], _intensity, peaks)
    by_dim.set(title="Kernels by dimension", xlabel="D", ylabel="GF/s of the products, one thread")
    dims = sorted({case["shape"][2] for case in whole})
    by_dim.set_xticks(dims, [str(dim) for dim in dims], minor=False)
    by_intensity.set(
        title="Exact search by the number of queries, D = 256",
        xlabel="operations per byte of queries, keys and results",
    )
    by_intensity.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    for x, y, queries in _apart(
        [(_intensity(c), _rate(c), c["shape"][0]) for c in search if c["shape"][2] == 256]
    ):
        by_intensity.annotate(f"{queries:,}", (x, y), (7, -12), textcoords="offset points", fontsize=8)
    if "read GB/s" in peaks:
        reach = (by_intensity.get_xlim()[0], peaks["fp32"] / peaks["read GB/s"])
        by_intensity.plot(reach, [peaks["read GB/s"] * x for x in reach], color=GREY, linewidth=1, zorder=0)
    kinds = dict.fromkeys((case["kind"], case["dtype"]) for case in cases)
    handles = [
        Line2D([], [], color=COLOURS[kind], marker=MARKERS[dtype], label=f"{SHORT[dtype]} {TITLES[kind]}")
        for kind, dtype in kinds
    ]
    hollow = Line2D(
        [], [], color="black", marker="o", linestyle="", fillstyle="none", label="a baseline is faster"
    )
    figure.legend(handles=[*handles, hollow], loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, metadata={"Software": None})


def _panel(
    ax: Axes, cases: list[Case], x: Callable[[Case], float], peaks: dict[str, float], step: float = 0.0
) -> None:
    """Draw one line a kernel; `step` moves the lines apart, in powers of two."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    lines: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in sorted(cases, key=x):
        lines[case["kind"], case["dtype"]].append(case)
    for number, ((kind, dtype), some) in enumerate(lines.items()):
        colour, aside = COLOURS[kind], 2 ** (step * (number - len(lines) / 2))
        ax.plot(
            [x(case) * aside for case in some], [_rate(case) for case in some], color=colour, linewidth=0.8
        )
        for case in some:
            fill = "white" if _loses(case) else colour
            ax.plot(x(case) * aside, _rate(case), MARKERS[dtype], color=colour, markerfacecolor=fill)
    for name, (label, dash) in CEILINGS.items():
        if peaks.get(name, 0) > 0.1 * peaks["fp32"]:  # not what this processor has no instruction for
            ax.axhline(peaks[name], color=GREY, linewidth=1, linestyle=dash, zorder=0)
            if step:
                ax.annotate(
                    label,
                    (0.99, peaks[name]),
                    (0, 2),
                    ("axes fraction", "data"),
                    "offset points",
                    ha="right",
                    fontsize=7.5,
                )
    ax.grid(alpha=0.25, which="major")
    ax.spines[["top", "right"]].set_visible(False)


def _apart(points: list[tuple[float, float, int]]) -> list[tuple[float, float, int]]:
    """Leave out the points that are too near the one before for a label of their own."""
    kept: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not kept or point[0] > 1.2 * kept[-1][0]:
            kept.append(point)
    return kept


def _rate(case: Case) -> float:
    return float(case["operations"] / case["sides"]["ours"]["median"] / 1e9)


def _loses(case: Case) -> bool:
    sides = case["sides"]
    return any(sides[name]["median"] < 0.995 * sides["ours"]["median"] for name in case["targets"])


def _intensity(case: Case) -> float:
    queries, keys, dim = case["shape"]
    return float(case["operations"] / ((queries + keys) * dim * BYTES[case["dtype"]] + case["output_bytes"]))
