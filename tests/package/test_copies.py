"""Whatever the package makes can be pickled, copied and saved by torch, and the copy is another object."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import fastcompat as fc

N = 30
X, NEW, Y, QUERY = torch.randn(N, 6), torch.randn(N, 9), torch.arange(N) % 5, torch.randn(4, 6)
QUERY_NEW = torch.randn(4, 9)


def through_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


HOW: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": through_torch,
}


def galleries() -> dict[str, fc.MixedGallery]:
    named, begun = fc.MixedGallery(X, ids=Y.cumsum(0) + 7 + torch.arange(N)), fc.MixedGallery(X.numpy())
    named.update(named.ids[::2], NEW[::2])
    theirs = fc.MixedGallery(X, NEW, Y > 2, metric="l2", scale=(1, 2), offset=(0, 0.5))
    for gallery in (named, theirs):
        for _ in range(3):  # the vectors are kept packed
            gallery.search(QUERY, QUERY_NEW, 3)
    return {"named": named, "begun": begun, "theirs": theirs}


def found(gallery: fc.MixedGallery) -> list[Any]:
    scores, ids = gallery.search(QUERY, QUERY_NEW, 7)
    return [gallery.fraction, scores.tolist(), ids.tolist()]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ("named", "begun", "theirs"))
def test_a_gallery(name: str, how: str) -> None:
    """The copy finds the same, and what happens to one of the two does not reach the other."""
    gallery = galleries()[name]
    before = found(gallery)
    twin = HOW[how](gallery)
    assert found(twin) == before
    ids = gallery.ids
    twin.update(ids[:5], torch.randn(5, 9))
    changed = found(twin)
    assert found(gallery) == before
    gallery.update(ids[:9], torch.randn(9, 9))
    assert found(twin) == changed
    assert len(pickle.dumps(gallery)) < 8_000 + 4 * N * 15  # the packed copies stay at home


def test_a_gallery_out_of_a_folder(tmp_path: Any) -> None:
    galleries()["named"].save(tmp_path)
    gallery = fc.MixedGallery.load(tmp_path)
    for how in HOW.values():
        assert found(how(gallery)) == found(gallery)


def others() -> dict[str, Any]:
    losses, quick = fc.losses, {"epochs": 1, "progress": False}
    weight = torch.nn.Parameter(torch.tensor(0.1))
    queue, running = losses.MemoryQueue(8, 6), fc.RunningPrototypes(5)
    queue.add(X[:5], Y[:5])
    running.add(X, Y)
    bank = fc.PrototypeBank(fc.class_prototypes(X, Y, 5), every=1)
    bank.refresh(torch.randn(5, 6), 1)
    return {
        "queue": queue,
        "running prototypes": running,
        "bank": bank,
        "ContrastiveLoss": losses.ContrastiveLoss(temperature=weight),
        "BCTLoss": losses.BCTLoss(torch.randn(5, 6)),
        "RACTLoss": losses.RACTLoss(),
        "MetricCompatibleLoss": losses.MetricCompatibleLoss(),
        "MarginSoftmaxLoss": losses.MarginSoftmaxLoss(torch.randn(5, 6)),
        "PrototypeLoss": losses.PrototypeLoss(bank),
        "SimCLRLoss": losses.SimCLRLoss(),
        "FCTLoss": losses.FCTLoss(),
        "FastFillLoss": losses.FastFillLoss(torch.randn(5, 9)),
        "ForwardTransform": fc.ForwardTransform(6, 9, hidden=8).fit(X, NEW, **quick),
        "ReverseQueryTransform": fc.ReverseQueryTransform(9, 6).fit(X, NEW, **quick),
        "ResidualHead": fc.ResidualHead(9),
        "Procrustes": fc.Procrustes().fit(X, NEW),
        "SideInformation": fc.SideInformation(torch.nn.Linear(6, 3), torch.nn.Identity()),
        "RetrievalMetrics": fc.retrieval_metrics(X, X, Y, Y),
        "BackfillCurve": fc.backfill_curve(X, X, NEW, NEW, Y, Y),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, (torch.Tensor, np.ndarray)):
        return bool((torch.as_tensor(a) == torch.as_tensor(b)).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return equal(vars(a), vars(b)) if hasattr(a, "__dict__") else bool(a == b)


@pytest.mark.parametrize("how", HOW)
def test_everything_else(how: str) -> None:
    for name, value in others().items():
        twin = HOW[how](value)
        assert type(twin) is type(value), name
        if isinstance(value, torch.nn.Module):
            assert equal(twin.state_dict(), value.state_dict()), name
        else:
            assert equal(twin, value), name
