"""The forward pass of a layer in one launch, in Gluon: programs exchange h through L2, weights stay in registers.

Shapes, programs and masks as in `persistent_forward`; a tile is (ROWS, UNITS). What differs is the exchange. It has a
buffer of its own with a slot for each step, which holds what that step reads of all units (polling.py): slot 0 h_0,
slot n + 1 what step n leaves, zeros in rows that end there or are reset before their next step. So a step needs no
masks for what it reads. With a full peephole c is exchanged beside h, in the same type, and is more columns of the same
product.

In each step a program lets some hundred clocks pass, since no other program is done earlier. Then its warps poll until
they have what they multiply, the sums of their parts are added up, and the program publishes.

Two variants need a product within the step, and so a second exchange, through a buffer with a slot for each step: a
full peephole of the output gate on c_t, which needs c_t of all units, and a projection, h_t = W_hr (o tanh(c_t)), which
needs o tanh(c_t) of all units (Sak et al. 2014). A program has the rows of W_hr with the numbers of its units, as far
as there are so many; programs without any wait for the next h_t at once.

With layer normalisation there are two small exchanges within a step, of the mean and the deviation of each row
(row_statistics.py): of the products W_hh h_{t-1} of all gates, and of c~.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lstm_triton_kernels.equations import activation, load_peephole, next_cell, output_gate
from lstm_triton_kernels.inline_ptx import round_to_tf32
from lstm_triton_kernels.polling import lane_elements, read_places, slot_place, slot_rows
from lstm_triton_kernels.row_statistics import STATISTICS_PAUSE, line_elements, publish_moments, read_pairs
from lstm_triton_kernels.rows import at_time, rows_of_block, time_of_step
from lstm_triton_kernels.rules import ZONEOUT_C_BIT, ZONEOUT_H_BIT, clip, regularized_cell, zone
from lstm_triton_kernels.streamed import first_streamed, streamed_product
from lstm_triton_kernels.sync import TIMED_OUT_DATA, publish
from lstm_triton_kernels.tiles import (
    barrier,
    exchanged_product,
    load_second_weights,
    load_weights,
    loads_ahead,
    own_layout,
    padded_units,
    row_in_block,
    second_sets,
    sum_buffer,
)
from lstm_triton_kernels.time_loop import (
    cell_places,
    code_of,
    load_gate_inputs,
    load_step_codes,
    rows_in_turn,
    step_of,
    store_step,
)


@gluon.jit
def publish_operand(ptr, value, mask, PRECISION: gl.constexpr):
    """Publish a block as an operand of products."""
    publish(ptr, round_to_tf32(value) if PRECISION == "tf32" else value, mask)


@gluon.jit
def publish_state(
    slot_ptr, place, h, c, h_mask, c_mask, HIDDEN: gl.constexpr, V: gl.constexpr, TILED: gl.constexpr,
    FULL: gl.constexpr, PRECISION: gl.constexpr,
):  # fmt: skip
    """Publish h, and with a full peephole c, of a program's own rows and units, as operands of the products."""
    BEFORE_C: gl.constexpr = padded_units(HIDDEN)
    publish_operand(slot_ptr + place, h, h_mask, PRECISION)
    if FULL:
        behind = BEFORE_C // V * (8 * V) if TILED else BEFORE_C
        publish_operand(slot_ptr + place + behind, c, c_mask, PRECISION)


@gluon.jit
def load_hidden_mask(hidden_ptr, row, unit, HIDDEN: gl.constexpr, mask):
    """Load the mask of dropout on h of a program's own rows and units, (ROWS, UNITS); 1 where there is no dropout."""
    if hidden_ptr is not None:
        return gl.load(hidden_ptr + row[:, None] * HIDDEN + unit[None, :], mask=mask, other=0.0).to(gl.float32)
    else:
        return 1.0


@gluon.jit
def load_gains(ptr, unit, H: gl.constexpr, BLOCKS: gl.constexpr):
    """Load the blocks of gains (BLOCKS·H,) of a program's own units, as rows (1, UNITS) of float32; 0 beyond H."""
    gains = ()
    for block in gl.static_range(BLOCKS):
        gain = gl.load(ptr + block * H + unit, mask=unit < H, other=0.0).to(gl.float32)
        gains = gains + (gain[None, :],)  # noqa: RUF005
    return gains


