"""The reference against `torch.nn.LSTM`, `torch.nn.LSTMCell` and the equations written out one gate at a time."""

import pytest
import torch
from lstm_triton_kernels.spec import LSTMWeights

from lstm_triton import VARIANTS, LSTMSpec
from tests.support.parity import BOUND, Case, call_reference, errors, random_inputs, results


def naive_cell(x, h, c, weights, spec):
    """The exercise's equations for one unbatched row: a matrix of its own for every gate, `@` for every product."""
    u, w = spec.split_gates(weights.weight_ih, 0), spec.split_gates(weights.weight_hh, 0)
    b = spec.split_gates(weights.bias_ih + weights.bias_hh, 0)
    v = spec.split_peephole(weights.weight_ch) if spec.peephole else {}

    def look(gate, state):
        if spec.peephole is None:
            return 0
        return v[gate] @ state if spec.peephole == "full" else torch.diag(v[gate]) @ state

    forget_gate = torch.sigmoid(w["f"] @ h + u["f"] @ x + b["f"] + look("f", c))
    if spec.coupled:
        input_gate = 1 - forget_gate
    else:
        input_gate = torch.sigmoid(w["i"] @ h + u["i"] @ x + b["i"] + look("i", c))
    new_memory = torch.tanh(w["g"] @ h + u["g"] @ x + b["g"])
    new_c = forget_gate * c + input_gate * new_memory
    read = new_c if spec.output_peephole == "current" else c
    output_gate = torch.sigmoid(w["o"] @ h + u["o"] @ x + b["o"] + look("o", read))
    return output_gate * torch.tanh(new_c), new_c


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_cell_is_the_exercises_equations(spec):
    case = Case(spec, cell=True, B=4, I=5, H=7)
    inputs = random_inputs(case)
    h, c = call_reference(case, *inputs.values())
    weights = dict(list(inputs.items())[3:])
    for row in range(case.B):
        x, h_0, c_0 = (inputs[name][row] for name in ("x", "h_0", "c_0"))
        expected_h, expected_c = naive_cell(x, h_0, c_0, LSTMWeights(**weights), spec)
        torch.testing.assert_close(h[row], expected_h, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(c[row], expected_c, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(L=2), dict(bidirectional=True), dict(L=2, bidirectional=True, proj_size=3), dict(bias=False)],
    ids=str,
)
def test_layers_are_torch_nn_lstm(options):
    case = Case(LSTMSpec(), T=5, B=3, I=4, H=6, **options)
    inputs = random_inputs(case)

    def module(case, x, h_0, c_0, *weights):
        layer = torch.nn.LSTM(
            case.I, case.H, case.L, case.bias, bidirectional=case.bidirectional, proj_size=case.proj_size
        ).double()
        parameters = dict(zip(case.parameter_names(), weights, strict=True))
        output, (h_n, c_n) = torch.func.functional_call(layer, parameters, (x, (h_0, c_0)))
        return output, h_n, c_n

    found = errors(results(case, inputs, call_reference), results(case, inputs, module))
    assert max(found.values()) < BOUND[torch.float64], found


def test_cell_is_torch_nn_lstm_cell():
    case = Case(LSTMSpec(), cell=True, B=3, I=4, H=6)
    inputs = random_inputs(case)

    def module(case, x, h_0, c_0, *weights):
        cell = torch.nn.LSTMCell(case.I, case.H).double()
        return torch.func.functional_call(
            cell, dict(zip(case.parameter_names(), weights, strict=True)), (x, (h_0, c_0))
        )

    found = errors(results(case, inputs, call_reference), results(case, inputs, module))
    assert max(found.values()) < BOUND[torch.float64], found
