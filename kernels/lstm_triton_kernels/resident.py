"""Resident weights: loaded before the time loop as a tuple of tiles, multiplied in every step.

A tile that is loaded before the loop and only multiplied in it stays in shared memory: the compiler allocates it there
once, ahead of the loop (tests/compiled checks it).

Few batch rows are too little work to divide among warps by rows or units; so the columns K of the product are divided
among the warps. A tile has a leading axis of PARTS parts, one or more for each warp, and the product is a batch of
PARTS smaller products, whose sum is taken at the end of a step. The weights are the left operand, batch rows the right.

Shapes: a tile (PARTS, N, BLOCK_K), a right operand (PARTS, BLOCK_K, BLOCK_B), an accumulator (PARTS, N, BLOCK_B).
Forward, N is 4·BLOCK_U, the four gates of a unit one after another (stacked gates), so that one product and one sum
serve all gates, and K is H. Backward, N is BLOCK_U, and K is G·H: the gates are columns of the product. Chunk j has the
columns from j·PARTS·BLOCK_K on.

Every block is loaded in two dimensions, rows by all columns of a chunk, and cut into parts afterwards. The order of a
block in shared memory follows from that of the load; of a load in three dimensions releases of Triton choose different
ones.

Where one program holds all units there are no parts: the warps share the units, and the state is the left operand.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.sync import exchange_load, exchange_pause, exchange_wait


@triton.constexpr_function
def peephole_block(gate, gates):
    """Return the peephole block of a gate block other than g."""
    return min(gate, gates - 2)


@triton.jit
def multiply_add(acc, left, right):
    """Return acc + left right, with products that are not rounded to TF32."""
    return tl.dot(left, right, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def load_gate_tiles(w_ptr, unit, H, width, BLOCKS: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load one tile (BLOCK_K, BLOCK_U) of each block of w (BLOCKS·H, width), where one program holds all units.

    A unit is a row of its block and the columns of the product are the block's; TRANSPOSED: the other way round.
    """
    k, u = tl.arange(0, BLOCK_K)[:, None], unit[None, :]
    tiles = ()
    for block in tl.static_range(BLOCKS):
        row, column = (k, u) if TRANSPOSED else (u, k)
        place = (block * H + row) * width + column
        tiles = tiles + (tl.load(w_ptr + place, mask=(row < H) & (column < width), other=0.0),)  # noqa: RUF005
    return tiles


