"""The gates of all steps, for looking inside of a layer: computed from the states that it returns.

No engine keeps them for this: each gate is a function of the input and of h_{t-1} and c_{t-1}, which are there for all
steps at once. So they are two large products, and have gradients. In float16 and bfloat16 they are those of the states
as returned, which the steps had in float32.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import UNREGULARIZED
from lstm_triton_kernels.sizes import accumulator_dtype
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import reference
from lstm_triton.layer_norm import normalized


class Gates(NamedTuple):
    """The gates of every step of a layer, each (T, B, D·H), laid out as the output is: packed for packed rows.

    - i, f, o: the input, forget and output gate. Coupled, i is 1 - f; a gate that is left out is 1
    - g: the candidate, before dropout

    Zero beyond a row's length.
    """

    i: Any
    f: Any
    g: Any
    o: Any

    def map(self, function: Callable[[Any], Any]) -> Gates:
        """Return the same gates, each as `function` makes it."""
        return Gates(*map(function, self))


def of_layer(
    x: Tensor, h_0: Tensor, c_0: Tensor, output: Tensor, states: Tensor, weights: Sequence[LSTMWeights], spec: LSTMSpec,
    order: Order,
) -> Gates:  # fmt: skip
    """Return the gates of a layer, from its arguments and results, in their type.

    x (T, B, I), finite beyond a row's length, h_0 (D, B, P), c_0 (D, B, H), output (T, B, D·P), states (T, B, D·H):
    every c_t; weights: of a variant with all gates; order: of a layer, with the masks of regularised steps.
    """
    P, H = h_0.shape[2], c_0.shape[2]
    directions = []
    for n, w in enumerate(weights):
        own = output[..., n * P : (n + 1) * P], states[..., n * H : (n + 1) * H]
        directions.append(of_direction(x, h_0[n], c_0[n], *own, w, spec, order.direction(n)))
    gates = Gates(*(torch.cat(parts, -1) for parts in zip(*directions, strict=True)))
    return gates.map(order.zero_beyond)


def of_direction(
    x: Tensor, h_0: Tensor, c_0: Tensor, output: Tensor, states: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order
) -> Gates:
    """Return the gates of one direction: h_0 (B, P), c_0 (B, H), output (T, B, P), states (T, B, H)."""
    dtype = accumulator_dtype(x.dtype)
    h = order.hidden_read(output, h_0)
    c = order._replace(regularized=UNREGULARIZED).hidden_read(states, c_0)
    a = product(x, w.weight_ih, w.bias_ih, w.weight_ln_ih) + product(h, w.weight_hh, w.bias_hh, w.weight_ln_hh)
    v = {} if w.weight_ch is None else spec.split_peephole(w.weight_ch.to(dtype))
    *gates, _ = reference.activated(a.to(dtype), c.to(dtype), v, spec, order.regularized)
    return Gates(*gates).map(lambda t: t.to(x.dtype))


def product(x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None) -> Tensor:
    """Return W x + b, or with a gain (G·H,) the product normalised: x (T, B, N) -> (T, B, G·H)."""
    return F.linear(x, weight, bias) if gain is None else normalized(F.linear(x, weight), gain, bias)
