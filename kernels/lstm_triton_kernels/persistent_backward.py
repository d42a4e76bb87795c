"""The backward pass of a layer in one launch, as `persistent_forward`, with the weights transposed.

Shapes, programs and masks as there. In each step, from the last to the first, a program loads what the forward pass
saved of its units, waits for the gradients of all gates of the step after, and multiplies them with the resident
columns of W_hh that belong to its units, which gives their dh (with a full peephole, the columns of V: their dc). Then
it publishes the gradients of its own gates. They must be stored anyway: the gradients of weights, biases and inputs are
large GEMMs over them, after the loop.

The gradient of h_0 (and what a full peephole adds to that of c_0) would take one more iteration for a single product:
the caller computes it from the gate gradients of the first step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lstm_triton_kernels.equations import load_peephole, output_derivatives, previous_cell_gradient, store_gates
from lstm_triton_kernels.resident import (
    as_right,
    chunk_pointers,
    divided_by,
    exchanged_product,
    load_gate_tiles,
    load_second_tile,
    load_second_tiles,
    load_transposed_tiles,
    multiply_add,
    peephole_block,
    sum_units,
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
from lstm_triton_kernels.sync import (
    COUNTER_STRIDE,
    exchange_arrive,
    exchange_load,
    exchange_pause,
    exchange_store,
    exchange_wait,
)
from lstm_triton_kernels.time_loop import load_last, load_saved, load_step_codes, rows_in_turn, step_of


@triton.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "max_polls", "pause"])
def persistent_backward_kernel(
    d_gates_ptr, d_hidden_ptr, dc_ptr, d_h_0_ptr, gates_ptr, cells_ptr, grad_output_ptr, grad_cells_ptr, grad_h_n_ptr,
    grad_c_n_ptr, w_hh_ptr, w_hr_ptr, w_ch_ptr, lengths_ptr, resets_ptr, counters_ptr, error_ptr, rules,
    T, B, H, P, rows, row_blocks, max_polls, pause,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, FULL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr,
    HAS_GRAD_OUTPUT: tl.constexpr, HAS_GRAD_CELLS: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr, HAS_GRAD_C_N: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    PROJECTED: tl.constexpr, ALONE: tl.constexpr, ONE_BLOCK: tl.constexpr, WAIT: tl.constexpr, CHUNKS: tl.constexpr,
    GROUP: tl.constexpr, PEEPHOLE_CHUNKS: tl.constexpr, PEEPHOLE_PIECES: tl.constexpr, PROJECTION_CHUNKS: tl.constexpr,
    PROJECTION_PIECES: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, H_DIVISOR: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of all pre-activations, d_gates (D, T, B, G·H), and of c_0, without a full peephole's part.

    - dc: (D, B, H), the gradient of c_{t-1} when step t is done; zero before, unless ONE_BLOCK
    - d_h_0: (D, B, P), likewise that of h_{t-1} which zoneout passes on; None without zoneout of h
    - gates: (D, T, B, G·H), cells: (D, T + 1, B, H), as saved
    - d_hidden: (D, T, B, P) out, the gradient of every projected h_t; None unless PROJECTED
    - grad_output (T, B, D·P), grad_cells (T, B, D·H); grad_h_n (D, B, P), grad_c_n (D, B, H)
    - w_hh, w_hr, w_ch, lengths, resets, counters, error, rules, and the constants of the product: as in the forward
      pass
    """
    G: tl.constexpr = 3 if COUPLED else 4
    Q: tl.constexpr = 2 if COUPLED else 3
    ELEMENT: tl.constexpr = gates_ptr.dtype.element_ty
    H = divided_by(H, H_DIVISOR)
    if not PROJECTED:
        P = H
    CURRENT: tl.constexpr = FULL and OUTPUT_CURRENT
    DRAWN: tl.constexpr = rules.codes is not None
    direction = tl.program_id(2)
    reverse = direction == 1
    D = tl.num_programs(2)
    side = direction.to(tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    w_hh_ptr += side * G * H * P
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        w_ch_ptr += side * Q * H * H
    if ALONE:
        w = load_gate_tiles(w_hh_ptr, unit, H, P, G, True, BLOCK_K)
        if FULL:
            v_full = load_gate_tiles(w_ch_ptr, unit, H, H, Q, True, BLOCK_K)
        if PROJECTED:
            w_r = load_second_tile(w_hr_ptr + side * P * H, unit, H, P, 1, H, BLOCK_K)
    else:
        w = load_transposed_tiles(w_hh_ptr, unit, H, P, G, False, True, CHUNKS, PARTS, BLOCK_U, BLOCK_K)
        if FULL:
            v_full = load_transposed_tiles(
                w_ch_ptr, unit, H, H, G, True, not OUTPUT_CURRENT, CHUNKS, PARTS, BLOCK_U, BLOCK_K
            )
        if CURRENT:
            w_o = load_second_tiles(w_ch_ptr + (Q - 1) * H * H, unit, H, H, 1, H, PEEPHOLE_CHUNKS, PARTS, BLOCK_K)
        if PROJECTED:
            w_r = load_second_tiles(w_hr_ptr + side * P * H, unit, H, P, 1, H, PROJECTION_CHUNKS, PARTS, BLOCK_K)

    gates_stride = B.to(tl.int64) * G * H
    cells_stride = B.to(tl.int64) * H
    states_stride = B.to(tl.int64) * P
    d_gates_ptr += side * T * gates_stride
    gates_ptr += side * T * gates_stride
    before_ptr = cells_ptr + (side * (T + 1) + side) * cells_stride  # c_{t-1} stands at index t of it
    current_ptr = cells_ptr + (side * (T + 1) + 1 - side) * cells_stride  # and c_t at index t of this
    if HAS_GRAD_OUTPUT:
        grad_output_ptr += side * P
    if HAS_GRAD_CELLS:
        grad_cells_ptr += side * H
    if HAS_GRAD_H_N:
        grad_h_n_ptr += side * states_stride
    if HAS_GRAD_C_N:
        grad_c_n_ptr += side * cells_stride
    dc_ptr += side * cells_stride
    if PROJECTED:
        d_hidden_ptr += side * T * states_stride
    counters_ptr += side * row_blocks * COUNTER_STRIDE
    codes_ptr, mask_ptr, clipped_ptr = rules.codes, rules.hidden, rules.clipped
    if codes_ptr is not None:
        codes_ptr += side * T * cells_stride
    if mask_ptr is not None:
        mask_ptr += side * states_stride
    if clipped_ptr is not None:
        clipped_ptr += side * T * states_stride
    if d_h_0_ptr is not None:
        d_h_0_ptr += side * states_stride

    block = tl.program_id(1)
    in_block = tl.arange(0, BLOCK_B)
    row, row_mask, length = rows_of_block(in_block, block, rows, B, lengths_ptr, T, HAS_LENGTHS)
    tile_mask = row_mask[:, None] & (unit < H)[None, :]
    hidden_mask = row_mask[:, None] & (unit < P)[None, :]
    state = row[:, None] * H + unit[None, :]
    dc = tl.zeros((BLOCK_B, BLOCK_U), ELEMENT)
    if d_h_0_ptr is not None:
        kept = tl.zeros((BLOCK_B, BLOCK_U), ELEMENT)
    if mask_ptr is not None:
        hidden_factor = tl.load(mask_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
    if ALONE:
        d_i = tl.zeros((BLOCK_B, BLOCK_U), ELEMENT)
        d_f, d_g, d_o = d_i, d_i, d_i
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = tl.cdiv(row_blocks - block, tl.num_programs(1))
    elif HAS_LENGTHS:
        steps = tl.max(length, 0)
        for n in range(steps, T):
            place = d_gates_ptr + gates_stride * n + row[:, None] * G * H + unit[None, :]
            for g in tl.static_range(G):
                tl.store(place + g * H, 0.0, mask=tile_mask)
            if PROJECTED:
                tl.store(d_hidden_ptr + states_stride * n + row[:, None] * P + unit[None, :], 0.0, mask=hidden_mask)

    # What the forward pass saved does not depend on other programs: it is loaded an iteration ahead.
    saved_next, c_next, grads_next = load_saved(
        gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1, row, row_mask, length, unit, B,
        H, P, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
    )  # fmt: skip
    codes_next = load_step_codes(
        codes_ptr, steps - 1, row, row_mask, length, unit, H, reverse, cells_stride, HAS_LENGTHS
    )
    clipped_next = load_step_codes(
        clipped_ptr, steps - 1, row, row_mask, length, unit, P, reverse, states_stride, HAS_LENGTHS
    )

    for iteration in range(steps * blocks):
        done, b = step_of(iteration, block, blocks)
        n = steps - 1 - done
        if not ONE_BLOCK:
            row, row_mask, length = rows_of_block(in_block, b, rows, B, lengths_ptr, T, HAS_LENGTHS)
            tile_mask = row_mask[:, None] & (unit < H)[None, :]
            hidden_mask = row_mask[:, None] & (unit < P)[None, :]
            state = row[:, None] * H + unit[None, :]
            dc = tl.load(dc_ptr + state, mask=tile_mask, other=0.0)
            if d_h_0_ptr is not None:
                kept = tl.load(d_h_0_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
            if mask_ptr is not None:
                hidden_factor = tl.load(mask_ptr + row[:, None] * P + unit[None, :], mask=hidden_mask, other=0.0)
        t = time_of_step(n, length, reverse)
        step_mask = row_mask & (n < length)

        saved, c_read, grads, codes, clipped = saved_next, c_next, grads_next, codes_next, clipped_next
        done_next, next_block = step_of(iteration + 1, block, blocks)
        next_row, next_row_mask, next_length = rows_in_turn(
            in_block, next_block, row, row_mask, length, rows, B, lengths_ptr, T, ONE_BLOCK, HAS_LENGTHS
        )
        saved_next, c_next, grads_next = load_saved(
            gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1 - done_next, next_row,
            next_row_mask, next_length, unit, B, H, P, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
        )  # fmt: skip
        n_next = steps - 1 - done_next
        codes_next = load_step_codes(
            codes_ptr, n_next, next_row, next_row_mask, next_length, unit, H, reverse, cells_stride, HAS_LENGTHS
        )
        clipped_next = load_step_codes(
            clipped_ptr, n_next, next_row, next_row_mask, next_length, unit, P, reverse, states_stride, HAS_LENGTHS
        )

        last = step_mask[:, None] & row_values(n == length - 1, HAS_LENGTHS)
        if HAS_GRAD_H_N:
            place = grad_h_n_ptr + row[:, None] * P + unit[None, :]
            d_h_n = load_last(place, hidden_mask & last)
        if HAS_GRAD_C_N:
            d_c_n = load_last(grad_c_n_ptr + state, tile_mask & last)
        # Step n + 1 of a row, which read the state that step n left: not where there is none, or where it was reset.
        after = time_of_step(n + 1, length, reverse)
        carry_mask = row_mask & (n + 1 < length)
        if HAS_RESETS:
            reset = tl.load(resets_ptr + (t.to(tl.int64) * B + row), mask=step_mask, other=0) != 0
            carry_mask = carry_mask & (
                tl.load(resets_ptr + (after.to(tl.int64) * B + row), mask=carry_mask, other=0) == 0
            )

        if ALONE:
            dh = tl.zeros((BLOCK_B, BLOCK_U), ELEMENT)
            dh_odd = dh  # two chains of products: in a single one each product would wait for the one before
            for g in tl.static_range(G):
                d = d_o if g == G - 1 else d_g if g == G - 2 else d_f if g == G - 3 else d_i
                d = tl.where(carry_mask[:, None], d, 0.0)
                if g % 2 == 0:
                    dh = multiply_add(dh, d, w[g])
                else:
                    dh_odd = multiply_add(dh_odd, d, w[g])
                if FULL and g != G - 2 and not (OUTPUT_CURRENT and g == G - 1):
                    dc = multiply_add(dc, d, v_full[peephole_block(g, G)])
            dh += dh_odd
        else:
            acc = tl.zeros((PARTS, BLOCK_U, BLOCK_B), ELEMENT)
            acc_c = acc
            read_mask = carry_mask[:, None]
            d_after = at_time(d_gates_ptr, after, gates_stride, HAS_LENGTHS) + row[:, None] * G * H
            counter_ptr = counters_ptr + b * COUNTER_STRIDE
            exchange_pause(pause, WAIT)
            max_polls = exchange_wait(counter_ptr, done * tl.num_programs(0), max_polls, error_ptr, WAIT)
            for first in tl.static_range(0, CHUNKS, GROUP):
                pointers, masks = chunk_pointers(d_after, G * H, read_mask, first, GROUP, PARTS, BLOCK_K)
                read, max_polls = exchange_load(pointers, masks, max_polls, error_ptr, WAIT)
                for m in tl.static_range(GROUP):
                    right = as_right(read[m], PARTS)
                    acc = multiply_add(acc, w[first + m], right)
                    if FULL:
                        acc_c = multiply_add(acc_c, v_full[first + m], right)
            dh = sum_units(acc, WARPS)
            if FULL:
                dc += sum_units(acc_c, WARPS)

        if mask_ptr is not None:
            dh *= hidden_factor
        if HAS_GRAD_OUTPUT:
            dh += grads[0]
        if HAS_GRAD_CELLS:
            dc += grads[len(grads) - 1]
        if HAS_GRAD_H_N:
            dh += d_h_n
        if HAS_GRAD_C_N:
            dc += d_c_n
        f, g, o = saved[G - 3], saved[G - 2], saved[G - 1]
        i = 1.0 - f if COUPLED else saved[0]
        c_previous, c = c_read[0], c_read[1]
        if HAS_RESETS:
            c_previous = tl.where(reset[:, None], 0.0, c_previous)
        code = codes[0].to(tl.int32) if DRAWN else 0
        c = computed_cell(i, f, g, c_previous, c, code, rules)
        dc, kept_c = zone_gradients(dc, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)
        if d_h_0_ptr is not None:
            dh, kept = zone_gradients(dh + kept, code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)
            if HAS_RESETS:
                kept = tl.where(reset[:, None], 0.0, kept)
        if clipped_ptr is not None:
            dh = tl.where(clipped[0] != 0, 0.0, dh)
        d_now = at_time(d_gates_ptr, t, gates_stride, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
        if PROJECTED:
            d_hidden = at_time(d_hidden_ptr, t, states_stride, HAS_LENGTHS) + row[:, None] * P
            if ALONE:
                tl.store(d_hidden + unit[None, :], dh, mask=hidden_mask)
                dh = multiply_add(tl.zeros((BLOCK_B, BLOCK_U), ELEMENT), dh, w_r)
            else:
                projection_counter = counter_ptr + 2 * D.to(tl.int64) * row_blocks * COUNTER_STRIDE
                exchange_store(d_hidden + unit[None, :], dh, hidden_mask, WAIT)
                exchange_arrive(projection_counter, WAIT)
                dh, max_polls = exchanged_product(
                    d_hidden, P, row_mask[:, None], w_r, projection_counter, done + 1, pause, max_polls,
                    error_ptr, WAIT, PROJECTION_CHUNKS, PROJECTION_PIECES, PARTS, WARPS, BLOCK_B, BLOCK_U, BLOCK_K,
                )  # fmt: skip
        by_o, by_c = output_derivatives(o, c, IDENTITY_OUTPUT)
        d_o = dh * by_o
        dc += dh * by_c
        if CURRENT:
            if ALONE:
                dc = multiply_add(dc, d_o, v_full[Q - 1])
            else:
                peephole_counter = counter_ptr + D.to(tl.int64) * row_blocks * COUNTER_STRIDE
                exchange_store(d_now + (G - 1) * H, d_o, tile_mask, WAIT)
                exchange_arrive(peephole_counter, WAIT)
                every_d_o = at_time(d_gates_ptr, t, gates_stride, HAS_LENGTHS) + row[:, None] * G * H + (G - 1) * H
                of_o, max_polls = exchanged_product(
                    every_d_o, H, row_mask[:, None], w_o, peephole_counter, done + 1, pause, max_polls,
                    error_ptr, WAIT, PEEPHOLE_CHUNKS, PEEPHOLE_PIECES, PARTS, WARPS, BLOCK_B, BLOCK_U, BLOCK_K,
                )  # fmt: skip
                dc += of_o
        if DIAGONAL and OUTPUT_CURRENT:
            dc += v[Q - 1] * d_o
        dc = clip_gradient(dc, c, rules.cell_clip)
        by_i, by_f, by_g = computed_cell_derivatives(i, f, g, c_previous, code, rules, COUPLED, IDENTITY_INPUT)
        d_i, d_f, d_g = dc * by_i, dc * by_f, dc * by_g
        dc = previous_cell_gradient(dc, f, d_i, d_f, d_o, v, COUPLED, DIAGONAL, OUTPUT_CURRENT)
        if rules.zoneout_c is not None:
            dc += kept_c
        if HAS_RESETS:
            dc = tl.where(reset[:, None], 0.0, dc)

        # A row that does not have this step has zero gradients and zero dc: its loads were masked.
        if ALONE:
            store_gates(d_now, d_i, d_f, d_g, H, tile_mask, COUPLED)
            tl.store(d_now + (G - 1) * H, d_o, mask=tile_mask)
        else:
            if not COUPLED:
                exchange_store(d_now, d_i, tile_mask, WAIT)
            exchange_store(d_now + (G - 3) * H, d_f, tile_mask, WAIT)
            exchange_store(d_now + (G - 2) * H, d_g, tile_mask, WAIT)
            if not CURRENT:
                exchange_store(d_now + (G - 1) * H, d_o, tile_mask, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)
        if not ONE_BLOCK:
            tl.store(dc_ptr + state, dc, mask=tile_mask)
            if d_h_0_ptr is not None:
                tl.store(d_h_0_ptr + row[:, None] * P + unit[None, :], kept, mask=hidden_mask)
    if ONE_BLOCK:
        tl.store(dc_ptr + state, dc, mask=tile_mask)
        if d_h_0_ptr is not None:
            tl.store(d_h_0_ptr + row[:, None] * P + unit[None, :], kept, mask=hidden_mask)
