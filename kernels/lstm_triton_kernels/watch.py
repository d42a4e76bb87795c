"""Host side of persistent launches: whether one timed out, and launching them one at a time.

A launch that times out writes a word of pinned host memory. The host reads it before the library's next launch,
which costs no synchronisation, and inside a captured CUDA graph no node; a replayed launch writes the same word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TIMED_OUT = {1: "a count was not reached", 2: "values were not published"}
"""Bit of the word (sync.py) to what it means."""

WORDS = 1024
"""Launches that are told apart: the word of a launch is used again after so many others."""

CLEAN = bytes(16 * WORDS)
"""The words of a device while no launch has timed out."""


def reasons(code: int) -> str:
    """Return what a word that is not 0 means."""
    return " and ".join(words for bit, words in TIMED_OUT.items() if code & bit)


class ErrorWords:
    """The error words of one device, and the names of the launches that may write them."""

    def __init__(self, device: torch.device) -> None:
        # 16 bytes apart: Triton compiles anew for a pointer of another alignment.
        words = torch.zeros(WORDS, 4, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.memory = words.numpy()
        self.seen = self.memory[:, 0]
        self.words = words[:, :1].unbind()
        self.names = [""] * WORDS
        self.next = 0
        self.lock = threading.Lock()

    def take(self, name: str) -> Tensor:
        """Return the word (1,) int32 of a new launch."""
        with self.lock:
            index = self.next
            self.next = (index + 1) % WORDS
            self.names[index] = name
        return self.words[index]

    def check(self) -> None:
        """Raise RuntimeError naming the launches that timed out since the last check."""
        if self.memory.tobytes() == CLEAN:  # a third of what NumPy needs for it, and every call asks
            return
        failed = [(index, int(self.seen[index])) for index in self.seen.nonzero()[0]]
        self.seen[[index for index, _ in failed]] = 0
        launches = "; ".join(f"{self.names[index]} ({reasons(code)})" for index, code in failed)
        raise RuntimeError(
            "a persistent launch timed out waiting for the other thread blocks; the results are invalid; often another "
            f"process holds multiprocessors: {launches}"
        )


_error_words: dict[torch.device, ErrorWords] = {}
_last: dict[torch.device, tuple[Any, torch.cuda.Event]] = {}
_making = threading.Lock()
_launching = threading.Lock()


def error_words_of(device: torch.device) -> ErrorWords:
    """Return the error words of a device, made when first asked for."""
    with _making:
        if device not in _error_words:
            _error_words[device] = ErrorWords(device)
        return _error_words[device]


def check_launches() -> None:
    """Raise RuntimeError if a persistent launch that has ended timed out. Does not synchronize.

    The library does this at every call and before it launches kernels; after the last, synchronize, then call this.
    """
    for words in list(_error_words.values()):
        words.check()


@contextmanager
def one_at_a_time(device: torch.device) -> Iterator[None]:
    """Order the launches of the block, whose programs wait for each other, after all such launches before.

    Two of them at once could each hold the multiprocessors that the other needs. The launch itself asks the driver to
    start all programs together or none (it is cooperative); this keeps two streams of this process from meeting at all.
    While a CUDA graph is captured, only the launch's own guarantee holds: a capture may not depend on work outside it.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        yield
        return
    with _launching:
        stream = torch.cuda.current_stream(device)
        if device in _last and _last[device][0] != stream:
            stream.wait_event(_last[device][1])
        yield
        event = torch.cuda.Event()
        event.record(stream)
        _last[device] = (stream, event)
