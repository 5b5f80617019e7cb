"""How the scores of a query are spread over a gallery, told from a sample of it: the background."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FEWEST = 50  # rows that say something about the 95 % quantile
QUANTILE = 0.95
EQUAL = 1e-6  # a spread below this part of the size of the scores is rounding


class Background:
    """A sample of one space's gallery, as linear features f of the items and g of the queries.

    A score is `<g(query), f(item)> + c(query)`: cosine and ip with f = item, l2 (minus the squared distance)
    with f = (2 item, -|item|^2), g = (query, 1), c = -|query|^2, all less the sample's mean, which changes no
    distance.
    """

    def __init__(self, sample: Tensor, metric: str) -> None:
        self.metric = metric
        x = sample.double()
        self.shift = x.mean(0) if metric == "l2" else None
        items = self._items(x)  # [M, F]
        self.mean = items.mean(0)
        centred = items - self.mean
        self.covariance = centred.T @ centred / len(x)
        self.centred = centred.float()  # float32 keeps the differences of scores, not the scores
        self.size = float(items.square().sum(1).mean().sqrt())
        self.constant = float(self.covariance.diagonal().sum().sqrt()) <= EQUAL * self.size

    def _items(self, x: Tensor) -> Tensor:
        if self.shift is not None:
            x = x - self.shift
            return torch.cat([2 * x, -x.square().sum(1, keepdim=True)], 1)
        return F.normalize(x, eps=1e-300) if self.metric == "cosine" else x

    def _queries(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """g [B, F] and c [B]."""
        q = query.double()
        if self.shift is not None:
            q = q - self.shift
            return F.pad(q, (0, 1), value=1.0), -q.square().sum(1)
        q = F.normalize(q, eps=1e-300) if self.metric == "cosine" else q
        return q, q.new_zeros(len(q))

    def zscore(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset [B] of (s - mean) / standard deviation."""
        g, c = self._queries(query)
        mean = g @ self.mean + c
        deviation = ((g @ self.covariance) * g).sum(1).clamp(min=0).sqrt()
        return self._affine(g, mean, deviation, mean)

    def tail(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset [B] of (s - u) / b: u the 95 % quantile, b the mean excess above it."""
        g, c = self._queries(query)
        scores = g.float() @ self.centred.T  # [B, M], less their mean
        count = scores.shape[1]
        place = QUANTILE * (count - 1)
        top = scores.topk(
            count - int(place), dim=1
        ).values.double()  # best first, down to the quantile's left end
        left, right = top[:, -1], top[:, -2]
        u = left + (right - left) * (place - int(place))
        above = top > u[:, None]
        excess = torch.where(above, top - u[:, None], 0).sum(1) / above.sum(1).clamp(min=1)
        mean = g @ self.mean + c
        return self._affine(g, u + mean, excess, mean)

    def _affine(self, g: Tensor, middle: Tensor, spread: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Where the scores of a query are all equal: scale 1, offset -mean."""
        equal = ~(spread > EQUAL * self.size * g.norm(dim=1))
        scale = torch.where(equal, 1.0, 1 / spread.masked_fill(equal, 1.0))
        return scale, torch.where(equal, -mean, -middle * scale)
