"""Rows of different lengths: lengths as they are given, and a PackedSequence to padded form and back.

All of it on the device of the data, without waiting for it: a PackedSequence keeps its batch sizes on the host, and the
rest follows from them. Shapes: T time steps, B batch rows, N the steps of all rows together, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import transforms
from lstm_triton.batching import one_by_one


@torch.library.custom_op("lstm_triton::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, T: int, device: torch.device) -> Tensor:
    """lengths (B,), integers on any device -> (B,) int64 on `device`, each from 1 to T.

    Raises ValueError for a value that is not. Lengths on a GPU are looked at, too, which waits for the GPU. Inside a
    CUDA graph's capture they must be there (else RuntimeError) and cannot be looked at: what is out of range is taken
    as 1 or T.
    """
    if capturing(device):
        if lengths.device != device:
            raise RuntimeError(
                f"inside a CUDA graph's capture lengths must be on {device}, they are on {lengths.device}"
            )
    else:
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= T:
                raise ValueError(f"lengths must be from 1 to the {T} steps of the input, got {length} in row {row}")
    return without_waiting(lengths, device).to(torch.int64, copy=True).clamp_(1, T)


@checked_lengths.register_fake
def _(lengths, T, device):  # type: ignore[no-untyped-def]
    return torch.empty(lengths.shape, dtype=torch.int64, device=device)


checked_lengths.register_vmap(one_by_one(checked_lengths))


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on the device; a copy from pageable memory has read it when it returns, and does not wait."""
    if tensor.device == device:
        return tensor
    return (tensor.clone() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


def all_full(lengths: Tensor, T: int) -> bool:
    """Return whether lengths that stand on the host, where they can be looked at for nothing, are all T."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or transforms.active()
    return lengths.device.type == "cpu" and not traced and bool((lengths == T).all())


class Packing:
    """Packing of a batch: step by step, in each the rows that are still running, the longest row first.

    - batch_sizes: (T,) int64 on the host, rows in each step
    - device: that of the data
    - T, B, N: steps of the longest row, rows, steps of all rows together
    - full: whether all rows have all T steps, so that padded form is the packed one with another shape
    """

    def __init__(self, packed: PackedSequence) -> None:
        self.batch_sizes = packed.batch_sizes
        self.device = packed.data.device
        self.T, self.N = self.batch_sizes.shape[0], packed.data.shape[0]
        # int() of it would be a constant for torch.export.
        self.B: int = self.batch_sizes[0].item()  # type: ignore[assignment]
        self.full = not torch.compiler.is_compiling() and self.N == self.T * self.B
        self._index: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> Tensor | None:
        """(B,) int64, on the device; None if the rows are full."""
        return None if self.full else self._places_and_lengths()[1]

    def pad(self, data: Tensor) -> Tensor:
        """(N, F) -> (T, B, F), zero beyond each row's length."""
        if self.full:
            return data.reshape(self.T, self.B, data.shape[1])
        flat = data.new_zeros(self.T * self.B, data.shape[1]).index_copy(0, self._places_and_lengths()[0], data)
        return flat.view(self.T, self.B, data.shape[1])

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, F) -> (N, F)."""
        if self.full:
            return padded.flatten(0, 1)
        return padded.flatten(0, 1).index_select(0, self._places_and_lengths()[0])

    def _places_and_lengths(self) -> tuple[Tensor, Tensor]:
        """Where each packed row of features stands in padded form, t·B + b, (N,); and the lengths. Made once."""
        if self._index is None:
            running = self._running()
            ends = running.cumsum(0)
            n = torch.arange(self.N, device=self.device)
            t = torch.searchsorted(ends, n, right=True)
            lengths = (running[:, None] > torch.arange(self.B, device=self.device)).sum(0)
            self._index = (t * self.B + n - (ends - running)[t], lengths)
        return self._index

    def _running(self) -> Tensor:
        """Return the batch sizes on the device."""
        if not capturing(self.device):
            return self.batch_sizes.to(self.device, non_blocking=True)
        # A graph would copy from the host's memory at each replay; launches carry their numbers.
        sizes, counts = self.batch_sizes.unique_consecutive(return_counts=True)
        pieces = zip(sizes.tolist(), counts.tolist(), strict=True)
        return torch.cat([torch.full((count,), size, device=self.device) for size, count in pieces])


def capturing(device: torch.device) -> bool:
    """Return whether a CUDA graph is being captured on the device."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()
