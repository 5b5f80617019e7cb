"""The public functions: engine calls and losses, with their equations, shapes, units, errors and sources.

Everywhere: `query` [B, D] and `keys` [N, D] are float32, bfloat16 or float16 (any row stride, B = 0 and N = 0
included) and are accumulated in float32; float64 runs the reference. Labels are int64; a negative label
equals no label. `backend`: "auto" takes the native kernels where they cover the call, "native" raises where
they do not, "reference" is plain PyTorch.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from . import _autograd, _checks, _search, reference
from . import _loss_parts as parts
from .reference import Segment, SoftmaxStats

Array = TypeVar("Array", Tensor, np.ndarray)


def softmax_stats(
    query: Tensor,
    keys: Tensor,
    *,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str = "auto",
) -> SoftmaxStats:
    """Row statistics of `z_ij = scale * <query_i, keys_j> + bias_j` without ever storing the logits.

    Positives of row i: the key `positive[i]` if `positive` is given (-1: none), else the keys with the same
    label. Same-label keys that are not positives are ignored; every other key is a negative. `exclude[i]`
    (-1: none) is neither. Differentiable in query, keys, scale and bias; an empty set has a zero gradient
    whatever arrives.

    Args:
        query: [B, D].
        keys: [N, D], with the dtype of `query`.
        scale: a float or a 0-dim tensor that may want a gradient.
        bias: float32 [N].
        query_labels: int64 [B], together with `key_labels`.
        key_labels: int64 [N].
        positive: int64 [B], a key number or -1.
        exclude: int64 [B], a key number or -1.
        backend: "auto", "native" or "reference".

    Returns:
        `neg_lse` and `pos_lse` float32 [B] (log-sum-exp; -inf for an empty set), `pos_sum` float32 [B] (sum
        of the positive logits), `pos_count` int64 [B].

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a key number out of range (on the
            CPU).
        RuntimeError: native kernels under torch.func transforms, or differentiated twice.
    """
    _checks.pair(query, keys)
    _checks.scalar("scale", scale)
    _checks.bias(bias, keys)
    _check_sets(query, keys, query_labels, key_labels, positive, exclude)
    native = _checks.takes_native(backend, query)
    return _stats(native, query, keys, scale, bias, query_labels, key_labels, positive, exclude)


def topk(
    query: Array,
    keys: Array,
    k: int,
    *,
    metric: str = "cosine",
    query_labels: Array | None = None,
    key_labels: Array | None = None,
    exclude: Array | None = None,
    backend: str = "auto",
) -> tuple[Array, Array]:
    """The k best keys of every query, exactly: best first, ties to the smaller id.

    Takes tensors or NumPy arrays and returns the same kind. No gradient.

    Args:
        query: [B, D].
        keys: [N, D], with the dtype of `query`.
        k: at least 1; places beyond the number of candidates hold score -inf and id -1.
        metric: "cosine" (a zero vector has cosine 0 with everything), "ip" (inner product) or "l2" (score =
            minus the squared distance). Higher is better.
        query_labels: int64 [B], together with `key_labels`: keys with the query's label are skipped (hard
            negatives).
        key_labels: int64 [N].
        exclude: int64 [B], a key number to skip, or -1.
        backend: "auto", "native" or "reference".

    Returns:
        Scores float32 [B, k] (float64 for float64 inputs) and ids int64 [B, k].

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in `query` or `keys`, naming the first
            bad row.
    """
    _checks.choice("metric", metric, _checks.METRICS)
    _checks.positive_int("k", k)
    q, x = _checks.as_tensor("query", query), _checks.as_tensor("keys", keys)
    labels = _optional("query_labels", query_labels), _optional("key_labels", key_labels)
    skipped = _optional("exclude", exclude)
    _checks.pair(q, x)
    _check_sets(q, x, *labels, None, skipped)
    _checks.in_range("exclude", skipped, x.shape[0])
    native = _checks.takes_native(backend, q)
    found = _search.topk(
        [Segment(q, x)],
        k,
        metric,
        query_labels=labels[0],
        key_labels=labels[1],
        exclude=skipped,
        native=native,
    )
    result: tuple[Array, Array] = _checks.give_back(found, query)
    return result


def ranks(
    query: Array,
    keys: Array,
    targets: Array,
    *,
    metric: str = "cosine",
    exclude: Array | None = None,
    backend: str = "auto",
) -> Array:
    """How many keys beat each target: its place in the full ranking of `topk`, without sorting anything.

    Takes tensors or NumPy arrays and returns the same kind. No gradient.

    Args:
        query: [B, D].
        keys: [N, D], with the dtype of `query`.
        targets: int64 [B, P], key numbers; -1 pads.
        metric: "cosine", "ip" or "l2", as in `topk`.
        exclude: int64 [B], a key number that does not count, or -1.
        backend: "auto", "native" or "reference".

    Returns:
        int64 [B, P]: 0 = best; equal scores rank by id; -1 for padding and for an excluded target.

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in `query` or `keys`, naming the first
            bad row.
    """
    _checks.choice("metric", metric, _checks.METRICS)
    q, x = _checks.as_tensor("query", query), _checks.as_tensor("keys", keys)
    wanted, skipped = _checks.as_tensor("targets", targets), _optional("exclude", exclude)
    _checks.pair(q, x)
    _checks.indices("targets", wanted, "query", q, dims=2)
    _checks.indices("exclude", skipped, "query", q)
    _checks.in_range("targets", wanted, x.shape[0])
    _checks.in_range("exclude", skipped, x.shape[0])
    native = _checks.takes_native(backend, q)
    if skipped is not None:
        wanted = wanted.masked_fill(wanted == skipped[:, None], -1)
    score = _search.pair_scores(q, x, wanted, metric, native=native)
    everything = torch.tensor([0, x.shape[0]], device=q.device)
    beaten = _search.count_beats(
        q, x, None, everything, score, wanted, metric, exclude=skipped, native=native
    )[:, :, 0]
    result: Array = _checks.give_back((beaten.masked_fill(wanted < 0, -1),), query)[0]
    return result


def contrastive_loss(
    query: Tensor,
    keys: Tensor,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    positives: str = "sum_in_log",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """InfoNCE or SupCon of `query` against `keys`, e.g. new embeddings against the old gallery.

    With `z = <q, k> / temperature`, P(i) the positives and N(i) the negatives of row i (as in
    `softmax_stats`): "sum_in_log" is `log(sum_{P+N} e^z) - log(sum_P e^z)`; "mean_out" is `log(sum_{P+N} e^z)
    - mean_P z` (SupCon, Khosla et al., arXiv 2004.11362; OpenCompatible's contra loss is the case of one
    positive: code).

    Args:
        query: [B, D].
        keys: [N, D]. Under autocast frozen keys take the dtype of `query`; otherwise mixed dtypes are
            promoted.
        query_labels: int64 [B], together with `key_labels`.
        key_labels: int64 [N].
        positive: int64 [B], a key number or -1.
        exclude: int64 [B], a key number or -1.
        temperature: a float or a 0-dim tensor that may want a gradient.
        positives: "sum_in_log" or "mean_out".
        normalize: L2-normalise both sides first.
        reduction: "mean" over the rows that have a positive, "sum", or "none" (the other rows give 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B]. Without any row that takes part: 0 with a zero gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("positives", positives, ("sum_in_log", "mean_out"))
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.embeddings("keys", keys, "query", query)
    _check_sets(query, keys, query_labels, key_labels, positive, exclude)
    scale = parts.inverse_temperature(temperature)
    query, keys = parts.matched(query, keys, normalize)
    native = _checks.takes_native(backend, query)
    stats = _stats(native, query, keys, scale, None, query_labels, key_labels, positive, exclude)
    return parts.contrastive_from_stats(stats, positives, reduction)


