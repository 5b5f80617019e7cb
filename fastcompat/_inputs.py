"""Vectors, labels, row numbers, ids and masks out of what users pass in: one adapter for every function.

Tensors, NumPy arrays, lists, columns of data frames and `.npy` files become the tensors that the engine
takes. Ambiguous input is refused, with advice in terms of the library that it came from. What is not a tensor
has no device of its own and follows the tensors beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import _checks
from ._arrays import NpyFile, came, is_text, read, to_tensor

COUNT = "number the classes of all sides together: numpy.unique(labels, return_inverse=True)[1]"
NUMBERING = {
    "labels": COUNT,
    "rows": "rows are numbered from 0, and -1 means none",
    "ids": "give each item a whole number of int64, and -1 to none",
}


def vectors(name: str, value: Any) -> Tensor:
    """Floating point numbers of any shape. Python's own numbers become float32, as in `torch.tensor`."""
    found = read(name, value, python=np.float32)
    if is_text(found):
        raise TypeError(f"`{name}` must hold numbers: {came(value, 'strings')}; embed them first")
    x = to_tensor(name, value, found)
    if x.dtype not in _checks.DTYPES:
        expected = "hold floating point numbers" if isinstance(value, NpyFile) else _BE_FLOATS
        advice = f"; convert it with `{_conversion(name, value, 'float32')}` first"
        raise TypeError(
            f"`{name}` must {expected}: {came(value, found.dtype)}{advice * (not x.dtype.is_complex)}"
        )
    return x


_BE_FLOATS = "be float32, bfloat16, float16 or float64"


def matrix(name: str, value: Any) -> Tensor:
    """Vectors [rows, columns]."""
    x = vectors(name, value)
    if x.dim() == 2:
        return x
    if isinstance(value, NpyFile):
        raise ValueError(f"`{name}` must have the shape [rows, columns]: {came(value, list(x.shape))}")
    advice = ""
    if x.dim() == 1 and isinstance(value, (list, tuple)):
        advice = f"; for one row write `[{name}]`" if len(value) else "; write `numpy.zeros((0, columns))`"
    elif x.dim() == 1:
        own = isinstance(value, (Tensor, np.ndarray))
        advice = f"; for one row write `{name if own else f'numpy.asarray({name})'}[None]`"
    raise ValueError(f"`{name}` must have 2 dimensions [rows, columns]: got shape {list(x.shape)}{advice}")


def queries(name: str, value: Any) -> tuple[Tensor, bool]:
    """Queries [B, D], and whether a single vector [D] came."""
    x = vectors(name, value)
    single = x.dim() == 1 and x.numel() > 0
    return (x[None], True) if single else (matrix(name, value), False)


def pair(
    names: tuple[str, str], query: Any, keys: Any, *, single: bool = False
) -> tuple[Tensor, Tensor, bool]:
    """Query and keys of one width on one device, and whether one vector [D] came (refused unless `single`).

    The query is in the wider of the two dtypes; the keys may be narrower.
    """
    q, one = queries(names[0], query) if single else (matrix(names[0], query), False)
    k = matrix(names[1], keys)
    q, k = beside(q, query, k), beside(k, keys, q)
    _checks.embeddings(names[1], k, names[0], q)
    wide = torch.promote_types(q.dtype, k.dtype)
    return q.to(wide), k, one


def beside(x: Tensor, value: Any, like: Tensor) -> Tensor:
    """What was given as anything but a tensor, on the device of `like`."""
    return x if isinstance(value, Tensor) else x.to(like.device)


def rows(name: str, value: Any, of: tuple[str, Tensor] | None, kind: str = "rows") -> Tensor:
    """Row numbers (-1: none), or another `kind`: int64 [M], one per row of `of` if that is given."""
    x: Tensor = _shaped(name, value, whole(name, value, kind), 1)
    return x if of is None else _fitting(name, value, x, of)


def row_table(name: str, value: Any, of: tuple[str, Tensor], single: bool) -> Tensor:
    """Row numbers, or -1 for none: int64, a row of them per row of `of`; [P] for a `single` query vector."""
    x = _shaped(name, value, whole(name, value, "rows"), 1 if single else 2)
    return _fitting(name, value, x[None] if single else x, of)


def labels(
    names: Sequence[str],
    values: Sequence[Any],
    of: Sequence[tuple[str, Tensor]],
    *,
    needed: bool = False,
) -> list[Any]:
    """Class labels int64 [N] of several sides; strings are numbered over all sides together.

    None on every side gives them back, unless labels are `needed`.
    """
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if len(missing) == len(names) and not needed:
        return [None for _ in names]
    if missing and len(missing) < len(names):
        given = next(name for name in names if name not in missing)
        raise ValueError(f"`{missing[0]}` must be given with `{given}`: got None; pass both or neither")
    found = [read(name, value) for name, value in zip(names, values, strict=True)]
    text = [is_text(array) for array in found]
    if any(text):
        if not all(text):
            odd, other = text.index(False), names[text.index(True)]
            held = came(values[odd], found[odd].dtype)
            raise TypeError(f"`{names[odd]}` must hold strings as `{other}` does: {held}; {COUNT}")
        sides = [_shaped(*side, 1) for side in zip(names, values, found, strict=True)]
        numbers = np.unique(np.concatenate(sides), return_inverse=True)[1].astype(np.int64)
        tensors = torch.split(torch.from_numpy(numbers), [len(side) for side in sides])
    else:
        pairs = zip(names, values, strict=True)
        tensors = tuple(_shaped(name, value, whole(name, value, "labels"), 1) for name, value in pairs)
    checked = [_fitting(*side) for side in zip(names, values, tensors, of, strict=True)]
    for name, side in zip(names, checked, strict=True):
        _checks.warn_negative_labels(name, side)
    return checked


