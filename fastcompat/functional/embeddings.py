"""Losses of embeddings against embeddings: contrastive, SimCLR, RACT, metric-compatible."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks, reference
from .._normalise import matched, matched_or_deferred, paired_products
from .._types import Backend, Positives, Reduction, SoftmaxProblem
from . import parts
from .engine import check_sets, contrastive, row_stats


def contrastive_loss(
    query: Tensor,
    keys: Tensor,
    *,
    query_labels: Tensor | None = None,
    key_labels: Tensor | None = None,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    temperature: float | Tensor = 0.07,
    positives: Positives = "sum_in_log",
    normalize: bool = True,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
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
        temperature: above 0; a float or a 0-dim tensor that may require grad.
        positives: "sum_in_log" or "mean_out".
        normalize: L2-normalise both sides first.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" over the rows that have a positive, "sum", or "none" (the other rows give 0).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B]. Without any positive: 0 with a zero gradient.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("positives", positives, parts.POSITIVES)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.embeddings("keys", keys, "query", query)
    check_sets(query, keys, query_labels, key_labels, positive, exclude)
    scale = parts.inverse_temperature(temperature, "query", query)
    query, keys, unit_eps = matched_or_deferred(query, keys, normalize, eps)
    native = _checks.use_native(backend, query)
    problem = SoftmaxProblem(query, keys, scale, None, query_labels, key_labels, positive, exclude)
    return contrastive(native, problem, positives, reduction, unit_eps)


def simclr_loss(
    first: Tensor,
    second: Tensor,
    *,
    temperature: float | Tensor = 0.1,
    normalize: bool = True,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """SimCLR's contrastive loss (NT-Xent): two views of an image attract, all other views repel.

    With `x = [first | second]` (2B rows) and `p(i)` the other view of row i:

    ```
    L_i = -log[ exp(<x^_i, x^_p(i)> / temperature) / sum over j != i of exp(<x^_i, x^_j> / temperature) ]
    ```
    Chen et al., ICML 2020, arXiv 2002.05709 (re-implementation). Needs no label: it trains the
    side-information of forward-compatible training (`fastcompat.SideInformation`).

    Args:
        first: [B, D], one random view of each image.
        second: [B, D], another one.
        temperature: above 0; a float or a 0-dim tensor that may require grad.
        normalize: L2-normalise the embeddings first.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" or "sum" over the 2B rows, or "none".
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [2B] (the first views, then the second).

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.embeddings("second", second, "first", first)
    _checks.rows("second", second, "first", first)
    views = torch.cat([first, second])
    itself = torch.arange(views.shape[0], dtype=torch.int64, device=views.device)
    return contrastive_loss(
        views,
        views,
        positive=itself.roll(first.shape[0]),
        exclude=itself,
        temperature=temperature,
        normalize=normalize,
        eps=eps,
        reduction=reduction,
        backend=backend,
    )


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
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Regression-alleviating compatible training: fewer answers that the upgrade turns from right to wrong.

    ```
    pos_i = <n^_i, o^_i>                                 the same image only
    NO_i  = k largest <n^_i, o^_j>, y_j != y_i           new-to-old negatives
    NN_i  = k largest <n^_i, n^_j>, y_j != y_i           new-to-new negatives
    L_i   = CE([pos_i | NO_i | NN_i] / temperature, 0)
    ```
    Same-label keys other than the pair itself are neither. Zhang et al., ICLR 2022, arXiv 2201.09724 (loss
    and defaults: the authors' code). Added with weight 1 to the classification loss.

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
        temperature: above 0; a float or a 0-dim tensor that may require grad.
        k: how many negatives of each kind; None takes all of them.
        detach_keys: no gradient into `new_keys` (nor into `new` as keys).
        normalize: L2-normalise everything first.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" or "sum" over all rows, or "none".
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    if k is not None:
        k = _checks.positive_int("k", k)
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
            key_index = torch.arange(new.shape[0], dtype=torch.int64, device=new.device)
    _checks.embeddings("new_keys", new_keys, "new", new)
    _checks.embeddings("old_keys", old_keys, "new", new)
    _checks.rows("old_keys", old_keys, "new_keys", new_keys)
    _checks.indices("key_labels", key_labels, "new_keys", new_keys)
    _checks.indices("key_index", key_index, "new", new, optional=True)
    _checks.in_range("key_index", key_index, new_keys.shape[0])
    scale = parts.inverse_temperature(temperature, "new", new)
    _checks.warn_negative_labels("labels", labels)
    if key_labels is not labels:
        _checks.warn_negative_labels("key_labels", key_labels)

    pos = scale * paired_products(new, old.detach(), normalize, eps)  # [B]
    banks = (old_keys.detach(), new_keys.detach() if detach_keys else new_keys)
    negatives = []
    for bank in banks:
        query, keys = matched(new, bank, normalize, eps)
        native = _checks.use_native(backend, query)
        if k is None:
            problem = SoftmaxProblem(query, keys, scale, None, labels, key_labels, exclude=key_index)
            negatives.append(row_stats(native, problem).neg_lse)
        else:
            hardest = parts.hardest_logits(native, query, keys, scale, labels, key_labels, key_index, k)
            negatives.append(reference.log_sum_exp(hardest, torch.ones_like(hardest, dtype=torch.bool)))
    neg = reference.log_add_exp(*negatives)
    return parts.reduced(parts.log_odds_loss(neg, pos), None, reduction)


def metric_compatible_loss(
    reverse: Tensor,
    new: Tensor,
    old: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 0.07,
    positives: Positives = "sum_in_log",
    shared_negatives: bool = True,
    normalize: bool = True,
    eps: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Metric-compatible learning: the distances of a half-upgraded gallery's two systems become comparable.

    ```
    s^rev_ij = exp(<psi(n_i)^, o^_j> / temperature)           new query, sent back, against an old item
    s^new_ij = exp(<m^_i, m^_j> / temperature), j != i        new query against a new item
    Z_i = sum over j with y_j != y_i of (s^rev_ij + s^new_ij)
    L_i = -log[P(s^rev) / (P(s^rev) + Z_i)] - log[P(s^new) / (P(s^new) + Z_i)]
    ```
    with P the same-label sum ("sum_in_log", `log P = pos_lse`) or the SupCon mean outside the logarithm
    ("mean_out": `log(P + Z) - mean of the positive logits`). The shared Z calibrates the two systems. The
    pair i = i is a positive of s^rev and never one of s^new. `m` is the new embedding itself, or a learned
    head `rho(n)` that is then what the gallery stores: pass it as `new` and build `reverse` on top of it. Seo
    et al., "Online Backfilling with No Regret for Large-Scale Image Retrieval", arXiv 2301.03767
    (reconstructed: only the paper's text was available, so temperature and the form of the positives are
    arguments).

    Args:
        reverse: [B, D_old], `psi(n)`: the new embeddings mapped into the old space.
        new: [B, D_new], `n` or `rho(n)`.
        old: [B, D_old], the old model's embeddings of the same images; never gets a gradient.
        labels: int64 [B]; a row with a negative label has no positives, and is a negative of every other row.
        temperature: above 0; a float or a 0-dim tensor that may require grad.
        positives: "sum_in_log" or "mean_out".
        shared_negatives: False gives each term only its own negatives (the single-system ablation).
        normalize: L2-normalise everything first.
        eps: a row shorter than this is divided by it instead of by its norm; default: 1e-12, for float16 1e-3
            (the gradient of a zero row is divided by it too, and has to stay within float16).
        reduction: "mean" (the sum of the two terms, each averaged over its own rows with a positive), "sum",
            or "none" (a term without a positive counts 0 in its row).
        backend: "auto", "native" or "reference".

    Returns:
        float32, 0-dim or [B].

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _checks.choice("positives", positives, parts.POSITIVES)
    _checks.choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.embeddings("old", old, "reverse", reverse)
    _checks.matrix("new", new)
    _checks.same_device("new", new, "reverse", reverse)
    _checks.rows("old", old, "reverse", reverse)
    _checks.rows("new", new, "reverse", reverse)
    _checks.indices("labels", labels, "reverse", reverse)
    _checks.warn_negative_labels("labels", labels)
    scale = parts.inverse_temperature(temperature, "reverse", reverse)
    itself = torch.arange(new.shape[0], dtype=torch.int64, device=new.device)
    systems = []
    for query, keys, exclude in ((reverse, old.detach(), None), (new, new, itself)):
        query, keys = matched(query, keys, normalize, eps)
        native = _checks.use_native(backend, query)
        problem = SoftmaxProblem(query, keys, scale, None, labels, labels, exclude=exclude)
        systems.append(row_stats(native, problem))
    if shared_negatives:
        shared = reference.log_add_exp(*(stats.neg_lse for stats in systems))  # [B], log Z
        systems = [stats._replace(neg_lse=shared) for stats in systems]
    rev, own = (parts.contrastive_from_stats(stats, positives, reduction) for stats in systems)
    return rev + own
