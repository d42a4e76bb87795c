"""The ablations of Greff et al. 2017 by the interpreted kernels, against the float64 reference.

A gate that is left out is one of a variant with all gates, so it is the identities that the kernels have flags for.
"""

import pytest
import torch
from lstm_triton_kernels.spec import ABLATIONS

import lstm_triton
from lstm_triton import LSTMSpec
from tests.support import double_backward
from tests.support.parity import RULES, Case, assert_parity, odd_cases, regularized_cases
from tests.support.persistent import LayerCase, assert_right, concurrently, plan_of

BOTH = dict(input_activation="identity", output_activation="identity")
IDENTITIES = [
    LSTMSpec(input_activation="identity"),
    LSTMSpec(output_activation="identity"),
    LSTMSpec(True, "diagonal", "current", **BOTH),
    LSTMSpec(False, "full", "current", **BOTH),
]
NORMALIZED = LSTMSpec(True, layer_norm=True, **BOTH)
STEPWISE = [case for n, spec in enumerate(IDENTITIES) for case in odd_cases(spec)[n % 2 :: 2]]
STEPWISE += [case for n, spec in enumerate(IDENTITIES) for case in regularized_cases(spec)[n % 4 :: 4]]
STEPWISE += [case for case in odd_cases(NORMALIZED)[2::3] if case.H > 1]
STEPWISE += [Case(spec, T=3, B=3, I=5, H=9, bidirectional=True, lengths=True, states=True) for spec in ABLATIONS[:3]]
STEPWISE += [Case(LSTMSpec(peephole="full", forget_gate=False, output_gate=False), T=2, B=3, I=2, H=5, bias=False)]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_kernels_match_the_reference(case):
    assert_parity(case, "triton")


@pytest.mark.parametrize("case", [double_backward.cases_of(spec)[n % 2] for n, spec in enumerate(IDENTITIES)], ids=str)
def test_second_gradients_are_the_references(case):
    double_backward.assert_right(case, "triton", 1e-12)


PERSISTENT = [
    LayerCase(spec, plan_of(B, H, 1, wait=wait), 3, B, H, P=P, lengths=n % 2 == 0, resets=n > 1, rules=rules)
    for n, (spec, wait, B, H, P, rules) in enumerate(
        (
            (IDENTITIES[0], None, 5, 11, 0, RULES[4]), (IDENTITIES[1], "data", 3, 19, 0, RULES[0]),
            (IDENTITIES[2], "counter", 5, 13, 7, RULES[2]), (IDENTITIES[3], "data", 2, 9, 0, RULES[3]),
        )
    )
]  # fmt: skip


@pytest.mark.parametrize("case", PERSISTENT, ids=str)
def test_persistent_kernels_match_the_reference(case):
    assert_right(case, concurrently(delay=0.0) if case.plan.wait else None)


def test_persistent_kernels_through_the_public_function():
    assert_parity(
        Case(IDENTITIES[2], T=4, B=5, I=3, H=9, dtype=torch.float32, strategy="persistent", resets=True), "triton"
    )


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_gates_are_returned_behind_the_kernels(strategy):
    spec, asked = LSTMSpec(True, "full", "current", output_activation="identity"), dict(strategy=strategy)
    lstm = lstm_triton.LSTM(3, 7, bidirectional=True, zoneout=(0.2, 0.3), **spec.options, **asked).eval()
    x, lengths = torch.randn(4, 3, 3), torch.tensor([4, 2, 3])
    with lstm_triton.backend("triton"):
        *_, found = lstm(x, lengths=lengths, return_gates=True)
    lstm.strategy = "auto"
    *_, expected = lstm(x, lengths=lengths, return_gates=True)
    torch.testing.assert_close(list(found), list(expected), rtol=1e-5, atol=1e-6)
