"""The one training loop of all transforms, on features that are already there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _checks
from .base import Transform, reset

STEPS, SMALLEST = 8, 64  # few rows: a batch shrinks to give an epoch this many steps, but not below this


@dataclass(frozen=True)
class Training:
    """How to train.

    Args:
        epochs: passes over the training rows, at most.
        batch_size: rows of a step; fewer for few rows, so that an epoch has 8 steps of at least 64 rows.
        lr: Adam's learning rate, after a warm-up over 1/16 of the steps and then falling like a cosine.
        weight_decay: Adam's.
        held_out: the share of the rows kept for early stopping, drawn at random; 0: none.
        patience: stop after so many epochs without a smaller held-out loss.
        seed: of the weights, the held-out rows and the order of the others.
        progress: show a tqdm bar (in a terminal).
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    held_out: float
    patience: int
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            _checks.positive_int(name, getattr(self, name))
        _checks.whole("seed", self.seed)
        if not self.lr > 0:
            raise ValueError(f"`lr` must be above 0: got {self.lr}")
        if not 0 <= self.held_out < 1:
            raise ValueError(
                f"`held_out` must be a share of the rows, 0 or more and below 1: got {self.held_out}"
            )

    def run(
        self, modules: Sequence[Transform], count: int, loss: Callable[[Tensor], Tensor], title: str
    ) -> list[tuple[float, float]]:
        """Train `modules` from anew on `loss(rows [B])` of `count` rows, and leave them in eval mode.

        BatchNorm keeps its statistics in the second half of the epochs. The weights of the epoch with the
        smallest held-out loss stay, or the last ones if nothing is held out. torch's random state is left
        alone.

        Returns:
            The mean training loss and the held-out loss (NaN: nothing held out) of every epoch.
        """
        stopping = round(count * self.held_out)
        if self.held_out and not stopping:
            stopping = 1
        if count - stopping < 2:
            raise ValueError(
                f"`old` must have at least 2 rows to train on: got {count}, {stopping} of them held out"
            )
        body = nn.ModuleList(modules)
        device = next(body.parameters()).device
        for module in modules:
            module.fitted = False  # until this ends: an interrupted training leaves the weights unusable
        with torch.enable_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            reset(body)
            order = torch.randperm(count, dtype=torch.int64, device="cpu")
            history = self._epochs(body, order[:stopping], order[stopping:], loss, title)
        for module in modules:
            module.fitted = True
        return history

    def _epochs(
        self,
        body: nn.Module,
        held_out: Tensor,
        rows: Tensor,
        loss: Callable[[Tensor], Tensor],
        title: str,
    ) -> list[tuple[float, float]]:
        batch = min(self.batch_size, max(SMALLEST, len(rows) // STEPS), len(rows))
        steps = len(rows) // batch
        adam = torch.optim.Adam(body.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, _warm_cosine(self.epochs * steps))
        best, best_state, best_epoch = math.inf, None, 0
        history: list[tuple[float, float]] = []
        from tqdm import tqdm  # here, so that losses and search need no tqdm

        bar = tqdm(range(self.epochs), desc=title, unit="epoch", disable=None if self.progress else True)
        for epoch in bar:
            body.train()
            if 2 * epoch >= self.epochs:
                _freeze_batch_norm(body)
            total = 0.0
            order = rows[torch.randperm(len(rows), dtype=torch.int64, device="cpu")]
            for step in range(steps):
                value = loss(order[step * batch : (step + 1) * batch])
                adam.zero_grad()
                torch.autograd.backward(value)
                adam.step()
                schedule.step()
                total += float(value.detach())
            body.eval()
            judged = _mean_loss(loss, held_out, batch)
            history.append((total / steps, judged))
            bar.set_postfix(loss=f"{total / steps:.4f}", held_out=f"{judged:.4f}")
            if judged < best:
                best, best_epoch = judged, epoch
                best_state = {name: value.clone() for name, value in body.state_dict().items()}
            elif len(held_out) and epoch - best_epoch >= self.patience:
                break
        bar.close()
        if best_state is not None:
            body.load_state_dict(best_state)
        return history


@torch.no_grad()
def _mean_loss(loss: Callable[[Tensor], Tensor], rows: Tensor, batch: int) -> float:
    if not len(rows):
        return math.nan
    return sum(len(part) * float(loss(part)) for part in torch.split(rows, batch)) / len(rows)


def _freeze_batch_norm(body: nn.Module) -> None:
    for module in body.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()


def _warm_cosine(total: int) -> Callable[[int], float]:
    warm = max(1, total // 16)
    return lambda step: min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
