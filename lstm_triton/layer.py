"""One layer, all its directions: the large GEMMs before and after the steps, the steps left to a backend.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks, Q peephole blocks. Plain functions on tensors, called inside the custom operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, overload

import torch
from lstm_triton_kernels.order import initial_slot
from lstm_triton_kernels.plan import accumulator_dtype
from torch import Tensor

from lstm_triton.spec import LSTMSpec, LSTMWeights


class LayerResult(NamedTuple):
    """What the forward pass of a layer returns.

    - output: (T, B, D·P); h_n: (D, B, P); c_n: (D, B, H), all in the input's type
    - states: (T, B, D·H) every c_t in the input's type; empty unless asked for
    - gates: (D, T, B, G·H) activated gates; empty unless saved for the backward pass
    - cells: (D, T + 1, B, H) cell states in the accumulator type; empty unless saved

    Output and states are zero beyond a row's length.
    """

    output: Tensor
    h_n: Tensor
    c_n: Tensor
    states: Tensor
    gates: Tensor
    cells: Tensor


class Keep(NamedTuple):
    """What of a forward pass is wanted beside its output and its last states.

    - save: what a backward pass reads; with recompute that will compute the gates again, and they are not saved
    - states: every c_t
    """

    save: bool
    recompute: bool = False
    states: bool = False

    @property
    def gates(self) -> bool:
        """Whether the gates are saved."""
        return self.save and not self.recompute


def result_shapes(
    x: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, keep: Keep
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and type of every field of LayerResult, from the arguments of `forward`."""
    T, B, _ = x.shape
    D, _, H = c_0.shape
    P = weights[0].weight_hh.shape[1]
    return (
        ((T, B, D * P), x.dtype),
        ((D, B, P), x.dtype),
        ((D, B, H), x.dtype),
        ((T, B, D * H) if keep.states else (0,), x.dtype),
        ((D, T, B, len(spec.gates) * H) if keep.gates else (0,), x.dtype),
        ((D, T + 1, B, H) if keep.save else (0,), accumulator_dtype(x.dtype)),
    )


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, keep: Keep,
    lengths: Tensor | None = None, resets: Tensor | None = None, *, steps: ModuleType,
) -> LayerResult:  # fmt: skip
    """x (T, B, I), h_0 (D, B, P), c_0 (D, B, H); `steps` is a module like `eager`.

    lengths (B,) and resets (T, B) bool as in `reference.layer_states`; x is finite beyond a length.
    """
    output, h_n, c_n, _, gates, cells = (
        torch.empty(shape, dtype=dtype, device=x.device)
        for shape, dtype in result_shapes(x, c_0, weights, spec, keep._replace(states=False))
    )
    T, B, _ = x.shape
    D, _, P = h_n.shape
    every = keep.save or keep.states or lengths is not None
    if not keep.save:
        cells = cells.new_empty(D, T + 1 if every else 1, B, c_n.shape[2])
    x = row_contiguous(x)
    for direction, w in enumerate(weights):
        reverse = direction == 1
        out = Steps(output[:, :, direction * P : (direction + 1) * P], gates[direction] if keep.gates else None,
                    cells[direction])  # fmt: skip
        initial = (h_0[direction], c_0[direction])
        forward_steps(x, *initial, w.map(Tensor.contiguous), spec, reverse, out, lengths, resets, steps)
        h_n[direction] = at_last_step(out.output, reverse, lengths)
        last = out.cells if not every else out.cells[:-1] if reverse else out.cells[1:]
        c_n[direction] = at_last_step(last, reverse, lengths)
    return LayerResult(
        output,
        h_n,
        c_n,
        cell_states(cells, lengths, x.dtype) if keep.states else output.new_empty(0),
        gates,
        cells if keep.save else cells.new_empty(0),
    )


class Steps(NamedTuple):
    """What the steps of one direction fill: output (T, B, P), gates (T, B, G·H) or None, cells (T + 1 or 1, B, H)."""

    output: Tensor
    gates: Tensor | None
    cells: Tensor


