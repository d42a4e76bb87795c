"""Regularised steps: masks and their statistics, the equations on the `torch` backend, what they compose with."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from lstm_triton_kernels.regularize import (
    CANDIDATE,
    HIDDEN_STREAM,
    ZONEOUT_C,
    ZONEOUT_H,
    Rules,
    drawn,
    events,
    keep_scale,
    philox,
    step_codes,
)
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from lstm_triton import LSTM, VARIANTS, CoupledLSTM, LSTMCell, LSTMSpec, PeepholeLSTM, convert, functional
from tests.support.parity import (
    RULES,
    Case,
    assert_parity,
    call,
    random_inputs,
    regularized_cases,
)

CASES = [case for spec in VARIANTS for case in regularized_cases(spec)]
SEED = torch.tensor([2**40 + 12345])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend_matches_the_reference(case):
    assert_parity(case, "torch")


@pytest.mark.parametrize("case", [case for n, case in enumerate(CASES) if n % 9 == 0], ids=str)
def test_recomputed_gates_give_the_same_gradients(case, monkeypatch):
    lstm = functional.lstm
    monkeypatch.setattr(functional, "lstm", lambda *given, **options: lstm(*given, **options, recompute=True))
    assert_parity(case, "torch")


# Masks.


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0_A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_words_of_its_authors(counter, key, words):
    """The known answers of Random123 for philox4x32-10."""
    assert tuple(map(int, philox(torch.tensor(key), *map(torch.tensor, counter)))) == words


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("stream", [0, 1, 2, HIDDEN_STREAM])
def test_an_event_has_its_probability(rate, stream):
    found = events(SEED, stream, rate, 2, 30, 17, 101)
    deviation = (rate * (1 - rate) / found.numel()) ** 0.5
    assert abs(found.double().mean() - rate) <= 4 * deviation


def test_events_are_independent_of_each_other():
    """Of neighbours along each axis, and of the same element of other masks, as many coincide as chance has it."""
    rate = 0.3
    masks = [events(SEED, stream, rate, 2, 40, 32, 64) for stream in (0, 1, 2)]
    pairs = [(masks[0][(slice(None),) * d + (slice(1, None),)], masks[0].narrow(d, 0, masks[0].shape[d] - 1))
             for d in range(4)]  # fmt: skip
    pairs += [*pairwise(masks), (masks[0], events(SEED + 1, 0, rate, 2, 40, 32, 64))]
    for one, other in pairs:
        both, n = (one & other).double().mean(), one.numel()
        assert abs(both - rate**2) <= 4.5 * (rate**2 * (1 - rate**2) / n) ** 0.5


def test_masks_do_not_depend_on_the_sizes_around_them():
    whole = step_codes(RULES[4], SEED, 2, 7, 6, 10)
    part = step_codes(RULES[4], SEED, 1, 4, 5, 7)
    assert torch.equal(whole[:1, :4, :5, :7], part)
    assert whole.unique().tolist() == sorted({a | b | c for a in (0, CANDIDATE) for b in (0, ZONEOUT_H)
                                              for c in (0, ZONEOUT_C)})  # fmt: skip


def test_a_mask_of_dropout_keeps_the_mean():
    rules = Rules.rounded(0.25, 0, 0, 0, 0, 0)
    hidden = drawn(rules, SEED, 2, 3, 50, 64, 64, torch.float32).hidden
    assert hidden.unique().tolist() == [0.0, keep_scale(0.25)] and keep_scale(0.25) == pytest.approx(4 / 3)
    assert hidden.mean().item() == pytest.approx(1.0, abs=0.03)


# What the options do.


def lstm_of(**options):
    torch.manual_seed(0)
    return LSTM(5, 8, dtype=torch.float64, **options)


X = torch.randn(9, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
STATES = tuple(torch.randn(1, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (2, 3))


def test_the_generator_decides_and_evaluation_does_not_ask_it():
    lstm = lstm_of(recurrent_dropout=0.5, zoneout=(0.2, 0.2))
    torch.manual_seed(3)
    first, second = lstm(X)[0], lstm(X)[0]
    torch.manual_seed(3)
    assert torch.equal(lstm(X)[0], first) and not torch.equal(second, first)
    before = torch.get_rng_state()
    evaluated = lstm.eval()(X)[0]
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(lstm(X)[0], evaluated)


@pytest.mark.parametrize("on", ["hidden", "candidate"])
def test_dropout_alone_leaves_evaluation_as_it_was(on):
    lstm, plain = lstm_of(recurrent_dropout=0.4, recurrent_dropout_on=on, weight_dropout=0.3), lstm_of()
    assert torch.equal(lstm.eval()(X)[0], plain(X)[0])
    assert str(lstm.explain(X)) == str(plain.explain(X))


def test_every_h_dropped_is_no_recurrent_product():
    lstm, plain = lstm_of(recurrent_dropout=1.0), lstm_of()
    torch.nn.init.zeros_(plain.weight_hh_l0)
    torch.testing.assert_close(lstm(X, STATES)[0], plain(X, STATES)[0])


def test_every_candidate_dropped_leaves_what_the_forget_gate_keeps():
    lstm = lstm_of(recurrent_dropout=1.0, recurrent_dropout_on="candidate")
    cells = lstm(X, STATES, return_cell_states=True)[2]
    assert (cells.abs().diff(dim=0) < 0).all() and (cells.sign() == STATES[1].sign()).all()


def test_all_zoned_out_keeps_the_states():
    _, states = lstm_of(zoneout=(1.0, 1.0))(X, STATES)
    assert torch.equal(states[0], STATES[0]) and torch.equal(states[1], STATES[1])


def test_zoneout_keeps_as_many_elements_as_it_should():
    output, _, cells = lstm_of(zoneout=(0.3, 0.1))(X.expand(300, 9, 4, 5).flatten(0, 1), return_cell_states=True)
    for states, rate in ((output, 0.3), (cells, 0.1)):
        assert (states[1:] == states[:-1]).double().mean().item() == pytest.approx(rate, abs=0.01)


def test_evaluated_zoneout_is_its_expectation():
    """Krueger et al. 2017: the mean of what training draws, here with PyTorch's own cell."""
    lstm, cell = lstm_of(zoneout=(0.3, 0.1)).eval(), torch.nn.LSTMCell(5, 8, dtype=torch.float64)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    h, c = STATES[0][0], STATES[1][0]
    for x_t, h_t in zip(X, lstm(X, STATES)[0], strict=True):
        h_new, c_new = cell(x_t, (h, c))
        h, c = 0.3 * h + 0.7 * h_new, 0.1 * c + 0.9 * c_new
        torch.testing.assert_close(h_t, h, atol=1e-7, rtol=0)  # a rate is a float32 number


