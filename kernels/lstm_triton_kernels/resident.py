"""Resident weights: loaded before the time loop as a tuple of tiles, multiplied in every step.

A tile that is loaded before the loop and only multiplied in it stays in shared memory: the compiler allocates it there
once, ahead of the loop (tests/compile checks it).

Few batch rows are too little work to divide among warps by rows or units; so the columns K of the product are divided
among the warps. A tile has a leading axis of SPLIT parts, one for each warp, and the product is a batch of SPLIT
smaller products, whose sum is taken at the end of a step. Where SPLIT is 1 there is no such axis, and the warps share
the units.

Shapes: a left operand (SPLIT, BLOCK_B, BLOCK_K), a tile (SPLIT, BLOCK_K, BLOCK_U), an accumulator (SPLIT, BLOCK_B,
BLOCK_U), each without its first axis where SPLIT is 1. Chunk j has the columns from j·SPLIT·BLOCK_K on.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.operands import as_operand, multiply_add


@triton.constexpr_function
def peephole_gate(block, gates):
    """Return the gate block that a peephole block belongs to: g, the last but one, has none."""
    return block if block < gates - 2 else gates - 1


@triton.constexpr_function
def peephole_block(gate, gates):
    """Return the peephole block of a gate block other than g."""
    return min(gate, gates - 2)


@triton.jit
def chunk_columns(chunk, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the columns of a chunk: (SPLIT, BLOCK_K), or (BLOCK_K,)."""
    k = tl.arange(0, BLOCK_K)
    if SPLIT > 1:
        k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + k[None, :]
    return chunk * SPLIT * BLOCK_K + k


@triton.jit
def left_rows(row, SPLIT: tl.constexpr):
    """Return one value per batch row in the shape of the rows of a left operand."""
    return row[None, :, None] if SPLIT > 1 else row[:, None]


@triton.jit
def left_columns(k, SPLIT: tl.constexpr):
    """Return the columns of a chunk in the shape of the columns of a left operand."""
    return k[:, None, :] if SPLIT > 1 else k[None, :]


@triton.jit
def load_tiles(
    w_ptr, unit, H, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Load the tiles of every block of w (BLOCKS·H, H) for these units: block by block, CHUNKS chunks each.

    A unit is a row of its block and the columns of the product are the block's; TRANSPOSED: the other way round.
    """
    tiles = ()
    for block in tl.static_range(BLOCKS):
        for chunk in tl.static_range(CHUNKS):
            k = chunk_columns(chunk, SPLIT, BLOCK_K)
            if SPLIT > 1:
                k = k[:, :, None]
                u = unit[None, None, :]
            else:
                k = k[:, None]
                u = unit[None, :]
            tile_mask = (u < H) & (k < H)
            place = (block * H + k) * H + u if TRANSPOSED else (block * H + u) * H + k
            tile = tl.load(w_ptr + place, mask=tile_mask, other=0.0)
            tiles = tiles + (as_operand(tile, DOT, PRECISION),)  # noqa: RUF005
    return tiles


@triton.jit
def zero_accumulators(
    COUNT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, ACC: tl.constexpr
):
    """Return a tuple of COUNT accumulators of zeros."""
    acc = ()
    for _ in tl.static_range(COUNT):
        if SPLIT > 1:
            acc = acc + (tl.zeros((SPLIT, BLOCK_B, BLOCK_U), ACC),)  # noqa: RUF005
        else:
            acc = acc + (tl.zeros((BLOCK_B, BLOCK_U), ACC),)  # noqa: RUF005
    return acc


@triton.jit
def left_operands(
    ptr, H, row_mask, FIRST: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return pointers and masks of chunks FIRST to FIRST + CHUNKS - 1 of the rows that begin at ptr."""
    pointers, masks = (), ()
    for chunk in tl.static_range(FIRST, FIRST + CHUNKS):
        k = left_columns(chunk_columns(chunk, SPLIT, BLOCK_K), SPLIT)
        pointers = pointers + (ptr + k,)  # noqa: RUF005
        masks = masks + (row_mask & (k < H),)  # noqa: RUF005
    return pointers, masks


@triton.jit
def add_tile(acc, left, tile, PRECISION: tl.constexpr):
    """Return acc + left tile, for a tile of `load_tiles`."""
    return multiply_add(acc, as_operand(left, tile.dtype, PRECISION), tile, PRECISION)


@triton.jit
def add_to_all(acc, left, tiles, chunk: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc[n] + left times chunk `chunk` of block n, for every block n."""
    summed = ()
    for block in tl.static_range(len(acc)):
        summed = summed + (add_tile(acc[block], left, tiles[block * CHUNKS + chunk], PRECISION),)  # noqa: RUF005
    return summed


@triton.jit
def add_to_one(acc, left, tile, block: tl.constexpr, PRECISION: tl.constexpr):
    """Return acc with left tile added to acc[block]."""
    summed = ()
    for n in tl.static_range(len(acc)):
        summed = summed + (add_tile(acc[n], left, tile, PRECISION) if n == block else acc[n],)  # noqa: RUF005
    return summed


@triton.jit
def sum_parts(acc, SPLIT: tl.constexpr):
    """Return the sum over the parts that the warps hold, (BLOCK_B, BLOCK_U)."""
    return tl.sum(acc, 0) if SPLIT > 1 else acc
