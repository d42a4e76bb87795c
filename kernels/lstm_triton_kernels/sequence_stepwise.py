"""A whole sequence, step by step: per step the recurrent matmul, then the elementwise kernel.

The general strategy: any H, any variant. Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden
size after projection (else H), G gate blocks, Q peephole blocks. One direction of one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_triton_kernels.cell import cell_backward, cell_forward
from lstm_triton_kernels.gates import add_output_peephole, gate_preactivations
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import Regularized
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order,
    output: Tensor, gates: Tensor | None, cells: Tensor,
) -> None:  # fmt: skip
    """Compute all steps forward, into output, gates and cells.

    - x: (T, B, I), read where gate_input (T, B, G·H) is None
    - h_0: (B, P); c_0 stands in its slot of `cells`
    - order: of the steps, of rows of full length
    - output: (T, B, P), columns contiguous, out
    - gates: (T, B, G·H) activated gates, out, perhaps the memory of gate_input: step t is read a launch before it is
      written; None to save none
    - cells: (T + 1, B, H) or (1, B, H), accumulator type, out
    """
    B = output.shape[1]
    H = cells.shape[-1]
    preact = torch.empty(B, len(spec.gates) * H, dtype=cells.dtype, device=cells.device)
    projected = weights.weight_hr is not None
    begun = order.resets[..., None] if order.resets is not None else None
    resets = order.reset_bytes
    hidden = torch.empty(1, B, H, dtype=output.dtype, device=output.device) if projected else output
    regularized = order.regularized
    rules, of_kernels = regularized.rules, regularized.for_kernels()
    for step in order.steps(saved=cells.shape[0] > 1):
        h, h_index = (h_0.unsqueeze(0), 0) if step.h_index is None else (output, step.h_index)
        x_t = x[step.t] if gate_input is None else None
        c, c_slot = cells, step.previous
        if begun is not None:
            h, h_index = h[h_index].masked_fill(begun[step.t], 0).unsqueeze(0), 0
            if spec.full:
                c, c_slot = c[c_slot].masked_fill(begun[step.t], 0).unsqueeze(0), 0
        gate_preactivations(preact, x_t, gate_input, h, c, weights, spec, step.t, h_index, c_slot, regularized.hidden)
        before = h[h_index] if rules.zoneout_h else None
        buffers = (preact, cells, hidden, gates, weights.weight_ch, spec)
        indices = (step.t, 0 if projected else step.t, step.previous, step.current, resets)
        regular = (None if projected else before, of_kernels)
        if spec.full and spec.output_current:
            cell_forward(*buffers, *indices, *regular, update_hidden=False)
            add_output_peephole(preact, cells, weights, spec, step.current)
            cell_forward(*buffers, *indices, *regular, update_cell=False)
        else:
            cell_forward(*buffers, *indices, *regular)
        if weights.weight_hr is not None:
            project(hidden[0], before, regularized.at(step.t), weights.weight_hr, output[step.t])


def project(hidden: Tensor, before: Tensor | None, regularized: Regularized, weight_hr: Tensor, output: Tensor) -> None:
    """Compute h_t (B, P) of a projected layer into output, from o tanh(c~) (B, H) and, with zoneout, h_{t-1}."""
    torch.mm(hidden, weight_hr.t(), out=output)
    if limit := regularized.rules.proj_clip:
        output.clamp_(-limit, limit)
    if before is not None:
        output.copy_(regularized.zone_hidden(output, before))


def unproject(
    dh: Tensor, grad_output: Tensor | None, kept: Tensor | None, regularized: Regularized, weight_hr: Tensor,
    d_hidden: Tensor, d_unprojected: Tensor,
) -> None:  # fmt: skip
    """Compute the gradients of W_hr (o tanh(c~)) into d_hidden (B, P) and of o tanh(c~) into d_unprojected (B, H).

    From that of h_t, the sum of dh, grad_output and kept, each (B, P); kept becomes what zoneout passes on.
    """
    grad_h = dh if grad_output is None else dh + grad_output
    if kept is not None or regularized.clipped is not None:
        grad_h, of_previous = regularized.split_hidden(grad_h if kept is None else grad_h + kept)
        if kept is not None:
            kept.copy_(of_previous)
    d_hidden.copy_(grad_h)
    torch.mm(d_hidden, weight_hr, out=d_unprojected)


def carry(dh: Tensor, dc: Tensor, kept: Tensor | None, regularized: Regularized, begun: Tensor | None) -> None:
    """Make gradients of what a step read those of what the step before left, in place: dh and kept (B, P), dc (B, H).

    begun (B, 1): the rows that are reset before the step; nothing goes there. kept is None where a kernel has done it.
    """
    if regularized.hidden is not None:
        dh *= regularized.hidden
    if begun is not None:
        for gradient in (dh, dc, kept):
            if gradient is not None:
                gradient.masked_fill_(begun, 0)


def backward(
    grad_output: Tensor | None, grad_cells: Tensor | None, dh: Tensor, dc: Tensor, weights: LSTMWeights,
    spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    kept: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute all steps backward, into d_gates; dh and dc become the gradients of h_0 and c_0.

    - grad_output: (T, B, P), columns contiguous, of the output; grad_cells: (T, B, H), of every c_t; None where zero
    - dh: (B, P), gradient of h_n, in place; dc: (B, H) accumulator type, gradient of c_n, in place
    - gates (T, B, G·H), cells (T + 1, B, H): saved by `forward`
    - d_gates: (T, B, G·H) gradients of the pre-activations, out
    - d_hidden: (T, B, P) gradients of W_hr (o tanh(c_t)), out; with a projection only, else None
    - kept: (B, P) accumulator type, of h_n, in place, the gradient that zoneout passes on from h_t to h_{t-1}; zero.
      None without zoneout of h
    """
    H = cells.shape[-1]
    projected = d_hidden is not None
    dr = torch.empty(dh.shape[0], H, dtype=dh.dtype, device=dh.device) if projected else dh
    v_previous, v_o = None, None
    if spec.full and weights.weight_ch is not None:
        v_previous = spec.previous_peephole(weights.weight_ch)
        v_o = spec.split_peephole(weights.weight_ch)["o"] if spec.output_current else None
    begun = order.resets[..., None] if order.resets is not None else None
    resets = order.reset_bytes
    regularized = order.regularized
    rules, of_kernels = regularized.rules, regularized.for_kernels()
    for step in reversed(list(order.steps(saved=True))):
        d_step = d_gates[step.t]
        if grad_cells is not None:
            dc += grad_cells[step.t]
        if d_hidden is not None and weights.weight_hr is not None:
            of_output = None if grad_output is None else grad_output[step.t]
            unproject(dh, of_output, kept, regularized.at(step.t), weights.weight_hr, d_hidden[step.t], dr)
        buffers = (None if projected else grad_output, dr, dc, gates, cells, d_gates, weights.weight_ch, spec)
        indices = (step.t, step.previous, step.current, resets, None if projected else kept, of_kernels)
        if v_o is not None:
            cell_backward(*buffers, *indices, grad_cell=False)
            of_o = d_step[:, -H:] @ v_o  # o is the last gate block
            if not rules.zoneout_c:  # what comes to c~ that comes to c_t
                dc += of_o
            cell_backward(*buffers, *indices, of_o=of_o if rules.zoneout_c else None, grad_hidden=False)
        else:
            cell_backward(*buffers, *indices)
        if v_previous is not None:
            dc += d_step @ v_previous
        torch.mm(d_step, weights.weight_hh, out=dh)
        carry(dh, dc, kept if projected else None, regularized, None if begun is None else begun[step.t])
