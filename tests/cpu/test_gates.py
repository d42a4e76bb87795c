"""return_gates: the gates of every step, against the equations in float64, with gradients."""

import pytest
import torch
from lstm_triton_kernels.spec import ABLATIONS, NORMALIZED
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from lstm_triton import LSTM, VARIANTS, CoupledLSTM, LSTMSpec, functional, parameters, reference
from lstm_triton.functional import Gates
from tests.support.parity import MASKS, RULES, Case, laid_out, ragged, random_inputs

T, B, I, H = 5, 3, 4, 7  # noqa: E741
BOTH = dict(bidirectional=True, L=2)


def expected_gates(case, x, h_0, c_0, *weights):
    """The gates of the last layer: what the reference's cell made of each step, seen by its own sigmoid and tanh."""
    layers = parameters.group_layers(weights, case.spec, case.D, case.bias, case.proj_size)
    drawn, x, ragged_of = case.drawn(case.L), laid_out(case, x), ragged(case)
    for n, own in enumerate(layers[:-1]):
        states = slice(n * case.D, (n + 1) * case.D)
        x, *_ = reference.layer_states(x, h_0[states], c_0[states], own, case.spec, **ragged_of, regularized=drawn[n])
    found = []
    for direction, w in enumerate(layers[-1]):
        h, c = (state[-case.D + direction] for state in (h_0, c_0))
        steps = {}
        for t in reversed(range(case.T)) if direction else range(case.T):
            kept = h, c
            if "resets" in ragged_of:
                h, c = (state.masked_fill(ragged_of["resets"][t][:, None], 0) for state in (h, c))
            step = drawn[-1].direction(direction).at(t)
            steps[t] = gates_of_step(x[t], h, c, w, case.spec, step)
            h, c = reference.cell(x[t], h, c, w, case.spec, step)
            if "lengths" in ragged_of:
                dead = (t >= ragged_of["lengths"])[:, None]
                steps[t] = [gate.masked_fill(dead, 0) for gate in steps[t]]
                h, c = torch.where(dead, kept[0], h), torch.where(dead, kept[1], c)
        found.append([torch.stack(gate) for gate in zip(*(steps[t] for t in range(case.T)), strict=True)])
    return [torch.cat(parts, -1) for parts in zip(*found, strict=True)]


def gates_of_step(x, h, c, w, spec, step):
    """i, f, g and o of one step, each by its own definition, from what it reads."""
    a = spec.split_gates(
        reference.product(x, w.weight_ih, w.bias_ih, w.weight_ln_ih)
        + reference.product(step.drop_hidden(h), w.weight_hh, w.bias_hh, w.weight_ln_hh)
    )
    v = spec.split_peephole(w.weight_ch) if spec.peephole else {}

    def gate(name, read):
        if name not in a:
            return 0 * c + 1
        look = 0 if name not in v else read @ v[name].t() if spec.full else v[name] * read
        return torch.sigmoid(a[name] + look)

    f = gate("f", c)
    i = 1 - f if spec.coupled else gate("i", c)
    g = a["g"] if spec.identity_input else a["g"].tanh()
    made = step.clip_cell(f * c + i * step.drop_candidate(g))
    return i, f, g, gate("o", made if spec.output_current else c)


def called(case, x, h_0, c_0, *weights):
    """The gates as the library returns them, behind the other results."""
    *results, gates = functional.lstm(
        laid_out(case, x), (h_0, c_0), weights, num_layers=case.L, bias=case.bias, bidirectional=case.bidirectional,
        proj_size=case.proj_size, strategy=case.strategy, return_cell_states=case.states, return_gates=True,
        **case.spec.options, **case.regularization, **ragged(case),
    )  # fmt: skip
    assert len(results) == 2 + case.states and isinstance(gates, Gates)
    return gates


def with_gradients(function, case, inputs):
    """The gates, and the gradients of their product with random numbers by every input."""
    torch.manual_seed(MASKS)
    gates = function(case, *inputs.values())
    generator = torch.Generator().manual_seed(3)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in gates]
    found = torch.autograd.grad(list(gates), list(inputs.values()), grads, materialize_grads=True)
    return dict(zip("ifgo", gates, strict=True)) | {f"grad {name}": g for name, g in zip(inputs, found, strict=True)}


SPECS = [*VARIANTS, *NORMALIZED[::3], *ABLATIONS]
CASES = [Case(spec, T=T, B=B, I=I, H=H, states=n % 2 == 0, **BOTH) for n, spec in enumerate(SPECS)]
CASES += [
    Case(
        spec,
        T=T,
        B=B,
        I=I,
        H=H,
        lengths=n % 2 == 0,
        resets=n % 3 < 2,
        proj_size=4 * (n % 2),
        rules=RULES[n % 5],
        **BOTH,
    )
    for n, spec in enumerate(SPECS)
]
CASES += [Case(VARIANTS[2], T=T, B=B, I=I, H=H, rules=RULES[3], training=False, bias=False), Case(VARIANTS[0], T=1)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gates_and_their_gradients_are_the_equations(case):
    inputs = random_inputs(case)
    found = with_gradients(called, case, inputs)
    for name, value in with_gradients(expected_gates, case, inputs).items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}")


