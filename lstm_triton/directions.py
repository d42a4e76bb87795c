"""The steps of a layer one direction after the other, by a loop over the steps of a single direction.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from lstm_triton_kernels.normalize import Products
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton.layer import Call, Gradients, States, StepGradients, row_contiguous


@dataclass(frozen=True)
class OneByOne:
    """A `layer.Loop` from a module like `eager`, whose functions compute one direction of rows of full length.

    Of rows with lengths the steps beyond are computed, too, and then set to zero; the second direction of such rows
    runs forwards, on flipped sequences.
    """

    steps: ModuleType

    def forward(
        self, x: Tensor, gates: Tensor | None, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order,
        call: Call,
    ) -> States:  # fmt: skip
        """Compute all steps, as `layer.Loop.forward`."""
        (T, B, _), (D, _, H), P = x.shape, c_0.shape, h_0.shape[2]
        zoned = order.regularized.rules.zoneout_c > 0  # which reads c_{t-1} when c_t is written
        every = call.every_cell or order.lengths is not None or zoned
        output = x.new_empty(T, B, D * P)
        h_n, c_n = x.new_empty(D, B, P), x.new_empty(D, B, H)
        cells = x.new_empty(D, T + 1 if every else 1, B, H, dtype=accumulator_dtype(x.dtype))
        for n, w in enumerate(weights):
            own, out = order.direction(n), output[:, :, n * P : (n + 1) * P]
            cells[n, own.initial_slot(every)] = c_0[n]
            of_gates = None if gates is None else gates[n]
            initial = row_contiguous(h_0[n])
            self._forward(x, of_gates, initial, w.map(Tensor.contiguous), call, own, out, cells[n])
            h_n[n] = own.last(out)
            c_n[n] = own.last(own.cells_written(cells[n]) if every else cells[n])
        return output, h_n, c_n, cells

    def _forward(
        self, x: Tensor, gates: Tensor | None, h_0: Tensor, w: LSTMWeights, call: Call, order: Order, output: Tensor,
        cells: Tensor,
    ) -> None:  # fmt: skip
        """Compute one direction, into output (T, B, P), cells (T + 1 or 1, B, H) and saved gates (T, B, G·H)."""
        if runs_flipped(order):
            flipped, flipped_output = order.flip(gates), torch.empty_like(output)
            flipped_cells = torch.empty_like(cells)
            flipped_cells[0] = cells[order.initial_slot(saved=True)]
            self._forward(x, flipped, h_0, w, call, order.flipped(), flipped_output, flipped_cells)
            output.copy_(order.flip(flipped_output))
            cells.copy_(order.flip(flipped_cells))
            if gates is not None and flipped is not None and call.save_gates:
                gates.copy_(order.flip(flipped))
            return
        gate_input = None if call.fused(len(x)) else gates
        saved = gates if call.save_gates else None
        whole = order._replace(lengths=None)
        self.steps.forward(x, gate_input, h_0, w, call.spec, whole, output, saved, cells)
        beyond = order.beyond()
        if beyond is not None:
            output.masked_fill_(beyond, 0)
            order.cells_written(cells).masked_fill_(beyond, 0)

    def backward(
        self, grads: Gradients, gates: Tensor, cells: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call,
        products: Sequence[Products] | None = None,
    ) -> StepGradients:  # fmt: skip
        """Compute all steps backward, as `layer.Loop.backward`; products: of each direction, where normalised."""
        D, T, B, _ = gates.shape
        H, P = cells.shape[3], weights[0].weight_hh.shape[1]
        d_gates = torch.empty_like(gates)
        d_hidden = gates.new_empty(D, T, B, P) if call.projection else None
        kept = cells.new_zeros(D, B, P) if order.regularized.rules.zoneout_h else None
        dc = torch.zeros_like(cells[:, 0])
        output = grads.output.contiguous() if grads.output is not None else None
        for n, w in enumerate(weights):
            own = order.direction(n)
            of_output = output[:, :, n * P : (n + 1) * P] if output is not None else None
            of_states = grads.states[:, :, n * H : (n + 1) * H] if grads.states is not None else None
            of_h_n, of_c_n = (gradient[n] if gradient is not None else None for gradient in (grads.h_n, grads.c_n))
            if order.lengths is not None:
                # A row's last states are those of its own last step, and nothing comes from beyond.
                of_output = own.add_to_last(of_output, of_h_n, gates.dtype)
                of_states = own.add_to_last(of_states, of_c_n, cells.dtype)
                of_h_n = of_c_n = None
            dh = gates.new_zeros(B, P) if of_h_n is None else of_h_n.clone(memory_format=torch.contiguous_format)
            if of_c_n is not None:
                dc[n] += of_c_n
            given = (of_output, of_states, dh, dc[n])
            out = (d_gates[n], part(d_hidden, n), part(kept, n))
            normalized = () if products is None else (products[n],)
            self._backward(*given, w.map(Tensor.contiguous), call.spec, own, gates[n], cells[n], *out, *normalized)
        return StepGradients(d_gates, d_hidden, dc, kept)

    def _backward(
        self, grad_output: Tensor | None, grad_states: Tensor | None, dh: Tensor, dc: Tensor, w: LSTMWeights,
        spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor, d_gates: Tensor, d_hidden: Tensor | None,
        kept: Tensor | None, *products: Products,
    ) -> None:  # fmt: skip
        """Compute one direction backward, into d_gates (T, B, G·H) and d_hidden (T, B, P), in place in dh, dc and kept.

        grad_output (T, B, P) and grad_states (T, B, H) of h_t and c_t, zero beyond a row's length; dh (B, P) and dc
        (B, H) of the states after the last step, then of those before the first; kept (B, P), zero, then of the h
        before the first what zoneout kept; products: of a normalised layer.
        """
        if not runs_flipped(order):
            grads = (grad_output, grad_states, dh, dc)
            whole = order._replace(lengths=None)
            return self.steps.backward(*grads, w, spec, whole, gates, cells, d_gates, d_hidden, kept, *products)
        d_flipped, hidden = torch.empty_like(d_gates), None if d_hidden is None else torch.empty_like(d_hidden)
        grads = (order.flip(grad_output), order.flip(grad_states), dh, dc)
        saved = (order.flip(gates), order.flip(cells))
        of_flipped = (own.flipped(order) for own in products)
        self._backward(*grads, w, spec, order.flipped(), *saved, d_flipped, hidden, kept, *of_flipped)
        d_gates.copy_(order.flip(d_flipped))
        if d_hidden is not None and hidden is not None:
            d_hidden.copy_(order.flip(hidden))


def part(tensor: Tensor | None, n: int) -> Tensor | None:
    """Return what belongs to direction n."""
    return None if tensor is None else tensor[n]


def runs_flipped(order: Order) -> bool:
    """Return whether rows run backwards, each from its own end; a single step has no direction."""
    return order.reverse and order.lengths is not None and order.T > 1
