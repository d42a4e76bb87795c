"""One layer as a differentiable function: torch.library operators with fakes, and the autograd.Function on them.

`layer_forward` and `layer_backward` know nothing of gradients; the Function joins them. Where a gradient is itself to
be differentiated (`create_graph=True`) the backward pass differentiates the reference instead. For torch.compile
and torch.export all of it is one operator, `layer`, which they take apart when they differentiate: so an exported
program can be trained. A plain call, which nothing but autograd watches, runs what the operators run, without them: an
operator costs more than a step of a small layer.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import compress
from typing import Any, NamedTuple, Optional

import torch
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.plan import accumulator_dtype
from lstm_triton_kernels.watch import check_launches
from torch import Tensor

from lstm_triton import layer, onnx_node, reference, selection, transforms
from lstm_triton.batching import one_by_one
from lstm_triton.ragged import Packing
from lstm_triton.spec import LSTMSpec, LSTMWeights

ENGINES = {"persistent": "lstm_triton.persistent", "aten": "lstm_triton.aten"}
"""Strategy to the module that computes a whole layer, imported when first used; the others leave it the steps alone."""

STEPS = {"stepwise": "lstm_triton_kernels.sequence_replayed", "torch": "lstm_triton.eager"}
"""Strategy to the module that computes its steps; imported when first used, so that triton may be missing."""


def passes(
    strategy: str, x: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, training: bool, ragged: bool
) -> tuple[Callable[..., layer.LayerResult], Callable[..., layer.LayerGradients]]:
    """The forward and the backward pass of a layer by a strategy: "auto", "persistent", "stepwise", "torch" or "aten".

    What the one saves the other can read, whatever strategy each of them is; but for "aten", which saves nothing.
    """
    if strategy not in ("torch", "aten"):
        sizes = selection.layer_of(x, c_0, weights, spec, training, ragged)
        strategy = selection.kernels(strategy if sizes.B > 0 else "stepwise", sizes, gpu_of(x.device)).name
    return engine(strategy)


def engine(strategy: str) -> tuple[Callable[..., layer.LayerResult], Callable[..., layer.LayerGradients]]:
    """The forward and the backward pass by a strategy that is no "auto"."""
    if strategy in ENGINES:
        module = importlib.import_module(ENGINES[strategy])
        return module.forward, module.backward
    steps = importlib.import_module(STEPS[strategy])
    return partial(layer.forward, steps=steps), partial(layer.backward, steps=steps)


class Call(NamedTuple):
    """What the operators are told beside tensors: a variant's name and which parameters there are, and how to compute.

    As plain values in the operators' signatures, in this order.
    """

    variant: str
    bias: bool
    projection: bool
    strategy: str

    def keep(self, save: bool, recompute: bool, states: bool) -> layer.Keep:
        """What of a forward pass is wanted; PyTorch's own operator saves nothing for the backward pass."""
        return layer.Keep(save and self.strategy != "aten", recompute, states)


def lstm_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, strategy: str,
    recompute: bool = False, lengths: Tensor | None = None, resets: Tensor | None = None, states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> output (T, B, D·P), h_n (D, B, P), c_n (D, B, H), states.

    - weights: one entry a direction; the second runs backwards in time. All of one type and device
    - recompute: the gates are not kept for the backward pass, but computed again in it
    - lengths (B,) int64 and resets (T, B) bool as in `reference.layer_states`; x is finite beyond a length
    - states: whether every c_t is wanted, (T, B, D·H); else they are empty
    """
    first = weights[0]
    call = Call(spec.name, first.bias_ih is not None, first.weight_hr is not None, strategy)
    flat = [w for direction in weights for w in direction if w is not None]
    if torch.compiler.is_compiling() and not transforms.traced():
        return torch.ops.lstm_triton.layer.default(x, h_0, c_0, flat, lengths, resets, *call, recompute, states)
    return differentiable_layer(x, h_0, c_0, flat, lengths, resets, *call, recompute, states)


def differentiable_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Optional[Tensor], resets: Optional[Tensor],
    variant: str, bias: bool, projection: bool, strategy: str, recompute: bool, states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The first four fields of `layer.LayerResult`, with their gradient where one may be asked."""
    call = Call(variant, bias, projection, strategy)
    if type(x) not in PLAIN and transforms.exporting_to_onnx() and not torch.jit.is_tracing():
        spec = LSTMSpec.parse(variant)
        onnx_node.check(spec, projection, resets, states)
        results = onnx_node.layer(x, h_0, c_0, group(weights, spec, bias, projection), spec, lengths)
        return *results, x.new_empty(0)
    if torch.is_grad_enabled() and transforms.recorded((x, h_0, c_0, *weights)):
        return LSTMLayerFunction.apply(call, recompute, states, lengths, resets, x, h_0, c_0, *weights)[:4]
    return computed_layer(x, h_0, c_0, weights, lengths, resets, *call, recompute, states)


