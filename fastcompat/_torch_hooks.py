"""Everything the package asks torch through names that torch does not promise to keep.

Where a name is missing, a fallback answers on the safe side: results stay right, at some cost in time or in
the wording of an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def _hook(path: str, fallback: Any) -> Any:
    """`torch.<path>`, or `fallback` where this torch has no such name."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
        if found is None:
            return fallback
    return found


# Whether the backward pass that runs now may run again. Fallback: yes, so saved gradients stay as they are.
keeps_graph: Callable[[], bool] = _hook(
    "_C._autograd._get_current_graph_task_keep_graph",
    lambda: True,
)

# Whether a torch.func transform is active. Fallback: no; torch then refuses the autograd functions itself.
func_active: Callable[[], bool] = _hook("_C._are_functorch_transforms_active", lambda: False)

# Whether `is_grads_batched` stacked several gradients in this tensor. Fallback: yes, so no value is read.
stacked: Callable[[Tensor], bool] = _hook("_C._functorch.is_legacy_batchedtensor", lambda _: True)

# Whether autocast is on for any device. Fallback: yes, so that it is looked up for the device in question.
autocast_anywhere: Callable[[], bool] = _hook("_C._is_any_autocast_enabled", lambda: True)

# Whether somebody listens to the dispatcher. Fallbacks: yes, so that every operator goes through it.
_modes: Callable[[], int] = _hook("_C._len_torch_dispatch_stack", lambda: 1)
_tracing: Callable[[], Any] = _hook("_C._get_tracing_state", lambda: True)
_profiling: Callable[[], bool] = _hook("_C._autograd._profiler_enabled", lambda: True)


def dispatch_observed() -> bool:
    """Whether a dispatch mode, a tracer or a profiler has to see every operator."""
    return _modes() > 0 or _tracing() is not None or _profiling()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is on. Fallback: no; torch then refuses the functions itself."""
    return bool(getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0)


def constant_when_compiled(function: F) -> F:
    """`torch.compiler.assume_constant_result`, which would import the whole compiler with this package.

    It sets this attribute and nothing else. Were it renamed, torch.compile would break its graph where the
    function is called for a GPU (on the CPU the compiler follows it anyway).
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
