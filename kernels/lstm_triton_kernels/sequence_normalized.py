"""A whole sequence with layer normalisation, step by step: per step the recurrent matmul, then the kernel of the rows.

Any H, any variant of `spec.NORMALIZED`. Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden
size after projection (else H), G gate blocks, Q peephole blocks. One direction of one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_triton_kernels.gates import add_output_peephole, gate_preactivations
from lstm_triton_kernels.normalize import Products
from lstm_triton_kernels.normalized_cell import normalized_backward, normalized_forward
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sequence_stepwise import carry, project, unproject
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order,
    output: Tensor, gates: Tensor | None, cells: Tensor,
) -> None:  # fmt: skip
    """Compute all steps forward, into output, gates and cells; see `sequence_stepwise.forward`.

    gate_input (T, B, G·H): the input side of the gates, normalised, with both biases.
    """
    assert gate_input is not None
    B, H = cells.shape[1:]
    preact = torch.empty(B, len(spec.gates) * H, dtype=cells.dtype, device=cells.device)
    product = torch.empty_like(preact)
    projected = weights.weight_hr is not None
    regularized, resets = order.regularized, order.reset_bytes
    rules, of_kernels = regularized.rules, regularized.for_kernels()
    begun = order.resets[..., None] if order.resets is not None else None
    hidden = torch.empty(1, B, H, dtype=output.dtype, device=output.device) if projected else output
    in_halves = spec.full and spec.output_current
    computed = torch.empty(1, B, H, dtype=cells.dtype, device=cells.device) if in_halves else None
    for step in order.steps(saved=cells.shape[0] > 1):
        h, h_index = (h_0.unsqueeze(0), 0) if step.h_index is None else (output, step.h_index)
        c, c_slot = cells, step.previous
        if begun is not None:
            h, h_index = h[h_index].masked_fill(begun[step.t], 0).unsqueeze(0), 0
            if spec.full:
                c, c_slot = c[c_slot].masked_fill(begun[step.t], 0).unsqueeze(0), 0
        reads = (h, c, weights, spec, step.t, h_index, c_slot, regularized.hidden)
        gate_preactivations(preact, None, gate_input, *reads, product=product)
        zoned = h if rules.zoneout_h and not projected else None
        buffers = (product, preact, cells, computed, zoned, h_index, hidden, 0 if projected else step.t, gates)
        variant = (weights, spec, of_kernels, step, resets)
        if computed is not None:
            normalized_forward(*buffers, *variant, update_hidden=False)
            add_output_peephole(preact, computed, weights, spec, 0)
            normalized_forward(*buffers, *variant, update_cell=False)
        else:
            normalized_forward(*buffers, *variant)
        if weights.weight_hr is not None:
            before = h[h_index] if rules.zoneout_h else None
            project(hidden[0], before, regularized.at(step.t), weights.weight_hr, output[step.t])


def backward(
    grad_output: Tensor | None, grad_cells: Tensor | None, dh: Tensor, dc: Tensor, weights: LSTMWeights,
    spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    kept: Tensor | None, products: Products,
) -> None:  # fmt: skip
    """Compute all steps backward, into d_gates (and d_hidden), in place in dh, dc and kept, as `sequence_stepwise`.

    products: of all steps; their d_cell is added to. The gradients of the products themselves are not kept, but those
    of the pre-activations, from which they follow.
    """
    H = cells.shape[-1]
    projected = d_hidden is not None
    dr = torch.empty(dh.shape[0], H, dtype=dh.dtype, device=dh.device) if projected else dh
    d_product = torch.empty_like(d_gates[0])
    regularized, resets = order.regularized, order.reset_bytes
    of_kernels = regularized.for_kernels()
    v_previous, v_o = None, None
    if spec.full and weights.weight_ch is not None:
        v_previous = spec.previous_peephole(weights.weight_ch)
        v_o = spec.split_peephole(weights.weight_ch)["o"] if spec.output_current else None
    computed = torch.empty_like(dc) if v_o is not None else None
    begun = order.resets[..., None] if order.resets is not None else None
    for step in reversed(list(order.steps(saved=True))):
        d_step = d_gates[step.t]
        if grad_cells is not None:
            dc += grad_cells[step.t]
        if d_hidden is not None and weights.weight_hr is not None:
            of_output = None if grad_output is None else grad_output[step.t]
            unproject(dh, of_output, kept, regularized.at(step.t), weights.weight_hr, d_hidden[step.t], dr)
        of_all = None if projected else grad_output
        buffers = (of_all, dr, None if projected else kept, dc, computed, gates, cells, products, d_gates, d_product)
        variant = (weights, spec, of_kernels, step, resets)
        if computed is not None and v_o is not None:
            normalized_backward(*buffers, *variant, grad_cell=False)
            computed += d_step[:, -H:] @ v_o  # o is the last gate block
            normalized_backward(*buffers, *variant, grad_hidden=False)
        else:
            normalized_backward(*buffers, *variant)
        if v_previous is not None:
            dc += d_step @ v_previous
        torch.mm(d_product, weights.weight_hh, out=dh)
        carry(dh, dc, kept if projected else None, regularized, None if begun is None else begun[step.t])
