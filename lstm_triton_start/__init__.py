"""Where `lstm-triton` starts. Importing PyTorch takes seconds, in which Ctrl-C is to end the program quietly too.

A package of its own, because Python imports `lstm_triton`, and with it PyTorch, before anything inside of it.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130


def main() -> NoReturn:
    """Run `lstm-triton` with the arguments of the process and exit; see `lstm_triton.cli.main`."""
    try:
        listening = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if listening:
            signal.signal(signal.SIGINT, _leave)
        from lstm_triton import cli

        if listening:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:
        _leave()


def _leave(number: int = signal.SIGINT, frame: FrameType | None = None) -> NoReturn:
    try:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, b"interrupted\n")
    finally:
        os._exit(INTERRUPTED)
