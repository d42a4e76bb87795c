"""The kernels of layer normalisation as compiled: executed on the emulator, and what they need of a GPU."""

from __future__ import annotations

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

import torch
from lstm_triton_kernels import gates, normalized_cell, sequence_normalized, watch
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.regularize import NONE, Rules, drawn
from lstm_triton_kernels.spec import NORMALIZED

from benchmarks.micro import float32_matmuls
from lstm_triton import LSTMSpec, layer, normalized
from lstm_triton.directions import OneByOne
from tests.compiled import layers
from tests.compiled.layers import Case
from tests.emulator.launches import emulated
from tests.support.compiling import compile_launch, record_launches
from tests.support.parity import RULES
from tests.support.persistent import expected

KERNELS = {
    name: getattr(module, name)
    for module, names in {
        normalized_cell: ("normalized_forward_kernel", "normalized_backward_kernel"),
        gates: ("gate_preactivations_kernel",),
    }.items()
    for name in names
}


def executed():
    """Every variant in two steps; types, sizes, flags and rules in turn. 130 units are a row of two warps and more."""
    rules = [NONE, RULES[4], RULES[3]]
    flags = [dict(), dict(lengths=True), dict(resets=True), dict(lengths=True, resets=True, D=2), dict(P=5)]
    for n, spec in enumerate(NORMALIZED):
        dtype, H = list(layers.DTYPES)[n % 4], (9, 130, 24)[n % 3]
        yield Case(spec.name, dtype, 2, 3, H, stepwise=True, recompute=n == 2, rules=rules[n % 3], **flags[n % 5])
    yield Case("norm", "bf16", 1, 2, 520, stepwise=True, rules=RULES[3], training=False)
    yield Case("coupled+norm", "fp32", 2, 2, 9, stepwise=True, weak=True)


def persistent():
    """Every variant that the kernels in Gluon normalise; all ways to cut a layer, flags and rules in turn."""
    both = dict(lengths=True, resets=True)
    yield Case("norm", "bf16", 2, 5, 136, wait="data", block_u=32)
    yield Case("norm", "tf32", 2, 3, 24, wait="data", resets=True)
    yield Case("norm", "fp16", 2, 1, 300, wait="data", block_u=16)  # of the last program 12 units, in two loads a lane
    yield Case("norm", "tf32", 2, 5, 140, wait="data", block_u=32, gradients=(True, False, False, False))
    yield Case("coupled+norm", "fp16", 2, 17, 40, 2, wait="data", **both)
    yield Case("diagonal+norm", "fp16", 2, 5, 136, wait="data", block_u=16, weak=True)
    yield Case("diagonal+current+norm", "bf16", 2, 5, 9, lengths=True)
    yield Case("coupled+diagonal+norm", "tf32", 2, 5, 72, wait="data", rules=RULES[4], recompute=True)
    yield Case("coupled+diagonal+current+norm", "bf16", 3, 5, 40, 2, wait="data", rules=RULES[3], **both)
    yield Case("norm", "bf16", 3, 5, 72, wait="data", rules=RULES[3], training=False, infer=True)
    yield Case("norm", "bf16", 2, 17, 72, wait="data", multiprocessors=9)  # 16 rows a tile
    yield Case("coupled+norm", "fp16", 3, 7, 136, wait="data", rules=RULES[4], **both).with_blocks_of(3, row_programs=1)
    yield Case("norm", "tf32", 2, 5, 72, wait="data", weak=True).with_blocks_of(3, row_programs=1)
    yield Case("norm", "bf16", 2, 35, 72, wait="data", resets=True).with_shared_rows(16, 32, 4)
    yield Case("diagonal+norm", "fp16", 2, 130, 40, wait="data", lengths=True).with_shared_rows(16, 64, 8)
    yield Case("norm", "fp16", 2, 5, 72, wait="data", capability=80)
    yield Case("norm", "bf16", 1, 1, 1100, wait="data", block_u=8, infer=True)  # 9 loads a lane, more than at once


@pytest.mark.parametrize("case", list(persistent()), ids=str)
def test_the_persistent_kernels_compute_what_the_reference_does(case):
    assert not case.stepwise and not layers.run(case).wrong


def test_a_mean_far_from_zero_keeps_its_digits():
    """Products that TF32 has exactly, 1024 and one more or less: in their squares float32 loses their variance."""
    case = Case("norm", "tf32", 1, 3, 72, wait="data", infer=True)
    inputs = layers.inputs_of(case.layer_case())
    ones = torch.randint(-1, 2, (4 * case.H,), generator=torch.Generator().manual_seed(0))
    inputs.h_0[:] = 1.0
    weight_hh = torch.zeros_like(inputs.weights[0].weight_hh)
    weight_hh[:, 5] = 1024 + ones
    gains = torch.ones_like(inputs.weights[0].weight_ln_hh)
    inputs.weights[0] = inputs.weights[0]._replace(weight_hh=weight_hh, weight_ln_hh=gains)
    wanted = expected(case.layer_case(), inputs)[0]
    with float32_matmuls("tf32"), emulated(case.emulation()):
        output = layers.computed(case, inputs, "persistent", case.plans())[0]
    watch.check_launches()
    assert (output.double() - wanted).norm() < layers.BOUND["tf32"] * wanted.norm()


