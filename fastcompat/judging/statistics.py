"""How sure a difference is: intervals and tests over queries."""

from __future__ import annotations

import math
import warnings
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .. import _checks
from .._arrays import read

Floats = npt.NDArray[np.float64]
_ENTRIES = 2**22  # of one block of resamples


class Comparison(NamedTuple):
    """What `compare` returns: the mean difference, its interval, and the p-value of no difference."""

    difference: float
    low: float
    high: float
    p: float


def compare(a: Any, b: Any, *, samples: int = 10_000, level: float = 0.95, seed: int = 0) -> Comparison:
    """Compare two systems on the same queries: `mean(a - b)` with an interval, and a test.

    The interval is the percentile bootstrap over queries (Efron 1979): `samples` times as many queries are
    drawn with replacement, both systems' figures together, and the middle `level` of the mean differences is
    taken. The p-value is the two-sided paired randomisation test (Fisher 1935; Smucker et al., CIKM 2007):
    the share of sign patterns of the differences whose mean is at least as far from 0, over all of them where
    there are at most `samples`, else over `samples` random ones and the observed one. For two bool arrays
    (right or wrong at the top) all patterns are counted exactly, which is McNemar's exact test::

        curve = fc.backfill_curve(...)
        middle = fc.compare(curve.per_query.ap[11], curve.per_query.ap[0])     # above 0: state 11 is better
        top1 = fc.compare(curve.per_query.top1[-1], curve.per_query.top1[0])

    A query that is NaN on both sides was skipped and is left out. A single query has no interval: `low`,
    `high` and `p` are NaN, with a warning.

    Args:
        a: [Q] figures of one system, bool or floating point; a tensor or an array.
        b: [Q] figures of the other.
        samples: number of resamples and of sign patterns.
        level: coverage of the interval, between 0 and 1.
        seed: seed of both.

    Raises:
        ValueError, TypeError: arguments that do not fit; a figure that is NaN on one side only; no query.
    """
    samples, seed = _checks.positive_int("samples", samples), _checks.whole("seed", seed)
    level = _level(level)
    (x, flags_a), (y, flags_b) = _figures("a", a), _figures("b", b)
    if len(x) != len(y):
        raise ValueError(f"`b` must have one entry per entry of `a`: got {len(y)} and {len(x)}")
    odd = np.flatnonzero(np.isnan(x) != np.isnan(y))
    if len(odd):
        raise ValueError(
            f"`a` and `b` must be figures of the same queries: query {odd[0]} is NaN in one of them only"
        )
    difference = (x - y)[~np.isnan(x)]
    if not len(difference):
        raise ValueError("`a` must hold at least 1 figure that is not NaN: got none")
    observed = float(difference.mean())
    if len(difference) == 1:
        warnings.warn("one query has no interval and no test: give more queries", stacklevel=2)
        return Comparison(observed, math.nan, math.nan, math.nan)
    random = np.random.default_rng(seed)
    low, high = interval(resampled_means(difference, samples, random), level)
    if flags_a and flags_b:
        p = _mcnemar(int((difference > 0).sum()), int((difference < 0).sum()))
    else:
        p = _randomisation(difference, samples, random)
    return Comparison(observed, low, high, p)


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, such as the share of queries lost.

    With `z` the two-sided normal quantile and `s = count / total`::

        (s + z^2 / 2 total -+ z sqrt(s (1 - s) / total + z^2 / 4 total^2)) / (1 + z^2 / total)

    It stays within 0 and 1 and does not shrink to a point at 0 of n: `fc.wilson(0, 200)` is (0, 0.019).

    Args:
        count: how many of them, from 0 to `total`.
        total: of how many; of 0 nothing is known, which gives (0, 1).
        level: coverage, between 0 and 1.

    Raises:
        ValueError, TypeError: counts that do not fit.
    """
    count, total, level = _checks.whole("count", count), _checks.whole("total", total), _level(level)
    if not 0 <= count <= total:
        raise ValueError(f"`count` must be from 0 to `total`: got {count} of {total}")
    if not total:
        return 0.0, 1.0
    z2, share = NormalDist().inv_cdf((1 + level) / 2) ** 2, count / total
    middle = share + z2 / (2 * total)
    half = math.sqrt(z2 * (share * (1 - share) / total + z2 / (4 * total**2)))
    low, high = ((middle + sign * half) / (1 + z2 / total) for sign in (-1, 1))
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


def interval(values: Floats, level: float) -> tuple[float, float]:
    """The middle `level` of `values`."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_means(values: Floats, samples: int, random: np.random.Generator) -> Floats:
    """Means of `samples` draws of all of `values` [Q] with replacement."""
    step = max(1, _ENTRIES // len(values))
    blocks = [
        values[random.integers(len(values), size=(min(step, samples - first), len(values)))].mean(1)
        for first in range(0, samples, step)
    ]
    return np.concatenate(blocks)


def _randomisation(difference: Floats, samples: int, random: np.random.Generator) -> float:
    difference = difference[difference != 0]  # a sign changes nothing there
    count, total = len(difference), difference.sum()
    bar = abs(total) - 1e-12 * np.abs(difference).sum()  # of equal sums no rounding may decide
    if count <= 40 and 2**count <= samples:
        signs = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float((np.abs(2 * (signs @ difference) - total) >= bar).mean())
    step, beyond = max(1, _ENTRIES // count), 1
    for first in range(0, samples, step):
        rows = min(step, samples - first)
        bits = np.frombuffer(random.bytes(rows * -(-count // 8)), dtype=np.uint8).reshape(rows, -1)
        drawn = np.unpackbits(bits, axis=1, count=count)
        beyond += int((np.abs(2 * (drawn @ difference) - total) >= bar).sum())
    return beyond / (samples + 1)


def _mcnemar(more: int, fewer: int) -> float:
    """Two-sided exact binomial test of `more` against `fewer` changes."""
    count, least = more + fewer, min(more, fewer)
    if more == fewer:
        return 1.0
    # log of the count over k, for k = 0 .. least
    steps = np.log(np.arange(count, count - least, -1.0)) - np.log(np.arange(1.0, least + 1))
    logs = np.concatenate([[0.0], np.cumsum(steps)]) - count * math.log(2)
    return float(min(1.0, 2 * np.exp(logs).sum()))


def _figures(name: str, value: Any) -> tuple[Floats, bool]:
    """Figures [Q] as float64, and whether they are bool."""
    found = read(name, value)
    array = np.asarray(found.detach().cpu().double() if hasattr(found, "detach") else found)
    flags = str(found.dtype).removeprefix("torch.") == "bool"
    if array.dtype.kind not in "bfiu":
        raise TypeError(f"`{name}` must hold numbers: got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"`{name}` must have 1 dimension, one figure a query: got shape {list(array.shape)}")
    if np.isinf(array).any():
        raise ValueError(f"`{name}` must not hold inf: query {int(np.flatnonzero(np.isinf(array))[0])} does")
    return array.astype(np.float64), flags


def _level(level: object) -> float:
    if isinstance(level, bool) or not isinstance(level, (int, float, np.floating)):
        raise TypeError(f"`level` must be a number between 0 and 1: got {type(level).__name__}")
    if not 0 < level < 1:
        raise ValueError(f"`level` must be between 0 and 1, such as 0.95: got {level}")
    return float(level)
