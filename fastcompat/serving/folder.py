"""Tensors in a folder: `.npy` files that can be memory-mapped, and a manifest that names those that count.

A file is never changed once it is written, and the manifest is replaced in one step. So whatever happens on
the way, the folder holds the arrays of before or the new ones, all of them; what an interrupted save left
behind goes with the next one. Nothing is deleted but files that a manifest, just read, does not name.

The manifest keeps a checksum of itself, and dtype, shape and checksum of every array. Version 1 without
these, as it was first written, is read too.
"""

from __future__ import annotations

import io
import json
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, _files

MANIFEST = "manifest.json"
OURS = ".fastcompat.npy"  # how the names of the arrays' files end
VERSION = 1
_BLOCK = 1 << 24  # bytes read or written at a time
_ENTRY = {"file": str, "bfloat16": bool}
_CHECKS = {"dtype": str, "shape": list, "crc32": int}  # beside those, where the manifest keeps checksums

Manifest = dict[str, Any]
Known = dict[str, list[Manifest]]  # by folder: the states that an object may find there as its own
Contents = Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]


class _DamagedError(ValueError):
    """A file is missing or does not hold what `save` wrote."""


def save(folder: Path, form: str, contents: Contents, constant: Sequence[str], known: Known) -> None:
    """Replace what the folder holds by the arrays and values of `contents()`, called when no other save runs.

    `known` belongs to the object that is saved and is kept up here: an object that was loaded from this
    folder or saved to it is refused where someone else has saved since, and its `constant` arrays are not
    written again.
    """
    try:
        _files.make_folder(folder)
        with _files.locked(folder):
            _save(folder, form, contents, constant, known)
    except OSError as error:
        raise ValueError(
            f"`path`: cannot write to the folder `{folder}` ({_files.reason(error)}); try again, or name "
            "another one"
        ) from error


def _save(folder: Path, form: str, contents: Contents, constant: Sequence[str], known: Known) -> None:
    place = str(_files.real(folder))
    mine = known.get(place, [])
    current = _replaceable(folder, form, mine)
    arrays, values = contents()
    before = current.get("arrays", {}) if mine else {}
    made: list[str] = []
    try:
        entries = {}
        for name, array in arrays.items():
            kept = before.get(name, {}) if name in constant else {}
            reusable = "crc32" in kept and _exists(folder / kept["file"])
            entries[name] = kept if reusable else _write(folder, name, array, made)
        plain = {"format": form, "version": VERSION, **values, "arrays": entries}
        text = json.dumps(plain | {"crc32": _checksum(plain)}, indent=1)
        manifest = json.loads(text)
        pending = _files.create(folder, f"{MANIFEST}-", OURS, [text.encode()])
        made.append(pending.name)
        if mine:  # an error on the way leaves the one or the other
            known[place] = [current, manifest]
        os.replace(pending, folder / MANIFEST)
        known[place] = [manifest]
        _files.sync_folder(folder)
    finally:
        _clean(folder, form, made, everything=bool(current))


def _replaceable(folder: Path, form: str, mine: list[Manifest]) -> Manifest:
    """The manifest to be replaced, {} where there is none; ValueError if it must stay."""
    try:
        current = _manifest(folder, form)
    except _DamagedError as error:
        if mine:
            raise ValueError(f"{error}; nothing was written, save to another folder") from error
        return {}  # it opens nothing
    if current and not _is_ours(current, form):
        raise ValueError(
            f"`path`: `{folder / MANIFEST}` is of another program or another version of fastcompat, and was "
            "left as it is; name another folder"
        )
    if mine and current and current not in mine:
        raise ValueError(
            f"`path`: someone else has saved to `{folder}` since this object was loaded from it or saved to "
            "it, and nothing was written; load the folder and repeat on that what was done since, or save to "
            "another folder"
        )
    return current


def load(
    folder: Path, form: str, check: Sequence[str] | None
) -> tuple[dict[str, Tensor], dict[str, Any], Known]:
    """Arrays, values and what `save` must know of them; the arrays are memory-mapped, private copies.

    Checked are the manifest, every array's dtype, shape and length, and every byte of the arrays that `check`
    names (None: of all).
    """
    while True:
        try:
            place, manifest = str(_files.real(folder)), _manifest(folder, form)
        except OSError as error:
            raise ValueError(
                f"`path`: cannot read the file `{folder / MANIFEST}` ({_files.reason(error)})"
            ) from error
        if manifest.get("format") != form:
            says = f" (`{MANIFEST}` says {manifest.get('format')!r})" if manifest else ""
            raise ValueError(f"`path` must be a folder that `save` wrote: no {form} in `{folder}`{says}")
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"`path` must hold version {VERSION} of {form}: got {manifest.get('version')!r}; load it "
                f"with the version of fastcompat that saved it (`{folder / MANIFEST}`)"
            )
        if check is None and "crc32" not in manifest:
            raise ValueError(
                f"`path`: `{folder / MANIFEST}` keeps no checksums, as earlier versions of fastcompat left "
                "it; load it without `verify` and save it to another folder"
            )
        try:
            arrays = {}
            for name, entry in manifest["arrays"].items():
                found = _read(folder, entry)
                if "crc32" in entry and (check is None or name in check):
                    _verify(folder, entry, found)
                array = _checks.as_tensor(name, found)
                arrays[name] = array.view(torch.bfloat16) if entry["bfloat16"] else array
        except _DamagedError:
            with suppress(OSError, ValueError):
                if _manifest(folder, form) != manifest:  # it was saved again meanwhile
                    continue
            raise
        values = {k: v for k, v in manifest.items() if k not in ("format", "version", "arrays", "crc32")}
        return arrays, values, {place: [manifest]}


