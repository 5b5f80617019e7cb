"""Which devices the native kernels take, and what is said of the others; nothing is computed here."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastcompat as fc
from fastcompat import _checks, _native

NO_KERNELS = SimpleNamespace()
TOO_OLD = SimpleNamespace(cuda=SimpleNamespace(unusable=lambda device: "its compute capability is 7.5"))
FITTING = SimpleNamespace(cuda=SimpleNamespace(unusable=lambda device: ""))


def on_a_gpu(backend: str, **arguments: object) -> fc.SoftmaxStats:
    with FakeTensorMode():
        query, keys = torch.empty(4, 8, device="cuda"), torch.empty(9, 8, device="cuda")
        return fc.softmax_stats(query, keys, backend=backend, **arguments)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (NO_KERNELS, r"this build has no CUDA kernels: install fastcompat again with nvcc on PATH, or with"),
        (TOO_OLD, r"its compute capability is 7\.5"),
    ],
)
def test_a_gpu_without_kernels(monkeypatch, module, reason):
    monkeypatch.setattr(_native, "_C", module)
    with FakeTensorMode():
        query = torch.empty(4, 8, device="cuda")
    with pytest.raises(ValueError, match=rf'`backend="native"` does not cover the device cuda:0 \({reason}'):
        _checks.use_native("native", query)
    with pytest.warns(UserWarning, match=rf"plain PyTorch reference: no kernels for .*{reason}"):
        assert not _checks.use_native("auto", query)


@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_gpu_with_kernels(monkeypatch, backend):
    monkeypatch.setattr(_native, "_C", FITTING)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = on_a_gpu(backend)
    assert [part.device.type for part in stats] == ["cuda"] * 4
    assert [part.dtype for part in stats] == [torch.float32] * 3 + [torch.int64]


def test_a_gpu_is_not_mixed_with_the_cpu(monkeypatch):
    monkeypatch.setattr(_native, "_C", FITTING)
    with FakeTensorMode():
        on_cpu = torch.empty(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="`positive` must be on the device of `query`: got cpu and cuda:0"):
        on_a_gpu("native", positive=on_cpu)


def test_float32_precision_by_either_interface_of_torch(monkeypatch):
    assert _native._precision(torch.bfloat16) == 0
    for level, name in enumerate(("highest", "high", "medium")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda name=name: name)
        assert _native._precision(torch.float32) == level

    def mixed() -> str:
        raise RuntimeError("a mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", mixed)
    for name, level in (("ieee", 0), ("none", 0), ("tf32", 1)):
        matmul = SimpleNamespace(fp32_precision=name)
        monkeypatch.setattr(torch.backends, "cuda", SimpleNamespace(matmul=matmul))
        assert _native._precision(torch.float32) == level
