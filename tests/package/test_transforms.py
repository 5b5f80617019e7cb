"""The transforms learn what they should, repeat themselves, and survive their files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.linalg import orthogonal_procrustes
from torch import nn
from transform_cases import QUIET, as_tuple, fitted, forward, inputs, reverse, spaces

import fastcompat as fc

# --- the architectures


def block(x, linear, norm):
    """Linear, BatchNorm with running statistics, ReLU, in float64."""
    x = x @ linear.weight.double().T
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    return (norm.weight.double() * (x - mean) / (variance + norm.eps).sqrt() + norm.bias.double()).relu()


def last(x, linear):
    return x @ linear.weight.double().T + linear.bias.double()


@pytest.mark.parametrize("name", ["FCT", "FCT with side-information", "FastFill"])
@torch.no_grad()
def test_forward_transform_is_the_mixer_of_two_branches(name):
    h, given = fitted(name), [x.double() for x in inputs(name)]
    branches = []
    for path, x in ((h.from_old, given[0]), (h.from_side, given[-1])):
        for linear, norm, _ in path:
            x = block(x, linear, norm)
        branches.append(x)
    x = torch.cat(branches, 1)
    assert x.shape[1] == 4 * 24
    for linear, norm, _ in h.mixer[:2]:
        x = block(x, linear, norm)
    expected = [last(x, h.mixer[2])]
    if name == "FastFill":
        expected.append(last(expected[0], h.log_variance)[:, 0])
    for found, truth in zip(as_tuple(h(*inputs(name))), expected, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 2, 5])
@torch.no_grad()
def test_reverse_query_transform_ends_in_a_linear(blocks):
    psi = fc.ReverseQueryTransform(24, 16, blocks=blocks, hidden=9).eval()
    x = inputs("RQT")[0].double()
    for linear, norm, _ in psi.psi[:-1]:
        x = block(x, linear, norm)
    assert len(psi.psi) == blocks
    torch.testing.assert_close(psi(*inputs("RQT")).double(), last(x, psi.psi[-1]), rtol=1e-4, atol=1e-5)


def test_the_head_starts_as_the_new_model():
    (new,) = inputs("rho")
    assert torch.equal(fc.ResidualHead(24)(new), F.normalize(new))


# --- what they learn


def error(found, truth):
    return (found - truth).square().mean().item()


def test_fct_beats_the_mean_and_side_information_helps():
    seen, unseen = spaces()
    baseline = error(seen["new"].mean(0), unseen["new"])
    alone = error(forward().transform(unseen["old"]), unseen["new"])
    helped = error(forward(side=True).transform(unseen["old"], unseen["side"]), unseen["new"])
    assert helped < 0.7 * alone < 0.7 * 0.7 * baseline


def test_fastfill_knows_what_it_does_not_know():
    seen, unseen = spaces()
    old = torch.cat([seen["old"], torch.randn(seen["old"].shape)])  # half of the items say nothing
    new, labels = torch.cat([seen["new"]] * 2), torch.cat([seen["labels"]] * 2)
    h = fc.ForwardTransform(16, 24, hidden=64, log_variance=True).fit(old, new, labels, **QUIET)
    _, known = h.transform(unseen["old"])
    _, unknown = h.transform(torch.randn(unseen["old"].shape))
    assert (known[:, None] < unknown).float().mean() > 0.9


def test_fastfill_reads_the_given_classifier():
    seen, unseen = spaces()
    swapped = seen["labels"].roll(1)
    weight = fc.class_prototypes(seen["new"], swapped, 10)
    found = {}
    for name, classifier in (("right", {"new_weight": 9 * weight}), ("none", {})):
        h = fc.ForwardTransform(16, 24, hidden=64, log_variance=True)
        h.fit(seen["old"], seen["new"], swapped, **classifier, new_bias=None, epochs=5, **QUIET)
        found[name] = F.cross_entropy(9 * h.transform(unseen["old"])[0] @ weight.T, unseen["labels"].roll(1))
    assert found["right"] < found["none"]


def test_fastfill_without_a_classifier_takes_class_means_that_fit_best(monkeypatch):
    seen, _ = spaces()
    new, labels = seen["new"].double(), torch.where(torch.arange(1000) % 7 == 0, -1, 10 * seen["labels"])
    calls, real = [], fc.functional.fastfill_loss

    def spy(*arguments, **named):
        calls.append(arguments)
        assert named == {"label_smoothing": 0.2}
        return real(*arguments, **named)

    monkeypatch.setattr(fc.functional, "fastfill_loss", spy)
    h = fc.ForwardTransform(16, 24, hidden=16, log_variance=True)
    h.fit(seen["old"], seen["new"], labels, epochs=1, label_smoothing=0.2, **QUIET)
    *_, weight, bias, rows = calls[-1]
    assert rows.min() == -1 and rows.max() < 10
    means = torch.stack([new[labels == 10 * c].mean(0) for c in range(10)])
    scale = (weight.norm() / means.norm()).item()
    torch.testing.assert_close(weight, (scale * means).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(bias, (-scale * means.square().sum(1) / 2).float(), rtol=1e-4, atol=1e-6)
    known = labels >= 0

    def cost(scale):
        z = -scale * torch.cdist(new[known], means).square() / 2  # the nearest mean, up to a constant
        return F.cross_entropy(z, labels[known] // 10, label_smoothing=0.2)

    assert cost(scale) < min(cost(scale / 2), cost(scale * 2))


def cross_map(query, gallery, part):
    rows = torch.arange(len(query))
    return fc.retrieval_metrics(query, gallery, part["labels"], part["labels"], exclude=rows).map


def test_rqt_finds_old_features_and_mcl_makes_them_comparable():
    _, unseen = spaces()
    old, new, labels = unseen["old"], unseen["new"], unseen["labels"]
    rqt, mcl = reverse().transform(new), reverse(with_labels=True).transform(new)
    assert F.cosine_similarity(rqt, old).mean() > 0.9
    assert cross_map(rqt, old, unseen) > 0.9 * cross_map(old, old, unseen)

    def area(query):
        rows = torch.arange(len(query))
        return fc.backfill_curve(query, old, new, new, labels, labels, exclude=rows).auc()

    assert area(mcl) > area(rqt)


def test_labels_alone_mean_the_default_loss():
    compatible = fc.losses.MetricCompatibleLoss(temperature=0.2)
    seen, _ = spaces()
    psi = fc.ReverseQueryTransform(24, 16)
    psi.fit(seen["old"], seen["new"], seen["labels"], compatible=compatible, weight=0.3, epochs=2, **QUIET)
    default = reverse(with_labels=True, epochs=2)
    assert psi.history == default.history
    assert torch.equal(psi(seen["new"]), default(seen["new"]))


def test_classes_of_one_item_and_items_without_a_class():
    seen, unseen = spaces()
    for labels in (torch.arange(1000), torch.full((1000,), -1)):
        psi = fc.ReverseQueryTransform(24, 16)
        psi.fit(seen["old"], seen["new"], labels, epochs=2, **QUIET)
        assert psi(unseen["new"]).isfinite().all()
    h = fc.ForwardTransform(16, 24, hidden=16, log_variance=True)
    h.fit(seen["old"], seen["new"], torch.arange(1000), epochs=2, **QUIET)
    assert all(part.isfinite().all() for part in h(unseen["old"]))


def test_the_l2_distance_reaches_the_lengths_too():
    seen, unseen = spaces()
    found = {}
    for distance in ("cosine", "l2"):
        psi = fc.ReverseQueryTransform(24, 16).fit(3 * seen["old"], seen["new"], distance=distance, **QUIET)
        found[distance] = error(psi.transform(unseen["new"]), 3 * unseen["old"])
    assert found["l2"] < 0.5 * found["cosine"]


def test_the_head_is_trained_with_psi():
    seen, unseen = spaces()
    psi, rho = fc.ReverseQueryTransform(24, 16), fc.ResidualHead(24)
    assert rho.fit(seen["old"], seen["new"], seen["labels"], psi=psi, **QUIET) is rho
    assert rho.history == psi.history
    stored = rho.transform(unseen["new"])
    assert cross_map(stored, stored, unseen) > cross_map(unseen["new"], unseen["new"], unseen)
    assert cross_map(psi.transform(stored), unseen["old"], unseen) > cross_map(
        unseen["old"], unseen["old"], unseen
    )


def test_a_head_fits_alone_as_with_its_psi():
    seen, _ = spaces()
    psi, twin, rho = fc.ReverseQueryTransform(24, 16), fc.ResidualHead(24), fc.ResidualHead(24)
    short = QUIET | {"epochs": 2}
    compatible = fc.losses.MetricCompatibleLoss(temperature=0.1)
    psi.fit(seen["old"], seen["new"], seen["labels"], head=twin, compatible=compatible, weight=1.0, **short)
    rho.fit(seen["old"], seen["new"], seen["labels"], **short)
    assert torch.equal(rho(seen["new"]), twin(seen["new"]))


@pytest.mark.parametrize(("d_src", "d_dst"), [(12, 12), (9, 14), (14, 9)])
def test_procrustes_recovers_a_rotation(d_src, d_dst):
    wide = max(d_src, d_dst)
    rotation = torch.linalg.qr(torch.randn(wide, wide).double())[0][:d_src, :d_dst]
    src = torch.randn(200, d_src).double()
    if d_src > d_dst:
        src = src @ rotation @ rotation.T  # what of it the narrow space can hold
    found = fc.Procrustes().fit(src.float(), (src @ rotation).float())
    torch.testing.assert_close(found.transform(src.float()), (src @ rotation).float(), rtol=1e-4, atol=1e-5)


def test_procrustes_is_the_best_rotation():
    src, dst = np.random.default_rng(0).normal(size=(2, 50, 6))
    expected, _ = orthogonal_procrustes(src, dst)
    np.testing.assert_allclose(fc.Procrustes().fit(src, dst).rotation, expected, rtol=1e-5, atol=1e-6)


# --- how they are trained


def test_early_stopping_keeps_the_best_epoch():
    torch.manual_seed(0)
    old, new = torch.randn(150, 16), torch.randn(150, 24)  # nothing to be learned, so it soon gets worse

    def fit(patience):
        h = fc.ForwardTransform(16, 24, hidden=64)
        return h.fit(old, new, epochs=100, lr=5e-3, patience=patience, **QUIET)

    soon, later = fit(2), fit(5)
    judged = [held_out for _, held_out in later.history]
    assert len(later.history) == np.argmin(judged) + 1 + 5 < 100
    assert soon.history == later.history[:-3]
    assert torch.equal(soon(old), later(old))  # the best weights, not the last


def test_nothing_held_out_keeps_the_last_weights():
    torch.manual_seed(0)
    old, new = torch.randn(150, 16), torch.randn(150, 24)
    h = fc.ForwardTransform(16, 24, hidden=64).fit(old, new, epochs=30, patience=1, held_out=0, **QUIET)
    assert len(h.history) == 30 and np.isnan([judged for _, judged in h.history]).all()
    assert h.history[-1][0] < 0.8 * h.history[0][0]
    assert error(h(old), new) < h.history[-1][0]


def test_batch_norm_keeps_its_statistics_in_the_second_half():
    h = fc.ForwardTransform(16, 24, hidden=64)
    h.fit(torch.randn(150, 16), torch.randn(150, 24), epochs=6, held_out=0, **QUIET)
    counted = {int(x.num_batches_tracked) for x in h.modules() if isinstance(x, nn.BatchNorm1d)}
    assert counted == {3 * 2}  # three epochs of two batches, 64 rows each


@pytest.mark.parametrize("name", ["FCT", "FastFill", "RQT"])
def test_a_seed_repeats_everything(name):
    build = {
        "FCT": lambda seed: forward(epochs=2, seed=seed),
        "FastFill": lambda seed: forward(log_variance=True, epochs=2, seed=seed),
        "RQT": lambda seed: reverse.__wrapped__(True, epochs=2, seed=seed),
    }[name]
    states = []
    for seed, elsewhere in ((7, 0), (7, 1), (8, 1)):
        torch.manual_seed(elsewhere)
        states.append(build(seed))
    one, same, other = (torch.cat([x.double().flatten() for x in s.state_dict().values()]) for s in states)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert states[0].history == states[1].history


def test_fit_draws_nothing_from_torchs_random_state():
    seen, _ = spaces()
    psi = fc.ReverseQueryTransform(24, 16)
    before = torch.get_rng_state()
    psi.fit(seen["old"], seen["new"], epochs=1, **QUIET)
    assert torch.equal(before, torch.get_rng_state())


def test_weight_decay_shrinks_the_weights():
    seen, _ = spaces()
    sizes = [
        fc.ReverseQueryTransform(24, 16, blocks=1)
        .fit(seen["old"], seen["new"], weight_decay=decay, epochs=20, **QUIET)
        .psi[0]
        .weight.norm()
        for decay in (0.0, 10.0)
    ]
    assert sizes[1] < 0.7 * sizes[0]


def test_fit_starts_anew():
    seen, _ = spaces()
    psi, rho = fc.ReverseQueryTransform(24, 16), fc.ResidualHead(24)
    found = []
    for _ in range(2):
        psi.fit(seen["old"], seen["new"], seen["labels"], head=rho, epochs=2, **QUIET)
        found.append(psi.transform(rho.transform(seen["new"])))
    assert torch.equal(*found)


def test_numpy_arrays_memory_maps_and_halves(tmp_path):
    seen, _ = spaces()
    expected = fc.ReverseQueryTransform(24, 16).fit(
        seen["old"], seen["new"], seen["labels"], epochs=2, **QUIET
    )
    for name in ("old", "new", "labels"):
        np.save(tmp_path / f"{name}.npy", seen[name].numpy())
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("old", "new", "labels")]
    psi = fc.ReverseQueryTransform(24, 16).fit(*mapped, epochs=2, **QUIET)
    found = psi.transform(mapped[1])
    assert isinstance(found, np.ndarray) and np.array_equal(found, expected.transform(seen["new"]).numpy())
    halves = fc.ReverseQueryTransform(24, 16).fit(seen["old"].half(), seen["new"].double(), epochs=2, **QUIET)
    assert halves.transform(seen["new"].half()).dtype == torch.float32


def test_many_rows_are_transformed_in_blocks():
    psi = fitted("RQT")
    new = torch.randn(20_000, 24)
    with torch.no_grad():
        torch.testing.assert_close(psi.transform(new), psi(new))
    assert psi.transform(new[:0]).shape == (0, 16)


def test_transform_is_in_eval_mode_and_leaves_the_mode():
    psi = fc.ReverseQueryTransform(24, 16)
    x = torch.randn(5, 24)
    psi.psi[0][1].eval()  # a BatchNorm that someone froze
    psi.fitted = True
    assert torch.equal(psi.transform(x), psi.transform(x))
    assert psi.training and psi.psi[0][0].training and not psi.psi[0][1].training
    assert not psi.transform(x).requires_grad
    assert torch.equal(psi.transform(x), psi.eval()(x)) and not psi.training


def test_in_a_loop_of_your_own():
    seen, _ = spaces()
    psi, loss_of = fc.ReverseQueryTransform(24, 16), fc.losses.MetricCompatibleLoss()
    adam = torch.optim.Adam(psi.parameters(), lr=1e-3)
    values = []
    for _ in range(20):
        loss = loss_of(psi(seen["new"]), seen["new"], seen["old"], seen["labels"])
        adam.zero_grad()
        loss.backward()
        adam.step()
        values.append(loss.item())
    assert values[-1] < values[0]


# --- side-information


def test_side_information_brings_views_together():
    torch.manual_seed(0)
    images = torch.randn(64, 12)

    def augment(batch):
        return batch + 0.5 * torch.randn_like(batch)

    side = fc.SideInformation(nn.Linear(12, 8), augment, projection=nn.Linear(8, 4), temperature=0.2)
    adam = torch.optim.Adam(side.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        loss = side(images)
        adam.zero_grad()
        loss.backward()
        adam.step()
        values.append(loss.item())
    assert np.mean(values[-5:]) < 0.8 * values[0]
    stored = side.embed(images)
    assert stored.shape == (64, 8) and not stored.requires_grad and side.training


def test_side_information_is_the_loss_of_two_views():
    torch.manual_seed(0)
    views = [torch.randn(6, 5), torch.randn(6, 5)]
    encoder, projection = nn.Linear(5, 4), nn.Linear(4, 3)
    side = fc.SideInformation(encoder, lambda _: drawn.pop(0), projection=projection, temperature=0.3)
    drawn = list(views)
    expected = fc.functional.simclr_loss(*(projection(encoder(x)) for x in views), temperature=0.3)
    assert side(torch.zeros(6, 5)) == expected
    drawn = list(views)
    plain = fc.SideInformation(encoder, lambda _: drawn.pop(0))
    assert plain(torch.zeros(6, 5)) == fc.functional.simclr_loss(*map(encoder, views))
