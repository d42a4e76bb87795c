"""The `torch` backend against the float64 reference, and the harness against planted faults."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, eager
from tests.support.gradcheck import CHECKED_CASES, first_order, second_order
from tests.support.parity import Case, assert_parity, odd_cases

CASES = [case for spec in VARIANTS for case in odd_cases(spec)]
CASES += [
    Case(spec, T=64, B=3, I=10, H=20, dtype=dtype) for spec in VARIANTS for dtype in (torch.float32, torch.float16)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend_matches_the_reference(case):
    assert_parity(case, "torch")


@pytest.mark.parametrize("case", odd_cases(LSTMSpec()), ids=str)
def test_eager_steps_match_the_reference_for_the_standard_variant(case, monkeypatch):
    """The standard variant goes to PyTorch's own LSTM, but under torch.compile to the steps in `eager`."""
    monkeypatch.setattr(lstm_triton.routing, "why_not_operator", lambda *_: "not asked here")
    assert_parity(case, "torch")


@st.composite
def cases(draw):
    H = draw(st.integers(1, 20))
    cell = draw(st.booleans())
    return Case(
        spec=draw(st.sampled_from(VARIANTS)),
        T=draw(st.integers(1, 6)),
        B=draw(st.integers(1, 9)),
        I=draw(st.integers(1, 12)),
        H=H,
        L=1 if cell else draw(st.integers(1, 3)),
        bidirectional=False if cell else draw(st.booleans()),
        bias=draw(st.booleans()),
        proj_size=0 if cell or H == 1 else draw(st.integers(0, H - 1)),
        dtype=draw(st.sampled_from([torch.float64, torch.float32])),
        cell=cell,
        layout=draw(st.sampled_from(["contiguous", "transposed", "expanded"])),
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_layout_and_variant(case):
    assert_parity(case, "torch")


@pytest.mark.parametrize("shape", CHECKED_CASES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_gradients_match_finite_differences(spec, shape):
    first_order(spec, shape)


@pytest.mark.parametrize("shape", CHECKED_CASES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_second_gradients_match_finite_differences(spec, shape):
    second_order(spec, shape)


@pytest.mark.parametrize("fault", ["gate gradient", "cell gradient", "unwritten output"])
def test_a_planted_fault_is_seen(fault, monkeypatch):
    """Tests of the test: a small error in one step's result makes `assert_parity` fail."""
    forward, backward = eager.forward, eager.backward

    def wrong_forward(*arguments):
        forward(*arguments)
        if fault == "unwritten output":
            arguments[6][-1, -1, -1] = float("nan")

    def wrong_backward(*arguments):
        backward(*arguments)
        if fault == "gate gradient":
            arguments[9][0, 0, 0] *= 1 + 1e-6
        if fault == "cell gradient":
            arguments[3][0, 0] += 1e-6

    monkeypatch.setattr(eager, "forward", wrong_forward)
    monkeypatch.setattr(eager, "backward", wrong_backward)
    with pytest.raises(AssertionError, match="beyond"):
        assert_parity(Case(LSTMSpec(peephole="diagonal")), "torch")
