"""The backward pass of a layer in one launch, in Gluon, as `exchanged_forward`, with the weights transposed.

In each step, from the last to the first, a program computes how far its states change with its pre-activations, waits
for the gradients of all gates of the step after, and multiplies them with its columns of W_hh, which gives the dh of
its units (with a full peephole, and of V: their dc). What it publishes then are the gradients of its own gates.

Slot n of the exchange buffer holds the gradients of step n as the step before reads them: zeros in rows that do not
have step n, or are reset before it. Slot `steps`, behind the last step, is zero. They are stored twice, there and in
d_gates, which the GEMMs after the loop read.

The second exchange within a step (`exchanged_forward`) goes the other way: of a projection a program has the dh of its
part of h, which all need for the gradient of o tanh(c_t); of a full peephole on c_t it has the gradient of its output
gates, which all need for their dc_t.

So do the two small exchanges of layer normalisation (`exchanged_forward`). The gradient of the normalised values n of a
row, u, gives that of the values, rstd (u - mean(u) - n mean(u n)): first of c~, from dh, then of the products, from the
gradients of the pre-activations, d. What is published is then the gradient of the products; d_gates still holds d.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lstm_triton_kernels.equations import (
    load_blocks,
    load_peephole,
    output_derivatives,
    previous_cell_gradient,
    store_gates,
)
from lstm_triton_kernels.exchanged_forward import load_gains, load_hidden_mask, publish_operand
from lstm_triton_kernels.inline_ptx import round_to_tf32
from lstm_triton_kernels.polling import lane_elements, read_places, slot_place, slot_rows
from lstm_triton_kernels.row_statistics import (
    STATISTICS_PAUSE,
    line_elements,
    publish_sums,
    read_pairs,
    rounded_product,
)
from lstm_triton_kernels.rows import at_time, row_values, rows_of_block, time_of_step
from lstm_triton_kernels.rules import (
    ZONEOUT_C_BIT,
    ZONEOUT_H_BIT,
    clip_gradient,
    computed_cell,
    computed_cell_derivatives,
    zone_gradients,
)
from lstm_triton_kernels.streamed import first_streamed, streamed_product
from lstm_triton_kernels.sync import TIMED_OUT_DATA, publish
from lstm_triton_kernels.tiles import (
    barrier,
    exchanged_product,
    load_second_weights,
    load_weights,
    loads_ahead,
    own_gates_layout,
    own_layout,
    padded_units,
    row_in_block,
    second_sets,
    sum_buffer,
)
from lstm_triton_kernels.time_loop import code_of, load_last, load_saved, load_step_codes, rows_in_turn, step_of


@gluon.jit
def publish_gates(
    slot_ptr, first_unit, rows, d_i, d_f, d_g, d_o, H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, V: gl.constexpr,
    TILED: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
    PRECISION: gl.constexpr,
):  # fmt: skip
    """Publish the gradients of a program's own gates, as operands of the products: four of a unit in one store."""
    HP: gl.constexpr = padded_units(H)
    if PRECISION == "tf32":
        d_i, d_f, d_g, d_o = round_to_tf32(d_i), round_to_tf32(d_f), round_to_tf32(d_g), round_to_tf32(d_o)
    plain: gl.constexpr = own_layout(ROWS, UNITS, PARTS, WARPS)
    layout: gl.constexpr = own_gates_layout(ROWS, UNITS, PARTS, WARPS) if G == 4 else plain
    row = row_in_block(gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), ROWS, PARTS)[:, None]
    if G == 4:
        column = 4 * first_unit + gl.arange(0, 4 * UNITS, layout=gl.SliceLayout(0, layout))[None, :]
        gates = gl.reshape(gl.join(gl.join(d_i, d_g), gl.join(d_f, d_o)), [ROWS, 4 * UNITS])
        gates = gl.convert_layout(gates, layout, assert_trivial=True)
        publish(slot_ptr + slot_place(row, column, P, V, TILED), gates, (row < rows) & (column < 4 * HP))
    else:
        unit = first_unit + gl.arange(0, UNITS, layout=gl.SliceLayout(0, layout))[None, :]
        mask = (row < rows) & (unit < HP)
        publish(slot_ptr + slot_place(row, unit, P, V, TILED), d_f, mask)
        publish(slot_ptr + slot_place(row, HP + unit, P, V, TILED), d_g, mask)
        publish(slot_ptr + slot_place(row, 2 * HP + unit, P, V, TILED), d_o, mask)


