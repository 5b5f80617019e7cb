"""Scores against float64, wherever the rows lie and however long they are; one score wherever a pair is met.

The rule: a score is the float64 value of its definition, off by at most (D + 8) roundings of its terms. With
l2 these are of the squared distance itself, never of the squared norms.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastcompat as fc
from fastcompat import _native, _ops, _search
from fastcompat.reference import Segment

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
METRICS = ("cosine", "ip", "l2")
LEAST, MOST = 2.0**-149, torch.finfo(torch.float32).max


def truth(query: Tensor, keys: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Scores [B, N] in float64, and how far from them a float32 score may be."""
    q, k = query.double(), keys.double()
    unit, dim = 2.0**-24, query.shape[1]
    if metric == "l2":
        exact = torch.stack([-(row - k).square().sum(1) for row in q])
        return exact, (dim + 8) * (unit * -exact + LEAST)
    norms = q.norm(dim=1)[:, None], k.norm(dim=1)
    if metric == "cosine":
        q, k = (x / x.norm(dim=1, keepdim=True).clamp(min=1e-300) for x in (q, k))
        norms = torch.ones(len(q), 1, dtype=torch.float64), torch.ones(len(k), dtype=torch.float64)
    return q @ k.T, (dim + 8) * unit * norms[0] * norms[1] + (dim + 8) * LEAST


def check(query: Tensor, keys: Tensor, metric: str, k: int, backend: str = "native") -> None:
    """`topk`'s scores are true, its keys the best but for rounding, and pairs and ranks agree bit for bit."""
    exact, slack = truth(query, keys, metric)
    scores, ids = fc.topk(query, keys, k, metric=metric, backend=backend)
    k = min(k, len(keys))
    scores, ids = scores[:, :k], ids[:, :k]
    assert (ids >= 0).all() and scores.isfinite().all()
    error = (scores.double() - exact.gather(1, ids)).abs()
    assert (error <= slack.gather(1, ids)).all()
    assert (
        (scores[:, :-1] > scores[:, 1:]) | ((scores[:, :-1] == scores[:, 1:]) & (ids[:, :-1] < ids[:, 1:]))
    ).all()
    left = (exact - slack).scatter(1, ids, -torch.inf)
    assert (left <= scores[:, -1:].double()).all()
    assert torch.equal(_search.pair_scores(query, keys, ids, metric, native=backend == "native"), scores)
    places = fc.ranks(query, keys, ids, metric=metric, backend=backend)
    assert torch.equal(places, torch.arange(k).expand(len(query), -1))


def spread(rows: int, dim: int, size: float, offset: float) -> Tensor:
    """Rows around a point `offset` from the origin in every direction, some of them twice."""
    x = size * (torch.randn(rows, dim) + offset)
    return x[torch.randint(rows, (rows,))] if rows > 3 else x


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("metric", METRICS)
@given(data=st.data())
def test_any_norm_offset_and_size(metric: str, backend: str, simd: str, data: st.DataObject) -> None:
    if backend == "reference" and simd != "generic":
        pytest.skip("the same on every instruction set")
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    dtype = data.draw(st.sampled_from(DTYPES if backend == "native" else (*DTYPES, torch.float64)))
    rows = data.draw(st.sampled_from((1, 8, 70, 300)))
    k = data.draw(st.sampled_from((1, 5, 10)))
    columns = data.draw(st.sampled_from((1, 31, 32 * k - 1, 32 * k, 32 * k + 97, 700)))
    dim = data.draw(st.sampled_from((1, 7, 32, 130)))
    offset = data.draw(st.sampled_from((0.0, 1e-3, 1.0, 30.0, 1e3, 1e6)))
    size = 10.0 ** data.draw(st.integers(-38, 38))
    other = size
    if metric != "l2":  # norms far from each other; no product of them is beyond float32
        other = 10.0 ** data.draw(st.integers(-38, 38))
        if metric == "ip" and size * other * (1 + offset) ** 2 * dim > 1e36:
            other = 1e34 / (size * (1 + offset) ** 2 * dim)
    elif size * (1 + offset) * dim**0.5 > 1e17:
        size = other = 1e15 / (1 + offset)
    least, most = {torch.float16: (1e-3, 10.0)}.get(dtype, (1e-45, 1e37))
    size, other = (min(max(x, least), most / (10 + offset)) for x in (size, other))
    query, keys = spread(rows, dim, size, offset).to(dtype), spread(columns, dim, other, offset).to(dtype)
    assert query.isfinite().all() and keys.isfinite().all()
    if metric == "cosine" and dtype == torch.float64:
        query, keys = query * 1e-200, keys * 1e200
        exact, _ = truth(query * 1e200, keys * 1e-200, metric)
        assert torch.allclose(
            fc.topk(query, keys, columns)[0], exact.sort(1, descending=True).values, atol=1e-12
        )
        return
    if dtype == torch.float64:
        return
    check(query, keys, metric, k, backend)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", (1024, 3072, 8192))
