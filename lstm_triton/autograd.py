"""One layer as a differentiable function: torch.library operators with fakes, and the autograd.Function on them.

`layer_forward` and `layer_backward` know nothing of gradients; the Function joins them. Where a gradient is itself to
be differentiated (`create_graph=True`) the backward pass is a Function of its own; where nothing but the reference is
made for that (a third derivative, a batch), it differentiates the reference instead. For torch.compile and
torch.export all of it is one operator, `layer`, which they decompose when they differentiate: so an exported program
can be trained. A plain call, which nothing but autograd watches, runs what the operators run, without them: an operator
costs more than a step of a small layer.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from importlib import import_module
from itertools import compress
from typing import Any

import torch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import Layer, matmul_precision
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from lstm_triton_kernels.watch import check_launches
from torch import Tensor

from lstm_triton import (
    aten,
    double_backward,
    layer,
    normalized,
    onnx_node,
    routing,
    scanned,
    second_order,
    transforms,
)
from lstm_triton.batching import one_by_one
from lstm_triton.directions import OneByOne
from lstm_triton.layer import Call, Gradients, LayerGradients, LayerResult, Needs

LOOPS = {
    "persistent": "lstm_triton.persistent", "stepwise": "lstm_triton_kernels.sequence_replayed",
    "eager": "lstm_triton.eager",
}  # fmt: skip
"""Engine to the module that computes the steps, of all directions or of one; imported when first used."""

TANGENTS = {
    "persistent": "lstm_triton_kernels.tangents_replayed", "stepwise": "lstm_triton_kernels.tangents_replayed",
    "eager": "lstm_triton.eager_tangents",
}  # fmt: skip
"""Engine to the module that computes tangents of the steps, for the second derivative; imported when first used."""

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Types of tensors whose operators nothing else looks at."""

INPUTS = "Tensor x, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? lengths, Tensor? resets, Tensor? seed"
CALL = "str variant, bool bias, bool projection, str engine, bool save, bool recompute, bool states, float[] rules"
"""The arguments of every operator, in the order of `Inputs` and `Call`."""


class Inputs:
    """The tensors of a call: x (T, B, I), h_0 (D, B, P), c_0 (D, B, H), the parameters of all directions, the order.

    seed: (1,) int64, of the masks of regularised steps; None where none are drawn.
    """

    def __init__(self, arguments: Sequence[Any]) -> None:
        self.x, self.h_0, self.c_0, self.weights, self.lengths, self.resets, self.seed, *call = arguments
        self.call = Call(*call)

    @cached_property
    def order(self) -> Order:
        """The order of the steps, with the masks of regularised ones: drawn here."""
        return order_of(self.call, self.x, self.h_0, self.c_0, self.lengths, self.resets, self.seed)

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """Those that a gradient may be asked of."""
        return (self.x, self.h_0, self.c_0, *self.weights)


def order_of(
    call: Call, x: Tensor, h_0: Tensor, c_0: Tensor, lengths: Tensor | None, resets: Tensor | None,
    seed: Tensor | None,
) -> Order:  # fmt: skip
    """Return the order of a layer's steps, with the masks of regularised ones."""
    return Order(x.shape[0], lengths, resets, regularized=call.regularized(seed, x, h_0, c_0))


def resolved(call: Call, x: Tensor, h_0: Tensor, c_0: Tensor, ragged: bool) -> Call:
    """Return the call with the engine that computes it, now that its sizes are known."""
    D, B, H = c_0.shape
    P = h_0.shape[2] if call.projection else 0
    sizes = Layer(call.spec, x.shape[0], B, H, D, x.dtype, matmul_precision(), P=P, training=call.save, ragged=ragged)
    return call._replace(engine=routing.now(call.engine, sizes, x.device))


def passes(call: Call) -> tuple[Callable[..., LayerResult], Callable[..., LayerGradients]]:
    """Return the forward and the backward pass of a layer by the engine of a call.

    What the one saves the other can read, whichever engine each of them is; but PyTorch's operator saves nothing.
    """
    if call.engine == "operator inside":
        return aten.forward, aten.backward
    loop, of_layer = loop_of(call.engine), normalized if call.spec.layer_norm else layer
    return partial(of_layer.forward, loop=loop), partial(of_layer.backward, loop=loop)


def loop_of(engine: str) -> layer.Loop:
    """Return what computes the steps of all directions by an engine of LOOPS."""
    steps = import_module(LOOPS[engine])
    return steps if engine == "persistent" else OneByOne(steps)


