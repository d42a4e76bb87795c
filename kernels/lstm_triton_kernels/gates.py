"""The fused gate matmul: all gate pre-activations of one step in one launch.

Shapes: B batch rows, I input features, H hidden units, P hidden size after projection (else H), G gate blocks in the
order i, f, g, o (coupled: f, g, o), Q peephole blocks i, f, o (coupled: f, o), T time steps. The candidate g is the
last block but one, o is the last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.blocks import Blocks, matmul_blocks
from lstm_triton_kernels.operands import as_operand, multiply_add, product_constants
from lstm_triton_kernels.sizes import matmul_precision
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights

FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether this Triton puts a fence between the asynchronous copies (cp.async) of 16-bit operands and the wgmma that
reads them. The PTX ISA asks for a fence.proxy.async there; Triton 3.6 leaves it out, and 3.7 was not looked at."""


@triton.jit
def add_product(
    acc, a_ptr, w_ptr, row, unit, B, H, K, stride_ab, stride_w,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, mask_ptr=None,
):  # fmt: skip
    """Return acc (BLOCK_B, BLOCK_U) + a w^T for a (B, K) and w (H, K) with the row strides stride_ab and stride_w.

    mask (B, K), or None: what a is multiplied with, rounded to its type.
    """
    k = tl.arange(0, BLOCK_K)
    a_row = a_ptr + row[:, None] * stride_ab
    w_row = w_ptr + unit[None, :] * stride_w
    for start in range(0, K, BLOCK_K):
        column = start + k
        a = tl.load(a_row + column[None, :], mask=(row[:, None] < B) & (column[None, :] < K), other=0.0)
        w = tl.load(w_row + column[:, None], mask=(unit[None, :] < H) & (column[:, None] < K), other=0.0)
        if mask_ptr is not None:
            m = tl.load(
                mask_ptr + row[:, None] * K + column[None, :],
                mask=(row[:, None] < B) & (column[None, :] < K),
                other=0.0,
            )
            a = (a.to(acc.dtype) * m.to(acc.dtype)).to(a.dtype)
        a, w = as_operand(a, DOT, PRECISION), as_operand(w, DOT, PRECISION)
        acc = multiply_add(acc, a, w, PRECISION)
    return acc


