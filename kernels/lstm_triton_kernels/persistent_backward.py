"""All time steps of a layer, backward, in one launch: the same shape as `persistent_forward`, the weights transposed.

Shapes and programs as there. A step of a program, from the last to the first: load what the forward pass saved of its
units; wait for the gradients of all gates of the step after; multiply them with the resident columns of W_hh that
belong to its units, which gives their dh (with a full peephole, the columns of V: their dc); publish the gradients of
its own gates. They must be stored anyway: all gradients of weights, biases and inputs are large GEMMs over them later.

The gradient of h_0 (and what a full peephole adds to that of c_0) would be one more turn for one product: the caller
makes it from the gate gradients of the first step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lstm_triton_kernels.equations import (
    cell_gradients,
    load_blocks,
    load_peephole,
    output_gradients,
    previous_cell_gradient,
    store_gates,
)
from lstm_triton_kernels.resident import (
    add_to_one,
    left_operands,
    left_rows,
    load_tiles,
    peephole_block,
    sum_parts,
    zero_accumulators,
)
from lstm_triton_kernels.rows import at_time, left_at_time, row_values, rows_of_block, time_of_step
from lstm_triton_kernels.sync import COUNTER_STRIDE, exchange_arrive, exchange_load, exchange_store, exchange_wait


@triton.jit
def load_saved(
    gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, n, row, lives, length, unit, B, H, reverse,
    G: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr, HAS_GRAD_CELLS: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Of step n: the activated gates, (c_{t-1}, c_t), and the gradients of h_t and c_t that there are; 0 if dead."""
    D = tl.num_programs(2)
    t = time_of_step(n, length, reverse)
    live = (lives & (n < length) & (n >= 0))[:, None] & (unit < H)[None, :]
    size = B.to(tl.int64) * H
    tile = row[:, None] * H + unit[None, :]
    saved = load_blocks(at_time(gates_ptr, t, G * size, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :], H, live, G)
    c_previous = tl.load(at_time(before_ptr, t, size, HAS_LENGTHS) + tile, mask=live, other=0.0)
    c = tl.load(at_time(current_ptr, t, size, HAS_LENGTHS) + tile, mask=live, other=0.0)
    grads = ()
    sequence = row[:, None] * D * H + unit[None, :]
    if HAS_GRAD_OUTPUT:
        place = at_time(grad_output_ptr, t, D * size, HAS_LENGTHS) + sequence
        grads = grads + (tl.load(place, mask=live, other=0.0),)  # noqa: RUF005
    if HAS_GRAD_CELLS:
        place = at_time(grad_cells_ptr, t, D * size, HAS_LENGTHS) + sequence
        grads = grads + (tl.load(place, mask=live, other=0.0),)  # noqa: RUF005
    return saved, (c_previous, c), grads


