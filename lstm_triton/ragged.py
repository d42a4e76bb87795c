"""Rows of different lengths: lengths as they are given, and a PackedSequence to padded form and back.

All of it on the device of the data, without waiting for it: a PackedSequence keeps its batch sizes on the host, and the
rest follows from them. Shapes: T time steps, B batch rows, N the steps of all rows together, F features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton.batching import one_by_one


@torch.library.custom_op("lstm_triton::checked_lengths", mutates_args=())
def checked_lengths(lengths: Tensor, T: int, device: torch.device) -> Tensor:
    """lengths (B,), integers on any device -> (B,) int64 on `device`, each from 1 to T.

    Raises ValueError for a value that is not. Lengths on a GPU are looked at, too, which waits for the GPU; inside a
    CUDA graph's capture they cannot be, and what is out of range is taken as 1 or T.
    """
    if not (lengths.is_cuda and torch.cuda.is_current_stream_capturing()):
        for row, length in enumerate(lengths.tolist()):
            if not 1 <= length <= T:
                raise ValueError(f"lengths must be from 1 to the {T} steps of the input, got {length} in row {row}")
    # A copy from pageable memory has read it when it returns, and does not wait for the device.
    own = lengths.clone() if lengths.device.type == "cpu" else lengths
    return own.to(device, torch.int64, non_blocking=True, copy=True).clamp_(1, T)


@checked_lengths.register_fake
def _(lengths, T, device):  # type: ignore[no-untyped-def]
    return torch.empty(lengths.shape, dtype=torch.int64, device=device)


checked_lengths.register_vmap(one_by_one(checked_lengths))


class Packing(NamedTuple):
    """How a batch is packed: step by step, in each the rows that are still running, the longest row first.

    - batch_sizes: (T,) int64 on the host, rows in each step
    - places: (N,) int64, where each packed row of features stands in padded form, t·B + b
    - lengths: (B,) int64
    """

    batch_sizes: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, packed: PackedSequence) -> Packing:
        """The packing of a sequence, on the device of its data."""
        data, batch_sizes = packed.data, packed.batch_sizes
        device = data.device
        B = int(batch_sizes[0])
        running = batch_sizes.to(device, non_blocking=True)
        ends = running.cumsum(0)
        n = torch.arange(len(data), device=device)
        t = torch.searchsorted(ends, n, right=True)
        places = t * B + n - (ends - running)[t]
        return cls(batch_sizes, places, (running[:, None] > torch.arange(B, device=device)).sum(0))

    @property
    def T(self) -> int:
        """Steps of the longest row."""
        return len(self.batch_sizes)

    @property
    def B(self) -> int:
        """Rows."""
        return len(self.lengths)

    def pad(self, data: Tensor) -> Tensor:
        """(N, F) -> (T, B, F), zero beyond each row's length."""
        flat = data.new_zeros(self.T * self.B, data.shape[1]).index_copy(0, self.places, data)
        return flat.view(self.T, self.B, data.shape[1])

    def pack(self, padded: Tensor) -> Tensor:
        """(T, B, F) -> (N, F)."""
        return padded.flatten(0, 1).index_select(0, self.places)