def test_clips_as_tensorflow_does():
    """`tf.compat.v1.nn.rnn_cell.LSTMCell`: c is clipped before the output's tanh, a projected h after the product."""
    lstm = lstm_of(cell_clip=0.125, proj_clip=0.0625, proj_size=3)
    w = dict(lstm.named_parameters())
    h, c = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, 8, dtype=torch.float64)
    output, (_, c_n) = lstm(X)
    for x_t, h_t in zip(X, output, strict=True):
        a = x_t @ w["weight_ih_l0"].t() + h @ w["weight_hh_l0"].t() + w["bias_ih_l0"] + w["bias_hh_l0"]
        i, f, g, o = a.chunk(4, 1)
        c = (f.sigmoid() * c + i.sigmoid() * g.tanh()).clamp(-0.125, 0.125)
        h = ((o.sigmoid() * c.tanh()) @ w["weight_hr_l0"].t()).clamp(-0.0625, 0.0625)
        torch.testing.assert_close(h_t, h)
    assert (c_n.abs() == 0.125).any() and (output.abs() == 0.0625).any()


def test_what_is_clipped_has_no_gradient():
    lstm = LSTM(1, 1, dtype=torch.float64, cell_clip=0.5)
    c_0 = torch.tensor([[[3.0]]], dtype=torch.float64, requires_grad=True)
    lstm(torch.zeros(1, 1, 1, dtype=torch.float64), (torch.zeros_like(c_0), c_0))[0].sum().backward()
    assert c_0.grad.item() == 0


