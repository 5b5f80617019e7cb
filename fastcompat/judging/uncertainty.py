"""Which items to backfill first, judged from what is stored: no image is needed."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import _checks, _inputs, _search
from .._normalise import normalised
from .._types import Array, ArrayLike, Backend, Segment, SoftmaxProblem
from ..functional import parts
from ..functional.engine import row_stats

_ROWS = 4096  # at a time
_PAIRS = 2**22  # of rows and classes at a time, in float64


@torch.no_grad()
def uncertainty(
    features: Array,
    class_weight: ArrayLike,
    *,
    kind: Literal["least_confidence", "margin", "entropy"] = "entropy",
    temperature: float | Tensor = 0.07,
    backend: Backend = "auto",
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

    There is no [N, C] matrix. With `t` the best class and Z the log-sum-exp of the others, `1 - p(1) =
    sigmoid(Z - z_t)`, which does not cancel for very certain items. With `d_c = z_c - z_t` and `R = sum over
    c != t of exp(d_c)`, `H = log(1 + R) - sum over c of exp(d_c) d_c / (1 + R)`, always in float64, some rows
    at a time: a small temperature magnifies every rounding of a cosine.

    Args:
        features: [N, D], those stored in the gallery; what `fastcompat.topk` takes.
        class_weight: [C, D], the old classifier's weight or class prototypes (a zero row is a class too, with
            cosine 0 to everything: leave empty classes out). Both sides are L2-normalised here.
        kind: "entropy", "margin" or "least_confidence".
        temperature: above 0.
        backend: "auto", "native" or "reference"; the same for entropies, which no kernel computes.

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
    _search.refuse_nonfinite(x, weight, ("features", "class_weight"))
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    native = _checks.use_native(backend, weight.to(dtype))
    wide = dtype if native and kind != "entropy" else torch.float64
    keys = normalised(weight.to(wide))
    rows = max(1, _PAIRS // len(keys)) if kind == "entropy" else _ROWS
    if kind != "entropy":
        keys = torch.cat([keys, keys.new_full((len(keys), 1), -1)], 1)  # [C, D + 1]

    def of(block: Tensor) -> Tensor:
        query = normalised(block.to(wide))
        if kind == "entropy":
            return _entropy(query, keys, scale).to(dtype)
        return _doubt(query, keys, kind, scale, native).to(dtype)

    blocks = [of(block) for block in torch.split(x, rows)]
    result: Array = _checks.like_input((torch.cat(blocks),), features)[0]
    return result


def _entropy(query: Tensor, keys: Tensor, scale: float | Tensor) -> Tensor:
    """Of unit rows in float64."""
    cosines = query @ keys.T  # [B, C]
    best, at = cosines.max(1, keepdim=True)
    below = (scale * cosines.sub_(best)).clamp_(
        min=-1e3
    )  # exp is 0 there; of an infinite logit 0 * inf is not
    weights = below.exp().scatter_(1, at, 0.0)
    rest = weights.sum(1)
    return rest.log1p() - weights.mul_(below).sum(1) / (1 + rest)


def _doubt(query: Tensor, keys: Tensor, kind: str, scale: float | Tensor, native: bool) -> Tensor:
    """Least confidence or margin of unit rows [B, D]; the keys' last column is -1.

    Logits are taken below the best one, `(<f^, w^_c> - <f^, w^_t>) / temperature`: of a small temperature the
    logits themselves are so large that nothing is left of their differences.
    """
    best, ids = _search.topk([Segment(query, keys[:, :-1])], 2, "ip", native=native)
    query = torch.cat([query, best[:, :1].to(query.dtype)], 1)
    neg, pos, *_ = row_stats(native, SoftmaxProblem(query, keys, scale, positive=ids[:, 0]))
    rest = torch.sigmoid(neg - pos)  # 1 - p(1)
    if kind == "least_confidence":
        return rest
    second: Tensor = scale * (best[:, 1] - best[:, 0]) - torch.logaddexp(
        neg, pos
    )  # log p(2), -inf if there is only one class
    return rest + second.exp()
