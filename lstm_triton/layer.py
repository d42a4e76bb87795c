"""One layer, all its directions: the large GEMMs before and after the steps, the steps left to a backend.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks, Q peephole blocks. Plain functions on tensors, called inside the custom operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from lstm_triton_kernels.order import final_slot, initial_slot
from lstm_triton_kernels.plan import accumulator_dtype
from torch import Tensor

from lstm_triton.spec import LSTMSpec, LSTMWeights


class LayerResult(NamedTuple):
    """What the forward pass of a layer returns.

    - output: (T, B, D·P); h_n: (D, B, P); c_n: (D, B, H), all in the input's type
    - gates: (D, T, B, G·H) activated gates; empty unless saved for the backward pass
    - cells: (D, T + 1, B, H) cell states in the accumulator type; empty unless saved
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor
    cells: Tensor


def result_shapes(
    x: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, save: bool, recompute: bool
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and type of every field of LayerResult, from the arguments of `forward`."""
    T, B, _ = x.shape
    D, _, H = c_0.shape
    P = weights[0].weight_hh.shape[1]
    return (
        ((T, B, D * P), x.dtype),
        ((D, B, P), x.dtype),
        ((D, B, H), x.dtype),
        ((D, T, B, len(spec.gates) * H) if save and not recompute else (0,), x.dtype),
        ((D, T + 1, B, H) if save else (0,), accumulator_dtype(x.dtype)),
    )


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, save: bool, recompute: bool,
    *, steps: ModuleType,
) -> LayerResult:  # fmt: skip
    """x (T, B, I), h_0 (D, B, P), c_0 (D, B, H); `steps` is a module like `eager`.

    `save` for a backward pass; with `recompute` that will compute the gates again, and they are not saved.
    """
    shapes = result_shapes(x, c_0, weights, spec, save, recompute)
    result = LayerResult(*(torch.empty(shape, dtype=dtype, device=x.device) for shape, dtype in shapes))
    T = x.shape[0]
    P = result.h_n.shape[-1]
    x = row_contiguous(x)
    for direction, direction_weights in enumerate(weights):
        w = direction_weights.map(Tensor.contiguous)
        reverse = direction == 1
        output = result.output[:, :, direction * P : (direction + 1) * P]
        gates = result.gates[direction] if save and not recompute else None
        cells = result.cells[direction] if save else torch.empty(1, *c_0.shape[1:], dtype=shapes[4][1], device=x.device)
        cells[initial_slot(T, reverse, save)] = c_0[direction]
        gate_input = None if steps.fuses_input(T) else project_input(x, w)
        steps.forward(x, gate_input, row_contiguous(h_0[direction]), w, spec, reverse, output, gates, cells)
        result.h_n[direction] = output[0 if reverse else T - 1]
        result.c_n[direction] = cells[final_slot(T, reverse, save)]
    return result


class Needs(NamedTuple):
    """Which gradients are wanted; of the weights the names, for each direction."""

    x: bool
    h_0: bool
    c_0: bool
    weights: Sequence[Sequence[str]]


class LayerGradients(NamedTuple):
    """The gradients of the arguments of `forward` that were wanted; None and absent names where none was."""

    x: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    weights: list[dict[str, Tensor]]


def backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights],
    output: Tensor, gates: Tensor, cells: Tensor, spec: LSTMSpec, needs: Needs, *, steps: ModuleType,
) -> LayerGradients:  # fmt: skip
    """The gradients that `needs` names, from those of output, h_n and c_n (None: zero) and what `forward` saved."""
    T, B, I = x.shape  # noqa: E741
    D, _, P = h_0.shape
    grad_output = grad_output.contiguous() if grad_output is not None else None
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs.x and D > 1 else None
    grad_h_0, grad_c_0, grad_weights = [], [], []
    for direction, direction_weights in enumerate(weights):
        w = direction_weights.map(Tensor.contiguous)
        wanted = needs.weights[direction]
        reverse = direction == 1
        columns = slice(direction * P, (direction + 1) * P)
        dh = x.new_zeros(B, P) if grad_h_n is None else grad_h_n[direction].clone(memory_format=torch.contiguous_format)
        dc = torch.zeros(cells.shape[2:], dtype=cells.dtype, device=x.device)
        if grad_c_n is not None:
            dc += grad_c_n[direction]
        own = output[:, :, columns]
        states = cells[direction]
        if gates.numel() == 0:  # not saved, or of no rows
            saved = activated_gates(x, h_0[direction], own, states, w, spec, reverse)
        else:
            saved = gates[direction]
        d_gates = torch.empty_like(saved)
        d_hidden = x.new_empty(T, B, P) if w.weight_hr is not None else None
        grad_direction = grad_output[:, :, columns] if grad_output is not None else None
        steps.backward(grad_direction, dh, dc, w, spec, reverse, saved, states, d_gates, d_hidden)
        grad_h_0.append(dh)
        grad_c_0.append(dc)

        d_rows = d_gates.flatten(0, 1)
        if needs.x:
            grad_rows = grad_x.view(T * B, I) if grad_x is not None else None
            grad_rows = d_rows @ w.weight_ih if grad_rows is None else grad_rows.addmm_(d_rows, w.weight_ih)
            grad_x = grad_rows.view(x.shape)
        of_direction = (d_gates, d_hidden, saved, states, spec, reverse)
        grad_weights.append(weight_gradients(wanted, x, h_0[direction], own, *of_direction))
    return LayerGradients(
        grad_x,
        torch.stack(grad_h_0) if needs.h_0 else None,
        torch.stack(grad_c_0).to(x.dtype) if needs.c_0 else None,
        grad_weights,
    )


def weight_gradients(
    wanted: Sequence[str], x: Tensor, h_0: Tensor, output: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    gates: Tensor, cells: Tensor, spec: LSTMSpec, reverse: bool,
    lengths: Tensor | None = None, resets: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of the parameters named in `wanted`, for one direction: sums over all T and B, each one GEMM.

    x (T, B, I), h_0 (B, P), output (T, B, P), d_gates and gates (T, B, G·H), d_hidden (T, B, P), cells (T + 1, B, H);
    lengths (B,) and resets (T, B) bool as in `reference.layer_states`, d_gates and output being zero beyond a length.
    """
    T, B, _ = d_gates.shape
    d_rows = d_gates.flatten(0, 1)
    gradients = {}
    if "weight_ih" in wanted:
        gradients["weight_ih"] = d_rows.t() @ x.reshape(T * B, x.shape[2])
    if "weight_hh" in wanted:
        d_first = at_first_step(d_gates, reverse, lengths)
        d_rest = (d_gates[:-1] if reverse else d_gates[1:]).flatten(0, 1)
        h_rest = hidden_before_the_rest(output, reverse, resets).reshape((T - 1) * B, h_0.shape[1])
        first = d_first.t() @ initial_hidden(h_0, reverse, lengths, resets)
        gradients["weight_hh"] = torch.addmm(first, d_rest.t(), h_rest)
    if "bias_ih" in wanted or "bias_hh" in wanted:
        bias = d_rows.sum(0)
        gradients |= {name: bias for name in ("bias_ih", "bias_hh") if name in wanted}
    if "weight_hr" in wanted:
        gradients["weight_hr"] = projection_gradient(d_hidden, gates, cells, spec, reverse)
    if "weight_ch" in wanted:
        gradients["weight_ch"] = peephole_gradient(d_gates, cells, spec, reverse, resets)
    return gradients


def project_input(x: Tensor, w: LSTMWeights, out: Tensor | None = None) -> Tensor:
    """The input side of all gates of all steps in one GEMM: x (T, B, I) -> (T, B, G·H), both biases included."""
    T, B, I = x.shape  # noqa: E741
    rows = x.reshape(T * B, I)
    out = out.view(T * B, out.shape[2]) if out is not None else None
    if w.bias_ih is None or w.bias_hh is None:
        projected = torch.mm(rows, w.weight_ih.t(), out=out)
    else:
        projected = torch.addmm(w.bias_ih + w.bias_hh, rows, w.weight_ih.t(), out=out)
    return projected.view(T, B, projected.shape[1])


def activated_gates(
    x: Tensor, h_0: Tensor, output: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, reverse: bool,
    lengths: Tensor | None = None, resets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The activated gates (T, B, G·H) of one direction, computed again from the states that `forward` left.

    x (T, B, I), h_0 (B, P), output (T, B, P), cells (T + 1, B, H). All steps at once, and all that the gates read in
    one GEMM: the pre-activations are rounded once, as the gate inputs are in the forward pass.
    """
    previous, current = previous_and_current(cells, reverse, resets)
    reads, weights = [x, previous_hidden(output, h_0, reverse, lengths, resets)], [w.weight_ih, w.weight_hh]
    v = spec.split_peephole(w.weight_ch) if w.weight_ch is not None else {}
    if spec.full and w.weight_ch is not None:
        reads.append(previous.to(x.dtype))
        weights.append(spec.previous_peephole(w.weight_ch))
    gates = project_input(torch.cat(reads, -1), w._replace(weight_ih=torch.cat(weights, 1)))
    for gate, block in spec.split_gates(gates).items():
        a = block.to(cells.dtype)
        if gate in v and spec.diagonal:
            a = torch.addcmul(a, previous if gate in spec.previous_gates else current, v[gate])
        elif gate in v and gate not in spec.previous_gates:
            a = a + current @ v[gate].t().to(current.dtype)
        block.copy_(a.tanh() if gate == "g" else a.sigmoid())
    return gates


def previous_and_current(cells: Tensor, reverse: bool, resets: Tensor | None) -> tuple[Tensor, Tensor]:
    """c_{t-1} as step t read it and c_t, each (T, B, H), from cells (T + 1, B, H)."""
    previous, current = (cells[1:], cells[:-1]) if reverse else (cells[:-1], cells[1:])
    return (previous if resets is None else previous.masked_fill(resets[..., None], 0)), current


def at_first_step(sequence: Tensor, reverse: bool, lengths: Tensor | None) -> Tensor:
    """Of a sequence (T, B, ...) what stands at the step that each row begins with, (B, ...)."""
    if not reverse:
        return sequence[0]
    if lengths is None:
        return sequence[-1]
    return sequence[lengths.long() - 1, torch.arange(len(lengths), device=sequence.device)]


def initial_hidden(h_0: Tensor, reverse: bool, lengths: Tensor | None, resets: Tensor | None) -> Tensor:
    """h_0 (B, P) as the first step of each row read it."""
    return h_0 if resets is None else h_0.masked_fill(at_first_step(resets, reverse, lengths)[:, None], 0)


def hidden_before_the_rest(output: Tensor, reverse: bool, resets: Tensor | None) -> Tensor:
    """h_{t-1} (T - 1, B, P) as every step but the first of T read it; zero where a row's own first step comes later."""
    rest = output[1:] if reverse else output[:-1]
    if resets is None:
        return rest
    return rest.masked_fill((resets[:-1] if reverse else resets[1:])[..., None], 0)


def previous_hidden(
    output: Tensor, h_0: Tensor, reverse: bool, lengths: Tensor | None, resets: Tensor | None
) -> Tensor:
    """h_{t-1} (T, B, P) as every step read it."""
    rest = hidden_before_the_rest(output, reverse, resets)
    first = initial_hidden(h_0, reverse, lengths, resets)
    if not reverse:
        return torch.cat([first[None], rest])
    hidden = torch.cat([rest, first[None]])
    if lengths is not None:
        hidden[lengths.long() - 1, torch.arange(len(lengths), device=hidden.device)] = first
    return hidden


def peephole_gradient(
    d_gates: Tensor, cells: Tensor, spec: LSTMSpec, reverse: bool, resets: Tensor | None = None
) -> Tensor:
    """The gradient of weight_ch from d_gates (T, B, G·H) and cells (T + 1, B, H): each block times the c it read."""
    d = spec.split_gates(d_gates)
    previous, current = previous_and_current(cells, reverse, resets)
    blocks = []
    for gate in spec.peephole_gates:
        read = previous if gate in spec.previous_gates else current
        if spec.full:
            d_rows = d[gate].flatten(0, 1)
            blocks.append(d_rows.t() @ read.flatten(0, 1).to(d_rows.dtype))
        else:
            blocks.append((d[gate] * read).sum((0, 1)).to(d_gates.dtype))
    return torch.cat(blocks)


def projection_gradient(d_hidden: Tensor | None, gates: Tensor, cells: Tensor, spec: LSTMSpec, reverse: bool) -> Tensor:
    """The gradient of weight_hr (P, H) from that of h_t, d_hidden (T, B, P), and o tanh(c_t), computed again."""
    assert d_hidden is not None
    c = cells[:-1] if reverse else cells[1:]
    unprojected = (spec.split_gates(gates)["o"] * c.tanh()).to(d_hidden.dtype)
    return d_hidden.flatten(0, 1).t() @ unprojected.flatten(0, 1)


def row_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, else a copy: what the kernels read rows of."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