def lstm_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute a layer: x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> the first four fields of `layer.LayerResult`.

    x is finite beyond a row's length; all of one type and device. Differentiable. seed: as of `Inputs`.
    """
    flat = [w for direction in weights for w in direction if w is not None]
    arguments = (x, h_0, c_0, flat, order.lengths, order.resets, seed, *call)
    if torch.compiler.is_compiling() and not transforms.traced():
        return torch.ops.lstm_triton.layer.default(*arguments)
    return differentiable_layer(*arguments)


def differentiable_layer(*arguments: Any) -> Any:
    """Return the first four fields of `layer.LayerResult`, with their gradient where one may be asked."""
    given = Inputs(arguments)
    call = given.call
    if type(given.x) not in PLAIN and transforms.exporting_to_onnx() and not torch.jit.is_tracing():
        return layer_in_onnx(given)
    tensors = given.differentiable
    recorded = transforms.recorded(tensors) if transforms.active() else True in [t.requires_grad for t in tensors]
    if recorded and torch.is_grad_enabled():
        call = call._replace(save=call.engine != "operator inside")
        function = TransformedLayerFunction if transforms.active() else LSTMLayerFunction
        return function.apply(call, given.lengths, given.resets, given.seed, *tensors)[:4]
    run = forward_pass if unwatched(tensors) else layer_forward
    return run(*arguments)[:4]


def layer_in_onnx(given: Inputs) -> tuple[Tensor, ...]:
    """Return the first four fields of `layer.LayerResult` for the exporter of ONNX: its LSTM node, or a scan.

    Raises RuntimeError if masks are drawn.
    """
    call = given.call
    routing.refuse_drawn_in_onnx(given.seed is not None)
    tensors = (given.x, given.h_0, given.c_0, call.group(given.weights), call.spec)
    if onnx_node.why_not_layer(call, given.x.dtype, given.resets) is None:
        return *onnx_node.layer(*tensors, given.lengths), given.x.new_empty(0)
    with torch.no_grad():
        return scanned.layer(*tensors, given.order)


def stack_by_kernels(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec, order: Order
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute a stack by the kernels, differentiable twice; arguments and results of `second_order.forward`."""
    D, last_h, last_c = len(layers[0]), [], []
    for n, weights in enumerate(layers):
        w, own = weights[0], slice(n * D, (n + 1) * D)
        call = Call(spec.name, w.bias_ih is not None, w.weight_hr is not None, "kernels", states=n == len(layers) - 1)
        x, h_n, c_n, states = lstm_layer(x, h_0[own], c_0[own], weights, order, call)
        last_h.append(h_n)
        last_c.append(c_n)
    return x, torch.cat(last_h), torch.cat(last_c), states


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Return whether nothing but autograd looks at what is called: no tracer, mode, transform or tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not transforms.active()
        and not torch.jit.is_tracing()
        and all(type(t) in PLAIN for t in tensors)
    )


