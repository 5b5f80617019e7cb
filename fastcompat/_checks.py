"""Every argument error of the package: shapes, dtypes and devices, checked before any work."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import CodeType
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from . import _native, _torch_hooks
from ._arrays import as_tensor as as_tensor
from ._arrays import like_input as like_input
from ._native import DTYPES as NATIVE_DTYPES
from ._native import METRICS as METRICS
from ._native import NonFiniteError as NonFiniteError
from ._native import ScoreOverflowError as ScoreOverflowError

DTYPES = (*NATIVE_DTYPES, torch.float64)
REDUCTIONS = ("mean", "sum", "none")
BACKENDS = ("auto", "native", "reference")
_PACKAGE = __name__.partition(".")[0]


def refuse_nonfinite(error: NonFiniteError, names: Sequence[tuple[str, str]]) -> NoReturn:
    """Raise `error` again with the name the caller gave: `names[segment]` is (query's name, keys' name)."""
    name = names[error.segment][0 if error.side == "query" else 1]
    raise ValueError(
        f"`{name}` must be finite: row {error.row} holds NaN or inf; repair or remove that row first"
    ) from None


def refuse_overflow(row: int, name: str) -> NoReturn:
    """Raise under the name the caller gave to the queries: this row has scores that no number holds."""
    raise ValueError(
        f"`{name}` must have scores that float32 holds (below 3.4e38): row {row} has larger ones, whose "
        'order is not known; multiply all vectors by a small constant, or use metric="cosine"'
    ) from None


def choice(name: str, value: object, options: Sequence[str]) -> None:
    """`value` is one of `options`."""
    if not isinstance(value, str) or value not in options:
        expected = ", ".join(f'"{option}"' for option in options)
        raise ValueError(f"`{name}` must be one of {expected}: got {value!r}")


def whole(name: str, value: object) -> int:
    """`value` as a whole number: Python's or NumPy's."""
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"`{name}` must be an int: got {type(value).__name__}")
    return value  # type: ignore[return-value]


def positive_int(name: str, value: object) -> int:
    """`value` as a whole number of at least 1."""
    number = whole(name, value)
    if number < 1:
        raise ValueError(f"`{name}` must be at least 1: got {number}")
    return number


def tensor(name: str, value: object) -> Tensor:
    """`value` as a dense torch tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor: got {type(value).__name__}; convert it with torch.as_tensor"
        )
    if value.is_nested or isinstance(value, torch.masked.MaskedTensor):
        kind = "nested" if value.is_nested else "masked"
        advice = "pad it" if value.is_nested else "fill it with .to_tensor(value)"
        raise TypeError(f"`{name}` must be a plain tensor: got a {kind} tensor; {advice} first")
    if value.layout != torch.strided:
        raise TypeError(f"`{name}` must be dense: got {value.layout}; convert it with .to_dense() first")
    return value


def matrix(name: str, value: Tensor) -> None:
    """`value` is a floating point tensor with two dimensions."""
    tensor(name, value)
    if value.dim() != 2:
        raise ValueError(f"`{name}` must have 2 dimensions [rows, columns]: got shape {list(value.shape)}")
    if value.dtype not in DTYPES:
        raise TypeError(
            f"`{name}` must be float32, bfloat16, float16 or float64: got {value.dtype}; "
            f"convert it with `{name}.float()` first"
        )


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors live on one device."""
    if value.device != other.device:
        raise ValueError(
            f"`{name}` must be on the device of `{other_name}`: got {value.device} and {other.device}; "
            f"move one of them with .to() first"
        )


def columns(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both matrices have the same number of columns."""
    if value.shape[1] != other.shape[1]:
        raise ValueError(
            f"`{name}` must have as many columns as `{other_name}`: "
            f"got {value.shape[1]} and {other.shape[1]}; project one of them first"
        )


