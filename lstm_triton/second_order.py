"""The reference as an engine, for what differentiates in ways that no other is made for: often, or in a batch.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import UNREGULARIZED, Regularized
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lstm_triton import reference, transforms
from lstm_triton.layer import Call, Gradients
from lstm_triton.ragged import Packing


def forward(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec, order: Order
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a stack by the reference: output (T, B, D·P), h_n (D·L, B, P), c_n (D·L, B, H), c_t (T, B, D·H).

    x (T, B, I), h_0 (D·L, B, P), c_0 (D·L, B, H). In the accumulator type, like the operators, whatever autocast is
    around.
    """
    dtype = accumulator_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        wide = [[w.map(lambda weight: weight.to(dtype)) for w in weights] for weights in layers]
        inputs = (x.to(dtype), h_0.to(dtype), c_0.to(dtype))
        rules = [order.regularized] * len(layers)
        results = reference.lstm(*inputs, wide, spec, order.lengths, order.resets, rules)
    output, h_n, c_n, cells = (result.to(x.dtype) for result in results)
    return output, h_n, c_n, cells


def recomputed(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec, order: Order
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute as `forward`, but keep nothing for a backward pass except the arguments: it computes the steps again.

    A tracer or a transform of torch.func looks at the steps themselves, and keeps what it wants.
    """
    if torch.compiler.is_compiling() or transforms.active() or transforms.forward_mode() or torch.jit.is_tracing():
        return forward(x, h_0, c_0, layers, spec, order)
    arguments = (x, h_0, c_0, layers, spec, order)
    results: tuple[Tensor, Tensor, Tensor, Tensor] = checkpoint(
        forward, *arguments, use_reentrant=False, preserve_rng_state=False
    )
    return results


def single_step(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec,
    regularized: Regularized = UNREGULARIZED,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute a layer of one step by the reference: x (B, I) -> output (1, B, D·P), h_n (D, B, P), c_n (D, B, H)."""
    if len(weights) == 1:
        h, c = cell(x, h_0.squeeze(0), c_0.squeeze(0), weights[0], spec, regularized.direction(0).at(0))
        return h.unsqueeze(0), torch.stack([h]), c.unsqueeze(0)
    rules = (regularized.direction(n).at(0) for n in range(2))
    states = zip(h_0.unbind(0), c_0.unbind(0), weights, rules, strict=True)
    hidden, cells = zip(*[cell(x, h, c, w, spec, own) for h, c, w, own in states], strict=True)
    return torch.cat(hidden, -1).unsqueeze(0), torch.stack(hidden), torch.stack(cells)


def cell(
    x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights, spec: LSTMSpec, regularized: Regularized = UNREGULARIZED
) -> tuple[Tensor, Tensor]:
    """Compute one step by the reference, x (B, I), h (B, P), c (B, H), in the accumulator type as the kernels do."""
    dtype = accumulator_dtype(x.dtype)
    if dtype == x.dtype:
        return reference.cell(x, h, c, weights, spec, regularized)
    with torch.autocast(x.device.type, enabled=False):
        wide = (x.to(dtype), h.to(dtype), c.to(dtype), weights.map(lambda w: w.to(dtype)))
        h_next, c_next = reference.cell(*wide, spec, regularized)
    return h_next.to(x.dtype), c_next.to(x.dtype)


def backward(
    grads: Gradients, inputs: Sequence[Tensor], needs: Sequence[bool], call: Call, layers: tuple[int, int],
    order: Order, packing: Packing | None = None, compute: Callable[..., tuple[Tensor, ...]] = forward,
) -> list[Tensor | None]:  # fmt: skip
    """Return gradients that can be differentiated again, or in a batch: those of the reference, recomputed.

    - inputs: x, h_0, c_0 and the flat weights; `needs` says whose gradient is wanted
    - layers: how many there are, and how many directions each has
    - packing: how x and output are packed, if they are
    - compute: what takes the place of the reference, with the arguments and results of `forward`
    """
    given = [n for n, grad in enumerate(grads) if grad is not None]
    wanted_grads = [grads[n] for n in given]

    def results(*wanted: Tensor) -> list[Tensor]:
        """Return the results whose gradients are given, from the inputs whose gradients are wanted."""
        left = iter(wanted)
        x, h_0, c_0, *flat = (next(left) if needed else t for t, needed in zip(inputs, needs, strict=True))
        grouped = call.group(flat)
        L, D = layers
        own = order
        if packing is not None:
            x, own = packing.pad(x), Order(packing.T, packing.lengths)
        stack = [grouped[n : n + D] for n in range(0, L * D, D)]
        output, h_n, c_n, cells = compute(x, h_0, c_0, stack, call.spec, own)
        every = (packing.pack(output) if packing is not None else output, h_n, c_n, cells)
        return [every[n] for n in given]

    # Views: the graph from the gradients back to the inputs must start at tensors of this call alone. A tensor whose
    # gradient only a transform wanted that has ended requires none any more.
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        views = [t.view_as(t) for t, needed in zip(inputs, needs, strict=True) if needed]
        wanted = [t if t.requires_grad or transforms.active() else t.detach().requires_grad_() for t in views]
        if transforms.active():
            computed = iter(torch.func.vjp(results, *wanted)[1](wanted_grads))
            return [next(computed) if needed else None for needed in needs]
        return gradients_where_needed(results(*wanted), wanted_grads, wanted, needs, create_graph=again)


def double_backward(
    cotangents: Sequence[Tensor | None], grads: Gradients, inputs: Sequence[Tensor], needs: Sequence[bool],
    wanted: Sequence[bool], call: Call, order: Order,
) -> list[Tensor | None]:  # fmt: skip
    """Return the gradients of <cotangents, gradients that `backward` returns> by grads and inputs, by the reference.

    - cotangents: of the gradients that `needs` names; of one layer
    - wanted: of which of the four grads, x, h_0, c_0 and the weights a gradient is wanted
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        own = [t if t is None else t.view_as(t) for t in (*grads, *inputs)]
        first = backward(Gradients(*own[:4]), own[4:], needs, call, (1, len(inputs[1])), order)  # type: ignore[arg-type]
        results = [gradient for gradient, needed in zip(first, needs, strict=True) if needed]
        leaves = [t for t, needed in zip(own, wanted, strict=True) if needed]
        return gradients_where_needed(results, cotangents, leaves, wanted, create_graph=again)


def gradients_where_needed(
    results: Sequence[Any], grads: Sequence[Tensor | None], wanted: Sequence[Any], needs: Sequence[bool],
    **options: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Return `torch.autograd.grad` of the results whose gradient is given, by `wanted`, where `needs` says so.

    Both are tensors or the edges of a graph.
    """
    given = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    outputs, grad_outputs = zip(*given, strict=True)
    computed = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, **options))
    return [next(computed) if needed else None for needed in needs]
