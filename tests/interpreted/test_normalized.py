"""Layer normalisation by the interpreted kernels, step by step, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels import sequence_replayed
from lstm_triton_kernels.spec import NORMALIZED
from torch.func import functional_call, grad, vmap

import lstm_triton
from lstm_triton import LSTMSpec, functional, gemms
from tests.support import parity
from tests.support.parity import BOUND, RULES, Case, assert_parity, call, errors, expected_results, random_inputs

FULL_CURRENT = LSTMSpec(True, "full", "current", layer_norm=True)


def cases():
    """Every variant with some of the shapes and rules, in turn, so that each of these meets several variants."""
    for n, spec in enumerate(NORMALIZED):
        odd = [case for case in parity.odd_cases(spec) if case.H > 1]  # a single unit normalised is 0
        every = [*odd, *parity.regularized_cases(spec)]
        yield from every[n % 6 :: 6]


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_kernels_match_the_reference(case):
    assert_parity(case, "triton")


def test_the_cases_have_every_option():
    found = list(cases())
    for flag in ("bidirectional", "lengths", "resets", "states", "proj_size", "cell", "training", "bias"):
        assert {bool(getattr(case, flag)) for case in found} == {False, True}, flag
    for rule in RULES[0]._fields:
        assert any(getattr(case.rules, rule) for case in found), rule
    assert {case.dtype for case in found} == {torch.float64, torch.float32, torch.float16}
    assert {case.T for case in found} >= {1, 2, 4} and max(case.L for case in found) == 2


def test_a_single_unit_is_normalised_to_nothing():
    """Its hidden state is o tanh(b_c), and its gradients are what float64 rounds of zero, of everything but o's."""
    case = Case(NORMALIZED[0], T=2, B=3, I=4, H=1)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        found = parity.results(case, inputs, call)
    for name, expected in expected_results(case, inputs).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-11, atol=1e-13)
    assert not found["grad weight_ln_c_l0"].any() and found["grad bias_ln_c_l0"].any()


@pytest.mark.parametrize("spec", [NORMALIZED[3], FULL_CURRENT], ids=lambda spec: spec.name)
@pytest.mark.parametrize("T", [1, 2])
def test_bfloat16_is_as_near_as_its_storage_allows(T, spec):
    """2^-8 for each result stored, and there are more than in plain steps: the input side and the products as well."""
    case = Case(spec, T=T, B=5, I=9, H=18, dtype=torch.bfloat16)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        found = errors(parity.results(case, inputs, call), expected_results(case, inputs))
    assert max(found.values()) < 6 * 2**-8, found


@pytest.mark.parametrize("shape", [dict(T=3, proj_size=4, bias=False), dict(T=4, bidirectional=True)], ids=str)
@pytest.mark.parametrize("spec", [NORMALIZED[2], FULL_CURRENT], ids=lambda spec: spec.name)
def test_recomputed_gates_give_the_same_gradients(spec, shape, monkeypatch):
    activate, again = gemms.activate, []
    monkeypatch.setattr(gemms, "activate", lambda *a: again.append(1) or activate(*a))

    def recomputing(case, x, h_0, c_0, *weights):
        torch.manual_seed(parity.MASKS)
        options = dict(bias=case.bias, bidirectional=case.bidirectional, proj_size=case.proj_size, recompute=True)
        output, states = functional.lstm(x, (h_0, c_0), weights, **options, **case.variant, **case.regularization)
        return output, *states

    case = Case(spec, B=2, I=3, H=6, rules=RULES[4], **shape)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        found = errors(parity.results(case, inputs, recomputing), expected_results(case, inputs))
    assert max(found.values()) <= BOUND[torch.float64], found
    assert len(again) == case.D


@pytest.fixture
def captures(monkeypatch):
    """Chunks of two steps, "captured" without CUDA; yields the list of captured functions."""
    captured = []

    def capture(function):
        captured.append(function)
        return function, None

    monkeypatch.setattr(sequence_replayed, "STEPS", 2)
    monkeypatch.setattr(sequence_replayed, "capture", capture)
    monkeypatch.setattr(sequence_replayed, "pays", lambda layer, device: layer.T >= 2)
    monkeypatch.setattr(sequence_replayed, "_chunks", type(sequence_replayed._chunks)())
    return captured


REPLAYED = {
    "two directions, rules": dict(T=5, bidirectional=True, rules=RULES[3]),
    "ragged, projection": dict(T=5, bidirectional=True, lengths=True, resets=True, states=True, proj_size=3),
}


@pytest.mark.parametrize("shape", REPLAYED)
def test_replayed_chunks_give_the_same_bits_and_are_right(shape, captures):
    case = Case(FULL_CURRENT, B=2, I=3, H=5, **REPLAYED[shape])
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        first = parity.results(case, inputs, call)
        assert not captures
        second, third = parity.results(case, inputs, call), parity.results(case, inputs, call)
    assert len(captures) == 2 * case.D  # forward and backward of each direction
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)
    found = errors(third, expected_results(case, inputs))
    assert max(found.values()) <= BOUND[torch.float64], found


def test_only_the_gradients_that_are_wanted():
    case = Case(FULL_CURRENT, T=2, B=2, I=3, H=4)
    inputs = random_inputs(case)
    wanted = parity.results(case, inputs, call)
    frozen = {name: t if name in ("h_0", "bias_ln_c_l0") else t.detach() for name, t in inputs.items()}
    with lstm_triton.backend("triton"):
        output, h_n, c_n = call(replace(case), *frozen.values())
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (output, h_n, c_n)]
    leaves = [frozen["h_0"], frozen["bias_ln_c_l0"]]
    found = torch.autograd.grad((output, h_n, c_n), leaves, given)
    for actual, name in zip(found, ("h_0", "bias_ln_c_l0"), strict=True):
        torch.testing.assert_close(actual, wanted[f"grad {name}"], rtol=1e-11, atol=1e-12)


def test_it_composes_with_compiling_transforms_and_second_derivatives():
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = lstm_triton.LSTM(3, 5, peephole="diagonal", layer_norm=True, dtype=torch.float64)
    weights = dict(module.named_parameters())
    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)

    def loss(weights, x):
        return functional_call(module, weights, (x,))[0].square().sum()

    def second():
        (gradient,) = torch.autograd.grad(loss(weights, x), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *weights.values()])

    wanted, wanted_second = torch.autograd.grad(loss(weights, x), list(weights.values())), second()
    with lstm_triton.backend("triton"):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        of_batch = vmap(grad(loss), (None, 0))(weights, torch.stack([x.detach(), x.detach() + 1]))
        found = {
            "compiled": torch.autograd.grad(compiled(weights, x), list(weights.values())),
            "torch.func.grad": tuple(grad(loss)(weights, x).values()),
            "vmap": tuple(gradients[0] for gradients in of_batch.values()),
        }
        found_second = second()
        assert module(x.detach()[:, :0])[0].shape == (3, 0, 5)
    for actual in found.values():
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found_second, wanted_second, rtol=1e-10, atol=1e-12)
