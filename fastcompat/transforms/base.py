"""What every transform has: whole arrays in and out, a file of its own, ONNX."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _checks, _inputs, reference

_BLOCK = 8192  # rows of `transform` at a time

Path = str | os.PathLike[str]
File = Path | IO[bytes]
Self = TypeVar("Self", bound="Transform")


class Transform(nn.Module):
    """A module from features to features.

    Args:
        inputs: what `forward` takes, with the columns of each.
        outputs: what `forward` returns.
        options: the constructor's arguments, kept in the file.
    """

    def __init__(self, inputs: dict[str, int], outputs: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.outputs, self.options = inputs, outputs, options

    def check_inputs(self, *features: Tensor) -> None:
        """Every input is a matrix of the width that this transform was made for."""
        for (name, width), value in zip(self.inputs.items(), features, strict=True):
            check_width(name, value, width)

    def like_weights(self, features: Tensor) -> Tensor:
        """Features on the device and in the dtype of the weights."""
        return features.to(next(itertools.chain(self.parameters(), self.buffers())))

    @torch.no_grad()
    def transform(self, *features: Any) -> Any:
        """`forward` in eval mode on whole arrays, block by block and without gradients.

        Args:
            features: what `forward` takes: tensors, or NumPy arrays (memory-mapped ones are read block by
                block). They are converted to the dtype of the weights.

        Returns:
            What `forward` returns, as NumPy arrays if the first input is one, else on its device.
        """
        if len(features) != len(self.inputs):
            wanted = " and ".join(f"`{name}`" for name in self.inputs)
            raise TypeError(f"`transform` takes {wanted}: got {len(features)} arrays")
        tensors = _same_rows(dict(zip(self.inputs, features, strict=True)))
        blocks: list[tuple[Tensor, ...]] = []
        with evaluating(self):
            for block in zip(*(torch.split(value, _BLOCK) for value in tensors), strict=True):
                found = self(*map(self.like_weights, block))
                blocks.append(found if isinstance(found, tuple) else (found,))
        whole = [torch.cat(parts).to(tensors[0].device) for parts in zip(*blocks, strict=True)]
        given = _checks.give_back(tuple(whole), features[0])
        return given[0] if len(given) == 1 else given

    def save(self, path: File) -> None:
        """Write constructor arguments and weights to a file, by path or open; nothing in it is executable."""
        torch.save({"kind": type(self).__name__, "options": self.options, "state": self.state_dict()}, path)

    @classmethod
    def load(cls: type[Self], path: File) -> Self:
        """A transform from its file, on the CPU and in eval mode."""
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            kind, options, state = saved["kind"], saved["options"], saved["state"]
        except OSError:
            raise
        except Exception as error:
            raise ValueError(f"`path` must be a file written by `save`: {path} is not one") from error
        if kind != cls.__name__:
            raise ValueError(f"`path` must hold a {cls.__name__}: {path} holds a {kind}")
        transform = cls(**options)
        transform.load_state_dict(state)
        return transform.eval()

    def to_onnx(self, path: Path) -> None:
        """Write an ONNX model with the inputs of `forward` by name, for any number of rows.

        Raises:
            ImportError: without onnx and onnxscript (`pip install "fastcompat[onnx]"`).
        """
        try:
            import onnxscript  # noqa: F401
        except ImportError:
            raise ImportError('`to_onnx` needs onnxscript: pip install "fastcompat[onnx]"') from None
        rows = torch.export.Dim("rows")
        with evaluating(self):
            torch.onnx.export(
                self,
                tuple(self.like_weights(torch.zeros(2, width)) for width in self.inputs.values()),
                path,
                input_names=tuple(self.inputs),
                output_names=self.outputs,
                dynamic_shapes=({0: rows},) * len(self.inputs),
                dynamo=True,
                external_data=False,
                verbose=False,
            )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode for a while; then every part is in the mode it was in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def reset(module: nn.Module) -> None:
    """Draw all weights anew: children first, so that a module may correct what they do."""
    for child in module.children():
        reset(child)
    if callable(draw := getattr(module, "reset_parameters", None)):
        draw()


def check_width(name: str, value: Tensor, width: int) -> None:
    """A matrix with the columns that a transform was made for."""
    _checks.matrix(name, value)
    if value.shape[1] != width:
        raise ValueError(
            f"`{name}` must have the {width} columns that the transform was made for: "
            f"got shape {list(value.shape)}"
        )


def as_features(**features: Any) -> list[Tensor]:
    """The arrays of a `fit` as matrices with one row per item, without NaN and inf."""
    tensors = _same_rows(features)
    for name, value in zip(features, tensors, strict=True):
        try:
            reference.refuse_nonfinite(value, value[:0])
        except _checks.NonFiniteError as error:
            _checks.refuse_nonfinite(error, ((name, name),))
    return tensors


def _same_rows(features: dict[str, Any]) -> list[Tensor]:
    tensors = {name: _inputs.matrix(name, value) for name, value in features.items()}
    first = next(iter(tensors))
    for name, value in tensors.items():
        _checks.rows(name, value, first, tensors[first])
    return list(tensors.values())
