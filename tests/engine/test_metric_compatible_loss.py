"""Metric-compatible learning against its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS, compare

from fastcompat import functional as fc
from fastcompat import losses

LABELS = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 1, 4, 0, -1])  # 3 and 4 have one row, -1 has no class


def pair_by_pair(reverse, new, old, labels, temperature, positives, shared, normalize=True):
    """Both terms from sums of exponentials; every pair is named, nothing is masked."""
    if normalize:
        reverse, new, old = (F.normalize(x) for x in (reverse, new, old))
    rows, terms = range(len(labels)), {"rev": [], "new": []}
    for i in rows:
        z = {
            "rev": {j: reverse[i] @ old[j] / temperature for j in rows},
            "new": {j: new[i] @ new[j] / temperature for j in rows if j != i},
        }
        other = {name: [v for j, v in row.items() if labels[j] != labels[i]] for name, row in z.items()}
        for name, row in z.items():
            pos = [v for j, v in row.items() if labels[j] == labels[i] >= 0]
            if not pos:
                continue
            neg = other["rev"] + other["new"] if shared else other[name]
            pos, everything = torch.stack(pos), torch.stack(pos + neg).logsumexp(0)
            p = pos.logsumexp(0) if positives == "sum_in_log" else pos.mean()
            terms[name].append(everything - p)
    return sum(torch.stack(term).mean() for term in terms.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
@pytest.mark.parametrize("shared", [True, False])
def test_against_the_definition(backend, positives, shared):
    n, old = len(LABELS), torch.randn(len(LABELS), 10)
    named = {"positives": positives, "shared_negatives": shared, "backend": backend}

    def ours(reverse, new, tau):
        return fc.metric_compatible_loss(reverse, new, old.to(new), LABELS, temperature=tau, **named)

    def eager(reverse, new, tau):
        return pair_by_pair(reverse, new, old.to(new), LABELS, tau, positives, shared)

    compare(ours, eager, torch.randn(n, 10), torch.randn(n, 14), torch.tensor(0.2), floor=60)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_normalisation(backend):
    n, old = len(LABELS), torch.randn(len(LABELS), 6)

    def ours(reverse, new):
        named = {"temperature": 3.0, "normalize": False, "backend": backend}
        return fc.metric_compatible_loss(reverse, new, old.to(new), LABELS, **named)

    def eager(reverse, new):
        return pair_by_pair(reverse, new, old.to(new), LABELS, 3.0, "sum_in_log", True, normalize=False)

    compare(ours, eager, torch.randn(n, 6), torch.randn(n, 5), floor=60)


def test_a_learned_head_gets_the_gradient_of_both_terms():
    """`new` may be rho(n), with psi on top of it."""
    n, old, rho, psi = torch.randn(12, 8), torch.randn(12, 5), torch.randn(8, 8), torch.randn(8, 5)

    def ours(rho, psi):
        m = n.to(rho) @ rho
        return fc.metric_compatible_loss(m @ psi, m, old.to(rho), LABELS, temperature=0.3)

    def eager(rho, psi):
        m = n.to(rho) @ rho
        return pair_by_pair(m @ psi, m, old.to(rho), LABELS, 0.3, "sum_in_log", True)

    compare(ours, eager, rho, psi, floor=60)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("positives", ["sum_in_log", "mean_out"])
def test_each_term_is_averaged_over_its_own_rows(backend, positives):
    reverse, new, old = (torch.randn(12, 6, requires_grad=True) for _ in range(3))
    named = {"positives": positives, "backend": backend}
    each = fc.metric_compatible_loss(reverse, new, old, LABELS, **named, reduction="none")
    assert each[-1] == 0 and each[:-1].ne(0).all()  # a row alone in its class still has its own old item
    total = fc.metric_compatible_loss(reverse, new, old, LABELS, **named, reduction="sum")
    torch.testing.assert_close(each.sum(), total)
    alone = torch.arange(12)
    loss = fc.metric_compatible_loss(reverse, new, old, alone, **named)
    both = fc.metric_compatible_loss(reverse, new, old, alone, **named, reduction="sum")
    torch.testing.assert_close(loss, both / 12)  # no row has a positive among the others' new embeddings
    loss.backward()
    assert old.grad is None and new.grad.isfinite().all() and new.grad.ne(0).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1, 4])
@pytest.mark.parametrize("label", [-1, 0])
def test_without_negatives_or_positives(backend, rows, label):
    reverse, new = torch.randn(rows, 6, requires_grad=True), torch.randn(rows, 6, requires_grad=True)
    labels = torch.full((rows,), label)
    loss = fc.metric_compatible_loss(reverse, new, torch.randn(rows, 6), labels, backend=backend)
    assert loss == 0
    for grad in torch.autograd.grad(loss, (reverse, new)):
        assert grad.eq(0).all()


def test_module():
    reverse, new, old = torch.randn(12, 6), torch.randn(12, 9), torch.randn(12, 6)
    named = {"temperature": 0.1, "positives": "mean_out", "shared_negatives": False, "reduction": "sum"}
    loss = losses.MetricCompatibleLoss(**named)
    expected = fc.metric_compatible_loss(reverse, new, old, LABELS, **named)
    torch.testing.assert_close(loss(reverse, new, old, LABELS), expected)


def test_autocast():
    """16-bit embeddings of two widths beside frozen float32 ones; statistics and loss stay float32."""
    reverse, new = torch.randn(12, 6).bfloat16(), torch.randn(12, 9).bfloat16()
    reverse.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fc.metric_compatible_loss(reverse, new, torch.randn(12, 6), LABELS)
    loss.backward()
    assert loss.dtype == torch.float32 and reverse.grad.dtype == torch.bfloat16
