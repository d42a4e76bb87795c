"""Weights that stay on the chip: loaded before the time loop as a tuple of tiles, multiplied in every step.

A tile that is loaded before the loop and only ever multiplied stays in shared memory (the compiler allocates it there
once, ahead of the loop; tests/compile proves it for every plan).

Few batch rows are too little work for several warps in rows or columns; so the columns K of the product are shared out
among the warps. A tile has a leading axis of SPLIT parts, one a warp, and the product is a batch of SPLIT smaller ones
whose sum is taken at the end of a step. Where SPLIT is 1 there is no such axis, and the warps share the units.

Shapes: a left operand (SPLIT, BLOCK_B, BLOCK_K), a tile (SPLIT, BLOCK_K, BLOCK_U), an accumulator (SPLIT, BLOCK_B,
BLOCK_U), each without its first axis where SPLIT is 1. Chunk j has the columns from j·SPLIT·BLOCK_K on.
"""

import triton
import triton.language as tl

from lstm_triton_kernels.operands import as_operand


@triton.constexpr_function
def peephole_gate(block, gates):
    """The gate block that a peephole block belongs to: g, the last but one, has none."""
    return block if block < gates - 2 else gates - 1


@triton.constexpr_function
def peephole_block(gate, gates):
    """The peephole block of a gate block other than g."""
    return min(gate, gates - 2)


@triton.jit
def chunk_columns(chunk, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """The columns of a chunk: (SPLIT, BLOCK_K), or (BLOCK_K,)."""
    k = tl.arange(0, BLOCK_K)
    if SPLIT > 1:
        k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + k[None, :]
    return chunk * SPLIT * BLOCK_K + k


@triton.jit
def left_rows(row, SPLIT: tl.constexpr):
    """One value a batch row, as the rows of a left operand."""
    return row[None, :, None] if SPLIT > 1 else row[:, None]


@triton.jit
def left_columns(k, SPLIT: tl.constexpr):
    """The columns of a chunk, as the columns of a left operand."""
    return k[:, None, :] if SPLIT > 1 else k[None, :]


@triton.jit
def load_tiles(
    w_ptr, unit, H, BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, TRANSPOSED: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of every block of w (BLOCKS·H, H) for these units: block by block, each its CHUNKS chunks.

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
            inside = (u < H) & (k < H)
            place = (block * H + k) * H + u if TRANSPOSED else (block * H + u) * H + k
            tile = tl.load(w_ptr + place, mask=inside, other=0.0)
            tiles = tiles + (as_operand(tile, DOT, PRECISION),)  # noqa: RUF005
    return tiles


@triton.jit
def zero_accumulators(
    COUNT: tl.constexpr, SPLIT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, ACC: tl.constexpr
):
    """A tuple of COUNT accumulators."""
    acc = ()
    for _ in tl.static_range(COUNT):
        if SPLIT > 1:
            acc = acc + (tl.zeros((SPLIT, BLOCK_B, BLOCK_U), ACC),)  # noqa: RUF005
        else:
            acc = acc + (tl.zeros((BLOCK_B, BLOCK_U), ACC),)  # noqa: RUF005
    return acc


@triton.jit
def left_operands(ptr, H, reads, FIRST: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, BLOCK_K: tl.constexpr):
    """Pointers and masks of chunks FIRST to FIRST + CHUNKS - 1 of rows that begin at ptr, of which `reads` are read."""
    pointers, masks = (), ()
    for chunk in tl.static_range(FIRST, FIRST + CHUNKS):
        k = left_columns(chunk_columns(chunk, SPLIT, BLOCK_K), SPLIT)
        pointers = pointers + (ptr + k,)  # noqa: RUF005
        masks = masks + (reads & (k < H),)  # noqa: RUF005
    return pointers, masks


@triton.jit
def add_product(acc, left, tile, PRECISION: tl.constexpr):
    """acc + left tile, for a tile of `load_tiles`."""
    left = as_operand(left, tile.dtype, PRECISION)
    return tl.dot(left, tile, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def add_to_all(acc, left, tiles, chunk: tl.constexpr, CHUNKS: tl.constexpr, PRECISION: tl.constexpr):
    """acc[n] + left times chunk `chunk` of block n, for every block: one chain of products a block."""
    summed = ()
    for block in tl.static_range(len(acc)):
        summed = summed + (add_product(acc[block], left, tiles[block * CHUNKS + chunk], PRECISION),)  # noqa: RUF005
    return summed


@triton.jit
def add_to_one(acc, left, tile, block: tl.constexpr, PRECISION: tl.constexpr):
    """acc with left tile added to acc[block]."""
    summed = ()
    for n in tl.static_range(len(acc)):
        summed = summed + (add_product(acc[n], left, tile, PRECISION) if n == block else acc[n],)  # noqa: RUF005
    return summed


@triton.jit
def sum_parts(acc, SPLIT: tl.constexpr):
    """An accumulator as one block (BLOCK_B, BLOCK_U): the sum of the parts that the warps hold."""
    return tl.sum(acc, 0) if SPLIT > 1 else acc
