"""Class prototypes and their perturbation, against the formulas in float64."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS
from hypothesis import given
from hypothesis import strategies as st

import fastcompat as fc
from fastcompat import prototypes


def clustered(classes, dim, spread=0.4, groups=4):
    """Prototypes in a few groups, so that neighbours are near."""
    centre = torch.randn(groups, dim)
    return F.normalize(centre[torch.arange(classes) % groups] + spread * torch.randn(classes, dim))


@given(rows=st.integers(0, 40), classes=st.integers(1, 9), cuts=st.integers(1, 5), seed=st.integers(0, 99))
@pytest.mark.one_simd
def test_class_prototypes(rows, classes, cuts, seed):
    torch.manual_seed(seed)
    x, y = 3 * torch.randn(rows, 6), torch.randint(-2, classes, (rows,))
    expected = torch.zeros(classes, 6, dtype=torch.float64)
    for c in range(classes):
        if (y == c).any():
            expected[c] = F.normalize(F.normalize(x[y == c].double()).mean(0), dim=0)
    ours = fc.class_prototypes(x, y, classes)
    assert ours.dtype == torch.float32 and not ours.requires_grad
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
    running = fc.RunningPrototypes(classes)
    for part, labels in zip(x.tensor_split(cuts), y.tensor_split(cuts), strict=True):
        running.add(part, labels)
    torch.testing.assert_close(running.prototypes(), ours, rtol=1e-6, atol=1e-7)


@pytest.mark.one_simd
def test_a_class_with_one_sample_is_that_sample():
    x = torch.randn(1, 6, requires_grad=True)
    ours = fc.class_prototypes(x, torch.tensor([2]), 4)
    torch.testing.assert_close(ours[2], F.normalize(x.detach()[0], dim=0))
    assert ours[[0, 1, 3]].eq(0).all() and not ours.requires_grad


@pytest.mark.one_simd
def test_prototypes_of_half_precision_features_are_float32():
    x, y = torch.randn(50, 6).half(), torch.randint(3, (50,))
    ours = fc.class_prototypes(x, y, 3)
    torch.testing.assert_close(ours, fc.class_prototypes(x.double(), y, 3).float())


def ndpp_class_by_class(p, q, k, alpha_old, alpha_new, exclude_new_self):
    p, q = F.normalize(p.double()), F.normalize(q.double())
    moved = []
    for i in range(len(p)):
        step = torch.zeros_like(p[i])
        for keys, alpha, left_out in ((p, alpha_old, True), (q, alpha_new, exclude_new_self)):
            others = [j for j in range(len(keys)) if keys[j].any() and not (left_out and j == i)]
            near = sorted(others, key=lambda j, keys=keys: -float(p[i] @ keys[j]))[:k]
            s = {j: p[i] @ keys[j] for j in near}
            delta = sum((s[j] * (p[i] - keys[j]) for j in near), torch.zeros_like(p[i]))
            step = step + alpha * delta / (sum(s.values()) + 1e-8)
        moved.append(F.normalize(p[i] + step, dim=0))
    return torch.stack(moved)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [1, 5, 18, 100])
@pytest.mark.parametrize("exclude_new_self", [False, True])
def test_ndpp(backend, k, exclude_new_self):
    old, new = clustered(23, 8, groups=1), clustered(23, 8, groups=1)
    old[:3], new[:3] = -old[:3], -new[:3]  # far away: 18 neighbours need one of them, at a negative cosine
    old[7], new[3], old[11], new[11] = 0, 0, 0, 0  # classes unknown to the old, the new and both models
    named = {"k": k, "alpha_old": 0.3, "alpha_new": 0.2, "exclude_new_self": exclude_new_self}
    ours = fc.ndpp(5 * old, new, **named, backend=backend)
    expected = ndpp_class_by_class(old, new, *named.values())
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)
    assert ours[7].eq(0).all() and not ours.requires_grad
    torch.testing.assert_close(fc.ndpp(old.double(), new.double(), **named), expected)


def test_ndpp_defaults():
    old, new = clustered(150, 8, groups=1), clustered(150, 8, groups=1)
    expected = ndpp_class_by_class(old, new, 100, 0.16, 0.004, False)
    torch.testing.assert_close(fc.ndpp(old, new), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("perturb", [fc.ndpp, fc.odpp])
@pytest.mark.parametrize("classes", [0, 1, 2])
def test_very_few_classes(perturb, classes):
    old, new = torch.randn(classes, 6), torch.randn(classes, 6)
    ours = perturb(old, new)
    assert ours.shape == (classes, 6) and ours.isfinite().all()
    torch.testing.assert_close(ours.norm(dim=1), torch.ones(classes))
    if classes == 1 and perturb is fc.odpp:
        torch.testing.assert_close(ours, F.normalize(old))


@pytest.mark.parametrize("perturb", [fc.ndpp, partial(fc.odpp, threshold_old=-0.5, threshold_new=-0.5)])
def test_no_class_known_at_all(perturb):
    assert perturb(torch.zeros(4, 6), torch.zeros(4, 6)).eq(0).all()


def odpp_by_autograd(p, q, threshold_old, threshold_new, steps, lr):
    """The whole table of cosines, its two hinges and torch's Adam."""
    delta = torch.zeros_like(p, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=lr)
    different = ~torch.eye(len(p), dtype=torch.bool)
    for _ in range(steps):
        x = F.normalize(p + delta)
        loss = (x @ x.T - threshold_old).relu()[different].mean()
        loss = loss + (x @ q.T - threshold_new).relu()[different].mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return F.normalize(p + delta).detach()


