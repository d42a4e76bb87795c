"""The ablations of Greff et al. 2017: gates that are the constant 1, and activations that are the identity."""

import copy

import pytest
import torch
from lstm_triton_kernels.sizes import SUPPORTED_DTYPES
from lstm_triton_kernels.spec import ABLATIONS, BY_NAME, OPEN, LSTMWeights

import lstm_triton
from lstm_triton import LSTM, CoupledLSTM, LSTMCell, LSTMSpec, PeepholeLSTM, functional, init
from tests.support import double_backward
from tests.support.gradcheck import first_order, second_order
from tests.support.parity import Case, assert_parity, call_reference, odd_cases, random_inputs, regularized_cases

COMBINED = [
    LSTMSpec(peephole="diagonal", output_peephole="current", input_gate=False, output_activation="identity"),
    LSTMSpec(True, "full", output_gate=False, input_activation="identity", output_activation="identity"),
    LSTMSpec(peephole="full", output_peephole="current", forget_gate=False),
    LSTMSpec(peephole="diagonal", forget_gate=False, output_gate=False),
    LSTMSpec(False, None, "previous", False, False, False, False, "identity", "identity"),
    LSTMSpec(layer_norm=True, input_activation="identity", output_activation="identity"),
]
"""Several ablations at once, with every kind of peephole, coupled gates and layer normalisation."""

IDENTITIES = LSTMSpec(input_activation="identity", output_activation="identity")
CASES = [case for spec in [*ABLATIONS, *COMBINED] for case in odd_cases(spec)]
CASES += [case for spec in (COMBINED[0], COMBINED[3], IDENTITIES) for case in regularized_cases(spec)]
every_ablation = pytest.mark.parametrize("spec", [*ABLATIONS, *COMBINED], ids=lambda spec: spec.name)


def naive_cell(x, h, c, w, spec):
    """One row, without layer normalisation: equation by equation, from a matrix of its own for every gate."""
    blocks = [spec.split_gates(weight, 0) for weight in (w.weight_ih, w.weight_hh, w.bias_ih, w.bias_hh)]
    peephole = spec.split_peephole(w.weight_ch) if spec.peephole else {}
    a = {gate: blocks[0][gate] @ x + blocks[1][gate] @ h + blocks[2][gate] + blocks[3][gate] for gate in spec.gates}

    def gate(name, read):
        if name not in a:
            return torch.ones_like(c)
        if name not in peephole:
            return 1 / (1 + torch.exp(-a[name]))
        v = peephole[name]
        return 1 / (1 + torch.exp(-a[name] - (v @ read if spec.peephole == "full" else v * read)))

    f = gate("f", c)
    i = 1 - f if spec.coupled else gate("i", c)
    new_c = f * c + i * (a["g"] if spec.input_activation == "identity" else torch.tanh(a["g"]))
    o = gate("o", new_c if spec.output_peephole == "current" else c)
    return o * (new_c if spec.output_activation == "identity" else torch.tanh(new_c)), new_c


