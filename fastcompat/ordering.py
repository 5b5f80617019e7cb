"""Which items to backfill first, judged from what is stored: no image is needed."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _inputs, _search, reference
from . import _loss_parts as parts
from .functional import Array
from .functional.engine import row_stats
from .reference import Segment, SoftmaxProblem

_ROWS = 4096  # at a time


@torch.inference_mode(False)  # the entropy needs a derivative
@torch.no_grad()
def uncertainty(
    features: Array,
    class_weight: Array,
    *,
    kind: str = "entropy",
    temperature: float | Tensor = 0.07,
    backend: str = "auto",
) -> Array:
    """How unsure the old model is of each stored feature; backfill the most uncertain items first.

    With `p = softmax over c of <f^, w^_c> / temperature`, sorted `p(1) >= p(2) >= ...`:

    ```
    "least_confidence": 1 - p(1)
    "margin":           1 - (p(1) - p(2))
    "entropy":          - sum over c of p_c log p_c
    ```
    Zhang et al., "Hot-Refresh Model Upgrades with Regression-Alleviating Compatible Training", ICLR 2022,
    arXiv 2201.09724 (the paper orders by uncertainty; which one is reconstructed). The order itself::

        scores = fc.uncertainty(old, fc.class_prototypes(old_train, labels, num_classes))
        order = scores.argsort(descending=True, stable=True)      # for backfill_curve(..., order=order)

    There is no [N, C] matrix: with `t` the best class and Z the log-sum-exp of the others, `1 - p(1) =
    sigmoid(Z - z_t)`, which does not cancel for very certain items, and `H = h(p(1)) + (1 - p(1)) (Z - <f^,
    dZ/df^>)`, h being the entropy of two outcomes.

    Args:
        features: [N, D], those stored in the gallery; what `fastcompat.topk` takes.
        class_weight: [C, D], the old classifier's weight or class prototypes (a zero row is a class too, with
            cosine 0 to everything: leave empty classes out). Both sides are L2-normalised here.
        kind: "entropy", "margin" or "least_confidence".
        temperature: above 0. The native kernels' cosines are float32, which entropies see below 1e-3; the
            reference computes in float64.
        backend: "auto", "native" or "reference".

    Returns:
        float32 [N] (float64 for float64 inputs), a tensor if `features` is one, else a NumPy array; higher =
        backfill first.

    Raises:
        ValueError, TypeError: arguments that do not fit; no class; NaN or inf, naming the first bad row.
    """
    _checks.choice("kind", kind, ("least_confidence", "margin", "entropy"))
    x, weight = _inputs.matrix("features", features), _inputs.matrix("class_weight", class_weight)
    x, weight = _inputs.beside(x, features, weight), _inputs.beside(weight, class_weight, x)
    _checks.embeddings("class_weight", weight, "features", x)
    if not len(weight):
        raise ValueError("`class_weight` must have at least 1 row: got 0")
    scale = parts.inverse_temperature(temperature, "features", x)
    try:
        reference.refuse_nonfinite(x, weight)
    except _checks.NonFiniteError as error:
        _checks.refuse_nonfinite(error, (("features", "class_weight"),))
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    native = _checks.takes_native(backend, weight.to(dtype))
    wide = dtype if native else torch.float64
    unit = parts.normalised(weight.to(wide))
    keys = torch.cat([unit, -torch.ones_like(unit[:, :1])], 1)  # [C, D + 1]
    blocks = [
        _uncertainty(parts.normalised(block.to(wide)), keys, kind, scale, native).to(dtype)
        for block in torch.split(x, _ROWS)
    ]
    result: Array = _checks.give_back((torch.cat(blocks),), features)[0]
    return result


def _uncertainty(query: Tensor, keys: Tensor, kind: str, scale: float | Tensor, native: bool) -> Tensor:
    """Of unit rows [B, D]; the keys' last column is -1.

    Logits are taken below the best one, `(<f^, w^_c> - <f^, w^_t>) / temperature`: of a small temperature the
    logits themselves are so large that nothing is left of their differences.
    """
    best, ids = _search.topk([Segment(query, keys[:, :-1])], 2, "ip", native=native)
    query = torch.cat([query, best[:, :1].to(query.dtype)], 1)
    with torch.enable_grad():
        query.requires_grad_(kind == "entropy")
        neg, pos, *_ = row_stats(native, SoftmaxProblem(query, keys, scale, positive=ids[:, 0]))
        mean = torch.autograd.grad(neg.sum(), query)[0] if kind == "entropy" else query  # [B, D]
    rest = torch.sigmoid(neg - pos)  # 1 - p(1)
    if kind == "least_confidence":
        return rest
    if kind == "margin":
        second: Tensor = scale * (best[:, 1] - best[:, 0]) - torch.logaddexp(
            neg, pos
        )  # log p(2), -inf of one class alone
        return rest + second.exp()
    most = math.log(max(1, len(keys) - 1))
    among_others = (neg - (query.double() * mean).sum(1)).clamp(0, most)  # of one class alone: -inf
    two: Tensor = torch.special.entr(rest) + (1 - rest) * F.softplus(neg - pos)
    return two + rest * among_others
