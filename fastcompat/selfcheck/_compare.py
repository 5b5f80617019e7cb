"""How far a result may be from the truth, and how a kernel is called on another device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

# Largest error relative to the largest value; the inputs' own rounding is not part of it. Results in 16 bits
# are rounded once, by 2^-9 (bfloat16) or 2^-12 (float16) of themselves, as are bfloat16's weights of a sum.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def on(device: torch.device, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """What the kernel returns on `device`, brought back."""
    there = tree_map_only(Tensor, lambda x: x.to(device), arguments)
    return tree_map_only(Tensor, Tensor.cpu, kernel(*there))


def far(found: Tensor, truth: Tensor, tolerance: float) -> str:
    """What is wrong with `found`, or nothing: infinities must be where they belong, and NaN nowhere."""
    found, truth = found.double(), truth.double()
    if found.shape != truth.shape:
        return f"shape {list(found.shape)} instead of {list(truth.shape)}"
    if not found.numel():
        return ""
    if found.isnan().any():
        return "NaN from finite numbers"
    finite = truth.isfinite()
    if not torch.equal(found[~finite], truth[~finite]) or not found[finite].isfinite().all():
        return "infinities out of place"
    if not finite.any():
        return ""
    error = ((found - truth)[finite].abs().max() / truth[finite].abs().max().clamp_min(1e-30)).item()
    return "" if error <= tolerance else f"relative error {error:.1e}"