@triton.jit(do_not_specialize=["B", "t", "h_t", "c_slot"])
def gate_preactivations_kernel(
    preact_ptr, product_ptr, x_ptr, w_ih_ptr, bias_ih_ptr, bias_hh_ptr, gate_input_ptr, h_ptr, w_hh_ptr, cells_ptr,
    w_ch_ptr, mask_ptr, B, I, H, P, t, h_t, c_slot, stride_xb, stride_ht, stride_hb,
    GATES: tl.constexpr, HAS_X: tl.constexpr, HAS_BIAS: tl.constexpr, FULL: tl.constexpr, OUTPUT_CURRENT: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute preact (B, G·H) = input side + W_hh h_{t-1} (+ V c_{t-1} for the gates that read it).

    Input side: with HAS_X, W_ih x + b_ih + b_hh for x (B, I); else row t of gate_input (T, B, G·H), nothing where that
    is None. Where product (B, G·H) is given, W_hh h_{t-1} is stored there and not added.
    h (., B, P) is read at index h_t, and multiplied with mask (B, P) unless that is None; cells (slots, B, H) at
    c_slot; w_ih (G·H, I), w_hh (G·H, P), w_ch (Q·H, H).
    Program: (row block, unit block, gate block).
    """
    gate = tl.program_id(2)
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    block = gate.to(tl.int64) * H
    tile = row[:, None] * GATES * H + block + unit[None, :]
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)

    if HAS_X:
        acc = tl.zeros((BLOCK_B, BLOCK_U), ACC)
        acc = add_product(acc, x_ptr, w_ih_ptr + block * I, row, unit, B, H, I, stride_xb, I, BLOCK_K, DOT, PRECISION)
        if HAS_BIAS:
            acc += tl.load(bias_ih_ptr + block + unit, mask=unit < H, other=0.0).to(ACC)[None, :]
            acc += tl.load(bias_hh_ptr + block + unit, mask=unit < H, other=0.0).to(ACC)[None, :]
    elif gate_input_ptr is not None:
        acc = tl.load(gate_input_ptr + t.to(tl.int64) * B * GATES * H + tile, mask=tile_mask, other=0.0).to(ACC)
    else:
        acc = tl.zeros((BLOCK_B, BLOCK_U), ACC)

    h_base = h_ptr + h_t.to(tl.int64) * stride_ht
    w_hh = w_hh_ptr + block * P
    if product_ptr is None:
        acc = add_product(acc, h_base, w_hh, row, unit, B, H, P, stride_hb, P, BLOCK_K, DOT, PRECISION, mask_ptr)
    else:
        zero = tl.zeros((BLOCK_B, BLOCK_U), ACC)
        product = add_product(zero, h_base, w_hh, row, unit, B, H, P, stride_hb, P, BLOCK_K, DOT, PRECISION, mask_ptr)
        tl.store(product_ptr + tile, product, mask=tile_mask)

    if FULL:
        has_peephole = gate != GATES - 2
        if OUTPUT_CURRENT:
            has_peephole = has_peephole & (gate != GATES - 1)
        v_block = tl.where(gate == GATES - 1, GATES - 2, gate).to(tl.int64) * H
        c_base = cells_ptr + c_slot.to(tl.int64) * B * H
        K = tl.where(has_peephole, H, 0)  # no iteration for a gate that does not read c_{t-1}
        acc = add_product(acc, c_base, w_ch_ptr + v_block * H, row, unit, B, H, K, H, H, BLOCK_K, DOT, PRECISION)

    tl.store(preact_ptr + tile, acc, mask=tile_mask)


@triton.jit(do_not_specialize=["B", "c_slot"])
def output_peephole_kernel(
    preact_ptr, cells_ptr, w_ch_ptr, B, H, c_slot,
    GATES: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add V_o c_t to the last block of preact (B, G·H), in place, for a full peephole of the output gate on c_t.

    cells (slots, B, H) is read at c_slot; V_o is the last block of w_ch (Q·H, H). Program: (row block, unit block).
    """
    unit = (tl.program_id(1) * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    row = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    tile = row[:, None] * GATES * H + (GATES - 1) * H + unit[None, :]
    tile_mask = (row[:, None] < B) & (unit[None, :] < H)
    v_o = w_ch_ptr + (GATES - 2) * tl.full((), 1, tl.int64) * H * H
    acc = tl.load(preact_ptr + tile, mask=tile_mask, other=0.0).to(ACC)
    c_base = cells_ptr + c_slot.to(tl.int64) * B * H
    acc = add_product(acc, c_base, v_o, row, unit, B, H, H, H, H, BLOCK_K, DOT, PRECISION)
    tl.store(preact_ptr + tile, acc, mask=tile_mask)


def product_blocks(B: int, K: int, dtype: torch.dtype) -> Blocks:
    """Return `matmul_blocks`, unpipelined where the copies of a pipeline would reach a wgmma without a fence."""
    blocks = matmul_blocks(B, K, dtype)
    uses_wgmma = blocks.block_b >= 64 and dtype.itemsize == 2
    return blocks if FENCES_COPIES or not uses_wgmma else replace(blocks, num_stages=1)


def gate_preactivations(
    preact: Tensor, x: Tensor | None, gate_input: Tensor | None, h: Tensor, cells: Tensor, weights: LSTMWeights,
    spec: LSTMSpec, t: int, h_index: int, c_slot: int, mask: Tensor | None = None, product: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch `gate_preactivations_kernel` for one step; exactly one of x (B, I) and gate_input (T, B, G·H) is given.

    preact (B, G·H) accumulator type, out; product: the same, or None; h (., B, P); cells (slots, B, H) accumulator
    type; mask (B, P), of h, or None. Rows of x and h may be strided, their columns and all else contiguous.
    """
    B, H = cells.shape[-2:]
    P = h.shape[-1]
    I = x.shape[-1] if x is not None else 0
    gates = len(spec.gates)
    blocks = product_blocks(B, max(I, P), h.dtype)
    rows, parts = blocks.grid(B, H)
    gate_preactivations_kernel[(rows, parts, gates)](
        preact_ptr=preact,
        product_ptr=product,
        x_ptr=x,
        w_ih_ptr=weights.weight_ih if x is not None else None,
        bias_ih_ptr=weights.bias_ih if x is not None else None,
        bias_hh_ptr=weights.bias_hh if x is not None else None,
        gate_input_ptr=gate_input,
        h_ptr=h,
        w_hh_ptr=weights.weight_hh,
        cells_ptr=cells if spec.full else None,
        w_ch_ptr=weights.weight_ch if spec.full else None,
        mask_ptr=mask,
        B=B,
        I=I,
        H=H,
        P=P,
        t=t,
        h_t=h_index,
        c_slot=c_slot,
        stride_xb=x.stride(0) if x is not None else 0,
        stride_ht=h.stride(0),
        stride_hb=h.stride(1),
        GATES=gates,
        HAS_X=x is not None,
        HAS_BIAS=x is not None and weights.bias_ih is not None,
        FULL=spec.full,
        OUTPUT_CURRENT=spec.full and spec.output_current,
        **blocks.constants(),
        **product_constants(h.dtype, matmul_precision()),
    )


def recurrent_product(
    preact: Tensor, gate_input: Tensor | None, h: Tensor, weight_hh: Tensor, t: int, h_index: int
) -> None:
    """Launch `gate_preactivations_kernel` for a cell of any blocks: preact = gate_input[t] + W_hh h[h_index].

    - preact: (B, G·H), accumulator type, out; G: as many blocks of H rows as weight_hh has
    - gate_input: (T, B, G·H), or None for the product alone
    - h: (., B, H), rows may be strided; weight_hh: (G·H, H) of the same type; columns and all else contiguous
    """
    B, H = h.shape[-2:]
    gates = weight_hh.shape[0] // H
    blocks = product_blocks(B, H, h.dtype)
    rows, parts = blocks.grid(B, H)
    gate_preactivations_kernel[(rows, parts, gates)](
        preact_ptr=preact,
        product_ptr=None,
        x_ptr=None,
        w_ih_ptr=None,
        bias_ih_ptr=None,
        bias_hh_ptr=None,
        gate_input_ptr=gate_input,
        h_ptr=h,
        w_hh_ptr=weight_hh,
        cells_ptr=None,
        w_ch_ptr=None,
        mask_ptr=None,
        B=B,
        I=0,
        H=H,
        P=H,
        t=t,
        h_t=h_index,
        c_slot=0,
        stride_xb=0,
        stride_ht=h.stride(0),
        stride_hb=h.stride(1),
        GATES=gates,
        HAS_X=False,
        HAS_BIAS=False,
        FULL=False,
        OUTPUT_CURRENT=False,
        **blocks.constants(),
        **product_constants(h.dtype, matmul_precision()),
    )


def add_output_peephole(preact: Tensor, cells: Tensor, weights: LSTMWeights, spec: LSTMSpec, c_slot: int) -> None:
    """Launch `output_peephole_kernel`: the last block of preact (B, G·H) += V_o c_t, c_t = cells[c_slot]."""
    B, H = cells.shape[-2:]
    dtype = weights.weight_hh.dtype
    blocks = product_blocks(B, H, dtype)
    output_peephole_kernel[blocks.grid(B, H)](
        preact_ptr=preact,
        cells_ptr=cells,
        w_ch_ptr=weights.weight_ch,
        B=B,
        H=H,
        c_slot=c_slot,
        GATES=len(spec.gates),
        **blocks.constants(),
        **product_constants(dtype, matmul_precision()),
    )
