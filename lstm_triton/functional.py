"""The LSTM on explicit tensors: check the arguments, choose the backend, run the layers.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions, G gate blocks, Q peephole blocks. The equations stand in `lstm_triton.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels.gpus import gpu_of
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import aten, autograd, checks, dispatch, selection, transforms
from lstm_triton.layer import beyond
from lstm_triton.layout import Layout
from lstm_triton.ragged import Packing, all_full, checked_lengths, without_waiting
from lstm_triton.spec import LSTMSpec, LSTMWeights, OutputPeephole, Peephole, state_dict_name


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
    spec = LSTMSpec(coupled, peephole, output_peephole)
    weights = LSTMWeights(weight_ih, weight_hh, bias_ih, bias_hh, weight_ch=weight_ch)
    H = weight_hh.size(-1)
    present = weights.present()
    checks.not_sharded(list(present.values()), lambda: list(present))
    check_weights([weights], spec, [weight_ih.size(-1)], H, 0)
    checks.cell_dimensions(input, hx)
    batched = input.dim() == 2
    x = input if batched else input.unsqueeze(0)
    if hx is None:
        zeros = x.new_zeros(x.size(0), H)
        h, c = zeros, zeros
    else:
        h, c = hx if batched else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
    checks.cell_sizes(x, (h, c), weight_ih.size(1), H)
    x, h, c, (weights,) = autocast(x, h, c, [weights])
    checks.cell_dtypes(x, (h, c, *weights.present().values()))
    checks.same_device(x, (h, c), "hidden")
    checks.same_device(x, tuple(weights.present().values()), "parameter")

    if dispatch.choose(x.device, x.dtype).name == "torch" and aten.serves_cell(x, spec):
        h, c = aten.lstm_cell(x, h, c, weights)
    else:
        _, h_n, c_n, _ = run_layer(x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), [weights], spec, Rows(), How())
        h, c = h_n[0], c_n[0]
    return (h, c) if batched else (h[0], c[0])


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
    lengths: Tensor | None = None,
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
      "cudnn" (`torch.nn.LSTM`'s own operator; the standard variant on CUDA), or "auto": the fastest as far as is known
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
    spec = LSTMSpec(coupled, peephole, output_peephole)
    selection.check_strategy(strategy)
    checks.flag("recompute", recompute)
    checks.flag("return_cell_states", return_cell_states)
    D = 2 if bidirectional else 1
    L = num_layers
    layers = group_layers(weights, spec, L, D, bias, proj_size)
    checks.not_sharded(weights, lambda: state_dict_names(spec, L, bidirectional, bias, proj_size))
    first = layers[0][0]
    I = first.weight_ih.size(-1)  # noqa: E741
    P = first.weight_hh.size(-1)
    H = first.weight_hh.size(0) // len(spec.gates)
    check_weights([w for layer in layers for w in layer], spec, [I] * D + [D * P] * (D * (L - 1)), H, proj_size)

    checks.lstm_input_dimensions(input)
    checks.packed(input)
    layout = Layout.of(input, batch_first)
    x = layout.sequence(input.data if isinstance(input, PackedSequence) else input)
    if hx is not None:
        checks.lstm_state_dimensions(hx, layout.batched)
    checks.lstm_dtype(x, first.weight_ih.dtype, autocast_dtype(x) is not None)
    checks.lstm_features(x, I)
    if hx is None:
        h_0, c_0 = x.new_zeros(D * L, layout.B, P), x.new_zeros(D * L, layout.B, H)
    else:
        checks.lstm_states(hx, ((D * L, layout.B, P), (D * L, layout.B, H)), layout.batched)
        h_0, c_0 = layout.state(hx[0]), layout.state(hx[1])
    checks.same_device(x, (h_0, c_0), "hidden")
    checks.same_device(x, weights, "parameter")
    checks.sequence_length(layout.T)
    checks.lengths(lengths, layout.B, packed=layout.packed is not None)
    checks.resets(resets, layout.T, layout.B, layout.batched, batch_first)
    x, h_0, c_0, cast = autocast(x, h_0, c_0, [w for layer in layers for w in layer])
    layers = [cast[n : n + D] for n in range(0, D * L, D)]
    checks.same_dtype(x, (h_0, c_0), "hidden")
    checks.same_dtype(x, [p for layer in layers for w in layer for p in w.present().values()], "parameter")
    rows = Rows(layout.packing, lengths, resets)
    selection.check_runnable(strategy, x.device, x.dtype, spec, rows.beyond_torch(return_cell_states))
    if resets is not None:
        rows = rows._replace(resets=layout.steps(without_waiting(resets, x.device)))
    if lengths is not None and all_full(lengths, layout.T):
        lengths, rows = None, rows._replace(lengths=None)
    if lengths is not None:
        lengths = checked_lengths(lengths, layout.T, x.device)
        rows = rows._replace(lengths=lengths)
        x = x.masked_fill(beyond(lengths, layout.T), 0)

    last_h, last_c = [], []
    for n, layer in enumerate(layers):
        if n > 0 and dropout > 0 and training:
            if layout.packing is not None and x.dim() == 3:
                x = layout.packing.pack(x)  # as many random numbers as `torch.nn.LSTM` draws
            x = F.dropout(x, dropout)
        states = slice(n * D, (n + 1) * D)
        how = How(strategy, recompute, return_cell_states and n == L - 1)
        x, h_n, c_n, cell_states = run_layer(x, h_0[states], c_0[states], layer, spec, rows, how)
        last_h.append(h_n)
        last_c.append(c_n)
    h_n, c_n = (last_h[0], last_c[0]) if L == 1 else (torch.cat(last_h), torch.cat(last_c))
    result = (layout.user_sequence(x), (layout.user_state(h_n), layout.user_state(c_n)))
    return (*result, layout.user_sequence(cell_states)) if return_cell_states else result


class Rows(NamedTuple):
    """How the rows of a batch differ: packed, with lengths (B,), with resets (T, B) bool; None where they do not."""

    packing: Packing | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None

    def beyond_torch(self, states: bool) -> str | None:
        """What is asked that `torch.nn.LSTM`'s own operator does not have; None if it has it all."""
        asked = {"resets": self.resets is not None, "lengths": self.lengths is not None, "return_cell_states": states}
        return ", ".join(name for name, present in asked.items() if present) or None


