"""PyTorch's own LSTM for the standard variant, made differentiable more than once.

`torch.nn.LSTM`'s operator has no double backward where oneDNN or cuDNN serves it. The Function here runs the operator
on detached tensors, keeps the graph that it records, and differentiates the reference only under `create_graph=True`.
What that graph saves is saved by the Function, as its own.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from lstm_triton import transforms
from lstm_triton.autograd import Call, differentiable_gradients, gradients_where_needed
from lstm_triton.ragged import Packing
from lstm_triton.spec import LSTMSpec, LSTMWeights


def serves(x: Tensor, spec: LSTMSpec) -> bool:
    """Whether PyTorch's own LSTM computes this call as this library would.

    It has the standard variant only, and on the CPU it rounds the cell state of half types at every step. Under
    torch.compile the opaque operator is used instead, which does not unroll the sequence; so it is under torch.func,
    to which the graph that the Function keeps would be hidden.
    """
    if torch.compiler.is_compiling() or transforms.active() or transforms.forward_mode() or not spec.standard:
        return False
    return x.device.type == "cuda" or x.dtype in (torch.float32, torch.float64)


def serves_cell(x: Tensor, spec: LSTMSpec) -> bool:
    """Whether its cell serves: on the CPU, where it is quicker than one step of the layer and differentiable twice."""
    return serves(x, spec) and x.device.type == "cpu"


def lstm_cell(x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights) -> tuple[Tensor, Tensor]:
    """x (B, I), h and c (B, H) -> h, c."""
    return torch._VF.lstm_cell(x, (h, c), *weights.present().values())


def lstm_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], packing: Packing | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> output (T, B, D·P), h_n (D, B, P), c_n (D, B, H).

    With a packing x is (N, I) and output (N, D·P), N the steps of all rows together.
    """
    bias, projection = weights[0].bias_ih is not None, weights[0].weight_hr is not None
    flat = [w for direction in weights for w in direction.present().values()]
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, c_0, *flat))
    if tracked and not torch.jit.is_tracing():  # a trace has room for operators alone
        return ATenLayerFunction.apply(len(weights) == 2, bias, projection, packing, x, h_0, c_0, *flat)
    return call(torch.jit.is_tracing(), len(weights) == 2, bias, packing, x, h_0, c_0, *flat)


def call(
    train: bool, bidirectional: bool, bias: bool, packing: Packing | None,
    x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The operator itself, for one layer. cuDNN has a backward pass only for a forward pass with `train`."""
    options = (bias, 1, 0.0, train, bidirectional)
    if packing is not None:
        return torch._VF.lstm(x, packing.batch_sizes, (h_0, c_0), list(weights), *options)
    return torch._VF.lstm(x, (h_0, c_0), list(weights), *options, False)


@dataclass
class InnerGraph:
    """The graph that the operator recorded, between its results and its inputs, without the tensors that it saved.

    - outputs, inputs: its edges, None where no gradient passes
    - saved: those tensors, while a backward pass runs through it; else they are the outer graph's alone, so that hooks
      see them, and they are freed with it
    """

    outputs: list[GradientEdge | None] = field(default_factory=list)
    inputs: list[GradientEdge | None] = field(default_factory=list)
    saved: Sequence[Tensor] = ()

    @contextmanager
    def holding(self, saved: Sequence[Tensor]) -> Iterator[None]:
        """Inside, the graph has the tensors that it saved."""
        self.saved = saved
        try:
            yield
        finally:
            self.saved = ()


def edge(tensor: Tensor) -> GradientEdge | None:
    """Where the gradient of a tensor enters its graph."""
    return get_gradient_edge(tensor) if tensor.requires_grad else None


class ATenLayerFunction(torch.autograd.Function):
    """apply(bidirectional, bias, projection, packing, x, h_0, c_0, *weights) -> output, h_n, c_n."""

    @staticmethod
    def forward(
        ctx: Any, bidirectional: bool, bias: bool, projection: bool, packing: Packing | None, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        graph, saved = InnerGraph(), []

        def keep(tensor: Tensor) -> int:
            saved.append(tensor.detach())
            return len(saved) - 1

        with torch.enable_grad(), saved_tensors_hooks(keep, lambda n: graph.saved[n]):
            inner = [t.detach().requires_grad_(t.requires_grad) for t in inputs]
            results = call(True, bidirectional, bias, packing, *inner)
        graph.outputs, graph.inputs = list(map(edge, results)), list(map(edge, inner))
        ctx.call, ctx.packing = Call(LSTMSpec().name, bias, projection, "cudnn"), packing
        ctx.graph, ctx.count = graph, len(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *saved)
        saved.clear()  # the graph holds the hook, the hook this list
        detached = tuple(result.detach() for result in results)
        # Of a single step with a projection c_n does not depend on weight_hr: where that alone is trained, it is fixed.
        pairs = zip(detached, results, strict=True)
        ctx.mark_non_differentiable(*(own for own, result in pairs if not result.requires_grad))
        return detached

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[4:]
        tensors = ctx.saved_tensors  # read on every path: a freed graph is PyTorch's usual error
        inputs, saved = tensors[: ctx.count], tensors[ctx.count :]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        if transforms.differentiated_again((*inputs, *grads), inputs[0], None):
            again = differentiable_gradients((*grads, None), inputs, needs, ctx.call, packing=ctx.packing)
            return None, None, None, None, *again
        wanted = [own for own, needed in zip(ctx.graph.inputs, needs, strict=True) if needed]
        with ctx.graph.holding(saved):
            # Whether the user will come back is known to the outer graph alone: keep the inner one.
            found = gradients_where_needed(ctx.graph.outputs, grads, wanted, needs, retain_graph=True)
        return None, None, None, None, *found
