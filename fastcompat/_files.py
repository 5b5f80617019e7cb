"""Files that appear complete or not at all.

A new file is written beside its place, brought to the disk, and renamed into place in one step; then the
folder is brought to the disk too. Whatever stops the writer, there is the old file or the new one.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AnyPath = str | os.PathLike[str]


def reason(error: OSError) -> str:
    """What the system said, in words."""
    return error.strerror or str(error) or type(error).__name__


def write_file(path: AnyPath, content: bytes) -> None:
    """Put a complete file at `path`, in the place of the one there. Links are followed, the umask counts.

    Raises:
        OSError: it cannot be written; the file there is whole.
    """
    try:
        _replace(real(path), content)
    except OSError as error:
        if error.errno is None:
            raise
        # With the name that was asked for, not the one it was written under.
        raise OSError(error.errno, reason(error), os.fspath(path)) from error


def _replace(target: Path, content: bytes) -> None:
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(target).st_mode):  # a pipe, a terminal: no file takes its place
            target.write_bytes(content)
            return
    pending = create(target.parent, ".", ".part", [content])
    try:
        os.replace(pending, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(pending)
        raise
    sync_folder(target.parent)


def real(path: AnyPath) -> Path:
    """The path without links. Its end may be missing; a part that cannot be looked up is an error."""
    try:
        return Path(os.path.realpath(path, strict=True))
    except FileNotFoundError:
        return Path(os.path.realpath(path))


def create(folder: Path, prefix: str, suffix: str, blocks: Iterable[bytes]) -> Path:
    """A new file of these blocks under a name of its own, on the disk when this returns; or none."""
    path = folder / f"{prefix}{secrets.token_hex(8)}{suffix}"
    try:
        with open(path, "xb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise
    return path


def make_folder(path: Path) -> list[Path]:
    """Make a folder and those above it that are missing, or none; returns those made, outermost first."""
    missing, at = [], path
    while not at.exists():
        missing.append(at)
        at = at.parent
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            made.append(folder)
            sync_folder(folder.parent)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise
    return made


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system has a call for that."""
    if os.name == "nt":
        return
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:  # a folder that may be written but not read; file systems without this call
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):
            raise


def read_file(path: AnyPath) -> bytes:
    """What a file holds; ValueError for what is not a regular file, such as a device that never ends."""
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise ValueError(f"`{os.fspath(path)}` is not a regular file")
    return Path(path).read_bytes()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against the other writers that do so; the system lets go of it when its holder dies."""
    if fcntl is None:
        from filelock import FileLock  # a dependency of torch

        with FileLock(folder / ".lock"):
            yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(handle, fcntl.LOCK_UN)  # also where a child process has inherited the handle
    finally:
        os.close(handle)
