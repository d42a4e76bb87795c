"""The forward pass of a layer in one launch: the recurrent weights stay in shared memory for all time steps.

Shapes: T time steps, B batch rows, H hidden units, D directions, G gate blocks in the order i, f, g, o (coupled: f, g,
o), Q peephole blocks i, f, o (coupled: f, o). A program (thread block) has the indices (part of the units, first row
block, direction). It owns BLOCK_U units with all their gates, and the row blocks from its first one on, as many apart
as there are programs on that axis.

In each step a program loads the gate inputs of its units, waits for h_{t-1} of all units, multiplies it with the
resident weights, updates its own c, and publishes h_t of its units. The buffer of hidden states has a slot for every
h_t, and one for h_0 behind the last, so that the first step waits and reads as all others do. A full peephole needs
c_{t-1} of all units, too: c is published beside h. Where one program holds all units (ALONE) it waits for nobody, and h
stays in its registers.

A full peephole of the output gate on c_t, and a projection h_t = W_hr (o tanh(c_t)), need a product within the step: of
what all programs publish in the same step, c_t or o tanh(c_t). A program has the rows of W_hr with the numbers of its
units, as far as there are so many.

With `rules`, steps are regularised (regularize.py). What is exchanged is h_t as W_hh reads it, with its mask: then
the output is another buffer. A full peephole on c_t reads what the step computed, c~, and those on c_{t-1} what zoneout
left of it: then both are exchanged.

With `lengths`, row b ends after lengths[b] steps (the second direction starts there): it leaves its state in h_n and
c_n, and writes zeros for the steps beyond. With `resets` (T, B), the state is zero before such a step.

All values are float32 (in Triton's interpreter float64, too), and so are the products. What tensor cores multiply,
16-bit types and TF32, is computed by `exchanged_forward`.

Masks: row_mask (BLOCK_B,), the rows that exist; step_mask, those that have this step; carry_mask, those of them whose
state is carried into the step, since it is not reset; tile_mask and step_tile_mask (BLOCK_B, BLOCK_U), the same for the
elements of a tile; read_mask, carry_mask as a column; last_mask, the rows that end with this step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lstm_triton_kernels.equations import activation, load_peephole, output_gate
from lstm_triton_kernels.resident import (
    as_right,
    chunk_pointers,
    divided_by,
    exchanged_product,
    load_gate_tiles,
    load_second_tile,
    load_second_tiles,
    load_stacked_tiles,
    multiply_add,
    peephole_block,
    sum_gates,
)
from lstm_triton_kernels.rows import at_time, rows_of_block, time_of_step
from lstm_triton_kernels.rules import ZONEOUT_C_BIT, ZONEOUT_H_BIT, clip, next_computed_cell, zone
from lstm_triton_kernels.sync import (
    COUNTER_STRIDE,
    exchange_arrive,
    exchange_load,
    exchange_pause,
    exchange_store,
    exchange_wait,
)
from lstm_triton_kernels.time_loop import (
    cell_places,
    load_gate_inputs,
    load_step_codes,
    rows_in_turn,
    step_of,
    store_step,
)


@triton.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "max_polls", "pause"])
def persistent_forward_kernel(
    gates_ptr, hidden_ptr, output_ptr, unprojected_ptr, computed_ptr, cells_ptr, h_n_ptr, c_n_ptr, h_0_ptr, c_0_ptr,
    w_hh_ptr, w_hr_ptr, w_ch_ptr, lengths_ptr, resets_ptr, counters_ptr, error_ptr, rules,
    T, B, H, P, padded_H, padded_P, rows, row_blocks, max_polls, pause,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, FULL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr,
    SAVE_GATES: tl.constexpr, CELLS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    PROJECTED: tl.constexpr, ALONE: tl.constexpr, ONE_BLOCK: tl.constexpr, WAIT: tl.constexpr, CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, PEEPHOLE_CHUNKS: tl.constexpr, PEEPHOLE_PIECES: tl.constexpr, PROJECTION_CHUNKS: tl.constexpr,
    PROJECTION_PIECES: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, H_DIVISOR: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gates (D, T, B, G·H), the input side of all gates, becomes (SAVE_GATES) the activated gates.

    - hidden: (T + 1, B, D, padded_P) out, zero beyond P, the size of h: of a projected one, else H; slot T is that of
      h_0; unprojected: (T, B, D, padded_H) out, o tanh(c_t), zero beyond H; None unless PROJECTED or where ALONE
    - output: (T, B, D, P) out, every h_t, where hidden has the mask with which W_hh reads it; else None
    - computed: (D, T, B, H) out, c~ of every step; None but with zoneout of c and a full peephole on c_t, not ALONE
    - cells: (D, T + 1, B, H) out, slot t the state before step t, in the second direction after it (CELLS == "all"); or
      (D, 1, B, H), the state between two steps (CELLS == "one"); or None (CELLS == "none": c stays in registers)
    - h_n (D, B, P), c_n (D, B, H) out; h_0, c_0: likewise; w_hh: (D, G·H, P); w_hr: (D, P, H) or None; w_ch: (D, Q·H)
      diagonal, (D, Q·H, H) full
    - lengths: (B,) int32 or int64; resets: (T, B) uint8; rules: a `KernelRules`; counters: one a direction and row
      block, zero, then as many for V_o, and as many for W_hr, if the step has a product with one of these; error: int32

    ONE_BLOCK: no program has a second row block.
    CHUNKS, PARTS, BLOCK_K: how the columns of the product are cut (resident.py); GROUP chunks, a divisor of CHUNKS, are
    read at once; PEEPHOLE and PROJECTION: the same of the products within a step, in PIECES groups. WARPS: of the
    program. H_DIVISOR: a power of two, divides H.
    """
    G: tl.constexpr = 3 if COUPLED else 4
    Q: tl.constexpr = 2 if COUPLED else 3
    ELEMENT: tl.constexpr = gates_ptr.dtype.element_ty
    direction = tl.program_id(2)
    reverse = direction == 1
    D = tl.num_programs(2)
    H = divided_by(H, H_DIVISOR)
    if not PROJECTED:
        P = H
    CURRENT: tl.constexpr = FULL and OUTPUT_CURRENT
    DRAWN: tl.constexpr = rules.codes is not None
    side = direction.to(tl.int64)
    unit_from = tl.program_id(0) * BLOCK_U
    unit = unit_from + tl.arange(0, BLOCK_U)
    w_hh_ptr += side * G * H * P
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        w_ch_ptr += side * Q * H * H
    if ALONE:
        w = load_gate_tiles(w_hh_ptr, unit, H, P, G, False, BLOCK_K)
        if FULL:
            v_full = load_gate_tiles(w_ch_ptr, unit, H, H, Q, False, BLOCK_K)
        if PROJECTED:
            w_r = load_second_tile(w_hr_ptr + side * P * H, unit, P, H, H, 1, BLOCK_K)
    else:
        w = load_stacked_tiles(w_hh_ptr, unit_from, H, P, G, False, True, CHUNKS, PARTS, BLOCK_U, BLOCK_K)
        if FULL:
            v_full = load_stacked_tiles(
                w_ch_ptr, unit_from, H, H, G, True, not OUTPUT_CURRENT, CHUNKS, PARTS, BLOCK_U, BLOCK_K
            )
        if CURRENT:
            w_o = load_second_tiles(w_ch_ptr + (Q - 1) * H * H, unit, H, H, H, 1, PEEPHOLE_CHUNKS, PARTS, BLOCK_K)
        if PROJECTED:
            w_r = load_second_tiles(w_hr_ptr + side * P * H, unit, P, H, H, 1, PROJECTION_CHUNKS, PARTS, BLOCK_K)

    gates_stride = B.to(tl.int64) * G * H
    hidden_stride = B.to(tl.int64) * D * padded_P
    unprojected_stride = B.to(tl.int64) * D * padded_H
    states_stride = B.to(tl.int64) * P
    cells_stride = B.to(tl.int64) * H
    gates_ptr += side * T * gates_stride
    hidden_ptr += side * padded_P
    if PROJECTED and not ALONE:
        unprojected_ptr += side * padded_H
    if CELLS == "all":
        cells_ptr += side * (T + 1) * cells_stride
    if CELLS == "one":
        cells_ptr += side * cells_stride
    h_0_ptr += side * states_stride
    c_0_ptr += side * cells_stride
    h_n_ptr += side * states_stride
    c_n_ptr += side * cells_stride
    counters_ptr += side * row_blocks * COUNTER_STRIDE
    codes_ptr, mask_ptr = rules.codes, rules.hidden
    if codes_ptr is not None:
        codes_ptr += side * T * cells_stride
    if mask_ptr is not None:
        mask_ptr += side * states_stride
    if output_ptr is not None:
        output_ptr += side * P
    if computed_ptr is not None:
        computed_ptr += side * T * cells_stride

    # The initial states are published like all others.
    block = tl.program_id(1)
    in_block = tl.arange(0, BLOCK_B)
    row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    for b in range(block, row_blocks, tl.num_programs(1)):
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
        tile_mask = row_mask[:, None] & (unit < H)[None, :]
        state = row[:, None] * H + unit[None, :]
        if CELLS != "none":
            c = tl.load(c_0_ptr + state, mask=tile_mask, other=0.0)
            place = cells_ptr + state
            if CELLS == "all":
                place = at_time(place, tl.where(reverse, length, 0), cells_stride, HAS_LENGTHS)
            if FULL:
                exchange_store(place, c, tile_mask, WAIT)
            else:
                tl.store(place, c, mask=tile_mask)
        if not ALONE:
            hidden_mask = row_mask[:, None] & (unit < P)[None, :]
            h = tl.load(h_0_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
            if rules.zoneout_h is not None and not ONE_BLOCK:  # h stands there between two steps
                tl.store(h_n_ptr + row[:, None] * P + unit[None, :], h, mask=hidden_mask)
            if mask_ptr is not None:
                h *= tl.load(mask_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
            place = hidden_ptr + T * hidden_stride + row[:, None] * D * padded_P + unit[None, :]
            exchange_store(place, h, hidden_mask, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)

    if not ONE_BLOCK:
        tl.debug_barrier()  # what a thread stored of a state another one of this program may load
    tile_mask = row_mask[:, None] & (unit < H)[None, :]
    hidden_mask = row_mask[:, None] & (unit < P)[None, :]
    state = row[:, None] * H + unit[None, :]
    c = tl.load(c_0_ptr + state, mask=tile_mask, other=0.0)
    if ALONE or rules.zoneout_h is not None:
        h = tl.load(h_0_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
    if mask_ptr is not None:
        hidden_factor = tl.load(mask_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = tl.cdiv(row_blocks - block, tl.num_programs(1))
        row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    elif HAS_LENGTHS:
        steps = tl.max(length, 0)

    # Gate inputs do not depend on other programs: they are loaded an iteration ahead, to hide the latency.
    a_next = load_gate_inputs(gates_ptr, 0, row, row_mask, length, unit, H, reverse, gates_stride, G, HAS_LENGTHS)
    codes_next = load_step_codes(codes_ptr, 0, row, row_mask, length, unit, H, reverse, cells_stride, HAS_LENGTHS)

    for iteration in range(steps * blocks):
        n, b = step_of(iteration, block, blocks)
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
            tile_mask = row_mask[:, None] & (unit < H)[None, :]
            hidden_mask = row_mask[:, None] & (unit < P)[None, :]
            state = row[:, None] * H + unit[None, :]
            if rules.zoneout_h is not None:
                h = tl.load(h_n_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
            if mask_ptr is not None:
                hidden_factor = tl.load(mask_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
        t = time_of_step(n, length, reverse)
        step_mask = row_mask & (n < length)
        step_tile_mask = tile_mask & step_mask[:, None]

        a, codes = a_next, codes_next
        after, next_block = step_of(iteration + 1, block, blocks)
        next_row, next_row_mask, next_length = rows_in_turn(
            in_block, next_block, row, row_mask, length, rows, B, lengths_ptr, T, ONE_BLOCK, HAS_LENGTHS
        )
        a_next = load_gate_inputs(
            gates_ptr, after, next_row, next_row_mask, next_length, unit, H, reverse, gates_stride, G, HAS_LENGTHS
        )
        codes_next = load_step_codes(
            codes_ptr, after, next_row, next_row_mask, next_length, unit, H, reverse, cells_stride, HAS_LENGTHS
        )
        if CELLS != "none":
            cells_before, cells_now = cell_places(
                cells_ptr, n, t, length, state, direction, cells_stride, CELLS, HAS_LENGTHS
            )
        if not ONE_BLOCK:
            c = tl.load(cells_before, mask=step_tile_mask, other=0.0)
        carry_mask = step_mask
        if HAS_RESETS:
            reset_ptr = resets_ptr + (t.to(tl.int64) * B + row)
            carry_mask = step_mask & (tl.load(reset_ptr, mask=step_mask, other=0) == 0)
            c = tl.where(carry_mask[:, None], c, 0.0)

        sums = ()
        if ALONE:
            left = tl.where(carry_mask[:, None], h, 0.0)
            if mask_ptr is not None:
                left *= hidden_factor
            for g in tl.static_range(G):
                acc = multiply_add(tl.zeros((BLOCK_B, BLOCK_U), ELEMENT), left, w[g])
                if FULL and g != G - 2 and not (OUTPUT_CURRENT and g == G - 1):
                    acc = multiply_add(acc, c, v_full[peephole_block(g, G)])
                sums = sums + (a[g] + acc,)  # noqa: RUF005
        else:
            acc = tl.zeros((PARTS, 4 * BLOCK_U, BLOCK_B), ELEMENT)
            before = tl.where(n == 0, T, tl.where(reverse, t + 1, t - 1))
            read_mask = carry_mask[:, None]
            h_before = at_time(hidden_ptr, before, hidden_stride, HAS_LENGTHS) + row[:, None] * D * padded_P
            counter_ptr = counters_ptr + b * COUNTER_STRIDE
            exchange_pause(pause, WAIT)
            max_polls = exchange_wait(counter_ptr, (n + 1) * tl.num_programs(0), max_polls, error_ptr, WAIT)
            for first in tl.static_range(0, CHUNKS, GROUP):
                pointers, masks = chunk_pointers(h_before, padded_P, read_mask, first, GROUP, PARTS, BLOCK_K)
                read, max_polls = exchange_load(pointers, masks, max_polls, error_ptr, WAIT)
                for m in tl.static_range(GROUP):
                    acc = multiply_add(acc, w[first + m], as_right(read[m], PARTS))
            if FULL:
                c_before = at_time(cells_ptr, t + direction, cells_stride, HAS_LENGTHS) + row[:, None] * H
                for first in tl.static_range(0, CHUNKS, GROUP):
                    pointers, masks = chunk_pointers(c_before, H, read_mask, first, GROUP, PARTS, BLOCK_K)
                    read, max_polls = exchange_load(pointers, masks, max_polls, error_ptr, WAIT)
                    for m in tl.static_range(GROUP):
                        acc = multiply_add(acc, v_full[first + m], as_right(read[m], PARTS))
            recurrent = sum_gates(acc, G, BLOCK_B, BLOCK_U, WARPS)
            for g in tl.static_range(G):
                sums = sums + (a[g] + recurrent[g],)  # noqa: RUF005

        c_previous = c
        code = codes[0].to(tl.int32) if DRAWN else 0
        i, f, g, c = next_computed_cell(sums, v, c_previous, code, rules, COUPLED, DIAGONAL, IDENTITY_INPUT)
        a_o = sums[G - 1]  # type: ignore[var-annotated]
        if CURRENT:
            if ALONE:
                a_o = multiply_add(a_o, c, v_full[Q - 1])
            else:
                peephole_counter = counter_ptr + D.to(tl.int64) * row_blocks * COUNTER_STRIDE
                if computed_ptr is not None:
                    c_now = at_time(computed_ptr, t, cells_stride, HAS_LENGTHS) + row[:, None] * H
                    exchange_store(c_now + unit[None, :], tl.where(step_mask[:, None], c, 0.0), tile_mask, WAIT)
                else:
                    slot = tl.where(n < length, t + 1 - direction, n + 1)
                    c_now = at_time(cells_ptr, slot, cells_stride, HAS_LENGTHS) + row[:, None] * H
                    exchange_store(cells_now, tl.where(step_mask[:, None], c, 0.0), tile_mask, WAIT)
                exchange_arrive(peephole_counter, WAIT)
                of_c, max_polls = exchanged_product(
                    c_now, H, row_mask[:, None], w_o, peephole_counter, n + 1, pause, max_polls,
                    error_ptr, WAIT, PEEPHOLE_CHUNKS, PEEPHOLE_PIECES, PARTS, WARPS, BLOCK_B, BLOCK_U, BLOCK_K,
                )  # fmt: skip
                a_o += of_c
        o = output_gate(a_o, v, c_previous, c, DIAGONAL, OUTPUT_CURRENT)
        h_now = o * activation(c, IDENTITY_OUTPUT)
        c = zone(c, c_previous, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)
        if PROJECTED:
            if ALONE:
                h_now = multiply_add(tl.zeros((BLOCK_B, BLOCK_U), ELEMENT), h_now, w_r)
            else:
                projection_counter = counter_ptr + 2 * D.to(tl.int64) * row_blocks * COUNTER_STRIDE
                all_units = at_time(unprojected_ptr, t, unprojected_stride, HAS_LENGTHS) + row[:, None] * D * padded_H
                exchange_store(all_units + unit[None, :], h_now, tile_mask, WAIT)
                exchange_arrive(projection_counter, WAIT)
                if unit_from < P:
                    h_now, max_polls = exchanged_product(
                        all_units, padded_H, row_mask[:, None], w_r, projection_counter, n + 1, pause, max_polls,
                        error_ptr, WAIT, PROJECTION_CHUNKS, PROJECTION_PIECES, PARTS, WARPS, BLOCK_B, BLOCK_U, BLOCK_K,
                    )  # fmt: skip
            h_now = clip(h_now, rules.proj_clip)
        if rules.zoneout_h is not None:
            h_previous = tl.where(carry_mask[:, None], h, 0.0)
            h_now = zone(h_now, h_previous, code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)

        # What others wait for goes first.
        hidden_now = at_time(hidden_ptr, t, hidden_stride, HAS_LENGTHS) + row[:, None] * D * padded_P + unit[None, :]
        if ALONE:
            tl.store(hidden_now, tl.where(step_mask[:, None], h_now, 0.0), mask=hidden_mask)
        else:
            h_read = h_now if mask_ptr is None else h_now * hidden_factor
            exchange_store(hidden_now, tl.where(step_mask[:, None], h_read, 0.0), hidden_mask, WAIT)
            if FULL and (not CURRENT or computed_ptr is not None):
                exchange_store(cells_now, tl.where(step_mask[:, None], c, 0.0), tile_mask, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)
        if ALONE or rules.zoneout_h is not None:
            h = h_now
        if rules.zoneout_h is not None and not ONE_BLOCK:
            place = h_n_ptr + row[:, None] * P + unit[None, :]
            tl.store(place, h_now, mask=hidden_mask & step_mask[:, None])
        if output_ptr is not None:
            place = at_time(output_ptr, t, states_stride * D, HAS_LENGTHS) + row[:, None] * D * P + unit[None, :]
            tl.store(place, tl.where(step_mask[:, None], h_now, 0.0), mask=hidden_mask)
        if CELLS != "none" and (ALONE or not FULL):
            tl.store(cells_now, tl.where(step_mask[:, None], c, 0.0), mask=tile_mask)
        store_step(
            gates_ptr, h_n_ptr, c_n_ptr, i, f, g, o, h_now, c, n, t, length, row, unit, state,
            row[:, None] * P + unit[None, :], H, gates_stride, step_tile_mask, hidden_mask & step_mask[:, None], G,
            COUPLED, SAVE_GATES, HAS_LENGTHS,
        )  # fmt: skip

    if HAS_LENGTHS and ONE_BLOCK:
        for n in range(steps, T):
            if output_ptr is not None:
                place = output_ptr + states_stride * D * n + row[:, None] * D * P + unit[None, :]
            else:
                place = hidden_ptr + hidden_stride * n + row[:, None] * D * padded_P + unit[None, :]
            tl.store(place, 0.0, mask=hidden_mask)
            if CELLS == "all":
                tl.store(cells_ptr + cells_stride * (n + 1) + state, 0.0, mask=tile_mask)