def forward_steps(
    x: Tensor, h_0: Tensor, c_0: Tensor, w: LSTMWeights, spec: LSTMSpec, reverse: bool, out: Steps,
    lengths: Tensor | None, resets: Tensor | None, steps: ModuleType,
) -> None:  # fmt: skip
    """All steps of one direction, into `out`; x (T, B, I), h_0 (B, P), c_0 (B, H)."""
    if reverse and lengths is not None:
        # Each row backwards within its own length is a sequence that runs forwards.
        turned = Steps(*(None if t is None else torch.empty_like(t) for t in out))  # type: ignore[arg-type]
        inputs = (turn(x, lengths), h_0, c_0, w, spec)
        forward_steps(*inputs, False, turned, lengths, turn(resets, lengths), steps)
        out.output.copy_(turn(turned.output, lengths))
        out.cells.copy_(turn(turned.cells, lengths + 1))
        if out.gates is not None and turned.gates is not None:
            out.gates.copy_(turn(turned.gates, lengths))
        return
    T = len(x)
    out.cells[initial_slot(T, reverse, len(out.cells) > 1)] = c_0
    # Where gates are saved, they replace the gate inputs, step by step, in the same memory.
    gate_input = None if steps.fuses_input(T) else project_input(x, w, out.gates)
    steps.forward(x, gate_input, row_contiguous(h_0), w, spec, reverse, *out, as_bytes(resets))
    if lengths is not None:
        over = beyond(lengths, T)
        out.output.masked_fill_(over, 0)
        out.cells[1:].masked_fill_(over, 0)


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
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, grad_states: Tensor | None,
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights],
    output: Tensor, gates: Tensor, cells: Tensor, spec: LSTMSpec, needs: Needs,
    lengths: Tensor | None = None, resets: Tensor | None = None, *, steps: ModuleType,
) -> LayerGradients:  # fmt: skip
    """The gradients that `needs` names, from those of the results (None: zero) and what `forward` saved."""
    T, B, I = x.shape  # noqa: E741
    D, _, P = h_0.shape
    H = c_0.shape[2]
    grad_output = grad_output.contiguous() if grad_output is not None else None
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs.x and D > 1 else None
    grad_h_0, grad_c_0, grad_weights = [], [], []
    for direction, direction_weights in enumerate(weights):
        w = direction_weights.map(Tensor.contiguous)
        wanted = needs.weights[direction]
        reverse = direction == 1
        columns = slice(direction * P, (direction + 1) * P)
        of_output = grad_output[:, :, columns] if grad_output is not None else None
        of_states = grad_states[:, :, direction * H : (direction + 1) * H] if grad_states is not None else None
        of_h_n, of_c_n = (grad[direction] if grad is not None else None for grad in (grad_h_n, grad_c_n))
        if lengths is not None:
            # A row's last states are those of its own last step, and nothing comes from beyond.
            of_output = with_last(of_output, of_h_n, reverse, lengths, T, x.dtype)
            of_states = with_last(of_states, of_c_n, reverse, lengths, T, cells.dtype)
            of_h_n = of_c_n = None
        dh = x.new_zeros(B, P) if of_h_n is None else of_h_n.clone(memory_format=torch.contiguous_format)
        dc = torch.zeros(cells.shape[2:], dtype=cells.dtype, device=x.device)
        if of_c_n is not None:
            dc += of_c_n
        own = output[:, :, columns]
        states = cells[direction]
        if gates.numel() == 0:  # not saved, or of no rows
            saved = activated_gates(x, h_0[direction], own, states, w, spec, reverse, lengths, resets)
        else:
            saved = gates[direction]
        d_gates = torch.empty_like(saved)
        d_hidden = x.new_empty(T, B, P) if w.weight_hr is not None else None
        grads = (of_output, of_states, dh, dc)
        backward_steps(*grads, w, spec, reverse, saved, states, d_gates, d_hidden, lengths, resets, steps)
        grad_h_0.append(dh)
        grad_c_0.append(dc)

        d_rows = d_gates.flatten(0, 1)
        if needs.x:
            grad_rows = grad_x.view(T * B, I) if grad_x is not None else None
            grad_rows = d_rows @ w.weight_ih if grad_rows is None else grad_rows.addmm_(d_rows, w.weight_ih)
            grad_x = grad_rows.view(x.shape)
        of_direction = (d_gates, d_hidden, saved, states, spec, reverse, lengths, resets)
        grad_weights.append(weight_gradients(wanted, x, h_0[direction], own, *of_direction))
    return LayerGradients(
        grad_x,
        torch.stack(grad_h_0) if needs.h_0 else None,
        torch.stack(grad_c_0).to(x.dtype) if needs.c_0 else None,
        grad_weights,
    )


