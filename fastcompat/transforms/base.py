"""What every transform has: whole arrays in and out, a file of its own, ONNX."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .. import _checks, _files, _inputs, _search

_BLOCK = 8192  # rows of `transform` at a time

Path = _files.AnyPath
File = Path | IO[bytes]
Self = TypeVar("Self", bound="Transform")


class Transform(nn.Module):
    """A module from features to features.

    Args:
        inputs: what `forward` takes, with the columns of each.
        outputs: what `forward` returns.
        options: the constructor's arguments, kept in the file.

    Attributes:
        fitted: whether the weights were learned or loaded; without that `transform`, `save` and `to_onnx`
            refuse. After a training loop of your own set it to True.
    """

    def __init__(self, inputs: dict[str, int], outputs: tuple[str, ...], options: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        # The file holds only Python's own numbers.
        self.options = {k: v.item() if isinstance(v, np.generic) else v for k, v in options.items()}
        self.fitted = False

    def check_fitted(self) -> None:
        """The weights were learned or loaded, not only drawn."""
        if not self.fitted:
            raise ValueError(
                f"`fit` must be called before a {type(self).__name__} transform is used (or `load`; after a "
                "training loop of your own set `fitted` to True)"
            )

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        self.fitted = True

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

        Raises:
            ValueError, TypeError: arguments that do not fit; a transform that was never fitted.
        """
        if len(features) != len(self.inputs):
            wanted = " and ".join(f"`{name}`" for name in self.inputs)
            raise TypeError(f"`transform` takes {wanted}: got {len(features)} arrays")
        tensors = _same_rows(dict(zip(self.inputs, features, strict=True)))
        self.check_fitted()
        blocks: list[tuple[Tensor, ...]] = []
        with evaluating(self):
            for block in zip(*(torch.split(value, _BLOCK) for value in tensors), strict=True):
                found = self(*map(self.like_weights, block))
                blocks.append(found if isinstance(found, tuple) else (found,))
        whole = [torch.cat(parts).to(tensors[0].device) for parts in zip(*blocks, strict=True)]
        given = _checks.like_input(tuple(whole), features[0])
        return given[0] if len(given) == 1 else given

    def save(self, path: File) -> None:
        """Write constructor arguments and weights to a file, by path or open; nothing in it is executable.

        By path the file appears complete or not at all: what was there before stays until the new one is on
        the disk. The file carries a checksum (SHA-256) of all that it holds.

        Raises:
            ValueError: the transform was never fitted.
            OSError: the file cannot be written; the one that was there is whole.
        """
        self.check_fitted()
        saved: dict[str, Any] = {
            "kind": type(self).__name__,
            "options": self.options,
            "state": self.state_dict(),
        }
        content = io.BytesIO()
        torch.save(saved | {"sha256": _sha256(**saved)}, content)
        if isinstance(path, (str, os.PathLike)):
            _files.write_file(path, content.getvalue())
        else:
            path.write(content.getvalue())

    @classmethod
    def load(cls: type[Self], path: File) -> Self:
        """A transform from its file, on the CPU and in eval mode.

        Raises:
            ValueError: what is there is not a whole file of such a transform: of another kind, or damaged.
            OSError: the file cannot be read.
        """
        if isinstance(path, (str, os.PathLike)):
            name, content = os.fspath(path), _files.read_file(path)
        else:
            name, content = getattr(path, "name", "the open file"), path.read()
        try:
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            sha256 = saved.pop("sha256", None)  # earlier versions wrote none
            kind, options, state = saved.pop("kind"), saved.pop("options"), saved.pop("state")
            if saved:
                raise ValueError(f"it also holds {', '.join(map(repr, saved))}")
            if sha256 is not None and sha256 != _sha256(kind, options, state):
                raise ValueError("its checksum does not fit")
        except Exception as error:  # torch raises a dozen types for a damaged file
            raise ValueError(
                f"`path` must be a file written by `save`: {name} is not one, or it is damaged ({error})"
            ) from error
        if kind != cls.__name__:
            raise ValueError(f"`path` must hold a {cls.__name__}: {name} holds a {kind}")
        try:
            transform = cls(**options)
            transform.load_state_dict(state)
        except Exception as error:
            raise ValueError(
                f"`path` must be a file written by `save`: {name} is damaged ({error})"
            ) from error
        return transform.eval()

    def to_onnx(self, path: Path) -> None:
        """Write an ONNX model with the inputs of `forward` by name, for any number of rows.

        The file appears complete or not at all.

        Raises:
            ValueError: the transform was never fitted.
            OSError: the file cannot be written; the one that was there is whole.
            ImportError: without onnx and onnxscript (`pip install "fastcompat[onnx]"`).
        """
        try:
            import onnxscript  # noqa: F401
        except ImportError:
            raise ImportError('`to_onnx` needs onnxscript: pip install "fastcompat[onnx]"') from None
        self.check_fitted()
        rows = torch.export.Dim("rows")
        with evaluating(self):
            program = torch.onnx.export(
                self,
                tuple(
                    self.like_weights(torch.zeros(2, width, dtype=torch.float32, device="cpu"))
                    for width in self.inputs.values()
                ),
                input_names=tuple(self.inputs),
                output_names=self.outputs,
                dynamic_shapes=({0: rows},) * len(self.inputs),
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        _files.write_file(path, program.model_proto.SerializeToString())


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


def _sha256(kind: str, options: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Of all that a file of a transform holds: names, shapes, dtypes and every byte of the weights."""
    weights = [(name, str(value.dtype), list(value.shape)) for name, value in state.items()]
    found = hashlib.sha256(json.dumps([kind, dict(options), weights]).encode())
    for value in state.values():
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


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
        _search.refuse_nonfinite(value, value[:0], (name, name))
    return tensors


def _same_rows(features: dict[str, Any]) -> list[Tensor]:
    tensors = {name: _inputs.matrix(name, value) for name, value in features.items()}
    first = next(iter(tensors))
    for name, value in tensors.items():
        _checks.rows(name, value, first, tensors[first])
    return list(tensors.values())
