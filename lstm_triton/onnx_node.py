"""A layer as ONNX's own LSTM node, for torch.onnx.export: any number of steps and rows.

The node (https://onnx.ai/onnx/operators/onnx__LSTM.html) has diagonal peepholes whose output gate reads c_t, and the
lengths of rows. Coupled gates are those of a standard LSTM with other weights, see `aten.standard_weights`: the node's
own attribute `input_forget` leaves to the runtime which of both gates is computed from the other (onnxruntime computes
f = 1 - i). Its attribute `clip` is no cell_clip: it bounds what the activations read, not the cell state.

Shapes: T time steps, B batch rows, I input features, H hidden units, D directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import regularization

if TYPE_CHECKING:
    from lstm_triton.layer import Call

NODE_DTYPES = (torch.float32, torch.float16)
"""The types of the node: onnxruntime has no kernel of it in float64, and ONNX has none in bfloat16 before opset 22."""


def why_not(spec: LSTMSpec, projection: bool, dtype: torch.dtype, asked: Sequence[str]) -> str | None:
    """Return what keeps a layer from being such a node; None if nothing does.

    asked: names of arguments and options of the call that `torch.nn.LSTM` does not have.
    """
    obstacle = None
    if spec.full:
        obstacle = "ONNX's LSTM node has no full peepholes"
    elif spec.diagonal and not spec.output_current:
        obstacle = "the output gate of ONNX's LSTM node reads c_t"
    elif projection:
        obstacle = "ONNX's LSTM node has no projection"
    elif spec.layer_norm:
        obstacle = "ONNX's LSTM node has no layer normalisation"
    elif not spec.activated:
        obstacle = "ONNX's LSTM node is exported with tanh alone, not with the identity"
    elif dtype not in NODE_DTYPES:
        obstacle = f"onnxruntime does not compute the node in {dtype}"
    elif others := [name for name in asked if name != "lengths"]:
        obstacle = f"ONNX's LSTM node has no {others[0]}"
    return obstacle


def why_not_layer(call: Call, dtype: torch.dtype, resets: Tensor | None) -> str | None:
    """Return what keeps a layer of that call from being such a node, as `why_not`."""
    asked = ("resets",) * (resets is not None) + ("return_cell_states",) * call.states
    asked += regularization.asked(Rules(*call.rules)) if call.rules else ()
    return why_not(call.spec, call.projection, dtype, asked)


Add = Callable[[Sequence[Tensor | None], dict[str, Any], Sequence[Sequence[int]]], Sequence[Tensor]]
"""(inputs, attributes, shapes of the results) -> results: what adds a node to the graph."""


def by_dynamo(
    inputs: Sequence[Tensor | None], attributes: dict[str, Any], shapes: Sequence[Sequence[int]]
) -> Sequence[Tensor]:
    """Add the node to what the exporter with dynamo=True traces: an `Add`."""
    dtypes = (inputs[0].dtype,) * len(shapes)  # type: ignore[union-attr]
    return torch.onnx.ops.symbolic_multi_out("LSTM", inputs, attributes, dtypes=dtypes, shapes=shapes, version=None)


def layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, lengths: Tensor | None,
    add: Add = by_dynamo,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the node: x (T, B, I), h_0 and c_0 (D, B, H), lengths (B,) -> output (T, B, D·H), h_n, c_n (D, B, H)."""
    T, B, _ = x.shape
    D, _, H = c_0.shape
    biases = [
        torch.cat([gates(w.bias_ih, spec), gates(w.bias_hh, spec)])
        for w in weights
        if w.bias_ih is not None and w.bias_hh is not None
    ]
    inputs = (
        x,
        torch.stack([gates(w.weight_ih, spec) for w in weights]),
        torch.stack([gates(w.weight_hh, spec) for w in weights]),
        torch.stack(biases) if biases else None,
        None if lengths is None else lengths.to(torch.int32),
        h_0,
        c_0,
        torch.stack([peepholes(w.weight_ch, spec) for w in weights if w.weight_ch is not None])
        if spec.peephole
        else None,
    )
    attributes = dict(hidden_size=H, direction="bidirectional" if D == 2 else "forward")
    output, h_n, c_n = add(inputs, attributes, ((T, D, B, H), (D, B, H), (D, B, H)))
    return output.transpose(1, 2).flatten(2), h_n, c_n


def gates(stacked: Tensor, spec: LSTMSpec) -> Tensor:
    """Rows in the gate blocks i, f, g, o (coupled: f, g, o) in ONNX's order i, o, f, c, where c is our g."""
    block = blocks(stacked, spec.gates)
    i = -block["f"] if spec.coupled else block["i"]
    return torch.cat([i, block["o"], block["f"], block["g"]])


def peepholes(weight_ch: Tensor, spec: LSTMSpec) -> Tensor:
    """Diagonal peepholes in ONNX's order i, o, f."""
    block = blocks(weight_ch, spec.peephole_gates)
    i = -block["f"] if spec.coupled else block["i"]
    return torch.cat([i, block["o"], block["f"]])


def blocks(stacked: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Return equal blocks of rows by name. The exporter computes slices of a parameter beforehand, but no Split."""
    H = stacked.shape[0] // len(names)
    return {name: stacked.narrow(0, n * H, H) for n, name in enumerate(names)}
