"""One layer by the persistent kernels: the large GEMMs before and after, all directions in one launch a pass.

The counterpart of `layer.py`, which leaves the steps to a backend one direction at a time. Imported when first used: it
needs triton. Shapes: T time steps, B batch rows, I input features, H hidden units, D directions, G gate blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.persistent_plan import PersistentPlan, Recurrence, installed_release, persistent_plan
from lstm_triton_kernels.plan import accumulator_dtype, matmul_precision
from torch import Tensor

from lstm_triton import layer
from lstm_triton.layer import Keep, LayerGradients, LayerResult, Needs
from lstm_triton.spec import LSTMSpec, LSTMWeights


def plan(c_0: Tensor, dtype: torch.dtype, spec: LSTMSpec, backward: bool, ragged: bool) -> PersistentPlan:
    """The plan of a pass for states (D, B, H); ragged: with lengths or resets.

    Raises RuntimeError with the reason where there is none.
    """
    D, B, H = c_0.shape
    work = Recurrence.of(spec, B, H, D, dtype, matmul_precision(), backward, ragged)
    found = persistent_plan(work, gpu_of(c_0.device), sequence_persistent.preference(), installed_release())
    if isinstance(found, str):
        raise RuntimeError(f"strategy 'persistent' cannot run here: {found}")
    return found


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, keep: Keep,
    lengths: Tensor | None = None, resets: Tensor | None = None,
) -> LayerResult:  # fmt: skip
    """As `layer.forward`; lengths (B,) and resets (T, B) bool on the device of x."""
    T, B, _ = x.shape
    D, _, H = c_0.shape
    gates = torch.empty(D, T, B, len(spec.gates) * H, dtype=x.dtype, device=x.device)
    for direction, w in enumerate(weights):
        layer.project_input(x, w, out=gates[direction])
    states = sequence_persistent.forward(
        gates,
        h_0.contiguous(),
        c_0.contiguous(),
        *recurrent_weights(weights),
        spec,
        plan(c_0, x.dtype, spec, backward=False, ragged=lengths is not None or resets is not None),
        save=keep.save or keep.states,
        save_gates=keep.gates,
        lengths=lengths,
        resets=layer.as_bytes(resets),
    )
    cells = states.cells if states.cells is not None else x.new_empty(0, dtype=accumulator_dtype(x.dtype))
    return LayerResult(
        states.hidden[:T],
        states.h_n,
        states.c_n,
        layer.cell_states(cells, lengths, x.dtype) if keep.states else x.new_empty(0),
        gates if keep.gates else x.new_empty(0),
        cells if keep.save else cells.new_empty(0),
    )


def backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, grad_states: Tensor | None,
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights],
    output: Tensor, gates: Tensor, cells: Tensor, spec: LSTMSpec, needs: Needs,
    lengths: Tensor | None = None, resets: Tensor | None = None,
) -> LayerGradients:  # fmt: skip
    """As `layer.backward`."""
    D, _, H = c_0.shape
    if gates.numel() == 0:
        sides = [slice(direction * H, (direction + 1) * H) for direction in range(D)]
        gates = torch.stack([
            layer.activated_gates(
                x, h_0[n], output[:, :, sides[n]], cells[n], w, spec, n == 1, lengths, resets
            ) for n, w in enumerate(weights)
        ])  # fmt: skip
    w_hh, w_ch = recurrent_weights(weights)
    d_gates, dc = sequence_persistent.backward(
        contiguous(grad_output),
        contiguous(grad_states),
        contiguous(grad_h_n),
        contiguous(grad_c_n),
        gates,
        cells,
        w_hh,
        w_ch,
        spec,
        plan(c_0, x.dtype, spec, backward=True, ragged=lengths is not None or resets is not None),
        lengths=lengths,
        resets=layer.as_bytes(resets),
    )
    grad_x = None
    grad_h_0, grad_weights = [], []
    for n, w in enumerate(weights):
        reverse = n == 1
        d_rows = d_gates[n].flatten(0, 1)
        if needs.x:
            grad_x = d_rows @ w.weight_ih if grad_x is None else grad_x.addmm_(d_rows, w.weight_ih)
        # The first step of each row read h_0, and with a full peephole c_0, unless it was reset.
        d_first = layer.at_first_step(d_gates[n], reverse, lengths)
        if resets is not None:
            d_first = d_first.masked_fill(layer.at_first_step(resets, reverse, lengths)[:, None], 0)
        if needs.h_0:
            grad_h_0.append(d_first @ w.weight_hh)
        if needs.c_0 and spec.full and w.weight_ch is not None:
            dc[n] += d_first @ spec.previous_peephole(w.weight_ch)
        of_direction = (d_gates[n], None, gates[n], cells[n], spec, reverse, lengths, resets)
        own = output[:, :, n * H : (n + 1) * H]
        grad_weights.append(layer.weight_gradients(needs.weights[n], x, h_0[n], own, *of_direction))
    return LayerGradients(
        None if grad_x is None else grad_x.view(x.shape),
        torch.stack(grad_h_0) if needs.h_0 else None,
        dc.to(x.dtype) if needs.c_0 else None,
        grad_weights,
    )


def recurrent_weights(weights: Sequence[LSTMWeights]) -> tuple[Tensor, Tensor | None]:
    """weight_hh (D, G·H, H) and weight_ch (D, Q·H) or (D, Q·H, H) of all directions, contiguous."""
    w_hh, w_ch = [w.weight_hh for w in weights], [w.weight_ch for w in weights if w.weight_ch is not None]
    return together(w_hh), together(w_ch) if w_ch else None


def together(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors along a new first axis; one alone is not copied if it is contiguous."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].contiguous()[None]


def contiguous(gradient: Tensor | None) -> Tensor | None:
    """A gradient that there is, as the kernels read it."""
    return None if gradient is None else gradient.contiguous()