@pytest.mark.parametrize(
    "spec", [spec for spec in [*ABLATIONS, *COMBINED] if not spec.layer_norm], ids=lambda spec: spec.name
)
def test_the_reference_is_the_equations(spec):
    case = Case(spec, cell=True, B=4, I=5, H=7)
    inputs = random_inputs(case)
    h, c = call_reference(case, *inputs.values())
    weights = LSTMWeights(**dict(list(inputs.items())[3:]))
    for row in range(case.B):
        expected = naive_cell(*(inputs[name][row] for name in ("x", "h_0", "c_0")), weights, spec)
        torch.testing.assert_close((h[row], c[row]), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend_matches_the_reference(case):
    assert_parity(case, "torch")


@pytest.mark.parametrize("check", [first_order, second_order], ids=["first", "second"])
@every_ablation
def test_gradients_match_finite_differences(spec, check):
    check(spec, "layer", fast=True)


SECOND = [case for spec in [*ABLATIONS[3:], *COMBINED[:2]] for case in double_backward.cases_of(spec)]


@pytest.mark.parametrize("case", SECOND, ids=str)
def test_second_gradients_are_the_references(case):
    double_backward.assert_right(case, "torch", 1e-12)


@pytest.mark.parametrize("dtype", SUPPORTED_DTYPES, ids=str)
def test_an_open_gate_is_exactly_one_and_has_no_derivative(dtype):
    a = torch.tensor(OPEN, dtype=dtype, requires_grad=True)
    gate = torch.sigmoid(a)
    gate.backward()
    assert gate.item() == 1 and a.grad.item() == 0 and (1 - gate).item() == 0


def test_every_ablation_that_combines_has_a_name():
    """Of the three gates, any; the two activations are free; what contradicts itself is not there."""
    plain = [spec for spec in BY_NAME.values() if not spec.layer_norm and spec.activated]
    assert len(BY_NAME) == 4 * len(plain) + 4 * 10  # of layer normalisation with all gates alone
    assert sum(not spec.coupled and spec.peephole is None for spec in plain) == 8
    assert sum(spec.coupled and spec.peephole is None for spec in plain) == 2  # without an output gate or with it
    for name, spec in BY_NAME.items():
        assert spec.name == name and LSTMSpec.parse(name) is spec and LSTMSpec.of(**spec.options) is spec
        assert LSTMSpec(**spec.options) == spec and len(spec.computed.gates) == 4 - spec.coupled
    assert COMBINED[0].name == "diagonal+current+no-input-gate+identity-output"
    with pytest.raises(ValueError, match=r"variant must be one of standard.*no-input-gate.*got 'no-gate'"):
        LSTMSpec.parse("no-gate")


@pytest.mark.parametrize(
    "options, error, said",
    [
        (dict(coupled=True, input_gate=False), ValueError, "input gate 1 - f: with input_gate=False it would be 1"),
        (dict(coupled=True, forget_gate=False), ValueError, "with forget_gate=False it would be 0, and no input"),
        (dict(layer_norm=True, output_gate=False), ValueError, "over the blocks of all gates: none can be left out"),
        (dict(peephole="full", output_peephole="current", output_gate=False), ValueError, "is of the output gate"),
        (
            dict(peephole="full", input_gate=False, forget_gate=False, output_gate=False), ValueError,
            "peephole='full' needs a gate that reads the cell state",
        ),
        (dict(input_gate=0), TypeError, "input_gate should be of type bool, got: int"),
        (dict(input_activation="relu"), ValueError, "input_activation must be 'tanh' or 'identity', got 'relu'"),
        (dict(output_activation=None), ValueError, "output_activation must be 'tanh' or 'identity', got None"),
        (dict(forget_gate=False, forget_bias=1.0), ValueError, "which forget_gate=False leaves out"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", [LSTM, LSTMCell], ids=lambda kind: kind.__name__)
def test_what_contradicts_itself_is_refused_with_the_reason(kind, options, error, said):
    with pytest.raises(error, match=said):
        kind(3, 4, **options)


def test_strategy_cudnn_has_gates_that_are_left_out_but_no_other_activation():
    LSTM(3, 4, strategy="cudnn", forget_gate=False)
    with pytest.raises(ValueError, match=r"'cudnn' has no activation but tanh, got the variant 'identity-input'"):
        LSTM(3, 4, strategy="cudnn", input_activation="identity")


def test_parameters_are_those_of_the_gates_that_there_are():
    lstm = PeepholeLSTM(3, 5, 2, bidirectional=True, proj_size=2, input_gate=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in lstm.named_parameters()}
    assert shapes["weight_ih_l0"] == (15, 3) and shapes["weight_hh_l1_reverse"] == (15, 2)
    assert shapes["weight_ch_l1"] == (10,) and shapes["bias_hh_l0"] == (15,)
    assert "peephole='diagonal', input_gate=False" in repr(lstm)
    cell = LSTMCell(3, 5, forget_gate=False, output_gate=False, output_activation="identity")
    assert {name: tuple(p.shape) for name, p in cell.named_parameters()} == {
        "weight_ih": (10, 3), "weight_hh": (10, 5), "bias_ih": (10,), "bias_hh": (10,)
    }  # fmt: skip
    assert cell.spec.name == "no-forget-gate+no-output-gate+identity-output"
    assert "forget_gate=False, output_gate=False, output_activation='identity'" in repr(cell)
    assert CoupledLSTM(3, 5, output_gate=False).weight_hh_l0.shape == (10, 5)
    again = copy.deepcopy(lstm)
    again.load_state_dict(lstm.state_dict())
    x = torch.randn(4, 2, 3)
    assert torch.equal(again(x)[0], lstm(x)[0])


def test_a_gate_that_is_left_out_has_no_initial_bias():
    lstm = LSTM(3, 5, input_gate=False, forget_bias=1.0)
    assert (lstm.spec.split_gates(lstm.bias_ih_l0)["f"] == 1).all()
    init.chrono_(lstm, 10)
    with pytest.raises(ValueError, match=r"LSTM has no gate f: it is of the variant 'no-forget-gate'"):
        init.forget_bias_(LSTM(3, 5, forget_gate=False))


@every_ablation
def test_a_layer_is_its_cell_step_by_step_and_a_session(spec):
    torch.manual_seed(0)
    lstm, cell = (kind(3, 5, **spec.options).double() for kind in (LSTM, LSTMCell))
    cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in lstm.state_dict().items()})
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x)
    states, session = None, lstm.session(2)
    for t, x_t in enumerate(x):
        states = cell(x_t, states)
        torch.testing.assert_close(states[0], output[t], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(states, (h_n[0], c_n[0]), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([session(x[:1]), session(x[1:])]), output, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [dict(), dict(weight_dropout=0.5), dict(bias=False)], ids=str)
def test_a_gate_is_one_with_and_without_biases_and_dropout_of_the_weights(options):
    """With g = a_g, no gate at all and W_hh = 0 the output is the sum of all inputs so far, W x + b."""
    lstm = LSTM(3, 5, **COMBINED[4].options, **options).double()
    torch.nn.init.zeros_(lstm.weight_hh_l0)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    a = x @ lstm.weight_ih_l0.t() + (0 if options.get("bias") is False else lstm.bias_ih_l0 + lstm.bias_hh_l0)
    torch.testing.assert_close(lstm(x)[0], a.cumsum(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("spec", [ABLATIONS[0], COMBINED[0], COMBINED[5]], ids=lambda spec: spec.name)
def test_compiled_calls_compute_the_same(spec):
    torch.manual_seed(0)
    lstm = LSTM(3, 5, **spec.options).double()
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    found = {}
    for name, module in (("plain", lstm), ("compiled", torch.compile(lstm, fullgraph=True, backend="aot_eager"))):
        output, _ = module(x)
        found[name] = (output, *torch.autograd.grad(output.square().sum(), list(lstm.parameters())))
    torch.testing.assert_close(found["compiled"], found["plain"], rtol=1e-11, atol=1e-12)


def test_functional_and_explain_take_the_options():
    lstm = LSTM(3, 5, forget_gate=False, input_activation="identity")
    x = torch.randn(4, 2, 3)
    weights = list(lstm.parameters())
    output, _ = functional.lstm(x, None, weights, forget_gate=False, input_activation="identity")
    assert torch.equal(output, lstm(x)[0])
    words = str(LSTM(3, 5, forget_gate=False).explain(x, gpu="h100"))
    assert "no-forget-gate LSTM" in words and "computed as the variant standard" in words and "cudnn" in words
    assert lstm.explain(x).to_dict()["layer"]["variant"] == "no-forget-gate+identity-input"
    with pytest.raises(RuntimeError, match="weight_ih"):
        lstm_triton.functional.lstm(x, None, weights)
