"""Promises about lost queries, SLERP, demand and ridge, against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastcompat as fc


def test_the_bound_is_that_of_scipy() -> None:
    beta = pytest.importorskip("scipy.stats").beta
    for total in (1, 20, 299, 298, 5000):
        for count in sorted({0, 1, total // 50, total // 10, total}):
            upper = 1.0 if count == total else beta.ppf(0.95, count + 1, total - count)
            lost = np.zeros((2, total), dtype=bool)
            lost[1, :count] = True
            for alpha in (0.01, 0.05, 0.2):
                if abs(upper - alpha) > 1e-12:
                    assert fc.bounded_blend(lost, alpha) == int(upper <= alpha)


def test_the_promise_holds_over_a_thousand_draws() -> None:
    random = np.random.default_rng(0)
    pool, alpha, weights = 20_000, 0.05, np.linspace(0, 1, 11)
    # Queries are lost from a weight of their own on; most weights lose close to alpha, where it is hardest.
    threshold = random.beta(3.0, 1.2, pool) * 2.2
    lost = threshold < weights[:, None]
    share = lost.mean(1)
    assert share[0] == 0 and (np.abs(share - alpha) < 0.03).sum() >= 2 and share[-1] > 2 * alpha
    chosen = []
    for _ in range(1000):
        some = random.integers(0, pool, 400)
        chosen.append(fc.bounded_blend(lost[:, some], alpha))
    assert (share[chosen] > alpha).mean() <= 0.06
    assert np.mean(chosen) > 1  # and it is no promise of doing nothing


def test_the_first_failure_ends_the_testing() -> None:
    lost = np.zeros((4, 400), dtype=bool)
    lost[2, :200] = True
    assert fc.bounded_blend(lost, 0.05) == 1
    assert fc.bounded_blend(torch.from_numpy(lost), 0.05) == 1
    assert fc.bounded_blend(lost[:, :50], 0.05) == 0  # too few queries to promise anything
    for value, alpha, match in (
        (lost[::-1][1:], 0.05, "row 0 holds 200"),
        (lost[0], 0.05, "shape"),
        (lost, 1.5, "`alpha`"),
        (lost[:, :0], 0.05, "at least one"),
    ):
        with pytest.raises(ValueError, match=match):
            fc.bounded_blend(value, alpha)
    with pytest.raises(TypeError, match="bool"):
        fc.bounded_blend(lost.astype(int), 0.05)


def test_slerp_goes_along_the_great_circle() -> None:
    a, b = torch.randn(40, 9), torch.randn(40, 9) * 7
    unit_a, unit_b = (torch.nn.functional.normalize(x.double()) for x in (a, b))
    angle = torch.acos((unit_a * unit_b).sum(1))
    for alpha in (0.0, 0.2, 0.5, 1.0):
        c = fc.slerp(a, b, alpha).double()
        torch.testing.assert_close(c.norm(dim=1), torch.ones(40, dtype=torch.float64), atol=1e-6, rtol=0)
        torch.testing.assert_close(
            torch.acos((c * unit_a).sum(1).clamp(-1, 1)), alpha * angle, atol=2e-3, rtol=0
        )
        torch.testing.assert_close(
            torch.acos((c * unit_b).sum(1).clamp(-1, 1)), (1 - alpha) * angle, atol=2e-3, rtol=0
        )
    torch.testing.assert_close(fc.slerp(a, a * 3, 0.7), unit_a.float())
    torch.testing.assert_close(fc.slerp(a, a * (1 + 1e-7), 0.3), unit_a.float())
    torch.testing.assert_close(fc.slerp(a, -a, 0.7), -unit_a.float())
    assert torch.equal(fc.slerp(torch.zeros(2, 3), torch.eye(2, 3), 0.4), torch.eye(2, 3))
    assert isinstance(fc.slerp(a.numpy(), b.numpy(), 0.5), np.ndarray)
    with pytest.raises(ValueError, match="`alpha`"):
        fc.slerp(a, b, 1.1)
    with pytest.raises(ValueError, match="`mapped_query`"):
        fc.slerp(a, b[:, :5], 0.5)


def test_demand_counts_places() -> None:
    log, gallery = torch.randn(30, 6), torch.randn(200, 6)
    _, ids = fc.topk(log, gallery, 10, metric="l2")
    truth = np.zeros(200)
    for row in ids.tolist():
        for place, item in enumerate(row):
            truth[item] += 1 / np.log2(place + 2)
    found = fc.demand(log.numpy(), gallery.numpy(), k=10, metric="l2")
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    np.testing.assert_allclose(found, truth, rtol=1e-6)
    assert fc.demand(log, gallery, k=500).min() > 0  # deeper than the gallery: every item is somewhere


@pytest.mark.parametrize("shape", ((400, 20, 12), (30, 60, 5), (50, 1, 3)))
def test_ridge_is_scikit_learns_leave_one_out(shape: tuple[int, int, int]) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows, d_src, d_dst = shape
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, d_src)) + 3
    y = x @ random.normal(size=(d_src, d_dst)) + 2 * random.normal(size=(rows, d_dst)) - 1
    ridge = fc.Ridge().fit(x, y)
    sizes = np.linalg.svd(x - x.mean(0), compute_uv=False)
    grid = [10.0**e * np.mean(sizes**2) for e in range(-6, 3)]
    errors = []
    for l2 in grid:  # the definition: leave each row out, fit, predict it
        model = linear_model.Ridge(alpha=l2)
        errors.append(
            sum(
                float(
                    (
                        (model.fit(np.delete(x, i, 0), np.delete(y, i, 0)).predict(x[i : i + 1]) - y[i]) ** 2
                    ).sum()
                )
                for i in range(0, rows, 1 if rows < 100 else 7)
            )
        )
    if rows < 100:
        assert ridge.regularisation == pytest.approx(grid[int(np.argmin(errors))])
    theirs = linear_model.Ridge(alpha=ridge.regularisation).fit(x, y)
    np.testing.assert_allclose(ridge.transform(x.astype(np.float32)), theirs.predict(x), rtol=1e-4, atol=1e-3)


def test_ridge_is_kept_in_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    src, dst = torch.randn(50, 6), torch.randn(50, 4)
    ridge = fc.Ridge().fit(src, dst)
    ridge.save(tmp_path / "ridge.pt")
    assert torch.equal(fc.Ridge.load(tmp_path / "ridge.pt").transform(src), ridge.transform(src))
    with pytest.raises(ValueError, match="6 columns"):
        ridge.transform(dst)
    with pytest.raises(ValueError, match="at least 2 rows"):
        fc.Ridge().fit(src[:1], dst[:1])
    with pytest.raises(ValueError, match="must be called"):
        fc.Ridge().transform(src)
    constant = fc.Ridge().fit(torch.ones(10, 3), torch.arange(20.0).reshape(10, 2))
    torch.testing.assert_close(constant.transform(torch.ones(1, 3)), torch.tensor([[9.0, 10.0]]))