def flags(name: str, value: Any, of: tuple[str, Tensor]) -> Tensor:
    """A mask: bool, one entry per row of `of`."""
    found = read(name, value)
    if is_text(found):
        held = came(value, "strings")
        raise TypeError(f"`{name}` must be bool: {held}; compare them with the one that stands for True")
    mask = to_tensor(name, value, found)
    if mask.dtype == torch.bool:
        return _fitting(name, value, _shaped(name, value, mask, 1), of)
    plain = isinstance(value, (list, tuple)) or _package(value) == "pyarrow"
    raise TypeError(
        f"`{name}` must be bool: {came(value, found.dtype)}; "
        f"write `{f'numpy.asarray({name})' if plain else name} != 0`"
    )


def _fitting(name: str, value: Any, x: Tensor, of: tuple[str, Tensor]) -> Tensor:
    x = beside(x, value, of[1])
    _checks.rows(name, x, *of)
    _checks.same_device(name, x, *of)
    return x


def whole(name: str, value: Any, kind: str) -> Tensor:
    """Whole numbers of any dtype, as int64."""
    array = read(name, value)
    must = f"`{name}` must hold whole numbers"
    if is_text(array):
        raise TypeError(f"{must}: {came(value, 'strings')}; {NUMBERING[kind]}")
    x = to_tensor(name, value, array)
    if x.numel() == 0 and not isinstance(value, Tensor):
        return x.to(torch.int64)  # an empty list has no dtype of its own
    if x.dtype.is_complex or (x.dtype == torch.bool and kind != "labels"):
        raise TypeError(f"{must}: {came(value, array.dtype)}; {NUMBERING[kind]}")
    if x.dtype == torch.uint64:
        x = x.view(torch.int64)
        if (at := _first(x < 0)) is not None:
            held = came(value, int(x.reshape(-1)[at]) + 2**64)
            advice = NUMBERING[kind] + _bits(name, value, kind)
            raise ValueError(f"`{name}` must be below 2^63: {held}; {advice}")
    if x.dtype.is_floating_point:
        most = int(2 / torch.finfo(x.dtype).eps)  # from here on the dtype leaves whole numbers out
        if (at := _first(x != x.trunc())) is not None:  # NaN among them
            raise TypeError(f"{must}: {came(value, f'{float(x.reshape(-1)[at]):g}')}; {NUMBERING[kind]}")
        if (at := _first(x.abs() > most)) is not None:
            held = came(value, f"{float(x.reshape(-1)[at]):.0f}")
            raise TypeError(
                f"{must} of at most {most}, beyond which {array.dtype} has not all of them: {held}"
            )
    return x.to(torch.int64)


def _first(bad: Tensor) -> int | None:
    """Where the first True is, in row-major order."""
    found = bad.reshape(-1).nonzero()
    return int(found[0]) if len(found) else None


def _shaped(name: str, value: Any, x: Any, dims: int) -> Any:
    """Where one dimension is asked for, a column [N, 1] and a single number will do."""
    if x.ndim == dims:
        return x
    if dims == 1 and (x.ndim == 0 or (x.ndim == 2 and x.shape[1] == 1)):
        return x.reshape(-1)
    if isinstance(value, NpyFile):
        raise ValueError(f"`{name}` must have the shape [rows]: {came(value, list(x.shape))}")
    raise ValueError(f"`{name}` must have {dims} dimension{'s' * (dims > 1)}: got shape {list(x.shape)}")


def _bits(name: str, value: Any, kind: str) -> str:
    """How hashes stay apart as int64."""
    if kind != "ids":
        return ""
    if isinstance(value, Tensor):
        view = f"{name}.view(torch.int64)"
    else:
        array = name if isinstance(value, np.ndarray) else f'numpy.asarray({name}, dtype="uint64")'
        view = f'{array}.view("int64")'
    return f"; `{view}` keeps all but 2^64 - 1 apart"


def _conversion(name: str, value: Any, dtype: str) -> str:
    """How the given value becomes `dtype`, in the terms of its own library."""
    if isinstance(value, NpyFile):
        return f'numpy.save({value.path!r}, numpy.load({value.path!r}).astype("{dtype}"))'
    if isinstance(value, Tensor):
        return f"{name}.to(torch.{dtype})"
    if _package(value) == "polars":
        return f"{name}.cast(polars.{dtype.capitalize()})"
    if hasattr(value, "astype"):
        return f'{name}.astype("{dtype}")'
    return f'numpy.asarray({name}, dtype="{dtype}")'


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]
