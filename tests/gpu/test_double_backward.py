"""On a GPU: second derivatives by the kernels, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.sizes import matmul_precision

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, aten, autograd, second_order
from tests.cpu.test_twice_differentiable import CASES as OF_OPERATOR
from tests.support.double_backward import (
    BOUND,
    cases_of,
    expected_second_gradients,
    second_gradients,
    without_reference,
)
from tests.support.gpu import NEEDS_GPU, TIMES_CUDNN, TYPES
from tests.support.parity import Case, call, call_reference, errors, random_inputs
from tests.support.rounding import RoundedOperands, operand_rounding

pytestmark = NEEDS_GPU

SHAPES = {
    "odd": dict(T=33, B=12, I=300, H=500),
    "both directions, lengths": dict(T=17, B=5, I=33, H=130, bidirectional=True, lengths=True),
    "two layers, resets, cell states": dict(T=9, B=17, I=31, H=64, L=2, resets=True, states=True),
    "projection": dict(T=9, B=5, I=33, H=64, proj_size=20),
}
two_specs = pytest.mark.parametrize("spec", [LSTMSpec(), LSTMSpec(coupled=True)], ids=lambda spec: spec.name)


def assert_as_near_as_pytorchs_operators(case):
    """Each within 1.5 times the largest error of the reference in the case's type, or of rounding alone, or BOUND.

    Rounding alone is TF32's: PyTorch's operators leave it for float32 in products of some sizes.
    """
    inputs = random_inputs(case)
    expected = expected_second_gradients(case, inputs)
    theirs = errors(second_gradients(case, inputs, call_reference), expected)
    if case.dtype == torch.float32 and matmul_precision() == "tf32":
        with RoundedOperands(operand_rounding(case.dtype, "tf32")):
            rounded = expected_second_gradients(case, inputs)
        theirs |= {f"rounded {name}": error for name, error in errors(rounded, expected).items()}
    with lstm_triton.backend("triton"), without_reference():
        found = errors(second_gradients(case, inputs, call), expected)
    allowed = max(TIMES_CUDNN * max(theirs.values()), BOUND[case.dtype])
    wrong = {name: error for name, error in found.items() if not error <= allowed}
    assert not wrong, f"beyond {allowed:.0e}: {wrong}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", TYPES, indirect=True)
@two_specs
def test_second_gradients_are_as_near_to_the_reference_as_others(spec, precision, shape):
    assert_as_near_as_pytorchs_operators(Case(spec, dtype=TYPES[precision], device="cuda", **SHAPES[shape]))


@pytest.mark.parametrize("case", [case for spec in VARIANTS for case in cases_of(spec)], ids=str)
def test_every_variant_in_float64(case):
    assert_as_near_as_pytorchs_operators(replace(case, device="cuda"))


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
@pytest.mark.parametrize("precision", ["bfloat16", "float32 ieee"], indirect=True)
@two_specs
def test_both_strategies_go_on_from_what_they_saved(spec, precision, strategy):
    case = Case(spec, T=40, B=16, I=64, H=256, dtype=TYPES[precision], device="cuda", lengths=True, strategy=strategy)
    assert_as_near_as_pytorchs_operators(case)


@pytest.mark.parametrize("name", OF_OPERATOR)
def test_behind_cudnn_the_kernels_compute_it(name, monkeypatch):
    """`torch.nn.LSTM`'s options by `auto`, whatever that takes for the forward pass."""
    options = dict(OF_OPERATOR[name])
    packed, steps = options.pop("packed", False), options.pop("steps", 12)
    module = lstm_triton.LSTM(5, 24, device="cuda", dtype=torch.float64, strategy="cudnn", **options)
    exact = lstm_triton.LSTM(5, 24, device="cuda", dtype=torch.float64, **options)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(steps, 3, 5, device="cuda", dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([steps, 2, 1])

    def second(of, reference):
        given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths) if packed else x
        if reference:
            with lstm_triton.backend("torch"), monkeypatch.context() as patch:
                patch.setattr(aten, "differentiable_stack", lambda tensors: second_order.forward)
                return gradients(of, of(given)[0])
        return gradients(of, of(given)[0])

    def gradients(of, output):
        data = output.data if packed else output
        first = torch.autograd.grad(data.sin().sum(), [x, *of.parameters()], create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), [x, *of.parameters()])

    expected = second(exact, True)
    monkeypatch.setattr(second_order, "forward", None)
    assert aten.differentiable_stack([x]) is autograd.stack_by_kernels
    torch.testing.assert_close(second(module, False), expected, rtol=1e-9, atol=1e-10)
