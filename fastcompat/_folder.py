"""Tensors in a folder: `.npy` files that can be memory-mapped, and a manifest that names those that count.

A file is never changed once it is written, and the manifest is replaced in one step. So whatever happens on
the way, the folder holds the arrays of before or the new ones, all of them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks

MANIFEST = "manifest.json"
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
    fresh: set[str] = set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = _files(_manifest(folder))
        for name, array in arrays.items():
            files[name] = written.get(name, "")
            if files[name] not in before:
                files[name] = _write(folder, f"{name}-", ".npy", array, fresh)
        entries = {
            name: {"file": files[name], "bfloat16": array.dtype == torch.bfloat16}
            for name, array in arrays.items()
        }
        manifest = {"format": form, "version": VERSION, **values, "arrays": entries}
        temporary = _write(folder, ".manifest-", "", json.dumps(manifest, indent=1).encode(), fresh)
        os.replace(folder / temporary, folder / MANIFEST)
        _settle(folder)  # before the files of the old manifest go
        for gone in before - _files(manifest):
            (folder / gone).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"`path`: cannot write to the folder `{folder}` ({error.strerror}); name another one"
        ) from error
    finally:
        for unused in fresh - _files(_manifest(folder)):
            (folder / unused).unlink(missing_ok=True)
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


def _settle(folder: Path) -> None:
    """Wait until the names in the folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write(folder: Path, prefix: str, suffix: str, content: Tensor | bytes, fresh: set[str]) -> str:
    """A new file, on the disk when this returns and readable for all whom the folder lets in; its name."""
    handle, path = tempfile.mkstemp(prefix=prefix, suffix=suffix, dir=folder)
    name = Path(path).name
    fresh.add(name)
    with os.fdopen(handle, "wb") as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            plain = content.detach().cpu()
            np.save(file, (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy())
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        os.fsync(file.fileno())
    return name
