"""The kernels of second derivatives as compiled, executed: what they find against PyTorch's operators in float64.

As in `test_executed`, the emulator sees each access to memory.
"""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

import torch
from lstm_triton_kernels import sequence_stepwise, sequence_tangents
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMWeights

from lstm_triton import LSTMSpec, double_backward, eager, eager_tangents, layer
from lstm_triton.directions import OneByOne
from tests.compiled.layers import BOUND, DTYPES
from tests.emulator.launches import Emulation, emulated

T, B, I, H, D = 3, 5, 3, 11, 2  # noqa: E741

CASES = [
    (LSTMSpec(), "bf16", 90, dict(lengths=True)),
    (LSTMSpec(coupled=True), "fp32", 80, dict(resets=True)),
    (LSTMSpec(peephole="diagonal"), "fp16", 90, dict(resets=True)),
    (LSTMSpec(coupled=True, peephole="diagonal", output_peephole="current"), "fp32", 90, dict(projection=True)),
    (LSTMSpec(peephole="full", output_peephole="current"), "fp32", 90, dict()),
    (LSTMSpec(input_activation="identity", output_activation="identity"), "fp32", 90, dict(projection=True)),
]


def prepared(spec, dtype, lengths=False, resets=False, projection=False):
    """What a first backward pass leaves, and cotangents of its gradients: random, in a type."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, bound=1.0):
        return ((torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound).to(dtype)

    P = 7 if projection else H
    call = layer.Call(spec.name, True, projection, "eager", save=True, states=True)
    shapes = spec.parameter_shapes(I, H, True, P if projection else 0).values()
    weights, along = (call.group([random(*shape, bound=0.6) for _ in range(D) for shape in shapes]) for _ in range(2))
    of_lengths = torch.tensor([3, 1, 2, 3, 2]) if lengths else None
    order = Order(T, of_lengths, random(T, B) > 0.3 if resets else None)
    x, h_0, c_0 = order.zero_beyond(random(T, B, I)), random(D, B, P), random(D, B, H)
    loop = OneByOne(eager)
    with torch.no_grad():
        result = layer.forward(x, h_0, c_0, weights, order, call, loop)
        grads = layer.Gradients(*(random(*t.shape) for t in result[:4]))
        steps = loop.backward(grads, result.gates, result.cells, weights, order, call)
    saved = (result.output, result.gates, result.cells, grads, *steps[:2])
    first = double_backward.First(x, h_0, c_0, weights, order, *saved)
    v = double_backward.Cotangents(random(T, B, I), random(D, B, P), random(D, B, H), along)
    needs = layer.Needs(True, True, True, [list(weights[0].present())] * D)
    return first, v, call, needs


def in_float64(value):
    """The same tensors, weights and tuples in float64; but for lengths and resets."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, LSTMWeights):
        return value.map(torch.Tensor.double)
    if isinstance(value, list):
        return [in_float64(one) for one in value]
    if isinstance(value, tuple) and not isinstance(value, Order):
        return type(value)(*map(in_float64, value))
    return value


def computed(first, v, call, needs, loop, steps):
    """Every second gradient by name."""
    with torch.no_grad():
        found = double_backward.backward(first, v, call, needs, True, OneByOne(loop), steps)
    by_name = {f"{name} {n}": t for n, own in enumerate(found.inputs.weights) for name, t in own.items()}
    results = dict(zip(layer.Gradients._fields, found.grads, strict=True))
    return results | dict(x=found.inputs.x, h_0=found.inputs.h_0, c_0=found.inputs.c_0) | by_name


@pytest.mark.parametrize(
    "spec, dtype, capability, options", [pytest.param(*case, id=f"{case[0].name}-{case[1]}") for case in CASES]
)
def test_compiled_kernels_compute_second_gradients(spec, dtype, capability, options):
    given = prepared(spec, DTYPES[dtype], **options)
    wanted = computed(*map(in_float64, given[:2]), *given[2:], eager, eager_tangents)
    emulation = Emulation(capability=capability)
    with emulated(emulation):
        found = computed(*given, sequence_stepwise, sequence_tangents)
    assert not emulation.findings
    assert emulation.launches["cell_sources_kernel"] == D
    assert emulation.launches["cell_tangents_kernel"] == T * D * (2 if spec.full and spec.output_current else 1)
    errors = {name: float((found[name].double() - t).norm() / t.norm()) for name, t in wanted.items()}
    beyond = {name: error for name, error in errors.items() if not error <= BOUND[dtype]}
    assert not beyond, beyond
