"""The order of the time steps, and where each step finds the states before it and leaves those after it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


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


def initial_slot(T: int, reverse: bool, saved: bool) -> int:
    """The slot of c_0 in `cells`."""
    return T if saved and reverse else 0


def final_slot(T: int, reverse: bool, saved: bool) -> int:
    """The slot of the last cell state in `cells`."""
    return T if saved and not reverse else 0


def steps(T: int, reverse: bool, saved: bool) -> Iterator[Step]:
    """All steps in the order in which they are computed.

    `cells` has T + 1 slots where every c_t is saved, c_0 before the first (behind the last when reversed);
    else a single slot that each step overwrites.
    """
    for n in range(T):
        t = T - 1 - n if reverse else n
        previous, current = (t + 1, t) if reverse else (t, t + 1)
        h_index = None if n == 0 else t + 1 if reverse else t - 1
        yield Step(t, h_index, previous, current) if saved else Step(t, h_index, 0, 0)
