"""Every method of the package through one model upgrade, on characters that no model was trained on.

    python examples/upgrade_omniglot.py --data images_background_small1.zip --out upgrade

trains an old model, new models with every compatible loss, and transforms on top of the independent pair;
walks each through the backfill in random and in uncertainty order; and writes `results.json`, `results.md`
and `results.png`. It can be interrupted: what is in the folder is not made again, unless a setting changed.
`--data` takes a folder or zip of images with one sub-folder per class (Omniglot), or `digits`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from upgrade import render, settings
from upgrade.run import run

from fastcompat._files import write_file
from fastcompat.demo import load


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="`digits`, or a folder or a zip")
    parser.add_argument("--out", type=Path, default=Path("upgrade"), help="folder for stages and results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, a fifth of the training: a smoke test"
    )
    parser.add_argument("--validation", action="store_true", help="judge on a part of the training classes")
    chosen = parser.parse_args()
    if chosen.seeds < 1:
        parser.error(f"`--seeds` must be at least 1: got {chosen.seeds}")
    try:
        data = load(chosen.data)
    except ValueError as error:
        parser.error(str(error))

    options = settings.DIGITS if chosen.data == "digits" else settings.CHARACTERS
    if chosen.quick:
        options = settings.quick(options)
    with torch.random.fork_rng(devices=[]):
        found = run(data, options, 1 if chosen.quick else chosen.seeds, chosen.out, chosen.validation)
    spent = sum(sum(seed.pop("cpu_seconds").values()) for seed in found["seeds"])
    results = chosen.out / "results.json"
    write_file(results, json.dumps(found).encode())
    tables, picture = render.write(results)
    print(tables.read_text())
    print(f"{spent / 60:.1f} CPU minutes. Written: {results}, {tables}, {picture}")


if __name__ == "__main__":
    main()
