"""What the time loops of the persistent kernels load and store in a step, beside the product and the exchange.

The kernels in plain Triton and those in Gluon call the same functions: a function of Triton that makes no block of its
own is compiled as Gluon where Gluon calls it. An iteration of a time loop is a step of one row block. Shapes, programs
and masks as in `persistent_forward`; a block is (rows of a tile, units of a tile).
"""

import triton
import triton.language as tl

from lstm_triton_kernels.equations import load_blocks, store_gates
from lstm_triton_kernels.rows import at_time, row_values, rows_of_block, time_of_step


@triton.jit
def step_of(iteration, block, blocks):
    """Return the steps done before an iteration, and its row block, of a program of `blocks`, the first `block`."""
    done = iteration // blocks
    return done, block + (iteration - done * blocks) * tl.num_programs(1)


@triton.jit
def rows_in_turn(
    in_block, block, row, row_mask, length, rows, B, lengths_ptr, T, ONE_BLOCK: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """Return `rows_of_block` of a row block; where a program has ONE_BLOCK the given rows, which are that."""
    if not ONE_BLOCK:
        row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    return row, row_mask, length


@triton.jit
def load_gate_inputs(
    gates_ptr, n, row, row_mask, length, unit, H, reverse, stride, G: tl.constexpr, HAS_LENGTHS: tl.constexpr
):
    """Load the input side of all gates of step n; 0 in a row without it."""
    tile = row[:, None] * G * H + unit[None, :]
    step_tile_mask = (row_mask & (n < length))[:, None] & (unit < H)[None, :]
    t = time_of_step(n, length, reverse)
    return load_blocks(at_time(gates_ptr + tile, t, stride, HAS_LENGTHS), H, step_tile_mask, G)


@triton.jit
def load_step_codes(codes_ptr, n, row, row_mask, length, unit, width, reverse, stride, HAS_LENGTHS: tl.constexpr):
    """Load bytes (T, B, width) of step n, codes or where h~ is clipped, as a tuple; none where there are none.

    0 in a row without the step.
    """
    codes = ()
    if codes_ptr is not None:
        step_tile_mask = (row_mask & (n < length) & (n >= 0))[:, None] & (unit < width)[None, :]
        t = time_of_step(n, length, reverse)
        place = at_time(codes_ptr, t, stride, HAS_LENGTHS) + row[:, None] * width + unit[None, :]
        codes = codes + (tl.load(place, mask=step_tile_mask, other=0),)  # noqa: RUF005
    return codes


@triton.jit
def code_of(codes):
    """Return the codes that `load_codes` loaded as int32; 0 where it loaded none."""
    if len(codes) > 0:
        return codes[0].to(tl.int32)
    else:
        return 0


@triton.jit
def cell_places(cells_ptr, n, t, length, state, direction, stride, CELLS: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Return where step n, of time index t, reads c and where it writes it; CELLS: "all" or "one"."""
    if CELLS == "all":
        before = at_time(cells_ptr, t + direction, stride, HAS_LENGTHS) + state
        slot = tl.where(n < length, t + 1 - direction, n + 1)
        return before, at_time(cells_ptr, slot, stride, HAS_LENGTHS) + state
    else:
        return cells_ptr + state, cells_ptr + state


@triton.jit
def store_step(
    gates_ptr, h_n_ptr, c_n_ptr, i, f, g, o, h, c, n, t, length, row, unit, state, hidden_state, H, stride,
    step_tile_mask, step_hidden_mask, G: tl.constexpr, COUPLED: tl.constexpr, SAVE_GATES: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Store the activated gates of step n, and h and c of the rows that end with it.

    hidden_state, step_hidden_mask: as state and step_tile_mask, of h, which a projection makes narrower than c.
    """
    if SAVE_GATES:
        gates_now = at_time(gates_ptr, t, stride, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
        store_gates(gates_now, i, f, g, H, step_tile_mask, COUPLED)
        tl.store(gates_now + (G - 1) * H, o.to(gates_ptr.dtype.element_ty), mask=step_tile_mask)
    last = row_values(n == length - 1, HAS_LENGTHS)
    tl.store(h_n_ptr + hidden_state, h.to(h_n_ptr.dtype.element_ty), mask=step_hidden_mask & last)
    tl.store(c_n_ptr + state, c.to(c_n_ptr.dtype.element_ty), mask=step_tile_mask & last)


@triton.jit
def load_saved(
    gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, n, row, row_mask, length, unit, B, H, hidden,
    reverse, G: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, HAS_GRAD_CELLS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Load what step n reads: activated gates, (c_{t-1}, c_t), gradients of h_t and c_t; 0 for a row without it.

    hidden: the size of h, that of c unless it is projected.
    """
    D = tl.num_programs(2)
    t = time_of_step(n, length, reverse)
    step_mask = (row_mask & (n < length) & (n >= 0))[:, None]
    step_tile_mask = step_mask & (unit < H)[None, :]
    size = B.to(tl.int64) * H
    tile = row[:, None] * H + unit[None, :]
    saved = load_blocks(
        at_time(gates_ptr, t, G * size, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :], H, step_tile_mask, G
    )
    c_previous = tl.load(at_time(before_ptr, t, size, HAS_LENGTHS) + tile, mask=step_tile_mask, other=0.0)
    c = tl.load(at_time(current_ptr, t, size, HAS_LENGTHS) + tile, mask=step_tile_mask, other=0.0)
    grads = ()
    if HAS_GRAD_OUTPUT:
        place = at_time(grad_output_ptr, t, D * B.to(tl.int64) * hidden, HAS_LENGTHS)
        place += row[:, None] * D * hidden + unit[None, :]
        grads = grads + (tl.load(place, mask=step_mask & (unit < hidden)[None, :], other=0.0),)  # noqa: RUF005
    if HAS_GRAD_CELLS:
        place = at_time(grad_cells_ptr, t, D * size, HAS_LENGTHS) + row[:, None] * D * H + unit[None, :]
        grads = grads + (tl.load(place, mask=step_tile_mask, other=0.0),)  # noqa: RUF005
    return saved, (c_previous, c), grads


@triton.jit
def load_last(place, mask):
    """Load the gradient of the last state of the rows that end with this step; in other steps the mask is empty."""
    return tl.load(place, mask=mask, other=0.0)
