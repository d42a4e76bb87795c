"""On a GPU: layer normalisation by the kernels, replayed from graphs too, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.sizes import matmul_precision
from lstm_triton_kernels.spec import NORMALIZED

import lstm_triton
from lstm_triton import LSTMSpec
from tests.support.gpu import NEEDS_GPU, TYPES
from tests.support.parity import (
    RULES,
    Case,
    call,
    call_reference,
    errors,
    expected_results,
    random_inputs,
    regularized_cases,
    results,
)  # fmt: skip
from tests.support.rounding import rounded_results

pytestmark = NEEDS_GPU

FLOOR = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-12}
"""No bound is below this; `test_as_near_as_pytorchs_operators` allows what these err by in the same type as well."""

SHAPES = {
    "small": dict(T=8, B=3, I=5, H=7),
    "replayed": dict(T=70, B=12, I=40, H=130),
    "a block of rows": dict(T=5, B=67, I=33, H=64, L=2, bidirectional=True),
    "lengths, resets, projection": dict(
        T=41, B=12, I=33, H=130, bidirectional=True, proj_size=20, lengths=True, resets=True, states=True
    ),
    "no bias": dict(T=9, B=17, I=31, H=63, bias=False),
    "cell": dict(B=17, I=63, H=65, cell=True),
    "one step": dict(T=1, B=17, I=63, H=65),
}
FULL_CURRENT = LSTMSpec(True, "full", "current", layer_norm=True)


def assert_near(case):
    """Within the bound of the type, or 1.5 times the error of PyTorch's operators in it, or of rounding alone to TF32,
    which those leave for float32 in products of some sizes."""
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    others = errors(results(case, inputs, call_reference), expected)
    if case.dtype == torch.float32 and matmul_precision() == "tf32":
        rounded = errors(rounded_results(case, inputs, "tf32"), expected)
        others = {name: max(error, rounded[name]) for name, error in others.items()}
    with lstm_triton.backend("triton"):
        for _ in range(3):  # launched step by step, captured, and replayed
            found = errors(results(case, inputs, call), expected)
            allowed = {name: max(FLOOR[case.dtype], 1.5 * other) for name, other in others.items()}
            wrong = {name: (error, allowed[name]) for name, error in found.items() if not error <= allowed[name]}
            assert not wrong, f"{case}: (error, allowed) {wrong}"


@pytest.mark.parametrize("precision", list(TYPES), indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", NORMALIZED, ids=lambda spec: spec.name)
def test_as_near_as_pytorchs_operators(spec, shape, precision):
    assert_near(Case(spec, dtype=TYPES[precision], device="cuda", **SHAPES[shape]))


@pytest.mark.parametrize("precision", ["float32 ieee"], indirect=True)
@pytest.mark.parametrize("spec", [NORMALIZED[0], NORMALIZED[2], FULL_CURRENT], ids=lambda spec: spec.name)
def test_regularised_steps(spec, precision):
    cases = [case for case in regularized_cases(spec) if case.H > 1]
    for case in (*cases, Case(spec, T=70, B=5, I=9, H=33, bidirectional=True, rules=RULES[3])):
        assert_near(replace(case, device="cuda", dtype=torch.float32))


PERSISTENT = {
    "one program": dict(T=9, B=3, I=5, H=8),
    "odd": dict(T=70, B=12, I=40, H=130, bidirectional=True),
    "wide": dict(T=33, B=16, I=64, H=768),
    "16 rows a tile": dict(T=17, B=64, I=64, H=1024),
    "many rows": dict(T=9, B=300, I=33, H=256),
    "lengths, resets": dict(T=41, B=12, I=33, H=136, bidirectional=True, lengths=True, resets=True, states=True),
    "all rules": dict(T=37, B=17, I=33, H=140, rules=RULES[3], lengths=True),
}


@pytest.mark.parametrize("precision", ["float32 tf32", "float16", "bfloat16"], indirect=True)
@pytest.mark.parametrize("shape", PERSISTENT)
@pytest.mark.parametrize("spec", [spec for spec in NORMALIZED if not spec.full], ids=lambda spec: spec.name)
def test_the_persistent_kernels(spec, shape, precision):
    assert_near(Case(spec, dtype=TYPES[precision], device="cuda", strategy="persistent", **PERSISTENT[shape]))


@pytest.mark.parametrize("H", [1024, 2048, 4096, 5000])
def test_long_rows(H):
    assert_near(Case(NORMALIZED[0], T=3, B=2, I=16, H=H, dtype=torch.bfloat16, device="cuda"))


@pytest.mark.parametrize("spec", [FULL_CURRENT, NORMALIZED[0]], ids=["step by step", "persistent"])
def test_the_same_bits_from_run_to_run(spec):
    case = Case(spec, T=70, B=12, I=64, H=130, dtype=torch.bfloat16, device="cuda")
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        first, *others = (results(case, inputs, call) for _ in range(4))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_training_in_graphs_of_the_whole_stack():
    module = lstm_triton.LSTM(40, 130, 2, layer_norm=True, device="cuda")
    x = torch.randn(37, 12, 40, device="cuda")
    for _ in range(2):
        captured = module.captured()
        found = {}
        for name, function in (("as usual", module), ("captured", captured)):
            module.zero_grad()
            output, _ = function(x)
            output.square().mean().backward()
            found[name] = [output.detach(), *(p.grad for p in module.parameters())]
        for actual, expected in zip(found["captured"], found["as usual"], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