@gluon.jit
def load_normalized(
    values_ptr, statistics, n, row, row_mask, length, unit, B, H: gl.constexpr, reverse, stride, G: gl.constexpr,
    HAS_LENGTHS: gl.constexpr,
):  # fmt: skip
    """Load of step n of a normalised layer the products of all gates, and statistics of rows, a tuple of (T, B); else
    none. 0 in a row without the step, and of units that there are not.
    """
    products, of_rows = (), ()
    if values_ptr is not None:
        t = time_of_step(n, length, reverse)
        step_mask = row_mask & (n < length) & (n >= 0)
        place = at_time(values_ptr, t, stride, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
        products = load_blocks(place, H, step_mask[:, None] & (unit < H)[None, :], G)
        place = t.to(gl.int64) * B + row
        for k in gl.static_range(len(statistics)):
            of_rows = of_rows + (gl.load(statistics[k] + place, mask=step_mask, other=0.0),)  # noqa: RUF005
    return products, of_rows


@gluon.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "max_polls", "pause"])
def exchanged_backward_kernel(
    d_gates_ptr, d_hidden_ptr, dc_ptr, d_h_0_ptr, exchange_ptr, peephole_exchange_ptr, projection_exchange_ptr,
    gates_ptr, cells_ptr, grad_output_ptr, grad_cells_ptr, grad_h_n_ptr, grad_c_n_ptr, w_hh_ptr, w_hr_ptr, w_ch_ptr,
    streamed_ptr, lengths_ptr, resets_ptr, error_ptr, rules, norm,
    T, B, rows, row_blocks, max_polls, pause,
    H: gl.constexpr, PROJECTION: gl.constexpr, COUPLED: gl.constexpr, DIAGONAL: gl.constexpr, FULL: gl.constexpr,
    OUTPUT_CURRENT: gl.constexpr, IDENTITY_INPUT: gl.constexpr, IDENTITY_OUTPUT: gl.constexpr,
    HAS_GRAD_OUTPUT: gl.constexpr, HAS_GRAD_CELLS: gl.constexpr,
    HAS_GRAD_H_N: gl.constexpr, HAS_GRAD_C_N: gl.constexpr, HAS_LENGTHS: gl.constexpr, HAS_RESETS: gl.constexpr,
    ONE_BLOCK: gl.constexpr, PRECISION: gl.constexpr, CHUNKS: gl.constexpr, KEPT: gl.constexpr, PIECES: gl.constexpr,
    STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr, PEEPHOLE_CHUNKS: gl.constexpr, PEEPHOLE_PIECES: gl.constexpr,
    PROJECTION_CHUNKS: gl.constexpr, PROJECTION_PIECES: gl.constexpr, TILED: gl.constexpr, ROWS: gl.constexpr,
    UNITS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of all pre-activations, d_gates (D, T, B, G·H), and of c_0, without a full peephole's part.

    - exchange: as forward, with the columns of `weights_at`; peephole_exchange of d_o, projection_exchange of dh
    - d_hidden: (D, T, B, PROJECTION) out, the gradient of every h_t; None without a projection
    - d_h_0: (D, B, HIDDEN), the part of the gradient of h_{t-1} that zoneout passes on, when step t is done; zero
      before, unless ONE_BLOCK; None where rules have no zoneout of h
    - norm: a `normalize.KernelNorm`
    - grad_output: (T, B, D·HIDDEN); grad_h_n: (D, B, HIDDEN); weights as forward
    - the other tensors as in `persistent_backward_kernel`; the constants as in `exchanged_forward_kernel`
    """
    G: gl.constexpr = 3 if COUPLED else 4
    Q: gl.constexpr = 2 if COUPLED else 3
    HIDDEN: gl.constexpr = PROJECTION if PROJECTION > 0 else H
    CURRENT: gl.constexpr = FULL and OUTPUT_CURRENT
    SETS: gl.constexpr = 2 if FULL else 1
    DRAWN: gl.constexpr = rules.codes is not None
    D_TYPE: gl.constexpr = d_gates_ptr.dtype.element_ty
    V: gl.constexpr = lane_elements(D_TYPE)
    P: gl.constexpr = 4 * V * CHUNKS * PARTS
    own: gl.constexpr = own_layout(ROWS, UNITS, PARTS, WARPS)
    each: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    direction = gl.program_id(2)
    reverse = direction == 1
    side = direction.to(gl.int64)
    first_unit = gl.program_id(0) * UNITS
    unit = first_unit + gl.arange(0, UNITS, layout=gl.SliceLayout(0, own))
    w_hh_ptr += side * G * H * HIDDEN
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        w_ch_ptr += side * Q * H * H
    w, kept = load_weights(
        w_hh_ptr, w_ch_ptr, first_unit, H, HIDDEN, G, FULL, OUTPUT_CURRENT, True, CHUNKS, KEPT, UNITS, V, PARTS, WARPS,
        PRECISION, STREAMED,
    )  # fmt: skip
    if STREAMED > 0:
        of_program = side * gl.num_programs(0) + gl.program_id(0)
        streamed_ptr += of_program * (STREAMED * PARTS * SETS * UNITS * 16)
        stream = first_streamed(streamed_ptr, STREAMED, BEYOND_L2, SETS * UNITS, 0, PARTS, WARPS)
    buffer = sum_buffer(SETS, UNITS, ROWS, PARTS, kept)
    if CURRENT:
        w_o = load_second_weights(
            w_ch_ptr + (Q - 1) * H * H, first_unit, 1, H, H, H, PEEPHOLE_CHUNKS, UNITS, PARTS, WARPS, PRECISION
        )
        peephole_buffer = sum_buffer(second_sets(UNITS), UNITS, ROWS, PARTS, w_o)
    if PROJECTION > 0:
        w_r = load_second_weights(
            w_hr_ptr + side * PROJECTION * H, first_unit, 1, H, H, PROJECTION, PROJECTION_CHUNKS, UNITS, PARTS, WARPS,
            PRECISION,
        )  # fmt: skip
        projection_buffer = sum_buffer(second_sets(UNITS), UNITS, ROWS, PARTS, w_r)

    gates_stride = B.to(gl.int64) * G * H
    cells_stride = B.to(gl.int64) * H
    states_stride = B.to(gl.int64) * HIDDEN
    block_stride = slot_rows(rows, ROWS, TILED) * P
    slot_stride = row_blocks.to(gl.int64) * block_stride
    d_gates_ptr += side * T * gates_stride
    gates_ptr += side * T * gates_stride
    exchange_ptr += side * (T + 1) * slot_stride
    before_ptr = cells_ptr + (side * (T + 1) + side) * cells_stride  # c_{t-1} stands at index t of it
    current_ptr = cells_ptr + (side * (T + 1) + 1 - side) * cells_stride  # and c_t at index t of this
    if HAS_GRAD_OUTPUT:
        grad_output_ptr += side * HIDDEN
    if HAS_GRAD_CELLS:
        grad_cells_ptr += side * H
    if HAS_GRAD_H_N:
        grad_h_n_ptr += side * states_stride
    if HAS_GRAD_C_N:
        grad_c_n_ptr += side * cells_stride
    dc_ptr += side * cells_stride
    codes_ptr = rules.codes
    if rules.codes is not None:
        codes_ptr += side * T * cells_stride
    clipped_ptr = rules.clipped
    if rules.clipped is not None:
        clipped_ptr += side * T * states_stride
    dropout_ptr = rules.hidden
    if rules.hidden is not None:
        dropout_ptr += side * states_stride
    if rules.zoneout_h is not None:
        d_h_0_ptr += side * states_stride
    values_ptr, statistics = None, ()
    if norm.gain is not None:
        gains = load_gains(norm.gain + side * G * H, unit, H, G)
        gain_c = load_gains(norm.gain_c + side * H, unit, H, 1)[0]
        if norm.shift_c is not None:
            shift_c = load_gains(norm.shift_c + side * H, unit, H, 1)[0]
        lines_stride = rows * line_elements(H, UNITS)
        products_ptr = norm.product_exchange + side * T * (row_blocks.to(gl.int64) * lines_stride)
        computed_ptr = norm.cell_exchange + side * T * (row_blocks.to(gl.int64) * lines_stride)
        values_ptr = norm.products + side * T * gates_stride
        rows_stride = side * T * B
        statistics = (
            norm.mean + rows_stride, norm.rstd + rows_stride, norm.mean_c + rows_stride, norm.rstd_c + rows_stride
        )  # fmt: skip
        d_gain_ptr = norm.d_cell + side * 2 * cells_stride
        d_shift_ptr = d_gain_ptr + cells_stride

    block = gl.program_id(1)
    in_block = row_in_block(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), ROWS, PARTS)
    row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    if CURRENT:
        P_O: gl.constexpr = 4 * V * PEEPHOLE_CHUNKS * PARTS
        peephole_stride = slot_rows(rows, ROWS, TILED) * P_O
        peephole_exchange_ptr += side * T * (row_blocks.to(gl.int64) * peephole_stride)
        own_peephole_place = slot_place(in_block[:, None], unit[None, :], P_O, V, TILED)
    if PROJECTION > 0:
        P_R: gl.constexpr = 4 * V * PROJECTION_CHUNKS * PARTS
        projection_stride = slot_rows(rows, ROWS, TILED) * P_R
        projection_exchange_ptr += side * T * (row_blocks.to(gl.int64) * projection_stride)
        own_projection_place = slot_place(in_block[:, None], unit[None, :], P_R, V, TILED)
        d_hidden_ptr += side * T * states_stride
    tile_mask = row_mask[:, None] & (unit < H)[None, :]
    hidden_mask = row_mask[:, None] & (unit < HIDDEN)[None, :]
    state = row[:, None] * H + unit[None, :]
    zero = gl.zeros([ROWS, UNITS], gl.float32, own)
    dc = zero
    if norm.gain is not None:
        d_gain, d_shift = zero, zero
    if rules.zoneout_h is not None:
        kept_h = zero  # what zoneout passes on of the gradient of h
    if ONE_BLOCK:
        dropout = load_hidden_mask(dropout_ptr, row, unit, HIDDEN, hidden_mask)
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = gl.cdiv(row_blocks - block, gl.num_programs(1))
    elif HAS_LENGTHS:
        steps = gl.max(length, 0)
        for n in range(steps, T):
            place = d_gates_ptr + gates_stride * n + row[:, None] * G * H + unit[None, :]
            for g in gl.static_range(G):
                gl.store(place + g * H, zero.to(D_TYPE), mask=tile_mask)
            if PROJECTION > 0:
                place = d_hidden_ptr + states_stride * n + row[:, None] * HIDDEN + unit[None, :]
                gl.store(place, zero.to(D_TYPE), mask=hidden_mask)
    for b in range(block, row_blocks, gl.num_programs(1)):
        slot_ptr = exchange_ptr + steps * slot_stride + b.to(gl.int64) * block_stride
        publish_gates(
            slot_ptr, first_unit, gl.minimum(rows, B - b * rows), zero, zero, zero, zero, H, G, P, V, TILED, ROWS,
            UNITS, PARTS, WARPS, PRECISION,
        )  # fmt: skip
    rows_here = gl.minimum(rows, B - block * rows)
    places = read_places(rows_here, P, V, TILED, CHUNKS, ROWS, PARTS, WARPS)
    polls = gl.full([32 * WARPS], 0, gl.int32, each) + max_polls
    clocks = gl.full([32 * WARPS], 0, gl.int32, each) + pause
    if norm.gain is not None:
        row_polls, row_clocks = in_block * 0 + max_polls, in_block * 0 + gl.minimum(pause, STATISTICS_PAUSE)

    # What the forward pass saved does not depend on other programs: it is loaded an iteration ahead.
    AHEAD: gl.constexpr = STREAMED == 0 and loads_ahead(ROWS, UNITS, PARTS, WARPS)
    if AHEAD:
        saved_next, c_next, grads_next = load_saved(
            gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1, row, row_mask, length, unit,
            B, H, HIDDEN, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
        )  # fmt: skip
        codes_next = load_step_codes(
            codes_ptr, steps - 1, row, row_mask, length, unit, H, reverse, cells_stride, HAS_LENGTHS
        )
        clipped_next = load_step_codes(
            clipped_ptr, steps - 1, row, row_mask, length, unit, HIDDEN, reverse, states_stride, HAS_LENGTHS
        )
        normalized_next = load_normalized(
            values_ptr, statistics, steps - 1, row, row_mask, length, unit, B, H, reverse, gates_stride, G, HAS_LENGTHS
        )

    for iteration in range(steps * blocks):
        done, b = step_of(iteration, block, blocks)
        n = steps - 1 - done
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
            tile_mask = row_mask[:, None] & (unit < H)[None, :]
            hidden_mask = row_mask[:, None] & (unit < HIDDEN)[None, :]
            state = row[:, None] * H + unit[None, :]
            dc = gl.load(dc_ptr + state, mask=tile_mask, other=0.0)
            dropout = load_hidden_mask(dropout_ptr, row, unit, HIDDEN, hidden_mask)
            if rules.zoneout_h is not None:
                kept_h = gl.load(d_h_0_ptr + row[:, None] * HIDDEN + unit[None, :], mask=hidden_mask, other=0.0)
            rows_here = gl.minimum(rows, B - b * rows)
            places = read_places(rows_here, P, V, TILED, CHUNKS, ROWS, PARTS, WARPS)
        t = time_of_step(n, length, reverse)
        step_mask = row_mask & (n < length)

        if AHEAD:
            saved, c_read, grads = saved_next, c_next, grads_next
            codes, clipped = codes_next, clipped_next
            normalized = normalized_next
            done_next, next_block = step_of(iteration + 1, block, blocks)
            next_row, next_row_mask, next_length = rows_in_turn(
                in_block, next_block, row, row_mask, length, rows, B, lengths_ptr, T, ONE_BLOCK, HAS_LENGTHS
            )
            saved_next, c_next, grads_next = load_saved(
                gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1 - done_next, next_row,
                next_row_mask, next_length, unit, B, H, HIDDEN, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS,
                HAS_LENGTHS,
            )  # fmt: skip
            n_next = steps - 1 - done_next
            codes_next = load_step_codes(
                codes_ptr, n_next, next_row, next_row_mask, next_length, unit, H, reverse, cells_stride, HAS_LENGTHS
            )
            clipped_next = load_step_codes(
                clipped_ptr, n_next, next_row, next_row_mask, next_length, unit, HIDDEN, reverse, states_stride,
                HAS_LENGTHS,
            )  # fmt: skip
            normalized_next = load_normalized(
                values_ptr, statistics, n_next, next_row, next_row_mask, next_length, unit, B, H, reverse, gates_stride,
                G, HAS_LENGTHS,
            )  # fmt: skip
        else:
            saved, c_read, grads = load_saved(
                gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, n, row, row_mask, length, unit, B,
                H, HIDDEN, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
            )  # fmt: skip
            codes = load_step_codes(codes_ptr, n, row, row_mask, length, unit, H, reverse, cells_stride, HAS_LENGTHS)
            clipped = load_step_codes(
                clipped_ptr, n, row, row_mask, length, unit, HIDDEN, reverse, states_stride, HAS_LENGTHS
            )
            normalized = load_normalized(
                values_ptr, statistics, n, row, row_mask, length, unit, B, H, reverse, gates_stride, G, HAS_LENGTHS
            )

        last = step_mask[:, None] & row_values(n == length - 1, HAS_LENGTHS)
        if HAS_GRAD_H_N:
            place = grad_h_n_ptr + row[:, None] * HIDDEN + unit[None, :]
            d_h_n = load_last(place, hidden_mask & last)
        if HAS_GRAD_C_N:
            d_c_n = load_last(grad_c_n_ptr + state, tile_mask & last)
        f, g, o = saved[G - 3].to(gl.float32), saved[G - 2].to(gl.float32), saved[G - 1].to(gl.float32)
        i = 1.0 - f if COUPLED else saved[0].to(gl.float32)
        c_previous, c = c_read[0], c_read[1]
        if HAS_RESETS:
            reset = gl.load(resets_ptr + (t.to(gl.int64) * B + row), mask=step_mask, other=0) != 0
            c_previous = gl.where(reset[:, None], 0.0, c_previous)
        code = code_of(codes)
        c = computed_cell(i, f, g, c_previous, c, code, rules)
        y = c
        if norm.gain is not None:
            mean, rstd, mean_c, rstd_c = normalized[1]
            n_c = (c - mean_c[:, None]) * rstd_c[:, None]
            y = n_c * gain_c
            if norm.shift_c is not None:
                y += shift_c
        by_o, by_c = output_derivatives(o, y, IDENTITY_OUTPUT)
        by_i, by_f, by_g = computed_cell_derivatives(i, f, g, c_previous, code, rules, COUPLED, IDENTITY_INPUT)

        slot_ptr = exchange_ptr + n.to(gl.int64) * slot_stride + b.to(gl.int64) * block_stride
        dh = zero
        if STREAMED > 0:
            recurrent, polls, stream = streamed_product(
                slot_ptr + slot_stride, places, polls, clocks, stream, streamed_ptr, w, kept, buffer, ONE_BLOCK, SETS,
                CHUNKS, PIECES, STREAMED, BEYOND_L2, 0, TILED, ROWS, UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
            dh = recurrent[0]
            if FULL:
                dc += recurrent[1]
        elif (first_unit < padded_units(HIDDEN)) if PROJECTION > 0 and not FULL else True:
            recurrent, polls = exchanged_product(
                slot_ptr + slot_stride, places, polls, clocks, w, kept, buffer, ONE_BLOCK, SETS, CHUNKS, PIECES, TILED,
                ROWS, UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
            dh = recurrent[0]
            if FULL:
                dc += recurrent[1]
        if rules.hidden is not None:
            dh *= dropout
        if HAS_GRAD_OUTPUT:
            dh += grads[0].to(gl.float32)
        if HAS_GRAD_CELLS:
            dc += grads[len(grads) - 1].to(gl.float32)
        if HAS_GRAD_H_N:
            dh += d_h_n.to(gl.float32)
        if HAS_GRAD_C_N:
            dc += d_c_n.to(gl.float32)
        if rules.zoneout_h is not None:
            dh, kept_h = zone_gradients(dh + kept_h, code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)
        if rules.clipped is not None:
            dh = gl.where(clipped[0] != 0, 0.0, dh)
        dc, kept_c = zone_gradients(dc, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)

        if PROJECTION > 0:
            second_ptr = projection_exchange_ptr + (n.to(gl.int64) * row_blocks + b) * projection_stride
            publish_mask = row_mask[:, None] & (unit < padded_units(HIDDEN))[None, :]
            publish_operand(second_ptr + own_projection_place, dh, publish_mask, PRECISION)
            place = at_time(d_hidden_ptr, t, states_stride, HAS_LENGTHS) + row[:, None] * HIDDEN + unit[None, :]
            gl.store(place, dh.to(D_TYPE), mask=hidden_mask)
            unprojected, polls = exchanged_product(
                second_ptr, read_places(rows_here, P_R, V, TILED, PROJECTION_CHUNKS, ROWS, PARTS, WARPS), polls, clocks,
                (), w_r, projection_buffer, ONE_BLOCK, second_sets(UNITS), PROJECTION_CHUNKS, PROJECTION_PIECES, TILED,
                ROWS, UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
            dh = unprojected[0]
        d_o = dh * by_o
        if norm.gain is not None:
            d_y = dh * by_c
            if not ONE_BLOCK:
                d_gain = gl.load(d_gain_ptr + state, mask=tile_mask, other=0.0)
                d_shift = gl.load(d_shift_ptr + state, mask=tile_mask, other=0.0)
            d_gain += d_y * n_c
            d_shift += d_y
            d_y = rounded_product(d_y, gain_c)
            lines = (n.to(gl.int64) * row_blocks + b) * lines_stride
            publish_sums(computed_ptr + lines, rows_here, d_y, rounded_product(d_y, n_c), H, ROWS, UNITS, PARTS)
            sum_y, sum_yn, row_polls = read_pairs(
                computed_ptr + lines, in_block, rows_here, row_polls, row_clocks, 0, ONE_BLOCK, H, ROWS, UNITS, PARTS,
                WARPS,
            )  # fmt: skip
            dc += rstd_c[:, None] * (d_y - (sum_y * (1.0 / H))[:, None] - n_c * (sum_yn * (1.0 / H))[:, None])
        else:
            dc += dh * by_c
        if CURRENT:
            second_ptr = peephole_exchange_ptr + (n.to(gl.int64) * row_blocks + b) * peephole_stride
            publish_mask = row_mask[:, None] & (unit < padded_units(H))[None, :]
            publish_operand(second_ptr + own_peephole_place, d_o, publish_mask, PRECISION)
            of_o, polls = exchanged_product(
                second_ptr, read_places(rows_here, P_O, V, TILED, PEEPHOLE_CHUNKS, ROWS, PARTS, WARPS), polls, clocks,
                (), w_o, peephole_buffer, ONE_BLOCK, second_sets(UNITS), PEEPHOLE_CHUNKS, PEEPHOLE_PIECES, TILED, ROWS,
                UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
            dc += of_o[0]
        if DIAGONAL and OUTPUT_CURRENT:
            dc += v[Q - 1] * d_o
        dc = clip_gradient(dc, c, rules.cell_clip)
        d_i, d_f, d_g = dc * by_i, dc * by_f, dc * by_g
        d = (d_i, d_f, d_g, d_o)
        if norm.gain is not None:
            p, d_n, of_mean, of_product = (), (), zero, zero
            for k in gl.static_range(G):
                value = (normalized[0][k].to(gl.float32) - mean[:, None]) * rstd[:, None]
                gradient = d[4 - G + k] * gains[k]
                p, d_n = p + (value,), d_n + (gradient,)  # noqa: RUF005
                of_mean += gradient
                of_product += rounded_product(gradient, value)
            publish_sums(products_ptr + lines, rows_here, of_mean, of_product, H, ROWS, UNITS, PARTS)
            sum_d, sum_dn, row_polls = read_pairs(
                products_ptr + lines, in_block, rows_here, row_polls, row_clocks, 0, ONE_BLOCK, H, ROWS, UNITS, PARTS,
                WARPS,
            )  # fmt: skip
            sum_d, sum_dn = (sum_d * (1.0 / (G * H)))[:, None], (sum_dn * (1.0 / (G * H)))[:, None]
            d = (d_i,) if COUPLED else ()
            for k in gl.static_range(G):
                d = d + (rstd[:, None] * (d_n[k] - sum_d - p[k] * sum_dn),)  # noqa: RUF005
        if HAS_RESETS:
            read = (reset == 0)[:, None]
            d_i_read, d_f_read = gl.where(read, d[0], 0.0), gl.where(read, d[1], 0.0)
            d = (d_i_read, d_f_read, gl.where(read, d[2], 0.0), gl.where(read, d[3], 0.0))
        publish_gates(
            slot_ptr, first_unit, rows_here, d[0], d[1], d[2], d[3], H, G, P, V, TILED, ROWS, UNITS, PARTS, WARPS,
            PRECISION,
        )  # fmt: skip
        dc = previous_cell_gradient(dc, f, d_i, d_f, d_o, v, COUPLED, DIAGONAL, OUTPUT_CURRENT)
        if rules.zoneout_c is not None:
            dc += kept_c
        if HAS_RESETS:
            dc = gl.where(reset[:, None], 0.0, dc)
            if rules.zoneout_h is not None:
                kept_h = gl.where(reset[:, None], 0.0, kept_h)

        # A row that does not have this step has zero gradients and zero dc: its loads were masked.
        d_now = at_time(d_gates_ptr, t, gates_stride, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
        store_gates(d_now, d_i, d_f, d_g, H, tile_mask, COUPLED)
        gl.store(d_now + (G - 1) * H, d_o.to(D_TYPE), mask=tile_mask)
        if not ONE_BLOCK:
            gl.store(dc_ptr + state, dc, mask=tile_mask)
            if norm.gain is not None:
                gl.store(d_gain_ptr + state, d_gain, mask=tile_mask)
                gl.store(d_shift_ptr + state, d_shift, mask=tile_mask)
            if rules.zoneout_h is not None:
                gl.store(d_h_0_ptr + row[:, None] * HIDDEN + unit[None, :], kept_h, mask=hidden_mask)
            if ROWS * UNITS < 32 * WARPS:
                barrier()  # where several threads have one element, one stores what all load
    if ONE_BLOCK:
        gl.store(dc_ptr + state, dc, mask=tile_mask)
        if norm.gain is not None:
            gl.store(d_gain_ptr + state, d_gain, mask=tile_mask)
            gl.store(d_shift_ptr + state, d_shift, mask=tile_mask)
        if rules.zoneout_h is not None:
            gl.store(d_h_0_ptr + row[:, None] * HIDDEN + unit[None, :], kept_h, mask=hidden_mask)
    if norm.gain is not None:
        polls = gl.minimum(polls, gl.min(row_polls, 0))
    if gl.min(polls, 0) <= 0:
        gl.atomic_or(error_ptr, TIMED_OUT_DATA, sem="relaxed", scope="gpu")