@triton.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "patience"])
def persistent_backward_kernel(
    d_gates_ptr, dc_ptr, gates_ptr, cells_ptr, grad_output_ptr, grad_cells_ptr, grad_h_n_ptr, grad_c_n_ptr,
    w_hh_ptr, w_ch_ptr, lengths_ptr, resets_ptr, counters_ptr, error_ptr,
    T, B, H, rows, row_blocks, patience,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, FULL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    HAS_GRAD_OUTPUT: tl.constexpr, HAS_GRAD_CELLS: tl.constexpr,
    HAS_GRAD_H_N: tl.constexpr, HAS_GRAD_C_N: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    ALONE: tl.constexpr, ONE_BLOCK: tl.constexpr, WAIT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of all pre-activations, d_gates (D, T, B, G·H), and of c_0 (without a full peephole's part).

    - dc: (D, B, H) accumulator type, the gradient of c_{t-1} when step t is done; zero before, unless ONE_BLOCK
    - gates: (D, T, B, G·H), cells: (D, T + 1, B, H), as saved
    - grad_output, grad_cells: (T, B, D·H); grad_h_n, grad_c_n: (D, B, H)
    - w_hh, w_ch, lengths, resets, counters, error: as in the forward pass
    """
    G: tl.constexpr = 3 if COUPLED else 4
    Q: tl.constexpr = 2 if COUPLED else 3
    direction = tl.program_id(2)
    reverse = direction == 1
    side = direction.to(tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    w = load_tiles(w_hh_ptr + side * G * H * H, unit, H, G, CHUNKS, True, SPLIT, BLOCK_K, DOT, PRECISION)
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        v_full = load_tiles(w_ch_ptr + side * Q * H * H, unit, H, Q, CHUNKS, True, SPLIT, BLOCK_K, DOT, PRECISION)

    gates_size = B.to(tl.int64) * G * H
    cells_size = B.to(tl.int64) * H
    d_gates_ptr += side * T * gates_size
    gates_ptr += side * T * gates_size
    before_ptr = cells_ptr + (side * (T + 1) + side) * cells_size  # c_{t-1} stands at index t of it
    current_ptr = cells_ptr + (side * (T + 1) + 1 - side) * cells_size  # and c_t at index t of this
    if HAS_GRAD_OUTPUT:
        grad_output_ptr += side * H
    if HAS_GRAD_CELLS:
        grad_cells_ptr += side * H
    if HAS_GRAD_H_N:
        grad_h_n_ptr += side * cells_size
    if HAS_GRAD_C_N:
        grad_c_n_ptr += side * cells_size
    dc_ptr += side * cells_size
    counters_ptr += side * row_blocks * COUNTER_STRIDE

    block = tl.program_id(1)
    row, lives, length = rows_of_block(block, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
    inside = lives[:, None] & (unit < H)[None, :]
    state = row[:, None] * H + unit[None, :]
    dc = tl.zeros((BLOCK_B, BLOCK_U), ACC)
    if ALONE:
        d_i = tl.zeros((BLOCK_B, BLOCK_U), ACC)
        d_f, d_g, d_o = d_i, d_i, d_i
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = tl.cdiv(row_blocks - block, tl.num_programs(1))
    elif HAS_LENGTHS:
        steps = tl.max(length, 0)
        for n in range(steps, T):
            place = d_gates_ptr + gates_size * n + row[:, None] * G * H + unit[None, :]
            for g in tl.static_range(G):
                tl.store(place + g * H, 0.0, mask=inside)

    # What the forward pass saved is loaded a turn ahead: it waits for nobody, and device memory is far away.
    saved_next, c_next, grads_next = load_saved(
        gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1, row, lives, length, unit, B, H,
        reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
    )  # fmt: skip

    for turn in range(steps * blocks):
        done = turn // blocks
        n = steps - 1 - done
        b = block + (turn - done * blocks) * tl.num_programs(1)
        if not ONE_BLOCK:
            row, lives, length = rows_of_block(b, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
            inside = lives[:, None] & (unit < H)[None, :]
            state = row[:, None] * H + unit[None, :]
            dc = tl.load(dc_ptr + state, mask=inside, other=0.0)
        t = time_of_step(n, length, reverse)
        alive = lives & (n < length)
        live = inside & alive[:, None]

        saved, c_read, grads = saved_next, c_next, grads_next
        done_next = (turn + 1) // blocks
        next_row, next_lives, next_length = row, lives, length
        if not ONE_BLOCK:
            next_block = block + (turn + 1 - done_next * blocks) * tl.num_programs(1)
            next_row, next_lives, next_length = rows_of_block(next_block, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
        saved_next, c_next, grads_next = load_saved(
            gates_ptr, before_ptr, current_ptr, grad_output_ptr, grad_cells_ptr, steps - 1 - done_next, next_row,
            next_lives, next_length, unit, B, H, reverse, G, HAS_GRAD_OUTPUT, HAS_GRAD_CELLS, HAS_LENGTHS,
        )  # fmt: skip

        last = live & row_values(n == length - 1, HAS_LENGTHS)
        if HAS_GRAD_H_N:
            d_h_n = tl.load(grad_h_n_ptr + state, mask=last, other=0.0)
        if HAS_GRAD_C_N:
            d_c_n = tl.load(grad_c_n_ptr + state, mask=last, other=0.0)
        # Step n + 1 of a row, which read the state that step n left: not where there is none, or where it was reset.
        after = time_of_step(n + 1, length, reverse)
        reads = lives & (n + 1 < length)
        if HAS_RESETS:
            reset = tl.load(resets_ptr + (t.to(tl.int64) * B + row), mask=alive, other=0) != 0
            reads = reads & (tl.load(resets_ptr + (after.to(tl.int64) * B + row), mask=reads, other=0) == 0)

        # Two chains of products at once: of one, each would wait for the one before.
        acc = zero_accumulators(2, SPLIT, BLOCK_B, BLOCK_U, ACC)
        if FULL:
            acc_c = zero_accumulators(1, SPLIT, BLOCK_B, BLOCK_U, ACC)
        if ALONE:
            for g in tl.static_range(G):
                d = d_o if g == G - 1 else d_g if g == G - 2 else d_f if g == G - 3 else d_i
                d = tl.where(reads[:, None], d, 0.0).to(d_gates_ptr.dtype.element_ty).to(DOT)
                acc = add_to_one(acc, d, w[g], g % 2, PRECISION)
                if FULL and g != G - 2:
                    acc_c = add_to_one(acc_c, d, v_full[peephole_block(g, G)], 0, PRECISION)
        else:
            reading = left_rows(reads, SPLIT)
            d_after = left_at_time(d_gates_ptr, after, gates_size, SPLIT, HAS_LENGTHS) + left_rows(row, SPLIT) * G * H
            counter_ptr = counters_ptr + b * COUNTER_STRIDE
            patience = exchange_wait(counter_ptr, done * tl.num_programs(0), patience, error_ptr, WAIT)
            for g in tl.static_range(G):
                for first in tl.static_range(0, CHUNKS, GROUP):
                    pointers, masks = left_operands(d_after + g * H, H, reading, first, GROUP, SPLIT, BLOCK_K)
                    left, patience = exchange_load(pointers, masks, patience, error_ptr, WAIT)
                    for m in tl.static_range(GROUP):
                        d = left[m].to(DOT)
                        acc = add_to_one(acc, d, w[g * CHUNKS + first + m], (g * CHUNKS + first + m) % 2, PRECISION)
                        if FULL and g != G - 2:
                            v_tile = v_full[peephole_block(g, G) * CHUNKS + first + m]
                            acc_c = add_to_one(acc_c, d, v_tile, 0, PRECISION)
        dh = sum_parts(acc[0] + acc[1], SPLIT)
        if FULL:
            dc += sum_parts(acc_c[0], SPLIT)

        if HAS_GRAD_OUTPUT:
            dh += grads[0].to(ACC)
        if HAS_GRAD_CELLS:
            dc += grads[len(grads) - 1].to(ACC)
        if HAS_GRAD_H_N:
            dh += d_h_n.to(ACC)
        if HAS_GRAD_C_N:
            dc += d_c_n.to(ACC)
        f, g, o = saved[G - 3].to(ACC), saved[G - 2].to(ACC), saved[G - 1].to(ACC)
        i = 1.0 - f if COUPLED else saved[0].to(ACC)
        c_previous, c = c_read[0], c_read[1]
        if HAS_RESETS:
            c_previous = tl.where(reset[:, None], 0.0, c_previous)
        d_o, dc_by_hidden = output_gradients(dh, o, c)
        dc += dc_by_hidden
        if DIAGONAL and OUTPUT_CURRENT:
            dc += v[Q - 1] * d_o
        d_i, d_f, d_g = cell_gradients(dc, i, f, g, c_previous, COUPLED)
        dc = previous_cell_gradient(dc, f, d_i, d_f, d_o, v, COUPLED, DIAGONAL, OUTPUT_CURRENT)
        if HAS_RESETS:
            dc = tl.where(reset[:, None], 0.0, dc)

        # A dead step has zero gradients, and its row zero dc: nothing of it was loaded.
        d_now = at_time(d_gates_ptr, t, gates_size, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
        if ALONE:
            store_gates(d_now, d_i, d_f, d_g, H, inside, COUPLED)
            tl.store(d_now + (G - 1) * H, d_o.to(d_gates_ptr.dtype.element_ty), mask=inside)
        else:
            if not COUPLED:
                exchange_store(d_now, d_i, inside, WAIT)
            exchange_store(d_now + (G - 3) * H, d_f, inside, WAIT)
            exchange_store(d_now + (G - 2) * H, d_g, inside, WAIT)
            exchange_store(d_now + (G - 1) * H, d_o, inside, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)
        if not ONE_BLOCK:
            tl.store(dc_ptr + state, dc, mask=inside)
    if ONE_BLOCK:
        tl.store(dc_ptr + state, dc, mask=inside)
