"""Products whose left operand, the recurrent weights, stays in registers and shared memory for all time steps.

Few batch rows are too little work to divide among warps by rows or units; so the columns K of the product are divided
among the warps. A block has a leading axis of WARPS, and the product is a batch of WARPS smaller ones, whose sum is
taken through shared memory once a step. Weights are the left operand, of which tensor cores take 16 rows at once; batch
rows are the right one, of which they take 8.

Shapes: weights (WARPS, M, K) in chunks of K, one or more for each warp; chunks of the right operand (WARPS, K, ROWS);
accumulators (WARPS, M, ROWS). M = SETS · UNITS: the gates of a program's units forward, gate after gate; backward one
set, or two with a full peephole. Blocks of a program's own rows and units are (ROWS, UNITS).

The layouts are made so that no value moves between threads except through the sum: a chunk of a right operand arrives
in its registers (polling.py), and after the sum a thread has all sets of one (row, unit).
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from lstm_triton_kernels import sizes
from lstm_triton_kernels.inline_ptx import round_to_tf32

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of the threads of a program: Triton 3.6 has another name for it."""

padded_units = triton.constexpr_function(sizes.padded_units)


@triton.constexpr_function
def product_layout(warps):
    """Return the layout of accumulators: every warp has a product of its own."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@triton.constexpr_function
def operand_layout(side, elements, warps):
    """Return the layout of operand 0 (left) or 1 of which a thread has so many elements side by side."""
    return gl.DotOperandLayout(side, product_layout(warps), elements)


@triton.constexpr_function
def warps_across(units, warps):
    """Return how many warps share the units of a block; the others share its rows, or compute the same once more."""
    return max(1, min(units // 8, warps))


@triton.constexpr_function
def own_layout(units, warps):
    """Return the layout of a block (ROWS, UNITS): one (row, unit) a thread, a warp has 8 units of 4 rows."""
    across = warps_across(units, warps)
    return gl.BlockedLayout([1, 1], [4, 8], [warps // across, across], [1, 0])


@triton.constexpr_function
def own_gates_layout(units, warps):
    """Return the same of (ROWS, 4 · UNITS), four gates of a unit side by side: a (row, unit)'s are in its thread."""
    across = warps_across(units, warps)
    return gl.BlockedLayout([1, 4], [4, 8], [warps // across, across], [1, 0])


@triton.constexpr_function
def sum_layout(sets, units, warps):
    """Return the same of (WARPS, SETS, UNITS, ROWS): a thread has the parts of all warps and sets of an element."""
    across = warps_across(units, warps)
    return gl.BlockedLayout([warps, sets, 1, 1], [1, 1, 8, 4], [1, 1, across, warps // across], [2, 3, 1, 0])


@triton.constexpr_function
def part_buffer_layout(rows):
    """Return a layout of (WARPS, SETS, UNITS, ROWS) in shared memory, without bank conflicts."""
    return gl.SwizzledSharedLayout(4, 32 // rows, rows // 4, order=[3, 2, 1, 0])


@triton.constexpr_function
def kept_layout():
    """Return a layout of chunks of weights (N, WARPS, M, K) in shared memory, likewise."""
    return gl.SwizzledSharedLayout(32, 1, 1, order=[2, 1, 0])


@gluon.jit
def row_in_block(n, ROWS: gl.constexpr):
    """Return the row of a block that is the n-th of the sums: of 16 the second and third four change places.

    So the sums are read without bank conflicts.
    """
    if ROWS == 16:
        return n // 4 % 2 * 8 + n // 8 * 4 + n % 4
    else:
        return n


@gluon.jit
def as_values(words, ELEMENT: gl.constexpr, right: gl.constexpr):
    """Return 32-bit words (WARPS, 16, ROWS) as a right operand of ELEMENT: the same registers."""
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
def no_products(M: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Return accumulators of zero: two to be added where one is a single tile, as a product waits for the last."""
    acc = gl.zeros([WARPS, M, ROWS], gl.float32, product_layout(WARPS))
    if M * ROWS <= 128:
        return acc, gl.zeros([WARPS, M, ROWS], gl.float32, product_layout(WARPS))
    else:
        return (acc,)


@gluon.jit
def add_products(
    acc, w, kept, words, FIRST: gl.constexpr, ELEMENT: gl.constexpr, PRECISION: gl.constexpr, V: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Return the accumulators plus the products of chunks of words, which are those of the weights from FIRST on.

    w: chunks of weights in registers; kept: the chunks behind those, in shared memory.
    """
    left: gl.constexpr = operand_layout(0, V, WARPS)
    right: gl.constexpr = operand_layout(1, V, WARPS)
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
def sum_of_warps(acc, parts, SETS: gl.constexpr, UNITS: gl.constexpr, WARPS: gl.constexpr):
    """Return the sum over the warps, through shared memory: for each set a block (ROWS, UNITS); 1, 2 or 4 sets."""
    if len(acc) == 2:
        x = acc[0] + acc[1]
    else:
        x = acc[0]
    if x.shape[2] == 16:
        x = gl.permute(gl.reshape(x, [x.shape[0], x.shape[1], 2, 2, 4]), (0, 1, 3, 2, 4))
    parts.store(gl.reshape(x, parts.shape))
    total = gl.sum(parts.load(sum_layout(SETS, UNITS, WARPS)), 0)
    if SETS == 4:
        pairs = gl.reshape(gl.permute(total, (2, 1, 0)), [total.shape[2], UNITS, 2, 2])
        even, odd = gl.split(pairs)  # of the last axis: sets 0, 2 and 1, 3
        x_0, x_2 = gl.split(even)
        x_1, x_3 = gl.split(odd)
        return (
            as_own(x_0, UNITS, WARPS),
            as_own(x_1, UNITS, WARPS),
            as_own(x_2, UNITS, WARPS),
            as_own(x_3, UNITS, WARPS),
        )
    elif SETS == 2:
        x_0, x_1 = gl.split(gl.permute(total, (2, 1, 0)))
        return as_own(x_0, UNITS, WARPS), as_own(x_1, UNITS, WARPS)
    else:
        return (as_own(gl.reshape(gl.permute(total, (2, 1, 0)), [total.shape[2], UNITS]), UNITS, WARPS),)


@gluon.jit
def as_own(block, UNITS: gl.constexpr, WARPS: gl.constexpr):
    """Return a block (ROWS, UNITS) in the layout of a program's own: another name for it, no value moves."""
    return gl.convert_layout(block, own_layout(UNITS, WARPS), assert_trivial=True)


@gluon.jit
def load_weights(
    w_hh_ptr, w_ch_ptr, first_unit, H: gl.constexpr, G: gl.constexpr, FULL: gl.constexpr, BACKWARD: gl.constexpr,
    CHUNKS: gl.constexpr, KEPT: gl.constexpr, UNITS: gl.constexpr, V: gl.constexpr, WARPS: gl.constexpr,
    PRECISION: gl.constexpr,
):  # fmt: skip
    """Load the weights of UNITS units, CHUNKS chunks of each warp: those in registers, and the last KEPT, kept in
    shared memory. See `weights_at` for their rows and columns.
    """
    left: gl.constexpr = operand_layout(0, V, WARPS)
    K: gl.constexpr = 4 * V
    SETS: gl.constexpr = (2 if FULL else 1) if BACKWARD else 4
    ELEMENT: gl.constexpr = w_hh_ptr.dtype.element_ty
    first = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * (CHUNKS * K)
    m = gl.arange(0, SETS * UNITS, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    k = first + gl.arange(0, K, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :]
    w = ()
    for n in gl.static_range(CHUNKS - KEPT):
        chunk = weights_at(w_hh_ptr, w_ch_ptr, first_unit, m, k + n * K, H, G, FULL, BACKWARD, UNITS, PRECISION)
        w = w + (chunk,)  # noqa: RUF005
    if KEPT > 0:
        kept = gl.allocate_shared_memory(ELEMENT, [KEPT, WARPS, SETS * UNITS, K], kept_layout())
        for n in gl.static_range(KEPT):
            behind = k + (CHUNKS - KEPT + n) * K
            chunk = weights_at(w_hh_ptr, w_ch_ptr, first_unit, m, behind, H, G, FULL, BACKWARD, UNITS, PRECISION)
            kept.index(n).store(chunk)
        barrier()  # here, for the compiler would place one before the first read of every step
    else:
        kept = w  # not read
    return w, kept


@gluon.jit
def weights_at(
    w_hh_ptr, w_ch_ptr, first_unit, m, k, H: gl.constexpr, G: gl.constexpr, FULL: gl.constexpr,
    BACKWARD: gl.constexpr, UNITS: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Load the weights of rows m and columns k of the left operand, from w_hh (G·H, H) and a full w_ch (Q·H, H).

    Forward, row gate · UNITS + unit is that unit's row of the gate, with G = 3 of the gate - 1; a column is a unit of
    h, and with a full peephole from `padded_units` on one of c. Backward, a row is a unit's column, of w_hh, then of
    w_ch; a column is 4 · unit + gate, with G = 3 gate · padded_units + unit, as `publish_gates` publishes them. What
    there is not is zero; so is the peephole of gate g.
    """
    HP: gl.constexpr = padded_units(H)
    unit = first_unit + m % UNITS
    if BACKWARD:
        gate, other = (k % 4, k // 4) if G == 4 else (k // HP, k % HP)
        place = (gate * H + other) * H + unit
        inside = (gate < G) & (other < H) & (unit < H)
        from_h = m < UNITS
        from_c = m >= UNITS
    else:
        gate, other = m // UNITS - (4 - G), k % HP if FULL else k
        place = (gate * H + unit) * H + other
        inside = (gate >= 0) & (unit < H) & (other < H)
        from_h = k < HP
        from_c = (k >= HP) & (k < 2 * HP)
    ptr = w_hh_ptr + place
    if FULL:
        peephole = w_ch_ptr + gl.where(gate == G - 1, place - H * H, place)  # of g there is no block in w_ch
        ptr = gl.where(from_h, ptr, peephole)
        inside = inside & (from_h | (from_c & (gate != G - 2)))
    block = gl.load(ptr, mask=inside, other=0.0)
    return round_to_tf32(block) if PRECISION == "tf32" else block