def test_long_vectors(dim: int, metric: str, dtype: torch.dtype) -> None:
    """The error is that of pieces of 256 terms, not of all D."""
    query, keys = torch.randn(9, dim).abs().to(dtype), torch.randn(330, dim).abs().to(dtype)
    exact, slack = truth(query, keys, metric)
    ids = torch.arange(330).expand(9, -1).contiguous()
    error = (_ops.pair_scores(query, keys, ids, metric).double() - exact).abs()
    assert (error <= (256 + dim / 256 + 8) / (dim + 8) * slack / 4).all()
    check(query, keys, metric, 10)


@pytest.mark.parametrize("queries", (1, 8, 70, 300))
@pytest.mark.parametrize("mean", (10.0, 1e3, 1e6))
def test_l2_far_from_the_origin_finds_the_neighbours(mean: float, queries: int) -> None:
    """Whole numbers, whose squared differences are exact: the ids are those of a stable sort."""
    query = mean + torch.randint(-140, 140, (queries, 24)).float()
    keys = mean + torch.randint(-140, 140, (900, 24)).float()
    exact = truth(query, keys, "l2")[0]
    expected, order = exact.sort(dim=1, descending=True, stable=True)
    for backend in ("native", "reference"):
        scores, ids = fc.topk(query, keys, 10, metric="l2", backend=backend)
        assert torch.equal(ids, order[:, :10]) and torch.equal(scores, expected[:, :10].float())
        assert torch.equal(
            fc.ranks(query, keys, ids, metric="l2", backend=backend), torch.arange(10).expand_as(ids)
        )
    labels = torch.arange(queries), order[:, 3].scatter(0, torch.tensor([0]), order[:1, 3])
    gallery_labels = torch.full((900,), -1)
    gallery_labels[labels[1]] = labels[0]
    own = gallery_labels[labels[1]]
    curves = [
        fc.backfill_curve(
            query, keys, query, keys, own, gallery_labels, metric="l2", states=3, backend=backend
        ).map
        for backend in ("native", "reference")
    ]
    assert torch.equal(*curves)


