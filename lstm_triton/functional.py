"""The LSTM on explicit tensors: check the arguments, choose the backend, run the layers.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions, G gate blocks, Q peephole blocks. The equations stand in `lstm_triton.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels.gpus import gpu_of
from lstm_triton_kernels.plan import SUPPORTED_DTYPES, accumulator_dtype, matmul_precision
from lstm_triton_kernels.watch import check_launches
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import aten, autograd, checks, dispatch, onnx_node, reference, selection, transforms
from lstm_triton.layer import beyond
from lstm_triton.layout import Layout
from lstm_triton.ragged import Packing, all_full, checked_lengths, without_waiting
from lstm_triton.spec import STANDARD, LSTMSpec, LSTMWeights, OutputPeephole, Peephole, state_dict_name


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
    weight_ch: Tensor | None = None,
    *,
    coupled: bool = False,
    peephole: Peephole | None = None,
    output_peephole: OutputPeephole = "previous",
) -> tuple[Tensor, Tensor]:
    """One step of one layer: (h, c) from the input and the states before it.

    - input: (B, I), or (I,) unbatched
    - hx: (h, c), each (B, H) or (H,); None for zeros
    - weight_ih: (G·H, I); weight_hh: (G·H, H); bias_ih, bias_hh: (G·H,), both or neither
    - weight_ch: with a peephole; diagonal (Q·H,), full (Q·H, H)

    Gate blocks i, f, g, o (coupled: f, g, o), peephole blocks i, f, o (coupled: f, o). float16, bfloat16, float32 or
    float64, all tensors alike (or under autocast); returns states of that type.

    Raises ValueError or RuntimeError as `torch.nn.LSTMCell` does for sizes and types that do not fit; RuntimeError
    where the backend asked for cannot run, and for parameters that are sharded; ValueError for an unknown variant.
    """
    if not torch.compiler.is_compiling():
        check_launches()
    spec = LSTMSpec.of(coupled, peephole, output_peephole)
    if spec is STANDARD and weight_ch is None and torch_cell_serves(input, weight_ih, bias_ih, bias_hh):
        checks.cell_arguments(input, hx)
        return aten.lstm_cell(input, hx, weight_ih, weight_hh, bias_ih, bias_hh)
    weights = LSTMWeights(weight_ih, weight_hh, bias_ih, bias_hh, weight_ch=weight_ch)
    flat = [w for w in weights if w is not None]
    checks.not_sharded(flat, lambda: list(weights.present()))
    I, H = input_and_hidden_size(spec, tuple([None if w is None else w.shape for w in weights]))  # noqa: E741
    checks.cell_arguments(input, hx)
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        h = c = x.new_zeros(x.shape[0], H)
    else:
        h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    checks.cell_sizes(x, (h, c), I, H)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, h, c, weights = x.to(dtype), h.to(dtype), c.to(dtype), weights.map(lambda w: w.to(dtype))
        flat = [w for w in weights if w is not None]
    checks.cell_dtypes(x, (h, c, *flat))
    checks.same_device(x, (h, c), flat)

    if dispatch.choose(x.device, x.dtype).name == "torch":
        h, c = cell_by_reference(x, h, c, weights, spec)
    else:
        run = (x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), [weights], spec)
        _, h_n, c_n, _ = run_layer(*run, ALIKE, Engine("auto"))
        h, c = h_n[0], c_n[0]
    return (h, c) if batched else (h[0], c[0])


def torch_cell_serves(input: Tensor, weight: Tensor, bias_ih: Tensor | None, bias_hh: Tensor | None) -> bool:
    """Whether PyTorch's own cell computes a step of the standard variant; it checks sizes and types itself.

    On a GPU as well, unless the kernels were asked for: a step of ours takes Python 400 us to launch on the machine
    that was measured, and PyTorch's takes 100 us in all (benchmarks/NOTES.md).
    """
    if input.device.type == "cuda":
        ours = dispatch.requested() == "triton" or input.dtype not in SUPPORTED_DTYPES or transforms.forward_mode()
    else:
        ours = input.dtype not in aten.CPU_DTYPES or dispatch.choose(input.device, input.dtype).name != "torch"
    return (
        not ours
        and type(weight) in autograd.PLAIN
        and (bias_ih is None) == (bias_hh is None)
        and autocast_dtype(input) is None
        and not transforms.active()  # vmap has no rule for it
    )


def cell_by_reference(x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights, spec: LSTMSpec) -> tuple[Tensor, Tensor]:
    """One step of the reference, x (B, I), h (B, P), c (B, H).

    Autograd, torch.func and torch.compile see the operators themselves. The accumulator type as in the kernels.
    """
    checks.computed_dtype(x.dtype)
    dtype = accumulator_dtype(x.dtype)
    if dtype == x.dtype:
        return reference.cell(x, h, c, weights, spec)
    with torch.autocast(x.device.type, enabled=False):
        h_next, c_next = reference.cell(x.to(dtype), h.to(dtype), c.to(dtype), weights.map(lambda w: w.to(dtype)), spec)
    return h_next.to(x.dtype), c_next.to(x.dtype)


def lstm(
    input: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
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
    strategy: str = "auto",
    recompute: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
) -> tuple[Any, ...]:
    """A stack of layers over a whole sequence: (output, (h_n, c_n)), with `return_cell_states` (..., cell_states).

    - input: (T, B, I), (B, T, I) with `batch_first`, (T, I) unbatched, or a PackedSequence
    - hx: (h_0, c_0), (D·L, B, P) and (D·L, B, H), or without B for unbatched input; None for zeros
    - weights: for each layer, for each direction: weight_ih (G·H, I or D·P), weight_hh (G·H, P), with `bias` bias_ih
      and bias_hh (G·H,), with `proj_size` weight_hr (P, H), with `peephole` weight_ch, diagonal (Q·H,) or full (Q·H, H)
    - dropout: probability of zeroing an element of the output of each layer but the last, where `training`
    - strategy: "persistent" (all steps in one launch, the recurrent weights on the chip), "stepwise" (a launch a step),
      "cudnn" (`torch.nn.LSTM`'s own operator; variants without peepholes on CUDA), or "auto": see the README
    - recompute: do not keep the activated gates for the backward pass, but compute them again in it from h_t and c_t
      (PyTorch's own operator, where that computes, keeps what it likes)
    - lengths: (B,) integers from 1 to T on any device, instead of packing: beyond a row's length nothing is read,
      output and cell states are zero, and h_n and c_n are the row's last; the second direction starts at its end. On a
      GPU they are checked there, which waits for it once (but not inside a CUDA graph's capture); on the host nothing
      waits
    - resets: bool, (T, B), (B, T) with `batch_first`, (T,) unbatched: the state is zero before that step, in each
      layer and direction (an episode that begins there); on any device
    - output: (T, B, D·P), laid out as the input is; h_n, c_n as h_0, c_0
    - cell_states: every c_t of the last layer, (T, B, D·H), laid out as the output is

    Types as in `lstm_cell`. Raises ValueError or RuntimeError as `torch.nn.LSTM` does for sizes and types that do not
    fit and for T = 0; TypeError or ValueError for lengths and resets that do not; RuntimeError with the reason where
    the backend or strategy asked for cannot run, and for parameters that are sharded; ValueError for an unknown variant
    or strategy.
    """
    if not torch.compiler.is_compiling():
        check_launches()
    spec = LSTMSpec.of(coupled, peephole, output_peephole)
    selection.check_strategy(strategy, spec)
    checks.flag("recompute", recompute)
    checks.flag("return_cell_states", return_cell_states)
    L, D = num_layers, 2 if bidirectional else 1
    checks.not_sharded(weights, lambda: state_dict_names(spec, L, bidirectional, bias, proj_size))
    I, H, P = stack_sizes(spec, L, D, bias, proj_size, tuple([w.shape for w in weights]))  # noqa: E741

    checks.lstm_input_dimensions(input)
    checks.packed(input)
    layout = Layout.of(input, batch_first)
    x = layout.sequence(input.data if isinstance(input, PackedSequence) else input)
    if hx is not None:
        checks.lstm_state_dimensions(hx, layout.batched)
    dtype = autocast_dtype(x)
    checks.lstm_dtype(x, weights[0].dtype, dtype is not None)
    checks.lstm_features(x, I)
    if hx is None:
        h_0 = x.new_zeros(D * L, layout.B, P)
        c_0 = h_0 if P == H else x.new_zeros(D * L, layout.B, H)
    else:
        checks.lstm_states(hx, ((D * L, layout.B, P), (D * L, layout.B, H)), layout.batched)
        h_0, c_0 = layout.state(hx[0]), layout.state(hx[1])
    checks.same_device(x, (h_0, c_0), weights)
    checks.sequence_length(layout.T)
    steps = checks.lengths(lengths, layout.B, packed=layout.packed is not None)
    checks.resets(resets, layout.T, layout.B, layout.batched, batch_first)
    if dtype is not None:
        x, h_0, c_0, weights = x.to(dtype), h_0.to(dtype), c_0.to(dtype), [w.to(dtype) for w in weights]
    checks.same_dtype(x, (h_0, c_0), weights)
    rows = ALIKE
    if steps is not None or resets is not None or layout.packing is not None:
        rows = Rows(layout.packing, steps, resets)
    if strategy != "auto":
        selection.check_runnable(strategy, x.device, x.dtype, spec, rows.beyond_torch(return_cell_states))
    if resets is not None:
        rows = rows._replace(resets=layout.steps(without_waiting(resets, x.device)))
    if steps is not None and all_full(steps, layout.T):
        steps, rows = None, rows._replace(lengths=None)
    if steps is not None:
        if not transforms.exporting_to_onnx():  # its graph has no place for the check
            steps = checked_lengths(steps, layout.T, x.device)
        rows = rows._replace(lengths=steps)

    engine = choose_engine(strategy, x, h_0, c_0, weights, D, spec, rows, return_cell_states, recompute)
    if steps is not None:
        x = x.masked_fill(beyond(steps, layout.T), 0)
    drop = dropout if training and L > 1 else 0.0
    cell_states = None
    if engine.operator and (drop == 0 or x.device.type == "cpu"):
        options = aten.Options(bias, L, drop, bidirectional, layout.packing)
        # Autocast would cast the arguments once more: on CUDA to float16, whatever type was asked for.
        with nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):
            x, h_n, c_n = aten.lstm(x, h_0, c_0, aten.standard_weights(weights, spec), options)
    else:
        layers = group_layers(weights, spec, D, bias, proj_size)
        x, h_n, c_n, cell_states = run_layers(x, h_0, c_0, layers, spec, rows, engine, drop, return_cell_states)
    result = (layout.user_sequence(x), (layout.user_state(h_n), layout.user_state(c_n)))
    return (*result, layout.user_sequence(cell_states)) if cell_states is not None else result


class Rows(NamedTuple):
    """How the rows of a batch differ: packed, with lengths (B,), with resets (T, B) bool; None where they do not."""

    packing: Packing | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None

    def beyond_torch(self, states: bool) -> str | None:
        """What is asked that `torch.nn.LSTM`'s own operator does not have; None if it has it all."""
        if self.resets is None and self.lengths is None and not states:
            return None
        asked = {"resets": self.resets is not None, "lengths": self.lengths is not None, "return_cell_states": states}
        return ", ".join(name for name, present in asked.items() if present) or None


ALIKE = Rows()
"""Rows that do not differ."""


class Engine(NamedTuple):
    """Who computes the layers of a call.

    - strategy: of the library's own kernels, as in `lstm`; "torch" for the steps that are written out; "aten" for
      PyTorch's own LSTM inside of the operator of a layer, which torch.compile does not look into
    - operator: PyTorch's own LSTM computes instead, in a call of its own
    - recompute: as in `lstm`
    """

    strategy: str
    operator: bool = False
    recompute: bool = False


def choose_engine(
    strategy: str, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], D: int, spec: LSTMSpec, rows: Rows,
    states: bool, recompute: bool,
) -> Engine:  # fmt: skip
    """Who computes a call whose arguments are right. Raises RuntimeError where a backend asked for cannot run.

    Raises TypeError for a type that the library does not compute, unless PyTorch's own operator computes the call.
    """
    if (torch.compiler.is_compiling() or torch.jit.is_tracing()) and transforms.exporting_to_onnx():
        return engine_for_onnx(h_0, c_0, spec, rows, states)
    backend = dispatch.choose(x.device, x.dtype).name if strategy == "auto" else "triton"
    operator = strategy == "cudnn" or (
        strategy == "auto"
        and aten.serves(x, spec)
        and rows.beyond_torch(states) is None
        and not (spec.coupled and backend == "torch" and x.shape[0] == 1 and not x.is_complex())  # quicker written out
        and not transforms.active()
        and not transforms.forward_mode()
        and (backend == "torch" or prefers_cudnn(x, h_0, c_0, weights, D, spec, rows))
    )
    if operator and torch.compiler.is_compiling() and not leaves_operator(x, rows):
        # Of a packing PyTorch's operator would read the batch sizes while it is traced.
        opaque = rows.packing is None and not transforms.unfit_for_operators()
        if strategy == "cudnn" and not opaque:
            raise RuntimeError("strategy 'cudnn' cannot run here: not with packed rows or torch.func in torch.compile")
        return Engine("aten" if opaque else "torch", recompute=recompute)
    if not operator:
        checks.computed_dtype(x.dtype)
    return Engine("torch" if backend == "torch" else strategy, operator, recompute)


def engine_for_onnx(h_0: Tensor, c_0: Tensor, spec: LSTMSpec, rows: Rows, states: bool) -> Engine:
    """The engine whose layers become ONNX's LSTM nodes. Raises RuntimeError with a way out where they cannot.

    The exporter with dynamo=True translates a layer's operator by `onnx_node`; the older one knows PyTorch's own.
    """
    onnx_node.check(spec, h_0.shape[2] != c_0.shape[2], rows.resets, states)
    traced = torch.jit.is_tracing()
    if traced and (spec.peephole or rows.lengths is not None):
        raise RuntimeError(
            f"this LSTM ({spec.name}) cannot be exported to ONNX by TorchScript, which has no peepholes or lengths: "
            "use torch.onnx.export(..., dynamo=True)"
        )
    if rows.packing is not None and not traced:
        raise RuntimeError("a PackedSequence cannot be exported to ONNX: give a padded input and lengths")
    return Engine("auto", operator=traced)


def leaves_operator(x: Tensor, rows: Rows) -> bool:
    """Whether torch.export is at work, and its program can hold PyTorch's operator, as that of `torch.nn.LSTM` does.

    Such a program needs nothing of this library. A number of steps that is not fixed the operator would fix.
    """
    in_place = transforms.exporting() and not torch.compiler.is_dynamo_compiling() and rows.packing is None
    return in_place and isinstance(x.shape[0], int)


def prefers_cudnn(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[Tensor], D: int, spec: LSTMSpec, rows: Rows
) -> bool:
    """Whether `auto` leaves the layers to cuDNN: not where the kernels were asked for, nor where it does not serve."""
    if dispatch.requested() == "triton" or spec.peephole is not None:
        return False
    training = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h_0, c_0, *weights))
    projected = h_0.shape[2] != c_0.shape[2]
    if torch.compiler.is_compiling():
        # Of packed rows not even the number of rows is known, nor can the operator be kept from reading it.
        return rows.packing is None and selection.cudnn_when_compiled(
            x.device, x.dtype, spec.name, D, int(c_0.shape[2]), projected, training
        )
    if c_0.shape[1] == 0 or selection.why_not_cudnn(x.device, spec) is not None:
        return False
    T = x.shape[0] if rows.packing is None else rows.packing.T
    B, H = c_0.shape[1:]
    ragged = rows.packing is not None and not rows.packing.full
    layer = selection.Layer(spec, T, B, H, D, projected, x.dtype, matmul_precision(), training, ragged)
    return selection.strategy_of("auto", layer, gpu_of(x.device), cudnn_may=True).name == "cudnn"


