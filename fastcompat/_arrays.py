"""Anything that holds an array, as a tensor or a plain NumPy array: no dtype is judged here.

Columns of data frames and other libraries' arrays are read through the protocols that they offer, so none of
those libraries is needed. Rows count by position; the index of a data frame is ignored.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Numpy = np.ndarray[Any, Any]
TEXT = "SUT"  # the kinds of NumPy's string dtypes


@dataclass(frozen=True)
class NpyFile:
    """An array that came out of a `.npy` file."""

    path: str
    array: Numpy


def came(value: Any, what: object) -> str:
    """What came, for an error message."""
    return f"`{value.path}` holds {what}" if isinstance(value, NpyFile) else f"got {what}"


def read(name: str, value: Any, python: type | None = None) -> Tensor | Numpy:
    """A dense tensor, or a NumPy array of numbers or strings in this machine's byte order.

    `python` is the dtype of Python's own numbers (None: NumPy's choice).
    """
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"`{name}` must be dense: got {value.layout}; convert it with .to_dense() first")
        return value
    if isinstance(value, (list, tuple)):
        return _of_entries(name, value, python)
    array = value.array if isinstance(value, NpyFile) else value
    if isinstance(value, (bool, int, float, str, bytes, np.generic)):
        array = np.asarray(value)
    elif not isinstance(array, np.ndarray):
        array = _of_protocol(name, value)
    if isinstance(array, Tensor):
        return array
    if isinstance(array, np.ma.MaskedArray):
        if masked := int(np.ma.getmaskarray(array).sum()):  # type: ignore[no-untyped-call,unused-ignore]
            raise ValueError(
                f"`{name}` must have no masked entries: got {masked}; fill them (`{name}.filled(0)`), or "
                f"leave their rows out"
            )
        array = array.data
    if array.dtype == object:
        return _of_entries(name, array.tolist(), python) if array.ndim else _of_protocol(name, array.item())
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def as_tensor(name: str, value: Any) -> Tensor:
    """Numbers of any dtype and shape, over the same memory where that can be."""
    return to_tensor(name, value, read(name, value))


def like_input(result: tuple[Tensor, ...], given: object) -> Any:
    """`result` as it is if `given` is a tensor, else as NumPy arrays."""
    return result if isinstance(given, Tensor) else tuple(part.cpu().numpy() for part in result)


def is_text(array: Tensor | Numpy) -> bool:
    """Whether these are strings."""
    return isinstance(array, np.ndarray) and array.dtype.kind in TEXT


def to_tensor(name: str, value: Any, array: Tensor | Numpy) -> Tensor:
    """What `read` made of `value` as a tensor, over the same memory."""
    if isinstance(array, Tensor):
        return array
    if array.dtype.name == "bfloat16":  # of the package ml_dtypes, which JAX uses
        return to_tensor(name, value, array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.char == "g":
        raise TypeError(
            f'`{name}` must be float64 or less: got {array.dtype}; write `{name}.astype("float64")`'
        )
    if any(step < 0 or step % array.itemsize for step in array.strides):
        array = np.ascontiguousarray(array)  # torch refuses such arrays
    with ExitStack() as stack:
        if not array.flags.writeable:
            # A memory-mapped gallery is read-only; nothing here writes to it.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message=".*not writable.*")
        try:
            return torch.from_numpy(array)
        except TypeError:
            raise TypeError(f"`{name}` must hold numbers: {came(value, array.dtype)}") from None


def _of_entries(name: str, entries: Sequence[Any], python: type | None) -> Tensor | Numpy:
    """A list of numbers, of strings, of rows, or of tensors; also what an array of objects holds."""
    texts = sum(isinstance(entry, (str, bytes)) for entry in entries)
    for row, entry in enumerate(entries):
        if entry is None or type(entry).__name__ in ("NAType", "NaTType") or (texts and entry != entry):
            raise ValueError(f"`{name}` must have no missing entries: row {row} is {entry!r}; leave it out")
        if texts and not isinstance(entry, type(entries[0])):
            held = f"row {row} is {type(entry).__name__} and row 0 {type(entries[0]).__name__}"
            raise TypeError(f"`{name}` must hold strings or numbers, not both: {held}")
    if entries and all(isinstance(entry, Tensor) for entry in entries):
        if len({(entry.shape, entry.device) for entry in entries}) == 1:
            return torch.stack(tuple(entries))
    elif entries and any(isinstance(entry, Tensor) for entry in entries):
        raise TypeError(f"`{name}` must hold only tensors or no tensors: got both")
    else:
        try:
            array = np.asarray(entries)
        except ValueError:
            pass
        else:
            first: Any = entries
            while isinstance(first, (list, tuple)) and first:
                first = first[0]
            if type(first) is int and array.dtype.kind in "Of" and not python:
                return _of_large(name, entries, array)
            if array.dtype == object:
                held = next(iter(array.flat))
                raise TypeError(
                    f"`{name}` must hold numbers: it holds {type(held).__name__}, such as {held!r:.40}"
                )
            return array.astype(python) if python and type(first) in (int, float) else array
    lengths = [len(entry) if hasattr(entry, "__len__") else 0 for entry in entries]
    row = next((i for i, length in enumerate(lengths) if length != lengths[0]), 0)
    raise ValueError(
        f"`{name}` must have rows of one length: row {row} has {lengths[row]}, row 0 has {lengths[0]}"
    )


def _of_large(name: str, entries: Sequence[Any], array: Numpy) -> Numpy:
    """Python ints beyond int64, as uint64; `array` if some entries are not ints."""
    exact = np.array(entries, dtype=object)
    if not all(type(number) is int for number in exact.flat):
        return array
    try:
        return exact.astype(np.uint64)
    except OverflowError:
        raise ValueError(f"`{name}` must fit int64: got {max(exact.flat, key=abs)}") from None


def _of_protocol(name: str, value: Any) -> Tensor | Numpy:
    """Pandas, polars, Arrow, JAX, CuPy...: whatever offers one of these ways to an array."""
    ways: dict[str, Callable[[Any], Tensor | Numpy]] = {
        "__array__": np.asarray,
        "__dlpack__": torch.utils.dlpack.from_dlpack,
        "__arrow_c_array__": _of_arrow,
    }
    for way, convert in ways.items():
        if hasattr(value, way) and not isinstance(value, type):
            try:
                return convert(value)
            except (TypeError, ValueError, RuntimeError, ImportError, BufferError):
                continue
    if hasattr(value, "toarray"):
        advice = f"; it is sparse: write `{name}.toarray()`"
    elif hasattr(value, "__iter__") and not hasattr(value, "__getitem__"):
        advice = f"; write `list({name})`"
    else:
        advice = ""
    raise TypeError(
        f"`{name}` must be a tensor, an array, a list or a column of a data frame: "
        f"got {type(value).__name__}{advice}"
    )


def _of_arrow(value: Any) -> Numpy:
    import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return np.asarray(pyarrow.array(value))
