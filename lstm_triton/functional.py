"""The LSTM on explicit tensors: check the arguments, choose the backend, run the layers.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions, G gate blocks, Q peephole blocks. The equations stand in `lstm_triton.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from lstm_triton_kernels.gpus import gpu_of
from torch import Tensor

from lstm_triton import aten, autograd, checks, dispatch, selection
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
    where the backend asked for cannot run; ValueError for an unknown variant.
    """
    spec = LSTMSpec(coupled, peephole, output_peephole)
    weights = LSTMWeights(weight_ih, weight_hh, bias_ih, bias_hh, weight_ch=weight_ch)
    H = weight_hh.size(-1)
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
    checks.same_kind(x, (h, c), "hidden")
    checks.same_kind(x, tuple(weights.present().values()), "parameter")

    if dispatch.choose(x.device, x.dtype).name == "torch" and aten.serves_cell(x, spec):
        h, c = aten.lstm_cell(x, h, c, weights)
    else:
        _, h_n, c_n = run_layer(x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), [weights], spec)
        h, c = h_n[0], c_n[0]
    return (h, c) if batched else (h[0], c[0])


def lstm(
    input: Tensor,
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
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A stack of layers over a whole sequence: (output, (h_n, c_n)).

    - input: (T, B, I), (B, T, I) with `batch_first`, or (T, I) unbatched
    - hx: (h_0, c_0), (D·L, B, P) and (D·L, B, H), or without B for unbatched input; None for zeros
    - weights: for each layer, for each direction: weight_ih (G·H, I or D·P), weight_hh (G·H, P), with `bias` bias_ih
      and bias_hh (G·H,), with `proj_size` weight_hr (P, H), with `peephole` weight_ch, diagonal (Q·H,) or full (Q·H, H)
    - dropout: probability of zeroing an element of the output of each layer but the last, where `training`
    - strategy: "persistent" (all steps in one launch, the recurrent weights on the chip), "stepwise" (a launch a step),
      "cudnn" (`torch.nn.LSTM`'s own operator; the standard variant on CUDA), or "auto": the fastest as far as is known
    - recompute: do not keep the activated gates for the backward pass, but compute them again in it from h_t and c_t
      (PyTorch's own operator, where that computes, keeps what it likes)
    - output: (T, B, D·P), laid out as the input is; h_n, c_n as h_0, c_0

    Types as in `lstm_cell`. Raises ValueError or RuntimeError as `torch.nn.LSTM` does for sizes and types that do not
    fit and for T = 0; TypeError for a PackedSequence; RuntimeError with the reason where the backend or
    strategy asked for cannot run; ValueError for an unknown variant or strategy.
    """
    spec = LSTMSpec(coupled, peephole, output_peephole)
    selection.check_strategy(strategy)
    checks.flag("recompute", recompute)
    D = 2 if bidirectional else 1
    L = num_layers
    layers = group_layers(weights, spec, L, D, bias, proj_size)
    first = layers[0][0]
    I = first.weight_ih.size(-1)  # noqa: E741
    P = first.weight_hh.size(-1)
    H = first.weight_hh.size(0) // len(spec.gates)
    check_weights([w for layer in layers for w in layer], spec, [I] * D + [D * P] * (D * (L - 1)), H, proj_size)

    checks.padded(input)
    checks.lstm_input_dimensions(input)
    batched = input.dim() == 3
    x = input if batched else input.unsqueeze(1)
    if batched and batch_first:
        x = x.transpose(0, 1)
    T, B, _ = x.shape
    if hx is None:
        h_0, c_0 = x.new_zeros(D * L, B, P), x.new_zeros(D * L, B, H)
    else:
        checks.lstm_state_dimensions(hx, batched)
        h_0, c_0 = hx if batched else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
    checks.lstm_input(x, I, first.weight_ih.dtype, autocast_dtype(x) is not None)
    checks.lstm_states((h_0, c_0), ((D * L, B, P), (D * L, B, H)))
    checks.sequence_length(T)
    x, h_0, c_0, cast = autocast(x, h_0, c_0, [w for layer in layers for w in layer])
    layers = [cast[n : n + D] for n in range(0, D * L, D)]
    checks.same_kind(x, (h_0, c_0), "hidden")
    checks.same_kind(x, [p for layer in layers for w in layer for p in w.present().values()], "parameter")
    selection.check_runnable(strategy, x.device, x.dtype, spec)

    last_h, last_c = [], []
    for n, layer in enumerate(layers):
        if n > 0 and dropout > 0:
            x = F.dropout(x, dropout, training)
        states = slice(n * D, (n + 1) * D)
        x, h_n, c_n = run_layer(x, h_0[states], c_0[states], layer, spec, strategy, recompute)
        last_h.append(h_n)
        last_c.append(c_n)
    h_n, c_n = (last_h[0], last_c[0]) if L == 1 else (torch.cat(last_h), torch.cat(last_c))
    if not batched:
        return x.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
    return (x.transpose(0, 1) if batch_first else x), (h_n, c_n)


def run_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, strategy: str = "auto",
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer by the chosen backend and strategy; x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> output, h_n, c_n."""
    backend = dispatch.choose(x.device, x.dtype).name if strategy == "auto" else "triton"
    if backend == "torch":
        if aten.serves(x, spec):
            return aten.lstm_layer(x, h_0, c_0, weights)
        return autograd.lstm_layer(x, h_0, c_0, weights, spec, "torch", recompute)
    if strategy == "cudnn" or (strategy == "auto" and prefers_cudnn(x, h_0, c_0, weights, spec)):
        return aten.lstm_layer(x, h_0, c_0, weights)
    return autograd.lstm_layer(x, h_0, c_0, weights, spec, strategy, recompute)


def prefers_cudnn(x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec) -> bool:
    """Whether `auto` leaves the layer to cuDNN: not where the kernels were asked for, nor under torch.compile."""
    if torch.compiler.is_compiling() or dispatch.requested() == "triton":
        return False
    if selection.why_not_cudnn(x.device, spec) is not None or x.shape[1] == 0:
        return False
    tensors = (x, h_0, c_0, *(w for direction in weights for w in direction.present().values()))
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    layer = selection.layer_of(x, c_0, weights, spec, training)
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
