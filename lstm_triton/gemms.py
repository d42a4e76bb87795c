"""The large products before and after the loop over the steps, the same around every engine; for one direction.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), G gate
blocks, Q peephole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton.layer_norm import normalized


def project_input(x: Tensor, w: LSTMWeights, out: Tensor | None = None) -> Tensor:
    """Return the input side of all gates of all steps, x (T, B, I) -> (T, B, G·H), both biases included: one GEMM."""
    T, B, I = x.shape  # noqa: E741
    rows = x.reshape(T * B, I)
    out = out.view(T * B, out.shape[2]) if out is not None else None
    if w.bias_ih is None or w.bias_hh is None:
        projected = torch.mm(rows, w.weight_ih.t(), out=out)
    else:
        projected = torch.addmm(w.bias_ih + w.bias_hh, rows, w.weight_ih.t(), out=out)
    return projected.view(T, B, projected.shape[1])


def activated_gates(
    x: Tensor, h_0: Tensor, output: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order
) -> Tensor:
    """Return the activated gates (T, B, G·H), computed again from the states that the forward pass left.

    x (T, B, I), h_0 (B, P), output (T, B, P), cells (T + 1, B, H). All steps at once, and all that the gates read in
    one GEMM: the pre-activations are rounded once, as the gate inputs are in the forward pass.
    """
    reads, weights = [x, order.hidden_read(output, h_0)], [w.weight_ih, w.weight_hh]
    if spec.full and w.weight_ch is not None:
        reads.append(order.cells_read(cells)[0].to(x.dtype))
        weights.append(spec.previous_peephole(w.weight_ch))
    gates = project_input(torch.cat(reads, -1), w._replace(weight_ih=torch.cat(weights, 1)))
    return activate(gates, cells, w, spec, order)


def activate(gates: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order) -> Tensor:
    """Return the gates (T, B, G·H) activated, in place, from their pre-activations without what they read last.

    That is of diagonal peepholes all, and of full ones that of o on c~. cells (T + 1, B, H).
    """
    previous, current = order.cells_read(cells)
    v = spec.split_peephole(w.weight_ch) if w.weight_ch is not None else {}
    for gate, block in spec.split_gates(gates).items():  # o is the last, and may read what the others make
        a = block.to(cells.dtype)
        if gate == "o" and spec.output_current:
            current = computed_cells(gates, cells, spec, order)
        if gate in v and spec.diagonal:
            a = torch.addcmul(a, previous if gate in spec.previous_gates else current, v[gate])
        elif gate in v and gate not in spec.previous_gates:
            a = a + current @ v[gate].t().to(current.dtype)
        if gate != "g":
            block.copy_(a.sigmoid())
        elif not spec.identity_input:
            block.copy_(a.tanh())
    return gates


def computed_cells(gates: Tensor, cells: Tensor, spec: LSTMSpec, order: Order) -> Tensor:
    """Return c~ (T, B, H), the cell state that each step computed: c_t but for zoneout.

    gates (T, B, G·H): of the activated gates those of i, f and g are read; cells (T + 1, B, H).
    """
    regularized = order.regularized
    if regularized.rules.zoneout_c == 0:
        return order.cells_written(cells)
    previous, current = order.cells_read(cells)
    act = spec.split_gates(gates.to(cells.dtype))
    i = 1 - act["f"] if spec.coupled else act["i"]
    computed = regularized.clip_cell(act["f"] * previous + i * regularized.drop_candidate(act["g"]))
    return computed if regularized.codes is None else regularized.zone_cell(current, computed)


def input_gradient(d_gates: Tensor, weights: Sequence[LSTMWeights]) -> Tensor:
    """Return the gradient of the input (T, B, I) from that of the gates of all directions, (D, T, B, G·H)."""
    rows = d_gates.flatten(1, 2)
    gradient = rows[0] @ weights[0].weight_ih
    for d_rows, w in zip(rows[1:], weights[1:], strict=True):
        gradient.addmm_(d_rows, w.weight_ih)
    return gradient.view(*d_gates.shape[1:3], gradient.shape[1])


def initial_hidden_gradient(d_gates: Tensor, w: LSTMWeights, order: Order) -> Tensor:
    """Return the gradient of h_0 (B, P) through the gates, from that of the gates, (T, B, G·H)."""
    return order.regularized.drop_hidden(order.read_first(order.first(d_gates)) @ w.weight_hh)


def weight_gradients(
    wanted: Sequence[str], x: Tensor, h_0: Tensor, output: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    gates: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the gradients of the parameters named in `wanted`: sums over all T and B, each one GEMM.

    x (T, B, I), h_0 (B, P), output (T, B, P), d_gates and gates (T, B, G·H), d_hidden (T, B, P), cells (T + 1, B, H);
    d_gates and output are zero beyond a row's length.
    """
    d_rows = d_gates.flatten(0, 1)
    gradients = {}
    if "weight_ih" in wanted:
        gradients["weight_ih"] = d_rows.t() @ x.flatten(0, 1)
    if "weight_hh" in wanted:
        d_rest = order.after_first(d_gates).flatten(0, 1)
        h_rest = order.hidden_read_after_first(output).reshape(len(d_rest), h_0.shape[1])
        first = order.first(d_gates).t() @ order.hidden_read_first(h_0)
        gradients["weight_hh"] = torch.addmm(first, d_rest.t(), h_rest)
    if "bias_ih" in wanted or "bias_hh" in wanted:
        bias = d_rows.sum(0)
        gradients |= {name: bias for name in ("bias_ih", "bias_hh") if name in wanted}
    if "weight_hr" in wanted and d_hidden is not None:
        gradients["weight_hr"] = d_hidden.flatten(0, 1).t() @ unprojected(gates, cells, w, spec, order).flatten(0, 1)
    if "weight_ch" in wanted:
        gradients["weight_ch"] = peephole_gradient(d_gates, gates, cells, spec, order)
    return gradients


def peephole_gradient(d_gates: Tensor, gates: Tensor, cells: Tensor, spec: LSTMSpec, order: Order) -> Tensor:
    """Return the gradient of weight_ch: of each block d_gates (T, B, G·H) times the c that it read."""
    d = spec.split_gates(d_gates)
    previous, current = order.cells_read(cells)
    if spec.output_current:
        current = computed_cells(gates, cells, spec, order)
    blocks = []
    for gate in spec.peephole_gates:
        read = previous if gate in spec.previous_gates else current
        if spec.full:
            d_rows = d[gate].flatten(0, 1)
            blocks.append(d_rows.t() @ read.flatten(0, 1).to(d_rows.dtype))
        else:
            blocks.append((d[gate] * read).sum((0, 1)).to(d_gates.dtype))
    return torch.cat(blocks)


def projected(gates: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order) -> Tensor:
    """Return W_hr times `unprojected` of every step, (T, B, P), from what the forward pass saved."""
    assert w.weight_hr is not None
    return unprojected(gates, cells, w, spec, order) @ w.weight_hr.t()


def unprojected(gates: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order) -> Tensor:
    """Return o tanh(c~) of every step, (T, B, H), in the type of the gates; c~ normalised, where the layer is."""
    c = computed_cells(gates, cells, spec, order)
    if w.weight_ln_c is not None:
        c = normalized(c, w.weight_ln_c, w.bias_ln_c)
    return (spec.split_gates(gates)["o"] * output_activation(c, spec)).to(gates.dtype)


def output_activation(c: Tensor, spec: LSTMSpec) -> Tensor:
    """Return what o is multiplied with, from c~ (..., H): tanh(c~), or c~ itself."""
    return c if spec.identity_output else c.tanh()
