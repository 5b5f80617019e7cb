"""Every merge on every pair: `python -m merges --text FOLDER --omniglot ARCHIVE [--quick]` in examples/.

Prints a table of pairs x merges (area of mAP as the mean of 7 states, worst state against the old system,
worst share of queries lost), the choice on pairs that no form was chosen by, and the orders.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import fastcompat as fc

from . import judge
from .pairs import SEEN, TRAPS, UNSEEN, Pair, Side, build

MERGES = ("raw", "rrf", *judge.METHODS, "chosen", "procrustes", "ridge", "slerp", "blend")
PLAIN = ("raw", "rrf", "zscore", "tail")


def every_merge(pair: Pair, seed: int, measure: str) -> dict[str, dict[str, float | str]]:
    """Figures of every merge on the served side, and what was chosen on the judged one."""
    judged, served = pair
    pure = judge.curve(served, seed)
    old = float(pure.map[0])
    found: dict[str, judge.Judged] = {"raw": judge.figures(pure, old), "rrf": judge.rrf(served, seed)}
    for method in judge.METHODS:
        maps = judge.calibrators(method, judged, served, seed)
        found[method] = judge.figures(judge.curve(served, seed, maps), old)
    names = ("query_old", "old", "query_new", "new", "query_labels", "gallery_labels")
    chosen = fc.choose_calibration(**dict(zip(names, judged, strict=True)), seed=seed, measure=measure)
    found["chosen"] = found["raw" if chosen == "none" else chosen]
    alpha = judge.best_alpha(judged, seed)
    for name, share in (("procrustes", 1.0), ("ridge", 1.0), ("slerp", alpha)):
        query = judge.mapped_query(name, judged, served, share)
        found[name] = judge.figures(judge.curve(served, seed, query=query), old)
    found["blend"], weight = judge.bounded(judged, served, "zscore" if chosen == "none" else chosen, seed)
    result: dict[str, dict[str, float | str]] = {name: value._asdict() for name, value in found.items()}
    result["chosen"] |= {"method": chosen}
    result["slerp"] |= {"alpha": alpha}
    result["blend"] |= {"weight": weight}
    result["ends"] = {"old": old, "new": float(pure.map[-1])}
    return result


def share_of_gain(
    side: Side, order: torch.Tensor | None, maps: tuple[fc.Calibrator, ...], seed: int
) -> float:
    """Of the mAP that the whole backfill brings, how much is there at 30 %."""
    found = fc.backfill_curve(*side, order=order, seed=seed, states=11, ks=(10,), calibrators=maps)
    return float((found.map[3] - found.map[0]) / (found.map[-1] - found.map[0]))


def orders(pair: Pair, seed: int) -> dict[str, float]:
    """Half of the served queries are the log, the other half is judged."""
    served, half = pair.served, len(pair.served.query_old) // 2
    log = served.query_old[:half]
    side = Side(
        served.query_old[half:],
        served.old,
        served.query_new[half:],
        served.new,
        served.query_labels[half:],
        served.gallery_labels,
    )
    maps = judge.calibrators("odds", pair.judged, served, seed)
    old, new = judge.all_scores(side, maps)
    sign = torch.where(side.query_labels[:, None] == side.gallery_labels, 1.0, -1.0)
    # What an item changes for the better where either model ranks it high.
    near = torch.zeros_like(old)
    for table in (old, new):
        near.scatter_(1, table.topk(100, dim=1).indices, 1.0)
    oracle = (near * sign * (new.sigmoid() - old.sigmoid())).sum(0)
    found = {"random": None, "demand": fc.demand(log, served.old), "oracle": oracle}
    return {
        name: share_of_gain(side, None if x is None else x.argsort(descending=True, stable=True), maps, seed)
        for name, x in found.items()
    }


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="folder of text vectors")
    parser.add_argument("--omniglot", type=Path, help="images_background_small1.zip")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--judged", type=int, default=200, help="judged queries")
    parser.add_argument("--served", type=int, default=300)
    parser.add_argument("--measure", default="map", choices=("map", "ndcg@10"))
    parser.add_argument("--pairs", nargs="*", help="these alone")
    parser.add_argument(
        "--quick", action="store_true", help="one seed, four pairs, 100 queries of either kind"
    )
    parser.add_argument("--json", type=Path, help="keep every figure, and go on from what is there")
    given = parser.parse_args()
    names = given.pairs or [*SEEN, *UNSEEN, *TRAPS]
    if given.quick:
        given.seeds, given.judged, given.served = 1, 100, 100
        names = given.pairs or ["text:open:tfidf:minilm", "digits:half:whole", "digits:lower:whole", *TRAPS]
    kept = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    for seed in range(given.seeds):
        for name in names:
            key = f"{name} {seed}"
            if key not in kept:
                start = time.perf_counter()
                pair = build(name, seed, given.judged, given.served, given.text, given.omniglot)
                if pair is None:
                    continue
                kept[key] = every_merge(pair, seed, given.measure)
                if name.startswith("text:open"):
                    kept[key]["orders"] = orders(pair, seed)
                print(f"{key}: {time.perf_counter() - start:.0f} s", flush=True)
                if given.json:
                    given.json.write_text(json.dumps(kept))
    print(table(kept))


def table(kept: dict[str, dict]) -> str:  # type: ignore[type-arg]
    """Means over the seeds, as Markdown."""
    lines = []
    for title, figure in (
        ("mAP, mean of 7 states", "area"),
        ("nDCG@10, mean of 7 states", "ndcg"),
        ("worst state, mAP less the old system's", "worst"),
        ("worst share of queries lost", "lost"),
    ):
        lines += [
            f"\n**{title}**\n",
            "| pair | old -> new | " + " | ".join(MERGES) + " |",
            "|---" * (len(MERGES) + 2) + "|",
        ]
        for name in dict.fromkeys(key.split()[0] for key in kept):
            runs = [run for key, run in kept.items() if key.split()[0] == name]
            mean = {m: sum(run[m][figure] for run in runs) / len(runs) for m in MERGES}
            ends = " -> ".join(
                f"{sum(run['ends'][e] for run in runs) / len(runs):.3f}" for e in ("old", "new")
            )
            mark = {"seen": "", "unseen": " *", "trap": " !"}
            kind = "unseen" if name in UNSEEN else "trap" if name in TRAPS else "seen"
            lines.append(
                f"| {name}{mark[kind]} | {ends} | " + " | ".join(f"{mean[m]:.4f}" for m in MERGES) + " |"
            )
    lines.append("\n**The chosen merge less the best of raw, RRF, zscore and tail, every run**\n")
    for key, run in kept.items():
        ahead = [run["chosen"][f] - max(run[m][f] for m in PLAIN) for f in ("area", "ndcg")]
        lines.append(f"{key}: {run['chosen']['method']}, mAP {ahead[0]:+.4f}, nDCG@10 {ahead[1]:+.4f}")
    lines.append("\n**Share of the final gain at 30 % backfilled**\n")
    lines += [
        f"{key}: " + ", ".join(f"{name} {share:.0%}" for name, share in run["orders"].items())
        for key, run in kept.items()
        if "orders" in run
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
