"""The `triton` backend as operators: opcheck, retained graphs, torch.compile, choice of backend, determinism."""

import pytest
import torch

import lstm_triton
from lstm_triton import LSTMSpec, routing
from tests.support.operators import check_operators
from tests.support.parity import Case, call, errors, expected_results, random_inputs, results

SPECS = [LSTMSpec(), LSTMSpec(True, "full", "current"), LSTMSpec(False, "diagonal")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_operators_pass_opcheck(spec):
    check_operators(spec, "triton")


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_backward_twice_and_call_twice_give_the_same_bits(spec):
    case = Case(spec, T=3)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        outputs = call(case, *inputs.values())
        loss = sum((t * t).sum() for t in outputs)
        first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(inputs.values()))
        again = call(case, *inputs.values())
    assert all(torch.equal(a, b) for a, b in zip((*first, *outputs), (*second, *again), strict=True))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_compiles_into_one_graph(spec):
    torch._dynamo.reset()  # every variant compiles the same lambda anew
    case = Case(spec, T=2, L=2)
    inputs = random_inputs(case)
    compiled = torch.compile(lambda *tensors: call(case, *tensors), fullgraph=True, backend="aot_eager")
    with lstm_triton.backend("triton"):
        actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    found = errors(actual, expected_results(case, inputs))
    assert max(found.values()) < 1e-12, found


def test_cpu_tensors_go_to_the_kernels_only_when_asked():
    cpu = torch.device("cpu")
    assert routing.choose_backend(cpu, torch.float32).name == "torch"
    with lstm_triton.backend("triton"):
        assert routing.choose_backend(cpu, torch.float32) == ("triton", "asked for")
        with pytest.raises(RuntimeError, match=r"'triton' cannot run here: the kernels compute in .* got torch.int64"):
            routing.choose_backend(cpu, torch.int64)


def test_inference_and_empty_batch():
    layer = lstm_triton.LSTM(5, 7, peephole="full", output_peephole="current", dtype=torch.float64)
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    expected = layer(x)[0]
    with lstm_triton.backend("triton"):
        with torch.inference_mode():
            torch.testing.assert_close(layer(x)[0], expected)
        empty, (h_n, c_n) = layer(x[:, :0])
        empty.sum().backward()
    assert empty.shape == (3, 0, 7) and h_n.shape == c_n.shape == (1, 0, 7)
    assert not layer.weight_hh_l0.grad.any()