def run_layers(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec, rows: Rows,
    engine: Engine, dropout: float, states: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """A stack, layer by layer: output, h_n, c_n as in `lstm`, and every c_t of the last layer if `states`, else None.

    Sequences are (T, B, F), or with a packing perhaps (N, F).
    """
    if len(layers) == 1:
        x, h_n, c_n, every = run_layer(x, h_0, c_0, layers[0], spec, rows, engine, states)
        return x, h_n, c_n, every if states else None
    D = len(layers[0])
    last_h, last_c = [], []
    cell_states = None
    for n, weights in enumerate(layers):
        if n > 0 and dropout > 0:
            if rows.packing is not None and x.dim() == 3:
                x = rows.packing.pack(x)  # as many random numbers as `torch.nn.LSTM` draws
            x = F.dropout(x, dropout)
        own = slice(n * D, (n + 1) * D)
        wanted = states and n == len(layers) - 1
        x, h_n, c_n, every = run_layer(x, h_0[own], c_0[own], weights, spec, rows, engine, wanted)
        cell_states = every if wanted else None
        last_h.append(h_n)
        last_c.append(c_n)
    return x, torch.cat(last_h), torch.cat(last_c), cell_states


def run_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, rows: Rows, engine: Engine,
    states: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer: output, h_n, c_n, and every c_t if `states`; else the fourth tensor has no meaning.

    x (T, B, I), finite beyond a length, h_0 (D, B, P), c_0 (D, B, H). With a packing x may be (N, I), and output is
    packed if PyTorch's own operator computed it: so the next layer will take it.
    """
    if engine.operator:
        if rows.packing is not None and x.dim() == 3:
            x = rows.packing.pack(x)
        options = aten.layer_options(weights)._replace(packing=rows.packing)
        flat = aten.standard_weights(aten.flat_weights(weights), spec)
        return (*aten.lstm(x, h_0, c_0, flat, options), x.new_empty(0))
    if engine.strategy == "torch" and not states and x.shape[0] == 1 and rows is ALIKE:
        return (*single_step(x.squeeze(0), h_0, c_0, weights, spec), x)
    lengths = rows.lengths
    if rows.packing is not None:
        x, lengths = rows.packing.pad(x) if x.dim() == 2 else x, rows.packing.lengths
    if not transforms.unfit_for_operators():
        how = (engine.strategy, engine.recompute, lengths, rows.resets, states)
        return autograd.lstm_layer(x, h_0, c_0, weights, spec, *how)
    if engine.strategy not in ("auto", "torch") or dispatch.requested() == "triton":
        raise RuntimeError(
            "forward-mode differentiation, and torch.func inside of torch.compile, are for strategy 'auto' with "
            "backend 'auto' or 'torch'"
        )
    return autograd.reference_layers(x, h_0, c_0, [weights], spec, lengths, rows.resets)


def single_step(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer of one step in PyTorch's own operators: x (B, I) -> output (1, B, D·P), h_n (D, B, P), c_n (D, B, H)."""
    if len(weights) == 1:
        h, c = cell_by_reference(x, h_0.squeeze(0), c_0.squeeze(0), weights[0], spec)
        return h.unsqueeze(0), torch.stack([h]), c.unsqueeze(0)
    states = zip(h_0.unbind(0), c_0.unbind(0), weights, strict=True)
    hidden, cells = zip(*[cell_by_reference(x, h, c, w, spec) for h, c, w in states], strict=True)
    return torch.cat(hidden, -1).unsqueeze(0), torch.stack(hidden), torch.stack(cells)


def group_layers(
    weights: Sequence[Tensor], spec: LSTMSpec, D: int, bias: bool, proj_size: int
) -> list[list[LSTMWeights]]:
    """The flat list of parameters by layer and direction."""
    groups = autograd.group(weights, spec, bias, proj_size > 0)
    return [groups[n : n + D] for n in range(0, len(groups), D)]


def stack_sizes(
    spec: LSTMSpec, L: int, D: int, bias: bool, proj_size: int, shapes: tuple[torch.Size, ...]
) -> tuple[int, int, int]:
    """I, H and P of a stack from the shapes of its parameters, in the order of `lstm`.

    Raises ValueError for a wrong number of them, RuntimeError naming the first whose shape does not fit the others.
    """
    check = stack_sizes_of if torch.compiler.is_compiling() else known_stack_sizes
    return check(spec, L, D, bias, proj_size, shapes)


def stack_sizes_of(
    spec: LSTMSpec, L: int, D: int, bias: bool, proj_size: int, shapes: tuple[torch.Size, ...]
) -> tuple[int, int, int]:
    """As `stack_sizes`, looked at anew."""
    names = spec.parameter_names(bias, proj_size > 0)
    if len(shapes) != L * D * len(names):
        raise ValueError(
            f"Expected {L * D * len(names)} weights ({', '.join(names)} for each of {L} layers and {D} directions), "
            f"got {len(shapes)}"
        )
    I, H, P = sizes_of(spec, shapes[0], shapes[1])  # noqa: E741
    for n in range(L * D):
        expected = spec.parameter_shapes(I if n < D else D * P, H, bias, proj_size)
        given = dict(zip(names, shapes[n * len(names) : (n + 1) * len(names)], strict=True))
        checks.weight_shapes(given, expected)
    return I, H, P


def input_and_hidden_size(spec: LSTMSpec, shapes: tuple[torch.Size | None, ...]) -> tuple[int, int]:
    """I and H of a cell from the shapes of the fields of its LSTMWeights.

    Raises ValueError for parameters that the variant does not take or lacks, RuntimeError naming the first whose shape
    does not fit the others.
    """
    check = input_and_hidden_size_of if torch.compiler.is_compiling() else known_input_and_hidden_size
    return check(spec, shapes)


def input_and_hidden_size_of(spec: LSTMSpec, shapes: tuple[torch.Size | None, ...]) -> tuple[int, int]:
    """As `input_and_hidden_size`, looked at anew."""
    given = {name: shape for name, shape in zip(LSTMWeights._fields, shapes, strict=True) if shape is not None}
    I, _, H = sizes_of(spec, given["weight_ih"], given["weight_hh"])  # noqa: E741
    expected = spec.parameter_shapes(I, H, "bias_ih" in given)
    if set(given) != set(expected):
        raise ValueError(f"the variant {spec.name!r} takes {', '.join(expected)}; given: {', '.join(given)}")
    checks.weight_shapes(given, expected)
    return I, H


def sizes_of(spec: LSTMSpec, weight_ih: torch.Size, weight_hh: torch.Size) -> tuple[int, int, int]:
    """I, H and P as the shapes of the first weights say."""
    return weight_ih[-1], weight_hh[0] // len(spec.gates), weight_hh[-1]


known_stack_sizes = lru_cache(maxsize=1024)(stack_sizes_of)
known_input_and_hidden_size = lru_cache(maxsize=1024)(input_and_hidden_size_of)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that an active autocast computes in; None where none is active, or none for this type (float64)."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return None
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64:
        return None
    if device not in ("cpu", "cuda") and not torch.amp.is_autocast_available(device):  # Dynamo cannot trace the latter
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def state_dict_names(spec: LSTMSpec, num_layers: int, bidirectional: bool, bias: bool, proj_size: int) -> list[str]:
    """The names of the parameters that `lstm` takes, in its order."""
    return [
        state_dict_name(name, layer, direction)
        for layer in range(num_layers)
        for direction in range(2 if bidirectional else 1)
        for name in spec.parameter_names(bias, proj_size > 0)
    ]