def test_a_nan_stays_in_its_row():
    """Whose statistics are NaN, too, and are published as another than that of what is unpublished."""
    case = Case("norm", "bf16", 3, 5, 72, wait="data", multiprocessors=9)
    inputs = layers.inputs_of(case.layer_case())
    inputs.h_0.view(torch.int16)[0, 2, case.H - 1] = -1
    assert inputs.h_0[0, 2].isnan().sum() == 1
    with emulated(case.emulation()):
        output, _, h_n, _, *gradients = layers.computed(case, inputs, "persistent", case.plans())
    watch.check_launches()
    others = [n for n in range(case.B) if n != 2]
    assert output[:, 2].isnan().all() and h_n[:, 2].isnan().all()
    assert output[:, others].isfinite().all() and gradients[0][:, others].isfinite().all()


@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_that_lacks_a_program_ends_and_says_so(backward):
    """The others stop waiting after so many polls, in each exchange."""
    outcome = layers.run_without_a_program(Case("norm", "bf16", 2, 5, 72, wait="data"), backward)
    assert "timed out" in outcome.why and f"the {'backward' if backward else 'forward'} pass of 72 units" in outcome.why


@pytest.mark.parametrize("case", list(executed()), ids=str)
def test_a_compiled_kernel_computes_what_the_reference_does(case):
    assert not layers.run(case).wrong


def launches(spec: LSTMSpec, dtype: torch.dtype, H: int, rules: Rules = NONE):
    """The launches of both passes of a layer; the values are of no interest."""
    T, B = 2, 64
    call = layer.Call(spec.name, True, False, "stepwise", save=True)
    weights = call.group([torch.zeros(shape, dtype=dtype) for shape in spec.parameter_shapes(8, H).values()])
    x, state = torch.zeros(T, B, 8, dtype=dtype), torch.zeros(1, B, H, dtype=dtype)
    masks = drawn(rules, torch.tensor([1]) if rules.random else None, 1, T, B, H, H, dtype)
    order, loop = Order(T, regularized=masks), OneByOne(sequence_normalized)
    modules = {normalized_cell: list(KERNELS)[:2], gates: list(KERNELS)[2:]}
    with record_launches(modules) as found:
        result = normalized.forward(x, state, state, weights, order, call, loop)
        grads, needs = layer.Gradients(result.output, None, None, None), layer.Needs(False, False, False, [[]])
        saved = (result.output, result.gates, result.cells)
        normalized.backward(grads, x, state, state, weights, *saved, order, call, needs, loop)
    assert {launch.kernel for launch in found} == set(KERNELS)
    return sorted(found, key=repr)


@pytest.mark.parametrize(
    "spec, dtype, H, rules, capability",
    [
        (NORMALIZED[0], torch.bfloat16, 64, NONE, 80),
        (NORMALIZED[0], torch.float32, 1024, NONE, 90),
        (NORMALIZED[0], torch.bfloat16, 1024, NONE, 100),
        (NORMALIZED[0], torch.bfloat16, 4096, NONE, 90),
        (LSTMSpec(False, "diagonal", "current", layer_norm=True), torch.float32, 2048, RULES[4], 90),
        (LSTMSpec(False, "diagonal", "current", layer_norm=True), torch.float64, 512, RULES[4], 90),
    ],
    ids=str,
)
def test_a_row_fits_the_registers(spec, dtype, H, rules, capability):
    """Of up to 4,096 units in 16 bits; in float32 and with all rules of up to 2,048, beyond which some spill."""
    for launch in launches(spec, dtype, H, rules):
        compiled = compile_launch(KERNELS[launch.kernel], launch, capability)
        assert compiled.stack == 0, f"{launch}: {compiled.stack} bytes of stack, {compiled.registers} registers"


@pytest.mark.parametrize("case", ["a wrong mean", "a gradient that forgets the mean"])
def test_a_fault_is_seen(case, monkeypatch):
    """A test of the test."""
    from lstm_triton import gemms

    if case == "a wrong mean":
        monkeypatch.setattr(normalized, "moments", lambda t, found=normalized.moments: (found(t)[0] + 0.1, found(t)[1]))
    else:
        exact = gemms.initial_hidden_gradient
        monkeypatch.setattr(gemms, "initial_hidden_gradient", lambda d, *rest: exact(d + d.std() / 10, *rest))
    assert "beyond" in layers.run(Case("norm", "fp32", 2, 3, 9, stepwise=True)).wrong
