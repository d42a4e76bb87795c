"""PyTorch's own LSTM operator: the standard variant, and the coupled one, which is a standard LSTM with other weights.

On a CPU the operator is called as `torch.nn.LSTM` calls it, and autograd does the rest. cuDNN has no second derivative;
there a Function behind the operator computes the layers again by the kernels, or by the reference, under
`create_graph=True`.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions, N the steps of all rows of a packed batch together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import STANDARD, LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import routing, second_order, transforms
from lstm_triton.layer import Call, Gradients, LayerGradients, LayerResult, Needs
from lstm_triton.ragged import Packing
from lstm_triton.second_order import gradients_where_needed


def standard_weights(weights: Sequence[Tensor], spec: LSTMSpec) -> Sequence[Tensor]:
    """Return the weights of a standard LSTM that computes the same as these, of one or more layers and directions.

    Coupled gates: i = 1 - s(a_f) = s(-a_f), so the rows of the input gate are those of the forget gate with the other
    sign. All parameters but a projection (P, H) have the gate blocks f, g, o in their rows.
    """
    if not spec.coupled:
        return weights
    H = max(weight.shape[0] for weight in weights) // len(spec.gates)
    rows = H * len(spec.gates)
    return [torch.cat([-w[:H], w]) if w.shape[0] == rows else w for w in weights]


class Options(NamedTuple):
    """The arguments of the operator beside tensors, as of `torch.nn.LSTM`; dropout is 0 where it does not apply."""

    bias: bool
    num_layers: int
    dropout: float
    bidirectional: bool
    packing: Packing | None = None


def lstm_cell(
    input: Tensor, hx: tuple[Tensor, Tensor] | None, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor | None,
    bias_hh: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute one step as `torch.nn.LSTMCell` does: input (B, I) or (I,), states (B, H) or (H,)."""
    if input.dim() == 2:
        if hx is None:
            zeros = input.new_zeros(input.size(0), weight_hh.size(1))
            hx = (zeros, zeros)
        return torch._VF.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    if hx is None:
        zeros = input.new_zeros(1, weight_hh.size(1))
        rows = (zeros, zeros)
    else:
        rows = (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    h, c = torch._VF.lstm_cell(input.unsqueeze(0), rows, weight_ih, weight_hh, bias_ih, bias_hh)
    return h.squeeze(0), c.squeeze(0)


def lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a stack: x (T, B, I), h_0 (D·L, B, P), c_0 (D·L, B, H) -> output (T, B, D·P), h_n, c_n.

    Differentiable twice. With a packing x is (N, I) and output (N, D·P). weights: a standard LSTM's, as `torch.nn.LSTM`
    lists them. On CUDA dropout must be 0 where a gradient is wanted: what it drew could not be drawn again for a second
    derivative.
    """
    inputs = (x, h_0, c_0, *weights)
    tracked = torch.is_grad_enabled() and True in [t.requires_grad for t in inputs]
    # A trace and an exported program have room for operators alone.
    alone = torch.jit.is_tracing() or torch.compiler.is_compiling()
    if tracked and x.device.type == "cuda" and not alone:
        return twice_differentiable(options, *inputs)
    return operator(tracked or torch.jit.is_tracing(), options, *inputs)


def operator(
    train: bool, options: Options, x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator itself. It has a backward pass, and dropout, only for a forward pass with `train`."""
    bias, layers, dropout, bidirectional, packing = options
    train = train or dropout > 0
    if packing is not None:
        state = (h_0, c_0)
        return torch._VF.lstm(x, packing.batch_sizes, state, weights, bias, layers, dropout, train, bidirectional)
    return torch._VF.lstm(x, (h_0, c_0), weights, bias, layers, dropout, train, bidirectional, False)


def twice_differentiable(options: Options, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator, on x, h_0, c_0 and the weights, so that its results can be differentiated twice."""
    return SecondDerivative.apply(options, *operator(True, options, *inputs), *inputs)


class SecondDerivative(torch.autograd.Function):
    """apply(options, output, h_n, c_n, x, h_0, c_0, *weights) -> output, h_n, c_n, as they are.

    It stands behind the operator in the graph. A gradient passes through it to the operator; one that is to be
    differentiated again, or that is a batch of gradients, goes to the operator's inputs instead, which the layers are
    computed from again.
    """

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, inputs = tensors[:3], tensors[3:]
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        detached = tuple(result.detach() for result in results)
        # Of a single step with a projection c_n does not depend on weight_hr: where that alone is trained, it is fixed.
        fixed = [own for own, needed in zip(detached, ctx.needs_input_grad[1:4], strict=True) if not needed]
        ctx.mark_non_differentiable(*fixed)
        return detached

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, needs = ctx.saved_tensors, ctx.needs_input_grad[4:]  # a freed graph is PyTorch's usual error
        given = [grad for grad in grads if grad is not None]
        if not given or not transforms.beyond_operators((*inputs, *given), inputs[0], None):
            return None, *grads, *[None] * len(inputs)
        options = ctx.options
        projection = inputs[1].shape[2] != inputs[2].shape[2]
        call = Call(STANDARD.name, options.bias, projection, "operator")
        layers, order = (options.num_layers, 2 if options.bidirectional else 1), Order(len(inputs[0]))
        again = second_order.backward(
            Gradients(grads[0], grads[1], grads[2], None), inputs, needs, call, layers, order, options.packing,
            differentiable_stack((*inputs, *given)),
        )  # fmt: skip
        return None, None, None, None, *again


def differentiable_stack(tensors: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return what computes the operator's stack again so that it can be differentiated twice: kernels or reference."""
    from lstm_triton import autograd  # which imports this module

    x = tensors[0]
    chosen = routing.double_backward("operator", x.device, x.dtype, not autograd.plain(tensors)).name
    return second_order.forward if chosen == "reference" else autograd.stack_by_kernels


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call
) -> LayerResult:
    """Compute a layer, as `layer.forward`, without lengths and resets, for an operator of torch.compile.

    It keeps nothing for the backward pass: the size of what PyTorch's operator saves is not known beforehand, so the
    graph has no room for it.
    """
    assert not call.save and not call.states and not order.ragged
    flat = standard_weights(flat_weights(weights), call.spec)
    results = operator(False, layer_options(weights), x, h_0, c_0, *flat)
    cells = x.new_empty(0, dtype=accumulator_dtype(x.dtype))
    return LayerResult(*results, states=x.new_empty(0), gates=x.new_empty(0), cells=cells)


def backward(
    grads: Gradients, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], output: Tensor,
    gates: Tensor, cells: Tensor, order: Order, call: Call, needs: Needs,
) -> LayerGradients:  # fmt: skip
    """Return gradients, as `layer.backward`, from a forward pass that is computed again."""

    def leaf(tensor: Tensor, needed: bool) -> Tensor:
        return tensor.detach().requires_grad_(needed)

    names = list(weights[0].present())
    # Inside of an operator PyTorch leaves autograd out of every dispatch.
    included = torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
    with included, torch.enable_grad():
        own = [
            w._replace(**{name: leaf(t, name in wanted) for name, t in w.present().items()})
            for w, wanted in zip(weights, needs.weights, strict=True)
        ]
        inputs = [leaf(x, needs.x), leaf(h_0, needs.h_0), leaf(c_0, needs.c_0)]
        results = operator(True, layer_options(weights), *inputs, *standard_weights(flat_weights(own), call.spec))
        leaves = [*inputs, *flat_weights(own)]
        needed = [t.requires_grad for t in leaves]
        found = gradients_where_needed(results, grads[:3], [t for t in leaves if t.requires_grad], needed)
    of_x, of_h_0, of_c_0, *of_weights = (
        torch.zeros_like(t) if grad is None and t.requires_grad else grad for grad, t in zip(found, leaves, strict=True)
    )
    directions = [of_weights[n : n + len(names)] for n in range(0, len(of_weights), len(names))]
    named = [{name: g for name, g in zip(names, part, strict=True) if g is not None} for part in directions]
    return LayerGradients(of_x, of_h_0, of_c_0, named)


def layer_options(weights: Sequence[LSTMWeights]) -> Options:
    """Return the options of one layer with these directions."""
    return Options(weights[0].bias_ih is not None, 1, 0.0, len(weights) == 2)


def flat_weights(weights: Sequence[LSTMWeights]) -> list[Tensor]:
    """Return the parameters of all directions in one list, as the operator takes them."""
    return [w for direction in weights for w in direction if w is not None]
