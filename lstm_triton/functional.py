"""The LSTM as functions of explicit tensors: lay out and check the arguments, route the call, run the layers.

Sizes in the docstrings, here and in `lstm_triton.modules`:

- T time steps, B batch rows, I input features, H hidden units (the size of a cell state)
- P size of a hidden state: `proj_size` where the layer projects its hidden state, else H
- L layers, D directions (2 if bidirectional, else 1)
- G gate blocks: 4, in the order i, f, g, o; coupled: 3, in the order f, g, o; one fewer for each gate that is left out
- Q peephole blocks: 3, in the order i, f, o; coupled: 2, in the order f, o; likewise
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, TypeVar, overload

import torch
import torch.nn.functional as F
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import NONE, Rules
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import Activation, LSTMSpec, LSTMWeights, OutputPeephole, Peephole, widened
from lstm_triton_kernels.watch import check_launches
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import (
    aten,
    autograd,
    checks,
    gate_values,
    onnx_torchscript,
    parameters,
    regularization,
    routing,
    scanned,
    second_order,
    stack,
    transforms,
)
from lstm_triton.gate_values import Gates
from lstm_triton.layer import Call
from lstm_triton.layout import Layout
from lstm_triton.ragged import Packing, all_full, checked_lengths, without_waiting
from lstm_triton.regularization import DroppedOn, Zoneout
from lstm_triton.routing import Strategy

if TYPE_CHECKING:
    from typing_extensions import Unpack

States = tuple[Tensor, Tensor]
"""Hidden and cell state, (h, c)."""

Lengths = Tensor | Sequence[int]
"""The number of steps of each row."""

TensorOrPacked = TypeVar("TensorOrPacked", Tensor, PackedSequence)
"""The type of a sequence: the output and the cell states have that of the input."""


class Options(TypedDict, total=False):
    """The keyword arguments of `lstm` that do not decide on the type of its result, for the overloads."""

    num_layers: int
    bias: bool
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    proj_size: int
    coupled: bool
    peephole: Peephole | None
    output_peephole: OutputPeephole
    layer_norm: bool
    input_gate: bool
    forget_gate: bool
    output_gate: bool
    input_activation: Activation
    output_activation: Activation
    recurrent_dropout: float
    recurrent_dropout_on: DroppedOn
    zoneout: Zoneout
    weight_dropout: float
    cell_clip: float | None
    proj_clip: float | None
    strategy: Strategy
    recompute: bool
    lengths: Lengths | None
    resets: Tensor | None


def lstm_cell(
    input: Tensor,
    hx: States | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_ch: Tensor | None = None,
    *,
    coupled: bool = False,
    peephole: Peephole | None = None,
    output_peephole: OutputPeephole = "previous",
    layer_norm: bool = False,
    input_gate: bool = True,
    forget_gate: bool = True,
    output_gate: bool = True,
    input_activation: Activation = "tanh",
    output_activation: Activation = "tanh",
    weight_ln_ih: Tensor | None = None,
    weight_ln_hh: Tensor | None = None,
    weight_ln_c: Tensor | None = None,
    bias_ln_c: Tensor | None = None,
    zoneout: Zoneout = (0.0, 0.0),
    cell_clip: float | None = None,
    training: bool = False,
) -> States:
    """Compute one step of one layer, as `lstm_triton.LSTMCell` does: (h', c') from the input and the states (h, c).

        a = W_ih x + b_ih + W_hh h + b_hh
        i = s(a_i + V_i c)          coupled: i = 1 - f
        f = s(a_f + V_f c)
        g = tanh(a_g)
        c' = f c + i g
        o = s(a_o + V_o c_*)        c_* = c, or c' with output_peephole="current"
        h' = o tanh(c')

    s is the logistic function; without a peephole the terms with V are absent.

    - input: x, (B, I), or (I,) unbatched
    - hx: (h, c), each (B, H), or (H,) unbatched; zeros if None
    - weight_ih: W_ih, (G·H, I); weight_hh: W_hh, (G·H, H); bias_ih, bias_hh: (G·H,), both or neither
    - weight_ch: V, given exactly if there is a peephole; diagonal (Q·H,), full (Q·H, H)
    - coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
      output_activation: the variant, as in `lstm_triton.LSTMCell`. By default the output gate reads the "previous" cell
      state, a simplified form; textbook peepholes are "current"
    - weight_ln_ih, weight_ln_hh: (G·H,), weight_ln_c: (H,), bias_ln_c: (H,) if there are biases; given exactly with
      layer_norm
    - zoneout, cell_clip: as in `lstm_triton.LSTM`; training: whether zoneout is drawn, or else its expectation
    - returns (h', c'), each of the shape of its state in hx and of the inputs' type

    Types: float16, bfloat16, float32 or float64; on a CPU, for the standard variant, complex64 and complex128 as well.
    All tensors have the same type; under autocast they are converted to autocast's.

    Raises ValueError or RuntimeError, as `torch.nn.LSTMCell` does, for sizes and types that do not fit; TypeError for a
    type that is not computed; ValueError for an unknown variant; RuntimeError where the chosen backend cannot run, and
    for parameters sharded by FSDP2.
    """
    if not torch.compiler.is_compiling():
        check_launches()
    spec = LSTMSpec.of(
        coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
        output_activation,
    )  # fmt: skip
    rules = regularization.rules_of(0.0, "hidden", zoneout, cell_clip, None, 0, training)
    weights = LSTMWeights(
        weight_ih, weight_hh, bias_ih, bias_hh, None, weight_ch, weight_ln_ih, weight_ln_hh, weight_ln_c, bias_ln_c
    )
    dtype = autocast_dtype(input)
    both = (bias_ih is None) == (bias_hh is None) and all(weight is None for weight in weights[4:])
    plain = dtype is None and both and rules == NONE and not spec.missing and type(weight_ih) in autograd.PLAIN
    sizes = Layer(spec.computed, 1, 1, weight_hh.shape[-1], 1, dtype or input.dtype)
    route = routing.cell(sizes, input.device, plain)
    if route.name == "operator":
        checks.cell_arguments(input, hx)
        return aten.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    flat = [w for w in weights if w is not None]
    checks.not_sharded(flat, lambda: list(weights.present()))
    I, H = parameters.cell_sizes(spec, tuple([None if w is None else w.shape for w in weights]))  # noqa: E741
    checks.cell_arguments(input, hx)
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        h = c = x.new_zeros(x.shape[0], H)
    else:
        h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    checks.cell_sizes(x, (h, c), I, H)
    if dtype is not None:
        x, h, c, weights = x.to(dtype), h.to(dtype), c.to(dtype), weights.map(lambda w: w.to(dtype))
        flat = [w for w in weights if w is not None]
    checks.cell_dtypes(x, (h, c, *flat))
    checks.same_device(x.device, (h, c), flat)
    weights, spec = widened(weights, spec), spec.computed

    if route.name == "reference" and rules == NONE:
        checks.computed_dtype(x.dtype)
        h, c = second_order.cell(x, h, c, weights, spec)
        return (h, c) if batched else (h[0], c[0])
    seed = regularization.seed_for(rules, training, x.device)
    call = Call(spec.name, weights.bias_ih is not None, False, route.name, rules=() if rules == NONE else rules)
    given = (x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0))
    if route.name == "reference":
        checks.computed_dtype(x.dtype)
        h, c = second_order.cell(x, h, c, weights, spec, call.regularized(seed, *given).direction(0).at(0))
    else:
        _, h_n, c_n, _ = autograd.lstm_layer(*given, [weights], Order(1), call, seed)
        h, c = h_n[0], c_n[0]
    return (h, c) if batched else (h[0], c[0])


@overload
def lstm(
    input: TensorOrPacked,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: Literal[False] = False,
    return_gates: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[TensorOrPacked, States]: ...
@overload
def lstm(
    input: TensorOrPacked,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: Literal[True],
    return_gates: Literal[False] = False,
    **options: Unpack[Options],
) -> tuple[TensorOrPacked, States, TensorOrPacked]: ...
@overload
def lstm(
    input: TensorOrPacked,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: Literal[False] = False,
    return_gates: Literal[True],
    **options: Unpack[Options],
) -> tuple[TensorOrPacked, States, Gates]: ...
@overload
def lstm(
    input: TensorOrPacked,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: Literal[True],
    return_gates: Literal[True],
    **options: Unpack[Options],
) -> tuple[TensorOrPacked, States, TensorOrPacked, Gates]: ...
@overload
def lstm(
    input: Tensor | PackedSequence,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    return_cell_states: bool = False,
    return_gates: bool = False,
    **options: Unpack[Options],
) -> tuple[Any, ...]: ...
def lstm(
    input: Tensor | PackedSequence,
    hx: States | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    proj_size: int = 0,
    coupled: bool = False,
    peephole: Peephole | None = None,
    output_peephole: OutputPeephole = "previous",
    layer_norm: bool = False,
    input_gate: bool = True,
    forget_gate: bool = True,
    output_gate: bool = True,
    input_activation: Activation = "tanh",
    output_activation: Activation = "tanh",
    recurrent_dropout: float = 0.0,
    recurrent_dropout_on: DroppedOn = "hidden",
    zoneout: Zoneout = (0.0, 0.0),
    weight_dropout: float = 0.0,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    strategy: Strategy = "auto",
    recompute: bool = False,
    lengths: Lengths | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
    return_gates: bool = False,
) -> tuple[Any, ...]:
    """Compute a stack of LSTM layers over a whole sequence, as `lstm_triton.LSTM` does.

    Returns (output, (h_n, c_n)); with `return_cell_states`, (output, (h_n, c_n), cell_states), and with `return_gates`
    the gates behind these. Each step computes what `lstm_cell` does; with a projection, h' = W_hr (o tanh(c')) (Sak et
    al. 2014).

    - input: (T, B, I), with `batch_first` (B, T, I), unbatched (T, I), or a PackedSequence
    - hx: (h_0, c_0), of shapes (D·L, B, P) and (D·L, B, H), or without B for unbatched input; zeros if None
    - weights: for each layer, for each direction: weight_ih (G·H, I; above the first layer G·H, D·P), weight_hh
      (G·H, P), with `bias` bias_ih and bias_hh (G·H,), with `proj_size` weight_hr (P, H), with `peephole` weight_ch,
      diagonal (Q·H,) or full (Q·H, H), with `layer_norm` weight_ln_ih and weight_ln_hh (G·H,), weight_ln_c (H,), and
      with `bias` bias_ln_c (H,)
    - dropout: probability of zeroing an element of the output of each layer but the last, where `training`
    - coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
      output_activation: the variant, as in `lstm_triton.LSTM`. By default the output gate reads the "previous" cell
      state, a simplified form; textbook peepholes are "current"
    - recurrent_dropout, recurrent_dropout_on, zoneout, weight_dropout, cell_clip, proj_clip: as in `lstm_triton.LSTM`;
      the dropouts only where `training`, zoneout then drawn and otherwise its expectation
    - strategy: what computes the recurrence. "persistent": all time steps in one kernel launch, with the recurrent
      weights kept on the chip; "stepwise": kernels launched for each time step; "cudnn": PyTorch's own LSTM operator
      on cuDNN, for variants without peepholes on a CUDA device; "auto" chooses by estimated time
    - recompute: whether the backward pass computes the gates again from h_t and c_t, so that they need not be kept: of
      each layer x, the output and c_t are kept. While its backward pass runs the gates are there again; for O(√T) see
      "Long sequences" in docs/how-it-works.md. PyTorch's own operator, where it is what computes, ignores this
    - lengths: (B,) integers from 1 to T, the number of steps of each row, instead of packing. Beyond a row's length its
      input is not read, its output and cell states are zero, and its h_n and c_n are those of its last step; the second
      direction starts at that step. They may be on any device; on a GPU they are checked there, for which the host
      waits once (not while a CUDA graph is captured)
    - resets: bool, (T, B), with `batch_first` (B, T), unbatched (T,): where it is true, h and c are set to zero before
      that step, in each layer and direction. It marks the first step of an episode, and may be on any device. (The
      second direction comes from the next step, so that a mark does not separate it from the episode before)
    - return_cell_states, return_gates: whether to return the cell states and the gates of all steps
    - output: (T, B, D·P), laid out as the input is; h_n, c_n: of the shapes of h_0, c_0
    - cell_states: c_t of every step in the last layer, (T, B, D·H), laid out as the output is
    - gates: `Gates(i, f, g, o)` of every step in the last layer, each like cell_states. They are computed from the
      input, the output and the cell states, and have gradients. Coupled, i is 1 - f; a gate that is left out is 1; g is
      without the dropout of `recurrent_dropout_on="candidate"`

    Types: float16, bfloat16, float32 or float64; on a CPU, for the standard and the coupled variant without `lengths`,
    `resets`, cell states and gates, complex64 and complex128 as well. All tensors have the same type; under autocast
    they are converted to autocast's.

    Raises ValueError or RuntimeError, as `torch.nn.LSTM` does, for sizes and types that do not fit and for T = 0;
    TypeError or ValueError for lengths and resets that do not fit; TypeError for a type that is not computed;
    ValueError for an unknown variant or strategy and for a probability or limit that is none; RuntimeError with the
    reason where the chosen backend or strategy cannot run, and for parameters sharded by FSDP2.
    """
    if not torch.compiler.is_compiling():
        check_launches()
    spec = LSTMSpec.of(
        coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
        output_activation,
    )  # fmt: skip
    checks.flag("recompute", recompute)
    rules = regularization.rules_of(
        recurrent_dropout, recurrent_dropout_on, zoneout, cell_clip, proj_clip, proj_size, training
    )
    if weight_dropout:
        regularization.probability("weight_dropout", weight_dropout)
    L, D = num_layers, 2 if bidirectional else 1
    taken = take(
        input, hx, weights, spec, L, D, bias, batch_first, proj_size, strategy, lengths, resets, return_cell_states,
        rules, return_gates,
    )  # fmt: skip
    layout, x, h_0, c_0, weights, order, autocast, question = taken
    engine = routing.route(*question).name
    if not engine.startswith("operator"):
        checks.computed_dtype(x.dtype)
    if training and (weight_dropout or rules.random) and transforms.exporting_to_onnx():
        routing.refuse_drawn_in_onnx(True)
    if order.lengths is not None:
        x = order.zero_beyond(x)
    drop = dropout if training and L > 1 else 0.0
    if weight_dropout and training:
        names = spec.parameter_names(bias, proj_size > 0)
        weights = regularization.drop_weights(weights, names, weight_dropout)
    if spec.missing:
        weights, spec, bias = parameters.widened_stack(weights, spec, bias, proj_size > 0)
    cell_states = gates = None
    # Autocast would cast the arguments of PyTorch's operator once more: on CUDA to float16, whatever was asked for.
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        if engine == "operator" and (drop == 0 or x.device.type == "cpu"):
            options = aten.Options(bias, L, drop, bidirectional, layout.packing)
            x, h_n, c_n = aten.lstm(x, h_0, c_0, aten.standard_weights(weights, spec), options)
        else:
            values = () if rules == NONE else rules
            states = return_cell_states or return_gates
            call = Call(spec.name, bias, proj_size > 0, engine, False, recompute, states, values)
            groups = call.group(weights)
            layers = [groups[n : n + D] for n in range(0, L * D, D)]
            x, h_n, c_n, cell_states, gates = run_layers(
                x, h_0, c_0, layers, order, layout.packing, call, drop, training, return_gates
            )
    result: tuple[Any, ...] = (layout.user_sequence(x), (layout.user_state(h_n), layout.user_state(c_n)))
    if cell_states is not None and return_cell_states:
        result = (*result, layout.user_sequence(cell_states))
    return result if gates is None else (*result, gates.map(layout.user_sequence))


class Taken(NamedTuple):
    """The arguments of a call of `lstm`, checked and laid out: what is computed with, and what the router is asked.

    - x (T, B, I), or of packed rows (N, I); h_0 (D·L, B, P), c_0 (D·L, B, H); weights: in the type that is computed
    - autocast: whether they were converted to autocast's type
    - question: the arguments of `routing.route`
    """

    layout: Layout
    x: Tensor
    h_0: Tensor
    c_0: Tensor
    weights: Sequence[Tensor]
    order: Order
    autocast: bool
    question: tuple[Layer, torch.device, Strategy, tuple[str, ...], bool]


def take(
    input: Tensor | PackedSequence, hx: States | None, weights: Sequence[Tensor], spec: LSTMSpec, L: int, D: int,
    bias: bool, batch_first: bool, proj_size: int, strategy: Strategy, lengths: Lengths | None, resets: Tensor | None,
    return_cell_states: bool, rules: Rules = NONE, return_gates: bool = False,
) -> Taken:  # fmt: skip
    """Check and lay out the arguments of a call of `lstm`, which says what they are and what is raised."""
    routing.check_strategy(strategy, spec)
    checks.flag("return_cell_states", return_cell_states)
    checks.flag("return_gates", return_gates)
    checks.not_sharded(weights, lambda: parameters.state_dict_names(spec, L, D == 2, bias, proj_size))
    I, H, P = parameters.stack_sizes(spec, L, D, bias, proj_size, tuple([w.shape for w in weights]))  # noqa: E741

    checks.lstm_input(input)
    packed = isinstance(input, PackedSequence)
    # The exporter with dynamo=True knows not even the sizes of what was packed.
    routing.refuse_packed_in_onnx(packed and not torch.jit.is_tracing() and transforms.exporting_to_onnx())
    data = input.data if isinstance(input, PackedSequence) else input
    dtype = autocast_dtype(data)
    sizes = (I, H, P)
    layout, x, h_0, c_0 = Layout.take(input, hx, batch_first, weights, sizes, D * L, autocast=dtype is not None)
    steps = checks.lengths(lengths, layout.B, packed=layout.packed is not None)
    checks.resets(resets, layout.T, layout.B, layout.batched, batch_first)
    if dtype is not None:
        x, h_0, c_0, weights = x.to(dtype), h_0.to(dtype), c_0.to(dtype), [w.to(dtype) for w in weights]
    full = steps is not None and all_full(steps, layout.T)
    asked: tuple[str, ...] = ()
    if steps is not None or resets is not None or return_cell_states or return_gates:
        given = dict(resets=resets is not None, lengths=steps is not None and not (full and strategy == "auto"))
        given |= dict(return_cell_states=return_cell_states, return_gates=return_gates)
        asked = tuple(name for name, there in given.items() if there)
    if rules != NONE:
        asked += regularization.asked(rules)
    if full:
        steps = None
    if steps is not None and not transforms.exporting_to_onnx():  # an ONNX graph has no place for the check
        if transforms.exporting() and routing.requested() == "torch":  # nor has a program of PyTorch's operators alone
            steps = steps.to(x.device, torch.int64).clamp(min=1).minimum(torch.tensor(layout.T))
        else:
            steps = checked_lengths(steps, layout.T, x.device)
    if resets is not None:
        resets = layout.steps(without_waiting(resets, x.device))
    order, packing = Order(layout.T, steps, resets), layout.packing

    inputs = (x, h_0, c_0, *weights)
    tracked = torch.is_grad_enabled() and (True in [t.requires_grad for t in inputs] or bool(transforms.recorder()))
    ragged = order.ragged or (packing is not None and not packing.full)
    layer = Layer(
        spec.computed, layout.T, layout.B, H, D, x.dtype, I=I, P=proj_size, ragged=ragged,
        training=tracked, L=L,
    )  # fmt: skip
    question = (layer, x.device, strategy, asked, packing is not None)
    return Taken(layout, x, h_0, c_0, weights, order, dtype is not None, question)


def run_layers(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], order: Order,
    packing: Packing | None, call: Call, dropout: float, training: bool, return_gates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Gates | None]:  # fmt: skip
    """Compute a stack layer by layer, or by `stack.lstm` where that is asked for: output, h_n, c_n as in `lstm`, and
    every c_t of the last layer if asked for; and its gates, which needs every c_t.

    dropout: between layers; training: whether masks of regularised steps are drawn.

    x is (T, B, I), or with a packing (N, I), and so is the output if PyTorch's operator computes it; else it is padded.
    """
    if packing is not None and call.engine != "operator":
        x, order = packing.pad(x), order._replace(lengths=packing.lengths)
    if len(layers) == 1:
        return run_layer(x, h_0, c_0, layers[0], order, packing, call, training, return_gates)
    if packing is None and not torch.compiler.is_compiling():
        how = stack.how_of(x, h_0, c_0, layers, order, call, dropout)
        if how is not None:
            x, h_n, c_n = stack.lstm(x, h_0, c_0, layers, order, how)
            return x, h_n, c_n, x, None
    D = len(layers[0])
    last_h, last_c = [], []
    for n, weights in enumerate(layers):
        if n > 0 and dropout > 0:
            if packing is None or x.dim() == 2:
                x = F.dropout(x, dropout)
            else:  # as many random numbers as `torch.nn.LSTM` draws
                x = packing.pad(F.dropout(packing.pack(x), dropout))
        own = slice(n * D, (n + 1) * D)
        last = n == len(layers) - 1
        of_layer = call if last else call._replace(states=False)
        x, h_n, c_n, cell_states, gates = run_layer(
            x, h_0[own], c_0[own], weights, order, packing, of_layer, training, return_gates and last
        )
        last_h.append(h_n)
        last_c.append(c_n)
    return x, torch.cat(last_h), torch.cat(last_c), cell_states, gates


def run_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, packing: Packing | None,
    call: Call, training: bool, return_gates: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Gates | None]:  # fmt: skip
    """Compute one layer: output, h_n, c_n, and every c_t if that is asked for; else the fourth tensor has no meaning.
    With return_gates, for which every c_t must be asked for, the gates.

    x (T, B, I), finite beyond a row's length, h_0 (D, B, P), c_0 (D, B, H).
    """
    if call.engine == "operator":
        options = aten.layer_options(weights)._replace(packing=packing)
        flat = aten.standard_weights(aten.flat_weights(weights), call.spec)
        return (*aten.lstm(x, h_0, c_0, flat, options), x, None)
    seed = regularization.seed_for(Rules(*call.rules), training, x.device) if call.rules else None
    if call.engine not in ("reference", "scan", "onnx"):
        found = autograd.lstm_layer(x, h_0, c_0, weights, order, call, seed)
        if not return_gates:
            return (*found, None)
    order = order._replace(regularized=call.regularized(seed, x, h_0, c_0))
    if call.engine == "scan":
        found = scanned.layer(x, h_0, c_0, weights, call.spec, order)
    elif call.engine == "onnx":
        found = onnx_torchscript.layer(x, h_0, c_0, weights, order, call)
    elif call.engine == "reference":
        if order.T == 1 and not order.ragged and not call.states:
            step = second_order.single_step(x.squeeze(0), h_0, c_0, weights, call.spec, order.regularized)
            return (*step, x, None)
        compute = second_order.recomputed if call.recompute else second_order.forward
        found = compute(x, h_0, c_0, [weights], call.spec, order)
    output, _, _, states = found
    gates = gate_values.of_layer(x, h_0, c_0, output, states, weights, call.spec, order) if return_gates else None
    return (*found, gates)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the type that an active autocast computes in; None where none is, or none for this type (float64)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):  # Dynamo cannot trace the latter
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
