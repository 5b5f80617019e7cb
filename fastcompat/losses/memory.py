"""A first-in, first-out memory of past embeddings, as extra keys of a loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks


class MemoryQueue(nn.Module):
    """The last `size` embeddings with their labels and positions, oldest first, without gradient.

    `add` returns where the batch now sits, which is the `exclude` of a loss: no row meets itself::

        queue = fc.losses.MemoryQueue(8192, 128)
        own = queue.add(new, labels)
        loss = fc.functional.contrastive_loss(
            new, queue.embeddings, query_labels=labels, key_labels=queue.labels, exclude=own
        )

    With `positions` (numbers of the images in the data set) an image is in the queue once, with its newest
    embedding (the last row, if a batch holds it twice), and `find` tells where. Memory and time are linear
    in `size`; neither the queue nor a loss over it ever holds a table of batch times queue. The queue is part
    of the state_dict. After the cross-batch memory of Wang et al., CVPR 2020, arXiv 1912.06798
    (re-implementation).

    Args:
        size: how many embeddings to keep.
        dim: their width.

    Attributes:
        embeddings: [n, dim], n the number now held; float32 unless the module was moved to another dtype.
        labels: int64 [n].
        positions: int64 [n], -1 where none was given.
    """

    embeddings: Tensor
    labels: Tensor
    positions: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        _checks.positive_int("size", size)
        _checks.positive_int("dim", dim)
        self.size, self.dim = size, dim
        # On torch's default device, as a module's buffers are.
        device = torch.get_default_device()
        self.register_buffer("embeddings", torch.empty(0, dim, dtype=torch.float32, device=device))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64, device=device))
        self.register_buffer("positions", torch.empty(0, dtype=torch.int64, device=device))

    def __len__(self) -> int:
        return self.embeddings.shape[0]

    @torch.inference_mode(False)  # losses of other batches train against what is held
    @torch.no_grad()
    def add(self, embeddings: Tensor, labels: Tensor, positions: Tensor | None = None) -> Tensor:
        """Put a batch in, at the newest end; the oldest embeddings leave.

        Args:
            embeddings: [B, dim].
            labels: int64 [B].
            positions: int64 [B], numbers of the images; earlier embeddings of the same images leave too,
                those of the same batch included. A negative one matches nothing.

        Returns:
            int64 [B]: where each row's image now sits (rows of one image share a place), -1 for rows that a
            batch larger than the queue pushed out itself.

        Raises:
            ValueError, TypeError: arguments that do not fit.
        """
        _checks.embeddings("embeddings", embeddings, "queue.embeddings", self.embeddings)
        _checks.indices("labels", labels, "embeddings", embeddings)
        _checks.indices("positions", positions, "embeddings", embeddings, optional=True)
        held = (self.embeddings, self.labels, self.positions)
        row = torch.arange(len(embeddings), dtype=torch.int64, device=labels.device)
        if positions is None:
            arriving, place = (embeddings, labels, torch.full_like(labels, -1)), row
        else:
            stays = (self.positions < 0) | ~torch.isin(self.positions, positions)
            held = (self.embeddings[stays], self.labels[stays], self.positions[stays])
            newest = torch.where(positions < 0, row, _last(positions, positions))
            enters = newest == row
            arriving = (embeddings[enters], labels[enters], positions[enters])
            place = (enters.cumsum(0) - 1)[newest]
        # New tensors instead of writes in place: a loss of an earlier batch may still need its keys.
        joined = [
            torch.cat((old, new.to(old)))[-self.size :] for old, new in zip(held, arriving, strict=True)
        ]
        self.embeddings, self.labels, self.positions = joined
        return (place + len(self) - len(arriving[0])).clamp(min=-1)

    def find(self, positions: Tensor) -> Tensor:
        """Where the newest embedding of each image sits: int64 [B], -1 for images that are not held."""
        _checks.indices("positions", positions, "positions", positions)
        return torch.where(positions < 0, -1, _last(self.positions, positions))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        # The buffers are as long as the queue is full, so they take the saved length first.
        for name in ("embeddings", "labels", "positions"):
            saved, buffer = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None:
                rows = min(saved.shape[0], self.size)
                setattr(self, name, buffer.new_empty(rows, *buffer.shape[1:]))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _last(among: Tensor, wanted: Tensor) -> Tensor:
    """Where each of `wanted` [B] is found last `among` [n]: int64 [B], -1 for those that are not there."""
    if not len(among):
        return torch.full_like(wanted, -1)
    ordered, place = among.sort(stable=True)
    last = torch.searchsorted(ordered, wanted, right=True) - 1
    found = (last >= 0) & (ordered[last.clamp(min=0)] == wanted)
    return torch.where(found, place[last.clamp(min=0)], -1)
