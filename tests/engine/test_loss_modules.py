"""The modules: the call signature, pytorch-metric-learning as oracle, and tuples of pairs and triplets."""

from __future__ import annotations

import pytest
import torch
from engine.loss_comparison import same, value_and_gradient
from pytorch_metric_learning import losses as pml
from pytorch_metric_learning import miners
from torch import nn

from fastcompat import functional, losses


def one_positive_each(pairs: int = 12) -> torch.Tensor:
    return torch.arange(pairs).repeat(2)


def test_ntxent_with_one_positive_per_anchor():
    x, y = torch.randn(24, 16), one_positive_each()
    ours, theirs = losses.ContrastiveLoss(temperature=0.1), pml.NTXentLoss(temperature=0.1)
    same(value_and_gradient(ours, x, y), value_and_gradient(theirs, x, y))


def test_ntxent_against_old_embeddings():
    x, old, y = torch.randn(12, 16), torch.randn(12, 16), torch.arange(12)
    ours, theirs = losses.ContrastiveLoss(temperature=0.1), pml.NTXentLoss(temperature=0.1)
    named = {"ref_emb": old, "ref_labels": y.clone()}
    same(value_and_gradient(ours, x, y, **named), value_and_gradient(theirs, x, y, **named))
    same(value_and_gradient(ours, x, ref_emb=old), value_and_gradient(theirs, x, y, **named))
    same(value_and_gradient(ours, x, y, ref_emb=old), value_and_gradient(theirs, x, y, **named))


def test_supcon():
    x, y = torch.randn(30, 16), torch.randint(4, (30,))
    ours = losses.ContrastiveLoss(temperature=0.1, positives="mean_out")
    same(value_and_gradient(ours, x, y), value_and_gradient(pml.SupConLoss(temperature=0.1), x, y))


def some_pairs(y, ref_y=None, share=0.5):
    """A random choice of all positive and negative pairs, as a miner would give."""
    same_class = y[:, None] == (y if ref_y is None else ref_y)
    itself = torch.eye(*same_class.shape, dtype=torch.bool) if ref_y is None else torch.tensor(False)
    positive = same_class & ~itself
    chosen = torch.rand(same_class.shape) < share
    return (*torch.where(positive & chosen), *torch.where(~same_class & chosen))


@pytest.mark.parametrize("with_old", [False, True])
@pytest.mark.one_simd
def test_pairs_as_in_supcon(with_old):
    x, y = torch.randn(20, 16), torch.randint(3, (20,))
    named = {"ref_emb": torch.randn(26, 16), "ref_labels": torch.randint(3, (26,))} if with_old else {}
    pairs = some_pairs(y, named.get("ref_labels"))
    ours = losses.ContrastiveLoss(temperature=0.1, positives="mean_out")
    theirs = pml.SupConLoss(temperature=0.1)
    same(value_and_gradient(ours, x, y, pairs, **named), value_and_gradient(theirs, x, y, pairs, **named))
    same(value_and_gradient(ours, x, None, pairs, **named), value_and_gradient(ours, x, y, pairs, **named))


@pytest.mark.one_simd
def test_triplets_as_in_supcon():
    x, y = torch.randn(20, 16), torch.randint(3, (20,))
    triplets = miners.TripletMarginMiner(margin=0.1)(x, y)
    assert len(triplets) == 3 and len(triplets[0])
    ours = losses.ContrastiveLoss(temperature=0.1, positives="mean_out")
    theirs = pml.SupConLoss(temperature=0.1)
    same(value_and_gradient(ours, x, y, triplets), value_and_gradient(theirs, x, y, triplets))


@pytest.mark.one_simd
def test_pairs_as_in_ntxent_with_one_positive_per_anchor():
    x, y = torch.randn(24, 16), one_positive_each()
    first, positive, *negatives = some_pairs(y, share=0.6)
    pairs = (first, positive, *negatives)
    ours, theirs = losses.ContrastiveLoss(temperature=0.1), pml.NTXentLoss(temperature=0.1)
    same(value_and_gradient(ours, x, y, pairs), value_and_gradient(theirs, x, y, pairs))


def test_all_pairs_in_a_tuple_are_the_labels():
    x, old, y = torch.randn(20, 16), torch.randn(20, 16), torch.randint(3, (20,))
    pairs = some_pairs(y, y, share=2.0)
    ours = losses.ContrastiveLoss()
    same(value_and_gradient(ours, x, y, pairs, old), value_and_gradient(ours, x, y, ref_emb=old))


@pytest.mark.parametrize("k", [3, None])
@pytest.mark.parametrize("detach", [True, False])
def test_ract_pairs_that_say_what_the_labels_say(k, detach):
    """The positive of row i is its own old embedding, the negatives are those of other classes."""
    x, old, y = torch.randn(20, 16), torch.randn(20, 16), torch.randint(4, (20,))
    row = torch.arange(20)
    pairs = (row, row, *torch.where(y[:, None] != y))
    loss = losses.RACTLoss(k=k, temperature=0.1, detach_keys=detach)
    same(value_and_gradient(loss, x, None, pairs, old), value_and_gradient(loss, x, y, ref_emb=old))
    function = functional.ract_loss(x, old, y, k=k, temperature=0.1)
    torch.testing.assert_close(loss(x, y, ref_emb=old, ref_labels=y), function)


@pytest.mark.one_simd
def test_ract_leaves_out_rows_without_a_positive_pair():
    x, old = torch.randn(6, 5), torch.randn(6, 5)
    none = torch.empty(0, dtype=torch.int64)
    value, grad = value_and_gradient(losses.RACTLoss(), x, None, (none, none, none, none), old)
    assert value == 0 and grad.eq(0).all()


def test_bct_module():
    x, y, weight, bias = torch.randn(9, 16), torch.arange(9), torch.randn(7, 16), torch.randn(7)
    loss = losses.BCTLoss(nn.Parameter(weight), bias, scale=30.0)
    torch.testing.assert_close(loss(x, y), functional.bct_loss(x, y, weight, bias, scale=30.0))
    assert not list(loss.parameters()) and set(loss.state_dict()) == {"old_weight", "old_bias"}
    half = loss.to(torch.bfloat16)
    assert half(x.bfloat16(), y).dtype == torch.float32


def test_a_learned_temperature_is_a_parameter():
    loss = losses.ContrastiveLoss(temperature=nn.Parameter(torch.tensor(0.1)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    x, y = torch.randn(24, 16), one_positive_each()
    loss(x, y).backward()
    ours, step = loss.temperature.grad, 1e-3
    above, below = (losses.ContrastiveLoss(temperature=0.1 + s)(x.double(), y) for s in (step, -step))
    torch.testing.assert_close(ours, ((above - below) / (2 * step)).float(), rtol=1e-3, atol=0)
