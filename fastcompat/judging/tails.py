"""How many unseen items score above a bar in the new space: from a sample, and from every old score."""

from __future__ import annotations

import torch
from torch import Tensor

# Bins of the old score, as shares of the pooled sample: fine where the best items are.
BINS = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999)


class Tails:
    """Each query's distribution of new scores over the items whose new vector is unknown.

    New scores are standardised per query by the sample. Their distribution given the (standardised) old score
    is pooled over all queries, bin by bin of the old score; a query's own distribution is the mixture of the
    bins by how many unknown items fall into each, which the old scores say exactly. So a query with a crowd
    of near neighbours in the old space is expected to have one in the new space, and bars are resolved far
    beyond one sampled item, which stands for `N / M` of them.

    Args:
        new: [Q, M] new scores of the sample.
        old: [Q, M] standardised old scores of the same items.
        shares: [Q, bins] share of the unknown items in each bin between `edges`.
        edges: [bins - 1], ascending.
    """

    def __init__(self, new: Tensor, old: Tensor, shares: Tensor, edges: Tensor) -> None:
        new, self._shares = new.double(), shares
        self._mean, self._spread = new.mean(1, keepdim=True), _spread(new)
        z, of = (new - self._mean) / self._spread, torch.bucketize(old, edges)
        self._pools = [z[of == one].sort().values for one in range(len(edges) + 1)]

    def share_above(self, rows: Tensor, bars: Tensor) -> Tensor:
        """Expected share of the unknown items above the bars [B, P] of the queries in `rows` [B]."""
        z = ((bars.double() - self._mean[rows]) / self._spread[rows]).contiguous()
        share = torch.zeros_like(z)
        for pool, weight in zip(self._pools, self._shares[rows].unbind(1), strict=True):
            if len(pool):
                above = len(pool) - torch.searchsorted(pool, z, right=True)
                share += weight[:, None] * above.double() / len(pool)
        return share.clamp(max=1)


def _spread(new: Tensor) -> Tensor:
    """Standard deviation of each row [Q, 1], drawn towards that of all rows by how noisy it is."""
    spread = new.std(1, keepdim=True).clamp(min=1e-12)
    if len(new) < 3:
        return spread
    fourth = (((new - new.mean(1, keepdim=True)) / spread) ** 4).mean(1)
    noise = ((fourth - 1) / (4 * new.shape[1])).mean()  # variance of the log of a standard deviation
    logs = spread.log()
    own = (1 - noise / logs.var().clamp(min=1e-30)).clamp(0, 1)
    shrunk: Tensor = (logs.mean() + own * (logs - logs.mean())).exp()
    return shrunk
