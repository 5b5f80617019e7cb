"""The folder that a command writes its results to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .. import _files


class OutputFolder:
    """A folder that is known to take files of these names before the work starts.

    `write` puts complete files there; leaving the `with` block without it leaves nothing behind. Raises
    ValueError if the folder cannot be made or written.
    """

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self._made: list[Path] = []

    def __enter__(self) -> OutputFolder:
        try:
            self._made = _files.make_folder(self.path)
            for name in self.names:  # as `write` will do it
                with tempfile.NamedTemporaryFile(prefix=f".{name}.", dir=self.path):
                    pass
                if (self.path / name).is_dir():
                    raise IsADirectoryError(0, f"`{name}` is a folder there")
        except OSError as error:
            self.__exit__()
            raise self._refusal(error) from error
        return self

    def __exit__(self, *_: object) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # not empty: it holds a report
                folder.rmdir()

    def write(self, contents: Mapping[str, bytes]) -> list[Path]:
        """Write all files under other names first, then rename them into place."""
        pending: list[tuple[Path, Path]] = []
        try:
            for name, content in contents.items():
                target = _files.real(self.path / name)
                pending.append((_files.create(target.parent, ".", ".part", [content]), target))
            for source, target in pending:
                os.replace(source, target)
            for folder in {target.parent for _, target in pending}:
                _files.sync_folder(folder)
        except OSError as error:
            raise self._refusal(error) from error
        finally:
            for source, _ in pending:
                with suppress(OSError):
                    source.unlink(missing_ok=True)
        return [self.path / name for name in contents]

    def _refusal(self, error: OSError) -> ValueError:
        return ValueError(
            f"`--out`: cannot write to the folder `{self.path}` ({_files.reason(error)}); name another one"
        )
