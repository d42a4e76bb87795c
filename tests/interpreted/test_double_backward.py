"""The second derivative by the kernels, against the float64 reference; the reference itself computes nothing of it."""

import pytest
import torch
from lstm_triton_kernels import sequence_tangents

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, aten, autograd, eager_tangents, second_order
from tests.cpu.test_twice_differentiable import CASES, Problem
from tests.support.composes import close, loss
from tests.support.double_backward import BOUND, assert_right, cases_of
from tests.support.parity import Case

COUPLED = LSTMSpec(coupled=True)
FULL = LSTMSpec(peephole="full", output_peephole="current")
FEW = [case for spec in VARIANTS for case in cases_of(spec)[: 4 if spec == COUPLED else 2]]
"""The interpreter takes half a second for each; tests/cpu has them all."""

OF_OPERATOR = ["two layers", "projection", "packed, two layers, both directions, no bias"]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_second_gradients_are_the_references(case):
    assert_right(case, "triton", 1e-12)


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
@pytest.mark.parametrize("spec", [LSTMSpec(), COUPLED], ids=lambda spec: spec.name)
def test_both_strategies_go_on_from_what_they_saved(spec, strategy):
    case = Case(spec, T=4, B=3, I=2, H=6, bidirectional=True, lengths=True, dtype=torch.float32, strategy=strategy)
    assert_right(case, "auto", BOUND[torch.float32])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("spec", [LSTMSpec(), COUPLED], ids=lambda spec: spec.name)
def test_in_every_type(spec, dtype):
    assert_right(Case(spec, T=5, B=3, I=4, H=17, dtype=dtype, resets=True, states=True), "triton", BOUND[dtype])


@pytest.mark.parametrize("given", ["output", "h_n", "c_n", "states"])
def test_of_one_result_only(given):
    case = Case(COUPLED, T=2, B=3, I=2, H=5, bidirectional=True, states=True)
    assert_right(case, "triton", 1e-12, given=(given,))


@pytest.mark.parametrize("first", ["x", "h_0", "c_0", "weight_hh_l0", "bias_ih_l0"])
def test_of_one_first_gradient_only(first):
    assert_right(Case(LSTMSpec(), T=2, B=3, I=2, H=5), "triton", 1e-12, first=(first,))


@pytest.mark.parametrize("name", OF_OPERATOR)
def test_behind_pytorchs_operator_the_kernels_compute_it(name):
    """The Function that stands behind cuDNN's LSTM."""
    problem = Problem(**CASES[name])

    def second(results):
        gradients = torch.autograd.grad(loss(results), problem.leaves, create_graph=True)
        return torch.autograd.grad(loss(gradients), problem.leaves)

    with lstm_triton.backend("triton"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_order, "forward", None)
        assert aten.differentiable_stack(problem.leaves) is autograd.stack_by_kernels
        found = second(problem.by_function())
    close(found, second(problem.by_reference()), 1e-10)


def test_a_step_takes_two_launches_and_the_sources_one_for_all(monkeypatch):
    launched = []
    for name in ("gate_preactivations", "cell_tangents", "cell_sources"):
        launch = getattr(sequence_tangents, name)
        monkeypatch.setattr(
            sequence_tangents, name, lambda *a, name=name, launch=launch, **k: (launched.append(name), launch(*a, **k))
        )
    assert_right(Case(LSTMSpec(), T=4, B=2, I=2, H=3, strategy="stepwise"), "auto", 1e-12)
    assert launched == ["gate_preactivations", "cell_tangents"] * 4 + ["cell_sources"]


@pytest.mark.parametrize("spec", [LSTMSpec(), COUPLED, FULL], ids=lambda spec: spec.name)
def test_kernels_and_pytorchs_operators_leave_the_same_tangents(spec, monkeypatch):
    """Also where a sequence is reset, step by step."""
    computed = []

    def compared(name):
        kernels, operators = getattr(sequence_tangents, name), getattr(eager_tangents, name)

        def both(*arguments):
            again = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            found, expected = kernels(*arguments), operators(*again)
            if name == "forward":  # in place in the last three
                found, expected = arguments[-3:], again[-3:]
            torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-11, atol=1e-13)
            computed.append(name)
            return found

        return both

    for name in ("forward", "sources"):
        monkeypatch.setattr(sequence_tangents, name, compared(name))
    case = Case(spec, T=3, B=2, I=2, H=5, bidirectional=True, resets=True)
    assert_right(case, "triton", 1e-12)
    assert computed == ["forward", "sources"] * 2
