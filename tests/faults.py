"""A system whose calls fail: every way in which the package reaches files, one call after another."""

from __future__ import annotations

import builtins
import errno
import io
import mmap
import os
from typing import Any

ERRORS = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EROFS, errno.ESTALE, errno.EINTR)
CALLS = {
    os: [
        *("open", "close", "fsync", "replace", "rename", "unlink", "remove", "rmdir", "mkdir"),
        *("stat", "lstat", "scandir", "listdir", "readlink"),
    ],
    builtins: ["open"],
    io: ["open"],
    mmap: ["mmap"],
}


class Faults:
    """Within `with`, call number `at` fails, and with `lasting` every later one; `count` says how many came.

    A failing `close` closes all the same, as the system's does.
    """

    def __init__(self, at: int, number: int, *, lasting: bool = False) -> None:
        self.at, self.number, self.lasting, self.count = at, number, lasting, 0
        self.failed: str | None = None

    def _call(self, name: str) -> None:
        self.count += 1
        if self.count - 1 == self.at or (self.lasting and self.count > self.at):
            self.failed = self.failed or name
            raise OSError(self.number, os.strerror(self.number))

    def __enter__(self) -> Faults:
        try:
            import fcntl
        except ImportError:
            calls = CALLS
        else:
            calls = {**CALLS, fcntl: ["flock"]}
        self._before = [
            (module, name, getattr(module, name)) for module, names in calls.items() for name in names
        ]
        for module, name, function in self._before:
            setattr(module, name, self._failing(function, name))
        return self

    def __exit__(self, *_: object) -> None:
        for module, name, function in self._before:
            setattr(module, name, function)

    def _failing(self, function: Any, name: str) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            if name == "close":
                function(*arguments)
            self._call(name)
            if name == "close":
                return None
            found = function(*arguments, **named)
            return _File(found, self) if isinstance(found, io.IOBase) else found

        return call


class _File:
    """An open file whose reading, writing and closing may fail."""

    def __init__(self, file: Any, faults: Faults) -> None:
        self._file, self._faults = file, faults

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name not in ("read", "readinto", "readall", "write", "flush", "seek"):
            return value

        def call(*arguments: Any) -> Any:
            self._faults._call(name)
            return value(*arguments)

        return call

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._faults._call("close of a file")