def computed_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Optional[Tensor], resets: Optional[Tensor],
    variant: str, bias: bool, projection: bool, strategy: str, recompute: bool, states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `differentiable_layer`, without a gradient."""
    run = forward_pass if unwatched((x, h_0, c_0, *weights)) else layer_forward
    call = (variant, bias, projection, strategy)
    return run(x, h_0, c_0, weights, lengths, resets, *call, False, False, states)[:4]


def unwatched(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing but autograd looks at what is called: no tracer, dispatch mode, transform or tensor subclass."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and not transforms.active()
        and not torch.jit.is_tracing()
        and all(type(t) in PLAIN for t in tensors)
    )


PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def group(flat: Sequence[Any], spec: LSTMSpec, bias: bool, projection: bool) -> list[LSTMWeights]:
    """One LSTMWeights a direction from a flat list of D times what `spec.parameter_names(bias, projection)` lists."""
    if not spec.peephole and bias and not projection:
        return [LSTMWeights(*flat[n : n + 4]) for n in range(0, len(flat), 4)]  # the common case, without a search
    names = spec.parameter_names(bias, projection)
    places = [names.index(field) if field in names else None for field in LSTMWeights._fields]
    return [
        LSTMWeights(*[None if place is None else flat[n + place] for place in places])  # type: ignore[arg-type]
        for n in range(0, len(flat), len(names))
    ]


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device, so it must be that of the tensors; and the types are chosen by now."""
    on = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    cast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    off = torch.autocast(device.type, enabled=False) if cast else nullcontext()
    with on, off:
        yield


