"""Backfill curves as a picture, and a report of them as files."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .._native import build_info
from ..judging.curve import BackfillCurve
from .terminal import shown

# Okabe and Ito's colours, safe for colour-blind readers; the dashes help in print.
STYLES = (("#D55E00", (0, (5, 1.5))), ("#0072B2", "-"), ("#009E73", "-"), ("#CC79A7", "-"), ("#E69F00", "-"))
INK, QUIET, FAINT = "#222222", "#5A5A5A", "#8A8A8A"


@dataclass(frozen=True)
class Line:
    """One curve of the picture."""

    label: str
    curve: BackfillCurve[Any]


def figure(lines: list[Line], *, title: str, subtitle: str, caption: str, old_map: float) -> Figure:
    """Two panels over the share of the gallery re-embedded: mAP, and queries lost against the old system."""
    with matplotlib.rc_context({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK}):
        fig = Figure(figsize=(10, 5), dpi=160, facecolor="white")
        quality, lost = fig.subplots(1, 2)
        fig.subplots_adjust(left=0.055, right=0.875, top=0.78, bottom=0.2, wspace=0.55)
        heading = fig.text(0.012, 0.965, title, fontsize=14, fontweight="bold", va="top")
        below = fig.text(0.012, 0.895, subtitle, fontsize=10, color=QUIET, va="top")
        foot = fig.text(0.012, 0.022, caption, fontsize=9, color=QUIET, va="bottom", linespacing=1.4)
        for text in (heading, below, foot):
            text.set_parse_math(False)  # a dollar sign in a file's name is not a formula
        _panel(quality, "Search quality (mAP)")
        _panel(lost, "Right before the upgrade, wrong now (top-1)")
        quality_ends: list[tuple[float, str, str]] = [(old_map, "old model", FAINT)]
        lost_ends: list[tuple[float, str, str]] = []
        quality.axhline(old_map, color=FAINT, linewidth=1.2, linestyle=(0, (2, 2)))
        for line, (colour, dash) in zip(lines, STYLES, strict=False):
            curve = line.curve
            for ax, y, ends in (
                (quality, [float(v) for v in curve.map], quality_ends),
                (lost, [100 * float(v) for v in curve.negative_flips], lost_ends),
            ):
                x = [100 * float(v) for v in curve.fraction]
                ax.plot(x, y, color=colour, linestyle=dash, linewidth=2.2, clip_on=False)
                ends.append((y[-1], line.label, colour))
        lost.set_ylim(0, max(lost.get_ylim()[1], 1))
        lost.yaxis.set_major_formatter(lambda v, _: f"{v:g} %")
        _label_ends(quality, quality_ends)
        _label_ends(lost, lost_ends)
        return fig


def _panel(ax: Axes, title: str) -> None:
    ax.set_title(title, loc="left", fontsize=10.5, pad=10)
    ax.set_xlim(0, 100)
    ax.set_xticks([0, 25, 50, 75, 100])
    ax.xaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    ax.set_xlabel("share of the gallery re-embedded", color=QUIET)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(FAINT)
    ax.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, colors=QUIET, labelsize=9)
    ax.tick_params(axis="x", pad=7)


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's name at its right end, moved apart where two would overlap."""
    ends.sort()
    low, high = ax.get_ylim()
    gap = 0.07 * (high - low)
    places = [value for value, _, _ in ends]
    for _ in range(50):  # push neighbours apart evenly, and off the axis, until all have room
        places[0] = max(places[0], low + gap / 2)
        for i in range(len(places) - 1):
            lack = gap - (places[i + 1] - places[i])
            if lack > 0:
                places[i] -= lack / 2
                places[i + 1] += lack / 2
    for (_, label, colour), place in zip(ends, places, strict=True):
        ax.annotate(
            label,
            (100, place),
            (8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def png(fig: Figure) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # a letter that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", message="Glyph")
        fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def names(page: str = "report.html") -> tuple[str, str, str]:
    """The files of a report: picture, figures and page. Two reports in one folder have files of their own."""
    before = "" if page == "report.html" else f"{Path(page).stem}-"
    return f"{before}curves.png", f"{before}figures.json", page


def pages(
    picture: Figure,
    figures: dict[str, Any],
    title: str,
    description: str,
    rows: Sequence[Sequence[str]],
    notes: Sequence[tuple[str, str]],
    *,
    seed: int,
    seconds: float,
    name: str = "report.html",
) -> dict[str, bytes]:
    """A report's files by name: the page, with its picture embedded, the picture alone, and all figures."""
    run = {"seconds": seconds, "build": build_info(), "torch": torch.__version__}
    text = files("fastcompat").joinpath("templates", "report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    written = names(name)
    values = {"title": title, "description": description, "rows": rows, "notes": notes, "seed": seed}
    values["json"] = shown(written[1])
    drawn = png(picture)
    filled = page.render(picture=base64.b64encode(drawn).decode(), **values, **run)
    numbers = json.dumps(figures | run, indent=1).encode()
    return dict(zip(written, (drawn, numbers, filled.encode()), strict=True))
