"""Layouts of sequences and states: the user's, and how the layers take them.

The layers take sequences as (T, B, F), or packed as (N, F), and states as (D·L, B, F). Shapes: T time steps, B batch
rows, N the steps of all rows together, L layers, D directions, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import checks
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
        """Return the layout of an input whose number of dimensions is right."""
        if not isinstance(input, Tensor):
            packing = Packing(input)
            return cls(packing.T, packing.B, True, batch_first, input, packing)
        if input.dim() == 2:
            return cls(input.shape[0], 1, False, False)
        first, second, _ = input.shape
        return cls(second, first, True, True) if batch_first else cls(first, second, True, False)

    @classmethod
    def take(
        cls, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None, batch_first: bool,
        weights: Sequence[Tensor], sizes: tuple[int, int, int], count: int, autocast: bool,
    ) -> tuple[Layout, Tensor, Tensor, Tensor]:  # fmt: skip
        """Return the layout of a call; input and initial states as the layers take them, zero states if there are none.

        sizes: I, H and P; count: layers times directions. Raises ValueError or RuntimeError, as `torch.nn.LSTM` does,
        unless input (of the right number of dimensions), states and weights have sizes, types and devices that fit.
        """
        I, H, P = sizes  # noqa: E741
        layout = cls.of(input, batch_first)
        x = layout.sequence(input if isinstance(input, Tensor) else input.data)
        if hx is not None:
            checks.lstm_state_dimensions(hx, layout.batched)
        checks.lstm_dtype(x.dtype, weights[0].dtype, autocast)
        checks.lstm_features(x.shape[-1], I)
        if hx is None:
            h_0 = x.new_zeros(count, layout.B, P)
            c_0 = h_0 if P == H else x.new_zeros(count, layout.B, H)
        else:
            checks.lstm_states(hx, ((count, layout.B, P), (count, layout.B, H)), layout.batched)
            h_0, c_0 = layout.state(hx[0]), layout.state(hx[1])
        checks.same_device(x.device, (h_0, c_0), weights)
        checks.sequence_length(layout.T)
        if not autocast:
            checks.same_dtype(x.dtype, (h_0, c_0), weights)
        return layout, x, h_0, c_0

    def sequence(self, sequence: Tensor) -> Tensor:
        """Return a sequence of the user's, with or without features, as the layers take it; if packed, unchanged."""
        if self.packed is not None:
            return sequence
        if not self.batched:
            return sequence.unsqueeze(1)
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def steps(self, flags: Tensor) -> Tensor:
        """Return flags of the steps of each row, laid out like a padded input, as (T, B) in the order of the rows."""
        if self.packed is None:
            return self.sequence(flags)
        flags = flags.transpose(0, 1) if self.batch_first else flags
        order = self.packed.sorted_indices
        return flags if order is None else flags.index_select(1, order)

    def state(self, state: Tensor) -> Tensor:
        """Return an initial state of the user's, as the layers take it."""
        if not self.batched:
            return state.unsqueeze(1)
        order = None if self.packed is None else self.packed.sorted_indices
        return state if order is None else state.index_select(1, order)

    def user_sequence(self, sequence: Tensor) -> Tensor | PackedSequence:
        """Return a sequence that the layers computed, laid out as the input; packed, it may come padded."""
        if self.packed is not None and self.packing is not None:
            _, *order = self.packed
            return PackedSequence(sequence if sequence.dim() == 2 else self.packing.pack(sequence), *order)
        if not self.batched:
            return sequence.squeeze(1)
        return sequence.transpose(0, 1) if self.batch_first else sequence

    def user_state(self, state: Tensor) -> Tensor:
        """Return a final state that the layers computed, laid out as the initial one."""
        if not self.batched:
            return state.squeeze(1)
        order = None if self.packed is None else self.packed.unsorted_indices
        return state if order is None else state.index_select(1, order)