def forward_pass(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Optional[Tensor], resets: Optional[Tensor],
    variant: str, bias: bool, projection: bool, strategy: str, save: bool, recompute: bool, states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fields of `layer.LayerResult`; `weights`: D times what `LSTMSpec.parameter_names(bias, projection)` lists."""
    check_launches()
    spec = LSTMSpec.parse(variant)
    grouped = group(weights, spec, bias, projection)
    ragged = lengths is not None or resets is not None
    forward, _ = passes(strategy, x, c_0, grouped, spec, save, ragged)
    keep = Call(variant, bias, projection, strategy).keep(save, recompute, states)
    with computing_on(x.device):
        return forward(x, h_0, c_0, grouped, spec, keep, lengths, resets)


layer_forward = torch.library.custom_op("lstm_triton::layer_forward", forward_pass, mutates_args=())


@layer_forward.register_fake
def _(x, h_0, c_0, weights, lengths, resets, variant, bias, projection, strategy, save, recompute, states):  # type: ignore[no-untyped-def]
    spec = LSTMSpec.parse(variant)
    keep = Call(variant, bias, projection, strategy).keep(save, recompute, states)
    shapes = layer.result_shapes(x, c_0, group(weights, spec, bias, projection), spec, keep)
    return tuple(x.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


layer_forward.register_vmap(one_by_one(layer_forward))


def backward_pass(
    grad_output: Optional[Tensor], grad_h_n: Optional[Tensor], grad_c_n: Optional[Tensor],
    grad_states: Optional[Tensor],
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], lengths: Optional[Tensor], resets: Optional[Tensor],
    output: Tensor, gates: Tensor, cells: Tensor,
    variant: str, bias: bool, projection: bool, strategy: str, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients of x, h_0, c_0 and each weight, of those for which `needs` (in that order) is true."""
    check_launches()
    spec = LSTMSpec.parse(variant)
    names = spec.parameter_names(bias, projection)
    grouped = group(weights, spec, bias, projection)
    _, backward = passes(strategy, x, c_0, grouped, spec, True, lengths is not None or resets is not None)
    needed = [needs[n : n + len(names)] for n in range(3, len(needs), len(names))]
    wanted = layer.Needs(needs[0], needs[1], needs[2], [list(compress(names, part)) for part in needed])
    grads = (grad_output, grad_h_n, grad_c_n, grad_states)
    with computing_on(x.device):
        gradients = backward(*grads, x, h_0, c_0, grouped, output, gates, cells, spec, wanted, lengths, resets)
    flat = [gradients.x, gradients.h_0, gradients.c_0]
    flat += [direction.get(name) for direction in gradients.weights for name in names]
    distinct: list[Tensor] = []
    for gradient in flat:
        if gradient is not None:
            # Both biases have the same gradient, and an operator's outputs may not be the same tensor.
            distinct.append(gradient.clone() if any(gradient is other for other in distinct) else gradient)
    return distinct


layer_backward = torch.library.custom_op("lstm_triton::layer_backward", backward_pass, mutates_args=())


@layer_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    grad_output, grad_h_n, grad_c_n, grad_states, x, h_0, c_0, weights, lengths, resets, output, gates, cells,
    variant, bias, projection, strategy, needs,
):  # fmt: skip
    return [t.new_empty(t.shape) for t, needed in zip((x, h_0, c_0, *weights), needs, strict=True) if needed]


layer_backward.register_vmap(one_by_one(layer_backward))