def test_weight_dropout_is_dropout_of_the_recurrent_weights():
    lstm = lstm_of(weight_dropout=0.4, num_layers=2)
    torch.manual_seed(5)
    output = lstm(X)[0]
    torch.manual_seed(5)
    weights = {name: F.dropout(w, 0.4) if "_hh_" in name and "weight" in name else w for name, w in
               lstm.named_parameters()}  # fmt: skip
    plain = torch.func.functional_call(lstm_of(num_layers=2), weights, X)[0]
    torch.testing.assert_close(output, plain)
    output.sum().backward()
    for name in ("weight_hh_l0", "weight_hh_l1"):
        assert torch.equal(lstm.get_parameter(name).grad == 0, weights[name] == 0)


def test_a_cell_is_a_step_of_a_layer():
    cell = LSTMCell(5, 8, dtype=torch.float64, zoneout=(0.3, 0.2), cell_clip=0.3)
    lstm = lstm_of(zoneout=(0.3, 0.2), cell_clip=0.3)
    lstm.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    for mode in (True, False):
        results = []
        for module, x, states in ((cell.train(mode), X[0], [s[0] for s in STATES]), (lstm.train(mode), X[:1], STATES)):
            torch.manual_seed(2)
            results.append(module(x, states))
        torch.testing.assert_close(results[0], tuple(s[0] for s in results[1][1]))


# What they compose with.


EVERY = dict(recurrent_dropout=0.3, zoneout=(0.2, 0.1), cell_clip=0.5, num_layers=2, bidirectional=True)


