"""The corpus: a text as numbers, its vocabulary, its training and validation parts, its batches.

Shapes: N characters, B streams (the batch), T characters in a window.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import reason
from lstm_triton.cli.parallel import World

VALIDATION_SHARE = 10
"""One character in so many is for validation: the tail of the text."""

_UTF32 = "utf-32-le" if sys.byteorder == "little" else "utf-32-be"


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file; without a path, the language reference that Python carries (`pydoc_data.topics`).

    Raises UserError if the file is missing, unreadable, empty or not UTF-8.
    """
    if path is None:
        try:
            from pydoc_data.topics import topics
        except ImportError as error:
            raise UserError("this Python has no pydoc_data.topics, the default text: give one with --text") from error
        return "\n\n".join(topics.values())
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read the text {path}: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the text {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if not text:
        raise UserError(f"the text {path} is empty")
    return text


@dataclass(frozen=True)
class Corpus:
    """A text cut into B contiguous streams.

    - vocabulary: its characters in order; a token is an index into it
    - digest: SHA-256 of the text
    - training, validation: (B, characters), int64; each row is a contiguous piece
    - window: T
    """

    vocabulary: str
    digest: str
    training: Tensor
    validation: Tensor
    window: int

    @property
    def windows_per_epoch(self) -> int:
        """How many training windows a stream holds."""
        return (self.training.shape[1] - 1) // self.window

    def training_window(self, step: int) -> tuple[Tensor, Tensor, bool]:
        """Inputs (B, T) and targets (B, T) of a step (from 0), and whether an epoch, so a new state, begins there."""
        index = step % self.windows_per_epoch
        begin = index * self.window
        end = begin + self.window
        return self.training[:, begin:end], self.training[:, begin + 1 : end + 1], index == 0

    def to(self, device: torch.device) -> Corpus:
        """The same corpus with its tokens on a device."""
        return replace(self, training=self.training.to(device), validation=self.validation.to(device))

    def share(self, world: World) -> Corpus:
        """The same corpus with the streams of one process of `world` only, on its device."""
        shared = replace(self, training=world.share(self.training), validation=world.share(self.validation))
        return shared.to(world.device)


def build_corpus(text: str, batch: int, window: int) -> Corpus:
    """Number the characters and cut the text into `batch` streams; the last tenth of it is the validation part.

    Raises UserError if the text is too short for one window per stream.
    """
    code_points = torch.frombuffer(bytearray(text.encode(_UTF32)), dtype=torch.int32)
    characters, tokens = code_points.unique(return_inverse=True)
    validation_length = len(tokens) // VALIDATION_SHARE
    training, validation = tokens.split([len(tokens) - validation_length, validation_length])
    if len(training) < batch * (window + 1) or len(validation) < 2 * batch:
        needed = max(
            batch * (window + 1) * VALIDATION_SHARE // (VALIDATION_SHARE - 1) + 1, 2 * batch * VALIDATION_SHARE
        )
        raise UserError(
            f"the text is too short: {len(tokens):,} characters, and --batch {batch} with --window {window} "
            f"needs {needed:,}"
        )
    return Corpus(
        vocabulary="".join(map(chr, characters.tolist())),
        digest=hashlib.sha256(text.encode()).hexdigest(),
        training=_streams(training, batch),
        validation=_streams(validation, batch),
        window=window,
    )


def _streams(tokens: Tensor, batch: int) -> Tensor:
    """(N,) -> (B, N // B)."""
    length = len(tokens) // batch
    return tokens[: batch * length].view(batch, length)