class How(NamedTuple):
    """How a layer is computed, as in `lstm`; states: whether every c_t is wanted of it."""

    strategy: str = "auto"
    recompute: bool = False
    states: bool = False


def run_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, rows: Rows, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer by the chosen backend and strategy: output, h_n, c_n, and every c_t (empty unless wanted).

    x (T, B, I), finite beyond a length, h_0 (D, B, P), c_0 (D, B, H). With a packing x may be (N, I), and output is
    packed if PyTorch's own operator computed it: so the next layer will take it.
    """
    backend = dispatch.choose(x.device, x.dtype).name if how.strategy == "auto" else "triton"
    if rows.beyond_torch(how.states) is None and aten_computes(backend, x, h_0, c_0, weights, spec, rows, how):
        if rows.packing is not None and x.dim() == 3:
            x = rows.packing.pack(x)
        return (*aten.lstm_layer(x, h_0, c_0, weights, rows.packing), x.new_empty(0))
    lengths = rows.lengths
    if rows.packing is not None:
        x, lengths = rows.packing.pad(x) if x.dim() == 2 else x, rows.packing.lengths
    inputs = (x, h_0, c_0, weights, spec)
    if transforms.unfit_for_operators():
        if how.strategy != "auto" or dispatch.requested() == "triton":
            raise RuntimeError(
                "forward-mode differentiation, and torch.func inside of torch.compile, are for strategy 'auto' with "
                "backend 'auto' or 'torch'"
            )
        output, h_n, c_n, states = autograd.reference_layer(*inputs, lengths, rows.resets)
    else:
        strategy = "torch" if backend == "torch" else how.strategy
        output, h_n, c_n, states = autograd.lstm_layer(
            *inputs, strategy, how.recompute, lengths, rows.resets, how.states
        )
    return output, h_n, c_n, states


def aten_computes(
    backend: str, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, rows: Rows,
    how: How,
) -> bool:  # fmt: skip
    """Whether PyTorch's own operator computes a layer that it could compute."""
    if backend == "torch":
        return aten.serves(x, spec)
    return how.strategy == "cudnn" or (how.strategy == "auto" and prefers_cudnn(x, h_0, c_0, weights, spec, rows))