def plain(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether nothing but autograd looks at what is called, and no tensor is a batch or has a tangent."""
    present = [t for t in tensors if t is not None]
    return unwatched(present) and not transforms.forward_mode() and not transforms.batched(present)


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Make the device current, on which Triton launches, and switch autocast off: the types are chosen by now."""
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    cast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    off = torch.autocast(device.type, enabled=False) if cast else nullcontext()
    with on, off:
        yield


def forward_pass(*arguments: Any) -> tuple[Tensor, ...]:
    """Compute the fields of `layer.LayerResult`; arguments as of INPUTS and CALL."""
    check_launches()
    given = Inputs(arguments)
    inputs = (given.x, given.h_0, given.c_0)
    call = resolved(given.call, *inputs, given.order.ragged)
    with computing_on(given.x.device):
        return passes(call)[0](*inputs, call.group(given.weights), given.order, call)


layer_forward = torch.library.custom_op(
    "lstm_triton::layer_forward",
    forward_pass,
    mutates_args=(),
    schema=f"({INPUTS}, {CALL}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@layer_forward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    given = Inputs(arguments)
    shapes = layer.result_shapes(given.x, given.c_0, given.call.group(given.weights), given.call)
    return tuple(given.x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


layer_forward.register_vmap(one_by_one(layer_forward))


def backward_pass(
    grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, grad_states: Tensor | None,
    output: Tensor, gates: Tensor, cells: Tensor, needs: Sequence[bool], *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    """Compute the gradients of x, h_0, c_0 and each weight, of those for which `needs` (in that order) is true."""
    check_launches()
    given = Inputs(arguments)
    inputs = (given.x, given.h_0, given.c_0)
    call = resolved(given.call._replace(save=True), *inputs, given.order.ragged)
    grads = Gradients(grad_output, grad_h_n, grad_c_n, grad_states)
    saved = (output, gates, cells, given.order, call, needs_of(call, needs))
    with computing_on(given.x.device):
        return distinct(passes(call)[1](grads, *inputs, call.group(given.weights), *saved), call)


def needs_of(call: Call, needs: Sequence[bool]) -> Needs:
    """Return which gradients are wanted, from one answer for each of x, h_0, c_0 and the weights."""
    names = call.spec.parameter_names(call.bias, call.projection)
    needed = [needs[n : n + len(names)] for n in range(3, len(needs), len(names))]
    return Needs(needs[0], needs[1], needs[2], [list(compress(names, part)) for part in needed])


def distinct(gradients: LayerGradients, call: Call) -> list[Tensor]:
    """Return the gradients that there are in one list, no tensor twice."""
    names = call.spec.parameter_names(call.bias, call.projection)
    flat = [gradients.x, gradients.h_0, gradients.c_0]
    flat += [direction.get(name) for direction in gradients.weights for name in names]
    found: list[Tensor] = []
    for gradient in flat:
        if gradient is not None:
            # Both biases have the same gradient, and an operator's outputs may not be the same tensor.
            found.append(gradient.clone() if any(gradient is other for other in found) else gradient)
    return found


layer_backward = torch.library.custom_op(
    "lstm_triton::layer_backward",
    backward_pass,
    mutates_args=(),
    schema="(Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_states, Tensor output, "
    f"Tensor gates, Tensor cells, bool[] needs, {INPUTS}, {CALL}) -> Tensor[]",
)


@layer_backward.register_fake
def _(
    grad_output: Any, grad_h_n: Any, grad_c_n: Any, grad_states: Any, output: Tensor, gates: Tensor, cells: Tensor,
    needs: Sequence[bool], *arguments: Any,
) -> list[Tensor]:  # fmt: skip
    return [t.new_empty(t.shape) for t in compress(Inputs(arguments).differentiable, needs)]


layer_backward.register_vmap(one_by_one(layer_backward))

LAYER = torch.library.Library("lstm_triton", "FRAGMENT")
LAYER.define(f"layer({INPUTS}, {CALL}) -> (Tensor, Tensor, Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,))
LAYER.impl("layer", differentiable_layer, "CompositeImplicitAutograd")


class LSTMLayerFunction(torch.autograd.Function):
    """apply(call, lengths, resets, seed, x, h_0, c_0, *weights) -> the fields of `layer.LayerResult`.

    Outside of torch.func: a Function that has `setup_context` looks up its signature at every call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = compute(*inputs)
        keep(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, gates, cells, lengths, resets, seed, *inputs = ctx.saved_tensors
        given = Gradients(grads[0], grads[1], grads[2], grads[3] if ctx.call.states else None)
        needs = list(ctx.needs_input_grad[4:])
        if all(grad is None for grad in given):
            return (None,) * len(ctx.needs_input_grad)
        if transforms.beyond_operators((*inputs, *given), hidden, ctx.recorder):
            x, h_0, c_0, *_ = inputs
            watched = not plain((*inputs, *given))
            regularized = bool(ctx.call.rules) or ctx.call.spec.layer_norm
            if routing.double_backward(ctx.call.engine, x.device, x.dtype, watched, regularized).name == "reference":
                layers, order = (1, len(inputs[1])), order_of(ctx.call, x, h_0, c_0, lengths, resets, seed)
                again = second_order.backward(given, inputs, needs, ctx.call, layers, order)
                return None, None, None, None, *again
            constants = (ctx.call, needs, lengths, resets, hidden.detach(), gates, cells)
            found = iter(LayerGradientsFunction.apply(*constants, *given, *inputs))
            return None, None, None, None, *(next(found) if needed else None for needed in needs)
        run: Callable[..., list[Tensor]] = layer_backward
        if unwatched([t for t in (*inputs, *given) if t is not None]):
            run = backward_pass
        x, h_0, c_0, *weights = inputs
        with torch.no_grad():  # torch.func's tensors require gradients even here
            arguments = (x, h_0, c_0, weights, lengths, resets, seed, *ctx.call)
            computed = iter(run(*given, hidden, gates, cells, needs, *arguments))
        return None, None, None, None, *(next(computed) if needed else None for needed in needs)


class LayerGradientsFunction(torch.autograd.Function):
    """apply(call, needs, lengths, resets, output, gates, cells, *grads, x, h_0, c_0, *weights) -> gradients.

    The backward pass of a layer where it is differentiated itself: the gradients that `needs` names. Its steps are not
    regularised. grads: the fields of `layer.Gradients`. What the forward pass saved is a constant here: `backward`
    knows on what that depends.
    """

    @staticmethod
    def forward(
        ctx: Any, call: Call, needs: Sequence[bool], lengths: Tensor | None, resets: Tensor | None, output: Tensor,
        gates: Tensor, cells: Tensor, *tensors: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        check_launches()
        grads, (x, h_0, c_0, *weights) = Gradients(*tensors[:4]), tensors[4:]
        order, grouped = Order(len(x), lengths, resets), call.group(weights)
        call = resolved(call._replace(save=True), x, h_0, c_0, order.ragged)
        with computing_on(x.device):
            activated = layer.activated_gates(x, h_0, grouped, output, gates, cells, order, call)
            steps = loop_of(call.engine).backward(grads, activated, cells, grouped, order, call)
            read = (x, h_0, grouped, output, activated, cells, order, call)
            found = distinct(layer.gradients(steps, *read, needs_of(call, needs)), call)
        ctx.call, ctx.needs = call, needs
        ctx.set_materialize_grads(False)
        # Where the gates were not kept for the first backward pass, the second does without kept gradients of them.
        d_gates, d_hidden = (None, None) if call.recompute else (steps.gates, steps.hidden)
        ctx.save_for_backward(lengths, resets, output, gates, cells, d_gates, d_hidden, *tensors)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        lengths, resets, output, gates, cells, d_gates, d_hidden, *tensors = ctx.saved_tensors
        grads, inputs = Gradients(*tensors[:4]), tensors[4:]
        call, wanted = ctx.call, list(ctx.needs_input_grad[7:])
        constants = (None,) * 7
        if all(v is None for v in cotangents):
            return *constants, *[None] * len(tensors)
        order = Order(len(inputs[0]), lengths, resets)
        given = (*tensors, *cotangents)
        if transforms.beyond_operators(given, output, None) or not unwatched([t for t in given if t is not None]):
            again = second_order.double_backward(cotangents, grads, inputs, ctx.needs, wanted, call, order)
            return *constants, *again
        check_launches()
        x, h_0, c_0, *weights = inputs
        grouped, loop = call.group(weights), loop_of(call.engine)
        v = iter(cotangents)
        v_x, v_h_0, v_c_0, *v_weights = (next(v) if needed else None for needed in ctx.needs)
        with torch.no_grad(), computing_on(x.device):
            activated = layer.activated_gates(x, h_0, grouped, output, gates, cells, order, call)
            if d_gates is None:
                d_gates, d_hidden, *_ = loop.backward(grads, activated, cells, grouped, order, call)
            saved = (output, activated, cells, grads, d_gates, d_hidden)
            first = double_backward.First(x, h_0, c_0, grouped, order, *saved)
            along = double_backward.Cotangents(v_x, v_h_0, v_c_0, call.group(v_weights))
            steps = import_module(TANGENTS[call.engine])
            of_inputs, of_grads = needs_of(call, wanted[4:]), any(wanted[:4])
            found = double_backward.backward(first, along, call, of_inputs, of_grads, loop, steps)
            flat = iter(distinct(found.inputs, call))
        of_results = (grad if needed else None for grad, needed in zip(found.grads, wanted[:4], strict=True))
        return *constants, *of_results, *(next(flat) if needed else None for needed in wanted[4:])


def compute(
    call: Call, lengths: Tensor | None, resets: Tensor | None, seed: Tensor | None, x: Tensor, h_0: Tensor, c_0: Tensor,
    *weights: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compute what the Function returns."""
    run = forward_pass if unwatched((x, h_0, c_0, *weights)) else layer_forward
    return run(x, h_0, c_0, weights, lengths, resets, seed, *call)


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what the backward pass of the Function reads."""
    ctx.recorder = transforms.recorder()
    ctx.call, *tensors = inputs
    hidden, _, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, gates, cells, *tensors)


class TransformedLayerFunction(LSTMLayerFunction):
    """The same inside of torch.func's transforms."""

    generate_vmap_rule = True
    forward = staticmethod(compute)  # type: ignore[assignment]
    setup_context = staticmethod(keep)
