"""The second derivative by the kernels, against the float64 reference; the reference itself computes nothing of it."""

import pytest
import torch
from lstm_triton_kernels import sequence_replayed, sequence_tangents, tangents_replayed

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, aten, autograd, eager_tangents, second_order
from tests.cpu.test_twice_differentiable import CASES, Problem
from tests.support.composes import close, loss
from tests.support.double_backward import (
    BOUND,
    assert_right,
    cases_of,
    expected_second_gradients,
    second_gradients,
    without_reference,
)
from tests.support.parity import Case, call, errors, random_inputs

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


@pytest.fixture
def captures(monkeypatch):
    """Chunks of two steps, "captured" without CUDA: the function itself. Yields the captured functions."""
    captured = []
    monkeypatch.setattr(sequence_replayed, "STEPS", 2)
    monkeypatch.setattr(sequence_replayed, "capture", lambda function: (captured.append(function), (function, None))[1])
    monkeypatch.setattr(sequence_replayed, "pays", lambda layer, device: layer.T >= 2)
    monkeypatch.setattr(sequence_replayed, "_chunks", type(sequence_replayed._chunks)())
    return captured


@pytest.mark.parametrize(
    "spec, options, chunks",
    [(COUPLED, dict(T=5, lengths=True), 3), (FULL, dict(T=3, proj_size=3, bias=False, resets=True), 4)],
    ids=["lengths", "full+current, projection, resets"],
)
def test_replayed_chunks_give_the_same_bits(spec, options, chunks, captures):
    """In both directions, of an odd number of steps."""
    case = Case(spec, B=2, I=3, H=4, bidirectional=True, strategy="stepwise", **options)
    inputs = random_inputs(case)

    def found():
        with without_reference():
            return second_gradients(case, inputs, call)

    first, second, third = found(), found(), found()
    # Of each direction: forward, tangents, and the backward pass; without lengths also that without gradients of c_t.
    assert len(captures) == chunks * case.D
    assert all(torch.equal(t, second[name]) and torch.equal(t, third[name]) for name, t in first.items())
    assert max(errors(third, expected_second_gradients(case, inputs)).values()) < 1e-12


@pytest.mark.parametrize("spec", [LSTMSpec(), COUPLED, FULL], ids=lambda spec: spec.name)
def test_kernels_and_pytorchs_operators_leave_the_same_tangents(spec, monkeypatch):
    """Also where a sequence is reset, step by step."""
    computed = []

    def compared(name):
        kernels, operators = getattr(tangents_replayed, name), getattr(eager_tangents, name)

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
        monkeypatch.setattr(tangents_replayed, name, compared(name))
    case = Case(spec, T=3, B=2, I=2, H=5, bidirectional=True, resets=True)
    assert_right(case, "triton", 1e-12)
    assert computed == ["forward", "sources"] * 2
