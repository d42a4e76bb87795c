"""The launches of steps, as the compiler sees them: every combination of flags, every block size.

Those of the stepwise strategy, and those of second derivatives.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from lstm_triton_kernels import cell, cell_tangents, gates, sequence_stepwise, sequence_tangents
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import NONE, Rules, drawn
from lstm_triton_kernels.sizes import accumulator_dtype

from lstm_triton import VARIANTS, LSTMSpec, double_backward, layer
from lstm_triton.directions import OneByOne
from tests.support.compiling import Launch, record_launches
from tests.support.parity import RULES

KERNELS = {
    "gate_preactivations_kernel": gates.gate_preactivations_kernel,
    "output_peephole_kernel": gates.output_peephole_kernel,
    "cell_forward_kernel": cell.cell_forward_kernel,
    "cell_backward_kernel": cell.cell_backward_kernel,
    "cell_tangents_kernel": cell_tangents.cell_tangents_kernel,
    "cell_sources_kernel": cell_tangents.cell_sources_kernel,
}
TYPES = [
    (torch.float16, "ieee"), (torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"),
    (torch.float64, "ieee"),
]  # fmt: skip
"""Storage type, and PyTorch's switch for float32 matmuls."""


def launch_layer(
    spec: LSTMSpec, dtype: torch.dtype, T: int, B: int, H: int, *, bias: bool, save: bool, grad: bool,
    resets: bool = False, rules: Rules = NONE,
) -> None:  # fmt: skip
    """Run one layer through the launchers; the values are of no interest."""
    shapes = spec.parameter_shapes(H, H, bias)
    call = layer.Call(spec.name, bias, False, "stepwise", save=save)
    weights = call.group([torch.zeros(shape, dtype=dtype) for shape in shapes.values()])
    x, state = torch.zeros(T, B, H, dtype=dtype), torch.zeros(1, B, H, dtype=dtype)
    masks = drawn(rules, torch.tensor([1]), 1, T, B, H, H, dtype)
    order = Order(T, None, torch.zeros(T, B, dtype=torch.bool) if resets else None, regularized=masks)
    loop = OneByOne(sequence_stepwise)
    result = layer.forward(x, state, state, weights, order, call, loop)
    if save:
        needs = layer.Needs(False, False, False, [[]])
        grads = layer.Gradients(result.output if grad else None, None, None, None)
        saved = (result.output, result.gates, result.cells)
        layer.backward(grads, x, state, state, weights, *saved, order, call, needs, loop)


def launch_second_derivative(
    spec: LSTMSpec, dtype: torch.dtype, B: int, H: int, *, projection: bool = False, resets: bool = False
) -> None:
    """Run the steps of the second derivative of a layer through the launchers; the values are of no interest."""
    T, D = 2, 2
    shapes = spec.parameter_shapes(H, H, True, H if projection else 0)
    call = layer.Call(spec.name, True, projection, "stepwise", save=True)
    weights = call.group([torch.zeros(shape, dtype=dtype) for _ in range(D) for shape in shapes.values()])
    x, state = torch.zeros(T, B, H, dtype=dtype), torch.zeros(D, B, H, dtype=dtype)
    order = Order(T, None, torch.zeros(T, B, dtype=torch.bool) if resets else None)
    output, gates = torch.zeros(T, B, D * H, dtype=dtype), torch.zeros(D, T, B, len(spec.gates) * H, dtype=dtype)
    cells = torch.zeros(D, T + 1, B, H, dtype=accumulator_dtype(dtype))
    grads = layer.Gradients(output, None, None, None)
    saved = (output, gates, cells, grads, gates, torch.zeros(D, T, B, H, dtype=dtype) if projection else None)
    first = double_backward.First(x, state, state, weights, order, *saved)
    for n in range(D):
        along = double_backward.Cotangents(x, None, None, weights)
        double_backward.of_direction(n, first, along, spec, sequence_tangents, of_inputs=True)


@functools.cache
def launches_of(dtype: torch.dtype, precision: str) -> frozenset[Launch]:
    """For a storage type: every combination of flags with the largest blocks, and every block size, aligned or not."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    modules = {
        gates: ["gate_preactivations_kernel", "output_peephole_kernel"],
        cell: ["cell_forward_kernel", "cell_backward_kernel"],
        cell_tangents: ["cell_tangents_kernel", "cell_sources_kernel"],
    }
    try:
        switch.fp32_precision = precision
        with record_launches(modules) as launches:
            for spec in VARIANTS:
                for T, bias, save in ((1, True, True), (1, False, True), (2, True, True), (2, True, False)):
                    for grad in (True, False):
                        launch_layer(spec, dtype, T, B=64, H=128, bias=bias, save=save, grad=grad)
                launch_layer(spec, dtype, 2, B=64, H=128, bias=True, save=True, grad=True, resets=True)
                if spec in VARIANTS[:: len(VARIANTS) - 1]:  # the fewest and the most values in registers
                    launch_layer(spec, dtype, 2, B=64, H=128, bias=True, save=True, grad=True, rules=RULES[3])
                    launch_layer(
                        spec, dtype, 2, B=64, H=128, bias=True, save=True, grad=True, resets=True, rules=RULES[4]
                    )
                for more in (False, True):
                    launch_second_derivative(spec, dtype, 64, 128, projection=more, resets=more)
            for B, H in ((1, 1), (17, 24), (32, 48), (300, 130)):
                launch_layer(
                    LSTMSpec(peephole="full", output_peephole="current"),
                    dtype,
                    1,
                    B,
                    H,
                    bias=True,
                    save=True,
                    grad=True,
                )
                launch_layer(
                    LSTMSpec(coupled=True, peephole="diagonal"), dtype, 2, B, H, bias=True, save=True, grad=True
                )
                launch_second_derivative(LSTMSpec(), dtype, B, H)
    finally:
        switch.fp32_precision = before
    return frozenset(launches)


def blocks(launch: Launch) -> tuple[tuple[str, Any], ...]:
    """The block sizes of a launch, with its warps and stages."""
    return tuple(item for item in launch.constants if item[0].startswith("BLOCK_")) + launch.options


def pairs(launch: Launch) -> set[frozenset[Any]]:
    """Every two choices that meet in a launch: the blocks, which integers are multiples of 16, each other constant."""
    integers = {name for name, kind in launch.signature if not kind.startswith("*")}
    choices = [item for item in launch.constants if not item[0].startswith("BLOCK_")]
    choices += [("blocks", blocks(launch)), ("aligned", tuple(name for name in launch.aligned if name in integers))]
    return {frozenset(pair) for pair in itertools.combinations(choices, 2)}


def covering(launches: Iterable[Launch]) -> list[Launch]:
    """A few launches of one kernel in which every two choices meet that meet in any of `launches`.

    So every block size is among them, with every flag that it is launched with; where several would do, the one with
    the most arguments, which keeps the most in registers.
    """
    constants = {launch: [kind for _, kind in launch.signature].count("constexpr") for launch in launches}
    ordered = sorted(constants, key=lambda launch: (constants[launch], repr(launch)))
    missing = set().union(*map(pairs, ordered))
    chosen = []
    while missing:
        chosen.append(max(ordered, key=lambda launch: len(pairs(launch) & missing)))
        missing -= pairs(chosen[-1])
    return chosen
