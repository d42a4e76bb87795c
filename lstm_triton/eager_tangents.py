"""The tangents of the steps of one direction, in PyTorch's own operators: the second derivative on the `torch` backend.

The mathematics stands in `double_backward.py`; a dot marks a tangent. Computes in the accumulator type (float32;
float64 for float64). Same interface as `lstm_triton_kernels.sequence_tangents`.

Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else H), G gate blocks.
"""

from __future__ import annotations

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton.eager import factors, split_peephole
from lstm_triton.gemms import output_activation


def forward(
    h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, output_dot: Tensor,
    gates_dot: Tensor, cells_dot: Tensor,
) -> None:  # fmt: skip
    """Compute the tangents of all steps; see `sequence_tangents.forward`."""
    H, dtype = cells.shape[-1], cells.dtype
    w = weights.map(lambda weight: weight.to(dtype))
    w_hh = w.weight_hh.t()
    v_if, v_o = split_peephole(w.weight_ch, spec, H)
    v_previous = spec.previous_peephole(w.weight_ch).t() if spec.full and w.weight_ch is not None else None
    begun = order.resets[..., None] if order.resets is not None else None

    # The tangent of a cell state is a sum of those of the gates and of c_{t-1}, each times a factor; so is that of h_t.
    by = torch.empty_like(gates, dtype=dtype)
    c_by_previous: Tensor | None
    h_by_c, c_by_previous = factors(gates.to(dtype), *order.cells_read(cells), w, spec, by)
    a = gates_dot if gates_dot.dtype == dtype else gates_dot.to(dtype)
    steps, by_ifg, by_o = a.unbind(), by[..., :-H].unflatten(-1, (-1, H)).unbind(), by[..., -H:].unbind()
    h_by, c_by, states, outputs = h_by_c.unbind(), c_by_previous.unbind(), cells_dot.unbind(), output_dot.unbind()
    h = h_0.to(dtype)
    parts = torch.empty_like(by_ifg[0]) if len(by) else by
    for step in order.steps(saved=True):
        t, c_previous, c = step.t, states[step.previous], states[step.current]
        if begun is not None:
            h, c_previous = h.masked_fill(begun[t], 0), c_previous.masked_fill(begun[t], 0)
        own = steps[t].addmm_(h, w_hh)
        if v_previous is not None:
            own.addmm_(c_previous, v_previous)
        a_ifg, a_o = own[:, :-H].unflatten(1, (-1, H)), own[:, -H:]
        if spec.diagonal and not spec.output_current:
            a_o.addcmul_(v_o, c_previous)
        torch.mul(a_ifg, by_ifg[t], out=parts)
        torch.sum(parts, 1, out=c).addcmul_(c_by[t], c_previous)
        if spec.full and spec.output_current:
            a_o.addmm_(c, v_o.t())
        h = torch.mul(h_by[t], c).addcmul_(by_o[t], a_o)
        if w.weight_hr is not None:
            h = torch.addmm(outputs[t].to(dtype), h, w.weight_hr.t())
        outputs[t].copy_(h)

    # What diagonal peepholes add to a gate is in the factors above, but for o's on c_{t-1}.
    previous, current = order.cells_read(cells_dot)
    act, dots = spec.split_gates(gates.to(dtype)), spec.split_gates(a)
    if spec.diagonal:
        for gate, v in zip(spec.gates[:-2], v_if, strict=True):
            dots[gate].addcmul_(v, previous)
        if spec.output_current:
            dots["o"].addcmul_(v_o, current)
    for gate, y in act.items():
        if gate != "g":
            dots[gate].mul_(y * (1 - y))
        elif not spec.identity_input:
            dots[gate].mul_(1 - y * y)
    if a is not gates_dot:
        gates_dot.copy_(a)


def sources(
    gates: Tensor, gates_dot: Tensor, cells: Tensor, cells_dot: Tensor, dh: Tensor, dh_dot: Tensor | None,
    d_cells: Tensor | None, dc: Tensor, spec: LSTMSpec, order: Order,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the sources of all steps; see `sequence_tangents.sources`."""
    dtype = cells.dtype
    previous, current = order.cells_read(cells)
    previous_dot, current_dot = order.cells_read(cells_dot)
    act, dot = spec.split_gates(gates.to(dtype)), spec.split_gates(gates_dot.to(dtype))
    f, g, o = act["f"], act["g"], act["o"]
    dh = dh.to(dtype)
    y = output_activation(current, spec)
    slope = torch.ones_like(y) if spec.identity_output else 1 - y * y

    # The gradient of every c_t, as the first backward pass had it.
    every = torch.addcmul(d_cells, dh, o * slope) if d_cells is not None else dh * o * slope
    begun = order.resets[..., None] if order.resets is not None else None
    dc = dc.clone()
    for step in reversed(list(order.steps(saved=True))):
        dc = every[step.t].add_(dc) * f[step.t]
        if begun is not None:
            dc.masked_fill_(begun[step.t], 0)

    of_gates = torch.empty_like(gates_dot)
    of = spec.split_gates(of_gates)
    y_dot = slope * current_dot
    by_o = y_dot * (o * (1 - o)) + y * (1 - 2 * o) * dot["o"]
    by_c = dot["o"] if spec.identity_output else slope * dot["o"] - 2 * o * y * y_dot
    of_o, of_cells = dh * by_o, dh * by_c
    if dh_dot is not None:
        dh_dot = dh_dot.to(dtype)
        of_o.addcmul_(dh_dot, y * (o * (1 - o)))
        of_cells.addcmul_(dh_dot, o * slope)
    of["o"].copy_(of_o)
    i, i_dot = (1 - f, -dot["f"]) if spec.coupled else (act["i"], dot["i"])
    of["g"].copy_(every * (i_dot if spec.identity_input else i_dot * (1 - g * g) - 2 * i * g * dot["g"]))
    read, read_dot = (previous - g, previous_dot - dot["g"]) if spec.coupled else (previous, previous_dot)
    of["f"].copy_(every * (read_dot * (f * (1 - f)) + read * (1 - 2 * f) * dot["f"]))
    if not spec.coupled:
        of["i"].copy_(every * (dot["g"] * (i * (1 - i)) + g * (1 - 2 * i) * dot["i"]))
    through_f = every.mul_(dot["f"])
    if begun is not None:
        through_f = through_f.masked_fill(begun, 0)
    if order.reverse:
        of_cells[1:] += through_f[:-1]
    else:
        of_cells[:-1] += through_f[1:]
    return of_gates, of_cells, order.first(through_f).clone()
