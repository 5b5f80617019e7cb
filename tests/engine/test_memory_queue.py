"""The queue of past embeddings, and pytorch-metric-learning's cross-batch memory around our losses."""

from __future__ import annotations

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import CLOSE, same, value_and_gradient
from hypothesis import given
from hypothesis import strategies as st
from pytorch_metric_learning import losses as pml

from fastcompat import functional, losses


@given(
    size=st.integers(1, 9),
    batches=st.lists(st.integers(0, 12), max_size=5),
    named=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.one_simd
def test_a_queue_is_a_list(size, batches, named, seed):
    """Against a deque of (embedding, label, position) from which repeated images are taken out."""
    torch.manual_seed(seed)
    queue, slow = losses.MemoryQueue(size, 3), deque(maxlen=size)
    for rows in batches:
        x, y = torch.randn(rows, 3), torch.randint(4, (rows,))
        where = torch.randint(14, (rows,)) if named else None
        own = queue.add(x, y, where)
        last = {int(where[i]): i for i in range(rows)} if named else {}
        if named:
            slow = deque((item for item in slow if item[2] not in last), maxlen=size)
        entering = [i for i in range(rows) if not named or last[int(where[i])] == i]
        slow.extend((x[i].tolist(), int(y[i]), int(where[i]) if named else -1) for i in entering)
        held = zip(queue.embeddings.tolist(), queue.labels.tolist(), queue.positions.tolist(), strict=True)
        assert list(held) == list(slow) and len(queue) == len(slow)
        newest = torch.tensor([last.get(int(where[i]), i) if named else i for i in range(rows)]).long()
        kept = own >= 0
        assert torch.equal(queue.embeddings[own[kept]], x[newest][kept])
        assert own.unique().ge(0).sum() == min(len(entering), size)
        if named:
            assert torch.equal(queue.find(where), own)
    everyone = [item[2] for item in slow]
    for position in range(-1, 14):
        found = int(queue.find(torch.tensor([position])))
        assert found == (everyone.index(position) if named and position in everyone else -1)


@pytest.mark.one_simd
def test_a_batch_that_brings_an_image_twice_leaves_it_in_the_queue_once():
    queue, x = losses.MemoryQueue(3, 2), torch.arange(12.0).reshape(6, 2)
    image = torch.tensor([5, 7, 5, -1, -1, 7])
    assert queue.add(x[:3], image[:3], image[:3]).tolist() == [1, 0, 1]
    assert torch.equal(queue.embeddings, x[1:3]) and queue.positions.tolist() == [7, 5]
    assert queue.find(image[:3]).tolist() == [1, 0, 1]
    assert queue.add(x, image, image).tolist() == [-1, 2, -1, 0, 1, 2]  # 5 is the oldest of four
    assert torch.equal(queue.embeddings, x[3:]) and queue.positions.tolist() == [-1, -1, 7]


@pytest.mark.one_simd
def test_rows_without_a_position_stay():
    queue = losses.MemoryQueue(10, 2)
    some = torch.tensor([-1, 3])
    queue.add(torch.randn(2, 2), some, some)
    assert queue.add(torch.randn(2, 2), some, some).tolist() == [1, 2]
    assert queue.positions.tolist() == [-1, -1, 3] and queue.find(some).tolist() == [-1, 2]


def test_a_loss_over_the_queue_leaves_self_pairs_out():
    queue = losses.MemoryQueue(20, 8)
    seen, labels = [], []
    for _ in range(4):
        x, y = torch.randn(8, 8, requires_grad=True), torch.randint(3, (8,))
        own = queue.add(x, y)
        seen, labels = (seen + list(x.detach()))[-20:], (labels + y.tolist())[-20:]
        loss = functional.contrastive_loss(
            x, queue.embeddings, query_labels=y, key_labels=queue.labels, exclude=own, temperature=0.1
        )
        z = F.normalize(x) @ F.normalize(torch.stack(seen)).T / 0.1
        rows = []
        for i in range(8):
            itself = len(seen) - 8 + i
            use = [j for j in range(len(seen)) if j != itself]
            pos = [j for j in use if labels[j] == y[i]]
            if pos:
                rows.append(z[i, use].logsumexp(0) - z[i, pos].logsumexp(0))
        torch.testing.assert_close(loss, torch.stack(rows).mean(), **CLOSE)
    assert not queue.embeddings.requires_grad


def test_ract_over_two_queues_in_step():
    new_queue, old_queue = losses.MemoryQueue(30, 6), losses.MemoryQueue(30, 6)
    everything = [torch.randn(24, 6), torch.randn(24, 6), torch.randint(4, (24,))]
    for rows in torch.arange(24).split(8):
        new, old, y = (part[rows] for part in everything)
        own = new_queue.add(new, y)
        assert torch.equal(own, old_queue.add(old, y))
    bank = {"new_keys": new_queue.embeddings, "old_keys": old_queue.embeddings}
    loss = functional.ract_loss(new, old, y, **bank, key_labels=new_queue.labels, key_index=own)
    whole = dict(zip(("new_keys", "old_keys", "key_labels"), everything, strict=True))
    expected = functional.ract_loss(new, old, y, **whole, key_index=torch.arange(16, 24))
    torch.testing.assert_close(loss, expected)


def test_an_earlier_loss_still_differentiates():
    queue, x = losses.MemoryQueue(8, 4), torch.randn(4, 4, requires_grad=True)
    own = queue.add(x, torch.arange(4))
    loss = functional.contrastive_loss(x, queue.embeddings, exclude=own, positive=own.roll(1))
    (before,) = torch.autograd.grad(loss, x, retain_graph=True)
    queue.add(torch.randn(8, 4), torch.zeros(8, dtype=torch.int64))
    assert torch.equal(before, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("rows", [0, 3, 7])
@pytest.mark.one_simd
def test_state_dict(rows):
    queue, other = losses.MemoryQueue(5, 4), losses.MemoryQueue(5, 4)
    queue.add(torch.randn(rows, 4), torch.arange(rows), torch.arange(rows))
    other.add(torch.randn(4, 4), torch.arange(4))
    other.load_state_dict(queue.state_dict())
    for mine, theirs in zip(queue.buffers(), other.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(RuntimeError, match="size mismatch"):
        losses.MemoryQueue(5, 3).load_state_dict(queue.state_dict())


@pytest.mark.one_simd
def test_a_longer_queue_does_not_fit_a_shorter_one():
    queue = losses.MemoryQueue(5, 4)
    queue.add(torch.randn(5, 4), torch.arange(5))
    with pytest.raises(RuntimeError, match="size mismatch"):
        losses.MemoryQueue(3, 4).load_state_dict(queue.state_dict())


@pytest.mark.one_simd
def test_half_precision_embeddings_are_kept_in_the_queue_s_own_dtype():
    queue = losses.MemoryQueue(5, 4)
    queue.add(torch.randn(2, 4).bfloat16(), torch.arange(2))
    assert queue.embeddings.dtype == torch.float32
    assert queue.bfloat16().embeddings.dtype == torch.bfloat16 and queue.labels.dtype == torch.int64


@pytest.mark.parametrize("memory", [16, 40])
@pytest.mark.one_simd
def test_cross_batch_memory_around_supcon(memory):
    """The real CrossBatchMemory: batch after batch, while the memory fills and wraps round."""
    ours = pml.CrossBatchMemory(losses.ContrastiveLoss(temperature=0.1, positives="mean_out"), 8, memory)
    theirs = pml.CrossBatchMemory(pml.SupConLoss(temperature=0.1), 8, memory)
    for _ in range(5):
        x, y = torch.randn(12, 8), torch.randint(4, (12,))
        same(value_and_gradient(ours, x, y), value_and_gradient(theirs, x, y))


@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
def test_cross_batch_memory_is_our_queue(positives):
    """Its self pairs are left out as ours are, so both give one number."""
    loss = losses.ContrastiveLoss(temperature=0.1, positives=positives)
    theirs, queue = pml.CrossBatchMemory(loss, 8, memory_size=30), losses.MemoryQueue(30, 8)

    def ours(x, y):
        own = queue.add(x, y)
        return functional.contrastive_loss(
            x,
            queue.embeddings,
            query_labels=y,
            key_labels=queue.labels,
            exclude=own,
            temperature=0.1,
            positives=positives,
        )

    for _ in range(5):
        x, y = torch.randn(12, 8), torch.randint(4, (12,))
        same(value_and_gradient(ours, x, y), value_and_gradient(theirs, x, y))
