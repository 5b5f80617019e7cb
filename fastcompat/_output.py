"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path


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
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            for folder in reversed(missing):
                folder.mkdir()
                self._made.append(folder)
            for name in self.names:  # as `write` will do it
                with tempfile.NamedTemporaryFile(prefix=f".{name}.", dir=self.path):
                    pass
                if (self.path / name).is_dir():
                    raise IsADirectoryError(0, f"`{name}` is a folder there")
        except OSError as error:
            self.__exit__()
            raise ValueError(
                f"`--out`: cannot write to the folder `{self.path}` ({error.strerror}); name another one"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # not empty: it holds a report
                folder.rmdir()

    def write(self, contents: Mapping[str, bytes]) -> list[Path]:
        """Write all files under temporary names first, then rename them into place."""
        pending: list[tuple[Path, Path]] = []
        try:
            for name, content in contents.items():
                handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.path)
                pending.append((Path(temporary), self.path / name))
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                os.chmod(temporary, 0o644)
            for source, target in pending:
                os.replace(source, target)
        finally:
            for source, _ in pending:
                source.unlink(missing_ok=True)
        return [target for _, target in pending]
