"""The elementwise cell update, forward and backward: one kernel each, every variant a flag.

Shapes: B batch rows, H hidden units, P hidden size after projection (else H), G gate blocks in the order i, f, g, o
(coupled: f, g, o), Q peephole blocks i, f, o (coupled: f, o), T time steps. Buffers of one step are read at the index
the launcher passes: `t` in gates, d_gates and grad_output, `hidden_t` in hidden, `previous` and `current` in cells.

A full peephole on c_t needs a matmul between c_t and o, so each kernel has two halves that may run in one launch or in
two: forward first the cell (UPDATE_CELL), then the hidden state (UPDATE_HIDDEN); backward the other way round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.blocks import elementwise_blocks
from lstm_triton_kernels.equations import (
    activation,
    load_blocks,
    load_peephole,
    output_derivatives,
    output_gate,
    previous_cell_gradient,
    store_gates,
)
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
from lstm_triton_kernels.spec import LSTMSpec

NO_RULES = KernelRules()
"""Of steps by the equations of their variant alone."""


@triton.jit
def carried_rows(resets_ptr, t, row, B, HAS_RESETS: tl.constexpr):
    """Return the mask (BLOCK_B,) of the rows whose state is carried into step t: resets (T, B) do not reset it."""
    carried = row < B
    if HAS_RESETS:
        carried = carried & (tl.load(resets_ptr + t.to(tl.int64) * B + row, mask=carried, other=0) == 0)
    return carried


@triton.jit(do_not_specialize=["B", "t", "hidden_t", "previous", "current"])
def cell_forward_kernel(
    preact_ptr, cells_ptr, hidden_ptr, gates_ptr, w_ch_ptr, resets_ptr, before_ptr, rules,
    B, H, t, hidden_t, previous, current, stride_ht, stride_hb, stride_bb,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, SAVE_GATES: tl.constexpr,
    HAS_RESETS: tl.constexpr, UPDATE_CELL: tl.constexpr, UPDATE_HIDDEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Update cell and hidden state of one step.

    preact (B, G·H), cells[previous] -> cells[current] (slots, B, H), hidden[hidden_t] (., B, H), gates[t] (T, B, G·H).

    The gates are saved activated. With HAS_RESETS cells[previous] is read as zero where resets (T, B) uint8 is not
    zero, at t. rules: a `KernelRules` of one direction; before (B, H): h_{t-1}, read as zero likewise; None without
    zoneout of h. Of two launches the first leaves c~ in cells[current]. Program: (row block, unit block).
    """
    DRAWN: tl.constexpr = rules.codes is not None
    F: tl.constexpr = 0 if COUPLED else 1
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
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
        a = load_blocks(preact_ptr + gate, H, tile_mask, F + 2)
        i, f, g, c = next_computed_cell(a, v, c_previous, code, rules, COUPLED, DIAGONAL, IDENTITY_INPUT)
        if rules.zoneout_c is None or not UPDATE_HIDDEN:
            tl.store(cells_ptr + current.to(tl.int64) * B * H + state, c, mask=tile_mask)
        if SAVE_GATES:
            store_gates(gates_ptr + saved, i, f, g, H, tile_mask, COUPLED)
    else:
        c = tl.load(cells_ptr + current.to(tl.int64) * B * H + state, mask=tile_mask, other=0.0)

    if UPDATE_HIDDEN:
        if rules.zoneout_c is not None:
            c_now = zone(c, c_previous, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)
            tl.store(cells_ptr + current.to(tl.int64) * B * H + state, c_now, mask=tile_mask)
        a_o = tl.load(preact_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0)
        o = output_gate(a_o, v, c_previous, c, DIAGONAL, OUTPUT_CURRENT)
        h = o * activation(c, IDENTITY_OUTPUT)
        if before_ptr is not None:
            h_previous = tl.load(before_ptr + row[:, None] * stride_bb + unit[None, :], mask=carried, other=0.0)
            h = zone(h, h_previous.to(h.dtype), code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)
        h_out = hidden_ptr + hidden_t.to(tl.int64) * stride_ht + row[:, None] * stride_hb + unit[None, :]
        tl.store(h_out, h.to(hidden_ptr.dtype.element_ty), mask=tile_mask)
        if SAVE_GATES:
            tl.store(gates_ptr + saved + (F + 2) * H, o.to(gates_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit
def load_cell_inputs(gates_ptr, cells_ptr, gate, state, B, H, previous, tile_mask, carried, COUPLED: tl.constexpr):
    """Load the activated i, f and g of a step, and c_{t-1}, 0 where it is not carried, in the type of c."""
    F: tl.constexpr = 0 if COUPLED else 1
    c_previous = tl.load(cells_ptr + previous.to(tl.int64) * B * H + state, mask=carried, other=0.0)
    f = tl.load(gates_ptr + gate + F * H, mask=tile_mask, other=0.0).to(c_previous.dtype)
    g = tl.load(gates_ptr + gate + (F + 1) * H, mask=tile_mask, other=0.0).to(c_previous.dtype)
    if COUPLED:
        i = 1.0 - f
    else:
        i = tl.load(gates_ptr + gate, mask=tile_mask, other=0.0).to(c_previous.dtype)
    return i, f, g, c_previous


@triton.jit(do_not_specialize=["B", "t", "previous", "current"])
def cell_backward_kernel(
    grad_output_ptr, dh_ptr, dc_ptr, gates_ptr, cells_ptr, d_gates_ptr, w_ch_ptr, resets_ptr, kept_ptr, of_o_ptr, rules,
    B, H, t, previous, current, stride_gt, stride_gb,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, HAS_GRAD_OUTPUT: tl.constexpr,
    HAS_RESETS: tl.constexpr, GRAD_HIDDEN: tl.constexpr, GRAD_CELL: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the pre-activations, d_gates[t] (T, B, G·H), and of c_{t-1}, in place in dc (B, H).

    The gradient of h_t is dh (B, H) plus, with HAS_GRAD_OUTPUT, grad_output (T, B, H)[t]; gates (T, B, G·H)[t] are the
    saved activations, cells (slots, B, H) the saved cell states. With HAS_RESETS the step read zero in place
    of c_{t-1} where resets (T, B) uint8 is not zero, at t; dc becomes the gradient of what it read.

    rules: a `KernelRules` of one direction. kept (B, H), None without zoneout of h: a part of the gradient of h_t; it
    becomes what zoneout passes on to h_{t-1}, zero where that is reset. of_o (B, H), None but with zoneout of c: the
    part of the gradient of c~ that comes through a full peephole. Program: (row block, unit block).
    """
    DRAWN: tl.constexpr = rules.codes is not None
    F: tl.constexpr = 0 if COUPLED else 1
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    state = row[:, None] * H + unit[None, :]
    gate = t.to(tl.int64) * B * (F + 3) * H + row[:, None] * (F + 3) * H + unit[None, :]

    dc = tl.load(dc_ptr + state, mask=tile_mask, other=0.0)
    dh = tl.load(dh_ptr + state, mask=tile_mask, other=0.0).to(dc.dtype)
    if HAS_GRAD_OUTPUT:
        g_in = grad_output_ptr + t.to(tl.int64) * stride_gt + row[:, None] * stride_gb + unit[None, :]
        dh += tl.load(g_in, mask=tile_mask, other=0.0).to(dc.dtype)
    o = tl.load(gates_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0).to(dc.dtype)
    c = tl.load(cells_ptr + current.to(tl.int64) * B * H + state, mask=tile_mask, other=0.0)
    v = load_peephole(w_ch_ptr, unit, H, COUPLED, DIAGONAL)
    code = load_codes(rules.codes, t.to(tl.int64) * B * H + state, tile_mask)

    if rules.zoneout_c is not None:
        carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
        i, f, g, c_previous = load_cell_inputs(
            gates_ptr, cells_ptr, gate, state, B, H, previous, tile_mask, carried, COUPLED
        )
        c = computed_cell(i, f, g, c_previous, c, code, rules)
    if kept_ptr is not None:
        dh += tl.load(kept_ptr + state, mask=tile_mask, other=0.0)
        dh, kept = zone_gradients(dh, code, rules.zoneout_h, DRAWN, ZONEOUT_H_BIT)
        if GRAD_CELL:
            carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
            tl.store(kept_ptr + state, tl.where(carried, kept, 0.0), mask=tile_mask)
    by_o, by_c = output_derivatives(o, c, IDENTITY_OUTPUT)
    d_o = dh * by_o
    if GRAD_HIDDEN:
        tl.store(d_gates_ptr + gate + (F + 2) * H, d_o.to(d_gates_ptr.dtype.element_ty), mask=tile_mask)

    if GRAD_CELL:
        dc, kept_c = zone_gradients(dc, code, rules.zoneout_c, DRAWN, ZONEOUT_C_BIT)
        if of_o_ptr is not None:
            dc += tl.load(of_o_ptr + state, mask=tile_mask, other=0.0).to(dc.dtype)
        dc += dh * by_c
        if DIAGONAL and OUTPUT_CURRENT:
            dc += v[F + 1] * d_o
        if rules.zoneout_c is None:
            carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
            i, f, g, c_previous = load_cell_inputs(
                gates_ptr, cells_ptr, gate, state, B, H, previous, tile_mask, carried, COUPLED
            )
        dc = clip_gradient(dc, c, rules.cell_clip)
        by_i, by_f, by_g = computed_cell_derivatives(i, f, g, c_previous, code, rules, COUPLED, IDENTITY_INPUT)
        d_i, d_f, d_g = dc * by_i, dc * by_f, dc * by_g
        store_gates(d_gates_ptr + gate, d_i, d_f, d_g, H, tile_mask, COUPLED)
        dc_previous = previous_cell_gradient(dc, f, d_i, d_f, d_o, v, COUPLED, DIAGONAL, OUTPUT_CURRENT)
        if rules.zoneout_c is not None:
            dc_previous += kept_c
        tl.store(dc_ptr + state, dc_previous, mask=tile_mask)


def variant_constants(spec: LSTMSpec) -> dict[str, bool]:
    """Return the compile-time flags of the variant."""
    return dict(
        COUPLED=spec.coupled, DIAGONAL=spec.diagonal, OUTPUT_CURRENT=spec.diagonal and spec.output_current,
        IDENTITY_INPUT=spec.identity_input, IDENTITY_OUTPUT=spec.identity_output,
    )  # fmt: skip


def cell_forward(
    preact: Tensor, cells: Tensor, hidden: Tensor, gates: Tensor | None, weight_ch: Tensor | None, spec: LSTMSpec,
    t: int, hidden_index: int, previous: int, current: int, resets: Tensor | None = None,
    before: Tensor | None = None, rules: KernelRules = NO_RULES, *, update_cell: bool = True,
    update_hidden: bool = True,
) -> None:  # fmt: skip
    """Launch `cell_forward_kernel` for one step.

    preact (B, G·H), cells (slots, B, H) accumulator type; hidden (., B, H) with contiguous columns; gates (T, B, G·H)
    or None; weight_ch diagonal (Q·H,) or None; resets (T, B) uint8 or None; before (B, H) with contiguous columns, or
    None without zoneout of h; rules of one direction.
    """
    B, H = cells.shape[-2:]
    blocks = elementwise_blocks(H)
    cell_forward_kernel[blocks.grid(B, H)](
        preact_ptr=preact,
        cells_ptr=cells,
        hidden_ptr=hidden,
        gates_ptr=gates,
        w_ch_ptr=weight_ch if spec.diagonal else None,
        resets_ptr=resets,
        before_ptr=before,
        rules=rules,
        B=B,
        H=H,
        t=t,
        hidden_t=hidden_index,
        previous=previous,
        current=current,
        stride_ht=hidden.stride(0),
        stride_hb=hidden.stride(1),
        stride_bb=before.stride(0) if before is not None else None,
        SAVE_GATES=gates is not None,
        HAS_RESETS=resets is not None,
        UPDATE_CELL=update_cell,
        UPDATE_HIDDEN=update_hidden,
        **variant_constants(spec),
        **blocks.constants(),
    )


def cell_backward(
    grad_output: Tensor | None, dh: Tensor, dc: Tensor, gates: Tensor, cells: Tensor, d_gates: Tensor,
    weight_ch: Tensor | None, spec: LSTMSpec, t: int, previous: int, current: int, resets: Tensor | None = None,
    kept: Tensor | None = None, rules: KernelRules = NO_RULES, *, of_o: Tensor | None = None,
    grad_hidden: bool = True, grad_cell: bool = True,
) -> None:  # fmt: skip
    """Launch `cell_backward_kernel` for one step.

    grad_output (T, B, H) with contiguous columns, or None; dh (B, H); dc (B, H) accumulator type, updated in place;
    gates, d_gates (T, B, G·H); cells (T + 1, B, H); resets (T, B) uint8 or None; kept (B, H) accumulator type, updated
    in place, or None without zoneout of h; rules of one direction; of_o (B, H) or None.
    """
    B, H = cells.shape[-2:]
    blocks = elementwise_blocks(H)
    cell_backward_kernel[blocks.grid(B, H)](
        grad_output_ptr=grad_output,
        dh_ptr=dh,
        dc_ptr=dc,
        gates_ptr=gates,
        cells_ptr=cells,
        d_gates_ptr=d_gates,
        w_ch_ptr=weight_ch if spec.diagonal else None,
        resets_ptr=resets,
        kept_ptr=kept,
        of_o_ptr=of_o,
        rules=rules,
        B=B,
        H=H,
        t=t,
        previous=previous,
        current=current,
        stride_gt=grad_output.stride(0) if grad_output is not None else 0,
        stride_gb=grad_output.stride(1) if grad_output is not None else 0,
        HAS_GRAD_OUTPUT=grad_output is not None,
        HAS_RESETS=resets is not None,
        GRAD_HIDDEN=grad_hidden,
        GRAD_CELL=grad_cell,
        **variant_constants(spec),
        **blocks.constants(),
    )
