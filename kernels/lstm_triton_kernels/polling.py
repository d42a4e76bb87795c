"""Waiting for published values in the registers that tensor cores read them from, and where those values are.

Programs exchange values through a buffer of slots, one for every step and a first one for the initial state. A slot
holds rows of P elements for every row block, P a multiple of what the warps of a program read at once. With V elements
in 16 bytes, element (row, column) of a row block is at

- `TILED`: tile (row // 8, column // V), in it row % 8, column % V. A tile is a line of 128 bytes; what a program
  publishes fills tiles, and a load of a warp reads four whole tiles. A row block takes the room of the ROWS of
  its tile, so that strides are known when a kernel is compiled.
- else row · P + column, and a row block takes the room of the rows that it has.

What is published, and how a reader sees that it is there, is that of `sync.py` (*data*): a buffer filled with all ones,
a NaN that no value has. Here every warp waits by itself, for no more than it multiplies, in a small loop of inline PTX
without a barrier. A thread loads 16 bytes at a time, and repeats only loads whose bytes were not all there; the threads
of a warp leave the loop together.

The letter of the PTX memory model does not promise that this works. The stores of `publish` are plain, and need never
become visible to these loads; the L1 caches of these GPUs write through, so they do. And of accesses of two sizes that
race the model says nothing at all: elements of 16 bits are stored one by one or several at once, and read by loads of
128. That an element is nevertheless read whole is how these GPUs are built. tests/compiled executes the kernels with
stores that become visible late, one element at a time and in any order.

Operands: a thread of `mma` has of a right operand one row (lane // 4) and pairs of columns of its own. The choice of
these columns is free, as long as the weights are permuted in the same way: so a thread takes V adjacent columns, one
load of 16 bytes (a layout with a k_width of V). A chunk is 64 bytes of a row, which four lanes share: 32 columns of
16-bit elements, 16 of 32-bit ones.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.target_info import cuda_capability_geq


@triton.constexpr_function
def lane_elements(element):
    """Return the elements in 16 bytes."""
    return 128 // element.primitive_bitwidth


@triton.constexpr_function
def poll_ptx(places, tiles, step, bits, has_max, pauses):
    """Return inline PTX that loads 16 bytes at every place until no element is all ones; and its constraints.

    - places: loads of a thread, at `step` bytes from each other, in each of `tiles` (1 or 2) sets of 8 rows
    - bits: of an element, 16 or 32; has_max: whether the GPU has the maximum of two 16-bit halves; pauses: whether
      clocks of the multiprocessor pass before the first poll

    Outputs: the words in the order place, tile, word; then the polls left. Inputs: an address for each tile; the most
    polls; with `pauses` the clocks. When no poll is left, the loop ends: then that output is less than 1, and words may
    hold all ones.
    """
    loads = [(tile, step * place) for place in range(places) for tile in range(tiles)]
    n = 4 * len(loads)
    vectors = [[f"${4 * v + m}" for m in range(4)] for v in range(len(loads))]
    asks = [
        f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(words)}}}, [${n + 1 + tile}+{offset}];"
        for words, (tile, offset) in zip(vectors, loads)  # noqa: B905
    ]
    left, most, clocks = f"${n}", f"${n + 1 + tiles}", f"${n + 2 + tiles}"
    lines = ["{", f".reg .pred %absent<{len(loads)}>, %any;", ".reg .b32 %seen, %t, %start, %now;"]
    if pauses:
        lines += ["mov.u32 %start, %clock;", "PAUSE:", "mov.u32 %now, %clock;", "sub.u32 %t, %now, %start;"]
        lines += [f"setp.lt.u32 %any, %t, {clocks};", "@%any bra PAUSE;"]
    lines += [*asks, f"mov.b32 {left}, {most};", "AGAIN:", "setp.ne.b32 %any, 0, 0;"]
    for v, words in enumerate(vectors):
        lines += missing_ptx(words, f"%absent{v}", bits, has_max)
        lines.append(f"or.pred %any, %any, %absent{v};")
    lines += ["vote.sync.any.pred %any, %any, 0xffffffff;", "@!%any bra THERE;", f"sub.s32 {left}, {left}, 1;"]
    lines += [f"@%absent{v} {ask}" for v, ask in enumerate(asks)]
    lines += [f"setp.gt.s32 %any, {left}, 0;", "@%any bra AGAIN;", "THERE:", "}"]
    return "\n".join(lines), ",".join(["=&r"] * (n + 1) + ["l"] * tiles + ["r"] * (1 + pauses))


@triton.constexpr_function
def missing_ptx(words, absent, bits, has_max):
    """Return PTX that sets the predicate if an element of four words is all ones.

    All ones is the largest unsigned number: of an element it is enough to see whether the largest is that. Of a half h
    the top bit of h & (-h - 2) is set only then: a smaller h with that bit has an inverse of at most 0x7FFF, less one.
    The subtraction of both halves at once, 0xFFFEFFFE - w, borrows nothing unless a half is all ones. GPUs before
    compute capability 9.0 have no maximum of halves, and look at every word.
    """
    if bits == 32:
        found = [f"max.u32 %seen, {words[0]}, {words[1]};"]
        found += [f"max.u32 %seen, %seen, {word};" for word in words[2:]]
        return [*found, f"setp.eq.u32 {absent}, %seen, 0xFFFFFFFF;"]
    if has_max:
        found = [f"max.u16x2 %seen, {words[0]}, {words[1]};"]
        found += [f"max.u16x2 %seen, %seen, {word};" for word in words[2:]]
        found += ["sub.u32 %t, 0xFFFEFFFE, %seen;", "lop3.b32 %seen, %t, %seen, 0x80008000, 0x80;"]
        return [*found, f"setp.ne.u32 {absent}, %seen, 0;"]
    found = ["mov.b32 %seen, 0;"]
    for word in words:
        found += [f"sub.u32 %t, 0xFFFEFFFE, {word};", f"lop3.b32 %seen, %t, {word}, %seen, 0xEA;"]
    return [*found, "and.b32 %seen, %seen, 0x80008000;", f"setp.ne.u32 {absent}, %seen, 0;"]


@gluon.jit
def slot_rows(rows, ROWS: gl.constexpr, TILED: gl.constexpr):
    """Return the rows for which a row block of `rows` rows has room in a slot."""
    if TILED:
        return ROWS
    else:
        return rows


@gluon.jit
def slot_place(row, column, P: gl.constexpr, V: gl.constexpr, TILED: gl.constexpr):
    """Return where element (row, column) of a row block is in a slot, from where the block begins."""
    if TILED:
        return row // 8 * (8 * P) + column // V * (8 * V) + row % 8 * V + column % V
    else:
        return row * P + column


@gluon.jit
def read_places(
    rows, P: gl.constexpr, V: gl.constexpr, TILED: gl.constexpr, CHUNKS: gl.constexpr, ROWS: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return where the first of a thread's columns are in a slot, (32 · WARPS,), for each 8 of the rows of its warp.

    A part has CHUNKS chunks of columns, and its warps share ROWS rows, 8 in turn. A thread whose row is not one of the
    `rows` that exist reads the last of them.
    """
    SHARING: gl.constexpr = WARPS // PARTS
    n = gl.arange(0, WARPS * 32, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    column = n // (32 * SHARING) * (CHUNKS * 4 * V) + n % 4 * V
    row = n // 32 % SHARING * 8 + n % 32 // 4
    places = ()
    for tile in gl.static_range(ROWS // (8 * SHARING)):
        place = slot_place(gl.minimum(row + tile * (8 * SHARING), rows - 1), column, P, V, TILED)
        places = places + (place,)  # noqa: RUF005
    return places


@gluon.jit
def join_words(v, FIRST: gl.constexpr):
    """Return four (threads,) blocks of a 16-byte load as (threads, 2, 2): bits 0 and 1 of a word's number."""
    return gl.join(gl.join(v[FIRST], v[FIRST + 1]), gl.join(v[FIRST + 2], v[FIRST + 3]))


@gluon.jit
def load_when_there(
    slot_ptr, places, polls, clocks, PAUSES: gl.constexpr, COUNT: gl.constexpr, TILED: gl.constexpr,
    ROWS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, words: gl.constexpr,
):  # fmt: skip
    """Wait for COUNT chunks of each part, with PAUSES after so many clocks; returns them, and the polls left.

    slot_ptr: the row block in a slot, plus the first chunk; places: of `read_places`; polls, clocks: (32 · WARPS,). A
    chunk is a block (PARTS, 16, ROWS) of 32-bit words in the layout `words`, that of a right operand. Less than one
    poll left: a warp gave up.
    """
    SHARING: gl.constexpr = WARPS // PARTS
    TILES: gl.constexpr = len(places)
    BITS: gl.constexpr = slot_ptr.dtype.element_ty.primitive_bitwidth
    PTX: gl.constexpr = poll_ptx(COUNT, TILES, 512 if TILED else 64, BITS, cuda_capability_geq(9), PAUSES)
    sources = []  # type: ignore[var-annotated]
    for tile in gl.static_range(TILES):
        sources = sources + [(slot_ptr + places[tile]).to(gl.int64, bitcast=True)]  # noqa: RUF005
    sources = sources + ([polls, clocks] if PAUSES else [polls])
    v = gl.inline_asm_elementwise(
        PTX[0], PTX[1], sources, dtype=(gl.int32,) * (4 * TILES * COUNT + 1), is_pure=False, pack=1
    )
    chunks = ()
    for n in gl.static_range(COUNT):
        # dimensions: part, warp of it, lane // 4, lane % 4, bits 0 and 1 of a word's number, set of eight rows
        if TILES == 2:
            block = gl.join(join_words(v, 8 * n), join_words(v, 8 * n + 4))
            block = gl.permute(gl.reshape(block, [PARTS, SHARING, 8, 4, 2, 2, 2]), (0, 3, 5, 4, 6, 1, 2))
        else:
            block = gl.permute(gl.reshape(join_words(v, 4 * n), [PARTS, SHARING, 8, 4, 2, 2]), (0, 3, 5, 4, 1, 2))
        block = gl.reshape(block, [PARTS, 16, ROWS])
        chunks = chunks + (gl.convert_layout(block, words, assert_trivial=True),)  # noqa: RUF005
    return chunks, v[4 * TILES * COUNT]
