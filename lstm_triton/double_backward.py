"""The second derivative of a layer from what its first one saved: one loop over the steps beside an engine's own.

The first backward pass maps x, h_0, c_0, the weights and the gradients of the results to gradients d. Given the
cotangents v of those, the second one returns the gradient of <v, d>:

- by the gradients of the results, in which d is linear: the tangents of the results along v, which are computed step by
  step as the layer itself is;
- by x, h_0, c_0 and the weights: the tangent of d along v, the Hessian being symmetric. The tangent of a product is two
  terms. One has the tangent of the gradient in it, and goes through the steps as the gradient does: by the backward
  pass of the engine. The other is a gradient times the tangent of what was saved: the engine's sources.

So, for every step and beside the products, with dots for tangents and S for the sources,

    d_gates = dh or dc times factors          first backward pass
    S = dh or dc times tangents of factors    all steps at once, but for dc, which is elementwise
    d_gates_dot = S + dh_dot or dc_dot times factors

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import gemms
from lstm_triton.directions import part, runs_flipped
from lstm_triton.layer import Call, Gradients, LayerGradients, Loop, Needs, StepGradients, gradients, together


class First(NamedTuple):
    """What the first backward pass read and computed of a layer.

    - x (T, B, I), h_0 (D, B, P), c_0 (D, B, H), weights and order: as of `layer.forward`
    - output (T, B, D·P), gates (D, T, B, G·H), cells (D, T + 1, B, H): as that left them, gates not empty
    - grads: of the results
    - d_gates (D, T, B, G·H), d_hidden (D, T, B, P): the gradients of the pre-activations and, with a projection, of h_t
    """

    x: Tensor
    h_0: Tensor
    c_0: Tensor
    weights: Sequence[LSTMWeights]
    order: Order
    output: Tensor
    gates: Tensor
    cells: Tensor
    grads: Gradients
    d_gates: Tensor
    d_hidden: Tensor | None


class Cotangents(NamedTuple):
    """Cotangents of the gradients of x, h_0, c_0 and each weight, of the shapes of these; None where zero."""

    x: Tensor | None
    h_0: Tensor | None
    c_0: Tensor | None
    weights: Sequence[LSTMWeights]


class SecondGradients(NamedTuple):
    """Gradients by the gradients of the results, None where there were none, and by x, h_0, c_0 and the weights."""

    grads: Gradients
    inputs: LayerGradients


class Tangents(NamedTuple):
    """Tangents of one direction: output (T, B, P), gates (T, B, G·H) activated, cells (T + 1, B, H), see `Order`.

    Zero beyond a row's length.
    """

    output: Tensor
    gates: Tensor
    cells: Tensor


class Sources(NamedTuple):
    """What the backward pass of an engine is given in place of gradients, and what is added to its results.

    - output (T, B, P), cells (T, B, H) in the accumulator type: in place of the gradients of h_t and c_t
    - gates (T, B, G·H), c_0 (B, H): to be added to the gradients of the pre-activations and of c_0
    """

    output: Tensor
    cells: Tensor
    gates: Tensor
    c_0: Tensor


@dataclass(frozen=True)
class Direction:
    """One direction of a layer in the order in which its steps are computed, rows of full length or from the front.

    The second direction of rows with lengths is flipped, as in `directions.OneByOne`. Fields as of First, of this
    direction; d_gates (T, B, G·H) and d_hidden (T, B, P) of its steps; v: the cotangents of its weights.
    """

    steps: ModuleType
    spec: LSTMSpec
    order: Order
    w: LSTMWeights
    v: LSTMWeights
    x: Tensor
    h_0: Tensor
    output: Tensor
    gates: Tensor
    cells: Tensor
    d_gates: Tensor
    d_hidden: Tensor | None

    def tangents(self, v_x: Tensor | None, v_h_0: Tensor | None, v_c_0: Tensor | None) -> Tangents:
        """Return the tangents along v_x (T, B, I), v_h_0 (B, P), v_c_0 (B, H) and the cotangents of the weights."""
        gates = self.input_tangents(v_x)
        cells, output = torch.zeros_like(self.cells), self.output.new_zeros(self.output.shape)
        if v_c_0 is not None:
            cells[self.order.initial_slot(saved=True)] = v_c_0
        if self.v.weight_hr is not None:
            output = self.unprojected() @ self.v.weight_hr.t()
        h_0 = torch.zeros_like(self.h_0) if v_h_0 is None else v_h_0.contiguous()
        whole = self.order._replace(lengths=None)
        self.steps.forward(h_0, self.w, self.spec, whole, self.gates, self.cells, output, gates, cells)
        beyond = self.order.beyond()
        if beyond is not None:
            for own in (output, gates, self.order.cells_written(cells)):
                own.masked_fill_(beyond, 0)
        return Tangents(output, gates, cells)

    def input_tangents(self, v_x: Tensor | None) -> Tensor:
        """Return the tangents of the pre-activations (T, B, G·H) but for what h_{t-1} and c_{t-1} have: one GEMM."""
        spec, w, v = self.spec, self.w, self.v
        dtype = self.gates.dtype
        previous, current = self.order.cells_read(self.cells)
        reads, weights = [], []
        if v_x is not None:
            reads.append(self.order.zero_beyond(v_x))
            weights.append(w.weight_ih)
        if v.weight_ih is not None:
            reads.append(self.x)
            weights.append(v.weight_ih)
        if v.weight_hh is not None:
            reads.append(self.order.hidden_read(self.output, self.h_0))
            weights.append(v.weight_hh)
        biases = [bias for bias in (v.bias_ih, v.bias_hh) if bias is not None]
        if reads:
            a = (torch.cat(reads, -1).flatten(0, 1) @ torch.cat(weights, 1).t()).view(self.gates.shape)
        else:
            a = torch.zeros_like(self.gates)
        for bias in biases:
            a += bias
        if v.weight_ch is not None:
            blocks, of = spec.split_peephole(v.weight_ch), spec.split_gates(a)
            for gate in spec.peephole_gates:
                read = previous if gate in spec.previous_gates else current
                of[gate] += read.to(dtype) @ blocks[gate].t() if spec.full else (read * blocks[gate]).to(dtype)
        return a

    def unprojected(self) -> Tensor:
        """Return o tanh(c_t) of every step, (T, B, H)."""
        o = self.spec.split_gates(self.gates)["o"]
        return (o * gemms.output_activation(self.order.cells_written(self.cells), self.spec)).to(o.dtype)

    def hidden_gradients(self, grad_output: Tensor | None, grad_h_n: Tensor | None) -> Tensor:
        """Return the gradient of every h_t (T, B, P), from those of the results: what the first backward pass had."""
        if self.d_hidden is not None:
            return self.d_hidden
        dh, _ = self.on_to_written(self.d_gates @ self.w.weight_hh)
        if grad_output is not None:
            dh += grad_output
        if grad_h_n is not None:
            self.order.last(dh).add_(grad_h_n)
        return dh

    def sources(
        self, tangents: Tangents, grad_output: Tensor | None, grad_states: Tensor | None, grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
    ) -> Sources:  # fmt: skip
        """Return the sources of one direction, from the gradients of its results, (T, B, P), (T, B, H) and two (B, H).

        With lengths there are none of the last states: they are in those of the sequences, which are zero beyond.
        """
        spec, w, v = self.spec, self.w, self.v
        dtype = self.cells.dtype
        dh = self.hidden_gradients(grad_output, grad_h_n)
        # A projection maps the gradient of h_t to that of o tanh(c_t), so that its cotangent has a source there.
        dr, of_dr = dh, None
        if w.weight_hr is not None:
            dr = dh @ w.weight_hr
            of_dr = dh @ v.weight_hr if v.weight_hr is not None else None
        dc, _ = self.through_peepholes(self.d_gates, w, None)
        if grad_states is not None:
            dc = grad_states.to(dtype) if dc is None else dc + grad_states
        last = torch.zeros_like(self.cells[0]) if grad_c_n is None else grad_c_n.to(dtype)
        whole = self.order._replace(lengths=None)
        saved = (self.gates, tangents.gates, self.cells, tangents.cells)
        of_gates, of_cells, of_c_0 = self.steps.sources(*saved, dr, of_dr, dc, last, spec, whole)
        for d, weights in ((of_gates, w), (self.d_gates, v)):
            of_states, first = self.through_peepholes(d, weights, of_cells)
            assert of_states is not None
            of_cells = of_states
            of_c_0 = of_c_0 if first is None else of_c_0 + first
        product = of_gates @ w.weight_hh
        if v.weight_hh is not None:
            product += self.d_gates @ v.weight_hh
        return Sources(self.on_to_written(product)[0], of_cells, of_gates, of_c_0)

    def through_peepholes(self, d: Tensor, w: LSTMWeights, to: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Return `to` (T, B, H) plus the gradients of every c_t through the peepholes of w, and that of c_0 (B, H).

        d: the gradients of the pre-activations (T, B, G·H). None stands for zero.
        """
        if w.weight_ch is None:
            return to, None
        spec, dtype = self.spec, self.cells.dtype
        blocks, of = spec.split_peephole(w.weight_ch), spec.split_gates(d)
        terms = {gate: (of[gate] @ blocks[gate] if spec.full else of[gate] * blocks[gate]).to(dtype) for gate in blocks}
        total, first = self.on_to_written(sum(terms[gate] for gate in spec.previous_gates))  # type: ignore[arg-type]
        if spec.output_current:
            total += terms["o"]
        return total if to is None else total.add_(to), first

    def on_to_written(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the states that the steps wrote (T, B, F), and of the initial one (B, F).

        read: the gradients of the states that the steps read (T, B, F).
        """
        order = self.order
        if order.resets is not None:
            read = read.masked_fill(order.resets[..., None], 0)
        written = torch.zeros_like(read)
        if order.reverse:
            written[1:] = read[:-1]
        else:
            written[:-1] = read[1:]
        return written, order.first(read)


def backward(
    first: First, v: Cotangents, call: Call, needs: Needs, of_grads: bool, loop: Loop, steps: ModuleType
) -> SecondGradients:
    """Return the gradients of <v, gradients of the first backward pass>.

    - needs: which are wanted of x, h_0, c_0 and the weights; of_grads: whether those by the gradients of the results
    - loop: the engine whose backward pass computes the steps; steps: what computes tangents and sources, with the
      functions of `eager_tangents`
    """
    of_inputs = needs.x or needs.h_0 or needs.c_0 or any(needs.weights)
    tangents, sources = [], []
    for n in range(len(first.weights)):
        along, found = of_direction(n, first, v, call.spec, steps, of_inputs)
        tangents.append(along)
        if found is not None:
            sources.append(found)
    results = result_tangents(tangents, first) if of_grads else Gradients(None, None, None, None)
    if not sources:
        return SecondGradients(results, LayerGradients(None, None, None, [{} for _ in first.weights]))
    given = Gradients(
        torch.cat([one.output for one in sources], -1), None, None, torch.cat([one.cells for one in sources], -1)
    )
    dots = loop.backward(given, first.gates, first.cells, first.weights, first.order, call)
    dots.gates.add_(together([one.gates for one in sources]))
    dots = dots._replace(c_0=dots.c_0 + torch.stack([one.c_0 for one in sources]))
    return SecondGradients(results, input_gradients(first, v, tangents, dots, call, needs))


def of_direction(
    n: int, first: First, v: Cotangents, spec: LSTMSpec, steps: ModuleType, of_inputs: bool
) -> tuple[Tangents, Sources | None]:
    """Return the tangents of direction n, and its sources if gradients by the inputs are wanted."""
    own = first.order.direction(n)
    flipped = runs_flipped(own)
    P, H = first.h_0.shape[2], first.c_0.shape[2]

    def see(sequence: Any) -> Any:
        """Return a sequence, or None, in the order of the steps, or back in that of time."""
        return own.flip(sequence) if flipped else sequence

    direction = Direction(
        steps=steps,
        spec=spec,
        order=own.flipped() if flipped else own,
        w=first.weights[n].map(Tensor.contiguous),
        v=v.weights[n],
        x=see(first.x),
        h_0=first.h_0[n],
        output=see(first.output[:, :, n * P : (n + 1) * P]),
        gates=see(first.gates[n]).contiguous(),
        cells=see(first.cells[n]).contiguous(),
        d_gates=see(first.d_gates[n]),
        d_hidden=see(part(first.d_hidden, n)),
    )
    found = direction.tangents(see(v.x), part(v.h_0, n), part(v.c_0, n))
    tangents = Tangents(see(found.output), see(found.gates), see(found.cells))
    if not of_inputs:
        return tangents, None
    grads = first.grads
    of_output = grads.output[:, :, n * P : (n + 1) * P] if grads.output is not None else None
    of_states = grads.states[:, :, n * H : (n + 1) * H] if grads.states is not None else None
    of_h_n, of_c_n = part(grads.h_n, n), part(grads.c_n, n)
    if own.lengths is not None:
        of_output = own.add_to_last(of_output, of_h_n, first.x.dtype)
        of_states = own.add_to_last(of_states, of_c_n, first.cells.dtype)
        of_h_n = of_c_n = None
    given = direction.sources(found, see(of_output), see(of_states), of_h_n, of_c_n)
    return tangents, Sources(see(given.output), see(given.cells).to(first.x.dtype), see(given.gates), given.c_0)


def result_tangents(tangents: Sequence[Tangents], first: First) -> Gradients:
    """Return the tangents of the results whose gradients there are."""
    order, dtype = first.order, first.x.dtype
    orders = [order.direction(n) for n in range(len(tangents))]
    every_c = [own.cells_written(one.cells) for own, one in zip(orders, tangents, strict=True)]
    output, h_n, c_n, states = first.grads
    return Gradients(
        None if output is None else torch.cat([one.output for one in tangents], -1),
        None if h_n is None else torch.stack([own.last(one.output) for own, one in zip(orders, tangents, strict=True)]),
        None if c_n is None else torch.stack([own.last(c) for own, c in zip(orders, every_c, strict=True)]).to(dtype),
        None if states is None else order.zero_beyond(torch.cat(every_c, -1).to(dtype)),
    )


def input_gradients(
    first: First, v: Cotangents, tangents: Sequence[Tangents], dots: StepGradients, call: Call, needs: Needs
) -> LayerGradients:
    """Return the gradients by x, h_0, c_0 and the weights, from the tangents `dots` of the first pass's steps.

    There each was a product of the gradients of the steps and of what the steps read. Its tangent is two products.
    """
    spec = call.spec
    saved = (first.output, first.gates, first.cells, first.order)
    found = gradients(dots, first.x, first.h_0, first.weights, *saved, call, needs)
    for n, (v_w, along, of_weights) in enumerate(zip(v.weights, tangents, found.weights, strict=True)):
        own, d = first.order.direction(n), first.d_gates[n]
        if found.x is not None and v_w.weight_ih is not None:
            found.x.add_(d @ v_w.weight_ih)
        if found.h_0 is not None and v_w.weight_hh is not None:
            found.h_0[n] += gemms.initial_hidden_gradient(d, v_w, own)
        reading = ["weight_ih"] * (v.x is not None) + ["weight_hh", "weight_ch"]
        names = [name for name in needs.weights[n] if name in reading]
        read = (first.x if v.x is None else v.x, torch.zeros_like(first.h_0[n]) if v.h_0 is None else v.h_0[n])
        more = gemms.weight_gradients(names, *read, along.output, d, None, along.gates, along.cells, v_w, spec, own)
        if "weight_hr" in of_weights and first.d_hidden is not None:
            unprojected = unprojected_tangents(first.gates[n], first.cells[n], along, spec, own)
            more["weight_hr"] = first.d_hidden[n].flatten(0, 1).t() @ unprojected.flatten(0, 1)
        for name, gradient in more.items():
            of_weights[name].add_(gradient)
    return found


def unprojected_tangents(gates: Tensor, cells: Tensor, along: Tangents, spec: LSTMSpec, order: Order) -> Tensor:
    """Return the tangents of o tanh(c_t) of every step, (T, B, H)."""
    o, o_dot = spec.split_gates(gates)["o"], spec.split_gates(along.gates)["o"]
    y, c_dot = gemms.output_activation(order.cells_written(cells), spec), order.cells_written(along.cells)
    y_dot = c_dot if spec.identity_output else (1 - y * y) * c_dot
    return (o_dot * y + o * y_dot).to(o.dtype)
