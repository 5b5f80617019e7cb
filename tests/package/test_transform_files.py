"""The files of the transforms: their own, which runs nothing, and ONNX, which computes the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transform_cases import NAMES, as_tuple, fitted, inputs

import fastcompat as fc


@pytest.mark.parametrize("name", NAMES)
def test_save_and_load_keep_every_bit(name, tmp_path):
    transform = fitted(name)
    transform.save(tmp_path / "it.pt")
    again = type(transform).load(tmp_path / "it.pt")
    assert not again.training
    for found, expected in zip(
        as_tuple(again.transform(*inputs(name))), as_tuple(transform.transform(*inputs(name))), strict=True
    ):
        assert torch.equal(found, expected)


def test_load_runs_nothing_and_says_what_is_wrong(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({"kind": "Procrustes", "options": {}, "state": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "text.pt").write_text("nothing")
    torch.save([1], tmp_path / "list.pt")
    for name in ("trap", "text", "list"):
        with pytest.raises(
            ValueError, match=rf"`path` must be a file written by `save`: .*{name}\.pt is not one"
        ):
            fc.Procrustes.load(tmp_path / f"{name}.pt")
    assert not (tmp_path / "sprung").exists()
    fitted("RQT").save(tmp_path / "psi.pt")
    with pytest.raises(ValueError, match=r"must hold a Procrustes: .* holds a ReverseQueryTransform"):
        fc.Procrustes.load(tmp_path / "psi.pt")
    with pytest.raises(FileNotFoundError):
        fc.Procrustes.load(tmp_path / "none.pt")


@pytest.mark.parametrize("name", NAMES)
def test_onnx_computes_the_same(name, tmp_path):
    import onnxruntime

    transform = fitted(name)
    transform.to_onnx(tmp_path / "it.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["it.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "it.onnx", providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == list(transform.inputs)
    assert [x.name for x in session.get_outputs()] == list(transform.outputs)
    for rows in (1, 7):
        given = [x.numpy() for x in inputs(name, rows)]
        found = session.run(None, dict(zip(transform.inputs, given, strict=True)))
        for theirs, ours in zip(found, as_tuple(transform.transform(*given)), strict=True):
            np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
