"""The steps of one direction of one layer in PyTorch's own operators: the `torch` backend of every variant.

The mathematics of `reference.py`, forward and backward, so that a step is one product and a few in-place operators, and
everything that does not depend on the order of the steps is computed for all of them at once. Computes in
the accumulator type (float32; float64 for float64). Same interface as `lstm_triton_kernels.sequence_stepwise`.

Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else H), G gate blocks. What a step
costs beside its product is mostly tanh and the calls of the operators. So a step of `forward` works on gates (G, B, H):
each is one contiguous block, and those before g (i and f, or f alone) are adjacent and take one operator together. And
the product is taken in blocks of columns, into contiguous memory: what PyTorch multiplies with on a CPU divides few
rows badly among threads. With 2 threads (AMD EPYC) and weight_hh (4 * 512, 512), 32 rows take 0.39 ms instead of 0.57.
"""

from __future__ import annotations

import math

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import NONE, UNREGULARIZED, Regularized
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import gemms

BACKWARD_BLOCKS = 4
"""Blocks of columns of the product with weight_hh in the backward pass, where P divides so; 2 are as fast."""

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
"""(d, y, grad_input=out): d y (1 - y) in one operator."""

tanh_backward = torch.ops.aten.tanh_backward.grad_input
"""(d, y, grad_input=out): d (1 - y^2) in one operator."""


def forward(
    x: Tensor, gate_input: Tensor | None, h_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order,
    output: Tensor, gates: Tensor | None, cells: Tensor,
) -> None:  # fmt: skip
    """Compute all steps forward, into output, gates and cells; see `sequence_stepwise.forward`."""
    assert gate_input is not None
    G, (B, P), H = len(spec.gates), h_0.shape, cells.shape[-1]
    dtype = cells.dtype
    w = weights.map(lambda weight: weight.to(dtype))
    w_hh = in_blocks(w.weight_hh.t(), G)
    v_if, v_o = split_peephole(w.weight_ch, spec, H)
    v_previous = None
    if spec.full and w.weight_ch is not None:
        v_previous = in_blocks(spec.previous_peephole(w.weight_ch).t(), G)

    # Views of every step, in one call each: indexing costs as much as a small operator.
    inputs, outputs, states = in_blocks(gate_input, G).unbind(), output.unbind(), cells.unbind()
    saved = in_blocks(gates, G).unbind() if gates is not None else None
    begun = order.resets[..., None] if order.resets is not None else None

    a = torch.empty(G, B, H, dtype=dtype, device=cells.device)
    a_if, i, f, g, o = a[:-2], a[0], a[-3], a[-2], a[-1]
    hidden = torch.empty_like(o)
    h = hidden if w.weight_hr is None else torch.empty(B, P, dtype=dtype, device=cells.device)
    h.copy_(h_0)
    h_of_gates = h.expand(G, B, P)
    rules = order.regularized.rules
    for step in order.steps(saved=len(states) > 1):
        c_previous, c = states[step.previous], states[step.current]
        own = order.regularized if rules == NONE else order.regularized.at(step.t)
        if begun is not None:
            h.masked_fill_(begun[step.t], 0)
            c_previous = c_previous.masked_fill(begun[step.t], 0)
        h_read = h_of_gates if own.hidden is None else own.drop_hidden(h).expand(G, B, P)
        torch.baddbmm(inputs[step.t].to(dtype), h_read, w_hh, out=a)
        if v_previous is not None:
            a.baddbmm_(c_previous.expand(G, B, H), v_previous)
        if spec.diagonal:
            a_if.addcmul_(v_if, c_previous)
            if not spec.output_current:
                o.addcmul_(v_o, c_previous)
        a_if.sigmoid_()
        if not spec.identity_input:
            g.tanh_()
        g_read = own.drop_candidate(g)
        if spec.coupled:
            torch.lerp(g_read, c_previous, f, out=c)
        else:
            torch.mul(f, c_previous, out=c).addcmul_(i, g_read)
        if rules.cell_clip:
            c.clamp_(-rules.cell_clip, rules.cell_clip)
        if spec.output_current:
            o.addmm_(c, v_o.t()) if spec.full else o.addcmul_(v_o, c)
        o.sigmoid_()
        h_previous = h.clone() if rules.zoneout_h else h
        if spec.identity_output:
            torch.mul(c, o, out=hidden)
        else:
            torch.tanh(c, out=hidden).mul_(o)
        if w.weight_hr is not None:
            torch.mm(hidden, w.weight_hr.t(), out=h)
            if rules.proj_clip:
                h.clamp_(-rules.proj_clip, rules.proj_clip)
        if rules.zoneout_h:
            h.copy_(own.zone_hidden(h, h_previous))
        if rules.zoneout_c:
            c.copy_(own.zone_cell(c, c_previous))
        outputs[step.t].copy_(h)
        if saved is not None:
            saved[step.t].copy_(a)