LAYER = torch.library.Library("lstm_triton", "FRAGMENT")
LAYER.define(
    "layer(Tensor x, Tensor h_0, Tensor c_0, Tensor[] weights, Tensor? lengths, Tensor? resets, str variant, "
    "bool bias, bool projection, str strategy, bool recompute, bool states) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LAYER.impl("layer", differentiable_layer, "CompositeImplicitAutograd")


class LSTMLayerFunction(torch.autograd.Function):
    """apply(call, recompute, states, lengths, resets, x, h_0, c_0, *weights) -> the fields of `LayerResult`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        call: Call, recompute: bool, states: bool, lengths: Optional[Tensor], resets: Optional[Tensor],
        x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        run = forward_pass if unwatched((x, h_0, c_0, *weights)) else layer_forward
        return run(x, h_0, c_0, weights, lengths, resets, *call, True, recompute, states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.recorder = transforms.recorder()
        ctx.call, _, ctx.states, lengths, resets, x, h_0, c_0, *weights = inputs
        hidden, _, _, _, gates, cells = output
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, gates, cells, lengths, resets, x, h_0, c_0, *weights)

    @staticmethod
    def backward(ctx: Any, *grads: Optional[Tensor]) -> tuple[Optional[Tensor], ...]:
        hidden, gates, cells, lengths, resets, x, h_0, c_0, *weights = ctx.saved_tensors
        grads = (*grads[:3], grads[3] if ctx.states else None)
        needs = list(ctx.needs_input_grad[5:])
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        inputs = (x, h_0, c_0, *weights)
        if transforms.beyond_operators((*inputs, *grads), hidden, ctx.recorder):
            computed = iter(differentiable_gradients(grads, inputs, needs, ctx.call, (1, len(h_0)), lengths, resets))
            return (None,) * 5 + tuple(computed)
        saved = (x, h_0, c_0, weights, lengths, resets, hidden, gates, cells)
        run: Callable[..., list[Tensor]] = layer_backward
        if unwatched([t for t in (*inputs, *grads) if t is not None]):
            run = backward_pass
        with torch.no_grad():  # torch.func's tensors require gradients even here
            computed = iter(run(*grads, *saved, *ctx.call, needs))
        return (None,) * 5 + tuple(next(computed) if needed else None for needed in needs)


def differentiable_gradients(
    grads: Sequence[Optional[Tensor]],
    inputs: Sequence[Tensor],
    needs: Sequence[bool],
    call: Call,
    layers: tuple[int, int],
    lengths: Optional[Tensor] = None,
    resets: Optional[Tensor] = None,
    packing: Optional[Packing] = None,
) -> list[Optional[Tensor]]:
    """Gradients that can be differentiated again, or in a batch: those of the reference, recomputed.

    - grads: of output, h_n, c_n and every c_t, None where zero
    - inputs: x, h_0, c_0 and the flat weights; `needs` says whose gradient is wanted
    - layers: how many there are, and how many directions each has
    - packing: how x and output are packed, if they are
    """
    spec = LSTMSpec.parse(call.variant)
    given = [n for n, grad in enumerate(grads) if grad is not None]

    def results(*wanted: Tensor) -> list[Tensor]:
        """The results whose gradients are given, from the inputs whose gradients are wanted."""
        left = iter(wanted)
        x, h_0, c_0, *flat = (next(left) if needed else t for t, needed in zip(inputs, needs, strict=True))
        grouped = group(flat, spec, call.bias, call.projection)
        L, D = layers
        steps = lengths
        if packing is not None:
            x, steps = packing.pad(x), packing.lengths
        stack = [grouped[n : n + D] for n in range(0, L * D, D)]
        output, h_n, c_n, cells = reference_layers(x, h_0, c_0, stack, spec, steps, resets)
        every = (packing.pack(output) if packing is not None else output, h_n, c_n, cells)
        return [every[n] for n in given]

    # Views: the graph from the gradients back to the inputs must start at tensors of this call alone. A tensor whose
    # gradient only a transform wanted that has ended requires none any more.
    again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(inputs[0].device.type, enabled=False):
        views = [t.view_as(t) for t, needed in zip(inputs, needs, strict=True) if needed]
        wanted = [t if t.requires_grad or transforms.active() else t.detach().requires_grad_() for t in views]
        if transforms.active():
            computed = iter(torch.func.vjp(results, *wanted)[1]([grads[n] for n in given]))
            return [next(computed) if needed else None for needed in needs]
        return gradients_where_needed(results(*wanted), [grads[n] for n in given], wanted, needs, create_graph=again)


def reference_layers(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec,
    lengths: Optional[Tensor], resets: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `lstm_layer` with states, by the reference, for what differentiates in other ways than the operators do.

    In the accumulator type, like the operators, and whatever autocast is around.
    """
    dtype = accumulator_dtype(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        wide = [[w.map(lambda weight: weight.to(dtype)) for w in weights] for weights in layers]
        results = reference.lstm(x.to(dtype), h_0.to(dtype), c_0.to(dtype), wide, spec, lengths, resets)
    output, h_n, c_n, cells = (result.to(x.dtype) for result in results)
    return output, h_n, c_n, cells


def gradients_where_needed(
    results: Sequence[Any],
    grads: Sequence[Optional[Tensor]],
    wanted: Sequence[Any],
    needs: Sequence[bool],
    **options: bool,
) -> list[Optional[Tensor]]:
    """`torch.autograd.grad` of the results whose gradient is given, by `wanted`, in the places that `needs` marks.

    Both are tensors or the edges of a graph.
    """
    given = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    outputs, grad_outputs = zip(*given, strict=True)
    computed = iter(torch.autograd.grad(outputs, wanted, grad_outputs, allow_unused=True, **options))
    return [next(computed) if needed else None for needed in needs]
