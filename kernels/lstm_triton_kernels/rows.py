"""Batch rows of a persistent program: the rows of a block, their lengths, the time index of their steps.

A time index is one number for all rows, or with lengths one for each row, since the second direction starts at a row's
own end. An offset in time may pass 2^31 elements; one within a time step does not.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_block(n, block, rows, B, lengths_ptr, T, HAS_LENGTHS: tl.constexpr):
    """Return the index, the mask and the sequence length of row n of a block of `rows` rows; all of the shape of n."""
    row = block * rows + n
    row_mask = (n < rows) & (row < B)
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + row, mask=row_mask, other=0).to(tl.int32)
    else:
        length = T
    return row, row_mask, length


@triton.jit
def time_of_step(n, length, reverse):
    """Return the time index of a row's step n, counted from the front or from the back; beyond its length, n itself."""
    return tl.where(reverse & (n < length), length - 1 - n, n)


@triton.jit
def at_time(ptr, t, stride, HAS_LENGTHS: tl.constexpr):
    """Return the pointer to time index t of a buffer with that stride in time; with lengths a column, one per row."""
    if HAS_LENGTHS:
        return ptr + t.to(tl.int64)[:, None] * stride
    else:
        return ptr + t.to(tl.int64) * stride


@triton.jit
def row_values(value, HAS_LENGTHS: tl.constexpr):
    """Return one value per row as a column; with no lengths, the one value of all rows as it is."""
    if HAS_LENGTHS:
        return value[:, None]
    else:
        return value