def test_mixed_segments_far_from_the_origin() -> None:
    query, keys = torch.randint(0, 64, (70, 16)).float() + 1e5, torch.randint(0, 64, (900, 16)).float() + 1e5
    done = torch.rand(900) < 0.4
    exact = truth(query, keys, "l2")[0]
    table = torch.where(done, 2 * exact - 64, 0.5 * exact).float()
    expected, order = table.sort(dim=1, descending=True, stable=True)
    for rows in (1, 8, 70):
        scores, ids = fc.mixed_topk(
            query[:rows],
            keys,
            query[:rows],
            keys,
            done,
            9,
            metric="l2",
            scale=(0.5, 2.0),
            offset=(0.0, -64.0),
        )
        assert torch.equal(ids, order[:rows, :9]) and torch.equal(scores, expected[:rows, :9])
    gallery = fc.MixedGallery(keys, keys, done, metric="l2", scale=(0.5, 2.0), offset=(0.0, -64.0))
    for _ in range(3):  # the third reads the kept form
        scores, ids = gallery.search(query, query, 9)
        assert torch.equal(ids, order[:, :9]) and torch.equal(scores, expected[:, :9])


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize(
    ("a", "b"), ((1e30, 1e8), (1e-30, 1e-30), (1e-42, 1e37), (1e37, 1e37), (1e-42, 1e-42))
)
@pytest.mark.parametrize("queries", (1, 8, 70))
def test_cosine_knows_directions_alone(a: float, b: float, queries: int, backend: str) -> None:
    query, keys = torch.randint(1, 9, (queries, 16)).float(), torch.randint(1, 9, (900, 16)).float()
    query, keys = (query.double() * a).float(), (keys.double() * b).float()
    check(query, keys, "cosine", 5, backend)
    check(query, torch.cat([keys, torch.zeros(1, 16), torch.randn(40, 16)]), "cosine", 5, backend)


