"""One layer with layer normalisation, all its directions: what stands around the loop over the steps, as in layer.py.

Shapes: T time steps, B batch rows, I input features, H hidden units, P hidden size after projection (else H), D
directions, G gate blocks.

The input side is normalised for all steps at once, before the loop. Backward, the products with the weights are
computed again for all steps at once, one GEMM each, in place of being kept: they would be as large as the gates. With
their means and deviations the loop computes the gradients of the pre-activations, d; the gradients of the products
follow from d, by PyTorch's own operator for all steps at once:

    a = w_ih n(W_ih x) + b_ih + w_hh n(W_hh h) + b_hh
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from lstm_triton_kernels.normalize import Products
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import gemms, layer
from lstm_triton.layer import Call, Gradients, LayerGradients, Loop, Needs
from lstm_triton.layer_norm import moments, normalized, product_gradients


def project_input(x: Tensor, w: LSTMWeights, out: Tensor | None = None) -> Tensor:
    """Return the input side of all gates of all steps, x (T, B, I) -> (T, B, G·H), normalised, with both biases."""
    product = gemms.project_input(x, without_biases(w), out=out)
    bias = None if w.bias_ih is None or w.bias_hh is None else w.bias_ih + w.bias_hh
    side = normalized(product, w.weight_ln_ih, bias)
    return side if out is None else out.copy_(side)


forward = partial(layer.forward, project=project_input)
"""Compute a layer, as `layer.forward`; what is returned is laid out like that."""


def backward(
    grads: Gradients, x: Tensor, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], output: Tensor,
    gates: Tensor, cells: Tensor, order: Order, call: Call, needs: Needs, loop: Loop,
) -> LayerGradients:  # fmt: skip
    """Return the gradients that `needs` names, from those of the results and what `forward` saved."""
    spec, P = call.spec, h_0.shape[2]
    orders = [order.direction(n) for n in range(len(weights))]
    reads = [own.hidden_read(output[:, :, n * P : (n + 1) * P], h_0[n]) for n, own in enumerate(orders)]
    products = [recurrent_products(reads[n], w, cells[n]) for n, w in enumerate(weights)]
    if gates.numel() == 0:  # not saved, or of no rows
        again = (activated_gates(x, products[n], cells[n], w, spec, orders[n]) for n, w in enumerate(weights))
        gates = layer.together(list(again))
    order = layer.with_clipped(order, gates, cells, weights, spec)
    steps = loop.backward(grads, gates, cells, weights, order, call, products)
    grad_x, grad_h_0, grad_weights = [], [], []
    for n, w in enumerate(weights):
        d, own, wanted = steps.gates[n], (gates[n], cells[n], w, spec, orders[n]), needs.weights[n]
        found = plain_gradients(d, None if steps.hidden is None else steps.hidden[n], *own, wanted)
        for name, by_row in zip(("weight_ln_c", "bias_ln_c"), products[n].d_cell, strict=True):
            found[name] = by_row.sum(0).to(x.dtype)
        product = gemms.project_input(x, without_biases(w))
        d_product, found["weight_ln_ih"] = product_gradients(d, product, *moments(product), w.weight_ln_ih)
        found |= {name: times(d_product, x) for name in ("weight_ih",) if name in wanted}
        if needs.x:
            grad_x.append(gemms.input_gradient(d_product[None], [w]))
        d_product, found["weight_ln_hh"] = product_gradients(d, *products[n][:3], w.weight_ln_hh)
        found |= {name: times(d_product, reads[n]) for name in ("weight_hh",) if name in wanted}
        if needs.h_0:
            gradient = gemms.initial_hidden_gradient(d_product, w, orders[n])
            grad_h_0.append(gradient if steps.h_0 is None else (gradient + steps.h_0[n]).to(x.dtype))
        grad_weights.append({name: found[name] for name in wanted})
    return LayerGradients(
        sum(grad_x[1:], grad_x[0]) if needs.x else None,
        torch.stack(grad_h_0) if needs.h_0 else None,
        steps.c_0.to(x.dtype) if needs.c_0 else None,
        grad_weights,
    )


def plain_gradients(
    d: Tensor, d_hidden: Tensor | None, gates: Tensor, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order,
    wanted: Sequence[str],
) -> dict[str, Tensor]:  # fmt: skip
    """Return the gradients of the parameters that are not normalised, from d (T, B, G·H) and d_hidden (T, B, P)."""
    found = {name: d.sum((0, 1)) for name in ("bias_ih", "bias_hh") if name in wanted}
    if "weight_hr" in wanted and d_hidden is not None:
        found["weight_hr"] = times(d_hidden, gemms.unprojected(gates, cells, w, spec, order))
    if "weight_ch" in wanted:
        found["weight_ch"] = gemms.peephole_gradient(d, gates, cells, spec, order)
    return found


def recurrent_products(h: Tensor, w: LSTMWeights, cells: Tensor) -> Products:
    """Return the products of h_{t-1} (T, B, P) as W_hh read it; cells (T + 1, B, H)."""
    values = h @ w.weight_hh.t()
    _, B, H = cells.shape
    return Products(values, *moments(values), cells.new_zeros(2, B, H))


def activated_gates(
    x: Tensor, products: Products, cells: Tensor, w: LSTMWeights, spec: LSTMSpec, order: Order
) -> Tensor:
    """Return the activated gates (T, B, G·H), computed again; x (T, B, I), cells (T + 1, B, H)."""
    gates = project_input(x, w) + normalized(products.values, w.weight_ln_hh, None)
    if spec.full and w.weight_ch is not None:
        gates += order.cells_read(cells)[0].to(x.dtype) @ spec.previous_peephole(w.weight_ch).t()
    return gemms.activate(gates, cells, w, spec, order)


def without_biases(w: LSTMWeights) -> LSTMWeights:
    """Return the parameters less the biases of the gates, which stand outside of the normalised products."""
    return w._replace(bias_ih=None, bias_hh=None)


def times(d: Tensor, read: Tensor) -> Tensor:
    """Return the gradient of a weight (N, K), from that of its product (T, B, N) and what it read (T, B, K)."""
    return d.flatten(0, 1).t() @ read.flatten(0, 1)
