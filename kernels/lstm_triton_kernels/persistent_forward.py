"""All time steps of a layer, forward, in one launch: the recurrent weights never leave the chip.

Shapes: T time steps, B batch rows, H hidden units, D directions, G gate blocks in the order i, f, g, o (coupled: f, g,
o), Q peephole blocks i, f, o (coupled: f, o). Program (part of the units, first row block, direction) owns BLOCK_U
units with all their gates, and the row blocks from its first one on, as many apart as there are programs on that axis.

A step of a program: load the gate inputs of its units; wait for h_{t-1} of all units; multiply it with the resident
weights; update c, which is the program's own; publish h_t of its units. In the buffer of hidden states every h_t has
its own place, and h_0 the place behind the last, so that the first step waits and reads as all others do. A full
peephole needs c_{t-1} of all units, too: c is published beside h. Where one program holds all units (ALONE) there is
nothing to wait for, and h stays in its registers.

With `lengths`, row b ends after lengths[b] steps (the second direction starts there): it leaves its state in h_n and
c_n, and what a dead step would have written is zero. With `resets` (T, B), the state is zero before such a step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from lstm_triton_kernels.activations import tanh
from lstm_triton_kernels.equations import load_blocks, load_peephole, next_cell, output_gate, store_gates
from lstm_triton_kernels.resident import (
    add_to_all,
    add_to_one,
    left_operands,
    left_rows,
    load_tiles,
    peephole_gate,
    sum_parts,
    zero_accumulators,
)
from lstm_triton_kernels.rows import at_time, left_at_time, row_values, rows_of_block, time_of_step
from lstm_triton_kernels.sync import COUNTER_STRIDE, exchange_arrive, exchange_load, exchange_store, exchange_wait


@triton.jit(do_not_specialize=["T", "B", "rows", "row_blocks", "patience"])
def persistent_forward_kernel(
    gates_ptr, hidden_ptr, cells_ptr, h_n_ptr, c_n_ptr, h_0_ptr, c_0_ptr, w_hh_ptr, w_ch_ptr, lengths_ptr, resets_ptr,
    counters_ptr, error_ptr,
    T, B, H, rows, row_blocks, patience,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, FULL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    SAVE_GATES: tl.constexpr, CELLS: tl.constexpr, HAS_LENGTHS: tl.constexpr, HAS_RESETS: tl.constexpr,
    ALONE: tl.constexpr, ONE_BLOCK: tl.constexpr, WAIT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, CHUNKS: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gates (D, T, B, G·H), the input side of all gates, becomes (SAVE_GATES) the activated gates.

    - hidden: (T + 1, B, D·H) out; slot T is the place of h_0
    - cells: (D, T + 1, B, H) out, slot t the state before step t, in the second direction after it (CELLS == "all"); or
      (D, 1, B, H), the state in between (CELLS == "one"); or None (CELLS == "none": c stays in registers)
    - h_n, c_n: (D, B, H) out; h_0, c_0: (D, B, H); w_hh: (D, G·H, H); w_ch: (D, Q·H) diagonal, (D, Q·H, H) full
    - lengths: (B,) int32 or int64; resets: (T, B) uint8; counters: one a direction and row block, zero; error: int32

    The output gate of a full peephole reads c_{t-1}. ONE_BLOCK: no program has a second row block.
    GROUP chunks, a divisor of CHUNKS, are read at once.
    """
    G: tl.constexpr = 3 if COUPLED else 4
    Q: tl.constexpr = 2 if COUPLED else 3
    direction = tl.program_id(2)
    reverse = direction == 1
    D = tl.num_programs(2)
    side = direction.to(tl.int64)
    unit = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    w = load_tiles(w_hh_ptr + side * G * H * H, unit, H, G, CHUNKS, False, SPLIT, BLOCK_K, DOT, PRECISION)
    v = load_peephole(w_ch_ptr + side * Q * H if DIAGONAL else w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    if FULL:
        v_full = load_tiles(w_ch_ptr + side * Q * H * H, unit, H, Q, CHUNKS, False, SPLIT, BLOCK_K, DOT, PRECISION)

    gates_size = B.to(tl.int64) * G * H
    hidden_size = B.to(tl.int64) * D * H
    cells_size = B.to(tl.int64) * H
    gates_ptr += side * T * gates_size
    hidden_ptr += side * H
    if CELLS == "all":
        cells_ptr += side * (T + 1) * cells_size
    if CELLS == "one":
        cells_ptr += side * cells_size
    h_0_ptr += side * cells_size
    c_0_ptr += side * cells_size
    h_n_ptr += side * cells_size
    c_n_ptr += side * cells_size
    counters_ptr += side * row_blocks * COUNTER_STRIDE

    # The initial states are published like all others.
    block = tl.program_id(1)
    row, lives, length = rows_of_block(block, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
    for b in range(block, row_blocks, tl.num_programs(1)):
        if not ONE_BLOCK:
            row, lives, length = rows_of_block(b, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
        inside = lives[:, None] & (unit < H)[None, :]
        state = row[:, None] * H + unit[None, :]
        if CELLS != "none":
            c = tl.load(c_0_ptr + state, mask=inside, other=0.0).to(ACC)
            place = cells_ptr + state
            if CELLS == "all":
                place = at_time(place, tl.where(reverse, length, 0), cells_size, HAS_LENGTHS)
            if FULL:
                exchange_store(place, c, inside, WAIT)
            else:
                tl.store(place, c, mask=inside)
        if not ALONE:
            h = tl.load(h_0_ptr + state, mask=inside, other=0.0)
            place = hidden_ptr + T * hidden_size + row[:, None] * D * H + unit[None, :]
            exchange_store(place, h, inside, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)

    inside = lives[:, None] & (unit < H)[None, :]
    state = row[:, None] * H + unit[None, :]
    c = tl.load(c_0_ptr + state, mask=inside, other=0.0).to(ACC)
    if ALONE:
        h = tl.load(h_0_ptr + state, mask=inside, other=0.0).to(DOT)
    steps = T
    blocks = 1
    if not ONE_BLOCK:
        blocks = tl.cdiv(row_blocks - block, tl.num_programs(1))
        row, lives, length = rows_of_block(block, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
    elif HAS_LENGTHS:
        steps = tl.max(length, 0)

    # Gate inputs are loaded a turn ahead: they wait for nobody, and device memory is far away.
    t = time_of_step(0, length, reverse)
    tile = row[:, None] * G * H + unit[None, :]
    live = (lives & (length > 0))[:, None] & (unit < H)[None, :]
    a_next = load_blocks(at_time(gates_ptr + tile, t, gates_size, HAS_LENGTHS), H, live, G)

    for turn in range(steps * blocks):
        n = turn // blocks
        b = block + (turn - n * blocks) * tl.num_programs(1)
        if not ONE_BLOCK:
            row, lives, length = rows_of_block(b, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
            inside = lives[:, None] & (unit < H)[None, :]
            state = row[:, None] * H + unit[None, :]
        t = time_of_step(n, length, reverse)
        alive = lives & (n < length)
        live = inside & alive[:, None]

        a = a_next
        after = (turn + 1) // blocks
        next_row, next_lives, next_length = row, lives, length
        if not ONE_BLOCK:
            next_block = block + (turn + 1 - after * blocks) * tl.num_programs(1)
            next_row, next_lives, next_length = rows_of_block(next_block, rows, B, lengths_ptr, T, BLOCK_B, HAS_LENGTHS)
        next_t = time_of_step(after, next_length, reverse)
        next_tile = next_row[:, None] * G * H + unit[None, :]
        next_live = (next_lives & (after < next_length))[:, None] & (unit < H)[None, :]
        a_next = load_blocks(at_time(gates_ptr + next_tile, next_t, gates_size, HAS_LENGTHS), H, next_live, G)

        if CELLS == "all":
            cells_before = at_time(cells_ptr, t + direction, cells_size, HAS_LENGTHS) + state
            slot = tl.where(n < length, t + 1 - direction, n + 1)
            cells_now = at_time(cells_ptr, slot, cells_size, HAS_LENGTHS) + state
        else:
            cells_before = cells_ptr + state if CELLS == "one" else cells_ptr
            cells_now = cells_before
        if not ONE_BLOCK:
            c = tl.load(cells_before, mask=live, other=0.0)
        reads = alive
        if HAS_RESETS:
            kept = resets_ptr + (t.to(tl.int64) * B + row)
            reads = alive & (tl.load(kept, mask=alive, other=0) == 0)
            c = tl.where(reads[:, None], c, 0.0)

        acc = zero_accumulators(G, SPLIT, BLOCK_B, BLOCK_U, ACC)
        if ALONE:
            h = tl.where(reads[:, None], h, 0.0)
            acc = add_to_all(acc, h, w, 0, CHUNKS, PRECISION)
            if FULL:
                for q in tl.static_range(Q):
                    acc = add_to_one(acc, c.to(DOT), v_full[q], peephole_gate(q, G), PRECISION)
        else:
            before = tl.where(n == 0, T, tl.where(reverse, t + 1, t - 1))
            reading = left_rows(reads, SPLIT)
            left_row = left_rows(row, SPLIT)
            h_before = left_at_time(hidden_ptr, before, hidden_size, SPLIT, HAS_LENGTHS) + left_row * D * H
            counter_ptr = counters_ptr + b * COUNTER_STRIDE
            patience = exchange_wait(counter_ptr, (n + 1) * tl.num_programs(0), patience, error_ptr, WAIT)
            for first in tl.static_range(0, CHUNKS, GROUP):
                pointers, masks = left_operands(h_before, H, reading, first, GROUP, SPLIT, BLOCK_K)
                left, patience = exchange_load(pointers, masks, patience, error_ptr, WAIT)
                for m in tl.static_range(GROUP):
                    acc = add_to_all(acc, left[m].to(DOT), w, first + m, CHUNKS, PRECISION)
            if FULL:
                c_before = left_at_time(cells_ptr, t + direction, cells_size, SPLIT, HAS_LENGTHS) + left_row * H
                for first in tl.static_range(0, CHUNKS, GROUP):
                    pointers, masks = left_operands(c_before, H, reading, first, GROUP, SPLIT, BLOCK_K)
                    states, patience = exchange_load(pointers, masks, patience, error_ptr, WAIT)
                    for m in tl.static_range(GROUP):
                        for q in tl.static_range(Q):
                            v_tile = v_full[q * CHUNKS + first + m]
                            acc = add_to_one(acc, states[m].to(DOT), v_tile, peephole_gate(q, G), PRECISION)
        sums = ()
        for g in tl.static_range(G):
            sums = sums + (a[g].to(ACC) + sum_parts(acc[g], SPLIT),)  # noqa: RUF005

        c_previous = c
        i, f, g, c = next_cell(sums, v, c_previous, COUPLED, DIAGONAL)
        o = output_gate(sums[G - 1], v, c_previous, c, DIAGONAL, OUTPUT_CURRENT)
        h_now = o * tanh(c)

        # What others wait for goes first.
        hidden_now = at_time(hidden_ptr, t, hidden_size, HAS_LENGTHS) + row[:, None] * D * H + unit[None, :]
        if ALONE:
            tl.store(hidden_now, tl.where(alive[:, None], h_now, 0.0).to(hidden_ptr.dtype.element_ty), mask=inside)
            h = h_now.to(hidden_ptr.dtype.element_ty).to(DOT)
        else:
            exchange_store(hidden_now, tl.where(alive[:, None], h_now, 0.0), inside, WAIT)
            if FULL:
                exchange_store(cells_now, tl.where(alive[:, None], c, 0.0), inside, WAIT)
            exchange_arrive(counters_ptr + b * COUNTER_STRIDE, WAIT)
        if CELLS != "none" and (ALONE or not FULL):
            tl.store(cells_now, tl.where(alive[:, None], c, 0.0), mask=inside)
        if SAVE_GATES:
            gates_now = at_time(gates_ptr, t, gates_size, HAS_LENGTHS) + row[:, None] * G * H + unit[None, :]
            store_gates(gates_now, i, f, g, H, live, COUPLED)
            tl.store(gates_now + (G - 1) * H, o.to(gates_ptr.dtype.element_ty), mask=live)
        last = live & row_values(n == length - 1, HAS_LENGTHS)
        tl.store(h_n_ptr + state, h_now.to(h_n_ptr.dtype.element_ty), mask=last)
        tl.store(c_n_ptr + state, c.to(c_n_ptr.dtype.element_ty), mask=last)

    if HAS_LENGTHS and ONE_BLOCK:
        for n in range(steps, T):
            tl.store(hidden_ptr + hidden_size * n + row[:, None] * D * H + unit[None, :], 0.0, mask=inside)
            if CELLS == "all":
                tl.store(cells_ptr + cells_size * (n + 1) + state, 0.0, mask=inside)
