"""The same bits for any number of threads, from several Python threads at once, and after a fork."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastcompat as fc


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    query, keys = torch.randn(200, 40), torch.randn(2500, 40)
    return query, keys, torch.randint(2, (200,)), torch.randint(2, (2500,))


def everything(query, keys, y, w, dtype=torch.float32):
    """One of each kernel's results."""
    q, k = (x.to(dtype).clone().requires_grad_() for x in (query, keys))
    bias = torch.zeros(len(keys), requires_grad=True)
    stats = fc.softmax_stats(q, k, scale=0.3, bias=bias, query_labels=y, key_labels=w, backend="native")
    grads = torch.autograd.grad(stats.neg_lse.sum() + stats.pos_lse.sum(), (q, k, bias))
    scale, chosen = torch.tensor(0.3, requires_grad=True), torch.arange(len(q))
    chosen_stats = fc.softmax_stats(q, k, scale=scale, positive=chosen, backend="native")
    chosen_grads = torch.autograd.grad(chosen_stats.neg_lse.sum() + chosen_stats.pos_lse.sum(), (q, k, scale))
    scores, ids = fc.topk(q, k, 20, query_labels=y, key_labels=w, backend="native")
    ranks = fc.ranks(q, k, ids, metric="l2", backend="native")
    return [*stats, *grads, *chosen_stats, *chosen_grads, scores, ids, ranks]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_threads(inputs, dtype):
    torch.set_num_threads(1)
    expected = everything(*inputs, dtype)
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        assert same_bits(everything(*inputs, dtype), expected)


def test_again_and_again(inputs):
    expected = everything(*inputs)
    assert all(same_bits(everything(*inputs), expected) for _ in range(3))


def test_several_python_threads_at_once(inputs):
    expected = everything(*inputs)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: everything(*inputs), range(8)))
    assert all(same_bits(one, expected) for one in found)


def in_a_forked_child(function) -> bool:
    """Whether `function()` is true in a child process; a child that hangs is killed."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        answer = False
        try:
            answer = function()
        finally:
            os._exit(0 if answer else 1)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_use(inputs):
    """As in a DataLoader's worker: the parent's threads do not exist in the child."""
    query, keys, _, _ = inputs
    torch.set_num_threads(2)

    def search_and_stats():
        return [*fc.topk(query, keys, 20), *fc.softmax_stats(query, keys)]

    expected = search_and_stats()
    assert in_a_forked_child(lambda: same_bits(search_and_stats(), expected))
    assert same_bits(search_and_stats(), expected)
    assert in_a_forked_child(lambda: in_a_forked_child(lambda: same_bits(search_and_stats(), expected)))
