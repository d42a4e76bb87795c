"""Products whose left operand, the recurrent weights, stays in registers and shared memory for all time steps.

Few batch rows are too little work to divide among warps by rows or units; so the columns K of the product are divided
in PARTS among the warps, one each. A block has a leading axis of PARTS, and the product is a batch of PARTS smaller
ones, whose sum is taken through shared memory once a step. Many rows are divided instead: there is one part, and every
warp computes rows of its own, without a sum and without a barrier; all of them read the same weights from shared
memory. Weights are the left operand, of which tensor cores take 16 rows at once; batch rows are the right one, of which
they take 8.

Shapes: weights (PARTS, M, K) in chunks of K, one or more for each part; chunks of the right operand (PARTS, K, ROWS);
accumulators (PARTS, M, ROWS). M = SETS · UNITS: the gates of a program's units forward, gate after gate; backward one
set, or two with a full peephole. Blocks of a program's own rows and units are (ROWS, UNITS).

The layouts are made so that no value moves between threads except through the sum: a chunk of a right operand arrives
in its registers (polling.py), and after the sum a thread has all sets of its elements (row, unit). With several parts
these are spread over the threads anew; with one part they are where the product left them, UNITS / 8 adjacent units of
each of a thread's rows, and the rows of the weights are ordered for that (`unit_of`).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from lstm_triton_kernels import sizes, tensor_core_plan
from lstm_triton_kernels.inline_ptx import round_to_tf32
from lstm_triton_kernels.polling import lane_elements, load_when_there

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of the threads of a program: Triton 3.6 has another name for it."""

padded_units = triton.constexpr_function(sizes.padded_units)
second_sets = triton.constexpr_function(tensor_core_plan.second_sets)
loads_ahead = triton.constexpr_function(tensor_core_plan.loads_ahead)


@triton.constexpr_function
def product_layout(parts, warps):
    """Return the layout of accumulators: every warp has a product of its own, of a part of the columns or of rows."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[parts, 1, warps // parts], instr_shape=[1, 16, 8])


@triton.constexpr_function
def operand_layout(side, elements, parts, warps):
    """Return the layout of operand 0 (left) or 1 of which a thread has so many elements side by side."""
    return gl.DotOperandLayout(side, product_layout(parts, warps), elements)


@triton.constexpr_function
def warps_across(units, warps):
    """Return how many warps share the units of a block; the others share its rows, or compute the same once more."""
    return max(1, min(units // 8, warps))


@triton.constexpr_function
def powers(first, end):
    """Return first, 2 first, 4 first, ... below end."""
    found = []
    while first < end:
        found.append(first)
        first *= 2
    return found


@triton.constexpr_function
def product_own_layout(rows, units, gates, warps):
    """Return the layout of a block (rows, units · gates) as one part's product leaves it, gates of a unit adjacent."""
    adjacent = units * gates // 8
    return gl.DistributedLinearLayout(
        reg_bases=[[0, n] for n in powers(1, adjacent)] + [[1, 0]] + [[n, 0] for n in powers(8 * warps, rows)],
        lane_bases=[[2, 0], [4, 0], [0, adjacent], [0, 2 * adjacent], [0, 4 * adjacent]],
        warp_bases=[[n, 0] for n in powers(8, 8 * warps)],
        block_bases=[],
        shape=[rows, units * gates],
    )


