"""Batch rows of a persistent program: which rows a block has, how long each is, where its steps stand in time.

A time index is one number for all rows, or with lengths one for each, since the second direction starts at a row's own
end. An offset in time may pass 2^31 elements; one within a time step does not.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.resident import left_rows


@triton.jit
def rows_of_block(block, rows, B, lengths_ptr, T, BLOCK_B: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """The batch rows of a row block, which has `rows` of them, as (BLOCK_B,); which of them there are; their steps."""
    n = tl.arange(0, BLOCK_B)
    row = block * rows + n
    lives = (n < rows) & (row < B)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row, mask=lives, other=0).to(tl.int32)
    else:
        length = T
    return row, lives, length


@triton.jit
def time_of_step(n, length, reverse):
    """The time index of step n of a row: its n-th from the front, or from the back; dead steps count on."""
    return tl.where(reverse & (n < length), length - 1 - n, n)


@triton.jit
def at_time(ptr, t, size, HAS_LENGTHS: tl.constexpr):
    """Where index t of a buffer with `size` elements a time step begins; with lengths a column, one for each row."""
    if HAS_LENGTHS:
        return ptr + t.to(tl.int64)[:, None] * size
    else:
        return ptr + t.to(tl.int64) * size


@triton.jit
def left_at_time(ptr, t, size, SPLIT: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """The same, to be read as a left operand."""
    if HAS_LENGTHS:
        return ptr + left_rows(t.to(tl.int64), SPLIT) * size
    else:
        return ptr + t.to(tl.int64) * size


@triton.jit
def row_values(value, HAS_LENGTHS: tl.constexpr):
    """What is one value a row, as a column; what is one for all, as it is."""
    if HAS_LENGTHS:
        return value[:, None]
    else:
        return value
