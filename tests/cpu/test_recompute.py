"""Gates that are computed again in the backward pass instead of being kept."""

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, autograd, functional, gemms, layer, routing
from lstm_triton.layer import Call
from tests.support.parity import Case, errors, expected_results, laid_out, random_inputs, results

COUPLED, FULL_CURRENT = LSTMSpec(coupled=True), LSTMSpec(peephole="full", output_peephole="current")


def calling(recompute):
    """A function as `parity.results` takes it, with or without recomputed gates."""

    def call(case, x, h_0, c_0, *weights):
        output, (h_n, c_n) = functional.lstm(
            laid_out(case, x), (h_0, c_0), weights, num_layers=case.L, bias=case.bias, proj_size=case.proj_size,
            bidirectional=case.bidirectional, recompute=recompute, **case.variant,
        )  # fmt: skip
        return output, h_n, c_n

    return call


RECOMPUTED = [
    dict(T=7, L=2, bidirectional=True),
    dict(T=2, B=1),
    dict(T=4, proj_size=3, bidirectional=True, bias=False, layout="transposed"),
]


@pytest.fixture
def by_eager_steps(monkeypatch):
    """The standard variant, too, is computed by the steps in `eager`."""
    monkeypatch.setattr(routing, "why_not_operator", lambda *_: "not asked here")


@pytest.mark.parametrize("shape", RECOMPUTED, ids=str)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_recomputed_gates_give_the_same_gradients(spec, shape, by_eager_steps, monkeypatch):
    again = []
    compute = gemms.activated_gates
    monkeypatch.setattr(gemms, "activated_gates", lambda *a, **k: again.append(1) or compute(*a, **k))
    case = Case(spec, **shape)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    for recompute in (False, True):
        again.clear()
        found = errors(results(case, inputs, calling(recompute)), expected)
        assert max(found.values()) < 1e-12, (recompute, found)
        assert len(again) == (case.L * case.D if recompute else 0)


@pytest.mark.parametrize("gate", [0, -1])
def test_a_wrong_recomputed_gate_is_seen(gate, by_eager_steps, monkeypatch):
    """Test of the test: the recomputed gates decide about the gradients."""
    compute = gemms.activated_gates

    def wrong(*arguments, **options):
        gates = compute(*arguments, **options)
        gates[0, 0, gate] *= 1 + 1e-6
        return gates

    monkeypatch.setattr(gemms, "activated_gates", wrong)
    case = Case(COUPLED)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    assert max(errors(results(case, inputs, calling(False)), expected).values()) < 1e-12
    assert max(errors(results(case, inputs, calling(True)), expected).values()) > 1e-10


@pytest.mark.parametrize("spec", [COUPLED, FULL_CURRENT], ids=lambda spec: spec.name)
def test_recomputing_keeps_no_gates(spec):
    case = Case(spec, T=5)
    x, h_0, c_0, *weights = (t.detach() for t in random_inputs(case).values())
    inputs = (x, h_0, c_0, weights, None, None, None)
    gates = {
        (save, recompute): autograd.layer_forward(*inputs, *Call(spec.name, True, False, "eager", save, recompute))[
            4
        ].numel()
        for save in (True, False)
        for recompute in (True, False)
    }
    kept = 5 * case.B * len(spec.gates) * case.H
    assert gates == {(True, False): kept, (True, True): 0, (False, False): 0, (False, True): 0}


def test_the_module_recomputes_and_may_be_told_later(monkeypatch):
    asked = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: asked.append(a[5]) or forward(*a, **k))
    module, x = lstm_triton.LSTM(3, 4, peephole="full", recompute=True), torch.randn(2, 1, 3)
    module(x)[0].sum().backward()
    first = module.weight_hh_l0.grad.clone()
    module.recompute = False
    module.zero_grad()
    module(x)[0].sum().backward()
    assert [(call.save, call.recompute) for call in asked] == [(True, True), (True, False)]
    torch.testing.assert_close(module.weight_hh_l0.grad, first)


def test_second_gradients_through_recomputed_gates():
    case = Case(COUPLED, T=3, B=2, I=2, H=3)
    inputs = random_inputs(case)
    second = {}
    for recompute in (False, True):
        output = calling(recompute)(case, *inputs.values())[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs["x"], create_graph=True)
        (second[recompute],) = torch.autograd.grad(gradient.square().sum(), inputs["weight_hh_l0"])
    torch.testing.assert_close(second[True], second[False], rtol=1e-12, atol=1e-14)
    assert second[True].abs().max() > 0


def test_recompute_compiles_into_one_graph():
    torch._dynamo.reset()
    case = Case(COUPLED, T=3)
    inputs = random_inputs(case)
    compiled = torch.compile(lambda *t: calling(True)(case, *t), fullgraph=True, backend="aot_eager")
    actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    assert max(errors(actual, expected_results(case, inputs)).values()) < 1e-12
