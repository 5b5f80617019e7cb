"""Write results into the documentation: `python bench/publish.py bench/results/MACHINE ...`.

Rewrites the block between the markers in README.md and in docs/performance.md, and draws docs/roofline.png
from the first. `python bench/publish.py --check` fails where a block is not what the results it names give.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

from result import Case, Run
from table import MIB, load, rows, tables

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- measured: {} -->\n\n", "\n<!-- end of measured -->\n"
DIMS = (128, 256, 512)
SEARCH = ("topk_ip", "float32")
# What the README shows: a name for the row, the baseline in words and in the result, (kind, dtype, queries).
ROWS = (
    ("float32 loss, gallery frozen", "eager torch", "eager", ("frozen", "float32", 1024)),
    ("", "`torch.compile`", "compile", ("frozen", "float32", 1024)),
    ("float32 loss, both sides trained", "eager torch", "eager", ("both", "float32", 1024)),
    ("", "`torch.compile`", "compile", ("both", "float32", 1024)),
    ("bfloat16 loss, gallery frozen", "eager torch", "eager", ("frozen", "bfloat16", 1024)),
    ("", "`torch.compile`", "compile", ("frozen", "bfloat16", 1024)),
    ("search, 1,024 queries", "faiss `IndexFlatIP`", "faiss", (*SEARCH, 1024)),
    ("search, 100 queries", "faiss `IndexFlatIP`", "faiss", (*SEARCH, 100)),
    ("search, 8 queries", "faiss `IndexFlatIP`", "faiss", (*SEARCH, 8)),
    ("search, 1 query", "faiss `IndexFlatIP`", "faiss", (*SEARCH, 1)),
    (
        "curve of 22 backfill states, 1,000 x 20,000",
        "one torch sort a state",
        "22 sorts",
        ("backfill_curve", "float32", 1000),
    ),
    ("a tiny loss, 64 x 64", "eager torch", "eager", ("overhead", "float32", 64)),
)


def readme(run: Run, link: str) -> Iterator[str]:
    """Yield the short table: one thread, times faster, losing sizes bold."""
    cases = {
        (c["kind"], c["dtype"], c["shape"][0], c["shape"][2]): c for c in run["cases"] if c["threads"] == 1
    }
    info, loss = run["machine"], cases["frozen", "float32", 1024, 128]
    ours, eager = (f"{loss['sides'][side]['peak_extra'] / MIB:.0f}" for side in ("ours", "eager"))
    torch, faiss = (info["versions"][name].partition("+")[0] for name in ("torch", "faiss"))
    text = (
        f"How many times faster than the baseline, on one thread; **bold**: slower. {info['cpu']}, "
        f"{info['cores']} cores, {', '.join(info['instructions'])}; torch {torch}, faiss {faiss}; "
        f"{link}. Losses: 1,024 queries against 65,536 keys, one positive each, forward and "
        f"backward, which takes {ours} MiB where eager torch takes {eager} (float32, gallery frozen, D=128). "
        "Search: exact top-100 of 100,000."
    )
    yield textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
    yield ""
    body = []
    for name, against, side, which in ROWS:
        found = [cases.get((*which, dim)) for dim in DIMS]
        cells = [times(case, side) if case and side in case["sides"] else "" for case in found]
        if any(cells):
            body.append([name, against, *cells])
    yield from rows(["", "against", *(f"D={dim}" for dim in DIMS)], body)


def times(case: Case, side: str) -> str:
    """Return how many times faster we are, bold where we are slower."""
    ratio = float(case["sides"][side]["median"] / case["sides"]["ours"]["median"])
    text = f"{ratio:.0f}x" if ratio >= 9.95 else f"{ratio:.1f}x"
    return f"**{ratio:.2g}x**" if ratio < 0.995 else text


def performance(run: Run, link: str) -> Iterator[str]:
    """Yield everything the result holds."""
    yield f"## {run['machine']['cpu']}, {run['machine']['build'].get('simd', '?')}"
    yield ""
    yield f"Measured on {run['date'][:10]}; {link}."
    yield ""
    yield from tables(run)


PAGES: dict[str, Callable[[Run, str], Iterator[str]]] = {
    "README.md": readme,
    "docs/performance.md": performance,
}


def block(page: str, results: str) -> str:
    """Return the block of a page as the results give it, markers included."""
    parts = []
    for result in results.split():
        link = f"[result]({os.path.relpath(result, Path(page).parent)})"
        parts.append("\n".join(PAGES[page](load(ROOT / result), link)).strip() + "\n")
    return BEGIN.format(results) + "\n".join(parts) + END


def split(page: str) -> tuple[str, str, str, str]:
    """Return the text before a page's block, the results it names, the block, the text after it."""
    text = (ROOT / page).read_text()
    opening, closing = BEGIN.split("{}")
    before, first, rest = text.partition(opening)
    results, second, inside = rest.partition(closing)
    inside, last, after = inside.partition(END)
    if not (first and second and last):
        sys.exit(f"{page} has lost its markers: {BEGIN.format('FILE').strip()} and {END.strip()}")
    return before, results, first + results + second + inside + last, after


def check() -> None:
    """Exit with an error where a page does not show what its result gives."""
    for page in PAGES:
        _, results, shown, _ = split(page)
        if shown != block(page, results):
            sys.exit(f"{page} does not show {results}: run `python bench/publish.py {results}`")


def main(arguments: list[str]) -> None:
    """Rewrite the pages from the results, and the picture from the first."""
    from roofline import draw

    results = " ".join(Path(a).resolve().relative_to(ROOT).as_posix() for a in arguments)
    for page in PAGES:
        before, _, _, after = split(page)
        (ROOT / page).write_text(before + block(page, results) + after)
    draw(load(ROOT / results.split()[0]), ROOT / "docs" / "roofline.png")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    check() if sys.argv[1] == "--check" else main(sys.argv[1:])
