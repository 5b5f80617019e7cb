"""Argument errors of the transforms and of the backfill order."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch

import fastcompat as fc

OLD, NEW, S = torch.randn(40, 6), torch.randn(40, 8), torch.randn(40, 3)
Y = torch.arange(40) % 5
W, B = torch.randn(5, 8), torch.randn(5)


def spoiled(x):
    x = x.clone()
    x[7, 1] = torch.nan
    return x


def fct(*arrays, d_side=None, log_variance=False, **named):
    return lambda: fc.ForwardTransform(6, 8, d_side, log_variance=log_variance).fit(*arrays, **named)


def fastfill(*arrays, **named):
    return fct(*arrays, log_variance=True, **named)


def rqt(*arrays, **named):
    return lambda: fc.ReverseQueryTransform(8, 6).fit(*arrays, **named)


def procrustes(*arrays):
    return lambda: fc.Procrustes().fit(*arrays)


def order(features=OLD, weight=W[:, :6], **named):
    return lambda: fc.uncertainty(features, weight, **named)


VALUES = [
    (lambda: fc.ForwardTransform(0, 8), "`d_old` must be at least 1: got 0"),
    (lambda: fc.ForwardTransform(6, 8, hidden=0), "`hidden` must be at least 1: got 0"),
    (lambda: fc.ReverseQueryTransform(8, 6, blocks=0), "`blocks` must be at least 1: got 0"),
    (fct(NEW, OLD), "`old` must have the 6 columns that the transform was made for: got shape [40, 8]"),
    (fct(OLD, OLD), "`new` must have the 8 columns that the transform was made for: got shape [40, 6]"),
    (fct(OLD, NEW[:9]), "`new` must have one entry per row of `old`: got 9 and 40"),
    (fct(OLD[0], NEW), "`old` must have 2 dimensions [rows, columns]: got shape [6]"),
    (fct(spoiled(OLD), NEW), "`old` must be finite: row 7 holds NaN or inf; repair or remove that row first"),
    (fct(OLD, spoiled(NEW)), "`new` must be finite: row 7 holds NaN or inf"),
    (fct(OLD[:2], NEW[:2]), "`old` must have at least 2 rows to train on: got 2, 1 of them held out"),
    (fct(OLD, NEW, side=S), "`side` must be left out: this transform was made without `d_side`"),
    (
        fct(OLD, NEW, d_side=3),
        "`side` must be given, 3 columns: got None; this transform was made with `d_side`",
    ),
    (fct(OLD, NEW, d_side=4, side=S), "`side` must have the 4 columns that the transform was made for"),
    (fct(OLD, NEW, d_side=3, side=spoiled(S)), "`side` must be finite: row 7"),
    (fct(OLD, NEW, new_weight=W), "`new_weight` is for FastFill: make the transform with log_variance=True"),
    (fct(OLD, NEW, new_bias=B), "`new_bias` is for FastFill: make the transform with log_variance=True"),
    (fct(OLD, NEW, epochs=0), "`epochs` must be at least 1: got 0"),
    (fct(OLD, NEW, patience=0), "`patience` must be at least 1: got 0"),
    (fct(OLD, NEW, lr=0.0), "`lr` must be above 0: got 0.0"),
    (fct(OLD, NEW, held_out=1.0), "`held_out` must be a share of the rows, 0 or more and below 1: got 1.0"),
    (fastfill(OLD, NEW), "`labels` must be given with `log_variance`: got None; FastFill needs classes"),
    (fastfill(OLD, NEW, Y[:9]), "`labels` must have one entry per row of `new`: got 9 and 40"),
    (fastfill(OLD, NEW, Y - 9), "`labels` must name a class: got only negative labels"),
    (fastfill(OLD, NEW, Y, new_bias=B), "`new_bias` must come with `new_weight`: got None for that"),
    (
        fastfill(OLD, NEW, Y, new_weight=W[:, 1:]),
        "`new_weight` must have as many columns as `new`: got 7 and 8",
    ),
    (fastfill(OLD, NEW, Y, new_weight=W[:4]), "`labels` must hold -1 (none) or row numbers below 4: got 4"),
    (
        fastfill(OLD, NEW, Y, new_weight=W, new_bias=B[1:]),
        "`new_bias` must have shape [5], one per class: got",
    ),
    (fastfill(OLD, NEW, Y, label_smoothing=2.0), "`label_smoothing` must be 0 to 1: got 2.0"),
    (rqt(NEW, OLD), "`new` must have the 8 columns that the transform was made for: got shape [40, 6]"),
    (
        rqt(OLD[:, 1:], NEW),
        "`old` must have the 6 columns that the transform was made for: got shape [40, 5]",
    ),
    (rqt(OLD, NEW, Y[:9]), "`labels` must have one entry per row of `old`: got 9 and 40"),
    (rqt(OLD, NEW, distance="l1"), '`distance` must be one of "cosine", "l2": got \'l1\''),
    (rqt(OLD, NEW, head=fc.ResidualHead(8)), "`labels` must be given with `head`: got None"),
    (
        rqt(OLD, NEW, Y, head=fc.ResidualHead(7)),
        "`new` must have the 7 columns that the transform was made for",
    ),
    (
        rqt(OLD, NEW, compatible=fc.losses.MetricCompatibleLoss()),
        "`labels` must be given with `compatible`: got None",
    ),
    (procrustes(OLD, NEW[:9]), "`dst` must have one entry per row of `src`: got 9 and 40"),
    (procrustes(OLD[:0], NEW[:0]), "`src` must have at least 1 row: got 0"),
    (procrustes(spoiled(OLD), NEW), "`src` must be finite: row 7"),
    (lambda: fc.Procrustes()(OLD), "`fit` must be called before a Procrustes transform is used"),
    (lambda: fc.Procrustes().transform(OLD), "`fit` must be called before a Procrustes transform is used"),
    (
        lambda: fc.ReverseQueryTransform(8, 6)(OLD),
        "`new` must have the 8 columns that the transform was made",
    ),
    (lambda: fc.ForwardTransform(6, 8)(OLD, S), "`side` must be left out"),
    (lambda: fc.ForwardTransform(6, 8, 3)(OLD), "`side` must be given, 3 columns"),
    (
        lambda: fc.ForwardTransform(6, 8, 3).transform(OLD, S[:9]),
        "`side` must have one entry per row of `old`",
    ),
    (order(kind="gini"), '`kind` must be one of "least_confidence", "margin", "entropy": got \'gini\''),
    (order(temperature=0.0), "`temperature` must be above 0: got 0.0"),
    (order(weight=W), "`class_weight` must have as many columns as `features`: got 8 and 6; project one"),
    (order(weight=W[:0, :6]), "`class_weight` must have at least 1 row: got 0"),
    (order(features=spoiled(OLD)), "`features` must be finite: row 7 holds NaN or inf"),
    (order(weight=spoiled(OLD)), "`class_weight` must be finite: row 7 holds NaN or inf"),
    (order(features=OLD.double(), backend="native"), '`backend="native"` does not cover torch.float64'),
]
TYPES = [
    (
        fct({"vectors": OLD}, NEW),
        "`old` must be a tensor, an array, a list or a column of a data frame: got dict",
    ),
    (fct(OLD.long(), NEW), "`old` must be float32, bfloat16, float16 or float64: got torch.int64"),
    (fct(OLD, NEW, epochs=1.5), "`epochs` must be an int: got float"),
    (fct(OLD, NEW, seed=None), "`seed` must be an int: got NoneType"),
    (
        fastfill(OLD, NEW, Y + 0.5),
        "`labels` must hold whole numbers: got 0.5",
    ),
    (rqt(np.array([["a"]]), NEW), "`old` must hold numbers: got strings"),
    (lambda: fc.ForwardTransform(6, 8, 3).transform(OLD), "`transform` takes `old` and `side`: got 1 arrays"),
    (lambda: fc.ReverseQueryTransform(8.0, 6), "`d_new` must be an int: got float"),
    (order(features=OLD.long()), "`features` must be float32, bfloat16, float16 or float64: got torch.int64"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [(call, ValueError, text) for call, text in VALUES] + [(call, TypeError, text) for call, text in TYPES],
)
def test_message(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def unfitted():
    yield fc.ForwardTransform(6, 8), (OLD,)
    yield fc.ForwardTransform(6, 8, 3, log_variance=True), (OLD, S)
    yield fc.ReverseQueryTransform(8, 6), (NEW,)
    yield fc.ResidualHead(8), (NEW,)
    yield fc.Procrustes(), (OLD,)
    yield fc.Procrustes(6, 6), (OLD,)


@pytest.mark.parametrize("number", range(6))
def test_an_unfitted_transform_refuses(number, tmp_path):
    transform, features = list(unfitted())[number]
    message = f"^`fit` must be called before a {type(transform).__name__} transform is used"
    for copied in (transform, copy.deepcopy(transform), pickle.loads(pickle.dumps(transform))):
        for call in (
            lambda t: t.transform(*features),
            lambda t: t.save(tmp_path / "it.pt"),
            lambda t: t.to_onnx(tmp_path / "it.onnx"),
        ):
            with pytest.raises(ValueError, match=message):
                call(copied)
    assert not list(tmp_path.iterdir())
    if transform.options.get("d_src") == 0:
        return
    trained, loaded = list(unfitted())[number][0], list(unfitted())[number][0]
    trained.fitted = True  # after a training loop of one's own
    trained.save(tmp_path / "it.pt")
    loaded.load_state_dict(trained.state_dict())
    nested = torch.nn.ModuleDict({"adapter": list(unfitted())[number][0]})
    nested.load_state_dict({f"adapter.{name}": value for name, value in trained.state_dict().items()})
    for usable in (
        type(transform).load(tmp_path / "it.pt"),
        loaded,
        nested["adapter"],
        copy.deepcopy(loaded),
    ):
        usable.transform(*features)


def test_an_interrupted_fit_leaves_no_usable_transform(monkeypatch):
    psi, rho = fc.ReverseQueryTransform(8, 6), fc.ResidualHead(8)
    quick = {"epochs": 1, "progress": False}
    psi.fit(OLD, NEW, Y, head=rho, **quick)
    assert psi.fitted and rho.fitted
    with pytest.raises(ValueError, match="`old` must be finite"):
        psi.fit(spoiled(OLD), NEW, **quick)
    assert psi.fitted  # nothing had begun

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.optim.Adam, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        psi.fit(OLD, NEW, Y, head=rho, **quick)
    for spoilt in (psi, rho):
        with pytest.raises(ValueError, match="`fit` must be called before"):
            spoilt.transform(NEW)


def test_nothing_changes_before_an_error():
    psi = fc.ReverseQueryTransform(8, 6)
    before = {name: value.clone() for name, value in psi.state_dict().items()}
    with pytest.raises(ValueError, match="`old` must be finite"):
        psi.fit(spoiled(OLD), NEW)
    assert all(torch.equal(value, before[name]) for name, value in psi.state_dict().items())


def test_to_onnx_without_onnxscript_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"`to_onnx` needs onnxscript: pip install \"fastcompat\[onnx\]\""):
        fc.ReverseQueryTransform(8, 6).to_onnx(tmp_path / "psi.onnx")
    assert not list(tmp_path.iterdir())
