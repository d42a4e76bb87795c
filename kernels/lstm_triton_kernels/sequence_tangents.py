"""The tangents of a whole sequence step by step, for its second derivative, and the sources of the backward pass.

Per step the recurrent matmul, then the elementwise kernel, as in `sequence_stepwise`; the sources take one launch for
all steps. Any H, any variant. A dot marks the tangent of a value; `double_backward.py` of lstm_triton has the
mathematics.

Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else H), G gate blocks. One
direction of one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lstm_triton_kernels.cell_tangents import cell_sources, cell_tangents
from lstm_triton_kernels.gates import add_output_peephole, gate_preactivations
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights


def forward(
    h_0_dot: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor,
    output_dot: Tensor, gates_dot: Tensor, cells_dot: Tensor,
) -> None:  # fmt: skip
    """Compute the tangents of all steps, into output_dot, gates_dot and cells_dot.

    - h_0_dot: (B, P); that of c_0 stands in its slot of cells_dot
    - order: of the steps, of rows of full length
    - gates (T, B, G·H) activated, cells (T + 1, B, H): saved by the forward pass
    - output_dot: (T, B, P), columns contiguous, out; in: with a projection what its own tangent adds
    - gates_dot: (T, B, G·H), out: of the activated gates; in: of the pre-activations, but for what h_{t-1} and c_{t-1}
      add through the weights
    - cells_dot: (T + 1, B, H), accumulator type, out
    """
    B = output_dot.shape[1]
    H = cells.shape[-1]
    preact_dot = torch.empty(B, len(spec.gates) * H, dtype=cells.dtype, device=cells.device)
    projected = weights.weight_hr is not None
    begun = order.resets[..., None] if order.resets is not None else None
    resets = order.reset_bytes
    hidden = torch.empty(1, B, H, dtype=output_dot.dtype, device=cells.device) if projected else output_dot
    for step in order.steps(saved=True):
        h, h_index = (h_0_dot.unsqueeze(0), 0) if step.h_index is None else (output_dot, step.h_index)
        c, c_slot = cells_dot, step.previous
        if begun is not None:
            h, h_index = h[h_index].masked_fill(begun[step.t], 0).unsqueeze(0), 0
            if spec.full:
                c, c_slot = c[c_slot].masked_fill(begun[step.t], 0).unsqueeze(0), 0
        gate_preactivations(preact_dot, None, gates_dot, h, c, weights, spec, step.t, h_index, c_slot)
        buffers = (preact_dot, gates, cells, gates_dot, cells_dot, hidden, weights.weight_ch, spec)
        indices = (step, 0 if projected else step.t, resets)
        if spec.full and spec.output_current:
            cell_tangents(*buffers, *indices, update_hidden=False)
            add_output_peephole(preact_dot, cells_dot, weights, spec, step.current)
            cell_tangents(*buffers, *indices, update_cell=False)
        else:
            cell_tangents(*buffers, *indices)
        if weights.weight_hr is not None:
            output_dot[step.t].addmm_(hidden[0], weights.weight_hr.t())


def sources(
    gates: Tensor, gates_dot: Tensor, cells: Tensor, cells_dot: Tensor, dh: Tensor, dh_dot: Tensor | None,
    d_cells: Tensor | None, dc: Tensor, spec: LSTMSpec, order: Order,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return what the tangents of a backward pass have beside the tangents of h_t's and c_t's gradients times factors.

    - gates (T, B, G·H), cells (T + 1, B, H): saved by the forward pass; gates_dot, cells_dot: as `forward` left them
    - dh: (T, B, H), the gradients of o tanh(c_t); dh_dot: (T, B, H), the part of their tangents that is known before
    - d_cells: (T, B, H) accumulator type, gradients of c_t but for what comes through h_t and c_{t+1}; dc: (B, H), the
      same of the last one
    - order: of the steps, of rows of full length
    - returned: of the pre-activations (T, B, G·H), of c_t (T, B, H) and of c_0 (B, H), the latter in the accumulator
      type. Without what comes through peepholes
    """
    of_gates = torch.empty_like(gates)
    of_cells = torch.empty(dh.shape, dtype=cells.dtype, device=cells.device)
    of_c_0 = torch.empty_like(dc)
    dh_dot, d_cells = (None if t is None else t.contiguous() for t in (dh_dot, d_cells))
    given = (gates, gates_dot, cells, cells_dot, dh.contiguous(), dh_dot, d_cells, dc.contiguous())
    cell_sources(of_gates, of_cells, of_c_0, *given, spec, order.reverse, order.reset_bytes)
    return of_gates, of_cells, of_c_0