def _manifest(folder: Path, form: str) -> Manifest:
    """The folder's manifest, {} where there is none. Any other failure is an error.

    Raises:
        OSError: it is there and cannot be read.
        _DamagedError: it is not a JSON object, or it says it is ours and is not as `save` wrote it.
    """
    file = folder / MANIFEST
    try:
        content = _files.read_file(file)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise _DamagedError(f"`path` must be a folder that `save` wrote: {error}") from error
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise TypeError("it holds no JSON object")
        if _is_ours(found, form):
            _refuse_misshapen(found)
    except (ValueError, TypeError, RecursionError) as error:
        raise _DamagedError(
            f"`path` must be a folder that `save` wrote: `{file}` is damaged ({error})"
        ) from error
    return found


def _is_ours(manifest: Manifest, form: str) -> bool:
    return manifest.get("format") == form and manifest.get("version") == VERSION


def _refuse_misshapen(manifest: Manifest) -> None:
    wanted: dict[str, type] = dict(_ENTRY)
    if "crc32" in manifest:
        wanted |= _CHECKS
        if manifest["crc32"] != _checksum({k: v for k, v in manifest.items() if k != "crc32"}):
            raise ValueError("its checksum does not fit")
    arrays = manifest.get("arrays")
    if not isinstance(arrays, dict):
        raise TypeError("it names no arrays")
    for name, entry in arrays.items():
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != wanted:
            raise TypeError(f"it does not describe the array {name!r}")
        file = entry["file"]
        if file in ("", ".", "..") or "\0" in file or os.path.basename(file) != file:
            raise ValueError(f"the array {name!r} is in no file of this folder: {file!r}")


def _checksum(manifest: Manifest) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _read(folder: Path, entry: Manifest) -> np.ndarray[Any, Any]:
    """An array, mapped; its bytes are not read."""
    file = folder / entry["file"]
    try:
        if _files.real(file).parent != _files.real(folder):
            raise ValueError("it lies in another folder")
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        found = np.load(file, mmap_mode="c", allow_pickle=False)
        if not isinstance(found, np.memmap):
            raise ValueError("it is not a .npy file")
        if entry["bfloat16"] and found.dtype != np.int16:
            raise ValueError(f"bfloat16 is kept as int16, and it holds {found.dtype}")
        if found.offset + found.nbytes != status.st_size:
            raise ValueError(f"it has {status.st_size} bytes instead of {found.offset + found.nbytes}")
        if "crc32" in entry:
            held = (found.dtype.str, list(found.shape), found.flags.c_contiguous)
            if held != (entry["dtype"], entry["shape"], True):
                raise ValueError(f"it holds {held[0]} {held[1]} instead of {entry['dtype']} {entry['shape']}")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise _damaged(file, _files.reason(error)) from error
        raise ValueError(f"`path`: cannot read the file `{file}` ({_files.reason(error)})") from error
    except Exception as error:  # NumPy's parser raises a dozen types for a damaged header
        raise _damaged(file, str(error)) from error
    return found


def _verify(folder: Path, entry: Manifest, found: np.ndarray[Any, Any]) -> None:
    content, crc = found.reshape(-1).view(np.uint8), 0
    for first in range(0, len(content), _BLOCK):
        crc = zlib.crc32(content[first : first + _BLOCK].data, crc)
    if crc != entry["crc32"]:
        raise _damaged(folder / entry["file"], "its checksum does not fit")


def _damaged(file: Path, why: str) -> _DamagedError:
    return _DamagedError(f"`path`: the file `{file}` is missing or damaged ({why})")


def _write(folder: Path, name: str, array: Tensor, made: list[str]) -> Manifest:
    """A new file, on the disk when this returns, and its entry in the manifest."""
    plain = array.detach().cpu()
    found = (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy()
    crc = 0

    def blocks() -> Iterator[bytes]:
        nonlocal crc
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": found.dtype.str, "fortran_order": False, "shape": found.shape}
        )
        yield header.getvalue()
        rows = max(1, _BLOCK * len(found) // max(1, found.nbytes))
        for first in range(0, len(found), rows):
            block = found[first : first + rows].tobytes()  # copied: updates write to rows that do not count
            crc = zlib.crc32(block, crc)
            yield block

    made.append(_files.create(folder, f"{name}-", OURS, blocks()).name)
    entry = {"file": made[-1], "bfloat16": array.dtype == torch.bfloat16}
    return entry | {"dtype": found.dtype.str, "shape": list(found.shape), "crc32": crc}


def _exists(file: Path) -> bool:
    try:
        os.stat(file)
    except FileNotFoundError:
        return False
    return True


def _clean(folder: Path, form: str, made: list[str], *, everything: bool) -> None:
    """Delete what this save (or `everything`: any save) left that the manifest does not name.

    Nothing goes unless the manifest can be read at this moment, or is certainly not there.
    """
    with suppress(OSError, ValueError):
        named = {entry["file"] for entry in _manifest(folder, form).get("arrays", {}).values()}
        for name in os.listdir(folder) if everything else made:
            if name.endswith(OURS) and name not in named:
                with suppress(OSError):
                    os.unlink(folder / name)
