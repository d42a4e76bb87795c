"""Output files, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from lstm_triton.cli.errors import UserError


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check_writable(path: Path) -> None:
    """Find out, before the work whose result goes to `path`, that it could not be written.

    Raises UserError if `path` is no regular file or its directory is missing or not writable.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise UserError(f"cannot write {path}: it is no regular file")
    try:
        with open(_temporary(path), "xb"):
            pass
        _temporary(path).unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def check_directory(path: Path) -> None:
    """Find out that no files could be written into the directory `path`, or that it cannot be made if it is missing.

    Raises UserError.
    """
    path = path.resolve()
    try:
        if path.exists():
            check_writable(path / "file")
        else:
            path.mkdir()
            path.rmdir()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk; Windows has no way to ask for that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replace the contents of `path` by `data`; after a failure or a crash the former contents are still there.

    Raises UserError if the data cannot be written.
    """
    path = path.resolve()
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
