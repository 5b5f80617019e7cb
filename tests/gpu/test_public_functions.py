"""Every public function on the device: near float64, on that device, and the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc
from fastcompat import functional

ROWS, ITEMS, DIM, CLASSES = 130, 515, 96, 9
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Inputs:
    """Named tensors; those that get a gradient are listed in `wanted`."""

    def __init__(self, dtype: torch.dtype, device: torch.device | str) -> None:
        gen = torch.Generator().manual_seed(0)

        def embeddings(rows: int) -> Tensor:
            unit = F.normalize(torch.randn(rows, DIM, generator=gen))
            return unit.to(self.rounded).to(dtype).to(device)

        def labels(rows: int) -> Tensor:
            return torch.randint(-1, CLASSES, (rows,), generator=gen).to(device)

        self.rounded = dtype
        self.new, self.keys = embeddings(ROWS).requires_grad_(), embeddings(ITEMS).requires_grad_()
        self.old, self.gallery = embeddings(ROWS), embeddings(ITEMS)
        self.classes = embeddings(CLASSES).requires_grad_()
        self.labels, self.item_labels = labels(ROWS), labels(ITEMS)
        self.known = self.labels.clamp(min=0)
        self.positive = torch.randint(-1, ITEMS, (ROWS,), generator=gen).to(device)
        self.exclude = torch.randint(-1, ITEMS, (ROWS,), generator=gen).to(device)
        self.bias = torch.randn(ITEMS, generator=gen).to(device).requires_grad_()
        self.temperature = torch.tensor(0.1, device=device).requires_grad_()
        self.backfilled = (torch.rand(ITEMS, generator=gen) < 0.5).to(device)
        self.order = torch.randperm(ITEMS, generator=gen).to(device)


def weighted(stats: fc.SoftmaxStats) -> Tensor:
    weight = torch.linspace(0.5, 1.5, len(stats.neg_lse), device=stats.neg_lse.device)
    return sum((weight * torch.where(part.isfinite(), part, 0.0)).sum() for part in stats[:3])


Loss = Callable[[Inputs, str], Tensor]
LOSSES: dict[str, tuple[Loss, tuple[str, ...]]] = {
    "statistics by label": (
        lambda x, b: weighted(
            fc.softmax_stats(
                x.new, x.keys, scale=1 / x.temperature, bias=x.bias,
                query_labels=x.labels, key_labels=x.item_labels, exclude=x.exclude, backend=b,
            )
        ),
        ("new", "keys", "bias", "temperature"),
    ),
    "statistics by index": (
        lambda x, b: weighted(
            fc.softmax_stats(x.new, x.keys, scale=8.0, positive=x.positive, exclude=x.exclude, backend=b)
        ),
        ("new", "keys"),
    ),
    "contrastive, frozen": (
        lambda x, b: functional.contrastive_loss(
            x.new, x.gallery, positive=x.positive, temperature=x.temperature, backend=b
        ),
        ("new", "temperature"),
    ),
    "contrastive, both": (
        lambda x, b: functional.contrastive_loss(
            x.new, x.keys, query_labels=x.labels, key_labels=x.item_labels, positives="mean_out", backend=b
        ),
        ("new", "keys"),
    ),
    "bct": (lambda x, b: functional.bct_loss(x.new, x.labels, x.classes, scale=20.0, backend=b), ("new",)),
    "ract": (
        lambda x, b: functional.ract_loss(x.new, x.old, x.labels, k=7, temperature=0.05, backend=b), ("new",)
    ),
    "ract, all": (
        lambda x, b: functional.ract_loss(
            x.new, x.old, x.labels, k=None, temperature=0.05, detach_keys=False, backend=b
        ),
        ("new",),
    ),
    "metric-compatible": (
        lambda x, b: functional.metric_compatible_loss(x.new, x.new, x.old, x.labels, backend=b), ("new",)
    ),
    "prototype": (
        lambda x, b: functional.prototype_loss(x.new, x.classes, x.labels, perturbed=x.classes, backend=b),
        ("new",),
    ),
    "margin": (
        lambda x, b: functional.margin_softmax_loss(x.new, x.classes, x.known, backend=b), ("new", "classes")
    ),
}  # fmt: skip


def result(loss: Loss, wanted: tuple[str, ...], x: Inputs, backend: str) -> list[Tensor]:
    value = loss(x, backend)
    return [value.detach(), *torch.autograd.grad(value, [getattr(x, name) for name in wanted])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients(name: str, dtype: torch.dtype, device: torch.device) -> None:
    loss, wanted = LOSSES[name]
    exact = Inputs(dtype, "cpu")
    for field in ("new", "keys", "old", "gallery", "classes"):
        value = getattr(exact, field)
        setattr(exact, field, value.detach().double().requires_grad_(value.requires_grad))
    truth = result(loss, wanted, exact, "reference")
    x = Inputs(dtype, device)
    mine, again = (result(loss, wanted, x, "native") for _ in range(2))
    eager = result(loss, wanted, x, "reference")
    for got, same, plain, right in zip(mine, again, eager, truth, strict=True):
        assert got.device == device
        assert torch.equal(got, same), "not deterministic"
        error, eager_error = ((part.cpu().double() - right).norm().item() for part in (got, plain))
        # The eager reference keeps probabilities in float32, the engine multiplies them in the inputs' dtype.
        rounding = 2 * torch.finfo(dtype).eps + 40 * torch.finfo(torch.float32).eps
        assert error <= 2 * eager_error + rounding * right.norm().item(), (error, eager_error)


Search = Callable[[Inputs, str], tuple[Tensor, ...]]
SEARCHES: dict[str, Search] = {
    **{
        f"topk {metric}": lambda x, b, metric=metric: fc.topk(x.new, x.gallery, 20, metric=metric, backend=b)
        for metric in ("cosine", "ip", "l2")
    },
    "hard negatives": lambda x, b: fc.topk(
        x.new, x.gallery, 20, query_labels=x.labels, key_labels=x.item_labels, exclude=x.exclude, backend=b
    ),
    "more than there are": lambda x, b: fc.topk(x.new, x.gallery, ITEMS + 5, metric="ip", backend=b),
    "mixed": lambda x, b: fc.mixed_topk(x.old, x.gallery, x.new, x.keys, x.backfilled, 20, backend=b),
    "ranks": lambda x, b: (
        fc.ranks(x.new, x.gallery, x.positive[:, None].repeat(1, 2), exclude=x.exclude, backend=b),
    ),
}


def whole_numbers(dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Small whole numbers, many rows equal: every score of "ip" and "l2" is exact, with ties."""
    x = Inputs(dtype, device)
    gen = torch.Generator().manual_seed(1)
    for field in ("new", "keys", "old", "gallery"):
        shape = getattr(x, field).shape
        setattr(x, field, torch.randint(-2, 3, shape, generator=gen).to(dtype).to(device))
    x.gallery[100:200] = x.gallery[200:300]
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_searches(name: str, dtype: torch.dtype, device: torch.device) -> None:
    x = whole_numbers(dtype, device)
    truth = SEARCHES[name](whole_numbers(dtype, "cpu"), "reference")
    mine, again = (SEARCHES[name](x, "native") for _ in range(2))
    for got, same, right in zip(mine, again, truth, strict=True):
        assert got.device == device
        assert torch.equal(got, same), "not deterministic"
        if name in ("topk ip", "topk l2", "more than there are"):
            assert torch.equal(got.cpu(), right)
        elif right.dtype == torch.float32:
            torch.testing.assert_close(got.cpu(), right, rtol=1e-5, atol=1e-6)


