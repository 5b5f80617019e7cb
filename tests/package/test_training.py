"""The training helper does what a plain loop does, and docs/training.md shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcompat as fc
from fastcompat.training import CompatibleStep, cached_features

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_page_runs_as_it_stands(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    exec(compile("\n".join(blocks), str(PAGE), "exec"), {})
    assert "'step': 45" in capsys.readouterr().out


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4))
    head = nn.Linear(4, 3)
    optimiser = torch.optim.SGD([*model.parameters(), *head.parameters()], lr=0.5)
    return model, optimiser, lambda f, y: F.cross_entropy(head(f), y)


IMAGES, LABELS, OLD = torch.randn(12, 5), torch.arange(12) % 3, torch.randn(12, 4)


def test_features_are_those_of_evaluation_mode_and_the_mode_is_restored(parts):
    model = parts[0].train()
    model[1].eval()  # a frozen part stays frozen
    features = cached_features(model, [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])])
    assert [module.training for module in model] == [True, False, True, True]
    assert not features.requires_grad
    torch.testing.assert_close(features, model.eval()(IMAGES).detach())
    with pytest.raises(ValueError, match="`batches`"):
        cached_features(model, [])


def test_weight_clipping_and_log(parts):
    model, optimiser, ordinary = parts
    before = [p.detach().clone() for group in optimiser.param_groups for p in group["params"]]
    seen = []
    loss = fc.losses.RACTLoss(temperature=0.1, k=2)
    step = CompatibleStep(model, optimiser, ordinary, loss, weight=3.0, clip_norm=0.01, log=seen.append)
    total = step(IMAGES, LABELS, OLD)
    (entry,) = seen
    assert entry["step"] == 1 and not total.requires_grad
    torch.testing.assert_close(entry["loss"], entry["ordinary"] + 3 * entry["compatible"])
    assert entry["grad_norm"] > 0.01
    after = [p for group in optimiser.param_groups for p in group["params"]]
    moved = torch.cat([(a - b).flatten() for a, b in zip(after, before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-4)  # lr times the clipped norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_runs_the_model_in_half_precision(parts, dtype):
    model, optimiser, ordinary = parts
    types = []
    model.register_forward_hook(lambda _m, _i, out: types.append(out.dtype))
    loss = fc.losses.RACTLoss(temperature=0.1, k=2)
    exact = ordinary(model(IMAGES), LABELS) + loss(model(IMAGES), LABELS, ref_emb=OLD)
    half = CompatibleStep(model, optimiser, ordinary, loss, autocast=dtype, clip_norm=1)(IMAGES, LABELS, OLD)
    assert types[-1] == dtype and half.dtype == torch.float32
    torch.testing.assert_close(half, exact.detach(), rtol=0.02, atol=0.0)


def test_class_vector_losses_take_no_old_features(parts):
    model, optimiser, ordinary = parts
    seen = []
    step = CompatibleStep(model, optimiser, ordinary, fc.losses.BCTLoss(OLD[:3]), log=seen.append)
    step(IMAGES, LABELS)
    assert set(seen[0]) == {"step", "loss", "ordinary", "compatible"}
    alone = CompatibleStep(model, optimiser, ordinary, log=seen.append)
    assert alone(IMAGES, LABELS) == seen[1]["ordinary"] and "compatible" not in seen[1]


@pytest.mark.parametrize(("name", "value"), [("autocast", torch.float64), ("clip_norm", 0.0)])
def test_bad_options_are_refused(parts, name, value):
    with pytest.raises(ValueError, match=f"`{name}`"):
        CompatibleStep(*parts, **{name: value})
