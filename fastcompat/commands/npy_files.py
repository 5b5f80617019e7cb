"""Reading a `.npy` file that a user names, and saying what it is where it is something else."""

from __future__ import annotations

import math
import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .._arrays import NpyFile
from .terminal import shown

HEAD = 4096  # bytes that tell what a file is
SHOWN = 10  # names of what an archive holds that are listed

# How a file begins, what it is then, and the Python that makes a .npy file of it.
KINDS = (
    (b"PAR1", "a Parquet file", "numpy.save({new}, numpy.stack(pandas.read_parquet({old})['COLUMN']))"),
    (b"ARROW1", "an Arrow file", "numpy.save({new}, numpy.stack(pandas.read_feather({old})['COLUMN']))"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "numpy.save({new}, h5py.File({old})['DATASET'])"),
    (b"MATLAB 5.0", "a MATLAB file", "numpy.save({new}, scipy.io.loadmat({old})['VARIABLE'])"),
    (b"IxF", "a faiss index", "numpy.save({new}, faiss.read_index({old}).reconstruct_n())"),
)
SAFETENSORS = "numpy.save({new}, safetensors.numpy.load_file({old})['TENSOR'])"
TORCH = "numpy.save({new}, torch.load({old}, weights_only=True).numpy())"
NPZ = "numpy.save({new}, numpy.load({old})[{part}])"
JSON = "numpy.save({new}, numpy.asarray(json.load(open({old}))))"
TEXT = "numpy.save({new}, numpy.loadtxt({old}, {part}))"
RAW = "numpy.save({new}, numpy.fromfile({old}, 'float32').reshape(-1, COLUMNS))"
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LFS = b"version https://git-lfs"


def read_npy(name: str, path: Path, *, vectors: bool) -> NpyFile:
    """The array in a file, memory-mapped; ValueError, naming the option `name`, for anything else.

    `vectors` says what is looked for; only the advice depends on it.
    """
    file = f"`{shown(path)}`"
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # reading a device need not end, opening a pipe neither
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise ValueError(f"`{name}` must be a .npy file: {file} is {kind}")
        with open(path, "rb") as opened:
            head = opened.read(HEAD)
            opened.seek(0)
            if not head.startswith(np.lib.format.MAGIC_PREFIX):
                what = _described(head, opened, path, status.st_size, vectors)
                raise ValueError(f"`{name}` must be a .npy file of numbers: {file} {what}")
            _check_header(f"`{name}` must be a .npy file of numbers: {file}", opened, status.st_size)
        return NpyFile(shown(path), np.load(path, mmap_mode="r", allow_pickle=False))
    except OSError as error:
        raise ValueError(f"`{name}`: cannot read {file} ({error.strerror})") from None


def _check_header(refused: str, opened: BinaryIO, size: int) -> None:
    """What `numpy.load` would refuse with the advice to trust the file."""
    try:
        readers = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }
        shape, _, dtype = readers[np.lib.format.read_magic(opened)](opened)
    except Exception:  # whatever NumPy's parser makes of any bytes
        raise ValueError(f"{refused} has a damaged header; write it again with numpy.save") from None
    if dtype.hasobject:
        raise ValueError(
            f"{refused} holds Python objects; where it was made, stack the rows to one array: "
            "numpy.save(file, numpy.stack(rows))"
        )
    wanted = opened.tell() + math.prod(shape) * dtype.itemsize
    if size < wanted:
        raise ValueError(
            f"{refused} is cut off: {list(shape)} of {dtype} take {wanted:,} bytes, and there are {size:,}; "
            "copy it again"
        )


def _described(head: bytes, opened: BinaryIO, path: Path, size: int, vectors: bool) -> str:
    """What a file is that begins like this, and how it becomes a `.npy` file."""

    def convert(code: str, part: str = "") -> str:
        names = {"old": repr(str(path)), "new": repr(str(path.with_suffix(".npy")))}
        return f"convert it with `{code.format(**names, part=part)}`"

    if not size:
        return "is empty; write it again with numpy.save"
    if head.startswith(LFS):
        return "is a pointer of Git LFS and not the file itself; fetch it with `git lfs pull`"
    for start, program in COMPRESSED.items():
        if head.startswith(start):
            return f"is compressed by {program}; unpack it with `{program} -d`"
    for start, kind, code in KINDS:
        if head.startswith(start):
            return f"is {kind}; {convert(code)}"
    if head.startswith(b"PK\x03\x04"):
        return _described_zip(opened, convert)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickle, which may run any code when it is read; where it was made, use numpy.save"
    if head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") < size:
        return f"is a safetensors file; {convert(SAFETENSORS)}"
    try:
        text = head.decode("utf-8", "strict" if size <= HEAD else "ignore")
    except UnicodeDecodeError:
        text = "\0"
    if not all(letter.isprintable() or letter in "\r\n\t\ufeff" for letter in text):
        return f"is of no kind known here; if it is raw numbers, {convert(RAW)}"
    if text.lstrip()[:1] in ("[", "{"):
        return f"is text, JSON perhaps; {convert(JSON)}"
    return f"is text; {convert(TEXT, _columns(text, vectors))}"


def _described_zip(opened: BinaryIO, convert: Callable[..., str]) -> str:
    try:
        with zipfile.ZipFile(opened) as archive:  # only its list: nothing is unpacked
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "is a damaged zip archive; copy it again"
    if any(name.endswith("data.pkl") for name in names):
        return f"is a file of torch.save; {convert(TORCH)}"
    arrays = [shown(name.removesuffix(".npy")) for name in names if name.endswith(".npy")]
    if arrays and len(arrays) == len(names):
        listed = ", ".join(arrays[:SHOWN]) + ", ..." * (len(arrays) > SHOWN)
        return f"is an .npz archive of {listed}; {convert(NPZ, repr(arrays[0]))}"
    return "is a zip archive; unpack it"


def _columns(text: str, vectors: bool) -> str:
    """Arguments of `numpy.loadtxt` for text that begins like this."""
    first = text.lstrip("\ufeff").split("\n", 1)[0].strip()
    marks = [mark for mark in (",", ";", "\t") if mark in first]
    how = f"delimiter={marks[0]!r}" if marks else ""
    cells = first.split(marks[0] if marks else None)
    if not vectors:
        return ", ".join(filter(None, ["dtype=str", how, "ndmin=1"]))
    try:
        [float(cell) for cell in cells]
    except ValueError:  # names of the columns
        how = ", ".join(filter(None, [how, "skiprows=1"]))
    return ", ".join(filter(None, [how, "ndmin=2"]))
