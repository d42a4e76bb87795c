"""The order of the time steps of one direction: how many steps a row has, where it is reset, which way it runs.

Shapes: T time steps, B batch rows, F features, H hidden units, P hidden size after projection (else H). A sequence is
(T, B, ...); `cells` is (T + 1, B, H), the cell state before each step in time and one after the last.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, overload

import torch
from torch import Tensor

from lstm_triton_kernels.regularize import UNREGULARIZED, Regularized


class Step(NamedTuple):
    """One time step.

    - t: its index in the input, the output and the saved gates
    - h_index: index in the output of the hidden state it reads; None for the first step, which reads h_0
    - previous, current: slots in `cells` of the cell state it reads and of the one it writes
    """

    t: int
    h_index: int | None
    previous: int
    current: int


class Order(NamedTuple):
    """The order of the steps, the same in every layer.

    - T: time steps
    - lengths: (B,) int64, steps of each row, 1 to T; None: all rows have T. The second direction starts at a row's end
    - resets: (T, B) bool, where the state is zero before that step; None: nowhere
    - reverse: whether the steps run from the last to the first
    - regularized: the rules and masks of regularised steps: of a layer, but in the order of one direction those of that
    """

    T: int
    lengths: Tensor | None = None
    resets: Tensor | None = None
    reverse: bool = False
    regularized: Regularized = UNREGULARIZED

    @property
    def ragged(self) -> bool:
        """Whether rows differ: in their lengths, or in where they are reset."""
        return self.lengths is not None or self.resets is not None

    @property
    def reset_bytes(self) -> Tensor | None:
        """The resets as the kernels read them: contiguous uint8."""
        return None if self.resets is None else self.resets.contiguous().view(torch.uint8)

    def direction(self, n: int) -> Order:
        """Return the order of direction n of a layer: the second runs backwards in time."""
        return self._replace(reverse=n == 1, regularized=self.regularized.direction(n))

    # Single steps, for a loop over them. `saved`: `cells` has T + 1 slots and keeps every c_t, with c_0 before the
    # first (behind the last when reversed); else it has a single slot that each step overwrites.

    def steps(self, saved: bool) -> Iterator[Step]:
        """Yield all steps in the order in which they are computed."""
        for n in range(self.T):
            t = self.T - 1 - n if self.reverse else n
            previous, current = (t + 1, t) if self.reverse else (t, t + 1)
            h_index = None if n == 0 else t + 1 if self.reverse else t - 1
            yield Step(t, h_index, previous, current) if saved else Step(t, h_index, 0, 0)

    def initial_slot(self, saved: bool) -> int:
        """Return the slot of c_0 in `cells`."""
        return self.T if saved and self.reverse else 0

    def final_slot(self, saved: bool) -> int:
        """Return the slot of the last cell state in `cells`."""
        return self.T if saved and not self.reverse else 0

    def part(self, now: slice) -> Order:
        """Return the order of some of the steps, of rows of full length."""
        assert self.lengths is None
        resets = None if self.resets is None else self.resets[now]
        return self._replace(T=now.stop - now.start, resets=resets, regularized=self.regularized.at(now))

    # All steps of a row that has a length of its own.

    def beyond(self) -> Tensor | None:
        """Return which steps a row does not have, (T, B, 1) bool; None where all rows have all."""
        if self.lengths is None:
            return None
        return (torch.arange(self.T, device=self.lengths.device)[:, None] >= self.lengths)[..., None]

    def zero_beyond(self, sequence: Tensor) -> Tensor:
        """Return a sequence (T, B, F) that is zero beyond each row's length."""
        beyond = self.beyond()
        return sequence if beyond is None else sequence.masked_fill(beyond, 0)

    def first(self, sequence: Tensor) -> Tensor:
        """Return what stands at the step that each row begins with, (B, ...)."""
        return self._at_end(sequence) if self.reverse else sequence[0]

    def last(self, sequence: Tensor) -> Tensor:
        """Return what stands at the step that each row ends with, (B, ...)."""
        return sequence[0] if self.reverse else self._at_end(sequence)

    def _at_end(self, sequence: Tensor) -> Tensor:
        return sequence[-1] if self.lengths is None else sequence[self._ends(sequence)]

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the last step of each row in time stands, as indices of a sequence."""
        assert self.lengths is not None
        return self.lengths - 1, torch.arange(self.lengths.shape[0], device=like.device)

    def add_to_last(self, sequence: Tensor | None, last: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return a sequence (T, B, F) of that type plus `last` (B, F) at each row's last step, zero beyond its length.

        A new tensor, of rows with lengths. None stands for zero, in the result too.
        """
        if last is None:
            return None if sequence is None else self.zero_beyond(sequence)
        if sequence is None:
            sequence = last.new_zeros(self.T, *last.shape, dtype=dtype)
        else:
            sequence = self.zero_beyond(sequence.to(dtype))
        if self.reverse:
            sequence[0] += last
        else:
            sequence[self._ends(sequence)] += last
        return sequence

    @overload
    def flip(self, sequence: Tensor) -> Tensor: ...
    @overload
    def flip(self, sequence: Tensor | None) -> Tensor | None: ...
    def flip(self, sequence: Tensor | None) -> Tensor | None:
        """Return each row of a sequence backwards within its length, what is beyond in its place.

        Of `cells` each row's states, which are one more than it has steps.
        """
        if sequence is None:
            return None
        assert self.lengths is not None
        lengths = self.lengths + (len(sequence) - self.T)
        t = torch.arange(len(sequence), device=lengths.device)[:, None]
        places = torch.where(t < lengths, lengths - 1 - t, t)
        return sequence.gather(0, places.view(*places.shape, *[1] * (sequence.dim() - 2)).expand(sequence.shape))

    def flipped(self) -> Order:
        """Return the order of flipped sequences, which run forwards."""
        codes, clipped = self.flip(self.regularized.codes), self.flip(self.regularized.clipped)
        regularized = self.regularized._replace(codes=codes, clipped=clipped)
        return Order(self.T, self.lengths, self.flip(self.resets), regularized=regularized)

    # The states that the steps read.

    def cells_written(self, cells: Tensor) -> Tensor:
        """Return every c_t, (T, B, H), from `cells`."""
        return cells[:-1] if self.reverse else cells[1:]

    def cells_read(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_{t-1} as step t read it and c_t, each (T, B, H), from `cells`."""
        previous = cells[1:] if self.reverse else cells[:-1]
        if self.resets is not None:
            previous = previous.masked_fill(self.resets[..., None], 0)
        return previous, self.cells_written(cells)

    def read_first(self, values: Tensor) -> Tensor:
        """Return c_0 or the like, (B, F), as the first step of each row read it: zero where that is reset."""
        return values if self.resets is None else values.masked_fill(self.first(self.resets)[:, None], 0)

    def hidden_read_first(self, h_0: Tensor) -> Tensor:
        """Return h_0 (B, P) as W_hh read it in the first step of each row."""
        return self.regularized.drop_hidden(self.read_first(h_0))

    def hidden_read_after_first(self, output: Tensor) -> Tensor:
        """Return h_{t-1} (T - 1, B, P) as W_hh read it in all steps but the first; zero where a row begins later."""
        rest = output[1:] if self.reverse else output[:-1]
        if self.resets is not None:
            rest = rest.masked_fill(self.after_first(self.resets)[..., None], 0)
        return self.regularized.drop_hidden(rest)

    def after_first(self, sequence: Tensor) -> Tensor:
        """Return a sequence without the first of the T steps."""
        return sequence[:-1] if self.reverse else sequence[1:]

    def hidden_read(self, output: Tensor, h_0: Tensor) -> Tensor:
        """Return h_{t-1} (T, B, P) as W_hh read it in every step, from the output (T, B, P)."""
        rest, first = self.hidden_read_after_first(output), self.hidden_read_first(h_0)
        if not self.reverse:
            return torch.cat([first[None], rest])
        hidden = torch.cat([rest, first[None]])
        if self.lengths is not None:
            hidden[self._ends(hidden)] = first
        return hidden
