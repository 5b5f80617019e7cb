"""What the package warns of: once per function, at the caller's line, and only where a value may be read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from loss_cases import LOSSES
from torch import Tensor

import fastcompat as fc
from fastcompat import _checks, functional, losses


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(_checks, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        yield


def said(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    assert {Path(warning.filename).name for warning in caught} <= {Path(__file__).name, "loss_cases.py"}
    return [str(warning.message) for warning in caught]


NEW, OLD = torch.randn(12, 24), torch.randn(12, 24)
Y = torch.arange(12) % 4
HASHES = torch.tensor([-(2**62), 3, 2**50, -77])[Y]


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "simclr"])
def test_labels_that_look_like_hashes(name: str, backend: str) -> None:
    y = torch.where(HASHES < 0, HASHES, HASHES % 12)  # some losses refuse labels beyond their classes
    some = torch.where(Y == 0, -1, Y)
    assert not said(lambda: LOSSES[name](NEW, OLD, some, backend=backend))
    first = said(lambda: LOSSES[name](NEW, OLD, y, backend=backend))
    assert [message for message in first if "negative labels other than -1, such as -4611" in message]
    assert "numpy.unique" in first[0] and not said(lambda: LOSSES[name](NEW, OLD, y, backend=backend))


def test_once_for_each_function() -> None:
    loss = losses.ContrastiveLoss()
    assert len(said(lambda: loss(NEW, HASHES))) == 1
    assert not said(lambda: loss(NEW, HASHES))
    assert len(said(lambda: losses.RACTLoss()(NEW, HASHES, ref_emb=OLD))) == 1
    assert len(said(lambda: fc.class_prototypes(NEW, HASHES % 9 - 5, 12))) == 1
    assert len(said(lambda: fc.topk(NEW, OLD, 3, query_labels=Y, key_labels=HASHES))) == 1


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize(
    "name", [name for name in LOSSES if name not in ("simclr", "statistics") and "ract" not in name]
)
def test_a_batch_without_a_positive(name: str, backend: str) -> None:
    nobody = torch.full((12,), -1)
    found = said(lambda: LOSSES[name](NEW, OLD, nobody, backend=backend))
    assert len(found) == 1 and found[0].startswith("no row of this batch has a positive")
    assert not said(lambda: LOSSES[name](NEW, OLD, nobody, backend=backend))


def test_a_loss_that_is_0_for_other_reasons() -> None:
    far = torch.eye(12) * 1e3
    loss = functional.contrastive_loss(far, far, positive=torch.arange(12), normalize=False)
    assert loss == 0 and not _checks._warned
    assert not said(lambda: functional.contrastive_loss(NEW[:0], OLD, positive=Y[:0]))  # nobody to have one


def test_silence_when_compiled() -> None:
    def loss(x: Tensor, y: Tensor) -> Tensor:
        return functional.contrastive_loss(x, OLD, query_labels=y, key_labels=Y)

    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    assert not said(lambda: compiled(NEW, HASHES))
