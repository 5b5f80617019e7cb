"""Does every native kernel compute what the reference computes, on every instruction set and GPU here?

Every operator that `_ops` defines has a check, and so has packing: one without a check fails by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .. import _native, _ops
from . import _search, _softmax
from ._compare import TOLERANCE

CHECKS: dict[str, Callable[[torch.dtype, torch.device], str]] = {
    "softmax_stats": _softmax.stats,
    "softmax_query_grad": _softmax.query_grad,
    "softmax_key_grad": _softmax.key_grad,
    "softmax_loss": _softmax.loss,
    "topk": _search.topk,
    "pair_scores": _search.pair_scores,
    "count_beats": _search.count_beats,
    "pack": _search.pack,
}


@dataclass(frozen=True)
class Check:
    """One kernel on one instruction set or GPU and one dtype; `problem` is empty if it is right."""

    kernel: str
    where: str
    dtype: str
    problem: str


def kernels(device: torch.device) -> list[str]:
    """What runs on this device: the operators by their schemas, and the packing of keys."""
    operators = [schema.partition("(")[0] for schema in _ops._SCHEMAS]
    if device.type == "cpu":
        return [*operators, "pack"]
    return [name for name in operators if name not in _ops._CPU_ALONE]


def run() -> Iterator[Check]:
    """Check every kernel on every usable instruction set and GPU, and leave the set in use as it was."""
    before = _native.simd()
    try:
        for simd in _native.simd_levels():
            _native.set_simd(simd)
            yield from _everything(simd, torch.device("cpu"))
    finally:
        _native.set_simd(before)
    for index in range(torch.cuda.device_count()):
        gpu = torch.device("cuda", index)
        if not _native.not_covered(gpu):
            yield from _everything(str(gpu), gpu)


def _everything(where: str, device: torch.device) -> Iterator[Check]:
    for dtype in TOLERANCE:
        for kernel in kernels(device):
            try:
                check = CHECKS.get(kernel)
                with torch.device("cpu"):  # the problems are made there, whatever the default device
                    problem = check(dtype, device) if check else "the self-check has no case for it"
            except Exception as error:  # a kernel that raises is a kernel that fails
                problem = f"{type(error).__name__}: {error}"
            yield Check(kernel, where, str(dtype).removeprefix("torch."), problem)