def embeddings(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Two embedding matrices that can be multiplied: columns and device agree (dtypes may differ)."""
    matrix(other_name, other)
    matrix(name, value)
    columns(name, value, other_name, other)
    same_device(name, value, other_name, other)


def pair(query: Tensor, keys: Tensor, names: tuple[str, str] = ("query", "keys")) -> None:
    """Query and keys as the engine takes them: two matrices with one width, one dtype, one device."""
    embeddings(names[1], keys, names[0], query)
    if query.dtype != keys.dtype:
        raise TypeError(
            f"`{names[1]}` must have the dtype of `{names[0]}`: got {keys.dtype} and {query.dtype}; "
            f"convert one of them with .to() first"
        )


def rows(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors have the same number of rows."""
    if value.shape[0] != other.shape[0]:
        raise ValueError(
            f"`{name}` must have one entry per row of `{other_name}`: "
            f"got {value.shape[0]} and {other.shape[0]}"
        )


def indices(
    name: str,
    value: Tensor | None,
    other_name: str,
    other: Tensor,
    dims: int = 1,
    *,
    optional: bool = False,
) -> None:
    """Labels or ids: int64, one entry (with `dims=2`: one row of entries) per row of `other`."""
    if value is None and optional:
        return
    value = tensor(name, value)
    if value.dtype != torch.int64:
        raise TypeError(f"`{name}` must be int64: got {value.dtype}; convert it with `{name}.long()` first")
    if value.dim() != dims:
        raise ValueError(
            f"`{name}` must have {dims} dimension{'s' * (dims > 1)}: got shape {list(value.shape)}"
        )
    rows(name, value, other_name, other)
    same_device(name, value, other_name, other)


def labels(query: Tensor, keys: Tensor, query_labels: Tensor | None, key_labels: Tensor | None) -> None:
    """Labels of both sides, or of neither."""
    indices("query_labels", query_labels, "query", query, optional=True)
    indices("key_labels", key_labels, "keys", keys, optional=True)
    if (query_labels is None) != (key_labels is None):
        given, missing = ("key", "query") if query_labels is None else ("query", "key")
        raise ValueError(
            f"`{missing}_labels` must be given with `{given}_labels`: got None; pass both or neither"
        )


def bias(value: Tensor | None, keys: Tensor, names: tuple[str, str] = ("bias", "keys")) -> None:
    """One float32 number per key (float64 beside float64 keys)."""
    if value is None:
        return
    name, other = names
    tensor(name, value)
    expected = torch.float64 if keys.dtype == torch.float64 else torch.float32
    if value.dtype not in (torch.float32, expected):
        raise TypeError(
            f"`{name}` must be {expected}: got {value.dtype}; convert it with .to({expected}) first"
        )
    if value.dim() != 1:
        raise ValueError(f"`{name}` must have 1 dimension: got shape {list(value.shape)}")
    rows(name, value, other, keys)
    same_device(name, value, other, keys)


def scalar(name: str, value: object, other_name: str, other: Tensor) -> float | Tensor:
    """A float, or a 0-dim floating point tensor on the CPU or on the device of `other`."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.dtype.is_floating_point:
            raise ValueError(
                f"`{name}` must be a float or a 0-dim floating point tensor: got shape {list(value.shape)}, "
                f"{value.dtype}"
            )
        if value.device.type != "cpu":
            same_device(name, value, other_name, other)
        return savable(value)
    if isinstance(value, (np.floating, np.integer)):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"`{name}` must be a float or a 0-dim tensor: got {type(value).__name__}")
    return value  # type: ignore[return-value]


def use_native(backend: str, query: Tensor) -> bool:
    """Whether the native kernels run this call; "native" raises where they do not cover it."""
    choice("backend", backend, BACKENDS)
    if backend == "reference":
        return False
    if query.is_meta and backend == "auto":
        raise ValueError(
            "the device meta holds shapes and no values, which no kernel can read; call the function with "
            'backend="reference" to get the shapes of its results'
        )
    if query.dtype not in NATIVE_DTYPES:
        why = f"{query.dtype}"
    elif reason := _native.not_covered(query.device):
        why = f"the device {query.device} ({reason})"
        if backend == "auto" and query.is_cuda and eager():
            warnings.warn(f"fastcompat runs its plain PyTorch reference: no kernels for {why}", stacklevel=3)
    else:
        return True
    if backend == "native":
        raise ValueError(f'`backend="native"` does not cover {why}; use "auto" or "reference"')
    return False


def no_kernel(backend: str, function: str) -> None:
    """`backend` of a function that is plain PyTorch on every device."""
    choice("backend", backend, BACKENDS)
    if backend == "native":
        raise ValueError(f'`backend="native"` does not cover {function}, which is plain PyTorch; use "auto"')


def eager() -> bool:
    """Whether this runs outside torch.compile and torch.func, so that a value may decide what happens."""
    return not torch.compiler.is_compiling() and not _torch_hooks.func_active()


def values_readable(value: Tensor, wait: bool = False) -> bool:
    """Whether Python may look at this tensor's values: without a synchronisation, or `wait`ing for a GPU."""
    if type(value) not in _PLAIN or not eager():
        return False
    if value.is_cpu:
        return True
    return wait and not value.is_meta and not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def savable(value: Tensor) -> Tensor:
    """`value`, or a copy of one made in inference mode, which torch's autograd refuses to save."""
    if eager() and value.is_inference() and torch.is_grad_enabled():
        return value.clone()
    return value


_PLAIN = (Tensor, torch.nn.Parameter)
_warned: set[tuple[str, CodeType]] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn of `kind` at the line that called the package, once for each public function."""
    frame, depth, function = sys._getframe(1), 2, sys._getframe(1).f_code
    while frame.f_back is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in (_PACKAGE, "torch"):
            break
        if package == _PACKAGE:
            function = frame.f_code
        frame, depth = frame.f_back, depth + 1
    if (kind, function) not in _warned:
        _warned.add((kind, function))
        warnings.warn(message, stacklevel=depth)


def warn_negative_labels(name: str, labels: Tensor) -> None:
    """Warn once where labels look like hashes: a negative label equals no label, itself included."""
    if values_readable(labels) and labels.numel() and (low := _native.lowest(labels)) < -1:
        warn_once(
            "negative labels",
            f"`{name}` holds negative labels other than -1, such as {low}, and a negative label equals no "
            "label: if they are classes, number the classes of all sides together (numpy.unique(labels, "
            "return_inverse=True)[1]); if they mark rows without a class, write -1",
        )


def in_range(name: str, value: Tensor | None, size: int, *, none: bool = True, wait: bool = False) -> None:
    """Every entry is a row number below `size` or, with `none`, -1.

    Checked where `values_readable`; with `wait` also on a GPU, for functions that wait for it anyway.
    """
    if value is None or value.numel() == 0 or not values_readable(value, wait):
        return
    low, high = torch.stack(torch.aminmax(value)).tolist()
    lowest = -1 if none else 0
    if low < lowest or high >= size:
        raise ValueError(
            f"`{name}` must hold {'-1 (none) or ' * none}row numbers below {size}: "
            f"got {low if low < lowest else high}"
        )


def no_transforms(*, forward_mode: bool = True) -> None:
    """Refuse torch.func transforms and forward-mode derivatives, which the native kernels do not know."""
    if torch.compiler.is_compiling():
        return
    if not eager() or (forward_mode and _torch_hooks.forward_mode()):
        raise RuntimeError(
            "fastcompat's native kernels do not run under torch.func transforms or forward-mode "
            'differentiation; call the function with backend="reference"'
        )
