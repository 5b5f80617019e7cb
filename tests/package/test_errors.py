"""Every argument error names the argument, what was expected, what came, and the way out."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import Tensor

import fastcompat as fc
from fastcompat import functional, losses

Q, K = torch.zeros(4, 6), torch.zeros(9, 6)
Y, W = torch.zeros(4, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)


def table(*cases):
    return pytest.mark.parametrize(("call", "error", "message"), cases, ids=range(len(cases)))


def refused(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


@table(
    (lambda: fc.softmax_stats([1.0], K), TypeError, "`query` must be a torch.Tensor: got list; convert it"),
    (lambda: fc.softmax_stats(Q, None), TypeError, "`keys` must be a torch.Tensor: got NoneType"),
    (
        lambda: fc.softmax_stats(Q[0], K),
        ValueError,
        "`query` must have 2 dimensions [rows, columns]: got shape [6]",
    ),
    (
        lambda: fc.softmax_stats(Q.long(), K),
        TypeError,
        "`query` must be float32, bfloat16, float16 or float64: got torch.int64",
    ),
    (
        lambda: fc.softmax_stats(Q, K[:, :3]),
        ValueError,
        "`keys` must have as many columns as `query`: got 3 and 6; project one",
    ),
    (
        lambda: fc.softmax_stats(Q, K.to("meta")),
        ValueError,
        "`keys` must be on the device of `query`: got meta and cpu",
    ),
    (
        lambda: fc.softmax_stats(Q, K, scale="1"),
        TypeError,
        "`scale` must be a float or a 0-dim tensor: got str",
    ),
    (
        lambda: fc.softmax_stats(Q, K, scale=torch.ones((), device="meta")),
        ValueError,
        "`scale` must be on the device of `query`: got meta and cpu",
    ),
    (
        lambda: fc.softmax_stats(Q.to_sparse(), K),
        TypeError,
        "`query` must be dense: got torch.sparse_coo; convert it with .to_dense()",
    ),
    (
        lambda: fc.softmax_stats(Q, K, scale=torch.ones(1)),
        ValueError,
        "`scale` must be a float or a 0-dim floating point tensor",
    ),
    (
        lambda: fc.softmax_stats(Q, K, bias=torch.zeros(4)),
        ValueError,
        "`bias` must have one entry per row of `keys`: got 4 and 9",
    ),
    (
        lambda: fc.softmax_stats(Q, K, bias=torch.zeros(9).half()),
        TypeError,
        "`bias` must be torch.float32: got torch.float16",
    ),
    (
        lambda: fc.softmax_stats(Q, K, bias=torch.zeros(9, 1)),
        ValueError,
        "`bias` must have 1 dimension: got shape [9, 1]",
    ),
    (
        lambda: fc.softmax_stats(Q, K, query_labels=Y),
        ValueError,
        "`key_labels` must be given with `query_labels`: got None",
    ),
    (
        lambda: fc.softmax_stats(Q, K, key_labels=W),
        ValueError,
        "`query_labels` must be given with `key_labels`: got None",
    ),
    (
        lambda: fc.softmax_stats(Q, K, query_labels=Y, key_labels=Y),
        ValueError,
        "`key_labels` must have one entry per row of `keys`: got 4 and 9",
    ),
    (
        lambda: fc.softmax_stats(Q, K, query_labels=Y.int(), key_labels=W),
        TypeError,
        "`query_labels` must be int64: got torch.int32; convert it with `query_labels.long()`",
    ),
    (
        lambda: fc.softmax_stats(Q, K, positive=W),
        ValueError,
        "`positive` must have one entry per row of `query`: got 9 and 4",
    ),
    (
        lambda: fc.softmax_stats(Q, K, exclude=Y[:, None]),
        ValueError,
        "`exclude` must have 1 dimension: got shape [4, 1]",
    ),
    (lambda: fc.softmax_stats(Q, K, positive=Y + 9), ValueError, "`positive`"),
    (
        lambda: fc.softmax_stats(Q, K, backend="cuda"),
        ValueError,
        '`backend` must be one of "auto", "native", "reference": got \'cuda\'',
    ),
    (
        lambda: fc.softmax_stats(Q.double(), K.double(), backend="native"),
        ValueError,
        '`backend="native"` does not cover torch.float64; use "auto" or "reference"',
    ),
    (
        lambda: fc.softmax_stats(Q.to("meta"), K.to("meta"), backend="native"),
        ValueError,
        '`backend="native"` does not cover the device meta',
    ),
)
def test_softmax_stats(call, error, message):
    refused(call, error, message)


@table(
    (lambda: fc.topk(Q, K, 0), ValueError, "`k` must be at least 1: got 0"),
    (lambda: fc.topk(Q, K, 2.0), TypeError, "`k` must be an int: got float"),
    (
        lambda: fc.topk(Q, K, 2, metric="dot"),
        ValueError,
        '`metric` must be one of "cosine", "ip", "l2": got \'dot\'',
    ),
    (
        lambda: fc.topk(Q, K, 2, metric=np.array(["ip", "l2"])),
        ValueError,
        '`metric` must be one of "cosine", "ip", "l2": got array',
    ),
    (lambda: fc.topk(Q.int(), K, 2), TypeError, "`query` must be float32, bfloat16, float16 or float64: got"),
    (lambda: fc.topk(Q, K[:, 1:], 2), ValueError, "`keys` must have as many columns as `query`: got 5 and 6"),
    (
        lambda: fc.topk(Q, K, 2, exclude=Y + 9),
        ValueError,
        "`exclude` must hold -1 (none) or row numbers below 9: got 9",
    ),
    (lambda: fc.topk(None, K, 2), TypeError, "`query` must be a tensor, an array, a list or a column of"),
    (
        lambda: fc.topk(np.array([["a"]]), K, 2),
        TypeError,
        "`query` must hold numbers: got strings",
    ),
    (lambda: fc.ranks(Q, K, Y), ValueError, "`targets` must have 2 dimensions: got shape [4]"),
    (
        lambda: fc.ranks(Q, K, W[:, None]),
        ValueError,
        "`targets` must have one entry per row of `query`: got 9 and 4",
    ),
    (
        lambda: fc.ranks(Q, K, Y[:, None] - 2),
        ValueError,
        "`targets` must hold -1 (none) or row numbers below 9: got -2",
    ),
    (lambda: fc.ranks(Q, K, Y[:, None] + 0.5), TypeError, "`targets` must hold whole numbers: got 0.5"),
)
def test_search(call, error, message):
    refused(call, error, message)


def ract(new: Tensor = Q, old: Tensor = Q, labels: Tensor = Y, **named):
    return lambda: functional.ract_loss(new, old, labels, **named)


BANK = {"new_keys": K, "old_keys": K, "key_labels": W}


@table(
    (
        lambda: functional.contrastive_loss(Q, K, temperature=0.0),
        ValueError,
        "`temperature` must be above 0: got 0.0",
    ),
    (
        lambda: functional.contrastive_loss(Q, K, temperature=torch.ones(2)),
        ValueError,
        "`temperature` must be a float or a 0-dim",
    ),
    (
        lambda: functional.contrastive_loss(Q, K, temperature=torch.ones((), device="meta")),
        ValueError,
        "`temperature` must be on the device of `query`: got meta and cpu",
    ),
    (
        lambda: functional.contrastive_loss(Q, K, positives="mean"),
        ValueError,
        '`positives` must be one of "sum_in_log", "mean_out": got \'mean\'',
    ),
    (
        lambda: functional.contrastive_loss(Q, K, reduction="avg"),
        ValueError,
        '`reduction` must be one of "mean", "sum", "none": got \'avg\'',
    ),
    (
        lambda: functional.bct_loss(Q, W, K),
        ValueError,
        "`labels` must have one entry per row of `new`: got 9 and 4",
    ),
    (lambda: functional.bct_loss(Q, None, K), TypeError, "`labels` must be a torch.Tensor: got NoneType"),
    (
        lambda: functional.bct_loss(Q, Y, K, [0.0] * 9),
        TypeError,
        "`old_bias` must be a torch.Tensor: got list",
    ),
    (lambda: functional.bct_loss(Q, Y, K[0]), ValueError, "`old_weight` must have 2 dimensions"),
    (
        lambda: functional.bct_loss(Q, Y, K, torch.zeros(4)),
        ValueError,
        "`old_bias` must have one entry per row of `old_weight`: got 4 and 9",
    ),
    (ract(old=Q[:, 1:]), ValueError, "`old` must have as many columns as `new`: got 5 and 6"),
    (ract(old=K), ValueError, "`old` must have one entry per row of `new`: got 9 and 4"),
    (ract(labels=None), TypeError, "`labels` must be a torch.Tensor: got NoneType"),
    (ract(k=0), ValueError, "`k` must be at least 1: got 0"),
    (ract(new_keys=K), ValueError, "`new_keys`, `old_keys` and `key_labels` describe one bank"),
    (ract(key_labels=W), ValueError, "`new_keys`, `old_keys` and `key_labels` describe one bank"),
    (
        ract(**BANK | {"old_keys": Q}),
        ValueError,
        "`old_keys` must have one entry per row of `new_keys`: got 4 and 9",
    ),
    (ract(**BANK, key_index=W), ValueError, "`key_index` must have one entry per row of `new`: got 9 and 4"),
    (
        ract(**BANK, key_index=Y + 9),
        ValueError,
        "`key_index` must hold -1 (none) or row numbers below 9: got 9",
    ),
)
def test_losses(call, error, message):
    refused(call, error, message)


def module(loss, *rest, **named):
    return lambda: loss(Q, *rest, **named)


PAIRS = (Y, Y, Y)


@table(
    (
        module(losses.ContrastiveLoss()),
        ValueError,
        "`labels` must be given without `ref_emb` and `indices_tuple`",
    ),
    (
        module(losses.ContrastiveLoss(), Y, ref_emb=K[:, 1:]),
        ValueError,
        "`ref_emb` must have as many columns as `embeddings`: got 5 and 6; project one of them first",
    ),
    (
        module(losses.ContrastiveLoss(), Y, ref_emb=K),
        ValueError,
        "`ref_labels` must be given where `ref_emb` has other rows than `embeddings`: got None for 9 and 4",
    ),
    (
        module(losses.ContrastiveLoss(), Y, ref_emb=K, ref_labels=Y),
        ValueError,
        "`ref_labels` must have one entry per row of `ref_emb`: got 4 and 9",
    ),
    (
        module(losses.ContrastiveLoss(), Y, ref_labels=Y),
        ValueError,
        "`ref_emb` must be given with `ref_labels`: got None",
    ),
    (
        module(losses.ContrastiveLoss(), ref_emb=Q, ref_labels=Y),
        ValueError,
        "`labels` must be given with `ref_labels`: got None",
    ),
    (
        module(losses.ContrastiveLoss(), W),
        ValueError,
        "`labels` must have one entry per row of `embeddings`: got 9 and 4",
    ),
    (
        module(losses.ContrastiveLoss(), None, (Y, Y)),
        ValueError,
        "`indices_tuple` must be (anchors, positives, anchors, negatives) or",
    ),
    (
        module(losses.ContrastiveLoss(), None, (Y, Y, Y + 4)),
        ValueError,
        "`indices_tuple` must hold row numbers below 4: got 4",
    ),
    (
        module(losses.ContrastiveLoss(), None, (Y, Y, Y - 1)),
        ValueError,
        "`indices_tuple` must hold row numbers below 4: got -1",
    ),
    (module(losses.ContrastiveLoss(), None, (Y, Y.float(), Y)), TypeError, "`indices_tuple` must be int64"),
    (module(losses.ContrastiveLoss(), None, 3), TypeError, "`indices_tuple` must be a tuple of tensors: got"),
    (module(losses.ContrastiveLoss(positives="all"), None, PAIRS), ValueError, "`positives` must be one of"),
    (module(losses.ContrastiveLoss(reduction="avg"), None, PAIRS), ValueError, "`reduction` must be one of"),
    (
        module(losses.ContrastiveLoss(backend="native"), None, PAIRS),
        ValueError,
        '`backend="native"` does not cover an `indices_tuple`',
    ),
    (module(losses.RACTLoss(reduction="avg"), None, PAIRS, Q), ValueError, "`reduction` must be one of"),
    (module(losses.RACTLoss(backend="fast"), None, PAIRS, Q), ValueError, "`backend` must be one of"),
    (module(losses.RACTLoss(k=0), None, PAIRS, Q), ValueError, "`k` must be at least 1: got 0"),
    (lambda: losses.BCTLoss(K.numpy()), TypeError, "`old_weight` must be a torch.Tensor: got ndarray"),
    (lambda: losses.BCTLoss(K, [0.0] * 9), TypeError, "`old_bias` must be a torch.Tensor: got list"),
    (module(losses.RACTLoss(), Y), ValueError, "`ref_emb` must be given: got None"),
    (
        module(losses.RACTLoss(), Y, ref_emb=K),
        ValueError,
        "`ref_emb` must have one entry per row of `embeddings`: got 9 and 4",
    ),
    (module(losses.RACTLoss(), ref_emb=Q), ValueError, "`labels` must be given without an `indices_tuple`"),
    (module(losses.RACTLoss(), Y, ref_emb=Q, ref_labels=Y + 1), ValueError, "`ref_labels` must be left out"),
    (module(losses.BCTLoss(K)), ValueError, "`labels` must be given: got None"),
    (module(losses.BCTLoss(K), Y, ref_emb=Q), ValueError, "`ref_emb` must be None"),
)
def test_modules(call, error, message):
    refused(call, error, message)


def test_an_error_leaves_the_engine_working():
    before = fc.topk(Q + 1, K + 1, 3)
    for _ in range(3):
        with pytest.raises(ValueError, match="finite"):
            fc.topk(Q + torch.nan, K, 3)
    assert torch.equal(fc.topk(Q + 1, K + 1, 3)[1], before[1])


def test_build_info_says_what_was_built():
    info = fc.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "cuda",
        "cuda_archs",
        "cuda_tier",
        "simd_built",
        "simd_usable",
        "simd",
        "threads",
    }
    assert "generic" in info["simd_built"] and set(info["simd_usable"]) <= set(info["simd_built"])
    assert info["simd"] in info["simd_usable"] and info["threads"] == torch.get_num_threads()
    assert info["cuda"] is None or info["cuda_archs"]
