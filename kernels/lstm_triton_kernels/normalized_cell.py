"""The cell update of a step with layer normalisation, forward and backward: a program holds whole rows.

Shapes: B batch rows, H hidden units, P hidden size after projection (else H), G gate blocks in the order i, f, g, o
(coupled: f, g, o), Q peephole blocks i, f, o (coupled: f, o), T time steps. Buffers of one step are read at the index
the launcher passes, as in cell.py.

The mean and the variance of a row need all its G·H products, and those of a cell state all its H units: so that a
program has all units of its rows, in the registers of as many warps as they take. Of variables p is a product
W_hh h_{t-1} and n the same normalised.

A full peephole on c~ needs a matmul between c~ and o, so each kernel has two halves that may run in one launch or in
two: forward first the gates before o (UPDATE_CELL), then the states (UPDATE_HIDDEN); backward first what comes of the
hidden state (GRAD_HIDDEN), then the gates and the product (GRAD_CELL). `computed` (B, H) has what the first half leaves
to the second: c~; backward its gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.blocks import row_blocks
from lstm_triton_kernels.cell import carried_rows, load_cell_inputs, variant_constants
from lstm_triton_kernels.equations import (
    activation,
    load_blocks,
    load_peephole,
    output_derivatives,
    output_gate,
    previous_cell_gradient,
    store_gates,
)
from lstm_triton_kernels.normalize import NORM_EPS, Products
from lstm_triton_kernels.order import Step
from lstm_triton_kernels.regularize import KernelRules
from lstm_triton_kernels.rules import (
    ZONEOUT_C_BIT,
    ZONEOUT_H_BIT,
    clip_gradient,
    computed_cell,
    computed_cell_derivatives,
    load_codes,
    next_computed_cell,
    zone,
    zone_gradients,
)
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights

EPS = tl.constexpr(NORM_EPS)


@triton.jit
def row_mean(blocks, N):
    """Return the mean (BLOCK_B, 1) of N values a row, in a tuple of tiles that are zero elsewhere."""
    total = blocks[0]
    for block in tl.static_range(1, len(blocks)):
        total += blocks[block]
    return tl.sum(total, 1)[:, None] / N


@triton.jit
def moments(blocks, mask, N):
    """Return mean and reciprocal standard deviation (BLOCK_B, 1) of N values a row, in a tuple of tiles."""
    mean = row_mean(blocks, N)
    squares = ()
    for block in tl.static_range(len(blocks)):
        distance = tl.where(mask, blocks[block] - mean, 0.0)
        squares = squares + (distance * distance,)  # noqa: RUF005
    return mean, 1.0 / tl.sqrt(row_mean(squares, N) + EPS)


@triton.jit
def load_row(ptr, unit, H):
    """Load a parameter (H,) as a row (1, BLOCK_U) in its own type."""
    return tl.load(ptr + unit, mask=unit < H, other=0.0)[None, :]


@triton.jit
def add_normalized(a, p, gain_ptr, unit, mask, H):
    """Return the tuple of tiles a plus those of p, whose rows are normalised together, times a gain (G·H,)."""
    mean, rstd = moments(p, mask, len(p) * H)
    sums = ()
    for block in tl.static_range(len(p)):
        n = (p[block] - mean) * rstd
        sums = sums + (a[block] + n * load_row(gain_ptr + block * H, unit, H),)  # noqa: RUF005
    return sums


@triton.jit(do_not_specialize=["B", "t", "hidden_t", "h_t", "previous", "current"])
def normalized_forward_kernel(
    product_ptr, preact_ptr, cells_ptr, computed_ptr, h_ptr, hidden_ptr, gates_ptr, w_ch_ptr, gain_ptr, gain_c_ptr,
    shift_c_ptr, resets_ptr, rules,
    B, H, t, hidden_t, h_t, previous, current, stride_ht, stride_hb, stride_rt, stride_rb,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, SAVE_GATES: tl.constexpr,
    HAS_RESETS: tl.constexpr, UPDATE_CELL: tl.constexpr, UPDATE_HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Update cell and hidden state of one step from product (B, G·H) = W_hh h_{t-1} and the rest of the gates, preact.

    cells[previous] -> cells[current] (slots, B, H), hidden[hidden_t] (., B, H), gates[t] (T, B, G·H), saved activated.
    gain (G·H,), gain_c and shift_c (H,): weight_ln_hh, weight_ln_c, bias_ln_c. h[h_t] (., B, H) is h_{t-1}, for
    zoneout of h; None where h is projected, and zoned after that. With HAS_RESETS both previous states are read as zero
    where resets (T, B) uint8 is not zero, at t. In a launch of its own the first half leaves a_o in preact.
    Program: (row block,).
    """
    F: tl.constexpr = 0 if COUPLED else 1
    unit = tl.arange(0, BLOCK_U).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    state = row[:, None] * H + unit[None, :]
    gate = row[:, None] * (F + 3) * H + unit[None, :]
    saved = t.to(tl.int64) * B * (F + 3) * H + gate
    carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
    c_previous = tl.load(cells_ptr + previous.to(tl.int64) * B * H + state, mask=carried, other=0.0)
    v = load_peephole(w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    code = load_codes(rules.codes, t.to(tl.int64) * B * H + state, tile_mask)

    if UPDATE_CELL:
        p = load_blocks(product_ptr + gate, H, tile_mask, F + 3)
        a = add_normalized(load_blocks(preact_ptr + gate, H, tile_mask, F + 3), p, gain_ptr, unit, tile_mask, H)
        i, f, g, c = next_computed_cell(a, v, c_previous, code, rules, COUPLED, DIAGONAL, IDENTITY_INPUT)
        a_o = a[F + 2]
        if SAVE_GATES:
            store_gates(gates_ptr + saved, i, f, g, H, tile_mask, COUPLED)
        if not UPDATE_HIDDEN:
            tl.store(computed_ptr + state, c, mask=tile_mask)
            tl.store(preact_ptr + gate + (F + 2) * H, a_o, mask=tile_mask)
    else:
        c = tl.load(computed_ptr + state, mask=tile_mask, other=0.0)
        a_o = tl.load(preact_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0)

    if UPDATE_HIDDEN:
        o = output_gate(a_o, v, c_previous, c, DIAGONAL, OUTPUT_CURRENT)
        mean_c, rstd_c = moments((c,), tile_mask, H)
        y = (c - mean_c) * rstd_c * load_row(gain_c_ptr, unit, H)
        if shift_c_ptr is not None:
            y += load_row(shift_c_ptr, unit, H)
        h = o * activation(y, IDENTITY_OUTPUT)
        if h_ptr is not None:
            h_in = h_ptr + h_t.to(tl.int64) * stride_ht + row[:, None] * stride_hb + unit[None, :]
            h_previous = tl.load(h_in, mask=carried, other=0.0).to(h.dtype)
            h = zone(h, h_previous, code, rules.zoneout_h, rules.codes is not None, ZONEOUT_H_BIT)
        h_out = hidden_ptr + hidden_t.to(tl.int64) * stride_rt + row[:, None] * stride_rb + unit[None, :]
        tl.store(h_out, h.to(hidden_ptr.dtype.element_ty), mask=tile_mask)
        c = zone(c, c_previous, code, rules.zoneout_c, rules.codes is not None, ZONEOUT_C_BIT)
        tl.store(cells_ptr + current.to(tl.int64) * B * H + state, c, mask=tile_mask)
        if SAVE_GATES:
            tl.store(gates_ptr + saved + (F + 2) * H, o.to(gates_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=["B", "t", "previous", "current"])
def normalized_backward_kernel(
    grad_output_ptr, dh_ptr, kept_ptr, dc_ptr, computed_ptr, gates_ptr, cells_ptr, product_ptr, mean_ptr, rstd_ptr,
    d_gates_ptr, d_product_ptr, d_cell_ptr, w_ch_ptr, gain_ptr, gain_c_ptr, shift_c_ptr, resets_ptr, rules,
    B, H, t, previous, current, stride_gt, stride_gb,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr,
    HAS_RESETS: tl.constexpr, GRAD_HIDDEN: tl.constexpr, GRAD_CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the pre-activations, d_gates[t] (T, B, G·H), and of the product, d_product (B, G·H).

    In place in dc (B, H) the gradient of c_{t-1}, and in kept (B, H), if zoneout of h is the kernel's, what it passes
    on to h_{t-1}: None where h is projected. The gradient of h_t, or of what is projected, is dh (B, H), plus with
    HAS_GRAD_OUTPUT grad_output (T, B, H)[t], plus kept. gates (T, B, G·H)[t] are the saved activations, cells
    (slots, B, H) the saved cell states; product (T, B, G·H)[t], mean and rstd (T, B)[t] are as of
    `normalize.Products`, and so is d_cell (2, B, H), to which is added. gain, gain_c, shift_c and resets as in
    `normalized_forward_kernel`; dc and kept become the gradients of what the step read. Program: (row block,).
    """
    F: tl.constexpr = 0 if COUPLED else 1
    unit = tl.arange(0, BLOCK_U).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    state = row[:, None] * H + unit[None, :]
    own = row[:, None] * (F + 3) * H + unit[None, :]
    gate = t.to(tl.int64) * B * (F + 3) * H + own
    carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
    v = load_peephole(w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    code = load_codes(rules.codes, t.to(tl.int64) * B * H + state, tile_mask)

    dc = tl.load(dc_ptr + state, mask=tile_mask, other=0.0)
    i, f, g, c_previous = load_cell_inputs(
        gates_ptr, cells_ptr, gate, state, B, H, previous, tile_mask, carried, COUPLED
    )
    c = tl.load(cells_ptr + current.to(tl.int64) * B * H + state, mask=tile_mask, other=0.0)
    c = computed_cell(i, f, g, c_previous, c, code, rules)
    dc, kept_c = zone_gradients(dc, code, rules.zoneout_c, rules.codes is not None, ZONEOUT_C_BIT)

    if GRAD_HIDDEN:
        dh = tl.load(dh_ptr + state, mask=tile_mask, other=0.0).to(dc.dtype)
        if HAS_GRAD_OUTPUT:
            g_in = grad_output_ptr + t.to(tl.int64) * stride_gt + row[:, None] * stride_gb + unit[None, :]
            dh += tl.load(g_in, mask=tile_mask, other=0.0).to(dc.dtype)
        if kept_ptr is not None:
            dh += tl.load(kept_ptr + state, mask=tile_mask, other=0.0)
            dh, kept = zone_gradients(dh, code, rules.zoneout_h, rules.codes is not None, ZONEOUT_H_BIT)
            tl.store(kept_ptr + state, tl.where(carried, kept, 0.0), mask=tile_mask)
        o = tl.load(gates_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0).to(dc.dtype)
        gain_c = load_row(gain_c_ptr, unit, H)
        mean_c, rstd_c = moments((c,), tile_mask, H)
        n_c = tl.where(tile_mask, (c - mean_c) * rstd_c, 0.0)
        y = n_c * gain_c
        if shift_c_ptr is not None:
            y += load_row(shift_c_ptr, unit, H)
        by_o, by_y = output_derivatives(o, y, IDENTITY_OUTPUT)
        d_o, d_y = dh * by_o, dh * by_y
        tl.store(d_gates_ptr + gate + (F + 2) * H, d_o.to(d_gates_ptr.dtype.element_ty), mask=tile_mask)
        of_gain, of_shift = d_cell_ptr + state, d_cell_ptr + tl.full((), 1, tl.int64) * B * H + state
        tl.store(of_gain, tl.load(of_gain, mask=tile_mask, other=0.0) + d_y * n_c, mask=tile_mask)
        tl.store(of_shift, tl.load(of_shift, mask=tile_mask, other=0.0) + d_y, mask=tile_mask)
        d_y *= gain_c
        dc += rstd_c * (d_y - row_mean((d_y,), H) - n_c * row_mean((d_y * n_c,), H))
        if DIAGONAL and OUTPUT_CURRENT:
            dc += v[F + 1] * d_o
        if not GRAD_CELL:
            tl.store(computed_ptr + state, dc, mask=tile_mask)
    else:
        dc = tl.load(computed_ptr + state, mask=tile_mask, other=0.0)
        d_o = tl.load(d_gates_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0).to(dc.dtype)

    if GRAD_CELL:
        dc = clip_gradient(dc, c, rules.cell_clip)
        by_i, by_f, by_g = computed_cell_derivatives(i, f, g, c_previous, code, rules, COUPLED, IDENTITY_INPUT)
        d_i, d_f, d_g = dc * by_i, dc * by_f, dc * by_g
        store_gates(d_gates_ptr + gate, d_i, d_f, d_g, H, tile_mask, COUPLED)
        dc_previous = previous_cell_gradient(dc, f, d_i, d_f, d_o, v, COUPLED, DIAGONAL, OUTPUT_CURRENT)
        if rules.zoneout_c is not None:
            dc_previous += kept_c
        tl.store(dc_ptr + state, dc_previous, mask=tile_mask)

        if COUPLED:
            d = (d_f, d_g, d_o)
        else:
            d = (d_i, d_f, d_g, d_o)
        rows = t.to(tl.int64) * B + row
        mean = tl.load(mean_ptr + rows, mask=row < B, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=row < B, other=0.0)[:, None]
        n, d_n, products = (), (), ()
        for block in tl.static_range(F + 3):
            p = tl.load(product_ptr + gate + block * H, mask=tile_mask, other=0.0).to(dc.dtype)
            normalized = (p - mean) * rstd
            gradient = tl.where(tile_mask, d[block], 0.0) * load_row(gain_ptr + block * H, unit, H)
            n = n + (normalized,)  # noqa: RUF005
            d_n = d_n + (gradient,)  # noqa: RUF005
            products = products + (gradient * normalized,)  # noqa: RUF005
        mean_d, mean_dn = row_mean(d_n, (F + 3) * H), row_mean(products, (F + 3) * H)
        for block in tl.static_range(F + 3):
            d_p = rstd * (d_n[block] - mean_d - n[block] * mean_dn)
            tl.store(d_product_ptr + own + block * H, d_p.to(d_product_ptr.dtype.element_ty), mask=tile_mask)


def normalized_forward(
    product: Tensor, preact: Tensor, cells: Tensor, computed: Tensor | None, h: Tensor | None, h_index: int,
    hidden: Tensor, hidden_index: int, gates: Tensor | None, weights: LSTMWeights, spec: LSTMSpec, rules: KernelRules,
    step: Step, resets: Tensor | None = None, *, update_cell: bool = True, update_hidden: bool = True,
) -> None:  # fmt: skip
    """Launch `normalized_forward_kernel` for one step.

    product, preact (B, G·H), cells (slots, B, H) and computed (B, H) accumulator type; h, hidden (., B, H) with
    contiguous columns; gates (T, B, G·H) or None; rules of one direction; resets (T, B) uint8 or None. computed and h
    are None where the kernel has no use for them.
    """
    B, H = cells.shape[-2:]
    blocks = row_blocks(H)
    normalized_forward_kernel[(blocks.grid(B, H)[0],)](
        product_ptr=product,
        preact_ptr=preact,
        cells_ptr=cells,
        computed_ptr=computed,
        h_ptr=h,
        hidden_ptr=hidden,
        gates_ptr=gates,
        w_ch_ptr=weights.weight_ch if spec.diagonal else None,
        gain_ptr=weights.weight_ln_hh,
        gain_c_ptr=weights.weight_ln_c,
        shift_c_ptr=weights.bias_ln_c,
        resets_ptr=resets,
        rules=rules,
        B=B,
        H=H,
        t=step.t,
        hidden_t=hidden_index,
        h_t=h_index,
        previous=step.previous,
        current=step.current,
        stride_ht=h.stride(0) if h is not None else 0,
        stride_hb=h.stride(1) if h is not None else 0,
        stride_rt=hidden.stride(0),
        stride_rb=hidden.stride(1),
        SAVE_GATES=gates is not None,
        HAS_RESETS=resets is not None,
        UPDATE_CELL=update_cell,
        UPDATE_HIDDEN=update_hidden,
        **variant_constants(spec),
        **blocks.constants(),
    )


def normalized_backward(
    grad_output: Tensor | None, dh: Tensor, kept: Tensor | None, dc: Tensor, computed: Tensor | None, gates: Tensor,
    cells: Tensor, products: Products, d_gates: Tensor, d_product: Tensor, weights: LSTMWeights, spec: LSTMSpec,
    rules: KernelRules, step: Step, resets: Tensor | None = None, *, grad_hidden: bool = True, grad_cell: bool = True,
) -> None:  # fmt: skip
    """Launch `normalized_backward_kernel` for one step.

    grad_output (T, B, H) with contiguous columns, or None; dh (B, H), d_product (B, G·H); kept, dc and computed (B, H)
    accumulator type, kept and computed None where the kernel has no use for them; gates, d_gates (T, B, G·H); cells
    (T + 1, B, H); rules of one direction; resets (T, B) uint8 or None.
    """
    B, H = cells.shape[-2:]
    blocks = row_blocks(H)
    normalized_backward_kernel[(blocks.grid(B, H)[0],)](
        grad_output_ptr=grad_output,
        dh_ptr=dh,
        kept_ptr=kept,
        dc_ptr=dc,
        computed_ptr=computed,
        gates_ptr=gates,
        cells_ptr=cells,
        product_ptr=products.values,
        mean_ptr=products.mean,
        rstd_ptr=products.rstd,
        d_gates_ptr=d_gates,
        d_product_ptr=d_product,
        d_cell_ptr=products.d_cell,
        w_ch_ptr=weights.weight_ch if spec.diagonal else None,
        gain_ptr=weights.weight_ln_hh,
        gain_c_ptr=weights.weight_ln_c,
        shift_c_ptr=weights.bias_ln_c,
        resets_ptr=resets,
        rules=rules,
        B=B,
        H=H,
        t=step.t,
        previous=step.previous,
        current=step.current,
        stride_gt=grad_output.stride(0) if grad_output is not None else 0,
        stride_gb=grad_output.stride(1) if grad_output is not None else 0,
        HAS_GRAD_OUTPUT=grad_output is not None,
        HAS_RESETS=resets is not None,
        GRAD_HIDDEN=grad_hidden,
        GRAD_CELL=grad_cell,
        **variant_constants(spec),
        **blocks.constants(),
    )
