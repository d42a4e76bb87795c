"""Recurrent weights that do not fit the chip: chunks that every step loads anew, always in the same order.

A program keeps as many chunks of its weights as it has room for; the first STREAMED of each part come from the L2 cache
or from device memory. No warp shares them with another, so they go straight to the registers that tensor cores read
them from, without shared memory and without a barrier. Which they are does not depend on other programs: some are
always under way (`chunks_in_flight`). A product gives their registers free, and at once the chunk that comes so many
later is asked for; behind the last chunk these are the first ones of the next step, which arrive while the programs
exchange.

`pack_weights_kernel` writes these chunks once a pass as they are read: (D, programs, STREAMED, PARTS, M, 64 bytes). A
load of a warp reads 512 adjacent bytes. Weights that L2 can hold beside all else are read as usual; those beyond leave
it first, so that they do not take the place of the others.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lstm_triton_kernels import tensor_core_plan
from lstm_triton_kernels.polling import lane_elements, load_when_there
from lstm_triton_kernels.tiles import add_products, no_products, operand_layout, sum_of_parts, weights_at

chunks_in_flight = triton.constexpr_function(tensor_core_plan.chunks_in_flight)


@gluon.jit
def as_weights(words, ELEMENT: gl.constexpr, left: gl.constexpr):
    """Return 32-bit words (PARTS, M, 16) as a left operand of ELEMENT: the same registers."""
    if ELEMENT.primitive_bitwidth == 32:
        return words.to(ELEMENT, bitcast=True)
    else:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        both = gl.reshape(gl.join(low, high), [words.shape[0], words.shape[1], 2 * words.shape[2]])
        return gl.convert_layout(both, left, assert_trivial=True).to(ELEMENT, bitcast=True)


@gluon.jit
def load_streamed(
    packed_ptr, N: gl.constexpr, STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr, M: gl.constexpr, EMPTY: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ask for chunk N of a program's weights, of the STREAMED in turn, as 32-bit words (PARTS, M, 16).

    EMPTY: the first rows, which are zero; BEYOND_L2: of the chunks, the last ones that L2 does not hold.
    """
    BLOCKS: gl.constexpr = PARTS * (M // 8)
    layout: gl.constexpr = gl.BlockedLayout([M // 8, 1, 4], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    chunk: gl.constexpr = N % STREAMED
    beyond: gl.constexpr = chunk >= STREAMED - BEYOND_L2
    policy: gl.constexpr = "evict_first" if beyond else ""
    modifier: gl.constexpr = "" if beyond else ".cg"
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    n = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    places = packed_ptr + chunk * (BLOCKS * 128) + (block * 128 + lane * 4 + n)
    if EMPTY > 0:
        mask = block % (M // 8) >= EMPTY // 8
        x = gl.load(places, mask=mask, other=0, cache_modifier=modifier, eviction_policy=policy)
    else:
        x = gl.load(places, cache_modifier=modifier, eviction_policy=policy)
    # dimensions: part, 16 rows, product of these, lane // 4, lane % 4, second half of its columns, second of its rows
    x = gl.permute(gl.reshape(x, [PARTS, M // 16, 2, 8, 4, 2, 2]), (0, 1, 6, 3, 4, 2, 5))
    words: gl.constexpr = operand_layout(0, 4, PARTS, WARPS)
    return gl.convert_layout(gl.reshape(x, [PARTS, M, 16]), words, assert_trivial=True)


@gluon.jit
def streamed_place(part, m, word, M: gl.constexpr):
    """Return where a word of row m is in a chunk: four that a thread multiplies at once are adjacent.

    A product has 16 rows and half of a thread's columns; of these a thread has two words in each of two rows.
    """
    block = (part * (M // 16) + m // 16) * 2 + word // 2 % 2
    return block * 128 + (m % 8 * 4 + word // 4) * 4 + word % 2 * 2 + m // 8 % 2


@gluon.jit
def first_streamed(
    packed_ptr, STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr, M: gl.constexpr, EMPTY: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Ask for the chunks that are under way before the first step."""
    stream = ()
    for n in gl.static_range(chunks_in_flight(M)):
        chunk = load_streamed(packed_ptr, n, STREAMED, BEYOND_L2, M, EMPTY, PARTS, WARPS)
        stream = stream + (chunk,)  # type: ignore[assignment]  # noqa: RUF005
    return stream


@gluon.jit
def add_streamed_products(
    acc, stream, packed_ptr, w, kept, words, FIRST: gl.constexpr, STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr,
    M: gl.constexpr, EMPTY: gl.constexpr, ELEMENT: gl.constexpr, PRECISION: gl.constexpr, V: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return the accumulators plus the products of chunks of words, as `add_products`, and the chunks then under way.

    FIRST: the number of the first chunk, of which the first STREAMED are streamed and those of w and kept follow;
    stream: the chunks under way, the first of them that of FIRST.
    """
    left: gl.constexpr = operand_layout(0, V, PARTS, WARPS)
    for n in gl.static_range(len(words)):
        if FIRST + n < STREAMED:
            weights = as_weights(stream[0], ELEMENT, left)
            acc = add_products(acc, (weights,), kept, (words[n],), 0, ELEMENT, PRECISION, V, PARTS, WARPS)
            chunk = load_streamed(
                packed_ptr, FIRST + n + len(stream), STREAMED, BEYOND_L2, M, EMPTY, PARTS, WARPS
            )  # fmt: skip
            stream = stream[1:] + (chunk,)  # noqa: RUF005
        else:
            acc = add_products(acc, w, kept, (words[n],), FIRST + n - STREAMED, ELEMENT, PRECISION, V, PARTS, WARPS)
    return acc, stream


@gluon.jit
def streamed_product(
    slot_ptr, places, polls, clocks, stream, packed_ptr, w, kept, buffer, PAUSES: gl.constexpr, SETS: gl.constexpr,
    CHUNKS: gl.constexpr, PIECES: gl.constexpr, STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr, EMPTY: gl.constexpr,
    TILED: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
    PRECISION: gl.constexpr,
):  # fmt: skip
    """Return what `exchanged_product` does where the first STREAMED chunks are streamed, and the chunks under way."""
    ELEMENT: gl.constexpr = slot_ptr.dtype.element_ty
    V: gl.constexpr = lane_elements(ELEMENT)
    PIECE: gl.constexpr = CHUNKS // PIECES
    STEP: gl.constexpr = 4 * V * (8 if TILED else 1)
    words: gl.constexpr = operand_layout(1, 4, PARTS, WARPS)
    acc = no_products(SETS * UNITS, ROWS, PARTS, WARPS)
    for piece in gl.static_range(PIECES):
        there, polls_left = load_when_there(
            slot_ptr + piece * (PIECE * STEP), places, polls, clocks, PAUSES and piece == 0, PIECE, TILED, ROWS, PARTS,
            WARPS, words,
        )  # fmt: skip
        polls = gl.where(polls_left > 0, polls, 0)  # a warp that gave up once does not wait again
        acc, stream = add_streamed_products(
            acc, stream, packed_ptr, w, kept, there, piece * PIECE, STREAMED, BEYOND_L2, SETS * UNITS, EMPTY, ELEMENT,
            PRECISION, V, PARTS, WARPS,
        )  # fmt: skip
    return sum_of_parts(acc, buffer, SETS, UNITS, ROWS, PARTS, WARPS), polls, stream


@gluon.jit
def pack_weights_kernel(
    packed_ptr, w_hh_ptr, w_ch_ptr,
    H: gl.constexpr, HIDDEN: gl.constexpr, COUPLED: gl.constexpr, FULL: gl.constexpr, OUTPUT_CURRENT: gl.constexpr,
    BACKWARD: gl.constexpr, PRECISION: gl.constexpr, CHUNKS: gl.constexpr, STREAMED: gl.constexpr, UNITS: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write the streamed chunks of weights, one a program: packed (D, programs, STREAMED, PARTS, M, K) out.

    Grid: programs of the pass, STREAMED, D; w_hh (D, G·H, HIDDEN), with a full peephole w_ch (D, Q·H, H), see
    `weights_at`.
    """
    G: gl.constexpr = 3 if COUPLED else 4
    Q: gl.constexpr = 2 if COUPLED else 3
    SETS: gl.constexpr = (2 if FULL else 1) if BACKWARD else 4
    ELEMENT: gl.constexpr = w_hh_ptr.dtype.element_ty
    V: gl.constexpr = lane_elements(ELEMENT)
    K: gl.constexpr = 4 * V
    M: gl.constexpr = SETS * UNITS
    # Adjacent threads read adjacent elements: columns of W_hh forward, rows backward.
    threads: gl.constexpr = [1, 32, 1] if BACKWARD else [1, 8, 4]
    layout: gl.constexpr = gl.BlockedLayout([1, 1, V], threads, [WARPS, 1, 1], [2, 1, 0])
    side = gl.program_id(2).to(gl.int64)
    w_hh_ptr += side * G * H * HIDDEN
    if FULL:
        w_ch_ptr += side * Q * H * H
    chunk = gl.program_id(1)
    part = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))[:, None, None]
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :, None]
    k = gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, None, :]
    columns = (part * CHUNKS + chunk) * K + k
    first_unit = gl.program_id(0) * UNITS
    block = weights_at(
        w_hh_ptr,
        w_ch_ptr,
        first_unit,
        m,
        columns,
        H,
        HIDDEN,
        G,
        FULL,
        OUTPUT_CURRENT,
        BACKWARD,
        UNITS,
        PARTS,
        PRECISION,
    )
    number = (side * gl.num_programs(0) + gl.program_id(0)) * STREAMED + chunk
    of_word: gl.constexpr = V // 4
    place = streamed_place(part, m, k // of_word, M) * of_word + k % of_word
    gl.store(packed_ptr + number * (PARTS * M * K) + place, block)