def prefers_cudnn(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, rows: Rows
) -> bool:
    """Whether `auto` leaves the layer to cuDNN: not where the kernels were asked for, nor where it does not serve."""
    if not aten.serves(x, spec) or dispatch.requested() == "triton":
        return False
    if selection.why_not_cudnn(x.device, spec) is not None or c_0.shape[1] == 0:
        return False
    tensors = (x, h_0, c_0, *(w for direction in weights for w in direction.present().values()))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    layer = selection.layer_of(
        x, c_0, weights, spec, training, ragged=rows.packing is not None and not rows.packing.full
    )
    if rows.packing is not None:
        layer = layer._replace(T=rows.packing.T)
    return selection.strategy_of("auto", layer, gpu_of(x.device), cudnn_may=True).name == "cudnn"


def group_layers(
    weights: Sequence[Tensor], spec: LSTMSpec, L: int, D: int, bias: bool, proj_size: int
) -> list[list[LSTMWeights]]:
    """The flat list of parameters by layer and direction. Raises ValueError for a wrong number of them."""
    names = spec.parameter_names(bias, proj_size > 0)
    if len(weights) != L * D * len(names):
        raise ValueError(
            f"Expected {L * D * len(names)} weights ({', '.join(names)} for each of {L} layers and {D} directions), "
            f"got {len(weights)}"
        )
    groups = autograd.group(weights, spec, bias, proj_size > 0)
    return [groups[n : n + D] for n in range(0, L * D, D)]


def check_weights(
    weights: Sequence[LSTMWeights], spec: LSTMSpec, input_sizes: Sequence[int], H: int, proj_size: int
) -> None:
    """The parameters of each direction against what the variant asks for. Raises ValueError or RuntimeError."""
    for direction, input_size in zip(weights, input_sizes, strict=True):
        present = direction.present()
        shapes = spec.parameter_shapes(input_size, H, "bias_ih" in present, proj_size)
        if set(present) != set(shapes):
            raise ValueError(f"the variant {spec.name!r} takes {', '.join(shapes)}; given: {', '.join(present)}")
        checks.weight_shapes(present, shapes)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that an active autocast computes in; None where none is active, or none for this type (float64)."""
    device = x.device.type
    if not x.is_floating_point() or x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def autocast(
    x: Tensor, h: Tensor, c: Tensor, weights: Sequence[LSTMWeights]
) -> tuple[Tensor, Tensor, Tensor, list[LSTMWeights]]:
    """The same tensors, in autocast's type where autocast is active."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return x, h, c, list(weights)
    cast = [direction.map(lambda weight: weight.to(dtype)) for direction in weights]
    return x.to(dtype), h.to(dtype), c.to(dtype), cast


def state_dict_names(spec: LSTMSpec, num_layers: int, bidirectional: bool, bias: bool, proj_size: int) -> list[str]:
    """The names of the parameters that `lstm` takes, in its order."""
    return [
        state_dict_name(name, layer, direction)
        for layer in range(num_layers)
        for direction in range(2 if bidirectional else 1)
        for name in spec.parameter_names(bias, proj_size > 0)
    ]
