"""Argument errors of the losses, the memory and the prototypes of the upgrade methods."""

from __future__ import annotations

import re

import pytest
import torch

import fastcompat as fc
from fastcompat import functional, losses

X, P = torch.zeros(4, 6), torch.ones(9, 6)  # a batch, and class vectors
Y, MANY = torch.zeros(4, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)


def bad(value):
    x = P.clone()
    x[3, 1] = value
    return x


def mcl(reverse=X, new=X[:, :5], old=X, labels=Y, **named):
    return lambda: functional.metric_compatible_loss(reverse, new, old, labels, **named)


def prototype(features=X, prototypes=P, labels=Y, **named):
    return lambda: functional.prototype_loss(features, prototypes, labels, **named)


def margin(features=X, weight=P, labels=Y, **named):
    return lambda: functional.margin_softmax_loss(features, weight, labels, **named)


def fastfill(pred=X, target=X, log_var=X[:, 0], weight=P, bias=None, labels=Y, **named):
    return lambda: functional.fastfill_loss(pred, target, log_var, weight, bias, labels, **named)


def module(loss, *arguments, **named):
    return lambda: loss(*arguments, **named)


def queue(*arguments):
    return lambda: losses.MemoryQueue(7, 6).add(*arguments)


CASES = [
    (mcl(old=X[:, 1:]), "`old` must have as many columns as `reverse`: got 5 and 6; project one"),
    (mcl(old=P), "`old` must have one entry per row of `reverse`: got 9 and 4"),
    (mcl(new=P), "`new` must have one entry per row of `reverse`: got 9 and 4"),
    (mcl(new=X[0]), "`new` must have 2 dimensions [rows, columns]: got shape [6]"),
    (mcl(labels=MANY), "`labels` must have one entry per row of `reverse`: got 9 and 4"),
    (mcl(positives="mean"), '`positives` must be one of "sum_in_log", "mean_out": got \'mean\''),
    (mcl(reduction="avg"), "`reduction` must be one of"),
    (mcl(temperature=-1.0), "`temperature` must be above 0: got -1.0"),
    (prototype(prototypes=P[:, 1:]), "`prototypes` must have as many columns as `features`: got 5 and 6"),
    (prototype(perturbed=P[:, 1:]), "`perturbed` must have as many columns as `features`: got 5 and 6"),
    (prototype(perturbed=X), "`perturbed` must have one entry per row of `prototypes`: got 4 and 9"),
    (prototype(perturb_negatives=True), "`perturbed` must be given with `perturb_negatives`: got None"),
    (prototype(labels=Y + 9), "`labels` must hold -1 (none) or row numbers below 9: got 9"),
    (prototype(labels=MANY), "`labels` must have one entry per row of `features`: got 9 and 4"),
    (prototype(temperature=0.0), "`temperature` must be above 0"),
    (margin(weight=P[:, 1:]), "`weight` must have as many columns as `features`: got 5 and 6"),
    (margin(labels=Y + 12), "`labels` must hold -1 (none) or row numbers below 9: got 12"),
    (margin(kind="sphereface"), '`kind` must be one of "arcface", "cosface": got \'sphereface\''),
    (margin(margin=28.6), "`margin` must be an angle of 0 to pi radians: got 28.6"),
    (margin(scale=0.0), "`scale` must be above 0: got 0.0"),
    (lambda: functional.fct_loss(X, P), "`target` must have one entry per row of `pred`: got 9 and 4"),
    (lambda: functional.fct_loss(X, X[:, 1:]), "`target` must have as many columns as `pred`: got 5 and 6"),
    (lambda: functional.fct_loss(X, X, backend="native"), '`backend="native"` does not cover `fct_loss`'),
    (fastfill(target=P), "`target` must have one entry per row of `pred`: got 9 and 4"),
    (
        fastfill(log_var=X),
        "`log_var` must have shape [4] or [4, 1], one number per row of `pred`: got shape [4, 6]",
    ),
    (fastfill(weight=P[:, 1:]), "`new_weight` must have as many columns as `pred`: got 5 and 6"),
    (fastfill(bias=X[:, 0]), "`new_bias` must have one entry per row of `new_weight`: got 4 and 9"),
    (fastfill(labels=Y + 9), "`labels` must hold -1 (none) or row numbers below 9: got 9"),
    (fastfill(label_smoothing=1.5), "`label_smoothing` must be 0 to 1: got 1.5"),
    (module(losses.PrototypeLoss(P), X), "`labels` must be given: got None"),
    (
        module(losses.PrototypeLoss(P), X, Y, ref_emb=X),
        "`ref_emb` must be None: this loss compares with class",
    ),
    (module(losses.MarginSoftmaxLoss(P), X, Y, (Y, Y, Y)), "`indices_tuple` must be None"),
    (module(losses.MarginSoftmaxLoss(P), X, MANY), "`labels` must have one entry per row of `embeddings`"),
    (
        lambda: losses.PrototypeLoss(fc.PrototypeBank(P), perturbed=P),
        "`perturbed` must be left out beside a PrototypeBank",
    ),
    (queue(X[:, 1:], Y), "`embeddings` must have as many columns as `queue.embeddings`: got 5 and 6"),
    (queue(X, MANY), "`labels` must have one entry per row of `embeddings`: got 9 and 4"),
    (queue(X, Y, MANY), "`positions` must have one entry per row of `embeddings`: got 9 and 4"),
    (lambda: losses.MemoryQueue(0, 6), "`size` must be at least 1: got 0"),
    (lambda: losses.MemoryQueue(7, 0), "`dim` must be at least 1: got 0"),
    (
        lambda: fc.class_prototypes(X, MANY, 3),
        "`labels` must have one entry per row of `features`: got 9 and 4",
    ),
    (lambda: fc.class_prototypes(X, Y + 3, 3), "`labels` must be below `num_classes`, which is 3: got 3"),
    (lambda: fc.class_prototypes(X, Y, 0), "`num_classes` must be at least 1: got 0"),
    (lambda: fc.RunningPrototypes(3).prototypes(), "`prototypes()` needs features: call `add` at least once"),
    (
        lambda: fc.ndpp(P, P[:, 1:]),
        "`new_prototypes` must have as many columns as `old_prototypes`: got 5 and 6; project one",
    ),
    (lambda: fc.ndpp(P, X), "`new_prototypes` must have one entry per row of `old_prototypes`: got 4 and 9"),
    (lambda: fc.ndpp(P, P, k=0), "`k` must be at least 1: got 0"),
    (lambda: fc.ndpp(bad(torch.nan), P), "`old_prototypes` must be finite: row 3 holds NaN or inf"),
    (lambda: fc.ndpp(P, bad(torch.inf)), "`new_prototypes` must be finite: row 3 holds NaN or inf"),
    (
        lambda: fc.odpp(P, P[:, 1:]),
        "`new_prototypes` must have as many columns as `old_prototypes`: got 5 and 6",
    ),
    (lambda: fc.odpp(P, P, steps=0), "`steps` must be at least 1: got 0"),
    (lambda: fc.odpp(P, P, batch=0), "`batch` must be at least 1: got 0"),
    (lambda: fc.odpp(bad(torch.nan), P), "`old_prototypes` must be finite: row 3 holds NaN or inf"),
    (lambda: fc.odpp(P, bad(torch.nan)), "`new_prototypes` must be finite: row 3 holds NaN or inf"),
    (lambda: fc.odpp(P, P, backend="native"), '`backend="native"` does not cover `odpp`'),
    (lambda: fc.PrototypeBank(P, X), "`perturbed` must have one entry per row of `prototypes`: got 4 and 9"),
    (lambda: fc.PrototypeBank(P, every=0), "`every` must be at least 1: got 0"),
    (
        lambda: fc.PrototypeBank(P).refresh(P[:, 1:], 0),
        "`new_prototypes` must have as many columns as `old_prototypes`: got 5 and 6",
    ),
]