def backward(
    grad_output: Tensor | None, grad_cells: Tensor | None, dh: Tensor, dc: Tensor, weights: LSTMWeights,
    spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    kept: Tensor | None = None,
) -> None:  # fmt: skip
    """Compute all steps backward, into d_gates (and d_hidden), in place in dh, dc and kept, as `sequence_stepwise`."""
    (B, P), H = dh.shape, cells.shape[-1]
    dtype = cells.dtype
    w = weights.map(lambda weight: weight.to(dtype))
    _, v_o = split_peephole(w.weight_ch, spec, H)
    v_previous = spec.previous_peephole(w.weight_ch) if spec.full and w.weight_ch is not None else None
    c_previous, _ = order.cells_read(cells)
    c, regularized = gemms.computed_cells(gates, cells, spec, order), order.regularized
    rules = regularized.rules
    begun = order.resets[..., None] if order.resets is not None else None

    # A step's gradients are dh and dc times factors, those of the gates already where the gradients are to be.
    d = d_gates if d_gates.dtype == dtype else torch.empty_like(d_gates, dtype=dtype)
    dc_by_dh, dc_by_dc = (by.unbind() for by in factors(gates.to(dtype), c_previous, c, w, spec, d, regularized))
    d_steps, d_ifg, d_o = d.unbind(), d[..., :-H].unflatten(-1, (-1, H)).unbind(), d[..., -H:].unbind()

    n = math.gcd(P, BACKWARD_BLOCKS)
    w_hh, d_of_blocks = in_blocks(w.weight_hh, n), d.expand(n, *d.shape).unbind(1)
    product = torch.empty(n, B, P // n, dtype=dtype, device=cells.device)
    product.copy_(in_blocks(dh, n))
    grad_h = torch.empty(B, P, dtype=dtype, device=cells.device)
    grad_h_blocks = in_blocks(grad_h, n)
    grad_r = grad_h if w.weight_hr is None else torch.empty_like(dc)
    of_output = in_blocks(grad_output, n).unbind() if grad_output is not None else None
    of_cells = grad_cells.unbind() if grad_cells is not None else None
    dropped = in_blocks(regularized.hidden.to(dtype), n) if regularized.hidden is not None else None
    dc_of_gates = dc[:, None]
    for step in reversed(list(order.steps(saved=True))):
        t = step.t
        if of_output is not None:
            torch.add(product, of_output[t], out=grad_h_blocks)
        else:
            grad_h_blocks.copy_(product)
        if of_cells is not None:
            dc += of_cells[t]
        if rules.zoneout_c:
            of_computed, kept_c = regularized.at(t).split_cell(dc)
            dc.copy_(of_computed)
        if kept is not None or regularized.clipped is not None:
            of_computed, of_previous = regularized.at(t).split_hidden(grad_h if kept is None else grad_h + kept)
            grad_h.copy_(of_computed)
            if kept is not None:
                kept.copy_(of_previous)
        if d_hidden is not None and w.weight_hr is not None:
            d_hidden[t] = grad_h
            torch.mm(grad_h, w.weight_hr, out=grad_r)
        d_o[t].mul_(grad_r)
        dc.addcmul_(grad_r, dc_by_dh[t])
        if spec.full and spec.output_current:
            dc.addmm_(d_o[t], v_o)
        d_ifg[t].mul_(dc_of_gates)
        dc.mul_(dc_by_dc[t])
        if v_previous is not None:
            dc.addmm_(d_steps[t], v_previous)
        if spec.diagonal and not spec.output_current:
            dc.addcmul_(d_o[t], v_o)
        if rules.zoneout_c:
            dc += kept_c
        torch.bmm(d_of_blocks[t], w_hh, out=product)
        if dropped is not None:
            product.mul_(dropped)
        if begun is not None:
            product.masked_fill_(begun[t], 0)
            dc.masked_fill_(begun[t], 0)
            if kept is not None:
                kept.masked_fill_(begun[t], 0)
    in_blocks(dh, n).copy_(product)
    if d is not d_gates:
        d_gates.copy_(d)


def factors(
    gates: Tensor, c_previous: Tensor, c: Tensor, w: LSTMWeights, spec: LSTMSpec, d: Tensor,
    regularized: Regularized = UNREGULARIZED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the factors of the gradients of a step, for all steps at once; gates (T, B, G·H), the rest (T, B, H).

    - d: (T, B, G·H), out: the gate gradients by dh (o) and by dc (the others)
    - returned: dc by dh, and dc_{t-1} by dc, each with what comes through diagonal peepholes. But not o's on c_{t-1},
      nor full ones
    """
    v_if, v_o = split_peephole(w.weight_ch, spec, c.shape[-1])
    act, by = spec.split_gates(gates), spec.split_gates(d)
    f, g, o = act["f"], act["g"], act["o"]
    g_read = regularized.drop_candidate(g)
    if spec.identity_output:
        sigmoid_backward(c, o, grad_input=by["o"])
        dc_by_dh = o.clone()
    else:
        tanh_c = c.tanh()
        sigmoid_backward(tanh_c, o, grad_input=by["o"])
        dc_by_dh = tanh_backward(o, tanh_c, grad_input=tanh_c)
    i = 1 - f if spec.coupled else act["i"]
    if spec.identity_input:
        by["g"].copy_(i)
    else:
        tanh_backward(i, g, grad_input=by["g"])
    if spec.coupled:
        sigmoid_backward(c_previous - g_read, f, grad_input=by["f"])
    else:
        sigmoid_backward(c_previous, f, grad_input=by["f"])
        sigmoid_backward(g_read, act["i"], grad_input=by["i"])
    if g_read is not g:
        by["g"].copy_(regularized.drop_candidate(by["g"]))
    if regularized.rules.cell_clip:
        beyond = c.abs() >= regularized.rules.cell_clip
        f = f.masked_fill(beyond, 0)
        for gate in spec.gates[:-1]:
            by[gate].masked_fill_(beyond, 0)
    if not spec.diagonal:
        return dc_by_dh, f
    dc_by_dc = torch.addcmul(f, by["f"], v_if[-1])
    if not spec.coupled:
        dc_by_dc.addcmul_(by["i"], v_if[0])
    if spec.output_current:
        dc_by_dh.addcmul_(by["o"], v_o)
    return dc_by_dh, dc_by_dc


def split_peephole(weight_ch: Tensor | None, spec: LSTMSpec, H: int) -> tuple[Tensor, Tensor]:
    """Return the peephole of the gates before g, (1 or 2, 1, H), and that of o, (1, H); full (1 or 2, H, H), (H, H).

    Empty where the variant has none.
    """
    if weight_ch is None:
        return torch.empty(0), torch.empty(0)
    v = weight_ch.view(-1, H if spec.full else 1, H)
    return v[:-1], v[-1]


def in_blocks(tensor: Tensor, n: int) -> Tensor:
    """Return rows (..., R, n·C) as n blocks of columns, (..., n, R, C): a view."""
    return tensor.unflatten(-1, (n, tensor.shape[-1] // n)).transpose(-3, -2)