def test_ranks_are_the_places_in_topk(device: torch.device) -> None:
    x = whole_numbers(torch.bfloat16, device)
    for metric in ("cosine", "ip", "l2"):
        ids = fc.topk(x.new, x.gallery, ITEMS, metric=metric, backend="native")[1]
        places = fc.ranks(x.new, x.gallery, ids[:, ::37], metric=metric, backend="native")
        assert torch.equal(places, torch.arange(0, ITEMS, 37, device=device).expand_as(places))


def figures(x: Inputs, backend: str) -> dict[str, Any]:
    metrics = fc.retrieval_metrics(x.new, x.gallery, x.labels, x.item_labels, metric="ip", backend=backend)
    curve = fc.backfill_curve(
        x.old, x.gallery, x.new, x.keys, x.labels, x.item_labels,
        order=x.order, states=7, metric="ip", exclude=x.exclude, backend=backend,
    )  # fmt: skip
    return {
        "map": metrics.map, "cmc": metrics.cmc[5], "recall": metrics.recall[10], "curve": curve.map,
        "top 1": curve.cmc[1], "lost": curve.negative_flips, "won": curve.positive_flips,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation(dtype: torch.dtype, device: torch.device) -> None:
    mine, truth = (
        figures(whole_numbers(dtype, device), "native"),
        figures(whole_numbers(dtype, "cpu"), "reference"),
    )
    for name, right in truth.items():
        got = torch.as_tensor(mine[name]).cpu()
        torch.testing.assert_close(got, torch.as_tensor(right), rtol=1e-12, atol=0, msg=name)


def test_prototypes(device: torch.device) -> None:
    features, labels = torch.randn(300, 32), torch.arange(300) % 40
    made = {}
    for where in (torch.device("cpu"), device):
        old = fc.class_prototypes(features.to(where), labels.to(where), 40)
        new = fc.class_prototypes(features.flip(1).to(where), labels.to(where), 40)
        bank = fc.PrototypeBank(old, perturb=lambda p, n: fc.ndpp(p, n, k=5, backend="auto"))
        bank.to(where).refresh(new, 0)
        made[where.type] = [old, fc.ndpp(old, new, k=5), fc.odpp(old, new, steps=5), bank.perturbed]
        assert all(part.device == where for part in made[where.type])
    for got, right in zip(made[device.type], made["cpu"], strict=True):
        torch.testing.assert_close(got.cpu(), right, rtol=1e-4, atol=1e-5)
