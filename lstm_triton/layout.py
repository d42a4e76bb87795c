"""How the user lays out sequences and states, and how the layers take them.

The layers take sequences as (T, B, F), or packed as (N, F), and states as (D·L, B, F). Shapes: T time steps, B batch
rows, N the steps of all rows together, L layers, D directions, F features.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton.ragged import Packing


class Layout(NamedTuple):
    """The layout of one call.

    - T, B: its steps and rows
    - batched, batch_first: whether the input has a batch dimension, and whether that comes first
    - packed, packing: the input if it is a PackedSequence, and how that is packed
    """

    T: int
    B: int
    batched: bool
    batch_first: bool
    packed: PackedSequence | None = None
    packing: Packing | None = None

    @classmethod
    def of(cls, input: Tensor | PackedSequence, batch_first: bool) -> Layout:
        """The layout of an input whose number of dimensions is right."""
        if not isinstance(input, Tensor):
            packing = Packing(input)
            return cls(packing.T, packing.B, True, batch_first, input, packing)
        if input.dim() == 2:
            return cls(input.shape[0], 1, False, False)
        first, second, _ = input.shape
        return cls(second, first, True, True) if batch_first else cls(first, second, True, False)

    def sequence(self, sequence: Tensor) -> Tensor:
        """A sequence of the user's, as the layers take it; of a PackedSequence its data. With or without features."""
        if self.packed is not None:
            return sequence
        if not self.batched:
            return sequence.unsqueeze(1)
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def steps(self, flags: Tensor) -> Tensor:
        """One flag for each step of each row, laid out like a padded input, as (T, B) in the order of the rows."""
        if self.packed is None:
            return self.sequence(flags)
        flags = flags.transpose(0, 1) if self.batch_first else flags
        order = self.packed.sorted_indices
        return flags if order is None else flags.index_select(1, order)

    def state(self, state: Tensor) -> Tensor:
        """An initial state of the user's, as the layers take it."""
        if not self.batched:
            return state.unsqueeze(1)
        order = None if self.packed is None else self.packed.sorted_indices
        return state if order is None else state.index_select(1, order)

    def user_sequence(self, sequence: Tensor) -> Tensor | PackedSequence:
        """A sequence that the layers give, as the user laid out the input; packed, they may give it padded."""
        if self.packed is not None and self.packing is not None:
            _, *order = self.packed
            return PackedSequence(sequence if sequence.dim() == 2 else self.packing.pack(sequence), *order)
        if not self.batched:
            return sequence.squeeze(1)
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def user_state(self, state: Tensor) -> Tensor:
        """A final state that the layers give, as the user laid out the initial one."""
        if not self.batched:
            return state.squeeze(1)
        order = None if self.packed is None else self.packed.unsorted_indices
        return state if order is None else state.index_select(1, order)