@gluon.jit
def normalized_products(p, mean, rstd, gains):
    """Return a tuple of blocks (ROWS, UNITS) with their rows normalised, mean and rstd (ROWS,), times the gains."""
    found = ()
    for n in gl.static_range(len(p)):
        found = found + ((p[n] - mean[:, None]) * rstd[:, None] * gains[n],)  # noqa: RUF005
    return found


@gluon.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "max_polls", "pause"])
def exchanged_forward_kernel(
    gates_ptr, output_ptr, exchange_ptr, peephole_exchange_ptr, projection_exchange_ptr, cells_ptr, h_n_ptr, c_n_ptr,
    h_0_ptr, c_0_ptr, w_hh_ptr, w_hr_ptr, w_ch_ptr, streamed_ptr, lengths_ptr, resets_ptr, error_ptr, rules,
    norm, T, B, rows, row_blocks, max_polls, pause,
    H: gl.constexpr, PROJECTION: gl.constexpr, COUPLED: gl.constexpr, DIAGONAL: gl.constexpr, FULL: gl.constexpr,
    OUTPUT_CURRENT: gl.constexpr, IDENTITY_INPUT: gl.constexpr, IDENTITY_OUTPUT: gl.constexpr,
    SAVE_GATES: gl.constexpr, CELLS: gl.constexpr, HAS_LENGTHS: gl.constexpr,
    HAS_RESETS: gl.constexpr, ONE_BLOCK: gl.constexpr, PRECISION: gl.constexpr, CHUNKS: gl.constexpr,
    KEPT: gl.constexpr, PIECES: gl.constexpr, STREAMED: gl.constexpr, BEYOND_L2: gl.constexpr,
    PEEPHOLE_CHUNKS: gl.constexpr, PEEPHOLE_PIECES: gl.constexpr, PROJECTION_CHUNKS: gl.constexpr,
    PROJECTION_PIECES: gl.constexpr, TILED: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """gates (D, T, B, G·H), the input side of all gates, becomes (SAVE_GATES) the activated gates.

    - output: (T, B, D, HIDDEN) out; HIDDEN = PROJECTION, the size of a projected h, or H where that is 0
    - exchange: (D, T + 1, row_blocks, `slot_rows` · P), all ones, but zero in columns that no program publishes;
      P = 4 V · CHUNKS · PARTS; peephole_exchange, projection_exchange: the same of T slots, with chunks of their own;
      None where the step has no such product
    - h_n, h_0: (D, B, HIDDEN); w_hh: (D, G·H, HIDDEN); w_hr: (D, PROJECTION, H)
    - cells, c_n, c_0, w_ch, lengths, resets, error, ONE_BLOCK: as in `persistent_forward_kernel`
    - rules: a `regularize.KernelRules`; with zoneout of h and several row blocks h_n holds h_{t-1} between steps
    - norm: a `normalize.KernelNorm`, what it has forward

    CHUNKS of each of PARTS of the columns, KEPT of them in shared memory; they are waited for and multiplied in PIECES.
    STREAMED of them are loaded in every step from `streamed` (streamed.py), the last BEYOND_L2 from device memory.
    ROWS: of a tile, of which `rows` are used; UNITS: a multiple of 8.
    """
    G: gl.constexpr = 3 if COUPLED else 4
    Q: gl.constexpr = 2 if COUPLED else 3
    H_TYPE: gl.constexpr = output_ptr.dtype.element_ty
    V: gl.constexpr = lane_elements(H_TYPE)
    P: gl.constexpr = 4 * V * CHUNKS * PARTS
    HIDDEN: gl.constexpr = PROJECTION if PROJECTION > 0 else H
    CURRENT: gl.constexpr = FULL and OUTPUT_CURRENT
    DRAWN: gl.constexpr = rules.codes is not None
    own: gl.constexpr = own_layout(ROWS, UNITS, PARTS, WARPS)
    each: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    direction = gl.program_id(2)
    reverse = direction == 1
    D = gl.num_programs(2)
    side = direction.to(gl.int64)
    first_unit = gl.program_id(0) * UNITS
    unit = first_unit + gl.arange(0, UNITS, layout=gl.SliceLayout(0, own))
    w_hh_ptr += side * G * H * HIDDEN
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        w_ch_ptr += side * Q * H * H
    w, kept = load_weights(
        w_hh_ptr, w_ch_ptr, first_unit, H, HIDDEN, G, FULL, OUTPUT_CURRENT, False, CHUNKS, KEPT, UNITS, V, PARTS, WARPS,
        PRECISION, STREAMED,
    )  # fmt: skip
    if STREAMED > 0:
        of_program = side * gl.num_programs(0) + gl.program_id(0)
        streamed_ptr += of_program * (STREAMED * PARTS * 4 * UNITS * 16)
        stream = first_streamed(streamed_ptr, STREAMED, BEYOND_L2, 4 * UNITS, (4 - G) * UNITS, PARTS, WARPS)
    buffer = sum_buffer(4, UNITS, ROWS, PARTS, kept)
    if CURRENT:
        w_o = load_second_weights(
            w_ch_ptr + (Q - 1) * H * H, first_unit, H, 1, H, H, PEEPHOLE_CHUNKS, UNITS, PARTS, WARPS, PRECISION
        )
        peephole_buffer = sum_buffer(second_sets(UNITS), UNITS, ROWS, PARTS, w_o)
    if PROJECTION > 0:
        w_r = load_second_weights(
            w_hr_ptr + side * PROJECTION * H, first_unit, H, 1, PROJECTION, H, PROJECTION_CHUNKS, UNITS, PARTS, WARPS,
            PRECISION,
        )  # fmt: skip
        projection_buffer = sum_buffer(second_sets(UNITS), UNITS, ROWS, PARTS, w_r)

    gates_stride = B.to(gl.int64) * G * H
    output_stride = B.to(gl.int64) * D * HIDDEN
    cells_stride = B.to(gl.int64) * H
    states_stride = B.to(gl.int64) * HIDDEN
    block_stride = slot_rows(rows, ROWS, TILED) * P
    slot_stride = row_blocks.to(gl.int64) * block_stride
    gates_ptr += side * T * gates_stride
    output_ptr += side * HIDDEN
    exchange_ptr += side * (T + 1) * slot_stride
    if CELLS == "all":
        cells_ptr += side * (T + 1) * cells_stride
    if CELLS == "one":
        cells_ptr += side * cells_stride
    h_0_ptr += side * states_stride
    c_0_ptr += side * cells_stride
    h_n_ptr += side * states_stride
    c_n_ptr += side * cells_stride
    codes_ptr = rules.codes
    if rules.codes is not None:
        codes_ptr += side * T * cells_stride
    dropout_ptr = rules.hidden
    if rules.hidden is not None:
        dropout_ptr += side * states_stride
    if norm.gain is not None:
        gains = load_gains(norm.gain + side * G * H, unit, H, G)
        gain_c = load_gains(norm.gain_c + side * H, unit, H, 1)[0]
        if norm.shift_c is not None:
            shift_c = load_gains(norm.shift_c + side * H, unit, H, 1)[0]
        lines_stride = rows * line_elements(H, UNITS)
        products_ptr = norm.product_exchange + side * T * (row_blocks.to(gl.int64) * lines_stride)
        computed_ptr = norm.cell_exchange + side * T * (row_blocks.to(gl.int64) * lines_stride)

    # The initial states are published like all others.
    block = gl.program_id(1)
    in_block = row_in_block(gl.arange(0, ROWS, layout=gl.SliceLayout(1, own)), ROWS, PARTS)
    own_place = slot_place(in_block[:, None], unit[None, :], P, V, TILED)
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
    row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    for b in range(block, row_blocks, gl.num_programs(1)):
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
        tile_mask = row_mask[:, None] & (unit < H)[None, :]
        state = row[:, None] * H + unit[None, :]
        c = gl.load(c_0_ptr + state, mask=tile_mask, other=0.0).to(gl.float32)
        hidden_mask = row_mask[:, None] & (unit < HIDDEN)[None, :]
        h = gl.load(h_0_ptr + row[:, None] * HIDDEN + unit[None, :], mask=hidden_mask, other=0.0).to(gl.float32)
        if CELLS != "none":
            place = cells_ptr + state
            if CELLS == "all":
                place = at_time(place, gl.where(reverse, length, 0), cells_stride, HAS_LENGTHS)
            gl.store(place, c, mask=tile_mask)
        if HAS_RESETS:
            first_t = time_of_step(0, length, reverse)
            reset = gl.load(resets_ptr + (first_t.to(gl.int64) * B + row), mask=row_mask, other=0) != 0
            c = gl.where(reset[:, None], 0.0, c)
            h = gl.where(reset[:, None], 0.0, h)
        if rules.hidden is not None:
            h *= load_hidden_mask(dropout_ptr, row, unit, HIDDEN, hidden_mask)
        slot_ptr = exchange_ptr + b.to(gl.int64) * block_stride
        h_mask = row_mask[:, None] & (unit < padded_units(HIDDEN))[None, :]
        c_mask = row_mask[:, None] & (unit < padded_units(H))[None, :]
        publish_state(slot_ptr, own_place, h, c, h_mask, c_mask, HIDDEN, V, TILED, FULL, PRECISION)

    tile_mask = row_mask[:, None] & (unit < H)[None, :]
    hidden_mask = row_mask[:, None] & (unit < HIDDEN)[None, :]
    h_mask = row_mask[:, None] & (unit < padded_units(HIDDEN))[None, :]
    c_mask = row_mask[:, None] & (unit < padded_units(H))[None, :]
    state = row[:, None] * H + unit[None, :]
    if ONE_BLOCK:
        c = gl.load(c_0_ptr + state, mask=tile_mask, other=0.0).to(gl.float32)
        dropout = load_hidden_mask(dropout_ptr, row, unit, HIDDEN, hidden_mask)
        if rules.zoneout_h is not None:
            place = h_0_ptr + row[:, None] * HIDDEN + unit[None, :]
            h_previous = gl.load(place, mask=hidden_mask, other=0.0).to(gl.float32)
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = gl.cdiv(row_blocks - block, gl.num_programs(1))
        row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    elif HAS_LENGTHS:
        steps = gl.max(length, 0)
    rows_here = gl.minimum(rows, B - block * rows)
    places = read_places(rows_here, P, V, TILED, CHUNKS, ROWS, PARTS, WARPS)
    polls = gl.full([32 * WARPS], 0, gl.int32, each) + max_polls
    clocks = gl.full([32 * WARPS], 0, gl.int32, each) + pause
    if norm.gain is not None:
        row_polls, row_clocks = in_block * 0 + max_polls, in_block * 0 + gl.minimum(pause, STATISTICS_PAUSE)

    # Gate inputs and masks do not depend on other programs: they are loaded an iteration ahead, to hide the latency.
    # But not bytes that are adjacent in a thread: the compiler takes them apart before it polls, and waits for them.
    AHEAD: gl.constexpr = STREAMED == 0 and loads_ahead(ROWS, UNITS, PARTS, WARPS)
    CODES_LATE: gl.constexpr = rules.codes is not None and (not AHEAD or (PARTS == 1 and UNITS > 8))
    if AHEAD:
        a_next = load_gate_inputs(gates_ptr, 0, row, row_mask, length, unit, H, reverse, gates_stride, G, HAS_LENGTHS)
    codes = load_step_codes(codes_ptr, 0, row, row_mask, length, unit, H, reverse, cells_stride, HAS_LENGTHS)

    for iteration in range(steps * blocks):
        n, b = step_of(iteration, block, blocks)
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
            tile_mask = row_mask[:, None] & (unit < H)[None, :]
            hidden_mask = row_mask[:, None] & (unit < HIDDEN)[None, :]
            h_mask = row_mask[:, None] & (unit < padded_units(HIDDEN))[None, :]
            c_mask = row_mask[:, None] & (unit < padded_units(H))[None, :]
            state = row[:, None] * H + unit[None, :]
            rows_here = gl.minimum(rows, B - b * rows)
            places = read_places(rows_here, P, V, TILED, CHUNKS, ROWS, PARTS, WARPS)
        t = time_of_step(n, length, reverse)
        step_mask = row_mask & (n < length)
        step_tile_mask = tile_mask & step_mask[:, None]

        if AHEAD or CODES_LATE:
            after, next_block = step_of(iteration + 1, block, blocks)
            next_row, next_row_mask, next_length = rows_in_turn(
                in_block, next_block, row, row_mask, length, rows, B, lengths_ptr, T, ONE_BLOCK, HAS_LENGTHS
            )
        code = code_of(codes)
        if AHEAD:
            a = a_next
            a_next = load_gate_inputs(
                gates_ptr, after, next_row, next_row_mask, next_length, unit, H, reverse, gates_stride, G, HAS_LENGTHS
            )
        else:
            a = load_gate_inputs(gates_ptr, n, row, row_mask, length, unit, H, reverse, gates_stride, G, HAS_LENGTHS)
        if rules.codes is not None and not CODES_LATE:
            codes = load_step_codes(
                codes_ptr, after, next_row, next_row_mask, next_length, unit, H, reverse, cells_stride, HAS_LENGTHS
            )
        if CELLS != "none":
            cells_before, cells_now = cell_places(
                cells_ptr, n, t, length, state, direction, cells_stride, CELLS, HAS_LENGTHS
            )
        if not ONE_BLOCK:
            c = gl.load(cells_before, mask=step_tile_mask, other=0.0)
            dropout = load_hidden_mask(dropout_ptr, row, unit, HIDDEN, hidden_mask)
            if rules.zoneout_h is not None:
                place = gl.where(n == 0, h_0_ptr, h_n_ptr) + row[:, None] * HIDDEN + unit[None, :]
                h_previous = gl.load(place, mask=hidden_mask & step_mask[:, None], other=0.0).to(gl.float32)
        read_mask = row_mask & (n + 1 < length)  # rows whose state is read by a next step
        if HAS_RESETS:
            reset = gl.load(resets_ptr + (t.to(gl.int64) * B + row), mask=step_mask, other=0) != 0
            c = gl.where(reset[:, None], 0.0, c)
            if rules.zoneout_h is not None:
                h_previous = gl.where(reset[:, None], 0.0, h_previous)
            step_after = time_of_step(n + 1, length, reverse)
            reset = gl.load(resets_ptr + (step_after.to(gl.int64) * B + row), mask=read_mask, other=0) != 0
            read_mask = read_mask & (reset == 0)

        slot_ptr = exchange_ptr + n.to(gl.int64) * slot_stride + b.to(gl.int64) * block_stride
        if STREAMED > 0:
            recurrent, polls, stream = streamed_product(
                slot_ptr, places, polls, clocks, stream, streamed_ptr, w, kept, buffer, ONE_BLOCK, 4, CHUNKS, PIECES,
                STREAMED, BEYOND_L2, (4 - G) * UNITS, TILED, ROWS, UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
        else:
            recurrent, polls = exchanged_product(
                slot_ptr, places, polls, clocks, w, kept, buffer, ONE_BLOCK, 4, CHUNKS, PIECES, TILED, ROWS, UNITS,
                PARTS, WARPS, PRECISION,
            )  # fmt: skip
        products = ()
        for g in gl.static_range(G):
            products = products + (recurrent[g + 4 - G],)  # noqa: RUF005
        if norm.gain is not None:
            lines = (n.to(gl.int64) * row_blocks + b) * lines_stride
            publish_moments(products_ptr + lines, rows_here, products, tile_mask, H, ROWS, UNITS, PARTS)
            mean, rstd, row_polls = read_pairs(
                products_ptr + lines, in_block, rows_here, row_polls, row_clocks, G, ONE_BLOCK, H, ROWS, UNITS, PARTS,
                WARPS,
            )  # fmt: skip
            products = normalized_products(products, mean, rstd, gains)
        sums = ()
        for g in gl.static_range(G):
            sums = sums + (a[g].to(gl.float32) + products[g],)  # noqa: RUF005

        c_previous = c
        i, f, g, c = next_cell(sums, v, c_previous, COUPLED, DIAGONAL, IDENTITY_INPUT)
        if CODES_LATE:
            codes = load_step_codes(
                codes_ptr, after, next_row, next_row_mask, next_length, unit, H, reverse, cells_stride, HAS_LENGTHS
            )
        c = regularized_cell(i, f, g, c_previous, c, code, rules)
        a_o = sums[G - 1]  # type: ignore[var-annotated]
        if CURRENT:
            second_ptr = peephole_exchange_ptr + (n.to(gl.int64) * row_blocks + b) * peephole_stride
            publish_operand(second_ptr + own_peephole_place, c, c_mask, PRECISION)
            read_c, polls = exchanged_product(
                second_ptr, read_places(rows_here, P_O, V, TILED, PEEPHOLE_CHUNKS, ROWS, PARTS, WARPS), polls, clocks,
                (), w_o, peephole_buffer, ONE_BLOCK, second_sets(UNITS), PEEPHOLE_CHUNKS, PEEPHOLE_PIECES, TILED, ROWS,
                UNITS, PARTS, WARPS, PRECISION,
            )  # fmt: skip
            a_o += read_c[0]
        o = output_gate(a_o, v, c_previous, c, DIAGONAL, OUTPUT_CURRENT)
        y = c
        if norm.gain is not None:
            publish_moments(computed_ptr + lines, rows_here, (c,), tile_mask, H, ROWS, UNITS, PARTS)
            mean, rstd, row_polls = read_pairs(
                computed_ptr + lines, in_block, rows_here, row_polls, row_clocks, 1, ONE_BLOCK, H, ROWS, UNITS, PARTS,
                WARPS,
            )  # fmt: skip
            y = (c - mean[:, None]) * rstd[:, None] * gain_c
            if norm.shift_c is not None:
                y += shift_c
        h = o * activation(y, IDENTITY_OUTPUT)
        if PROJECTION > 0:
            second_ptr = projection_exchange_ptr + (n.to(gl.int64) * row_blocks + b) * projection_stride
            publish_operand(second_ptr + own_projection_place, h, c_mask, PRECISION)
            if first_unit < padded_units(HIDDEN):
                projected, polls = exchanged_product(
                    second_ptr, read_places(rows_here, P_R, V, TILED, PROJECTION_CHUNKS, ROWS, PARTS, WARPS), polls,
                    clocks, (), w_r, projection_buffer, ONE_BLOCK, second_sets(UNITS), PROJECTION_CHUNKS,
                    PROJECTION_PIECES, TILED, ROWS, UNITS, PARTS, WARPS, PRECISION,
                )  # fmt: skip
                h = clip(projected[0], rules.proj_clip)
        c = zone(c, c_previous, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)
        if rules.zoneout_h is not None:
            h = zone(h, h_previous, code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)
            h = h.to(H_TYPE).to(gl.float32)  # as it is where the next step loads it
            h_previous = h

        # What others wait for goes first.
        h_read = gl.where(read_mask[:, None], h * dropout if rules.hidden is not None else h, 0.0)
        c_read = gl.where(read_mask[:, None], c, 0.0)
        publish_state(
            slot_ptr + slot_stride, own_place, h_read, c_read, h_mask, c_mask, HIDDEN, V, TILED, FULL, PRECISION
        )
        output_now = at_time(output_ptr, t, output_stride, HAS_LENGTHS) + row[:, None] * D * HIDDEN + unit[None, :]
        gl.store(output_now, gl.where(step_mask[:, None], h, 0.0).to(H_TYPE), mask=hidden_mask)
        if CELLS != "none":
            gl.store(cells_now, gl.where(step_mask[:, None], c, 0.0), mask=tile_mask)
        store_step(
            gates_ptr, h_n_ptr, c_n_ptr, i, f, g, o, h, c, n, t, length, row, unit, state,
            row[:, None] * HIDDEN + unit[None, :], H, gates_stride, step_tile_mask, hidden_mask & step_mask[:, None], G,
            COUPLED, SAVE_GATES, HAS_LENGTHS,
        )  # fmt: skip
        if rules.zoneout_h is not None and not ONE_BLOCK:
            place = h_n_ptr + row[:, None] * HIDDEN + unit[None, :]
            gl.store(place, h.to(H_TYPE), mask=hidden_mask & step_mask[:, None])
        if not ONE_BLOCK and ROWS * UNITS < 32 * WARPS:
            barrier()  # where several threads have one element, one stores c and h and all load them

    if HAS_LENGTHS and ONE_BLOCK:
        zero = gl.zeros([ROWS, UNITS], gl.float32, own)
        for n in range(steps, T):
            output_now = output_ptr + output_stride * n + row[:, None] * D * HIDDEN + unit[None, :]
            gl.store(output_now, zero.to(H_TYPE), mask=hidden_mask)
            if CELLS == "all":
                gl.store(cells_ptr + cells_stride * (n + 1) + state, zero, mask=tile_mask)
    if norm.gain is not None:
        polls = gl.minimum(polls, gl.min(row_polls, 0))
    if gl.min(polls, 0) <= 0:
        gl.atomic_or(error_ptr, TIMED_OUT_DATA, sem="relaxed", scope="gpu")
