"""A run's result in a file: who measured with what, then one case a line.

`rounds` of a side are its seconds per call, round by round; `speeds` what the machine gave before each round.
Times and rates are kept to eight digits.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

Case = dict[str, Any]
Run = dict[str, Any]
DIGITS = 8


def write(path: Path, run: Run) -> None:
    """Write a run: `date`, `commit`, `machine` and `cases`."""
    head = [f"{json.dumps(key)}: {json.dumps(run[key])}" for key in ("date", "commit", "machine")]
    cases = ",\n".join(json.dumps(_rounded(case)) for case in run["cases"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ",\n".join([*head, f'"cases": [\n{cases}\n]']) + "}\n")


def read(path: Path) -> Run:
    """Return a run; each side also has the `median` of its rounds."""
    run: Run = json.loads(path.read_text())
    for case in run["cases"]:
        for side in case["sides"].values():
            side["median"] = median(side["rounds"])
    return run


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return [_rounded(part) for part in value] if isinstance(value, (list, tuple)) else value
