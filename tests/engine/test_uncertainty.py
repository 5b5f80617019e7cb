"""The three uncertainties against their definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from engine.loss_comparison import BACKENDS

import fastcompat as fc

KINDS = ("least_confidence", "margin", "entropy")


def definition(features, weight, kind, temperature):
    z = F.normalize(features.double()) @ F.normalize(weight.double()).T / temperature
    p = z.softmax(1)
    best = p.sort(1, descending=True).values
    if kind == "least_confidence":
        return torch.where(best[:, 0] > 0.5, best[:, 1:].sum(1), 1 - best[:, 0])  # without the cancellation
    if kind == "margin":
        second = best[:, 1] if p.shape[1] > 1 else 0
        return definition(features, weight, "least_confidence", temperature) + second
    return -(p * z.log_softmax(1)).sum(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "classes", "dim"), [(1, 1, 3), (31, 2, 17), (4099, 67, 12), (9, 300, 65)])
@pytest.mark.parametrize("temperature", [0.07, 1.5])
def test_values(backend, kind, rows, classes, dim, temperature):
    features, weight = torch.randn(rows, dim), torch.randn(classes, dim)
    found = fc.uncertainty(features, weight, kind=kind, temperature=temperature, backend=backend)
    assert found.shape == (rows,) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(
        found.double(), definition(features, weight, kind, temperature), rtol=2e-5, atol=1e-12
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "classes", "dim"), [(1, 1, 3), (200, 1000, 2), (300, 100, 64)])
@pytest.mark.parametrize("temperature", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.07, 1.0, 10.0])
def test_entropies_at_every_temperature(backend, rows, classes, dim, temperature):
    """On a circle so many classes lie close that small temperatures tell their cosines' last digits apart."""
    features, weight = torch.randn(rows, dim), torch.randn(classes, dim)
    found = fc.uncertainty(features, weight, temperature=temperature, backend=backend)
    truth = definition(features, weight, "entropy", temperature)
    assert (found.double() - truth).abs().max() <= 2**-24 * truth.abs().max() + 1e-9 * min(
        1, 1e-8 / temperature
    )


@pytest.mark.parametrize("kind", KINDS)
def test_very_certain_items_still_have_an_order(kind):
    towards = torch.linspace(0, 1, 50)
    features = torch.stack([1 - towards / 2, towards / 2], 1)  # from certain to undecided
    found = fc.uncertainty(features, torch.eye(2), kind=kind, temperature=0.04)
    assert found[0] < 1e-9 and found.diff().gt(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_extremes(kind):
    undecided = fc.uncertainty(torch.zeros(3, 4), torch.eye(4), kind=kind)
    largest = {"least_confidence": 0.75, "margin": 1.0, "entropy": torch.tensor(4.0).log().item()}[kind]
    torch.testing.assert_close(undecided, torch.full((3,), largest))
    assert fc.uncertainty(torch.randn(5, 4), torch.randn(1, 4), kind=kind).eq(0).all()
    assert fc.uncertainty(torch.randn(0, 4), torch.eye(4), kind=kind).shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_input(kind):
    features, weight = torch.randn(40, 16), torch.randn(9, 16)
    expected = fc.uncertainty(features, weight, kind=kind)
    assert torch.equal(
        expected, torch.from_numpy(fc.uncertainty(features.numpy(), weight.numpy(), kind=kind))
    )
    with torch.inference_mode():
        assert torch.equal(expected, fc.uncertainty(features, weight, kind=kind))
    halves = features.half()
    assert torch.equal(
        fc.uncertainty(halves, weight, kind=kind), fc.uncertainty(halves.float(), weight, kind=kind)
    )
    wide = fc.uncertainty(features.double(), weight, kind=kind)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide, definition(features, weight, kind, 0.07), rtol=1e-10, atol=1e-14)
    learned = torch.tensor(0.07, requires_grad=True)
    torch.testing.assert_close(fc.uncertainty(features, weight, kind=kind, temperature=learned), expected)


def test_every_order_fits_a_curve():
    labels = torch.arange(60) % 5
    centres = torch.randn(5, 16)
    new = centres[labels] + 0.3 * torch.randn(60, 16)
    old = new + torch.randn(60, 16) * torch.rand(60, 1) * 3
    weight = fc.class_prototypes(old, labels, 5)
    query = centres + 0.1 * torch.randn(5, 16)
    for kind in KINDS:
        order = fc.uncertainty(old, weight, kind=kind).argsort(descending=True, stable=True)
        curve = fc.backfill_curve(query, old, query, new, torch.arange(5), labels, order=order)
        assert curve.map[-1] > curve.map[0]
    order = (-fc.uncertainty(old.numpy(), weight.numpy())).argsort(kind="stable")
    arrays = [x.numpy() for x in (query, old, query, new, torch.arange(5), labels)]
    assert torch.equal(torch.from_numpy(fc.backfill_curve(*arrays, order=order).map), curve.map)
