"""Standard output that is full or closed: its failure is remembered, and said once, when there is time for it.

Raised where it happens, it would go through libraries that make something else of it, end a training between two
saves, and come again when the interpreter flushes what is left.
"""

from __future__ import annotations

import errno
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import IO, Any

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import reason

CLOSED = 141
"""Exit code when the reader of a pipe went away: a shell's for a program that SIGPIPE ended."""


class OutputError(UserError):
    """Standard output cannot be written to; `closed`: because nobody reads it any more, which needs no words."""

    def __init__(self, error: OSError, outcome: str = "") -> None:
        super().__init__(f"cannot write to standard output: {reason(error)}" + (f"; {outcome}" if outcome else ""))
        self.closed = isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE


class _Remembering(FileIO):
    failure: OSError | None = None

    def write(self, data: Any) -> int | None:  # type: ignore[override]
        """Write to the file until that fails; after that, nowhere."""
        if self.failure is None:
            try:
                while (written := super().write(data)) is None:  # somebody made it non-blocking, and it is full
                    select.select([], [self], [])
                return written
            except OSError as error:
                self.failure = error
        return memoryview(data).nbytes


@contextmanager
def remembering() -> Iterator[IO[str]]:
    """Inside, writing to stdout raises no OSError: `failure` tells what went wrong. Yields what is then stdout.

    A stdout that is no file (a test's, a notebook's) stays as it is.
    """
    former = sys.stdout
    buffer = former.buffer if isinstance(former, TextIOWrapper) else None
    if type(getattr(buffer, "raw", buffer)) is not FileIO:
        yield former
        return
    assert isinstance(former, TextIOWrapper)
    with suppress(OSError):
        former.flush()
    guarded = TextIOWrapper(
        BufferedWriter(_Remembering(former.fileno(), "w", closefd=False)),
        encoding=former.encoding,
        errors=former.errors,
        line_buffering=former.line_buffering,
    )
    sys.stdout = guarded
    try:
        yield guarded
    finally:
        guarded.flush()
        sys.stdout = former


def failure(stream: IO[str]) -> OSError | None:
    """The first failure to write to what `remembering` yielded; None of any other stream."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw.failure if isinstance(raw, _Remembering) else None
