"""`lstm-triton` with something planted, as a program that `torchrun` can start: its first argument names it.

Gradients are clipped at CLIPPED_AT, a norm that some of the tests' steps reach and others do not.
"""

from __future__ import annotations

import errno
import os
import signal
import sys

import torch

from lstm_triton import cli
from lstm_triton.cli import training

CLIPPED_AT = 0.5
FAULTY_RANK = 1
FAULTY_STEP = 6


def fail_to_write(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("planted")


def plant(name: str) -> None:
    """In the process FAULTY_RANK, when the first of three models begins the step FAULTY_STEP (from 1)."""
    faults = {
        "nothing": lambda: None,
        "ctrl-c": lambda: signal.raise_signal(signal.SIGINT),
        "full disk": lambda: setattr(os, "fsync", fail_to_write),
        "out of memory": out_of_memory,
    }
    fault = faults[name]
    genuine, calls = training.training_step, 0

    def training_step(*arguments):
        nonlocal calls
        calls += 1
        if calls == 3 * FAULTY_STEP - 2 and os.environ["RANK"] == str(FAULTY_RANK):
            fault()
        return genuine(*arguments)

    training.MAX_GRADIENT_NORM = CLIPPED_AT
    training.training_step = training_step


if __name__ == "__main__":
    plant(sys.argv[1])
    cli.main(sys.argv[2:])
