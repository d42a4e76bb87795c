"""A layer as ONNX's own LSTM node, for torch.onnx.export with dynamo=True: any number of steps and rows.

The node (https://onnx.ai/onnx/operators/onnx__LSTM.html) has diagonal peepholes whose output gate reads c_t, and the
lengths of rows. Coupled gates are those of a standard LSTM with other weights, see `aten.standard_weights`.

Shapes: T time steps, B batch rows, I input features, H hidden units, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor


def check(spec: LSTMSpec, projection: bool, asked: Sequence[str]) -> None:
    """Raise RuntimeError with the reason, and a way out where there is one, for a layer that is no such node.

    asked: names of arguments of the call that `torch.nn.LSTM` does not have.
    """
    obstacle = None
    if spec.full:
        obstacle = "ONNX's LSTM node has no full peepholes"
    elif spec.diagonal and not spec.output_current:
        obstacle = "the output gate of ONNX's LSTM node reads c_t: train with output_peephole='current'"
    elif projection:
        obstacle = "ONNX's LSTM node has no projection"
    elif spec.layer_norm:
        obstacle = "ONNX's LSTM node has no layer normalisation"
    elif not spec.activated:
        obstacle = "ONNX's LSTM node is exported with tanh alone, not with the identity"
    elif others := [name for name in asked if name != "lengths"]:
        obstacle = f"ONNX's LSTM node has no {others[0]}"
    if obstacle is not None:
        raise RuntimeError(f"this LSTM ({spec.name}) cannot be exported to ONNX: {obstacle}")


def layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec, lengths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
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
    output, h_n, c_n = torch.onnx.ops.symbolic_multi_out(
        "LSTM",
        inputs,
        dict(hidden_size=H, direction="bidirectional" if D == 2 else "forward"),
        dtypes=(x.dtype,) * 3,
        shapes=((T, D, B, H), (D, B, H), (D, B, H)),
        version=None,
    )
    return output.transpose(1, 2).flatten(2), h_n, c_n


def gates(stacked: Tensor, spec: LSTMSpec) -> Tensor:
    """Rows in the gate blocks i, f, g, o (coupled: f, g, o) in ONNX's order i, o, f, c, where c is our g."""
    block = spec.split_gates(stacked, 0)
    i = -block["f"] if spec.coupled else block["i"]
    return torch.cat([i, block["o"], block["f"], block["g"]])


def peepholes(weight_ch: Tensor, spec: LSTMSpec) -> Tensor:
    """Diagonal peepholes in ONNX's order i, o, f."""
    block = spec.split_peephole(weight_ch)
    i = -block["f"] if spec.coupled else block["i"]
    return torch.cat([i, block["o"], block["f"]])
