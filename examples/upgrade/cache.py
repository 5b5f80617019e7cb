"""Stages of a long computation, each kept in a file until something it depends on changes."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Stage:
    """What a stage made, the CPU seconds it took, and the key that later stages depend on."""

    key: str
    value: Any
    seconds: float


class Cache:
    """`stage` computes or recalls; files appear complete or not at all, so an interruption costs one stage.

    Args:
        folder: where the files go; made if missing.
        inputs: what every stage depends on (the data, the seed): anything JSON can hold.
    """

    def __init__(self, folder: Path, inputs: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.inputs = folder, inputs

    def stage(
        self, name: str, make: Callable[[], Any], *, settings: Any, after: tuple[Stage, ...] = ()
    ) -> Stage:
        """The value of `make()`, from the file if it was made with the same settings and earlier stages."""
        text = json.dumps([self.inputs, name, settings, [stage.key for stage in after]], sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()
        path = self.folder / f"{name}.pt"
        if path.exists():
            held = torch.load(path, weights_only=True)
            if held["key"] == key:
                return Stage(**held)
        start = time.process_time()
        value = make()
        made = {"key": key, "value": value, "seconds": time.process_time() - start}
        pending = path.with_suffix(".part")
        with pending.open("wb") as file:
            torch.save(made, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(pending, path)
        return Stage(**made)
