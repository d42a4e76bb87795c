"""One layer, all its directions: the products before and after the loop over the steps, the loop left to an engine.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks. Plain functions on tensors, called inside the custom operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import UNREGULARIZED, Regularized, Rules, drawn
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import gemms


class Call(NamedTuple):
    """Options of a layer's computation: plain values, as the operators of torch.library take them.

    - variant: the name of an LSTMSpec; bias, projection: whether there are these parameters
    - engine: who computes, see routing.py
    - save: what a backward pass reads; with recompute that will compute the gates again, and they are not saved
    - states: every c_t
    - rules: the values of the steps' `Rules`; empty for none
    """

    variant: str
    bias: bool
    projection: bool
    engine: str
    save: bool = False
    recompute: bool = False
    states: bool = False
    rules: Sequence[float] = ()

    @property
    def spec(self) -> LSTMSpec:
        """The variant."""
        return LSTMSpec.parse(self.variant)

    @property
    def save_gates(self) -> bool:
        """Whether the gates are saved."""
        return self.save and not self.recompute

    @property
    def every_cell(self) -> bool:
        """Whether every c_t is kept."""
        return self.save or self.states

    def regularized(self, seed: Tensor | None, x: Tensor, h_0: Tensor, c_0: Tensor) -> Regularized:
        """Return the rules of the steps with masks drawn from a seed (1,) int64, for x (T, B, I) and the states."""
        if not self.rules:
            return UNREGULARIZED
        D, B, H = c_0.shape
        return drawn(Rules.rounded(*self.rules), seed, D, x.shape[0], B, H, h_0.shape[2], x.dtype)

    def fused(self, T: int) -> bool:
        """Return whether the input side of the gates is computed in the step's own matmul, not by a GEMM before it."""
        return T == 1 and self.engine == "stepwise" and not self.spec.layer_norm

    def group(self, flat: Sequence[Any]) -> list[LSTMWeights]:
        """Return one LSTMWeights a direction from a flat list of the parameters of all directions."""
        if self.variant in ("standard", "coupled") and self.bias and not self.projection:
            return [LSTMWeights(*flat[n : n + 4]) for n in range(0, len(flat), 4)]  # the common case, without a search
        names = self.spec.parameter_names(self.bias, self.projection)
        places = [names.index(field) if field in names else None for field in LSTMWeights._fields]
        return [
            LSTMWeights(*[None if place is None else flat[n + place] for place in places])  # type: ignore[arg-type]
            for n in range(0, len(flat), len(names))
        ]


class LayerResult(NamedTuple):
    """Results of the forward pass of a layer.

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


class Gradients(NamedTuple):
    """The gradients of the results, (T, B, D·P), (D, B, P), (D, B, H) and (T, B, D·H); None where zero."""

    output: Tensor | None
    h_n: Tensor | None
    c_n: Tensor | None
    states: Tensor | None


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


States = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""output (T, B, D·P), h_n (D, B, P), c_n (D, B, H), and cells (D, T + 1, B, H) in the accumulator type, see `Order`,
which may be anything where they are not kept."""


class StepGradients(NamedTuple):
    """What the loop over the steps leaves of the gradients.

    - gates: of the pre-activations (D, T, B, G·H)
    - hidden: with a projection, of the W_hr (o tanh(c_t)) of every step (D, T, B, P); else None
    - c_0: (D, B, H) in the accumulator type
    - h_0: (D, B, P), of h_0 what has not come through the gates, but by zoneout; None where there is none
    """

    gates: Tensor
    hidden: Tensor | None
    c_0: Tensor
    h_0: Tensor | None = None


Loop = Any
"""An engine that computes the steps of all directions: `persistent`, or `directions.OneByOne`. It has

- forward(x, gates, h_0, c_0, weights, order, call) -> States; gates (D, T, B, G·H): their input side, unless the step
  computes that from x, too (see `Call.fused`); out: activated, where they are saved
- backward(grads, gates, cells, weights, order, call) -> StepGradients, from what the forward pass saved
"""


