"""Calibrated merges: the maps against their definitions and scikit-learn, the ends of a merge, refusals."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompat as fc
from fastcompat import reference
from fastcompat.serving.logistic import logistic_fit

METRICS = ("cosine", "ip", "l2")


def two_models(items: int = 900, queries: int = 120, seed: int = 0) -> dict[str, Tensor]:
    """Two encoders of one latent space whose scores are spread differently, the old one with more noise."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(12, 16, generator=g)
    labels = torch.randint(0, 12, (items + queries,), generator=g)
    latent = classes[labels] + 0.9 * torch.randn(items + queries, 16, generator=g)
    old = (
        torch.relu((latent + torch.randn(latent.shape, generator=g)) @ torch.randn(16, 10, generator=g)) + 0.3
    )
    new = latent @ torch.randn(16, 24, generator=g)
    return {
        "query_old": old[items:],
        "old": old[:items],
        "query_new": new[items:],
        "new": new[:items],
        "query_labels": labels[items:],
        "gallery_labels": labels[:items],
    }


def judged(data: dict[str, Tensor], side: str) -> dict[str, Tensor]:
    names = {"query": f"query_{side}", "gallery": side}
    return {k: data[v] for k, v in names.items()} | {k: data[k] for k in ("query_labels", "gallery_labels")}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("far", (0.0, 300.0))
def test_maps_are_their_definitions_in_double(metric: str, far: float) -> None:
    data = two_models()
    query, sample = data["query_new"].double() + far, data["new"][:701].double() + far
    scores = reference.scores(query, sample, metric).numpy()
    scale, offset = fc.Calibrator("zscore", metric).fit(sample).affine(query)
    z = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
    spread = np.abs(scores).max() / scores.std(1).min()  # digits that a float32 offset cannot hold
    np.testing.assert_allclose(
        scale.double().numpy()[:, None] * scores + offset.double().numpy()[:, None],
        z,
        atol=1e-5 + 2e-7 * spread,
    )
    scale, offset = fc.Calibrator("tail", metric).fit(sample).affine(query)
    u = np.quantile(scores, 0.95, axis=1, keepdims=True)
    excess = np.where(scores > u, scores - u, 0).sum(1) / (scores > u).sum(1)
    np.testing.assert_allclose(scale.double() * torch.from_numpy(excess), 1, rtol=1e-4 + 1e-6 * spread)
    np.testing.assert_allclose(
        scale.double().numpy() * u[:, 0] + offset.double().numpy(), 0, atol=1e-4 + 3e-6 * spread
    )