@pytest.mark.parametrize("backend", ("native", "reference"))
@pytest.mark.parametrize("metric", ("ip", "l2"))
@pytest.mark.parametrize("queries", (1, 8, 70))
def test_scores_beyond_float32_are_refused(queries: int, metric: str, backend: str) -> None:
    query, keys = torch.ones(queries, 4), torch.randn(900, 4)
    query[queries // 2] = 3e38
    keys[7] = torch.tensor([3e38, 0.0, 0.0, 0.0]) * (-1 if metric == "l2" else 1)
    named = {"metric": metric, "backend": backend}
    k = 1 if metric == "ip" else 900
    with pytest.raises(
        ValueError,
        match=rf"`query` must have scores that float32 holds.*row {queries // 2 if metric == 'ip' else 0} ",
    ):
        fc.topk(query, keys, k, **named)
    with pytest.raises(ValueError, match="`query` must have scores that float32 holds"):
        fc.ranks(query, keys, torch.full((queries, 1), 7), **named)
    others = torch.full((queries,), 7)
    others[queries // 2] = -1
    few = fc.topk(query[: queries // 2], keys, 900, exclude=others[: queries // 2], **named)
    assert (few[1][:, :899] >= 0).all() and (few[1][:, 899] == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("queries", "columns"), ((0, 3), (2, 0), (0, 0), (2, 3), (70, 2000), (3, 2000)))
def test_no_columns(queries: int, columns: int, metric: str, dtype: torch.dtype) -> None:
    query, keys = torch.zeros(queries, 0, dtype=dtype), torch.zeros(columns, 0, dtype=dtype)
    for backend in ("native", "reference"):
        scores, ids = fc.topk(query, keys, 3, metric=metric, backend=backend)
        found = min(3, columns)
        assert (
            torch.equal(ids[:, :found], torch.arange(found).expand(queries, -1))
            and ids[:, found:].eq(-1).all()
        )
        assert scores[:, :found].eq(0).all() and scores[:, :found].signbit().logical_not().all()
        targets = torch.arange(found).expand(queries, -1)
        assert torch.equal(fc.ranks(query, keys, targets, metric=metric, backend=backend), targets)
    done = torch.arange(columns) % 2 > 0
    scores, ids = fc.mixed_topk(query, keys, query, keys, done, 3, metric=metric)
    assert torch.equal(ids[:, :found], torch.arange(found).expand(queries, -1))
    gallery = fc.MixedGallery(keys, keys, done, metric=metric)
    for _ in range(3):
        assert torch.equal(gallery.search(query, query, 3)[1], ids)


def test_no_columns_in_everything_else() -> None:
    query, keys, labels = torch.zeros(5, 0), torch.zeros(6, 0), torch.arange(6) % 2
    metrics = fc.retrieval_metrics(query, keys, labels[:5], labels, metric="l2")
    other = fc.retrieval_metrics(query, keys, labels[:5], labels, metric="l2", backend="reference")
    assert metrics.map == other.map
    curve = fc.backfill_curve(query, keys, query, keys, labels[:5], labels, states=3)
    assert torch.equal(
        curve.map,
        fc.backfill_curve(query, keys, query, keys, labels[:5], labels, states=3, backend="reference").map,
    )
    bias = torch.randn(6)
    for backend in ("native", "reference"):
        q, k = query.clone().requires_grad_(), keys.clone().requires_grad_()
        stats = fc.softmax_stats(q, k, bias=bias, query_labels=labels[:5], key_labels=labels, backend=backend)
        want = torch.stack([bias[labels != y].logsumexp(0) for y in labels[:5]])
        assert torch.allclose(stats.neg_lse, want)
        (stats.neg_lse.sum() + stats.pos_sum.sum()).backward()
        assert q.grad.shape == (5, 0) and k.grad.shape == (6, 0)
        q, k = torch.zeros(6, 0, requires_grad=True), torch.zeros(6, 0, requires_grad=True)
        # All logits are 0: a loss counts the keys.
        same = (labels[:, None] == labels).sum(1)
        log_odds = torch.log1p((6 - same) / same).mean()
        for normalize in (True, False):
            named = {"normalize": normalize, "backend": backend}
            loss = fc.functional.contrastive_loss(q, k, query_labels=labels, key_labels=labels, **named)
            assert torch.isclose(loss, log_odds)
            loss = loss + fc.functional.simclr_loss(q, k, **named)
            loss = loss + fc.functional.prototype_loss(q, k[:2], labels, **named)
            assert loss.isfinite()
            loss.backward()
        fc.functional.bct_loss(q, labels, keys, bias, backend=backend).backward()
        assert q.grad.shape == k.grad.shape == (6, 0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kept_form_is_as_small_as_it_is_said_to_be(dtype: torch.dtype, metric: str, simd: str) -> None:
    """At most half of float32 vectors and 20 bytes an item (AMX: D rounded up to 32), or nothing is kept."""
    for dim in (1, 8, 16, 32, 33, 64, 96, 100, 128, 130, 192, 256, 260, 768):
        keys = torch.randn(960, dim).to(dtype)
        kept = 4 * _native.pack(keys, None, metric).numel()
        step = 32 if simd == "amx" else 2
        row = 2 * ((dim + step - 1) // step * step) + 20
        centre = 4 * ((dim + 15) // 16 * 16) if metric == "l2" else 0
        assert kept in (0, centre + -(-960 // 96) * 96 * row, centre + -(-960 // 112) * 112 * row)
        assert kept <= 0.75 * 4 * 1008 * dim + centre
        if simd in ("avx2", "amx", "avx512bf16") and dtype == torch.float32 and dim >= 64 and dim % 32 == 0:
            assert kept > 0


def test_segments_around_centres_of_their_own() -> None:
    """Old and new vectors lie in different places: each is screened around its own centre."""
    query = [torch.randn(40, 24) + mean for mean in (1e4, -50.0)]
    keys = [torch.randn(700, 24) + mean for mean in (1e4, -50.0)]
    rows = torch.randperm(700).split(350)
    parts = [Segment(q, x, r.sort().values) for q, x, r in zip(query, keys, rows, strict=True)]
    table = torch.empty(40, 700)
    for part in parts:
        ids = part.rows.expand(40, -1).contiguous()
        table[:, part.rows] = _ops.pair_scores(part.query, part.keys, ids, "l2")
    expected, order = table.sort(dim=1, descending=True, stable=True)
    scores, ids = _search.topk(parts, 9, "l2", native=True, names=(("query", "keys"),) * 2)
    assert torch.equal(ids, order[:, :9]) and torch.equal(scores, expected[:, :9])
    assert np.isfinite(scores.numpy()).all()
