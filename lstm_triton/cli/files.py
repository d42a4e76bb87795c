"""Output files, written whole or not at all, and what is said when they cannot be."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lstm_triton.cli.errors import UserError


def real(path: Path) -> Path:
    """The absolute path behind all links. It never raises: what is wrong with a path shows when it is opened."""
    return Path(os.path.realpath(path))


def reason(error: OSError) -> str:
    """Why the system refused, in its own words."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def writing(path: Path, what: str = "") -> Iterator[None]:
    """An OSError inside is raised as a UserError: "cannot write the curves /a/b.png: No space left on device"."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {f'{what} ' if what else ''}{path}: {reason(error)}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path, what: str = "") -> None:
    """Find out, before the work whose result goes to `path`, that it could not be written.

    Raises UserError if `path` is no regular file or its directory is missing or not writable.
    """
    path = real(path)
    with writing(path, what):
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f"cannot write {f'{what} ' if what else ''}{path}: it is no regular file")
        try:
            with open(_temporary(path), "wb"):
                pass
        finally:
            _remove(_temporary(path))


def check_directory(path: Path, what: str = "") -> None:
    """Find out that no files could be written into the directory `path`, or that it cannot be made if it is missing.

    Raises UserError.
    """
    path = real(path)
    with writing(path, what):
        try:
            os.stat(path)
        except FileNotFoundError:
            path.mkdir()
            path.rmdir()
        else:
            check_writable(path / "file", what)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk; Windows has no way to ask for that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes, what: str = "") -> None:
    """Replace the contents of `path` by `data`; after a failure or a crash the former contents are still there.

    Raises UserError if the data cannot be written; `what` says in its message what they are.
    """
    path = real(path)
    temporary = _temporary(path)
    with writing(path, what):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            _remove(temporary)


def _remove(path: Path) -> None:
    """Remove a file that may not be there; that it cannot be removed is not what went wrong first."""
    with suppress(OSError):
        path.unlink()
