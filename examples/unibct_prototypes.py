"""UniBCT's prototype refinement (Zhang et al., IJCAI 2022, arXiv 2203.01583; reconstructed).

Old features of one class are smoothed over the graph of the new features before their mean is taken: an old
outlier that the new model sees among its class is pulled in. The result goes into `prototype_loss`.

    python examples/unibct_prototypes.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fastcompat as fc


def refined_prototypes(
    old: Tensor, new: Tensor, labels: Tensor, classes: int, *, lam: float = 0.9, temperature: float = 0.05
) -> Tensor:
    """`P_c = normalize(mean[(1 - lam) (I - lam E)^-1 V_old])` over the samples of class c, [C, D_old].

    `E` is the row softmax of the cosines of the class's new features over `temperature`, with a zero
    diagonal. `old` [N, D_old], `new` [N, D_new], `labels` int64 [N], negative: left out. One small
    system per class; a class with one sample is that sample, a class without one is a zero row.
    """
    prototypes = old.new_zeros(classes, old.shape[1])
    for c in labels[labels >= 0].unique().tolist():
        v, x = F.normalize(old[labels == c]), F.normalize(new[labels == c])
        if len(v) > 1:
            e = (x @ x.T / temperature).fill_diagonal_(-torch.inf).softmax(1)
            v = (1 - lam) * torch.linalg.solve(torch.eye(len(v)).to(v) - lam * e, v)
        prototypes[c] = F.normalize(v.mean(0), dim=0)
    return prototypes


if __name__ == "__main__":
    torch.manual_seed(0)
    labels, truth = torch.arange(10).repeat_interleave(40), F.normalize(torch.randn(10, 32))
    new = truth[labels] + 0.05 * torch.randn(400, 32)
    wrong = torch.rand(400) < 0.3  # what the old model takes for another class, and the new one nearly so
    seen = torch.where(wrong, torch.randint(10, (400,)), labels)
    old = truth[seen] + 0.05 * torch.randn(400, 32)
    new = torch.where(wrong[:, None], 0.6 * new + 0.4 * truth[seen], new)
    for name, prototypes in (
        ("mean", fc.class_prototypes(old, labels, 10)),
        ("refined", refined_prototypes(old, new, labels, 10)),
    ):
        loss = fc.functional.prototype_loss(new, prototypes, labels)
        print(
            f"{name:8} cosine with the true centre {(prototypes * truth).sum(1).mean():.4f}, loss {loss:.4f}"
        )