def test_the_other_results_are_what_they_are_without():
    torch.manual_seed(0)
    lstm = CoupledLSTM(I, H, 2, bidirectional=True, peephole="diagonal", recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    found = []
    for options in (dict(), dict(return_gates=True)):
        torch.manual_seed(1)
        found.append(lstm(x, return_cell_states=True, **options))
    (output, states, cells), (*others, gates) = found
    assert torch.equal(output, others[0]) and torch.equal(cells, others[2])
    assert all(map(torch.equal, states, others[1])) and torch.equal(gates.i, 1 - gates.f)


def test_they_are_laid_out_as_the_output():
    lstm = LSTM(I, H, batch_first=True, bidirectional=True)
    x, lengths = torch.randn(B, T, I), torch.tensor([2, 5, 3])
    _, _, cells, gates = lstm(x, lengths=lengths, return_cell_states=True, return_gates=True)
    assert all(gate.shape == (B, T, 2 * H) for gate in gates)
    beyond = torch.arange(T) >= lengths[:, None]
    assert all(not gate[beyond].any() and gate[~beyond].all() for gate in (*gates, cells))
    _, _, of_packed = lstm(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False), return_gates=True)
    for gate, expected in zip(of_packed, gates, strict=True):
        torch.testing.assert_close(pad_packed_sequence(gate, batch_first=True)[0], expected)
    _, _, alone = lstm(x[1], return_gates=True)
    torch.testing.assert_close(torch.stack(alone), torch.stack(gates)[:, 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_in_other_types_they_are_near(dtype):
    case = Case(LSTMSpec(peephole="full", output_peephole="current"), T=9, B=3, I=5, H=11, dtype=dtype)
    inputs = random_inputs(case)
    double = {name: t.detach().double() for name, t in inputs.items()}
    for found, expected in zip(called(case, *inputs.values()), expected_gates(case, *double.values()), strict=True):
        assert found.dtype == dtype and (found - expected).abs().max() < 8 * torch.finfo(dtype).eps


def test_they_make_the_cell_states_of_the_next_step():
    torch.manual_seed(0)
    lstm = LSTM(I, H).double()
    output, _, cells, (i, f, g, o) = lstm(torch.randn(T, B, I).double(), return_cell_states=True, return_gates=True)
    torch.testing.assert_close(cells[1:], (f * cells.roll(1, 0) + i * g)[1:])
    torch.testing.assert_close(output, o * cells.tanh())


@pytest.mark.parametrize("options", [dict(), dict(peephole="diagonal", zoneout=(0.2, 0.1))], ids=str)
def test_compiled_calls_return_them(options):
    torch.manual_seed(0)
    lstm = LSTM(I, H, **options).eval()
    x = torch.randn(T, B, I)
    _, _, expected = lstm(x, return_gates=True)
    _, _, found = torch.compile(lstm, fullgraph=True, backend="aot_eager")(x, return_gates=True)
    torch.testing.assert_close(list(found), list(expected))


def test_torch_func_and_captured_calls_return_them():
    lstm = LSTM(I, H, peephole="diagonal").double()
    x = torch.randn(2, T, B, I, dtype=torch.float64)
    expected = torch.stack([torch.stack(lstm(own, return_gates=True)[2]) for own in x])
    found = torch.func.vmap(lambda own: torch.stack(lstm(own, return_gates=True)[2]))(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.stack(lstm.captured()(x[0], return_gates=True)[2]), expected[0])


def test_what_cannot_return_them_says_so():
    lstm, x = LSTM(I, H), torch.randn(T, B, I)
    with pytest.raises(TypeError, match="return_gates should be of type bool, got: int"):
        lstm(x, return_gates=1)
    with pytest.raises(TypeError, match="return_gates should be of type bool, got: str"):
        lstm.captured()(x, return_gates="all")
    lstm.strategy = "cudnn"
    with pytest.raises(RuntimeError, match="cudnn"):
        lstm(x, return_gates=True)
    assert "return_gates" in routing_reason()


def routing_reason():
    """Why PyTorch's operator does not compute a call that asks for gates."""
    layer = lstm_triton.routing.Layer(LSTMSpec(), T, B, H, 1, torch.float32)
    return lstm_triton.routing.why_not_operator(torch.device("cuda"), layer, ("return_gates",))
