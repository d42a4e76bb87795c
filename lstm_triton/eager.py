"""The steps of one direction of one layer in PyTorch's own operators: the `torch` backend of every variant.

The mathematics of `reference.py`, forward and backward written out, so that a step is one matmul and a few in-place
operators and everything that does not depend on the order of the steps is done for all of them at once. Computes in
the accumulator type (float32; float64 for float64). Same interface as `lstm_triton_kernels.sequence_stepwise`.
"""

from __future__ import annotations

import torch
from lstm_triton_kernels.order import steps
from torch import Tensor

from lstm_triton.spec import LSTMSpec, LSTMWeights


def fuses_input(T: int) -> bool:
    """Whether the input side of the gates is computed in the step itself: never here."""
    return False


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, reverse: bool,
    output: Tensor, gates: Tensor | None, cells: Tensor, resets: Tensor | None = None,
) -> None:  # fmt: skip
    """All steps forward, into output, gates and cells; see `sequence_stepwise.forward`."""
    assert gate_input is not None
    H = cells.shape[-1]
    dtype = cells.dtype
    w = weights.map(lambda weight: weight.to(dtype))
    v = spec.split_peephole(w.weight_ch) if w.weight_ch is not None else {}
    v_previous = spec.previous_peephole(w.weight_ch).t() if spec.full and w.weight_ch is not None else None
    w_hh = w.weight_hh.t()
    scratch = torch.empty(gate_input.shape[1:], dtype=dtype, device=cells.device)
    hidden = torch.empty(cells.shape[1:], dtype=dtype, device=cells.device)
    sigmoid_blocks = slice(0, H if spec.coupled else 2 * H)
    begun = resets.view(torch.bool)[..., None] if resets is not None else None
    h = h_0.to(dtype)
    for step in steps(gate_input.shape[0], reverse, saved=cells.shape[0] > 1):
        a = gates[step.t] if gates is not None and gates.dtype == dtype else scratch
        c_previous, c = cells[step.previous], cells[step.current]
        if begun is not None:
            h, c_previous = h.masked_fill(begun[step.t], 0), c_previous.masked_fill(begun[step.t], 0)
        torch.addmm(gate_input[step.t].to(dtype), h, w_hh, out=a)
        if v_previous is not None:
            a.addmm_(c_previous, v_previous)
        block = spec.split_gates(a)
        if spec.diagonal:
            for gate in spec.previous_gates:
                block[gate].addcmul_(v[gate], c_previous)
        a[:, sigmoid_blocks].sigmoid_()
        f, g, o = block["f"], block["g"].tanh_(), block["o"]
        if spec.coupled:
            torch.lerp(g, c_previous, f, out=c)
        else:
            torch.mul(f, c_previous, out=c).addcmul_(block["i"], g)
        if spec.output_current:
            o.addmm_(c, v["o"].t()) if spec.full else o.addcmul_(v["o"], c)
        o.sigmoid_()
        torch.tanh(c, out=hidden).mul_(o)
        h = hidden if w.weight_hr is None else hidden @ w.weight_hr.t()
        output[step.t] = h
        if gates is not None and a is scratch:
            gates[step.t] = a


def backward(
    grad_output: Tensor | None, dh: Tensor, dc: Tensor, weights: LSTMWeights, spec: LSTMSpec, reverse: bool,
    gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    resets: Tensor | None = None, grad_cells: Tensor | None = None,
) -> None:  # fmt: skip
    """All steps backward, into d_gates (and d_hidden), in place in dh and dc; see `sequence_stepwise.backward`."""
    T = gates.shape[0]
    dtype = cells.dtype
    w = weights.map(lambda weight: weight.to(dtype))
    v = spec.split_peephole(w.weight_ch) if w.weight_ch is not None else {}
    v_previous = spec.previous_peephole(w.weight_ch) if spec.full and w.weight_ch is not None else None
    c_previous, c = (cells[1:], cells[:-1]) if reverse else (cells[:-1], cells[1:])
    begun = resets.view(torch.bool)[..., None] if resets is not None else None
    if begun is not None:
        c_previous = c_previous.masked_fill(begun, 0)

    # d_gates = (dc, dh) times factors that no later step changes: all steps at once.
    act = spec.split_gates(gates.to(dtype))
    f, g, o = act["f"], act["g"], act["o"]
    i = 1 - f if spec.coupled else act["i"]
    tanh_c = c.tanh()
    dc_by_dh = o * (1 - tanh_c * tanh_c)
    d_o_by_dh = tanh_c * o * (1 - o)
    by_dc = {"f": (c_previous - g if spec.coupled else c_previous) * f * (1 - f), "g": i * (1 - g * g)}
    if not spec.coupled:
        by_dc["i"] = g * i * (1 - i)

    exact = d_gates.dtype == dtype
    scratch = torch.empty(gates.shape[1:], dtype=dtype, device=cells.device)
    grad_h = dh.to(dtype)
    for step in reversed(list(steps(T, reverse, saved=True))):
        t = step.t
        if grad_output is not None:
            grad_h = grad_h + grad_output[t]
        grad_r = grad_h
        if d_hidden is not None and w.weight_hr is not None:
            d_hidden[t] = grad_h
            grad_r = grad_h @ w.weight_hr
        d_step = d_gates[t] if exact else scratch
        d = spec.split_gates(d_step)
        torch.mul(grad_r, d_o_by_dh[t], out=d["o"])
        dc.addcmul_(grad_r, dc_by_dh[t])
        if grad_cells is not None:
            dc += grad_cells[t]
        if spec.output_current:
            dc.addmm_(d["o"], v["o"]) if spec.full else dc.addcmul_(d["o"], v["o"])
        for gate, factor in by_dc.items():
            torch.mul(dc, factor[t], out=d[gate])
        dc.mul_(f[t])
        if v_previous is not None:
            dc.addmm_(d_step, v_previous)
        if spec.diagonal:
            for gate in spec.previous_gates:
                dc.addcmul_(d[gate], v[gate])
        grad_h = d_step @ w.weight_hh
        if begun is not None:
            grad_h.masked_fill_(begun[t], 0)
            dc.masked_fill_(begun[t], 0)
        if not exact:
            d_gates[t] = d_step
    dh.copy_(grad_h)