def bct_loss(
    new: Tensor,
    labels: Tensor,
    old_weight: Tensor,
    old_bias: Tensor | None = None,
    *,
    scale: float | Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The influence loss of backward-compatible training: new features judged by the old classifier.

    `CE(W_old n' + b_old, y)`, `n'` the first `D_old` columns of the new feature (padded with zeros if it is
    shorter); with `scale`, `CE(scale * <n'^, w^> + b_old, y)` on L2-normalised features and weights. Shen et
    al., CVPR 2020, arXiv 2003.11942 (re-implementation by its first author). Added with weight 1 to the
    classification loss.

    Args:
        new: [B, D_new].
        labels: int64 [B]; a row with label < 0 or >= C_old takes no part (a class the old model never saw).
        old_weight: [C_old, D_old], frozen: it never gets a gradient.
        old_bias: [C_old], frozen.
        scale: None for the plain linear classifier, else the scale of a cosine classifier (a float or 0-dim
            tensor).
        reduction: "mean" over the rows that take part, "sum", or "none" (the other rows give 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.matrix("new", new)
    _checks.matrix("old_weight", old_weight)
    _checks.same_device("old_weight", old_weight, "new", new)
    _checks.indices("labels", labels, "new", new)
    weight = old_weight.detach()
    shared = min(new.shape[1], weight.shape[1])
    features = new[:, :shared]
    dtype = parts.common_dtype(features, weight)
    if scale is None:
        scale = 1.0
    else:
        _checks.scalar("scale", scale)
        weight, features = parts.normalised(weight), parts.normalised(features)
    features, weight = features.to(dtype), weight[:, :shared].to(dtype)
    bias = None
    if old_bias is not None:
        bias = old_bias.detach().to(torch.promote_types(dtype, torch.float32))
        _checks.bias(bias, weight, ("old_bias", "old_weight"))
    known = (labels >= 0) & (labels < weight.shape[0])
    target = torch.where(known, labels, -1)
    native = _checks.takes_native(backend, features)
    stats = _stats(native, features, weight, scale, bias, None, None, target, None)
    return parts.contrastive_from_stats(stats, "sum_in_log", reduction)


def ract_loss(
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    *,
    new_keys: Tensor | None = None,
    old_keys: Tensor | None = None,
    key_labels: Tensor | None = None,
    key_index: Tensor | None = None,
    temperature: float | Tensor = 0.01,
    k: int | None = 10,
    detach_keys: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Regression-alleviating compatible training: fewer answers that the upgrade turns from right to wrong.

    ```
    pos_i = <n^_i, o^_i>                                 the same image only
    NO_i  = k largest <n^_i, o^_j>, y_j != y_i           new-to-old negatives
    NN_i  = k largest <n^_i, n^_j>, y_j != y_i           new-to-new negatives
    L_i   = CE([pos_i | NO_i | NN_i] / temperature, 0)
    ```
    Same-label keys other than the pair itself are neither. Zhang et al., ICLR 2022, arXiv 2201.09724 (loss
    and
    defaults: the authors' code). Added with weight 1 to the classification loss.

    Args:
        new: [B, D], the new model's embeddings.
        old: [B, D], the old model's embeddings of the same images; never gets a gradient.
        labels: int64 [B].
        new_keys: [N, D], the bank of new embeddings (e.g. gathered from all ranks); default: `new`.
        old_keys: [N, D], the old embeddings of the same bank; given with `new_keys` or not at all; default:
            `old`.
        key_labels: int64 [N], the bank's labels; needed with a bank.
        key_index: int64 [B], where row i sits among the keys (-1: nowhere); default: its own row without a
            bank, nowhere with one.
        temperature: a float or a 0-dim tensor that may want a gradient.
        k: how many negatives of each kind; None takes all of them.
        detach_keys: no gradient into `new_keys` (nor into `new` as keys).
        normalize: L2-normalise everything first.
        reduction: "mean", "sum" or "none"; every row takes part.
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if k is not None:
        _checks.positive_int("k", k)
    _checks.embeddings("old", old, "new", new)
    _checks.rows("old", old, "new", new)
    _checks.indices("labels", labels, "new", new)
    if (new_keys is None) != (old_keys is None) or (new_keys is None) != (key_labels is None):
        raise ValueError(
            "`new_keys`, `old_keys` and `key_labels` describe one bank: "
            "pass all three, or none of them to use this batch"
        )
    if new_keys is None or old_keys is None or key_labels is None:
        new_keys, old_keys, key_labels = new, old, labels
        if key_index is None:
            key_index = torch.arange(new.shape[0], device=new.device)
    _checks.embeddings("new_keys", new_keys, "new", new)
    _checks.embeddings("old_keys", old_keys, "new", new)
    _checks.rows("old_keys", old_keys, "new_keys", new_keys)
    _checks.indices("key_labels", key_labels, "new_keys", new_keys)
    _checks.indices("key_index", key_index, "new", new)
    _checks.in_range("key_index", key_index, new_keys.shape[0])
    scale = parts.inverse_temperature(temperature)

    pos = scale * parts.paired_products(new, old.detach(), normalize)  # [B]
    banks = (old_keys.detach(), new_keys.detach() if detach_keys else new_keys)
    negatives = []
    for bank in banks:
        query, keys = parts.matched(new, bank, normalize)
        native = _checks.takes_native(backend, query)
        sets = (labels, key_labels, None, key_index)
        if k is None:
            negatives.append(_stats(native, query, keys, scale, None, *sets).neg_lse)
        else:
            hardest = parts.hardest_logits(native, query, keys, scale, labels, key_labels, key_index, k)
            negatives.append(reference.log_sum_exp(hardest, torch.ones_like(hardest, dtype=torch.bool)))
    neg = torch.logaddexp(*negatives)
    return parts.reduced(parts.log_odds_loss(neg, pos), None, reduction)


def _check_sets(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive: Tensor | None,
    exclude: Tensor | None,
) -> None:
    _checks.labels(query, keys, query_labels, key_labels)
    _checks.indices("positive", positive, "query", query)
    _checks.indices("exclude", exclude, "query", query)


def _optional(name: str, value: Tensor | np.ndarray | None) -> Tensor | None:
    return None if value is None else _checks.as_tensor(name, value)


def _stats(
    native: bool,
    query: Tensor,
    keys: Tensor,
    scale: float | Tensor,
    bias: Tensor | None,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive: Tensor | None,
    exclude: Tensor | None,
) -> SoftmaxStats:
    kernel = _autograd.softmax_stats if native else reference.softmax_stats
    return kernel(query, keys, scale, bias, query_labels, key_labels, positive, exclude)