@pytest.mark.parametrize("thresholds", [(0.9, 0.9), (0.3, 0.6), (-1.5, 0.2), (2.0, 2.0)])
@pytest.mark.parametrize("batch", [None, 19, 400])
@pytest.mark.one_simd
def test_odpp(thresholds, batch):
    old, new = clustered(19, 8).double(), clustered(19, 8).double()
    expected = odpp_by_autograd(old, new, *thresholds, 30, 1e-2)
    named = dict(zip(("threshold_old", "threshold_new"), thresholds, strict=True))
    ours = fc.odpp(3 * old, new, **named, steps=30, lr=1e-2, batch=batch)
    torch.testing.assert_close(ours, expected)
    assert not ours.requires_grad
    if thresholds == (2.0, 2.0):
        torch.testing.assert_close(ours, old)


@pytest.mark.one_simd
def test_odpp_in_blocks(monkeypatch):
    old, new = clustered(19, 8).double(), clustered(19, 8).double()
    whole = fc.odpp(old, new, threshold_old=0.3, steps=5)
    monkeypatch.setattr(prototypes, "_BLOCK", 19 * 4)
    torch.testing.assert_close(fc.odpp(old, new, threshold_old=0.3, steps=5), whole)


@pytest.mark.one_simd
def test_odpp_draws_every_class_in_turn():
    """One class in each step: after as many steps as classes, every pair has been pushed apart."""
    old = clustered(20, 8, spread=0.05, groups=1)
    new = torch.randn(20, 8)
    named = {"steps": 60, "lr": 1e-2, "batch": 1, "threshold_new": 2.0}
    torch.manual_seed(1)
    first = fc.odpp(old, new, **named)
    torch.manual_seed(1)
    assert torch.equal(first, fc.odpp(old, new, **named))
    closest = [(x @ x.T).fill_diagonal_(-1).amax(1) for x in (F.normalize(old), first)]
    assert (closest[1] < closest[0]).all()


@pytest.mark.one_simd
def test_odpp_leaves_unknown_classes_alone():
    old, new = clustered(12, 8), clustered(12, 8)
    old[4] = 0
    ours = fc.odpp(old, new, threshold_old=-0.5, threshold_new=-0.5)
    assert ours[4].eq(0).all() and ours.isfinite().all()
    torch.testing.assert_close(ours.norm(dim=1), (torch.arange(12) != 4).float())


@pytest.mark.parametrize("threshold", [-0.5, 0.3])
@pytest.mark.parametrize("batch", [None, 11])
def test_odpp_without_an_unknown_class_is_odpp_of_the_others(threshold, batch):
    """A zero row is ignored, whatever the new model says of its class."""
    old, new = clustered(12, 8).double(), clustered(12, 8).double()
    old[4] = 0
    known = torch.arange(12) != 4
    named = {"threshold_old": threshold, "threshold_new": threshold, "steps": 9, "lr": 1e-2, "batch": batch}
    torch.manual_seed(0)
    alone = fc.odpp(old[known], new[known], **named)
    torch.manual_seed(0)
    torch.testing.assert_close(fc.odpp(old, new, **named)[known], alone, rtol=1e-12, atol=1e-12)


