"""The LSTM on explicit tensors: lay out and check the arguments, route the call, run the layers.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), L layers,
D directions, G gate blocks, Q peephole blocks. The equations stand in `lstm_triton.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights, OutputPeephole, Peephole
from lstm_triton_kernels.watch import check_launches
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import aten, autograd, checks, parameters, routing, second_order, transforms
from lstm_triton.layer import Call
from lstm_triton.layout import Layout
from lstm_triton.ragged import Packing, all_full, checked_lengths, without_waiting


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
    weights = LSTMWeights(weight_ih, weight_hh, bias_ih, bias_hh, weight_ch=weight_ch)
    dtype = autocast_dtype(input)
    both = (bias_ih is None) == (bias_hh is None) and weight_ch is None
    plain = dtype is None and both and type(weight_ih) in autograd.PLAIN
    sizes = Layer(spec, 1, 1, weight_hh.shape[-1], 1, dtype or input.dtype)
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

    if route.name == "reference":
        checks.computed_dtype(x.dtype)
        h, c = second_order.cell(x, h, c, weights, spec)
    else:
        call = Call(spec.name, bias_ih is not None, False, route.name)
        _, h_n, c_n, _ = autograd.lstm_layer(x.unsqueeze(0), h.unsqueeze(0), c.unsqueeze(0), [weights], Order(1), call)
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
    routing.check_strategy(strategy, spec)
    checks.flag("recompute", recompute)
    checks.flag("return_cell_states", return_cell_states)
    L, D = num_layers, 2 if bidirectional else 1
    checks.not_sharded(weights, lambda: parameters.state_dict_names(spec, L, bidirectional, bias, proj_size))
    I, H, P = parameters.stack_sizes(spec, L, D, bias, proj_size, tuple([w.shape for w in weights]))  # noqa: E741

    checks.lstm_input(input)
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
    if steps is not None or resets is not None or return_cell_states:
        given = dict(resets=resets is not None, lengths=steps is not None and not (full and strategy == "auto"))
        asked = tuple(name for name, there in (given | dict(return_cell_states=return_cell_states)).items() if there)
    if full:
        steps = None
    if steps is not None and not transforms.exporting_to_onnx():  # an ONNX graph has no place for the check
        steps = checked_lengths(steps, layout.T, x.device)
    if resets is not None:
        resets = layout.steps(without_waiting(resets, x.device))
    order, packing = Order(layout.T, steps, resets), layout.packing

    inputs = (x, h_0, c_0, *weights)
    tracked = torch.is_grad_enabled() and (True in [t.requires_grad for t in inputs] or bool(transforms.recorder()))
    ragged = order.ragged or (packing is not None and not packing.full)
    of_layer = Layer(
        spec, layout.T, layout.B, H, D, x.dtype, I=I, P=proj_size, ragged=ragged,
        training=tracked, L=L,
    )  # fmt: skip
    engine = routing.route(of_layer, x.device, strategy, asked, packing is not None).name
    if not engine.startswith("operator"):
        checks.computed_dtype(x.dtype)
    if steps is not None:
        x = order.zero_beyond(x)
    drop = dropout if training and L > 1 else 0.0
    cell_states = None
    # Autocast would cast the arguments of PyTorch's operator once more: on CUDA to float16, whatever was asked for.
    with nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False):
        if engine == "operator" and (drop == 0 or x.device.type == "cpu"):
            options = aten.Options(bias, L, drop, bidirectional, packing)
            x, h_n, c_n = aten.lstm(x, h_0, c_0, aten.standard_weights(weights, spec), options)
        else:
            call = Call(spec.name, bias, proj_size > 0, engine, False, recompute, return_cell_states)
            groups = call.group(weights)
            layers = [groups[n : n + D] for n in range(0, L * D, D)]
            x, h_n, c_n, cell_states = run_layers(x, h_0, c_0, layers, order, packing, call, drop)
    result = (layout.user_sequence(x), (layout.user_state(h_n), layout.user_state(c_n)))
    return (*result, layout.user_sequence(cell_states)) if cell_states is not None and return_cell_states else result


def run_layers(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], order: Order,
    packing: Packing | None, call: Call, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute a stack layer by layer: output, h_n, c_n as in `lstm`, and every c_t of the last layer if asked for.

    x is (T, B, I), or with a packing (N, I), and so is the output if PyTorch's operator computes it; else it is padded.
    """
    if packing is not None and call.engine != "operator":
        x, order = packing.pad(x), order._replace(lengths=packing.lengths)
    if len(layers) == 1:
        return run_layer(x, h_0, c_0, layers[0], order, packing, call)
    D = len(layers[0])
    last_h, last_c = [], []
    for n, weights in enumerate(layers):
        if n > 0 and dropout > 0:
            if packing is None or x.dim() == 2:
                x = F.dropout(x, dropout)
            else:  # as many random numbers as `torch.nn.LSTM` draws
                x = packing.pad(F.dropout(packing.pack(x), dropout))
        own = slice(n * D, (n + 1) * D)
        of_layer = call if n == len(layers) - 1 else call._replace(states=False)
        x, h_n, c_n, cell_states = run_layer(x, h_0[own], c_0[own], weights, order, packing, of_layer)
        last_h.append(h_n)
        last_c.append(c_n)
    return x, torch.cat(last_h), torch.cat(last_c), cell_states


def run_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, packing: Packing | None,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute one layer: output, h_n, c_n, and every c_t if that is asked for; else the fourth tensor has no meaning.

    x (T, B, I), finite beyond a row's length, h_0 (D, B, P), c_0 (D, B, H).
    """
    if call.engine == "operator":
        options = aten.layer_options(weights)._replace(packing=packing)
        flat = aten.standard_weights(aten.flat_weights(weights), call.spec)
        return (*aten.lstm(x, h_0, c_0, flat, options), x)
    if call.engine != "reference":
        return autograd.lstm_layer(x, h_0, c_0, weights, order, call)
    if order.T == 1 and not order.ragged and not call.states:
        return (*second_order.single_step(x.squeeze(0), h_0, c_0, weights, call.spec), x)
    return second_order.forward(x, h_0, c_0, [weights], call.spec, order)


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
