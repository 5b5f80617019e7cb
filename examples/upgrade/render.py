"""Tables and picture from the figures: `python -m upgrade.render RESULTS.json` in `examples/`."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastcompat._files import write_file
from fastcompat.commands.report import png

from .effects import EFFECTS
from .losses import TRAINED

FAMILIES = {
    "Trained to be compatible": TRAINED,
    "Old gallery transformed": ("FCT", "FCT + side", "FastFill"),
    "New query sent back, or two queries": (
        "DRM",
        "Procrustes",
        "RQT",
        "RQT + MCL, own negatives",
        "RQT + MCL",
        "rho + MCL",
    ),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A8A8A")
NAMES = {"DRM": "independent, DRM (two queries)"}
Row = list[str]


def pm(values: Iterable[float], form: str = "{:.3f}") -> str:
    """Mean and, with several seeds, their standard deviation."""
    values = list(values)
    mean = form.format(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format(statistics.stdev(values)).lstrip('+')}"


def markdown(rows: list[Row]) -> str:
    """Rows, header first, as a table."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body]) + "\n"


def quality(found: dict[str, Any]) -> list[Row]:
    """Self and cross test and the update gain."""
    seeds = found["seeds"]
    rows = [["system", "self mAP", "self top-1", "cross mAP", "cross top-1", "update gain", "models a query"]]
    rows.append(["old", *(pm(seed["old"][of] for seed in seeds) for of in ("map", "cmc1")), *["-"] * 3, "1"])
    for name in _names(found):
        systems = [seed["systems"][name] for seed in seeds]
        tests = [pm(s[which][of] for s in systems) for which in ("self", "cross") for of in ("map", "cmc1")]
        gain = pm((100 * s["gain"] for s in systems), "{:.0f}") + " %"
        rows.append([NAMES.get(name, name), *tests, gain, str(systems[0]["extractions"])])
    return rows


def backfill(found: dict[str, Any]) -> list[Row]:
    """Areas and the largest share of lost queries, in each order."""
    seeds = found["seeds"]
    orders = ("random", "uncertainty")
    heads = ("area mAP", "area top-1", "most lost, %")
    rows = [["system", *(f"{head}, {order}" for head in heads for order in orders)]]
    for name in _names(found):
        walks = {order: [seed["systems"][name]["orders"][order] for seed in seeds] for order in orders}
        rows.append([NAMES.get(name, name), *_areas(walks.values())])
        own = [seed["systems"][name]["orders"].get("own") for seed in seeds]
        if own[0] is not None:
            cells = _areas([own])
            rows.append(
                [
                    f"{name}, its own order",
                    *(cell for pair in zip(["-"] * 3, cells, strict=True) for cell in pair),
                ]
            )
    return rows


def _areas(walks: Iterable[list[dict[str, Any]]]) -> Row:
    walks = list(walks)
    cells = []
    for key, factor, form in (("area_map", 1, "{:.3f}"), ("area_cmc1", 1, "{:.3f}"), ("lost", 100, "{:.1f}")):
        cells += [pm((factor * walk[key] for walk in some), form) for some in walks]
    return cells


def effects(found: dict[str, Any]) -> list[Row]:
    """Each claim, by how much, and in how many seeds it held."""
    rows = [["claim", "from", "difference", "held in"]]
    for effect in EFFECTS:
        values = [effect.difference(seed) for seed in found["seeds"]]
        held = sum(value > 0 for value in values)
        rows.append(
            [
                effect.claim,
                effect.source,
                pm(values, "{:+.3f}"),
                f"{held} of {len(values)}",
            ]
        )
    return rows


def picture(found: dict[str, Any]) -> Figure:
    """All curves, means over the seeds: solid in random order, dashed in uncertainty order."""
    figure = Figure(figsize=(15, 8.5), dpi=110, layout="constrained", facecolor="white")
    panels = figure.subplots(2, len(FAMILIES), sharex=True, sharey="row")
    seeds = found["seeds"]
    old = statistics.fmean(seed["old"]["map"] for seed in seeds)
    for column, (family, names) in enumerate(FAMILIES.items()):
        top, bottom = panels[:, column]
        top.set_title(family, loc="left", fontsize=11)
        top.axhline(old, color="#8A8A8A", linewidth=1, linestyle=":")
        for name, colour in zip(names, COLOURS, strict=False):
            for order, dash in (("random", "-"), ("uncertainty", "--"), ("own", "-.")):
                if order in seeds[0]["systems"][name]["orders"]:
                    _curve(top, seeds, name, order, "map", colour, dash, 1.0)
                    _curve(bottom, seeds, name, order, "lost", colour, dash, 100.0)
        bottom.set_xlabel("share of the gallery re-embedded, %")
        top.legend(fontsize=8, loc="best")
        for panel in (top, bottom):
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("mAP (dotted: the old model)")
    panels[1, 0].set_ylabel("right before the upgrade, wrong now, %")
    figure.suptitle(
        f"{found['data']}: {len(seeds)} seeds, {found['queries']} queries against {found['gallery']} items; "
        "solid: random order, dashed: uncertainty order, dash-dotted: FastFill's own",
        fontsize=11,
    )
    return figure


def _curve(
    panel: Axes,
    seeds: list[dict[str, Any]],
    name: str,
    order: str,
    of: str,
    colour: str,
    dash: str,
    factor: float,
) -> None:
    curves = [seed["systems"][name]["orders"][order]["curve"][of] for seed in seeds]
    y = [factor * statistics.fmean(values) for values in zip(*curves, strict=True)]
    x = [100 * i / (len(y) - 1) for i in range(len(y))]
    label = NAMES.get(name, name) if order == "random" else None
    panel.plot(x, y, color=colour, linestyle=dash, linewidth=1.8 if order == "random" else 1.1, label=label)


def _names(found: dict[str, Any]) -> list[str]:
    return list(found["seeds"][0]["systems"])


def tables(found: dict[str, Any]) -> dict[str, str]:
    """All tables in markdown, by title."""
    made = {"Tests": quality, "Backfill": backfill, "Effects": effects}
    return {title: markdown(make(found)) for title, make in made.items()}


def write(results: Path) -> list[Path]:
    """The tables and the picture of a file of results, beside it: as `.md` and as `.png`."""
    found = json.loads(results.read_text())
    page, image = results.with_suffix(".md"), results.with_suffix(".png")
    text = "\n".join(f"### {title}\n\n{table}" for title, table in tables(found).items())
    write_file(page, text.encode())
    write_file(image, png(picture(found)))
    return [page, image]


if __name__ == "__main__":
    print(*write(Path(sys.argv[1])))