def test_odpp_with_an_unknown_new_class():
    """The mean of the second hinge is over the pairs that there are."""
    old, new = clustered(12, 8).double(), clustered(12, 8).double()
    new[4] = 0
    delta = torch.zeros_like(old, requires_grad=True)
    adam, pairs = torch.optim.Adam([delta], lr=1e-2), ~torch.eye(12, dtype=torch.bool)
    there = pairs & (torch.arange(12) != 4)
    for _ in range(9):
        x = F.normalize(old + delta)
        hinges = (x @ x.T + 0.5).relu()[pairs].mean() + (x @ new.T + 0.5).relu()[there].mean()
        adam.zero_grad()
        hinges.backward()
        adam.step()
    ours = fc.odpp(old, new, threshold_old=-0.5, threshold_new=-0.5, steps=9, lr=1e-2)
    torch.testing.assert_close(ours, F.normalize(old + delta).detach())


@pytest.mark.one_simd
def test_odpp_moves_with_very_many_classes():
    """A mean over 1.6e7 pairs has gradients far below Adam's usual eps; their rounding stays below ours."""
    old = clustered(4000, 4, spread=0.0, groups=2000)
    ours = fc.odpp(old, torch.zeros_like(old), threshold_old=0.999999, lr=1e-3, steps=3, batch=4000)
    torch.testing.assert_close(ours, old)  # exact duplicates have no direction to leave in
    old = clustered(4000, 4, spread=1e-2, groups=2000)
    ours = fc.odpp(old, torch.zeros_like(old), threshold_old=0.999, lr=1e-3, steps=3)
    assert (ours - old).abs().amax(1).median() > 2e-3


@pytest.mark.one_simd
def test_bank_refreshes_on_its_schedule():
    old, new = clustered(9, 6), clustered(9, 6)
    bank = fc.PrototypeBank(old, perturb=partial(fc.odpp, steps=3, threshold_old=0.2), every=2)
    assert torch.equal(bank.perturbed, old)
    done = []
    for epoch in range(7):
        if bank.due(epoch):
            bank.refresh(new, epoch)
            done.append(epoch)
        assert not bank.due(epoch)
    assert done == [0, 2, 4, 6]
    torch.testing.assert_close(bank.perturbed, fc.odpp(old, new, steps=3, threshold_old=0.2))
    assert torch.equal(bank.prototypes, old)


def test_bank_resumes_from_its_state_dict():
    old, new = clustered(9, 6), clustered(9, 6)
    bank, fresh = fc.PrototypeBank(old, every=3), fc.PrototypeBank(torch.zeros(9, 6), every=3)
    bank.refresh(new, 4)
    fresh.load_state_dict(bank.state_dict())
    assert set(bank.state_dict()) == {"prototypes", "perturbed", "epoch"}
    for mine, theirs in zip(bank.buffers(), fresh.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    assert [fresh.due(epoch) for epoch in (5, 6, 7)] == [False, False, True]
    assert not list(bank.parameters())


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_class_prototypes_of_numpy_arrays(dtype):
    features, labels = np.random.default_rng(0).standard_normal((40, 6)).astype(dtype), np.arange(40) % 5
    ours = fc.class_prototypes(features, labels, 5)
    assert isinstance(ours, np.ndarray) and ours.dtype == ("float64" if dtype == "float64" else "float32")
    theirs = fc.class_prototypes(torch.from_numpy(features), torch.from_numpy(labels), 5)
    assert np.array_equal(ours, theirs.numpy())
    running = fc.RunningPrototypes(5)
    running.add(features, labels)
    assert torch.equal(running.prototypes(), theirs)


def test_prototypes_of_a_loss_are_set_where_they_are_held():
    old, other, y = clustered(9, 6), clustered(9, 6), torch.arange(9)
    loss = fc.losses.PrototypeLoss(old, temperature=0.1)
    x = torch.randn(9, 6)
    loss.perturbed = other
    assert torch.equal(loss(x, y), fc.functional.prototype_loss(x, old, y, perturbed=other, temperature=0.1))
    assert torch.equal(loss.bank.perturbed, other) and torch.equal(loss.state_dict()["bank.perturbed"], other)
    other += 1  # the loss holds a copy
    assert not torch.equal(loss.perturbed, other)
    loss.prototypes = other.double()
    assert torch.equal(loss.prototypes, other) and torch.equal(loss.bank.prototypes, other)
    for bad, message in (
        (other[:3], "shape [9, 6] of the bank: got [3, 6]"),
        (None, "must be a torch.Tensor"),
    ):
        for name in ("prototypes", "perturbed"):
            with pytest.raises((ValueError, TypeError), match=f"`{name}`.*{re.escape(message)}"):
                setattr(loss, name, bad)