def backward_steps(
    grad_output: Tensor | None, grad_states: Tensor | None, dh: Tensor, dc: Tensor, w: LSTMWeights, spec: LSTMSpec,
    reverse: bool, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
    lengths: Tensor | None, resets: Tensor | None, steps: ModuleType,
) -> None:  # fmt: skip
    """All steps of one direction backward, into d_gates (T, B, G·H) and d_hidden (T, B, P), in place in dh and dc.

    grad_output (T, B, P) and grad_states (T, B, H) of h_t and c_t, zero beyond a length; dh (B, P) and dc (B, H) of the
    states after step T, then of the first.
    """
    if reverse and lengths is not None:
        d_turned, h_turned = torch.empty_like(d_gates), None if d_hidden is None else torch.empty_like(d_hidden)
        grads = (turn(grad_output, lengths), turn(grad_states, lengths), dh, dc)
        saved = (turn(gates, lengths), turn(cells, lengths + 1))
        backward_steps(*grads, w, spec, False, *saved, d_turned, h_turned, lengths, turn(resets, lengths), steps)
        d_gates.copy_(turn(d_turned, lengths))
        if d_hidden is not None and h_turned is not None:
            d_hidden.copy_(turn(h_turned, lengths))
        return
    out = (d_gates, d_hidden)
    steps.backward(grad_output, dh, dc, w, spec, reverse, gates, cells, *out, as_bytes(resets), grad_states)


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


def as_bytes(resets: Tensor | None) -> Tensor | None:
    """Resets as the kernels read them."""
    return None if resets is None else resets.contiguous().view(torch.uint8)


def beyond(lengths: Tensor, T: int) -> Tensor:
    """Which steps a row does not have, (T, B, 1) bool, from lengths (B,)."""
    return (torch.arange(T, device=lengths.device)[:, None] >= lengths)[..., None]


@overload
def turn(sequence: Tensor, lengths: Tensor) -> Tensor: ...
@overload
def turn(sequence: None, lengths: Tensor) -> None: ...
def turn(sequence: Tensor | None, lengths: Tensor) -> Tensor | None:
    """Each row of a sequence (T, B) or (T, B, F) backwards within its length (B,), the rest in its place."""
    if sequence is None:
        return None
    t = torch.arange(len(sequence), device=lengths.device)[:, None]
    places = torch.where(t < lengths, lengths - 1 - t, t)
    return sequence.gather(0, places.view(*places.shape, *[1] * (sequence.dim() - 2)).expand(sequence.shape))


def with_last(
    sequence: Tensor | None, last: Tensor | None, reverse: bool, lengths: Tensor, T: int, dtype: torch.dtype
) -> Tensor | None:
    """A sequence (T, B, F) plus `last` (B, F) at the step that each row ends with; zero beyond its length (B,).

    In the type; None stands for zero, in the result too.
    """
    if last is None:
        return None if sequence is None else sequence.masked_fill(beyond(lengths, T), 0)
    if sequence is None:
        sequence = last.new_zeros(T, *last.shape, dtype=dtype)
    else:
        sequence = sequence.to(dtype).masked_fill(beyond(lengths, T), 0)
    if reverse:
        sequence[0] += last
    else:
        sequence[lengths - 1, torch.arange(len(lengths), device=lengths.device)] += last
    return sequence


def cell_states(cells: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Every c_t as the user sees it, (T, B, D·H) of the type, from cells (D, T + 1, B, H)."""
    states = torch.cat([own[:-1] if direction == 1 else own[1:] for direction, own in enumerate(cells)], -1).to(dtype)
    return states if lengths is None else states.masked_fill_(beyond(lengths, len(states)), 0)


def at_last_step(sequence: Tensor, reverse: bool, lengths: Tensor | None) -> Tensor:
    """Of a sequence (T, B, ...) what stands at the step that each row ends with, (B, ...)."""
    return at_first_step(sequence, not reverse, lengths)


def at_first_step(sequence: Tensor, reverse: bool, lengths: Tensor | None) -> Tensor:
    """Of a sequence (T, B, ...) what stands at the step that each row begins with, (B, ...)."""
    if not reverse:
        return sequence[0]
    if lengths is None:
        return sequence[-1]
    return sequence[lengths - 1, torch.arange(len(lengths), device=sequence.device)]


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
        hidden[lengths - 1, torch.arange(len(lengths), device=hidden.device)] = first
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