@pytest.mark.parametrize(("call", "message"), CASES, ids=range(len(CASES)))
def test_values(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (mcl(labels=Y.float()), "`labels` must be int64: got torch.float32"),
        (prototype(labels=[0]), "`labels` must be a torch.Tensor: got list"),
        (prototype(prototypes=P.long()), "`prototypes` must be float32, bfloat16, float16 or float64"),
        (fastfill(bias=[1.0]), "`new_bias` must be a torch.Tensor: got list"),
        (fastfill(log_var=0.0), "`log_var` must be a torch.Tensor: got float"),
        (queue([1.0], Y), "`embeddings` must be a torch.Tensor: got list"),
        (lambda: fc.class_prototypes(X, Y.int(), 3), "`labels` must be int64: got torch.int32"),
        (lambda: fc.class_prototypes(X, Y, 3.0), "`num_classes` must be an int: got float"),
    ],
    ids=range(8),
)
def test_types(call, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        call()


def test_a_later_batch_of_another_width():
    running = fc.RunningPrototypes(3)
    running.add(X, Y)
    with pytest.raises(
        ValueError, match="`features` must have as many columns as `earlier features`: got 5 and 6"
    ):
        running.add(X[:, 1:], Y)


def test_losses_let_nan_through():
    x = X.clone()
    x[1, 1] = torch.nan
    labels, weight = torch.arange(4), torch.randn(9, 6)
    for loss in (
        functional.metric_compatible_loss(x, x, x, labels),
        functional.prototype_loss(x, weight, labels),
        functional.margin_softmax_loss(x, weight, labels),
        functional.fct_loss(x, X),
        functional.fastfill_loss(x, X, X[:, 0], weight, None, labels),
    ):
        assert loss.isnan()
