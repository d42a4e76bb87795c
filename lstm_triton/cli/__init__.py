"""The program `lstm-triton`; needs the extra `cli` (typer, rich, matplotlib)."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from typing import NoReturn

REQUIREMENTS = ("typer", "rich", "matplotlib")
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the program with these arguments (default: those of the process) and exit.

    Exit codes: 0, 1 (something given cannot be used), 2 (unknown option or value), 130 (Ctrl-C).
    Every error is one line on stderr that starts with `error:`; of several processes one writes it.
    """
    missing = [name for name in REQUIREMENTS if find_spec(name) is None]
    if missing:
        print(f'error: not installed: {", ".join(missing)}; pip install "lstm-triton[cli]"', file=sys.stderr)
        raise SystemExit(1)
    try:
        from lstm_triton.cli.app import run

        code = run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        code = INTERRUPTED
    if code == INTERRUPTED and os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Of several processes: what PyTorch's process groups leave running can abort the interpreter on its way out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