def gradients(function, module, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(7)
    output = function(x)
    output.sin().sum().backward()
    found = [x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return [output.detach(), *found]


def test_packed_rows_are_rows_with_lengths():
    lstm, lengths = lstm_of(**EVERY), torch.tensor([9, 7, 4, 2])
    torch.manual_seed(4)
    packed = pad_packed_sequence(lstm(pack_padded_sequence(X, lengths))[0])[0]
    torch.manual_seed(4)
    torch.testing.assert_close(packed, lstm(X, lengths=lengths)[0])


def test_activation_checkpointing_draws_the_same_masks():
    lstm = lstm_of(**EVERY)
    plain = gradients(lambda x: lstm(x)[0], lstm, X)
    again = gradients(lambda x: checkpoint(lambda y: lstm(y)[0], x, use_reentrant=False), lstm, X)
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("options", [EVERY, dict(recurrent_dropout=0.5, recurrent_dropout_on="candidate")])
def test_compiles_into_one_graph(options):
    """Also with other rates than before, which torch.compile then takes as numbers that vary."""
    lstm = lstm_of(**options)
    compiled = torch.compile(lambda x: lstm(x)[0], fullgraph=True, backend="aot_eager")
    for rate in (0.3, 0.5, 0.25):
        lstm.recurrent_dropout = rate
        for one, other in zip(gradients(compiled, lstm, X), gradients(lambda x: lstm(x)[0], lstm, X), strict=True):
            torch.testing.assert_close(one, other)


def test_a_second_backward_pass_draws_the_same_masks():
    lstm = lstm_of(**EVERY)
    x = X.clone().requires_grad_()
    output = lstm(x)[0].sin().sum()
    one, other = (torch.autograd.grad(output, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("spec", [LSTMSpec(), LSTMSpec(True, "full", "current")], ids=lambda spec: spec.name)
def test_gradients_match_finite_differences(rules, spec):
    case = Case(spec, T=3, B=2, I=2, H=3, proj_size=2, rules=rules._replace(proj_clip=0.2, cell_clip=0.4))
    inputs = tuple(random_inputs(case).values())

    def function(*tensors):
        torch.manual_seed(6)
        return call(case, *tensors)

    assert torch.autograd.gradcheck(function, inputs, eps=1e-6, atol=1e-6)
    assert torch.autograd.gradgradcheck(function, inputs, eps=1e-6, atol=1e-5, fast_mode=True)


def test_vmap_asks_how_random_it_is():
    lstm = lstm_of(zoneout=(0.3, 0.2))
    xs = torch.stack([X, X])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(lambda x: lstm(x)[0])(xs)
    same = torch.func.vmap(lambda x: lstm(x)[0], randomness="same")(xs)
    different = torch.func.vmap(lambda x: lstm(x)[0], randomness="different")(xs)
    torch.testing.assert_close(same[0], same[1])
    assert not torch.equal(different[0], different[1])


def test_a_session_computes_the_expectation():
    lstm = lstm_of(zoneout=(0.3, 0.1), cell_clip=0.2)
    session = lstm.session(4)
    torch.testing.assert_close(torch.cat([session(X[:4]), session(X[4:])]), lstm.eval()(X)[0])


def test_forward_mode_has_the_masks():
    lstm = lstm_of(zoneout=(0.3, 0.1))
    tangent = torch.randn_like(X)

    def function(x):
        torch.manual_seed(8)
        return lstm(x)[0]

    _, along = torch.func.jvp(function, (X,), (tangent,))
    _, vjp = torch.func.vjp(function, X)
    cotangent = torch.randn_like(along)
    torch.testing.assert_close((along * cotangent).sum(), (vjp(cotangent)[0] * tangent).sum())


# Modules.


def test_options_are_attributes_that_stay_and_show():
    options = dict(
        recurrent_dropout=0.1, recurrent_dropout_on="candidate", zoneout=(0.2, 0.3), weight_dropout=0.4,
        cell_clip=3.0, proj_clip=2.0, proj_size=4, layer_norm=True, forget_bias=1.0,
    )  # fmt: skip
    for kind in (LSTM, CoupledLSTM, PeepholeLSTM):
        lstm = kind(5, 8, **options)
        for module in (lstm, copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
            assert all(getattr(module, name) == value for name, value in options.items())
            assert all(f"{name}={value!r}" in repr(module) for name, value in options.items())
    assert repr(LSTM(5, 8)) == "LSTM(5, 8, lstm_triton)"
    lstm = LSTM(5, 8)
    lstm.zoneout = (1.0, 1.0)
    assert torch.equal(lstm(torch.randn(3, 2, 5))[0], torch.zeros(3, 2, 8))


def test_conversion_refuses_what_pytorch_does_not_have():
    with pytest.raises(ValueError, match=r"has zoneout, cell_clip, which PyTorch does not have"):
        convert.to_torch(LSTM(5, 8, zoneout=(0.1, 0.0), cell_clip=1.0))
    lstm = convert.from_torch(torch.nn.LSTM(5, 8))
    assert lstm.zoneout == (0.0, 0.0) and lstm.cell_clip is None and not lstm.regularization
    assert type(convert.to_torch(LSTM(5, 8, forget_bias=1.0))) is torch.nn.LSTM


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(recurrent_dropout=1.5), r"recurrent_dropout should be a number in range \[0, 1\], got 1.5"),
        (dict(recurrent_dropout=True), "recurrent_dropout should be a number"),
        (dict(recurrent_dropout=float("nan")), "recurrent_dropout should be a number"),
        (dict(recurrent_dropout_on="cell"), "recurrent_dropout_on must be 'hidden' or 'candidate', got 'cell'"),
        (dict(zoneout=0.1), "zoneout must be two probabilities, of h and of c, got 0.1"),
        (dict(zoneout=(0.1, 0.2, 0.3)), "zoneout must be two probabilities"),
        (dict(zoneout=(0.1, -0.2)), "zoneout should be a number in range"),
        (dict(weight_dropout=-1), "weight_dropout should be a number in range"),
        (dict(cell_clip=0), "cell_clip should be a positive number or None, got 0"),
        (dict(cell_clip=float("inf")), "cell_clip should be a positive number"),
        (dict(proj_clip=1.0), "proj_clip limits a projected hidden state: it needs proj_size"),
        (dict(proj_clip="1", proj_size=4), "proj_clip should be a positive number"),
        (dict(forget_bias="1"), "forget_bias should be a number or None"),
        (dict(forget_bias=1.0, bias=False), "forget_bias sets biases: it needs bias=True"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LSTM(5, 8, **options)
    lstm = LSTM(5, 8, proj_size=options.pop("proj_size", 0))
    for name, value in options.items():
        setattr(lstm, name, value)
    if not {"forget_bias", "bias"} & set(options):
        with pytest.raises(ValueError, match=message):
            lstm(torch.randn(2, 3, 5))


def test_cudnn_says_that_it_has_no_such_steps():
    x = torch.randn(3, 2, 5)
    with pytest.raises(RuntimeError, match="strategy 'cudnn' cannot run here"):
        LSTM(5, 8, zoneout=(0.1, 0.1), strategy="cudnn")(x)
    with pytest.raises(ValueError, match="computes no layer normalisation"):
        LSTM(5, 8, layer_norm=True, strategy="cudnn")