@triton.jit
def load_stacked_tiles(
    w_ptr, unit_from, H, width, GATES: tl.constexpr, PEEPHOLE: tl.constexpr, OUTPUT: tl.constexpr,
    CHUNKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the CHUNKS tiles of stacked gates of w (GATES·H, width) for BLOCK_U units; the fourth gate of three is zero.

    PEEPHOLE: w is a full peephole (Q·H, H), which has no block for the gate g; that gate's columns are zero, and
    without OUTPUT those of o.
    """
    n = tl.arange(0, 4 * BLOCK_U)
    gate = n % 4
    u = unit_from + n // 4
    row_mask = (gate < GATES) & (u < H)
    if PEEPHOLE:
        row_mask = row_mask & (gate != GATES - 2)
        if not OUTPUT:
            row_mask = row_mask & (gate != GATES - 1)
        gate = tl.where(gate == GATES - 1, GATES - 2, gate)
    w_row = w_ptr + ((gate * H + u) * width)[:, None]
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * PARTS * BLOCK_K + tl.arange(0, PARTS * BLOCK_K)[None, :]
        tile = tl.load(w_row + k, mask=row_mask[:, None] & (k < width), other=0.0)
        tile = tl.permute(tl.reshape(tile, (4 * BLOCK_U, PARTS, BLOCK_K)), (1, 0, 2))
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def load_transposed_tiles(
    w_ptr, unit, H, width, GATES: tl.constexpr, PEEPHOLE: tl.constexpr, OUTPUT: tl.constexpr, CHUNKS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the CHUNKS tiles of w (GATES·H, width) for these units: a unit is a column, K goes through all rows.

    PEEPHOLE: w is a full peephole (Q·H, H), which has no block for the gate g; those rows of the tile are zero, and
    without OUTPUT those of o.
    """
    n = tl.arange(0, PARTS * BLOCK_K)
    if BLOCK_U > 8:  # the rows of the load go through the parts in turn: then a thread's registers hold one part
        n = n % PARTS * BLOCK_K + n // PARTS
    u = unit[None, :]
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * PARTS * BLOCK_K + n
        row_mask = k < GATES * H
        if PEEPHOLE:
            reads_o = (k >= (GATES - 1) * H) if OUTPUT else (k < 0)
            row_mask = row_mask & ((k < (GATES - 2) * H) | reads_o)
            k = tl.where(k < (GATES - 2) * H, k, k - H)
        tile = tl.load(w_ptr + (k * width)[:, None] + u, mask=row_mask[:, None] & (u < width), other=0.0)
        if BLOCK_U > 8:
            tile = tl.permute(tl.reshape(tile, (BLOCK_K, PARTS, BLOCK_U)), (1, 2, 0))
        else:
            tile = tl.permute(tl.reshape(tile, (PARTS, BLOCK_K, BLOCK_U)), (0, 2, 1))
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def load_second_tile(w_ptr, unit, last, K, stride_unit, stride_k, BLOCK_K: tl.constexpr):
    """Load the tile (BLOCK_K, BLOCK_U) of a product within a step, where one program holds all units.

    Of units below `last` and K columns, so far from each other.
    """
    k, u = tl.arange(0, BLOCK_K)[:, None], unit[None, :]
    return tl.load(w_ptr + u * stride_unit + k * stride_k, mask=(u < last) & (k < K), other=0.0)


@triton.jit
def load_second_tiles(
    w_ptr, unit, last, K, stride_unit, stride_k, CHUNKS: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Load the CHUNKS tiles (PARTS, BLOCK_U, BLOCK_K) of the same, where programs hold parts of the units."""
    tiles = ()
    for chunk in tl.static_range(CHUNKS):
        k = chunk * PARTS * BLOCK_K + tl.arange(0, PARTS * BLOCK_K)
        place = unit[:, None] * stride_unit + k[None, :] * stride_k
        tile = tl.load(w_ptr + place, mask=(unit < last)[:, None] & (k < K)[None, :], other=0.0)
        tile = tl.permute(tl.reshape(tile, (unit.shape[0], PARTS, BLOCK_K)), (1, 0, 2))
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def exchanged_product(
    ptr, K, row_mask, w, counter_ptr, step, pause, max_polls, error_ptr, WAIT: tl.constexpr, CHUNKS: tl.constexpr,
    PIECES: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Wait for rows of K elements of a step, the step-th from 1 on, and multiply them with tiles of units.

    ptr, row_mask: as of `chunk_pointers`; counter_ptr: of these rows alone, since a program that does not wait for them
    may be ahead of others in other exchanges. Returns the block (BLOCK_B, BLOCK_U) and the next wait's max_polls.
    """
    exchange_pause(pause, WAIT)
    max_polls = exchange_wait(counter_ptr, step * tl.num_programs(0), max_polls, error_ptr, WAIT)
    GROUP: tl.constexpr = CHUNKS // PIECES
    acc = tl.zeros((PARTS, BLOCK_U, BLOCK_B), ptr.dtype.element_ty)
    for first in tl.static_range(0, CHUNKS, GROUP):
        pointers, masks = chunk_pointers(ptr, K, row_mask, first, GROUP, PARTS, BLOCK_K)
        read, max_polls = exchange_load(pointers, masks, max_polls, error_ptr, WAIT)
        for m in tl.static_range(GROUP):
            acc = multiply_add(acc, w[first + m], as_right(read[m], PARTS))
    return sum_units(acc, WARPS), max_polls


@triton.jit
def divided_by(H, DIVISOR: tl.constexpr):
    """Return H, which DIVISOR divides, as a product with it: the compiler loads in wider pieces for that.

    That 16 divides an argument it finds out by itself.
    """
    if DIVISOR == 1 or DIVISOR == 16:
        return H
    else:
        return H // DIVISOR * DIVISOR


@triton.jit
def chunk_pointers(
    ptr, K, row_mask, FIRST: tl.constexpr, COUNT: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return pointers and masks, (BLOCK_B, PARTS·BLOCK_K) each, of COUNT chunks from FIRST on, of rows of K elements.

    ptr, row_mask: (BLOCK_B, 1), where rows begin, and those that are read.
    """
    WIDTH: tl.constexpr = PARTS * BLOCK_K
    pointers, masks = (), ()
    for chunk in tl.static_range(FIRST, FIRST + COUNT):
        k = chunk * WIDTH + tl.arange(0, WIDTH)[None, :]
        pointers = pointers + (ptr + k,)  # noqa: RUF005
        masks = masks + (row_mask & (k < K),)  # noqa: RUF005
    return pointers, masks


@triton.jit
def as_right(block, PARTS: tl.constexpr):
    """Return a loaded chunk (BLOCK_B, PARTS·BLOCK_K) as a right operand."""
    right = tl.reshape(block, (block.shape[0], PARTS, block.shape[1] // PARTS))
    return tl.permute(right, (1, 2, 0))


@triton.constexpr_function
def by_warp(shape, warps):
    """Return the shape of an accumulator whose parts are cut into those that a warp holds, and the warps."""
    return [shape[0] // warps, warps, *shape[1:]]


@triton.jit
def sum_parts(acc, WARPS: tl.constexpr):
    """Return the sum over the parts, the first of 3 or 4 axes.

    First over the parts that a warp holds, in registers. Then, through shared memory, every thread gets all remaining
    parts of its own outputs, and other outputs than any other thread: the axis of size 1 keeps the compiler from
    leaving the sum in the layout of the product, in which every warp would compute every output. (Triton 3.9 removes an
    axis that a reshape takes away before the sum.)
    """
    if acc.shape[0] > WARPS:
        acc = tl.sum(tl.reshape(acc, by_warp(acc.shape, WARPS)), 0)
    total = tl.sum(tl.expand_dims(acc, len(acc.shape)), 0)
    return tl.reshape(total, acc.shape[1:])


@triton.jit
def sum_units(acc, WARPS: tl.constexpr):
    """Return the sum over the parts of an accumulator of units, as a block (BLOCK_B, BLOCK_U)."""
    return sum_parts(tl.permute(acc, (0, 2, 1)), WARPS)


@triton.jit
def sum_gates(acc, GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, WARPS: tl.constexpr):
    """Return the same of an accumulator of stacked gates, as a tuple of one block (BLOCK_B, BLOCK_U) for each gate."""
    by_gate = tl.permute(tl.reshape(acc, (acc.shape[0], BLOCK_U, 4, BLOCK_B)), (0, 2, 3, 1))
    total = tl.reshape(sum_parts(by_gate, WARPS), (2, 2, BLOCK_B, BLOCK_U))
    even, odd = tl.split(tl.permute(total, (2, 3, 0, 1)))
    a_0, a_2 = tl.split(even)
    a_1, a_3 = tl.split(odd)
    return (a_0, a_1, a_2, a_3) if GATES == 4 else (a_0, a_1, a_2)