@pytest.mark.parametrize("prior_matters", (False, True))
def test_the_logistic_fit_is_that_of_scikit_learn(prior_matters: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    random = np.random.default_rng(0)
    x = random.normal(3, 40, 5000)
    y = (random.random(5000) < 1 / (1 + np.exp(-(0.07 * x - 4)))).astype(float)
    if prior_matters:
        y = (x > 30).astype(float)  # separable: only the prior bounds the slope
    slope, intercept = logistic_fit(torch.from_numpy(x), torch.from_numpy(y))
    z = (x - x.mean()) / x.std()
    theirs = linear_model.LogisticRegression(C=1 / (1e-4 * len(x)), tol=1e-10, max_iter=10_000).fit(
        z[:, None], y
    )
    np.testing.assert_allclose(slope, theirs.coef_[0, 0] / x.std(), rtol=1e-4)
    np.testing.assert_allclose(intercept, theirs.intercept_[0] - slope * x.mean(), rtol=1e-4, atol=1e-5)


def test_odds_recover_the_odds_of_relevance() -> None:
    g = torch.Generator().manual_seed(0)
    gallery, query = torch.randn(4000, 8, generator=g), torch.randn(200, 8, generator=g)
    z = reference.scores(query, gallery, "ip") / query.norm(dim=1, keepdim=True)
    relevant = torch.rand(z.shape, generator=g) < torch.sigmoid(2.5 * z - 6)
    c = fc.Calibrator("odds", "ip")
    c.fit(gallery[:1000], query=query, gallery=gallery, relevance=fc.Relevance(*relevant.nonzero().T))
    assert c.slope == pytest.approx(2.5, rel=0.05) and c.intercept == pytest.approx(-6, rel=0.05)
    assert not c.fell_back


@pytest.mark.parametrize("method", ("zscore", "tail", "odds", "odds-tail"))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_the_ends_of_a_calibrated_merge_are_topk(method: str, metric: str, backend: str) -> None:
    data = two_models()
    fits = [
        fc.Calibrator(method, metric).fit(
            data[side][:400], **(judged(data, side) if method.startswith("odds") else {})
        )
        for side in ("old", "new")
    ]
    maps = [c.affine(data[f"query_{s}"]) for c, s in zip(fits, ("old", "new"), strict=True)]
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new")]
    named = dict(zip(("scale", "offset"), zip(*maps, strict=True), strict=True))
    for side, done in (
        ("old", torch.zeros(900, dtype=torch.bool)),
        ("new", torch.ones(900, dtype=torch.bool)),
    ):
        scores, ids = fc.mixed_topk(*arrays, done, 20, metric=metric, backend=backend, **named)
        plain, expected = fc.topk(data[f"query_{side}"], data[side], 20, metric=metric, backend=backend)
        assert torch.equal(ids, expected)
        scale, offset = maps[side == "new"]
        torch.testing.assert_close(scores, scale[:, None] * plain + offset[:, None], rtol=1e-6, atol=1e-5)
    labels = data["query_labels"], data["gallery_labels"]
    named_curve = {"metric": metric, "states": 5, "backend": backend}
    curve = fc.backfill_curve(*arrays, *labels, calibrators=tuple(fits), **named_curve)
    plain_curve = fc.backfill_curve(
        *arrays, data["query_labels"], data["gallery_labels"], metric=metric, states=5, backend=backend
    )
    assert torch.equal(curve.per_query.ap[[0, -1]], plain_curve.per_query.ap[[0, -1]])
    order = torch.randperm(900, generator=torch.Generator().manual_seed(0))
    done = torch.zeros(900, dtype=torch.bool)
    done[order[: 900 // 2]] = True
    _, ids = fc.mixed_topk(*arrays, done, 900, metric=metric, backend=backend, **named)
    right = data["gallery_labels"][ids] == data["query_labels"][:, None]
    place = torch.arange(1, 901, dtype=torch.float64)
    ap = (right * right.cumsum(1) / place).sum(1) / right.sum(1)
    torch.testing.assert_close(curve.per_query.ap[2], ap, rtol=1e-12, atol=1e-12)


def test_a_curve_of_tiny_galleries_has_pure_states() -> None:
    data = two_models(items=60, queries=5)
    fits = tuple(fc.Calibrator("zscore").fit(data[side]) for side in ("old", "new"))
    arrays = [data[k][:n] for k, n in (("query_old", 5), ("old", 3), ("query_new", 5), ("new", 3))]
    labels = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 1, 0])
    ours = fc.backfill_curve(*arrays, *labels, calibrators=fits, states=9)
    theirs = fc.backfill_curve(*arrays, *labels, states=9)
    pure = (ours.fraction == 0) | (ours.fraction == 1)
    assert torch.equal(ours.map[pure], theirs.map[pure]) and int(pure.sum()) > 2


def test_lists_of_other_engines_merge_like_one_search() -> None:
    data = two_models()
    done = torch.rand(900, generator=torch.Generator().manual_seed(1)) < 0.5
    fits = [fc.Calibrator("tail").fit(data[side][:500]) for side in ("old", "new")]
    maps = [c.affine(data[f"query_{s}"]) for c, s in zip(fits, ("old", "new"), strict=True)]
    scale, offset = zip(*maps, strict=True)
    lists = []
    for side, counts in (("old", ~done), ("new", done)):
        rows = counts.nonzero()[:, 0]
        scores, ids = fc.topk(data[f"query_{side}"], data[side][rows], 30)
        lists.append((scores, rows[ids]))
    merged, ids = fc.merge_topk(lists, 30, scale=list(scale), offset=list(offset))
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new")]
    one, expected = fc.mixed_topk(*arrays, done, 30, scale=scale, offset=offset)
    torch.testing.assert_close(merged, one, rtol=1e-6, atol=1e-5)
    assert (ids == expected).float().mean() > 0.999
    with pytest.raises(ValueError, match=r"scale\[1\]"):
        fc.merge_topk(lists, 30, scale=[1.0, -scale[1]])
    with pytest.raises(ValueError, match="method"):
        fc.merge_topk(lists, 30, method="rrf", scale=[1.0, 1.0])
    with pytest.raises(ValueError, match="one entry for each of the 2"):
        fc.merge_topk(lists, 30, offset=[1.0])


def test_a_query_of_equal_scores_keeps_its_scale() -> None:
    background = torch.randn(60, 4)
    for method in ("zscore", "tail"):
        scale, offset = fc.Calibrator(method).fit(background).affine(torch.zeros(1, 4))
        assert scale.tolist() == [1.0] and offset.tolist() == [0.0]
    shifted = torch.cat([torch.randn(60, 3), torch.full((60, 1), 5.0)], 1)
    query = torch.tensor([[0.0, 0.0, 0.0, 2.0]])
    for method in ("zscore", "tail"):
        scale, offset = fc.Calibrator(method, "ip").fit(shifted).affine(query)
        assert scale.tolist() == [1.0] and offset.tolist() == pytest.approx([-10.0])


def test_what_is_refused_and_what_falls_back() -> None:
    data = two_models()
    sample = data["old"][:200]
    with pytest.raises(ValueError, match=r"at least 50 rows.*got 49"):
        fc.Calibrator("zscore").fit(sample[:49])
    with pytest.raises(ValueError, match="all rows are equal"):
        fc.Calibrator("tail").fit(torch.ones(60, 4))
    with pytest.raises(ValueError, match="row 3 holds NaN"):
        bad = sample.clone()
        bad[3, 0] = torch.nan
        fc.Calibrator("zscore").fit(bad)
    with pytest.raises(ValueError, match="`query` must be given"):
        fc.Calibrator("odds").fit(sample)
    with pytest.raises(ValueError, match="relevant items"):
        fc.Calibrator("odds").fit(sample, **(judged(data, "old") | {"query_labels": torch.full((120,), 99)}))
    with pytest.raises(ValueError, match="columns"):
        fc.Calibrator("odds").fit(sample, **judged(data, "new"))
    with pytest.raises(ValueError, match="`fit` must be called"):
        fc.Calibrator("zscore").affine(sample)
    fitted = fc.Calibrator("zscore").fit(sample)
    with pytest.raises(ValueError, match="`query` must have the 10 columns"):
        fitted.affine(data["query_new"])
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new", "query_labels", "gallery_labels")]
    other = fc.Calibrator("zscore").fit(data["new"])
    with pytest.raises(
        ValueError, match=r"`query_new` was fitted for the metric 'cosine', not 'l2'|`query_old`"
    ):
        fc.backfill_curve(*arrays, metric="l2", calibrators=(fitted, other))
    with pytest.raises(ValueError, match="`query_new` must have the 10 columns"):
        fc.backfill_curve(*arrays, calibrators=(fitted, fitted))
    with pytest.raises(ValueError, match="one method"):
        fc.backfill_curve(*arrays, calibrators=(fitted, fc.Calibrator("tail").fit(data["new"])))
    with pytest.warns(UserWarning, match='"odds" falls back to "zscore"'):
        few = fc.Calibrator("odds").fit(
            sample, query=data["query_old"], gallery=data["old"], relevance=fc.Relevance([0, 1], [3, 4])
        )
    worst = reference.scores(data["query_old"], data["old"], "cosine").topk(60, largest=False).indices
    turned = fc.Relevance(torch.arange(120).repeat_interleave(60), worst.flatten())
    with pytest.warns(UserWarning, match=r"fall.* back"):
        fc.Calibrator("odds").fit(sample, query=data["query_old"], gallery=data["old"], relevance=turned)
    whole = fc.Calibrator("odds").fit(data["new"][:300], **judged(data, "new"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        together = fc.backfill_curve(*arrays, calibrators=(few, whole), states=3)
    plain = (fitted, fc.Calibrator("zscore").fit(data["new"][:300]))
    assert torch.equal(together.map, fc.backfill_curve(*arrays, calibrators=plain, states=3).map)


def test_scales_of_a_mixed_search_are_checked_by_name() -> None:
    data = two_models(items=60, queries=4)
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new")]
    done = torch.arange(60) % 2 == 0
    one = torch.ones(4)
    for named, match in (
        ({"scale": (one, torch.ones(3))}, r"`scale\[1\]` must have one number per query, \[4\]"),
        ({"offset": (one, one * torch.nan)}, r"`offset\[1\]` must be finite"),
        ({"scale": (one,)}, "must be a pair"),
        ({"blend": 1.5}, "`blend`"),
        ({"both": torch.ones(5, dtype=torch.bool)}, "`both`"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            fc.mixed_topk(*arrays, done, 3, **named)
    found = fc.mixed_topk(*(x.numpy() for x in arrays), done.numpy(), 3, scale=(one.numpy() * 2, 2.0))
    scalar = fc.mixed_topk(*arrays, done, 3, scale=(2.0, 2.0))
    assert np.array_equal(found[0], scalar[0].numpy()) and np.array_equal(found[1], scalar[1].numpy())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("blend", (0.0, 0.3, 1.0))
@pytest.mark.parametrize("backend", ("auto", "reference"))
def test_items_with_both_vectors_score_a_blend(metric: str, blend: float, backend: str) -> None:
    data = two_models(items=300, queries=8)
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new")]
    arrays[1][5], arrays[3][6] = 0, 0  # zero halves
    arrays[0][2] = 0
    kind = torch.arange(300) % 3
    scale, offset = (torch.rand(8) + 0.2, torch.rand(8) + 0.2), (torch.randn(8), torch.randn(8))
    if metric == "l2":
        with (
            pytest.raises(ValueError, match="no distance of one vector")
            if 0 < blend < 1
            else warnings.catch_warnings()
        ):
            fc.mixed_topk(*arrays, kind == 1, 9, metric=metric, scale=scale, both=kind == 2, blend=blend)
        scale = (0.7, 1.9)
    t = [
        reference.mapped(reference.scores(*arrays[2 * s : 2 * s + 2], metric), scale[s], offset[s])
        for s in (0, 1)
    ]
    table = torch.where(kind == 1, t[1], t[0])
    table = torch.where(kind == 2, (1 - blend) * t[0] + blend * t[1], table)
    named = {"metric": metric, "scale": scale, "offset": offset, "both": kind == 2, "blend": blend}
    arrays[1][kind == 1], arrays[3][kind == 0] = torch.nan, torch.nan  # never read
    scores, ids = fc.mixed_topk(*arrays, kind == 1, 300, backend=backend, **named)
    torch.testing.assert_close(scores, table.gather(1, ids), rtol=2e-5, atol=2e-5 * float(table.abs().max()))
    torch.testing.assert_close(scores, table.sort(dim=1, descending=True).values, rtol=2e-5, atol=2e-4)
    if blend in (0.0, 1.0):
        done = (kind == 1) | ((kind == 2) & (blend == 1))
        del named["both"], named["blend"]
        plain = fc.mixed_topk(*arrays, done, 300, backend=backend, **named)
        assert torch.equal(plain[0], scores) and torch.equal(plain[1], ids)


def test_the_choice_is_a_method_and_follows_the_measure() -> None:
    data = two_models()
    chosen = fc.choose_calibration(**data)
    assert chosen in ("zscore", "tail", "odds", "odds-tail")  # raw scores of these two are far apart
    areas = {}
    arrays = [data[k] for k in ("query_old", "old", "query_new", "new", "query_labels", "gallery_labels")]
    for method in ("none", "zscore", chosen):
        fits = None
        if method != "none":
            fits = tuple(
                fc.Calibrator(method).fit(
                    data[side][:500], **(judged(data, side) if method.startswith("odds") else {})
                )
                for side in ("old", "new")
            )
        areas[method] = fc.backfill_curve(*arrays, calibrators=fits, states=7).auc()
    assert areas[chosen] >= max(areas.values()) - 0.003 and areas[chosen] > areas["none"] + 0.01
    half = fc.choose_calibration(**data, rows=torch.arange(0, 900, 2), measure="ndcg@10")
    assert half in ("zscore", "tail", "odds", "odds-tail")
    with pytest.raises(ValueError, match="at least 20 judged"):
        fc.choose_calibration(
            **(data | {"query_labels": torch.where(torch.arange(120) < 9, data["query_labels"], -1)})
        )
    same = data | {"query_new": data["query_old"], "new": data["old"]}
    assert fc.choose_calibration(**same) in ("odds", "zscore")
