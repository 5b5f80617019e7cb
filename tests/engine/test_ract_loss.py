"""RACT against its definition, row by row."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import compare

from fastcompat import functional as fc


def row_by_row(new, old, labels, new_keys, old_keys, key_labels, key_index, temperature, k):
    """CE([pos | NO | NN] / temperature, 0) from the definition."""
    new, old, new_keys, old_keys = (F.normalize(x) for x in (new, old, new_keys, old_keys))
    losses = []
    for i in range(len(new)):
        other = ~((key_labels == labels[i]) & (labels[i] >= 0))
        if key_index is not None and key_index[i] >= 0:
            other[key_index[i]] = False
        row = [(new[i] * old[i]).sum()[None]]
        for bank in (old_keys, new_keys):
            z = bank[other] @ new[i]
            row.append(z if k is None else z.topk(min(k, len(z))).values)
        z = torch.cat(row) / temperature
        losses.append(z.logsumexp(0) - z[0])
    return torch.stack(losses).mean()


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("k", [1, 4, 1000, None])
@pytest.mark.parametrize("temperature", [0.01, 0.1])
@pytest.mark.parametrize("detach", [True, False])
def test_within_the_batch(backend, k, temperature, detach):
    labels = torch.randint(5, (24,))
    labels[3] = -1

    old = torch.randn(24, 12)

    def ours(n):
        named = {"k": k, "temperature": temperature, "detach_keys": detach, "backend": backend}
        return fc.ract_loss(n, old.to(n.dtype), labels, **named)

    def eager(n):
        o, keys = old.to(n.dtype), n.detach() if detach else n
        return row_by_row(n, o, labels, keys, o, labels, torch.arange(24), temperature, k)

    compare(ours, eager, torch.randn(24, 12), floor=20 + 2 / temperature)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("index", [None, [2, -1, 5, 30, 31, 0, 7]])
def test_a_bank_of_keys(backend, k, index):
    new, new_keys = torch.randn(7, 12), torch.randn(40, 12)
    old, old_keys = torch.randn(7, 12), torch.randn(40, 12)
    labels, key_labels = torch.randint(3, (7,)), torch.randint(3, (40,))
    key_index = None if index is None else torch.tensor(index)

    def ours(n, n_keys, tau):
        return fc.ract_loss(
            n,
            old.to(n.dtype),
            labels,
            new_keys=n_keys,
            old_keys=old_keys.to(n.dtype),
            key_labels=key_labels,
            key_index=key_index,
            k=k,
            temperature=tau,
            detach_keys=False,
            backend=backend,
        )

    def eager(n, n_keys, tau):
        banks = (n_keys, old_keys.to(n.dtype))
        return row_by_row(n, old.to(n.dtype), labels, *banks, key_labels, key_index, tau, k)

    compare(ours, eager, new, new_keys, torch.tensor(0.1), floor=60)


@pytest.mark.parametrize("k", [5, None])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_no_negative_at_all(k, backend):
    new = torch.randn(4, 6, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    loss = fc.ract_loss(new, torch.randn(4, 6), labels, k=k, backend=backend)
    (grad,) = torch.autograd.grad(loss, new)
    assert loss == 0 and grad.eq(0).all()


@pytest.mark.parametrize("k", [5, None])
def test_an_empty_batch(k):
    new = torch.randn(0, 6, requires_grad=True)
    loss = fc.ract_loss(new, torch.randn(0, 6), torch.empty(0, dtype=torch.int64), k=k)
    (grad,) = torch.autograd.grad(loss, new)
    assert loss == 0 and grad.shape == (0, 6)


def test_an_empty_bank():
    empty, labels = torch.randn(0, 6), torch.arange(4)
    bank = {"new_keys": empty, "old_keys": empty, "key_labels": labels[:0]}
    assert fc.ract_loss(torch.randn(4, 6), torch.randn(4, 6), labels, **bank) == 0


@pytest.mark.parametrize("k", [2, None])
def test_old_embeddings_and_detached_keys_get_no_gradient(k):
    new, old, keys, old_keys = (torch.randn(6, 5, requires_grad=True) for _ in range(4))
    labels = torch.arange(6)
    bank = {"new_keys": keys, "old_keys": old_keys, "key_labels": labels}
    fc.ract_loss(new, old, labels, **bank, k=k).backward()
    assert new.grad is not None and old.grad is old_keys.grad is keys.grad is None


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", ["new", "old"])
@pytest.mark.parametrize("k", [2, None])
def test_nan_passes_through(bad, side, k):
    """A loss lets NaN through although the search inside would refuse it."""
    both = {"new": torch.randn(6, 5), "old": torch.randn(6, 5)}
    both[side][4, 1] = bad
    loss = fc.ract_loss(both["new"], both["old"], torch.arange(6), k=k)
    assert loss.isnan()
