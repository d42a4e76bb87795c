"""The program `lstm-triton`; needs the extra `cli` (typer, rich, matplotlib)."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import FrameType
from typing import NoReturn

REQUIREMENTS = ("typer", "rich", "matplotlib")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program with these arguments (default: those of the process) and exit.

    Exit codes: 0, 1 (something given cannot be used, or something cannot be written), 2 (unknown option or value),
    130 (Ctrl-C), 141 (the pipe that stdout goes to was closed).
    Every error is one line on stderr that starts with `error:`; of several processes one writes it.
    """
    try:
        with _leaving_at_once():
            missing = [name for name in REQUIREMENTS if find_spec(name) is None]
            if missing:
                say(f'error: not installed: {", ".join(missing)}; pip install "lstm-triton[cli]"')
                raise SystemExit(1)
            from lstm_triton.cli.app import run
        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED:
        _say_interrupted()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Of several processes: what PyTorch's process groups leave running can abort the interpreter on its way out.
        with suppress(OSError, AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    if arguments is None and _python_handles_ctrl_c():
        # All is said and written; what follows is the interpreter's own clean-up.
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    raise SystemExit(code)


@contextmanager
def _leaving_at_once() -> Iterator[None]:
    """Inside, Ctrl-C ends the process and says so: while modules are imported there is nothing to lose.

    A KeyboardInterrupt would go through code that may swallow it or make an ImportError of it.
    """

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        _say_interrupted()
        os._exit(INTERRUPTED)

    if not _python_handles_ctrl_c():
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _python_handles_ctrl_c() -> bool:
    """Whether it would be a KeyboardInterrupt: nobody ignores or handles it, and this thread may say who does."""
    main_thread = threading.current_thread() is threading.main_thread()
    return main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _say_interrupted() -> None:
    """In one of all processes."""
    if os.environ.get("RANK", "0") == "0":
        say("interrupted")


def say(line: str) -> None:
    """Write a line to stderr. Where that is full or closed nothing can be said, and the exit code must do."""
    if sys.stderr is not None:
        with suppress(OSError, RuntimeError):  # a RuntimeError: a signal came while a line was being written
            print(line, file=sys.stderr, flush=True)