@triton.constexpr_function
def own_layout(rows, units, parts, warps):
    """Return the layout of a block (ROWS, UNITS): one (row, unit) a thread, a warp has 8 units of 4 rows.

    With one part as its product leaves it.
    """
    if parts == 1:
        return product_own_layout(rows, units, 1, warps)
    across = warps_across(units, warps)
    return gl.BlockedLayout([1, 1], [4, 8], [warps // across, across], [1, 0])


@triton.constexpr_function
def own_gates_layout(rows, units, parts, warps):
    """Return the same of (ROWS, 4 · UNITS), four gates of a unit side by side: a (row, unit)'s are in its thread."""
    if parts == 1:
        return product_own_layout(rows, units, 4, warps)
    across = warps_across(units, warps)
    return gl.BlockedLayout([1, 4], [4, 8], [warps // across, across], [1, 0])


@triton.constexpr_function
def sum_layout(sets, units, parts, warps):
    """Return the same of (PARTS, SETS, UNITS, ROWS): a thread has all parts and sets of an element."""
    across = warps_across(units, warps)
    return gl.BlockedLayout([parts, sets, 1, 1], [1, 1, 8, 4], [1, 1, across, warps // across], [2, 3, 1, 0])


@triton.constexpr_function
def part_buffer_layout(rows):
    """Return a layout of (PARTS, SETS, UNITS, ROWS) in shared memory, without bank conflicts."""
    return gl.SwizzledSharedLayout(4, 32 // rows, rows // 4, order=[3, 2, 1, 0])


@triton.constexpr_function
def kept_layout():
    """Return a layout of chunks of weights (N, PARTS, M, K) in shared memory, likewise."""
    return gl.SwizzledSharedLayout(32, 1, 1, order=[2, 1, 0])


@gluon.jit
def row_in_block(n, ROWS: gl.constexpr, PARTS: gl.constexpr):
    """Return the row of a block that is the n-th of the sums: of 16 the second and third four change places.

    So the sums are read without bank conflicts. With one part there are none, and rows are in order.
    """
    if PARTS > 1 and ROWS == 16:
        return n // 4 % 2 * 8 + n // 8 * 4 + n % 4
    else:
        return n


@gluon.jit
def unit_of(m, UNITS: gl.constexpr, PARTS: gl.constexpr):
    """Return which of UNITS units row m of the left operand belongs to.

    With one part row 8 e + j of a set is unit j · UNITS / 8 + e: a thread has the rows of one j.
    """
    n = m % UNITS
    if PARTS == 1:
        return n % 8 * (UNITS // 8) + n // 8
    else:
        return n


@gluon.jit
def as_values(words, ELEMENT: gl.constexpr, right: gl.constexpr):
    """Return 32-bit words (PARTS, 16, ROWS) as a right operand of ELEMENT: the same registers."""
    if ELEMENT.primitive_bitwidth == 32:
        return words.to(ELEMENT, bitcast=True)
    else:
        low, high = gl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
        )
        pairs = gl.permute(gl.join(low, high), (0, 1, 3, 2))
        both = gl.reshape(pairs, [words.shape[0], 2 * words.shape[1], words.shape[2]])
        return gl.convert_layout(both, right, assert_trivial=True).to(ELEMENT, bitcast=True)


@gluon.jit
def no_products(M: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr):
    """Return accumulators of zero: two to be added where a warp has a single tile, as a product waits for the last."""
    acc = gl.zeros([PARTS, M, ROWS], gl.float32, product_layout(PARTS, WARPS))
    if M * ROWS * PARTS <= 128 * WARPS:
        return acc, gl.zeros([PARTS, M, ROWS], gl.float32, product_layout(PARTS, WARPS))
    else:
        return (acc,)


@gluon.jit
def add_products(
    acc, w, kept, words, FIRST: gl.constexpr, ELEMENT: gl.constexpr, PRECISION: gl.constexpr, V: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Return the accumulators plus the products of chunks of words, which are those of the weights from FIRST on.

    w: chunks of weights in registers; kept: the chunks behind those, in shared memory.
    """
    left: gl.constexpr = operand_layout(0, V, PARTS, WARPS)
    right: gl.constexpr = operand_layout(1, V, PARTS, WARPS)
    for n in gl.static_range(len(words)):
        if FIRST + n < len(w):
            weights = w[FIRST + n]
        else:
            weights = kept.index(FIRST + n - len(w)).load(left)
        values = as_values(words[n], ELEMENT, right)
        new = mma_v2(weights, values, acc[(FIRST + n) % len(acc)], input_precision=PRECISION)
        if len(acc) == 1:
            acc = (new,)
        elif (FIRST + n) % 2 == 0:
            acc = (new, acc[1])
        else:
            acc = (acc[0], new)
    return acc


@gluon.jit
def sum_of_parts(
    acc, buffer, SETS: gl.constexpr, UNITS: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr
):
    """Return the sum over the parts, through shared memory: for each set a block (ROWS, UNITS); 1, 2 or 4 sets."""
    if len(acc) == 2:
        x = acc[0] + acc[1]
    else:
        x = acc[0]
    if PARTS == 1:
        total = gl.permute(gl.reshape(x, [SETS, UNITS // 8, 8, ROWS]), (3, 2, 1, 0))
        total = gl.reshape(total, [ROWS, UNITS, SETS])
    else:
        if ROWS == 16:
            x = gl.permute(gl.reshape(x, [PARTS, SETS * UNITS, 2, 2, 4]), (0, 1, 3, 2, 4))
        buffer.store(gl.reshape(x, buffer.shape))
        total = gl.permute(gl.sum(buffer.load(sum_layout(SETS, UNITS, PARTS, WARPS)), 0), (2, 1, 0))
    own: gl.constexpr = own_layout(ROWS, UNITS, PARTS, WARPS)
    if SETS == 4:
        even, odd = gl.split(gl.reshape(total, [ROWS, UNITS, 2, 2]))  # of the last axis: sets 0, 2 and 1, 3
        x_0, x_2 = gl.split(even)
        x_1, x_3 = gl.split(odd)
        return as_own(x_0, own), as_own(x_1, own), as_own(x_2, own), as_own(x_3, own)
    elif SETS == 2:
        x_0, x_1 = gl.split(total)
        return as_own(x_0, own), as_own(x_1, own)
    else:
        return (as_own(gl.reshape(total, [ROWS, UNITS]), own),)


@gluon.jit
def as_own(block, own: gl.constexpr):
    """Return a block (ROWS, UNITS) in the layout of a program's own: another name for it, no value moves."""
    return gl.convert_layout(block, own, assert_trivial=True)


@gluon.jit
def load_weights(
    w_hh_ptr, w_ch_ptr, first_unit, H: gl.constexpr, HIDDEN: gl.constexpr, G: gl.constexpr, FULL: gl.constexpr,
    OUTPUT_CURRENT: gl.constexpr, BACKWARD: gl.constexpr, CHUNKS: gl.constexpr, KEPT: gl.constexpr, UNITS: gl.constexpr,
    V: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, PRECISION: gl.constexpr, STREAMED: gl.constexpr,
):  # fmt: skip
    """Load the weights of UNITS units, CHUNKS chunks of each part: those in registers, and the last KEPT, kept in
    shared memory; of the first STREAMED none (streamed.py). See `weights_at` for their rows and columns.
    """
    left: gl.constexpr = operand_layout(0, V, PARTS, WARPS)
    K: gl.constexpr = 4 * V
    SETS: gl.constexpr = (2 if FULL else 1) if BACKWARD else 4
    ELEMENT: gl.constexpr = w_hh_ptr.dtype.element_ty
    first = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * (CHUNKS * K)
    m = gl.arange(0, SETS * UNITS, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    k = first + gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    w = ()
    for n in gl.static_range(STREAMED, CHUNKS - KEPT):
        chunk = weights_at(
            w_hh_ptr, w_ch_ptr, first_unit, m, k + n * K, H, HIDDEN, G, FULL, OUTPUT_CURRENT, BACKWARD, UNITS, PARTS,
            PRECISION,
        )  # fmt: skip
        w = w + (chunk,)  # noqa: RUF005
    if KEPT > 0:
        kept = gl.allocate_shared_memory(ELEMENT, [KEPT, PARTS, SETS * UNITS, K], kept_layout())
        for n in gl.static_range(KEPT):
            behind = k + (CHUNKS - KEPT + n) * K
            chunk = weights_at(
                w_hh_ptr, w_ch_ptr, first_unit, m, behind, H, HIDDEN, G, FULL, OUTPUT_CURRENT, BACKWARD, UNITS, PARTS,
                PRECISION,
            )  # fmt: skip
            kept.index(n).store(chunk)
        barrier()  # here, for the compiler would place one before the first read of every step
    else:
        kept = w  # not read
    return w, kept


@gluon.jit
def weights_at(
    w_hh_ptr, w_ch_ptr, first_unit, m, k, H: gl.constexpr, HIDDEN: gl.constexpr, G: gl.constexpr, FULL: gl.constexpr,
    OUTPUT_CURRENT: gl.constexpr, BACKWARD: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr,
    PRECISION: gl.constexpr,
):  # fmt: skip
    """Load the weights of rows m and columns k of the left operand, from w_hh (G·H, HIDDEN) and a full w_ch (Q·H, H).

    Forward, row gate · UNITS + n is that unit's row of the gate (`unit_of`), with G = 3 of the gate - 1; a column is an
    element of h, and with a full peephole from `padded_units` on one of c. Backward, a row is a unit's column, of w_hh,
    then of w_ch; a column is 4 · unit + gate, with G = 3 gate · padded_units + unit, as `publish_gates` publishes them.
    What there is not is zero; so is the peephole of gate g, and of o where that reads c_t.
    """
    HP: gl.constexpr = padded_units(H)
    unit = first_unit + unit_of(m, UNITS, PARTS)
    if BACKWARD:
        gate, other = (k % 4, k // 4) if G == 4 else (k // HP, k % HP)
        from_h = m < UNITS
        from_c = m >= UNITS
        there = (gate < G) & (other < H)
        row, column = gate * H + other, unit
    else:
        BEFORE_C: gl.constexpr = padded_units(HIDDEN)
        from_h = k < BEFORE_C
        from_c = (k >= BEFORE_C) & (k < BEFORE_C + HP)
        gate, other = m // UNITS - (4 - G), gl.where(from_h, k, k - BEFORE_C) if FULL else k
        there = (gate >= 0) & (unit < H)
        row, column = gate * H + unit, other
    ptr = w_hh_ptr + (row * HIDDEN + column)
    inside = there & (column < HIDDEN)
    if FULL:
        block = gl.where(gate == G - 1, row - H, row)  # of g there is no block in w_ch
        reads = gate != G - 2
        if OUTPUT_CURRENT:
            reads = reads & (gate != G - 1)
        ptr = gl.where(from_h, ptr, w_ch_ptr + (block * H + column))
        inside = (from_h & inside) | (from_c & there & (column < H) & reads)
    block = gl.load(ptr, mask=inside, other=0.0)
    return round_to_tf32(block) if PRECISION == "tf32" else block


@gluon.jit
def load_second_weights(
    w_ptr, first_unit, stride_unit, stride_column, LAST: gl.constexpr, COLUMNS: gl.constexpr, CHUNKS: gl.constexpr,
    UNITS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Load the weights of a product within a step, of a program's units below LAST, and COLUMNS, into shared memory.

    A tile has 16 rows at least: where a program has 8 units, a second set is zero.
    """
    ELEMENT: gl.constexpr = w_ptr.dtype.element_ty
    V: gl.constexpr = lane_elements(ELEMENT)
    K: gl.constexpr = 4 * V
    M: gl.constexpr = second_sets(UNITS) * UNITS
    left: gl.constexpr = operand_layout(0, V, PARTS, WARPS)
    first = gl.arange(0, PARTS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * (CHUNKS * K)
    m = gl.arange(0, M, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    k = first + gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    unit = first_unit + unit_of(m, UNITS, PARTS)
    kept = gl.allocate_shared_memory(ELEMENT, [CHUNKS, PARTS, M, K], kept_layout())
    for n in gl.static_range(CHUNKS):
        column = k + n * K
        inside = (m < UNITS) & (unit < LAST) & (column < COLUMNS)
        chunk = gl.load(w_ptr + unit * stride_unit + column * stride_column, mask=inside, other=0.0)
        kept.index(n).store(round_to_tf32(chunk) if PRECISION == "tf32" else chunk)
    barrier()
    return kept


@gluon.jit
def sum_buffer(SETS: gl.constexpr, UNITS: gl.constexpr, ROWS: gl.constexpr, PARTS: gl.constexpr, kept):
    """Return shared memory for the sums over parts; with one part anything, as there are none."""
    if PARTS > 1:
        return gl.allocate_shared_memory(gl.float32, [PARTS, SETS, UNITS, ROWS], part_buffer_layout(ROWS))
    else:
        return kept


@gluon.jit
def exchanged_product(
    slot_ptr, places, polls, clocks, w, kept, buffer, PAUSES: gl.constexpr, SETS: gl.constexpr, CHUNKS: gl.constexpr,
    PIECES: gl.constexpr, TILED: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Wait for a row block in a slot, multiply it with the weights; returns for each set (ROWS, UNITS), and the polls.

    slot_ptr: of the row block; places, polls, clocks, PAUSES: of `load_when_there`; the chunks are waited for and
    multiplied in PIECES.
    """
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
        acc = add_products(acc, w, kept, there, piece * PIECE, ELEMENT, PRECISION, V, PARTS, WARPS)
    return sum_of_parts(acc, buffer, SETS, UNITS, ROWS, PARTS, WARPS), polls
