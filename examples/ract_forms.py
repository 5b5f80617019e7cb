"""The triplet and the BCT form of RACT (Zhang et al., ICLR 2022, arXiv 2201.09724) on public pieces.

`fc.functional.ract_loss` is the contrastive form. Both forms here keep its idea, negatives from the new model
beside those from the old one, and never hold a table of logits.

    python examples/ract_forms.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc


def ract_triplet(new: Tensor, old: Tensor, labels: Tensor, *, margin: float = 0.8, k: int = 10) -> Tensor:
    """Mean of `[|n_i - o_i| - |n_i - x_j| + margin]_+` over the k hardest `x_j` of each bank.

    `new` and `old` [B, D] are normalised here; `x_j` are the old and the new embeddings with other labels.
    The search is detached; only the [B, k] pairs it found are computed with a gradient.
    """
    new, old = F.normalize(new), F.normalize(old.detach())
    itself = torch.arange(len(new))
    pull = (new - old).norm(dim=1)  # [B]
    hinges = []
    for keys in (old, new.detach()):
        _, ids = fc.topk(
            new.detach(), keys, k, query_labels=labels, key_labels=labels, exclude=itself
        )  # [B, k]
        push = (new[:, None] - keys[ids.clamp(min=0)]).norm(dim=2)
        hinges.append((pull[:, None] - push + margin).relu()[ids >= 0])
    return torch.cat(hinges).mean()


def ract_bct(new: Tensor, labels: Tensor, old_weight: Tensor, new_weight: Tensor) -> Tensor:
    """`CE([W_old n | W_new n without the true class], y)` with the target in the old block.

    `new` [B, D], `old_weight` and `new_weight` [C, D]. Two fused calls; their negatives share one logarithm.
    """
    to_old = fc.softmax_stats(new, old_weight.detach(), positive=labels)
    to_new = fc.softmax_stats(new, new_weight, exclude=labels)
    negatives = torch.logaddexp(to_old.neg_lse, to_new.neg_lse)  # [B]
    return F.softplus(negatives - to_old.pos_lse).mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    labels = torch.randint(10, (256,))
    old = F.normalize(torch.randn(10, 64))[labels] + 0.1 * torch.randn(256, 64)
    new = torch.randn(256, 64, requires_grad=True)
    classifiers = torch.randn(10, 64), torch.randn(10, 64)
    for name, loss in (
        ("triplet", ract_triplet(new, old, labels)),
        ("BCT", ract_bct(new, labels, *classifiers)),
    ):
        (grad,) = torch.autograd.grad(loss, new)
        print(f"{name:8} loss {loss:.3f}, gradient norm {grad.norm():.3f}")
