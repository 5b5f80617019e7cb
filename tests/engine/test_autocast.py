"""Mixed dtypes, and autocast: embeddings may be 16 bits wide, statistics and losses are float32."""

from __future__ import annotations

import pytest
import torch

import fastcompat as fc
from fastcompat import _autograd, functional


@pytest.fixture
def seen(monkeypatch):
    """The dtypes that reach the engine."""
    found = []

    def spy(inner):
        def call(problem, *rest):
            found.append((problem.query.dtype, problem.keys.dtype))
            return inner(problem, *rest)

        return call

    for name in ("softmax_stats", "softmax_loss"):
        monkeypatch.setattr(_autograd, name, spy(getattr(_autograd, name)))
    return found


def test_frozen_keys_follow_the_query_under_autocast(seen):
    layer, old, y = torch.nn.Linear(6, 8), torch.randn(20, 8), torch.arange(20) % 5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        new = layer(torch.randn(20, 6))
        loss = functional.contrastive_loss(new, old, query_labels=y, key_labels=y)
        loss = loss + functional.bct_loss(new, y, old, torch.zeros(20), scale=30.0)
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2 and loss.dtype == torch.float32
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32 and layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_other_mixed_dtypes_are_promoted(seen, autocast):
    query = torch.randn(5, 8, dtype=torch.bfloat16, requires_grad=True)
    keys = torch.randn(9, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = functional.contrastive_loss(query, keys, positive=torch.arange(5))
    assert seen == [(torch.float32, torch.float32)]
    loss.backward()
    assert query.grad.dtype == torch.bfloat16 and keys.grad.dtype == torch.float32


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ract_at_low_temperature_in_16_bits(dtype, k):
    new = torch.randn(20, 16).to(dtype).requires_grad_()
    old, y = torch.randn(20, 16), torch.arange(20) % 4
    with torch.autocast("cpu", dtype=dtype):
        loss = functional.ract_loss(new, old, y, k=k, temperature=0.01)
    exact = functional.ract_loss(new.detach().double(), old.double(), y, k=k, temperature=0.01)
    loss.backward()
    assert loss.dtype == torch.float32 and new.grad.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert (
        abs(loss.item() - exact.item()) < 100 * eps * 2
    )  # a cosine is off by about eps, a logit by eps / tau


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_autocast_never_rounds_the_logits(backend):
    query, keys = torch.randn(5, 64), torch.randn(9, 64)
    expected = fc.softmax_stats(query.double(), keys.double(), scale=3.0).neg_lse
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fc.softmax_stats(query, keys, scale=3.0, backend=backend).neg_lse
    torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-5)


def test_a_zero_embedding_in_half_precision_is_finite():
    query = torch.zeros(2, 8, dtype=torch.float16, requires_grad=True)
    loss = functional.contrastive_loss(query, torch.randn(4, 8).half(), positive=torch.tensor([0, 1]))
    assert loss.isfinite()
