"""Tensors in a folder: `.npy` files that can be memory-mapped, and a manifest that names those that count.

A file is never changed once it is written, and the manifest is replaced in one step. So whatever happens on
the way, the folder holds the arrays of before or the new ones, all of them; what an interrupted save left
behind goes with the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks

MANIFEST = "manifest.json"
OURS = ".fastcompat.npy"  # how the names of the arrays' files end
VERSION = 1


def save(
    folder: Path,
    form: str,
    arrays: Mapping[str, Tensor],
    values: Mapping[str, Any],
    written: Mapping[str, str],
) -> dict[str, str]:
    """Replace what the folder holds by these arrays and values; returns the name of each array's file.

    `written` says which file holds an array already; it is written again only where that file is not.
    """
    files: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as handle:
            before = _files(_manifest(folder))
            for name, array in arrays.items():
                files[name] = written.get(name, "")
                if files[name] not in before:
                    files[name] = _write(folder, name, array)
            entries = {
                name: {"file": files[name], "bfloat16": array.dtype == torch.bfloat16}
                for name, array in arrays.items()
            }
            manifest = {"format": form, "version": VERSION, **values, "arrays": entries}
            os.replace(folder / _write(folder, MANIFEST, manifest), folder / MANIFEST)
            os.fsync(handle)  # before the files of the old manifest go
    except OSError as error:
        raise ValueError(
            f"`path`: cannot write to the folder `{folder}` ({error.strerror}); name another one"
        ) from error
    return files


def load(folder: Path, form: str) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Arrays, values and files that `save` wrote; the arrays are memory-mapped, private copies."""
    manifest = _manifest(folder)
    if manifest.get("format") != form:
        raise ValueError(f"`path` must be a folder that `save` wrote: no {form} in `{folder}`")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"`path` must hold version {VERSION} of {form}: got {manifest.get('version')!r}; "
            "load it with the version of fastcompat that saved it"
        )
    arrays: dict[str, Tensor] = {}
    for name, entry in manifest["arrays"].items():
        file = folder / entry["file"]
        try:
            found = np.load(file, mmap_mode="c", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if _manifest(folder) != manifest:  # it was saved again meanwhile
                return load(folder, form)
            raise ValueError(f"`path`: the file `{file}` is missing or damaged ({error})") from error
        array = _checks.as_tensor(name, found)
        arrays[name] = array.view(torch.bfloat16) if entry["bfloat16"] else array
    values = {key: value for key, value in manifest.items() if key not in ("format", "version", "arrays")}
    return arrays, values, {name: entry["file"] for name, entry in manifest["arrays"].items()}


def _manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest; empty where there is none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _files(manifest: Mapping[str, Any]) -> set[str]:
    return {entry["file"] for entry in manifest.get("arrays", {}).values()}


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """Hold the folder against other saves, and leave only files in it that the manifest names."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield handle
        finally:
            named = _files(_manifest(folder))
            for file in folder.glob(f"*{OURS}"):
                if file.name not in named:
                    file.unlink(missing_ok=True)
    finally:
        os.close(handle)  # which gives the lock back


def _write(folder: Path, name: str, content: Tensor | dict[str, Any]) -> str:
    """A new file, on the disk when this returns and readable for all whom the folder lets in; its name."""
    handle, path = tempfile.mkstemp(prefix=f"{name}-", suffix=OURS, dir=folder)
    with os.fdopen(handle, "wb") as file:
        if isinstance(content, dict):
            file.write(json.dumps(content, indent=1).encode())
        else:
            plain = content.detach().cpu()
            np.save(file, (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy())
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())
    return Path(path).name
