"""The steps of a layer by the persistent kernels: all directions in one launch a pass.

Imported when first used: it needs triton. Shapes: T time steps, B batch rows, H hidden units, P hidden size after
projection (else H), D directions, G gate blocks, Q peephole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.normalize import KernelNorm, Products
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor

from lstm_triton import gemms
from lstm_triton.layer import Call, Gradients, States, StepGradients, together
from lstm_triton.layer_norm import moments


def forward(
    x: Tensor, gates: Tensor | None, h_0: Tensor, c_0: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call
) -> States:
    """Compute all steps, as `layer.Loop.forward`."""
    assert gates is not None
    P = h_0.shape[2] if call.projection else 0
    layer = sequence_persistent.layer_of(gates, c_0.shape[2], call.spec, order, P)
    tensors = (gates, h_0.contiguous(), c_0.contiguous(), *recurrent_weights(weights))
    launch = sequence_persistent.forward_launch(
        layer, *tensors, order, save=call.every_cell, save_gates=call.save_gates, norm=norm_of(weights)
    )
    found = sequence_persistent.run(launch)
    return sequence_persistent.hidden_of(found, layer), found["h_n_ptr"], found["c_n_ptr"], found["cells_ptr"]


def backward(
    grads: Gradients, gates: Tensor, cells: Tensor, weights: Sequence[LSTMWeights], order: Order, call: Call,
    products: Sequence[Products] | None = None,
) -> StepGradients:  # fmt: skip
    """Compute all steps backward, as `layer.Loop.backward`; products: of each direction, where normalised."""
    spec = call.spec
    output, h_n, c_n, states = (None if gradient is None else gradient.contiguous() for gradient in grads)
    P = weights[0].weight_hh.shape[1] if call.projection else 0
    layer = sequence_persistent.layer_of(gates, cells.shape[3], spec, order, P)
    tensors = (output, states, h_n, c_n, gates, cells, *recurrent_weights(weights))
    norm = norm_of(weights)
    if products is not None:
        norm = with_products(norm, products, gates, cells, spec, order)
    found = sequence_persistent.run(sequence_persistent.backward_launch(layer, *tensors, order, norm))
    d_gates, dc = found["d_gates_ptr"], found["dc_ptr"]
    for n, side in enumerate(products or ()):
        side.d_cell.copy_(norm.d_cell[n])
    for n, w in enumerate(weights):
        if spec.full and w.weight_ch is not None:  # the kernel leaves out what the first step adds
            own = order.direction(n)
            dc[n] += own.read_first(own.first(d_gates[n])) @ spec.previous_peephole(w.weight_ch)
    return StepGradients(d_gates, found.get("d_hidden_ptr"), dc, found.get("d_h_0_ptr"))


def recurrent_weights(weights: Sequence[LSTMWeights]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return weight_hh (D, G·H, P), weight_hr (D, P, H) and weight_ch (D, Q·H) or (D, Q·H, H), contiguous; or None."""
    w_hr = [w.weight_hr for w in weights if w.weight_hr is not None]
    w_ch = [w.weight_ch for w in weights if w.weight_ch is not None]
    return together([w.weight_hh for w in weights]), together(w_hr) if w_hr else None, together(w_ch) if w_ch else None


def norm_of(weights: Sequence[LSTMWeights]) -> KernelNorm:
    """Return the gains weight_ln_hh (D, G·H), weight_ln_c (D, H) and the shift bias_ln_c (D, H) of a normalised layer;
    None of another, and where there is no bias.
    """
    parameters = ([getattr(w, name) for w in weights] for name in ("weight_ln_hh", "weight_ln_c", "bias_ln_c"))
    return KernelNorm(*(together(each) if each[0] is not None else None for each in parameters))


def with_products(
    norm: KernelNorm, products: Sequence[Products], gates: Tensor, cells: Tensor, spec: LSTMSpec, order: Order
) -> KernelNorm:
    """Return what the backward pass reads of a normalised layer: the products and the statistics of c~ as well.

    gates (D, T, B, G·H) activated, cells (D, T + 1, B, H).
    """
    orders = [order.direction(n) for n in range(len(products))]
    computed = [gemms.computed_cells(gates[n], cells[n], spec, own) for n, own in enumerate(orders)]
    of_cells = [moments(c) for c in computed]
    return norm._replace(
        products=together([side.values for side in products]),
        mean=together([side.mean for side in products]),
        rstd=together([side.rstd for side in products]),
        mean_c=together([mean for mean, _ in of_cells]),
        rstd_c=together([rstd for _, rstd in of_cells]),
        d_cell=together([side.d_cell for side in products]),
    )
