"""No default dtype or device of torch reaches the engine: every allocation states its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from loss_cases import FROM_PAIRS, LOSSES
from torch import Tensor

import fastcompat as fc
from fastcompat import losses

# What torch makes from nothing.
FACTORIES = {
    *("empty", "zeros", "ones", "full", "eye", "arange", "linspace", "logspace", "rand", "randn", "randint"),
    *("normal", "tensor", "scalar_tensor", "randperm", "tril_indices", "triu_indices", "empty_strided"),
    *("empty_permuted", "as_tensor", "asarray", "Tensor", "FloatTensor", "LongTensor"),
}
PACKAGE = Path(fc.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def bare_factories(source: str) -> list[int]:
    """The lines that call a factory of torch without both `dtype=` and `device=`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
            stated = {keyword.arg for keyword in node.keywords}
            if not {"dtype", "device"} <= stated:
                found.append(node.lineno)
    return found


def test_the_check_finds_what_it_should() -> None:
    assert bare_factories("torch.empty(3)\ntorch.arange(3, device=d)\ntorch.ones(2, dtype=a, device=b)") == [
        1,
        2,
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_allocation_states_dtype_and_device(path: Path) -> None:
    assert not bare_factories(path.read_text())


def results() -> dict[str, Tensor]:
    """What every part of the package computes of fixed inputs, which state their types themselves."""
    gen = torch.Generator("cpu").manual_seed(0)
    new, old = (torch.randn(60, 24, generator=gen, dtype=torch.float32, device="cpu") for _ in range(2))
    y = torch.arange(60, dtype=torch.int64, device="cpu") % 12
    found: dict[str, Tensor] = {}
    for backend in ("native", "reference"):
        for name, loss in LOSSES.items():
            leaf = new.clone().requires_grad_()
            value = loss(leaf, old, y, backend=backend)
            (found[f"{name} {backend} gradient"],) = torch.autograd.grad(value.sum(), leaf)
            found[f"{name} {backend}"] = value.detach()
        scores, ids = fc.topk(new, old, 7, metric="l2", query_labels=y, key_labels=y, backend=backend)
        found |= {f"scores {backend}": scores, f"ids {backend}": ids}
        found[f"ranks {backend}"] = fc.ranks(new, old, ids, backend=backend)
        metrics = fc.retrieval_metrics(new, old, y, y, backend=backend)
        found[f"per query {backend}"] = metrics.per_query.map
        curve = fc.backfill_curve(new, old, new, old, y, y, states=5, backend=backend)
        found |= {f"curve {backend}": curve.map, f"fraction {backend}": curve.fraction}
        found[f"uncertainty {backend}"] = fc.uncertainty(new, old, backend=backend)
    for name, loss in FROM_PAIRS.items():
        found[name] = loss(new, old, y)
    prototypes = fc.class_prototypes(old, y, 12), fc.class_prototypes(new, y, 12)
    found |= {"ndpp": fc.ndpp(*prototypes, k=3)}
    torch.manual_seed(0)
    found["odpp"] = fc.odpp(*prototypes, steps=3, batch=5, threshold_old=0.0, threshold_new=0.0)
    bank = fc.PrototypeBank(prototypes[0])
    bank.refresh(prototypes[1], 3)
    found |= {"bank": bank.perturbed, "epoch": bank.epoch}
    for method in ("score", "rrf", "zscore", "minmax"):
        found[f"merged {method}"] = fc.merge_topk([(scores, ids), (scores, ids)], 5, method=method)[0]
    gallery = fc.MixedGallery(old)
    gallery.update(torch.arange(20, dtype=torch.int64, device="cpu"), new[:20])
    for n in range(3):  # packs its keys at the second search
        found[f"gallery {n}"] = gallery.search(new, new, 5)[0]
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return results()


@pytest.mark.parametrize("default", (torch.bfloat16, torch.float16, torch.float64))
def test_another_default_dtype(default: torch.dtype, expected: dict[str, Tensor]) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        found = results()
    finally:
        torch.set_default_dtype(before)
    same(found, expected)


def test_another_default_device(expected: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        found = results()
    same(found, expected)


def test_a_queue_is_made_where_torch_makes_modules() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        with torch.device("meta"):
            queue = losses.MemoryQueue(4, 3)
    finally:
        torch.set_default_dtype(before)
    assert queue.embeddings.is_meta and queue.embeddings.dtype == torch.float32


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and found[name].device == value.device, name
        assert torch.equal(found[name].nan_to_num(7), value.nan_to_num(7)), name
