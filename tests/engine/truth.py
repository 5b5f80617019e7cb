"""An independent eager expression of the softmax statistics, and the accuracy rule of every test.

The rule: the kernel's error against float64 is at most twice that of the eager expression in the kernel's own
dtype, plus a floor of a few roundings of the largest intermediate number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import fastcompat as fc

EPSILON = 2.0**-23


@dataclass
class Problem:
    query: Tensor
    keys: Tensor
    scale: float | Tensor = 1.0
    bias: Tensor | None = None
    query_labels: Tensor | None = None
    key_labels: Tensor | None = None
    positive: Tensor | None = None
    exclude: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Problem:
        def moved(x):
            return x.detach().to(dtype) if isinstance(x, Tensor) else x

        return replace(
            self,
            query=moved(self.query),
            keys=moved(self.keys),
            scale=moved(self.scale),
            bias=moved(self.bias),
        )

    def fused(self, backend: str = "native") -> fc.SoftmaxStats:
        named = {name: value for name, value in vars(self).items() if name not in ("query", "keys")}
        return fc.softmax_stats(self.query, self.keys, **named, backend=backend)

    def members(self) -> tuple[Tensor, Tensor]:
        """Which pairs are positives and which are negatives, step by step as the interface states it."""
        rows, columns = len(self.query), len(self.keys)
        same = torch.zeros(rows, columns, dtype=torch.bool)
        if self.query_labels is not None:
            same = self.query_labels[:, None].eq(self.key_labels).logical_and(self.query_labels[:, None] >= 0)
        pos, neg = same.clone(), ~same
        if self.positive is not None:
            chosen = self.positive.ge(0).nonzero()[:, 0]
            pos[:] = False
            pos[chosen, self.positive[chosen]] = True
            neg[chosen, self.positive[chosen]] = False
        if self.exclude is not None:
            chosen = self.exclude.ge(0).nonzero()[:, 0]
            pos[chosen, self.exclude[chosen]] = neg[chosen, self.exclude[chosen]] = False
        return pos, neg

    def eager(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slow lines a user would write: all logits, masked, in the dtype of the embeddings."""
        z = self.scale * (self.query @ self.keys.T)
        if self.bias is not None:
            z = z + self.bias
        pos, neg = self.members()
        lse = [z.masked_fill(~mask, -torch.inf).logsumexp(1) for mask in (neg, pos)]
        return (*lse, z.masked_fill(~pos, 0).sum(1), pos.sum(1))

    def largest_logit(self) -> float:
        """A bound on the size of every product that is added up, and of every logit."""
        if not self.query.numel() or not self.keys.numel():
            return 1.0
        scale = abs(float(torch.as_tensor(self.scale).detach()))
        query, keys = (x.detach().double().norm(dim=1).max() for x in (self.query, self.keys))
        size = scale * query * keys
        return float(size + (0 if self.bias is None else self.bias.detach().abs().max()))


def labels(kind: str, rows: int, columns: int) -> dict[str, Tensor | None]:
    """Label sets: "none", "few" (dense positives), "many" (sparse), "single" (one class), "negative"."""
    if kind == "none":
        return {"query_labels": None, "key_labels": None}
    classes = {"few": 2, "many": max(2, columns // 2), "single": 1, "negative": 3}[kind]
    q, k = torch.randint(classes, (rows,)), torch.randint(classes, (columns,))
    if kind == "negative":
        q[::2], k[::3] = -1, -1
    return {"query_labels": q, "key_labels": k}


def check(
    ours: Tensor, eager: Tensor, truth: Tensor, floor: float, what: str, dtype: torch.dtype = torch.float32
) -> None:
    """The accuracy rule for one output; infinities must sit in the same places."""
    ours, eager, truth = ours.detach().double(), eager.detach().double(), truth.detach().double()
    assert ours.shape == truth.shape, what
    finite = truth.isfinite()
    assert torch.equal(ours[~finite], truth[~finite]), f"{what}: infinities differ"
    if not finite.any():
        return
    error = (ours - truth)[finite].abs().max().item()
    allowed = 2 * (eager - truth)[finite].abs().nan_to_num(0.0).max().item() + floor
    if truth.numel() == 1:  # one number alone may be exact by luck: allow the rounding that eager does to it
        allowed += torch.finfo(dtype).eps * truth.abs().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def check_stats(problem: Problem) -> fc.SoftmaxStats:
    """Compare the native statistics of a problem with float64."""
    ours, eager, truth = problem.fused(), problem.eager(), problem.to(torch.float64).eager()
    assert torch.equal(ours.pos_count, truth[3])
    floor = 2 * EPSILON * max(1.0, problem.largest_logit())
    count = max(1, int(truth[3].max())) if len(truth[3]) else 1
    for name, mine, theirs, exact in zip(ours._fields[:3], ours, eager, truth, strict=False):
        assert mine.dtype == torch.float32
        check(mine, theirs, exact, floor * (count if name == "pos_sum" else 1), name)
    return ours
