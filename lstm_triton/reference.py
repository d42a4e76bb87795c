"""The LSTM, equation by equation: the oracle that everything else is tested against.

Any dtype, any device, differentiable as often as PyTorch is. Shapes: B batch rows, I input features, H hidden units,
P hidden size after projection (else H), T time steps, D directions, G gate blocks.

    a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
    i = s(a_i + V_i c_{t-1})          coupled: i = 1 - f
    f = s(a_f + V_f c_{t-1})
    g = tanh(a_g)
    c_t = f c_{t-1} + i g
    o = s(a_o + V_o c_*)              c_* = c_{t-1}, or c_t with output_peephole="current"
    h_t = o tanh(c_t)                 with projection: h_t = W_hr (o tanh(c_t))

With layer normalisation (Ba et al. 2016), where n(v) is v less its mean, divided by its standard deviation:

    a = w_ih n(W_ih x_t) + b_ih + w_hh n(W_hh h_{t-1}) + b_hh
    h_t = o tanh(w_c n(c_t) + b_c)

Ablations (Greff et al. 2017): a gate that is left out is 1, g = a_g with input_activation="identity", and h_t = o c_t
with output_activation="identity".

Regularised steps (dropout within the recurrence, zoneout, clipping) are in `lstm_triton_kernels.regularize`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from lstm_triton_kernels.normalize import NORM_EPS
from lstm_triton_kernels.regularize import UNREGULARIZED, Regularized
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor


def cell(
    x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights, spec: LSTMSpec, regularized: Regularized = UNREGULARIZED
) -> tuple[Tensor, Tensor]:
    """One step. x (B, I), h (B, P), c (B, H) -> h (B, P), c (B, H); regularized: of this step."""
    v = spec.split_peephole(weights.weight_ch) if weights.weight_ch is not None else {}
    return update(input_side(x, weights), h, c, weights, v, spec, regularized)


def input_side(x: Tensor, weights: LSTMWeights) -> Tensor:
    """Return what the input contributes to the gates: x (..., I) -> (..., G·H)."""
    return product(x, weights.weight_ih, weights.bias_ih, weights.weight_ln_ih)


def update(
    gates: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights, v: Mapping[str, Tensor], spec: LSTMSpec,
    regularized: Regularized = UNREGULARIZED,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step from the input side of its gates (B, G·H): h (B, P), c (B, H) -> h (B, P), c (B, H).

    v: the blocks of the peephole by gate, in place of `weights.weight_ch`.
    """
    a = gates + product(regularized.drop_hidden(h), weights.weight_hh, weights.bias_hh, weights.weight_ln_hh)
    *_, o, c_next = activated(a, c, v, spec, regularized)
    y = normalized(c_next, weights.weight_ln_c, weights.bias_ln_c)
    h_next = o * (y if spec.identity_output else torch.tanh(y))
    if weights.weight_hr is not None:
        h_next = regularized.clip_hidden(F.linear(h_next, weights.weight_hr))
    return regularized.zone_hidden(h_next, h), regularized.zone_cell(c_next, c)


def activated(
    gates: Tensor, c: Tensor, v: Mapping[str, Tensor], spec: LSTMSpec, regularized: Regularized = UNREGULARIZED
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gates i, f, g and o, g before its dropout, and c_t before zoneout, (..., H) each.

    gates: pre-activations (..., G·H) without what they read of cell states; c: c_{t-1} (..., H); v: as of `update`. Of
    one step, or of any number of steps whose c_{t-1} is known.
    """
    a = spec.split_gates(gates)

    def gate(name: str, c_read: Tensor) -> Tensor:
        if name in spec.missing:
            return torch.ones_like(c_read)
        if not v:
            return torch.sigmoid(a[name])
        return torch.sigmoid(a[name] + (F.linear(c_read, v[name]) if spec.full else v[name] * c_read))

    f = gate("f", c)
    i = 1 - f if spec.coupled else gate("i", c)
    g = a["g"] if spec.identity_input else torch.tanh(a["g"])
    c_next = regularized.clip_cell(f * c + i * regularized.drop_candidate(g))
    return i, f, g, gate("o", c_next if spec.output_current else c), c_next


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return W x + b, or with a gain (G·H,) the product normalised: x (..., I) -> (..., G·H)."""
    if gain is None:
        return F.linear(x, weight, bias)
    return normalized(F.linear(x, weight), gain, bias)


def normalized(x: Tensor, gain: Tensor | None, shift: Tensor | None) -> Tensor:
    """Return x (..., N) with each row normalised, times the gain (N,), plus the shift (N,); without a gain x itself."""
    return x if gain is None else F.layer_norm(x, gain.shape, gain, shift, NORM_EPS)


def layer_states(
    x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec,
    lengths: Tensor | None = None, resets: Tensor | None = None, regularized: Regularized = UNREGULARIZED,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """One layer, all its directions (the second runs backwards in time), and every cell state.

    x (T, B, I), h_0 (D, B, P), c_0 (D, B, H) -> output (T, B, D·P), cells (T, B, D·H), h_n (D, B, P), c_n (D, B, H).

    - lengths: (B,), steps of each row: beyond them the row keeps its state (the second direction has not started yet),
      and its output and cells are zero
    - resets: (T, B) bool, where the state is zero before that step, in each direction
    - regularized: the rules and masks of the layer's steps
    """
    outputs, cells, last_h, last_c = [], [], [], []
    for direction, direction_weights in enumerate(weights):
        h, c = h_0[direction], c_0[direction]
        hidden, states = [], []
        own = regularized.direction(direction)
        for t in reversed(range(len(x))) if direction else range(len(x)):
            kept_h, kept_c = h, c
            if resets is not None:
                h, c = (state.masked_fill(resets[t][:, None], 0) for state in (h, c))
            h, c = cell(x[t], h, c, direction_weights, spec, own.at(t))
            hidden.append(h)
            states.append(c)
            if lengths is not None:
                dead = (t >= lengths)[:, None]
                hidden[-1], states[-1] = h.masked_fill(dead, 0), c.masked_fill(dead, 0)
                h, c = torch.where(dead, kept_h, h), torch.where(dead, kept_c, c)
        outputs.append(torch.stack(hidden[::-1] if direction else hidden))
        cells.append(torch.stack(states[::-1] if direction else states))
        last_h.append(h)
        last_c.append(c)
    return torch.cat(outputs, -1), torch.cat(cells, -1), torch.stack(last_h), torch.stack(last_c)


def lstm(
    x: Tensor, h_0: Tensor, c_0: Tensor, layers: Sequence[Sequence[LSTMWeights]], spec: LSTMSpec,
    lengths: Tensor | None = None, resets: Tensor | None = None, regularized: Sequence[Regularized] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A stack of layers, without dropout between them; lengths, resets and, one a layer, regularized as in
    `layer_states`.

    x (T, B, I), h_0 (D·L, B, P), c_0 (D·L, B, H) -> output (T, B, D·P), h_n (D·L, B, P), c_n (D·L, B, H), and the cell
    states of the last layer (T, B, D·H).
    """
    last_h, last_c = [], []
    for n, weights in enumerate(layers):
        states = slice(n * len(weights), (n + 1) * len(weights))
        own = regularized[n] if regularized is not None else UNREGULARIZED
        x, cells, h_n, c_n = layer_states(x, h_0[states], c_0[states], weights, spec, lengths, resets, own)
        last_h.append(h_n)
        last_c.append(c_n)
    return x, torch.cat(last_h), torch.cat(last_c), cells
