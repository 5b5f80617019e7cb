"""Work that runs as written, whatever autocast says around it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _torch_hooks


def exactly(x: Tensor) -> AbstractContextManager[None]:
    """A context in which work on the device of `x` runs as written, whatever autocast says around it."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def runs_exactly(method: Callable[..., Any]) -> Callable[..., Any]:
    """Forward or backward of an autograd function that runs as written under any autocast around it."""

    @functools.wraps(method)
    def run(ctx: Any, *arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _torch_hooks.autocast_anywhere():
            tensor = next((x for x in arguments if isinstance(x, Tensor)), None)
            with nullcontext() if tensor is None else exactly(tensor):
                return method(ctx, *arguments)
        return method(ctx, *arguments)

    return run
