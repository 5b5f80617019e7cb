"""How far to trust the new model while both vectors are kept: a promise about lost queries."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _arrays


def bounded_blend(lost: Any, alpha: float, level: float = 0.95) -> int:
    """The largest blend under which, at this confidence, at most a share `alpha` of the queries is lost.

    ```
    weights 0 = w_0 < w_1 < ... are tested in this order while   U(lost_w, Q) <= alpha
    U(c, Q) = the level-quantile of Beta(c + 1, Q - c), 1 for c = Q
    ```
    U is the one-sided upper bound of Clopper and Pearson ("The use of confidence or fiducial limits
    illustrated in the case of the binomial", Biometrika 1934). Testing in a fixed order and stopping at the
    first that fails costs no correction for the number of tests (Learn then Test: Angelopoulos, Bates,
    Candes, Jordan and Lei, arXiv 2110.01052). Of calibration queries drawn at random from those served, in
    at most a share 1 - level of draws does the returned weight lose more than alpha of all of them.

    `lost[w, i]`: whether query i, whose first result is right in the old system, has a wrong one with weight
    w in `fastcompat.mixed_topk(both=, blend=w)`, in the state asked for; for a promise over the whole
    backfill, in any state (`backfill_curve(...).per_query.lost`).

    Args:
        lost: bool [W, Q], weights ascending; row 0 is the old system, which loses nothing.
        alpha: the share that may be lost, between 0 and 1.
        level: confidence, between 0 and 1.

    Returns:
        A row of `lost`; 0 if nothing more is certified, as with too few queries: none lost of 299 is just
        enough for alpha = 0.01 at 95 %.

    Raises:
        ValueError, TypeError: another shape or dtype, no weight or no query, losses in row 0, shares outside
            (0, 1).
    """
    table = np.asarray(_arrays.read("lost", lost))
    if table.dtype != np.bool_:
        raise TypeError(f"`lost` must be bool: got {table.dtype}; write `lost != 0`")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"`lost` must have the shape [weights, queries], at least one of each: got {list(table.shape)}"
        )
    for name, value in (("alpha", alpha), ("level", level)):
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating)) or not 0 < value < 1:
            raise ValueError(f"`{name}` must be between 0 and 1: got {value!r}")
    if table[0].any():
        raise ValueError(
            f"`lost` must begin with the old system, which loses no query: row 0 holds {int(table[0].sum())} "
            "losses; order the weights from 0 upwards"
        )
    queries, certified = table.shape[1], 0
    for w in range(1, len(table)):
        if not _certified(int(table[w].sum()), queries, float(alpha), float(level)):
            break
        certified = w
    return certified


def _certified(count: int, total: int, alpha: float, level: float) -> bool:
    """Whether Clopper and Pearson's upper bound is at most alpha.

    That is so where P(Binomial(total, alpha) <= count) <= 1 - level, a sum that needs no beta function.
    """
    if count >= total:
        return False
    k = np.arange(count + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, total + 1)))])  # of factorials
    choose = logs[total] - logs[k] - logs[total - k]
    terms = choose + k * np.log(alpha) + (total - k) * np.log1p(-alpha)
    top = terms.max()
    return bool(top + np.log(np.exp(terms - top).sum()) <= np.log1p(-level))
