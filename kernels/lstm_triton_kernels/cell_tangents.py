"""The elementwise part of a second derivative: the tangents of a cell update, and the sources of its backward pass.

A dot marks the tangent of a value along the cotangents that the second derivative is given; `double_backward.py` of
lstm_triton has the mathematics. One kernel each, every variant a flag.

Shapes: B batch rows, H hidden units, G gate blocks in the order i, f, g, o (coupled: f, g, o), Q peephole blocks i, f,
o (coupled: f, o), T time steps.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.activations import tanh
from lstm_triton_kernels.blocks import elementwise_blocks
from lstm_triton_kernels.cell import carried_rows, variant_constants
from lstm_triton_kernels.equations import (
    load_blocks,
    load_peephole,
    output_derivatives,
    store_gates,
)
from lstm_triton_kernels.order import Step
from lstm_triton_kernels.spec import LSTMSpec


@triton.jit
def next_cell_tangent(
    a_dot, v, i, f, g, c_previous, c_previous_dot, COUPLED: tl.constexpr, DIAGONAL: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr,
):  # fmt: skip
    """Return the tangents of i, f, g and c_t = f c_{t-1} + i g, from those of the pre-activations and of c_{t-1}."""
    F: tl.constexpr = 0 if COUPLED else 1
    a_f_dot = a_dot[F]
    if DIAGONAL:
        a_f_dot += v[F] * c_previous_dot
    f_dot = f * (1.0 - f) * a_f_dot
    g_dot = a_dot[F + 1]
    if not IDENTITY_INPUT:
        g_dot *= 1.0 - g * g
    if COUPLED:
        i_dot = -f_dot
    else:
        a_i_dot = a_dot[0]
        if DIAGONAL:
            a_i_dot += v[0] * c_previous_dot
        i_dot = i * (1.0 - i) * a_i_dot
    return i_dot, f_dot, g_dot, f_dot * c_previous + f * c_previous_dot + i_dot * g + i * g_dot


@triton.jit
def output_derivatives_tangent(o, c, o_dot, c_dot, IDENTITY_OUTPUT: tl.constexpr):
    """Return the tangents of what `output_derivatives` returns."""
    if IDENTITY_OUTPUT:
        return c_dot * o * (1.0 - o) + c * (1.0 - 2.0 * o) * o_dot, o_dot
    else:
        tanh_c = tanh(c)
        slope = 1.0 - tanh_c * tanh_c
        by_o_dot = slope * c_dot * o * (1.0 - o) + tanh_c * (1.0 - 2.0 * o) * o_dot
        return by_o_dot, slope * (o_dot - 2.0 * o * tanh_c * c_dot)


@triton.jit
def cell_derivatives_tangent(
    i, f, g, c_previous, i_dot, f_dot, g_dot, c_previous_dot, COUPLED: tl.constexpr, IDENTITY_INPUT: tl.constexpr
):
    """Return the tangents of what `cell_derivatives` returns."""
    if IDENTITY_INPUT:
        by_g_dot = i_dot
    else:
        by_g_dot = i_dot * (1.0 - g * g) - 2.0 * i * g * g_dot
    if COUPLED:
        by_f_dot = (c_previous_dot - g_dot) * f * (1.0 - f) + (c_previous - g) * (1.0 - 2.0 * f) * f_dot
        by_i_dot = by_f_dot
    else:
        by_f_dot = c_previous_dot * f * (1.0 - f) + c_previous * (1.0 - 2.0 * f) * f_dot
        by_i_dot = g_dot * i * (1.0 - i) + g * (1.0 - 2.0 * i) * i_dot
    return by_i_dot, by_f_dot, by_g_dot


@triton.jit
def load_gates(ptr, H, mask, ACC: tl.constexpr, COUPLED: tl.constexpr):
    """Load i, f, g of the tile at ptr in type ACC; coupled i is 0 and has no meaning."""
    F: tl.constexpr = 0 if COUPLED else 1
    blocks = load_blocks(ptr, H, mask, F + 2)
    f, g = blocks[F].to(ACC), blocks[F + 1].to(ACC)
    if COUPLED:
        i = tl.zeros_like(f)
    else:
        i = blocks[0].to(ACC)
    return i, f, g


@triton.jit(do_not_specialize=["B", "t", "hidden_t", "previous", "current"])
def cell_tangents_kernel(
    preact_dot_ptr, gates_ptr, cells_ptr, gates_dot_ptr, cells_dot_ptr, hidden_dot_ptr, w_ch_ptr, resets_ptr,
    B, H, t, hidden_t, previous, current, stride_ht, stride_hb,
    COUPLED: tl.constexpr, DIAGONAL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, HAS_RESETS: tl.constexpr,
    UPDATE_CELL: tl.constexpr, UPDATE_HIDDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute the tangents of one step of `cell_forward_kernel`, from preact_dot (B, G·H), of the pre-activations.

    gates[t] (T, B, G·H) activated and cells (slots, B, H): of the forward pass. cells_dot[previous] ->
    cells_dot[current], gates_dot[t] and hidden_dot[hidden_t] (., B, H): their tangents. With HAS_RESETS the states
    before a reset, and their tangents, are read as zero. The halves UPDATE_CELL and UPDATE_HIDDEN as there.
    Program: (row block, unit block).
    """
    F: tl.constexpr = 0 if COUPLED else 1
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    state = row[:, None] * H + unit[None, :]
    gate = row[:, None] * (F + 3) * H + unit[None, :]
    saved = t.to(tl.int64) * B * (F + 3) * H + gate
    slot_previous, slot_current = previous.to(tl.int64) * B * H + state, current.to(tl.int64) * B * H + state
    carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
    c_previous_dot = tl.load(cells_dot_ptr + slot_previous, mask=carried, other=0.0)
    ACC: tl.constexpr = c_previous_dot.dtype
    v = load_peephole(w_ch_ptr, unit, H, COUPLED, DIAGONAL)

    if UPDATE_CELL:
        a_dot = load_blocks(preact_dot_ptr + gate, H, tile_mask, F + 2)
        c_previous = tl.load(cells_ptr + slot_previous, mask=carried, other=0.0)
        i, f, g = load_gates(gates_ptr + saved, H, tile_mask, ACC, COUPLED)
        if COUPLED:
            i = 1.0 - f
        i_dot, f_dot, g_dot, c_dot = next_cell_tangent(
            a_dot, v, i, f, g, c_previous, c_previous_dot, COUPLED, DIAGONAL, IDENTITY_INPUT
        )
        tl.store(cells_dot_ptr + slot_current, c_dot, mask=tile_mask)
        store_gates(gates_dot_ptr + saved, i_dot, f_dot, g_dot, H, tile_mask, COUPLED)
    else:
        c_dot = tl.load(cells_dot_ptr + slot_current, mask=tile_mask, other=0.0)

    if UPDATE_HIDDEN:
        a_o_dot = tl.load(preact_dot_ptr + gate + (F + 2) * H, mask=tile_mask, other=0.0)
        if DIAGONAL:
            a_o_dot += v[F + 1] * (c_dot if OUTPUT_CURRENT else c_previous_dot)
        o = tl.load(gates_ptr + saved + (F + 2) * H, mask=tile_mask, other=0.0).to(ACC)
        c = tl.load(cells_ptr + slot_current, mask=tile_mask, other=0.0)
        by_o, by_c = output_derivatives(o, c, IDENTITY_OUTPUT)
        h_out = hidden_dot_ptr + hidden_t.to(tl.int64) * stride_ht + row[:, None] * stride_hb + unit[None, :]
        tl.store(h_out, (by_o * a_o_dot + by_c * c_dot).to(hidden_dot_ptr.dtype.element_ty), mask=tile_mask)
        o_dot = o * (1.0 - o) * a_o_dot
        tl.store(gates_dot_ptr + saved + (F + 2) * H, o_dot.to(gates_dot_ptr.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=["T", "B", "reverse"])
def cell_sources_kernel(
    of_gates_ptr, of_cells_ptr, of_c_0_ptr, gates_ptr, gates_dot_ptr, cells_ptr, cells_dot_ptr, dh_ptr, dh_dot_ptr,
    d_cells_ptr, dc_ptr, resets_ptr, T, B, H, reverse,
    COUPLED: tl.constexpr, IDENTITY_INPUT: tl.constexpr, IDENTITY_OUTPUT: tl.constexpr, HAS_DH_DOT: tl.constexpr,
    HAS_D_CELLS: tl.constexpr, HAS_RESETS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Compute what the tangents of a backward pass have beside its own products, of all steps: they are elementwise.

    - of_gates (T, B, G·H), of_cells (T, B, H), of_c_0 (B, H): out; of the pre-activations, of c_t and of c_0
    - gates, gates_dot (T, B, G·H) activated; cells, cells_dot (T + 1, B, H)
    - dh (T, B, H): the gradients of o tanh(c_t); dh_dot (T, B, H): the part of their tangents known before
    - d_cells (T, B, H), dc (B, H): of c_t and of the last one, but for what comes through h_t and c_{t+1}
    - resets: (T, B) uint8; reverse: 1 where the steps run from the last to the first, else 0

    The gradient of c_t is computed again on the way back through the steps. Program: (row block, unit block).
    """
    F: tl.constexpr = 0 if COUPLED else 1
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    state = row[:, None] * H + unit[None, :]
    gate = row[:, None] * (F + 3) * H + unit[None, :]
    size = B.to(tl.int64) * H

    dc = tl.load(dc_ptr + state, mask=tile_mask, other=0.0)
    ACC: tl.constexpr = dc.dtype
    through_f = tl.zeros_like(dc)
    for n in range(T):
        t = tl.where(reverse != 0, n, T - 1 - n)
        now = t.to(tl.int64)
        previous, current = now + reverse, now + 1 - reverse
        step, saved = now * size + state, now * (F + 3) * size + gate
        carried = carried_rows(resets_ptr, t, row, B, HAS_RESETS)[:, None] & tile_mask
        c_previous = tl.load(cells_ptr + previous * size + state, mask=carried, other=0.0)
        c_previous_dot = tl.load(cells_dot_ptr + previous * size + state, mask=carried, other=0.0)
        c = tl.load(cells_ptr + current * size + state, mask=tile_mask, other=0.0)
        c_dot = tl.load(cells_dot_ptr + current * size + state, mask=tile_mask, other=0.0)
        i, f, g = load_gates(gates_ptr + saved, H, tile_mask, ACC, COUPLED)
        i_dot, f_dot, g_dot = load_gates(gates_dot_ptr + saved, H, tile_mask, ACC, COUPLED)
        if COUPLED:
            i, i_dot = 1.0 - f, -f_dot
        o = tl.load(gates_ptr + saved + (F + 2) * H, mask=tile_mask, other=0.0).to(ACC)
        o_dot = tl.load(gates_dot_ptr + saved + (F + 2) * H, mask=tile_mask, other=0.0).to(ACC)
        dh = tl.load(dh_ptr + step, mask=tile_mask, other=0.0).to(ACC)

        by_o, by_c = output_derivatives(o, c, IDENTITY_OUTPUT)
        by_o_dot, by_c_dot = output_derivatives_tangent(o, c, o_dot, c_dot, IDENTITY_OUTPUT)
        d_o_dot = dh * by_o_dot
        dc_dot = through_f + dh * by_c_dot
        if HAS_DH_DOT:
            dh_dot = tl.load(dh_dot_ptr + step, mask=tile_mask, other=0.0).to(ACC)
            d_o_dot += dh_dot * by_o
            dc_dot += dh_dot * by_c
        tl.store(of_gates_ptr + saved + (F + 2) * H, d_o_dot.to(of_gates_ptr.dtype.element_ty), mask=tile_mask)
        tl.store(of_cells_ptr + step, dc_dot, mask=tile_mask)

        dc += dh * by_c
        if HAS_D_CELLS:
            dc += tl.load(d_cells_ptr + step, mask=tile_mask, other=0.0)
        by_i_dot, by_f_dot, by_g_dot = cell_derivatives_tangent(
            i, f, g, c_previous, i_dot, f_dot, g_dot, c_previous_dot, COUPLED, IDENTITY_INPUT
        )
        store_gates(of_gates_ptr + saved, dc * by_i_dot, dc * by_f_dot, dc * by_g_dot, H, tile_mask, COUPLED)
        through_f = tl.where(carried, dc * f_dot, 0.0)
        dc = tl.where(carried, dc * f, 0.0)
    tl.store(of_c_0_ptr + state, through_f, mask=tile_mask)


def cell_tangents(
    preact_dot: Tensor, gates: Tensor, cells: Tensor, gates_dot: Tensor, cells_dot: Tensor, hidden_dot: Tensor,
    weight_ch: Tensor | None, spec: LSTMSpec, step: Step, hidden_index: int, resets: Tensor | None = None,
    *, update_cell: bool = True, update_hidden: bool = True,
) -> None:  # fmt: skip
    """Launch `cell_tangents_kernel` for one step.

    preact_dot (B, G·H), cells, cells_dot (T + 1, B, H) accumulator type; gates, gates_dot (T, B, G·H); hidden_dot
    (., B, H) with contiguous columns; weight_ch diagonal (Q·H,) or None; resets (T, B) uint8 or None.
    """
    B, H = cells.shape[-2:]
    blocks = elementwise_blocks(H)
    cell_tangents_kernel[blocks.grid(B, H)](
        preact_dot_ptr=preact_dot,
        gates_ptr=gates,
        cells_ptr=cells,
        gates_dot_ptr=gates_dot,
        cells_dot_ptr=cells_dot,
        hidden_dot_ptr=hidden_dot,
        w_ch_ptr=weight_ch if spec.diagonal else None,
        resets_ptr=resets,
        B=B,
        H=H,
        t=step.t,
        hidden_t=hidden_index,
        previous=step.previous,
        current=step.current,
        stride_ht=hidden_dot.stride(0),
        stride_hb=hidden_dot.stride(1),
        HAS_RESETS=resets is not None,
        UPDATE_CELL=update_cell,
        UPDATE_HIDDEN=update_hidden,
        **variant_constants(spec),
        **blocks.constants(),
    )


def cell_sources(
    of_gates: Tensor, of_cells: Tensor, of_c_0: Tensor, gates: Tensor, gates_dot: Tensor, cells: Tensor,
    cells_dot: Tensor, dh: Tensor, dh_dot: Tensor | None, d_cells: Tensor | None, dc: Tensor, spec: LSTMSpec,
    reverse: bool, resets: Tensor | None,
) -> None:  # fmt: skip
    """Launch `cell_sources_kernel` for all steps; all tensors contiguous.

    of_cells, d_cells (T, B, H), of_c_0, dc (B, H), cells, cells_dot (T + 1, B, H) accumulator type; of_gates, gates,
    gates_dot (T, B, G·H), dh, dh_dot (T, B, H); resets (T, B) uint8 or None; reverse: the steps run from the last to
    the first.
    """
    T, B, H = dh.shape
    blocks = elementwise_blocks(H, elements=256)
    cell_sources_kernel[blocks.grid(B, H)](
        of_gates_ptr=of_gates,
        of_cells_ptr=of_cells,
        of_c_0_ptr=of_c_0,
        gates_ptr=gates,
        gates_dot_ptr=gates_dot,
        cells_ptr=cells,
        cells_dot_ptr=cells_dot,
        dh_ptr=dh,
        dh_dot_ptr=dh_dot,
        d_cells_ptr=d_cells,
        dc_ptr=dc,
        resets_ptr=resets,
        T=T,
        B=B,
        H=H,
        reverse=int(reverse),
        COUPLED=spec.coupled,
        IDENTITY_INPUT=spec.identity_input,
        IDENTITY_OUTPUT=spec.identity_output,
        HAS_DH_DOT=dh_dot is not None,
        HAS_D_CELLS=d_cells is not None,
        HAS_RESETS=resets is not None,
        **blocks.constants(),
    )
