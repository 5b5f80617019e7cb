"""The three reductions of the engine: softmax statistics, the best k, ranks."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import _autograd, _checks, _inputs, _promoted, _search, reference
from .. import _loss_parts as parts
from ..reference import Segment, SoftmaxProblem, SoftmaxStats

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
        keys: [N, D]; mixed dtypes are promoted.
        scale: a float or a 0-dim tensor that may want a gradient.
        bias: float32 [N]; a key of bias -inf is in no set (padding). Logits must be finite in float32:
            beyond 1e38 (on GPUs) or 3.4e38 they act as infinities, with NaN gradients as in torch.
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
    _checks.embeddings("keys", keys, "query", query)
    query, keys = parts.matched(query, keys, False)
    scale = _checks.scalar("scale", scale, "query", query)
    _checks.bias(bias, keys)
    check_sets(query, keys, query_labels, key_labels, positive, exclude)
    native = _checks.takes_native(backend, query)
    sets = (query_labels, key_labels, positive, exclude)
    return row_stats(native, SoftmaxProblem(query, keys, scale, bias, *sets))


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

    Takes tensors, NumPy arrays, lists, data frames and their columns (by position, the index is ignored), and
    returns tensors for a tensor `query`, else NumPy arrays. No gradient. The order is that of the scores in
    float32, each of which is computed from its pair alone, by one arithmetic, here and in `ranks`::

        cosine  <q, k> / (|q| |k|)      off by at most (D + 8) 2^-24
        ip      <q, k>                  off by at most (D + 8) 2^-24 |q| |k|
        l2      -sum_d (q_d - k_d)^2    off by at most (D + 8) 2^-24 of itself, far from the origin too

    and by 2^-149 for each of its terms. Keys whose scores differ by less may change places.

    Args:
        query: [B, D], or one vector [D], which gives [k] back. Python's own numbers count as float32.
        keys: [N, D]. Where its dtype differs from that of `query`, the wider one is computed in, such as
            float32 for float32 queries of a float16 store, whose keys are widened block by block. Norms may
            be anything: rows whose products would leave the range of float32 are scaled by powers of two and
            back. D may be 0: then all scores are 0.
        k: at least 1; places beyond the number of candidates hold score -inf and id -1.
        metric: "cosine" (a zero vector has cosine 0 with everything), "ip" (inner product) or "l2" (score =
            minus the squared distance). Higher is better.
        query_labels: [B] whole numbers (a negative one equals no label) or strings, together with
            `key_labels`: keys with the query's label are skipped (hard negatives).
        key_labels: [N].
        exclude: [B] whole numbers: a key number to skip, or -1.
        backend: "auto", "native" or "reference".

    Returns:
        Scores float32 [B, k] (float64 for float64 inputs) and ids int64 [B, k].

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in `query` or `keys`, naming the first
            bad row; masked or missing entries; a score beyond 3.4e38 ("ip", "l2") that could be among the
            best, naming the query's row.

    Example::

        scores, ids = fc.topk(queries, gallery, 10, metric="l2")
    """
    _checks.choice("metric", metric, _checks.METRICS)
    k = _checks.positive_int("k", k)
    q, x, single = _inputs.pair(("query", "keys"), query, keys, single=True)
    sides = ("query", q), ("keys", x)
    labels = _inputs.labels(("query_labels", "key_labels"), (query_labels, key_labels), sides)
    skipped = None if exclude is None else _inputs.rows("exclude", exclude, sides[0])
    _checks.in_range("exclude", skipped, x.shape[0], wait=True)
    native = _checks.takes_native(backend, q)
    found = _promoted.topk(
        [Segment(q, x)],
        k,
        metric,
        query_labels=labels[0],
        key_labels=labels[1],
        exclude=skipped,
        native=native,
    )
    found = (found[0][0], found[1][0]) if single else found
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

    Takes what `topk` takes, and returns a tensor for a tensor `query`, else a NumPy array. No gradient.

    Args:
        query: [B, D], or one vector [D] with targets [P].
        keys: [N, D]. Of two dtypes the wider one is computed in; narrower keys are copied into it.
        targets: [B, P] whole numbers: key numbers; -1 pads.
        metric: "cosine", "ip" or "l2", as in `topk`.
        exclude: [B] whole numbers: a key number that does not count, or -1.
        backend: "auto", "native" or "reference".

    Returns:
        int64 [B, P]: 0 = best; equal scores rank by id; -1 for padding and for an excluded target.

    Raises:
        ValueError, TypeError: arguments that do not fit; NaN or inf in `query` or `keys`, naming the first
            bad row; a target's score beyond 3.4e38 ("ip", "l2"), naming the query's row.
    """
    _checks.choice("metric", metric, _checks.METRICS)
    q, x, single = _inputs.pair(("query", "keys"), query, keys, single=True)
    wanted = _inputs.row_table("targets", targets, ("query", q), single)
    skipped = None if exclude is None else _inputs.rows("exclude", exclude, ("query", q))
    _checks.in_range("targets", wanted, x.shape[0], wait=True)
    _checks.in_range("exclude", skipped, x.shape[0], wait=True)
    native = _checks.takes_native(backend, q)
    if skipped is not None:
        wanted = wanted.masked_fill(wanted == skipped[:, None], -1)
    x = x.to(q.dtype)
    score = _search.pair_scores(q, x, wanted, metric, native=native)
    everything = torch.tensor([0, x.shape[0]], dtype=torch.int64, device=q.device)
    beaten = _search.count_beats(
        q, x, None, everything, score, wanted, metric, exclude=skipped, native=native
    )[:, :, 0]
    places = beaten.masked_fill(wanted < 0, -1)
    result: Array = _checks.give_back((places[0] if single else places,), query)[0]
    return result


def check_sets(
    query: Tensor,
    keys: Tensor,
    query_labels: Tensor | None,
    key_labels: Tensor | None,
    positive: Tensor | None,
    exclude: Tensor | None,
) -> None:
    """Labels and key numbers that say which keys are positives and negatives."""
    _checks.labels(query, keys, query_labels, key_labels)
    if query_labels is not None and key_labels is not None:
        _checks.warn_negative_labels("query_labels", query_labels)
        if key_labels is not query_labels:
            _checks.warn_negative_labels("key_labels", key_labels)
    _checks.indices("positive", positive, "query", query, optional=True)
    _checks.indices("exclude", exclude, "query", query, optional=True)


def row_stats(native: bool, problem: SoftmaxProblem) -> SoftmaxStats:
    """The statistics by the native kernels or by the reference, for arguments that were checked."""
    return _autograd.softmax_stats(problem) if native else reference.softmax_stats(*problem)


def contrastive(
    native: bool, problem: SoftmaxProblem, positives: str, reduction: str, eps: float | None = None
) -> Tensor:
    """The contrastive loss of arguments that were checked: in one native call where there is one.

    With `eps` query and keys are float32 and still have to be normalised.
    """
    scalar = positives == "sum_in_log" and reduction != "none"
    if native and scalar and _autograd.fuses(problem):
        loss = _autograd.softmax_loss(problem, reduction == "mean", eps)
        if parts.is_zero(loss):  # for want of positives? To count them one column is enough
            with torch.no_grad():
                column = problem._replace(query=problem.query[:, :1], keys=problem.keys[:, :1])
                parts.warn_without_positives(_autograd.softmax_stats(column).pos_count > 0)
        return loss
    if eps is not None:
        query, keys = parts.normalised(problem.query, eps), parts.normalised(problem.keys, eps)
        problem = problem._replace(query=query, keys=keys)
    return parts.contrastive_from_stats(row_stats(native, problem), positives, reduction)
