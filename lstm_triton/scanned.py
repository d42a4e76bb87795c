"""A layer as PyTorch's `scan`, an operator that holds the equations of one step and applies them to every step.

For programs that are exported and run without this library: `scan` belongs to PyTorch, takes any number of steps and
rows, and the exporter of ONNX translates it to ONNX's Scan. The equations are those of `reference.py`.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import reference

Step = Callable[..., tuple[Any, Any, Any, Any]]
"""(h, c, what belongs to the step of each sequence, constants) -> h, c, output, c_t as it is returned."""

Scan = Callable[[Step, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Tensor, Tensor, Tensor]]
"""(step, [h_0 (B, P), c_0 (B, H)], sequences (T, B, ...), constants) -> h_n, c_n, output (T, B, P), c_t (T, B, H)."""


def by_pytorch(
    step: Step, initial: Sequence[Tensor], sequences: Sequence[Tensor], constants: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply a step to all steps by PyTorch's operator: a `Scan`."""
    from torch._higher_order_ops.scan import scan, scan_op

    initial = [state.clone() for state in initial]  # it takes no tensor twice
    if torch.is_grad_enabled():
        initial = [depending(state, (*initial, *sequences, *constants)) for state in initial]
    if not torch.compiler.is_dynamo_compiling():
        return scan_op(step, initial, list(sequences), tuple(constants))

    def combine(states: list[Tensor], now: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Compute a step as `scan` has it, in which alone Dynamo knows the operator; it finds the constants itself."""
        h, c, output, state = step(*states, *now, *constants)
        return [h, c], [output, state]

    (h, c), (output, cells) = scan(combine, list(initial), list(sequences))
    return h, c, output, cells


def layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, order: Order,
    scan: Scan = by_pytorch,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute a layer: x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> output (T, B, D·P), h_n, c_n, c_t (T, B, D·H).

    In the accumulator type, as the other engines; results of x's type.
    """
    dtype = accumulator_dtype(x.dtype)
    of_each = []
    for n, w in enumerate(weights):
        wide = (x.to(dtype), h_0[n].to(dtype), c_0[n].to(dtype), w.map(lambda weight: weight.to(dtype)))
        results = direction(*wide, spec, order.direction(n), scan)
        of_each.append([result.to(x.dtype) for result in results])
    output, h_n, c_n, cells = zip(*of_each, strict=True)
    return torch.cat(output, -1), torch.stack(h_n), torch.stack(c_n), torch.cat(cells, -1)


def direction(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order, scan: Scan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute one direction: x (T, B, I), h_0 (B, P), c_0 (B, H) -> output (T, B, P), h_n, c_n, c_t (T, B, H).

    Beyond a row's length the row keeps its state, as in `reference.layer_states`.
    """
    regularized = order.regularized
    gates, begun = reference.input_side(x, weights), None if order.resets is None else order.resets[..., None]
    of_steps = dict(gates=gates, beyond=order.beyond(), begun=begun, codes=regularized.codes)
    sequences = {name: values for name, values in of_steps.items() if values is not None}
    if order.reverse:
        sequences = {name: values.flip(0) for name, values in sequences.items()}
    # What a step reads of the parameters; the blocks of a peephole apart, so that no step divides it, and not as views
    # of one tensor, which PyTorch's operator does not take.
    H, blocks = c_0.shape[1], {}
    if weights.weight_ch is not None:
        for n, gate in enumerate(spec.peephole_gates):
            blocks[f"weight_ch_{gate}"] = weights.weight_ch.narrow(0, n * H, H).clone()
    of_input = dict.fromkeys(("weight_ih", "bias_ih", "weight_ln_ih", "weight_ch"))
    of_all = weights._asdict() | of_input | blocks | dict(hidden=regularized.hidden)
    constants = {name: value for name, value in of_all.items() if value is not None}

    def step(h: Tensor, c: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute one step from what belongs to it of the sequences, and the constants."""
        now = dict(zip((*sequences, *constants), rest, strict=True))
        own = regularized._replace(codes=now.get("codes"), hidden=now.get("hidden"))
        w = LSTMWeights(*(now.get(name) for name in LSTMWeights._fields))  # type: ignore[arg-type]
        v = {gate: now[f"weight_ch_{gate}"] for gate in spec.peephole_gates}
        kept_h, kept_c = h, c
        if "begun" in now:
            h, c = (state.masked_fill(now["begun"], 0) for state in (h, c))
        h, c = reference.update(now["gates"], h, c, w, v, spec, own)
        output, state = h, c
        if "beyond" in now:
            output, state = (result.masked_fill(now["beyond"], 0) for result in (h, c))
            h, c = torch.where(now["beyond"], kept_h, h), torch.where(now["beyond"], kept_c, c)
        return h, c, output.clone(), state.clone()

    h, c, output, states = scan(step, (h_0, c_0), list(sequences.values()), list(constants.values()))
    if order.reverse:
        output, states = output.flip(0), states.flip(0)
    return output, h, c, states


def depending(state: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Return a state (B, F) unchanged, for autograd a function of the tensors: they get zero as its gradient.

    Of initial states that require no gradient `scan` of PyTorch 2.11 passes none from step to step, and leaves out what
    comes that way: its gradients of weights and input are wrong.
    """
    total = torch.stack([t.sum() for t in tensors if t.is_floating_point()]).sum()
    return torch.where(torch.zeros_like(state, dtype=torch.bool), total, state)
