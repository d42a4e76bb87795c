"""The tangents of a sequence, replayed from CUDA graphs in chunks, as `sequence_replayed` does with the layer itself.

Same interface as `sequence_tangents`. Shapes: T time steps, B batch rows, H hidden units, P hidden size after
projection (else H), G gate blocks.
"""

from __future__ import annotations

from torch import Tensor

from lstm_triton_kernels import sequence_replayed, sequence_tangents
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sequence_tangents import sources
from lstm_triton_kernels.sizes import Layer, matmul_precision
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights

__all__ = ["forward", "sources"]


def forward(
    h_0_dot: Tensor, weights: LSTMWeights, spec: LSTMSpec, order: Order, gates: Tensor, cells: Tensor,
    output_dot: Tensor, gates_dot: Tensor, cells_dot: Tensor,
) -> None:  # fmt: skip
    """Compute the tangents of all steps, into output_dot, gates_dot and cells_dot; see `sequence_tangents.forward`."""
    (_, B, H), STEPS = cells.shape, sequence_replayed.STEPS
    layer = Layer(spec, order.T, B, H, 1, h_0_dot.dtype, matmul_precision(), P=h_0_dot.shape[1])
    variant = (weights, spec)
    one = order._replace(T=STEPS)
    chunk = None
    if sequence_replayed.pays(layer, cells.device):
        now = slice(0, STEPS)
        sizes = dict(h_0_dot=h_0_dot, gates=gates[now], cells=cells[: STEPS + 1], output_dot=output_dot[now],
                     gates_dot=gates_dot[now], cells_dot=cells_dot[: STEPS + 1],
                     resets=None if order.resets is None else order.resets[now])  # fmt: skip

        def steps(b: dict[str, Tensor]) -> None:
            own = one._replace(resets=b.get("resets"))
            saved, dots = (b["gates"], b["cells"]), (b["output_dot"], b["gates_dot"], b["cells_dot"])
            sequence_tangents.forward(b["h_0_dot"], *variant, own, *saved, *dots)
            b["h_0_dot"].copy_(own.last(b["output_dot"]))
            b["cells_dot"][own.initial_slot(True)] = b["cells_dot"][own.final_slot(True)]

        chunk = sequence_replayed.chunk_of(("tangents", spec.name, order.reverse), sizes, weights, steps)
    if chunk is None:
        return sequence_tangents.forward(h_0_dot, *variant, order, gates, cells, output_dot, gates_dot, cells_dot)
    chunks, left = sequence_replayed.parts(order)
    written = slice(0, STEPS) if order.reverse else slice(1, STEPS + 1)
    with chunk.in_use() as b:
        b["h_0_dot"].copy_(h_0_dot)
        b["cells_dot"][one.initial_slot(True)] = cells_dot[order.initial_slot(True)]
        out: dict[str, Tensor | None] = dict(output_dot=output_dot, gates_dot=gates_dot)
        for now in chunks:
            b["cells"].copy_(cells[now.start : now.stop + 1])
            sequence_replayed.replay(chunk, b, now, dict(gates=gates, resets=order.resets, **out), out)
            cells_dot[now.start + written.start : now.start + written.stop] = b["cells_dot"][written]
    if left is not None:
        slots = slice(left.start, left.stop + 1)
        h = output_dot[left.stop if order.reverse else left.start - 1]
        saved, dots = (gates[left], cells[slots]), (output_dot[left], gates_dot[left], cells_dot[slots])
        sequence_tangents.forward(h, *variant, order.part(left), *saved, *dots)