def result_shapes(
    x: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], call: Call
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Return shape and type of every field of LayerResult, from the arguments of `forward`."""
    T, B, _ = x.shape
    D, _, H = c_0.shape
    P = weights[0].weight_hh.shape[1]
    return (
        ((T, B, D * P), x.dtype),
        ((D, B, P), x.dtype),
        ((D, B, H), x.dtype),
        ((T, B, D * H) if call.states else (0,), x.dtype),
        ((D, T, B, len(call.spec.gates) * H) if call.save_gates else (0,), x.dtype),
        ((D, T + 1, B, H) if call.save else (0,), accumulator_dtype(x.dtype)),
    )


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call, loop: Loop,
    project: Callable[..., Tensor] = gemms.project_input,
) -> LayerResult:  # fmt: skip
    """Compute a layer: x (T, B, I), finite beyond a row's length, h_0 (D, B, P), c_0 (D, B, H).

    project: what computes the input side of the gates, with the arguments of `gemms.project_input`.
    """
    T, B, _ = x.shape
    D, _, H = c_0.shape
    x = row_contiguous(x)
    gates = None
    fused = call.fused(T)
    if call.save_gates or not fused:  # where gates are saved, they replace the gate inputs in the same memory
        gates = x.new_empty(D, T, B, len(call.spec.gates) * H)
    if gates is not None and not fused:
        for n, w in enumerate(weights):
            project(x, w, out=gates[n])
    output, h_n, c_n, cells = loop.forward(x, gates, h_0, c_0, weights, order, call)
    if cells is None or not call.every_cell:
        cells = x.new_empty(0, dtype=accumulator_dtype(x.dtype))
    return LayerResult(
        output,
        h_n,
        c_n,
        cell_states(cells, order, x.dtype) if call.states else x.new_empty(0),
        gates if gates is not None and call.save_gates else x.new_empty(0),
        cells if call.save else cells.new_empty(0),
    )


def backward(
    grads: Gradients, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], output: Tensor,
    gates: Tensor, cells: Tensor, order: Order, call: Call, needs: Needs, loop: Loop,
) -> LayerGradients:  # fmt: skip
    """Return the gradients that `needs` names, from those of the results and what `forward` saved."""
    gates = activated_gates(x, h_0, weights, output, gates, cells, order, call)
    order = with_clipped(order, gates, cells, weights, call.spec)
    steps = loop.backward(grads, gates, cells, weights, order, call)
    return gradients(steps, x, h_0, weights, output, gates, cells, order, call, needs)


def activated_gates(
    x: Tensor, h_0: Tensor, weights: Sequence[LSTMWeights], output: Tensor, gates: Tensor, cells: Tensor, order: Order,
    call: Call,
) -> Tensor:  # fmt: skip
    """Return the activated gates (D, T, B, G·H): those that `forward` saved, or the same computed again."""
    if gates.numel() > 0:
        return gates
    P = h_0.shape[2]  # not saved, or of no rows
    again = []
    for n, w in enumerate(weights):
        own = output[:, :, n * P : (n + 1) * P]
        again.append(gemms.activated_gates(x, h_0[n], own, cells[n], w, call.spec, order.direction(n)))
    return together(again)


def with_clipped(order: Order, gates: Tensor, cells: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec) -> Order:
    """Return the order of a layer's steps with where a clipped h~ is at its limit; gates as of `activated_gates`."""
    limit = order.regularized.rules.proj_clip
    if not limit:
        return order
    hidden = (gemms.projected(gates[n], cells[n], w, spec, order.direction(n)) for n, w in enumerate(weights))
    clipped = torch.stack([h.abs() >= limit for h in hidden])
    return order._replace(regularized=order.regularized._replace(clipped=clipped))


def gradients(
    steps: StepGradients, x: Tensor, h_0: Tensor, weights: Sequence[LSTMWeights], output: Tensor, gates: Tensor,
    cells: Tensor, order: Order, call: Call, needs: Needs,
) -> LayerGradients:  # fmt: skip
    """Return the gradients that `needs` names, from those of the steps; gates as of `activated_gates`."""
    spec, P = call.spec, h_0.shape[2]
    orders = [order.direction(n) for n in range(len(weights))]
    outputs = [output[:, :, n * P : (n + 1) * P] for n in range(len(weights))]
    d_gates, d_hidden, grad_c_0, kept_h_0 = steps
    grad_h_0, grad_weights = [], []
    for n, w in enumerate(weights):
        if needs.h_0:
            gradient = gemms.initial_hidden_gradient(d_gates[n], w, orders[n])
            grad_h_0.append(gradient if kept_h_0 is None else (gradient + kept_h_0[n]).to(x.dtype))
        own = (d_gates[n], None if d_hidden is None else d_hidden[n], gates[n], cells[n], w, spec, orders[n])
        grad_weights.append(gemms.weight_gradients(needs.weights[n], x, h_0[n], outputs[n], *own))
    return LayerGradients(
        gemms.input_gradient(d_gates, weights) if needs.x else None,
        torch.stack(grad_h_0) if needs.h_0 else None,
        grad_c_0.to(x.dtype) if needs.c_0 else None,
        grad_weights,
    )


def cell_states(cells: Tensor, order: Order, dtype: torch.dtype) -> Tensor:
    """Return every c_t as the user sees it, (T, B, D·H) of the type, from cells (D, T + 1, B, H)."""
    states = [order.direction(n).cells_written(own) for n, own in enumerate(cells)]
    return order.zero_beyond(torch.cat(states, -1).to(dtype))


def together(tensors: Sequence[Tensor]) -> Tensor:
    """Return the tensors along a new first axis, contiguous; one alone is not copied if it is contiguous."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].contiguous()[None]


def row_contiguous(tensor: Tensor) -> Tensor:
    """Return the tensor itself if its last dimension is contiguous, else a copy: the kernels read rows of it."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()
