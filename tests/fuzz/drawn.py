"""Strategies that all fuzzers share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastcompat import _native

LEVELS = st.sampled_from(_native.simd_levels())
THREADS = st.sampled_from([1, 2, 3, 7])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "padded rows", "every second row", "transposed", "offset by one"])
SEEDS = st.integers(0, 2**32 - 1)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers elsewhere in memory; what lies between them is NaN."""
    rows, columns = x.shape
    if layout == "padded rows":
        out = x.new_full((rows, columns + 3), torch.nan)[:, :columns]
    elif layout == "every second row":
        out = x.new_full((2 * rows, columns), torch.nan)[::2]
    elif layout == "transposed":
        out = x.new_full((columns, rows), torch.nan).T
    elif layout == "offset by one":
        out = x.new_full((rows * columns + 1,), torch.nan)[1:].view(rows, columns)
    else:
        out = torch.empty_like(x)
    out.copy_(x)
    return out
