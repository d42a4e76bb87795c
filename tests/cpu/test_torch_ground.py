"""The ground that PyTorch's own tests cover for `nn.LSTM` and `nn.LSTMCell`: one test code, two imports.

Every test takes `nn`, once `torch.nn` and once `lstm_triton`, and asserts what `torch.nn` does. Sizes: I = 5 inputs,
H = 7 units, P = 3 with a projection, T = 6 steps, B = 4 rows unless a test says otherwise; float64 where numbers are
compared.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from torch.nn import Linear, Module, ModuleDict, ModuleList, Parameter, Sequential
from torch.nn.utils import (
    clip_grad_norm_,
    parameters_to_vector,
    parametrizations,
    parametrize,
    prune,
    vector_to_parameters,
)
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

import lstm_triton

I, H, P, T, B = 5, 7, 3, 6, 4  # noqa: E741
GATES = 4 * H

OPTIONS = [
    dict(),
    dict(num_layers=3),
    dict(bidirectional=True),
    dict(num_layers=2, bidirectional=True, bias=False),
    dict(proj_size=P),
    dict(num_layers=2, bidirectional=True, proj_size=P, batch_first=True),
]


@pytest.fixture(params=[torch.nn, lstm_triton], ids=["torch.nn", "lstm_triton"])
def nn(request):
    """Where LSTM and LSTMCell come from."""
    return request.param


def library(nn):
    """What a representation ends with: this library's classes say whose they are."""
    return ", lstm_triton" if nn is lstm_triton else ""


def randn(*shape, **options):
    return torch.randn(shape, dtype=torch.float64, **options)


def layer(nn, **options):
    return nn.LSTM(I, H, dtype=torch.float64, **options)


def cell(nn, **options):
    return nn.LSTMCell(I, H, dtype=torch.float64, **options)


def sizes(num_layers=1, bidirectional=False, proj_size=0, **_):
    """D, D·L and P of those options."""
    D = 2 if bidirectional else 1
    return D, D * num_layers, proj_size or H


def states(rows=B, **options):
    """(h_0, c_0) for those options; rows=None for unbatched input."""
    _, DL, hidden = sizes(**options)
    batch = () if rows is None else (rows,)
    return randn(DL, *batch, hidden), randn(DL, *batch, H)


def sequence(rows=B, steps=T, batch_first=False, **_):
    return randn(rows, steps, I) if batch_first else randn(steps, rows, I)


def flat(result):
    """output, h_n, c_n."""
    output, (h_n, c_n) = result
    return output, h_n, c_n


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def loss(tensors):
    """A scalar in which every element has another weight."""
    return sum((t * torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype).reshape(t.shape)).sum() for t in tensors)


def gradients(tensors, of):
    return torch.autograd.grad(loss(tensors), of)


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class Output(Module):
    """The output of an LSTM, without the states."""

    def forward(self, result):
        return result[0]


# Construction


def test_sizes_have_no_default(nn):
    for build in (nn.LSTM, nn.LSTMCell):
        with pytest.raises(TypeError):
            build(I)


def test_arguments_are_taken_by_position(nn):
    lstm = nn.LSTM(I, H, 2, False, True, 0.25, True, P, "cpu", torch.float64)
    assert (lstm.input_size, lstm.hidden_size, lstm.num_layers) == (I, H, 2)
    assert (lstm.bias, lstm.batch_first, lstm.dropout, lstm.bidirectional) == (False, True, 0.25, True)
    assert lstm.proj_size == P and lstm.mode == "LSTM" and lstm.weight_hr_l1_reverse.dtype == torch.float64
    one = nn.LSTMCell(I, H, False, "cpu", torch.float64)
    assert (one.input_size, one.hidden_size, one.bias) == (I, H, False) and one.weight_ih.dtype == torch.float64


def test_a_dropout_without_effect_is_warned_of(nn):
    with pytest.warns(UserWarning, match=r"dropout option adds dropout after all but last.*dropout=0\.5"):
        nn.LSTM(I, H, dropout=0.5)
    with no_warning():
        nn.LSTM(I, H, 2, dropout=0.5)
        nn.LSTM(I, H)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_have_their_names_shapes_and_order(nn, options):
    D, _, hidden = sizes(**options)
    expected = []
    for n in range(options.get("num_layers", 1)):
        for suffix in ("", "_reverse")[:D]:
            expected.append((f"weight_ih_l{n}{suffix}", (GATES, D * hidden if n else I)))
            expected.append((f"weight_hh_l{n}{suffix}", (GATES, hidden)))
            if options.get("bias", True):
                expected += [(f"bias_ih_l{n}{suffix}", (GATES,)), (f"bias_hh_l{n}{suffix}", (GATES,))]
            if "proj_size" in options:
                expected.append((f"weight_hr_l{n}{suffix}", (P, H)))
    lstm = nn.LSTM(I, H, **options)
    assert [(name, tuple(p.shape)) for name, p in lstm.named_parameters()] == expected
    assert list(lstm.state_dict()) == [name for name, _ in expected]
    assert list(lstm.buffers()) == [] and list(lstm.children()) == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_weights_lists_the_parameters_by_layer_and_direction(nn, options):
    lstm = nn.LSTM(I, H, **options)
    _, DL, _ = sizes(**options)
    groups, parameters = lstm.all_weights, list(lstm.parameters())
    assert [len(group) for group in groups] == [len(parameters) // DL] * DL
    assert all(a is b for a, b in zip((w for group in groups for w in group), parameters, strict=True))
    lstm.weight_hh_l0 = Parameter(torch.zeros_like(lstm.weight_hh_l0))
    assert lstm.all_weights[0][1] is lstm.weight_hh_l0


def test_a_cell_has_its_parameters_and_without_bias_none_of_them(nn):
    shapes = dict(weight_ih=(GATES, I), weight_hh=(GATES, H), bias_ih=(GATES,), bias_hh=(GATES,))
    assert {name: tuple(p.shape) for name, p in nn.LSTMCell(I, H).named_parameters()} == shapes
    bare = nn.LSTMCell(I, H, bias=False)
    assert list(bare.state_dict()) == ["weight_ih", "weight_hh"] and bare.bias_ih is None and bare.bias_hh is None


def test_initial_values_are_uniform_within_one_over_the_root_of_hidden_size(nn):
    for module in (nn.LSTM(23, 36, 2, proj_size=5), nn.LSTMCell(23, 36)):
        values = parameters_to_vector(module.parameters())
        assert values.abs().max() <= 1 / 6 and values.abs().max() > 0.99 / 6
        assert abs(values.mean()) < 0.005 and abs(values.std() - 1 / 6 / 3**0.5) < 0.005


def test_a_seed_gives_the_same_parameters_and_a_reset_others(nn):
    for build in (lambda: nn.LSTM(I, H, 2), lambda: nn.LSTMCell(I, H)):
        torch.manual_seed(4)
        one = build()
        torch.manual_seed(4)
        two = build()
        before = parameters_to_vector(one.parameters()).clone()
        assert torch.equal(before, parameters_to_vector(two.parameters()))
        assert one.reset_parameters() is None
        assert not torch.isclose(before, parameters_to_vector(one.parameters())).any()


def test_device_and_type_of_the_parameters_are_those_asked_for(nn):
    for build in (nn.LSTM, nn.LSTMCell):
        module = build(I, H, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in nn.LSTM(I, H).parameters()} == {torch.float64}
        with torch.device("meta"):
            assert nn.LSTMCell(I, H).weight_ih.is_meta
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(), "LSTM(5, 7)"),
        (dict(num_layers=2, dropout=0.5), "LSTM(5, 7, num_layers=2, dropout=0.5)"),
        (dict(proj_size=3, bias=False), "LSTM(5, 7, proj_size=3, bias=False)"),
        (dict(batch_first=True, bidirectional=True), "LSTM(5, 7, batch_first=True, bidirectional=True)"),
    ],
    ids=str,
)
def test_repr_of_a_layer_shows_what_is_not_a_default(nn, options, text):
    lstm, text = nn.LSTM(I, H, **options), text.replace(")", f"{library(nn)})")
    assert repr(lstm) == text and f"LSTM({lstm.extra_repr()})" == text
    assert repr(Sequential(lstm)) == f"Sequential(\n  (0): {text}\n)"


def test_repr_of_a_cell_shows_what_is_not_a_default(nn):
    assert repr(nn.LSTMCell(I, H)) == f"LSTMCell(5, 7{library(nn)})"
    assert repr(nn.LSTMCell(I, H, bias=False)) == f"LSTMCell(5, 7, bias=False{library(nn)})"


# The equations


def test_a_cell_computes_the_equations_with_gates_in_the_order_i_f_g_o(nn):
    lstm, x, h, c = cell(nn), randn(B, I), randn(B, H), randn(B, H)
    i, f, g, o = (x @ lstm.weight_ih.T + lstm.bias_ih + h @ lstm.weight_hh.T + lstm.bias_hh).chunk(4, 1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    close(lstm(x, (h, c)), (o.sigmoid() * new_c.tanh(), new_c))


def test_a_layer_computes_its_cell_step_by_step(nn):
    lstm, one = layer(nn), cell(nn)
    one.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x, (h, c) = sequence(), states()
    output, (h_n, c_n) = lstm(x, (h, c))
    h, c = h[0], c[0]
    for t in range(T):
        h, c = one(x[t], (h, c))
        close(output[t], h)
    close((h_n[0], c_n[0]), (h, c))


def test_a_projected_layer_multiplies_each_hidden_state(nn):
    lstm, x, (h, c) = layer(nn, proj_size=P), sequence(steps=2), states(proj_size=P)
    output, (h_n, c_n) = lstm(x, (h, c))
    h, c = h[0], c[0]
    for t in range(2):
        i, f, g, o = (x[t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0).chunk(
            4, 1
        )
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = (o.sigmoid() * c.tanh()) @ lstm.weight_hr_l0.T
        close(output[t], h)
    close((h_n[0], c_n[0]), (h, c))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layers_are_stacked_and_directions_concatenated(nn, bias):
    both = layer(nn, num_layers=2, bidirectional=True, bias=bias)
    x, (h, c) = sequence(), states(num_layers=2, bidirectional=True)
    inputs, last = x, []
    for n in range(2):
        outputs = []
        for direction, suffix in enumerate(("", "_reverse")):
            single = nn.LSTM(inputs.size(-1), H, bias=bias, dtype=torch.float64)
            names = [name for name, _ in single.named_parameters()]
            single.load_state_dict({name: getattr(both, name[:-1] + str(n) + suffix) for name in names})
            k = 2 * n + direction
            steps = inputs.flip(0) if direction else inputs
            output, final = single(steps, (h[k : k + 1], c[k : k + 1]))
            outputs.append(output.flip(0) if direction else output)
            last.append(final)
        inputs = torch.cat(outputs, -1)
    expected = inputs, torch.cat([h_n for h_n, _ in last]), torch.cat([c_n for _, c_n in last])
    close(flat(both(x, (h, c))), expected)


def test_a_layer_without_bias_is_one_whose_biases_are_zero(nn):
    without, zero = layer(nn, bias=False, num_layers=2), layer(nn, num_layers=2)
    with torch.no_grad():
        for p in zero.parameters():
            p.zero_()
    assert set(zero.load_state_dict(without.state_dict(), strict=False).missing_keys) == {
        f"bias_{kind}_l{n}" for kind in ("ih", "hh") for n in range(2)
    }
    x = sequence()
    close(flat(zero(x)), flat(without(x)))


# Shapes and states


@pytest.mark.parametrize("steps, rows", [(T, B), (1, B), (T, 1), (1, 1)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_states_have_their_shapes(nn, options, steps, rows):
    D, DL, hidden = sizes(**options)
    output, (h_n, c_n) = layer(nn, **options)(sequence(rows, steps, **options))
    assert output.shape == ((rows, steps, D * hidden) if options.get("batch_first") else (steps, rows, D * hidden))
    assert h_n.shape == (DL, rows, hidden) and c_n.shape == (DL, rows, H)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_no_states_are_states_of_zeros(nn, options):
    lstm, x = layer(nn, **options), sequence(**options)
    zeros = [torch.zeros_like(s) for s in states(**options)]
    expected = flat(lstm(x))
    for given in (None, tuple(zeros), list(zeros)):
        close(flat(lstm(x, given)), expected)
    assert not torch.allclose(flat(lstm(x, states(**options)))[0], expected[0])


def test_no_states_are_states_of_zeros_for_a_cell(nn):
    one, x, zeros = cell(nn), randn(B, I), torch.zeros(B, H, dtype=torch.float64)
    for given in (None, (zeros, zeros), [zeros, zeros]):
        close(tuple(one(x, given)), tuple(one(x)))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_unbatched_sequence_is_a_batch_of_one(nn, options):
    lstm, x, (h, c) = layer(nn, **options), randn(T, I), states(None, **options)
    batch = 0 if options.get("batch_first") else 1
    for given, batched in ((None, None), ((h, c), (h[:, None], c[:, None]))):
        output, h_n, c_n = flat(lstm(x.unsqueeze(batch), batched))
        actual = flat(lstm(x, given))
        assert actual[0].shape == (T, output.shape[-1])
        close(actual, (output.squeeze(batch), h_n.squeeze(1), c_n.squeeze(1)))


def test_an_unbatched_cell_is_a_batch_of_one(nn):
    one, x, h, c = cell(nn), randn(I), randn(H), randn(H)
    for given, batched in ((None, None), ((h, c), (h[None], c[None]))):
        h_1, c_1 = one(x, given)
        assert h_1.shape == c_1.shape == (H,)
        close((h_1, c_1), tuple(s[0] for s in one(x[None], batched)))


def test_batch_first_changes_the_layout_of_the_sequence_only(nn):
    first, last = layer(nn, batch_first=True, num_layers=2), layer(nn, num_layers=2)
    last.load_state_dict(first.state_dict())
    x, hx = sequence(), states(num_layers=2)
    output, (h_n, c_n) = first(x.transpose(0, 1), hx)
    close((output.transpose(0, 1), h_n, c_n), flat(last(x, hx)))
    first.batch_first = False
    close(flat(first(x, hx)), flat(last(x, hx)))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[4]], ids=str)
def test_rows_of_a_batch_do_not_see_each_other(nn, options):
    lstm, x, (h, c) = layer(nn, **options), sequence(), states(**options)
    output, (h_n, c_n) = lstm(x, (h, c))
    for row in range(B):
        close(flat(lstm(x[:, row], (h[:, row], c[:, row]))), (output[:, row], h_n[:, row], c_n[:, row]))


def test_a_sequence_in_pieces_is_the_whole_sequence(nn):
    lstm, x, hx = layer(nn, num_layers=2, proj_size=P), sequence(), states(num_layers=2, proj_size=P)
    expected = flat(lstm(x, hx))
    pieces = []
    for piece in x.split([1, 3, 2]):
        output, hx = lstm(piece, hx)
        pieces.append(output)
    close((torch.cat(pieces), *hx), expected)
    close(gradients([torch.cat(pieces), *hx], list(lstm.parameters())), gradients(expected, list(lstm.parameters())))


def test_steps_and_layers_end_in_the_last_states(nn):
    output, (h_n, _) = layer(nn, num_layers=2, bidirectional=True)(sequence())
    assert torch.equal(output[-1, :, :H], h_n[2]) and torch.equal(output[0, :, H:], h_n[3])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_batch_of_no_rows_gives_no_rows_and_gradients_of_zero(nn, options):
    lstm = layer(nn, **options)
    D, DL, hidden = sizes(**options)
    output, (h_n, c_n) = lstm(sequence(rows=0, **options))
    assert output.shape == ((0, T, D * hidden) if options.get("batch_first") else (T, 0, D * hidden))
    assert h_n.shape == (DL, 0, hidden) and c_n.shape == (DL, 0, H)
    (output.sum() + h_n.sum() + c_n.sum()).backward()
    assert all(not p.grad.any() for p in lstm.parameters())


def test_a_cell_on_no_rows_gives_no_rows_and_gradients_of_zero(nn):
    one = cell(nn)
    h, c = one(randn(0, I), (randn(0, H), randn(0, H)))
    assert h.shape == c.shape == (0, H)
    (h.sum() + c.sum()).backward()
    assert all(not p.grad.any() for p in one.parameters())


# The checks of the base class, and what a refusal leaves


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_expected_sizes_of_the_states_can_be_asked_for(nn, options):
    lstm, x = layer(nn, **options), sequence(**options)
    _, DL, hidden = sizes(**options)
    assert lstm.get_expected_hidden_size(x, None) == (DL, B, hidden)
    assert lstm.get_expected_cell_size(x, None) == (DL, B, H)
    packed = pack_sequence([randn(n, I) for n in (4, 2, 1)])
    assert lstm.get_expected_hidden_size(packed.data, packed.batch_sizes) == (DL, 3, hidden)
    assert lstm.get_expected_cell_size(packed.data, packed.batch_sizes) == (DL, 3, H)


def test_arguments_can_be_checked_without_a_call(nn):
    lstm, x, (h, c) = layer(nn), sequence(), states()
    packed = pack_sequence([randn(n, I) for n in (4, 2)])
    assert lstm.check_forward_args(x, (h, c), None) is None
    assert lstm.check_forward_args(packed.data, (h[:, :2], c[:, :2]), packed.batch_sizes) is None
    assert lstm.check_input(x, None) is None and lstm.check_input(packed.data, packed.batch_sizes) is None
    assert lstm.check_hidden_size(h, (1, B, H)) is None
    with pytest.raises(RuntimeError, match=r"^Expected hidden\[0\] size \(1, 4, 7\), got \[1, 3, 7\]$"):
        lstm.check_forward_args(x, (h[:, 1:], c), None)
    with pytest.raises(RuntimeError, match=r"^Expected hidden\[1\] size \(1, 2, 7\), got \[1, 4, 7\]$"):
        lstm.check_forward_args(packed.data, (h[:, :2], c), packed.batch_sizes)
    with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 2"):
        lstm.check_input(x[0], None)
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 3"):
        lstm.check_input(x, packed.batch_sizes)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size. Expected 5, got 4"):
        lstm.check_input(x[..., 1:], None)
    with pytest.raises(ValueError, match="does not match weight dtype"):
        lstm.check_input(x.float(), None)
    with pytest.raises(RuntimeError, match="input must have 3 dimensions, got 1"):
        lstm.check_input(randn(I + 1), None)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lstm.float().check_input(x.bfloat16(), None) is None
    with pytest.raises(RuntimeError, match=r"^Expected hidden size \(1, 4, 8\), got \[1, 4, 7\]$"):
        lstm.check_hidden_size(h, (1, B, 8))
    with pytest.raises(RuntimeError, match=r"^want \(2, 4, 7\), have \[1, 4, 7\]$"):
        lstm.check_hidden_size(h, (2, B, H), "want {}, have {}")


def test_states_are_permuted_along_their_rows(nn):
    lstm, (h, c) = layer(nn), states()
    order = torch.tensor([2, 0, 3, 1])
    permuted = lstm.permute_hidden((h, c), order)
    assert torch.equal(permuted[0], h[:, order]) and torch.equal(permuted[1], c[:, order])
    assert lstm.permute_hidden((h, c), None)[0] is h


def test_a_refused_call_leaves_the_layer_as_it_was(nn):
    lstm, x = layer(nn), sequence()
    expected = flat(lstm(x))
    for bad in (x[..., 1:], x.float(), x[:0]):
        with pytest.raises((RuntimeError, ValueError)):
            lstm(bad)
    close(flat(lstm(x)), expected)


# Packed sequences

LENGTHS = [([5, 5, 5], "equal"), ([6, 4, 3, 1], "sorted"), ([2, 6, 1, 4], "unsorted"), ([3], "one sequence"),
           ([1, 1, 1], "single steps"), ([1, 7, 7, 2], "ties")]  # fmt: skip


def runs_alone(lstm, sequences, hx):
    """The outputs of each sequence on its own, as a list, and h_n and c_n of all."""
    results = [lstm(s, None if hx is None else (hx[0][:, n], hx[1][:, n])) for n, s in enumerate(sequences)]
    return [r[0] for r in results], *(torch.stack([r[1][k] for r in results], 1) for k in range(2))


@pytest.mark.parametrize("with_states", [False, True], ids=["zero states", "given states"])
@pytest.mark.parametrize("lengths", [n for n, _ in LENGTHS], ids=[name for _, name in LENGTHS])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_sequences_are_as_each_on_its_own_in_outputs_and_gradients(nn, options, lengths, with_states):
    lstm = layer(nn, **options)
    sequences = [randn(n, I, requires_grad=True) for n in lengths]
    hx = tuple(s.requires_grad_() for s in states(len(lengths), **options)) if with_states else None
    packed = pack_sequence(sequences, enforce_sorted=False)
    output, (h_n, c_n) = lstm(packed, hx)
    assert isinstance(output, PackedSequence) and torch.equal(output.batch_sizes, packed.batch_sizes)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    padded, got = pad_packed_sequence(output)
    assert got.tolist() == lengths
    outputs, h_alone, c_alone = runs_alone(lstm, sequences, hx)
    close(padded, pad_sequence(outputs))
    close((h_n, c_n), (h_alone, c_alone))
    leaves = [*sequences, *lstm.parameters(), *(hx or ())]
    actual = gradients([padded, h_n, c_n], leaves)
    close(actual, gradients([pad_sequence(outputs), h_alone, c_alone], leaves))


def test_a_sorted_packing_has_no_indices_and_gets_none(nn):
    packed = pack_sequence([randn(n, I) for n in (4, 3, 1)])
    output, _ = layer(nn)(packed)
    assert packed.sorted_indices is None and output.sorted_indices is None and output.unsorted_indices is None


@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@pytest.mark.parametrize("enforce_sorted", [False, True], ids=["any order", "sorted"])
def test_a_padded_batch_goes_through_packing_and_back(nn, batch_first, enforce_sorted):
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    lstm = layer(nn, num_layers=2, bidirectional=True, batch_first=batch_first)
    x = sequence(batch_first=batch_first)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=batch_first, enforce_sorted=enforce_sorted)
    output, (h_n, _) = lstm(packed)
    padded, _ = pad_packed_sequence(output, batch_first=batch_first, padding_value=-9.0, total_length=T + 2)
    rows = padded if batch_first else padded.transpose(0, 1)
    assert rows.shape == (B, T + 2, 2 * H)
    for row, length, h_forward, h_backward in zip(rows, lengths, h_n[2], h_n[3], strict=True):
        assert (row[length:] == -9.0).all()
        assert torch.equal(row[length - 1, :H], h_forward) and torch.equal(row[0, H:], h_backward)


def test_padding_changes_nothing(nn):
    lstm, x, lengths = layer(nn, bidirectional=True), sequence(), torch.tensor([3, 6, 2, 5])
    other = x.clone()
    for row, length in enumerate(lengths):
        other[length:, row] = float("nan")
    results = [flat(lstm(pack_padded_sequence(v, lengths, enforce_sorted=False))) for v in (x, other)]
    assert torch.equal(results[0][0].data, results[1][0].data) and results[1][0].data.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_states_of_an_unsorted_packing_are_in_the_order_of_the_caller(nn):
    lstm, hx = layer(nn), states(3)
    lengths, order = [2, 5, 3], [1, 2, 0]
    sequences = [randn(n, I) for n in lengths]
    _, (h_n, c_n) = lstm(pack_sequence(sequences, enforce_sorted=False), hx)
    _, (h_sorted, c_sorted) = lstm(pack_sequence([sequences[n] for n in order]), tuple(s[:, order] for s in hx))
    close((h_n[:, order], c_n[:, order]), (h_sorted, c_sorted))


def test_equal_lengths_packed_are_the_padded_batch(nn):
    lstm, x, hx = layer(nn, num_layers=2), sequence(), states(num_layers=2)
    output, final = lstm(pack_padded_sequence(x, [T] * B), hx)
    expected = flat(lstm(x, hx))
    close((pad_packed_sequence(output)[0], *final), expected)


def test_a_packing_that_does_not_fit_is_refused(nn):
    lstm = layer(nn, num_layers=2)

    def packed(features=I, dtype=torch.float64):
        return pack_sequence([torch.zeros(n, features, dtype=dtype) for n in (3, 2)])

    with pytest.raises((RuntimeError, ValueError)):
        lstm(packed(dtype=torch.float32))
    with pytest.raises(RuntimeError):
        lstm(packed(features=I - 1))
    for shape in ((2, 3, H), (2, 2, H + 1), (1, 2, H)):
        with pytest.raises(RuntimeError):
            lstm(packed(), (randn(*shape), randn(*shape)))


def test_an_lstm_goes_through_packing_in_every_type_and_on_meta(nn):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        lstm = nn.LSTM(I, H, 2, bidirectional=True, dtype=dtype)
        output, (h_n, c_n) = lstm(pack_sequence([torch.ones(n, I, dtype=dtype) for n in (3, 2)]))
        assert {output.data.dtype, h_n.dtype, c_n.dtype} == {dtype}
    output, (h_n, _) = lstm.to("meta")(pack_sequence([torch.ones(n, I, dtype=dtype) for n in (3, 2)]).to("meta"))
    assert output.data.shape == (5, 2 * H) and output.data.is_meta and h_n.shape == (4, 2, H)


def test_dropout_falls_between_layers_of_packed_sequences_too(nn):
    lstm = layer(nn, num_layers=2, dropout=0.5)
    packed = pack_sequence([randn(n, I) for n in (4, 2, 1)])
    torch.manual_seed(1)
    one, _ = lstm(packed)
    torch.manual_seed(1)
    two, _ = lstm(packed)
    three, _ = lstm(packed)
    assert torch.equal(one.data, two.data) and not torch.allclose(one.data, three.data)
    lstm.eval()
    assert torch.equal(lstm(packed)[0].data, lstm(packed)[0].data)


def test_gradients_of_packed_sequences_are_the_differences(nn):
    lstm, lengths = nn.LSTM(2, 3, bidirectional=True, dtype=torch.float64), [1, 3, 2]
    x = randn(3, 3, 2, requires_grad=True)
    hx = [randn(2, 3, 3, requires_grad=True) for _ in range(2)]

    def run(x, h, c):
        output, final = lstm(pack_padded_sequence(x, lengths, enforce_sorted=False), (h, c))
        return output.data, *final

    assert torch.autograd.gradcheck(run, (x, *hx))


# Training and evaluation


@pytest.mark.parametrize("options", [dict(num_layers=2), dict(num_layers=3, bidirectional=True, proj_size=P)], ids=str)
def test_dropout_is_reproducible_in_training_and_absent_in_evaluation(nn, options):
    lstm, x = layer(nn, dropout=0.4, **options), sequence()
    torch.manual_seed(2)
    first = flat(lstm(x))
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, flat(lstm(x)), strict=True))
    assert not torch.allclose(lstm(x)[0], first[0])
    plain = layer(nn, **options)
    plain.load_state_dict(lstm.state_dict())
    random = torch.get_rng_state()
    close(flat(lstm.eval()(x)), flat(plain(x)))
    assert torch.equal(torch.get_rng_state(), random)


def test_all_dropped_is_a_second_layer_on_zeros(nn):
    lstm, x, hx = layer(nn, num_layers=2, dropout=1.0), sequence(), states(num_layers=2)
    output, (h_n, c_n) = lstm(x, hx)
    first, second = (nn.LSTM(size, H, dtype=torch.float64) for size in (I, H))
    for n, single in enumerate((first, second)):
        single.load_state_dict({name: lstm.state_dict()[name[:-1] + str(n)] for name in single.state_dict()})
    _, below, cells = flat(first(x, tuple(s[:1] for s in hx)))
    expected, above, more = flat(second(torch.zeros(T, B, H, dtype=torch.float64), tuple(s[1:] for s in hx)))
    close((output, h_n, c_n), (expected, torch.cat([below, above]), torch.cat([cells, more])))
    lstm.zero_grad()
    output.sum().backward()
    assert not lstm.weight_ih_l0.grad.any() and lstm.weight_hh_l1.grad.any()


def test_what_is_kept_is_scaled_by_the_probability_of_being_kept(nn):
    """The second layer passes its input through, in the cell's candidate: what it sees is zero or x / (1 - p)."""
    lstm = nn.LSTM(1, 16, 2, dropout=0.75, bias=False, dtype=torch.float64)
    lstm.eval()
    x = randn(1, 64, 1)
    with torch.no_grad():
        for p in lstm.parameters():
            p.zero_()
        lstm.weight_ih_l0.normal_()
        lstm.weight_ih_l1[32:48] = torch.eye(16)
    kept = lstm(x)[1][0][0]
    lstm.train()
    seen = torch.atanh(2 * lstm(x)[1][1][1])  # c = s(0) tanh(what is seen)
    dropped = seen == 0
    torch.testing.assert_close(seen[~dropped], (4 * kept)[~dropped], rtol=1e-6, atol=1e-9)
    assert 0.7 < dropped.double().mean() < 0.8


def test_dropout_can_be_changed_between_calls(nn):
    lstm, x = layer(nn, num_layers=2, dropout=0.5), sequence()
    lstm.dropout = 0.0
    assert torch.equal(lstm(x)[0], lstm(x)[0])
    lstm.dropout = 0.5
    assert not torch.allclose(lstm(x)[0], lstm(x)[0])
    lstm.train(False)
    assert torch.equal(lstm(x)[0], lstm(x)[0])


def test_one_layer_has_no_dropout(nn):
    with pytest.warns(UserWarning, match="dropout"):
        lstm = layer(nn, dropout=0.9)
    x = sequence()
    assert torch.equal(lstm(x)[0], lstm.eval()(x)[0])


def test_evaluation_has_gradients_too(nn):
    lstm, x = layer(nn, num_layers=2), sequence().requires_grad_()
    expected = gradients(flat(lstm(x)), [x, *lstm.parameters()])
    lstm.eval()
    close(gradients(flat(lstm(x)), [x, *lstm.parameters()]), expected)


def test_training_learns(nn):
    lstm, head = nn.LSTM(3, 12), Linear(12, 1)
    x = torch.randn(8, 16, 3)
    target = x[..., :1].cumsum(0).tanh()
    optimizer = torch.optim.Adam([*lstm.parameters(), *head.parameters()], lr=0.03)
    losses = []
    for _ in range(60):
        optimizer.zero_grad(set_to_none=True)
        error = (head(lstm(x)[0]) - target).square().mean()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < 0.25 * losses[0]


# Gradients


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], dict(proj_size=2, num_layers=2)], ids=str)
def test_first_and_second_gradients_of_a_layer_are_the_differences(nn, options):
    lstm = nn.LSTM(2, 3, dtype=torch.float64, **options)
    _, DL, _ = sizes(**options)
    hidden = options.get("proj_size", 3)
    tensors = [randn(*s, requires_grad=True) for s in ((3, 2, 2), (DL, 2, hidden), (DL, 2, 3))]
    names = [name for name, _ in lstm.named_parameters()]

    def run(x, h, c, *weights):
        return flat(torch.func.functional_call(lstm, dict(zip(names, weights, strict=True)), (x, (h, c))))

    tensors += [p.detach().clone().requires_grad_() for p in lstm.parameters()]
    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_first_and_second_gradients_of_a_cell_are_the_differences(nn):
    one = nn.LSTMCell(2, 3, dtype=torch.float64)
    tensors = [randn(2, n, requires_grad=True) for n in (2, 3, 3)]
    tensors += [p.detach().clone().requires_grad_() for p in one.parameters()]

    def run(x, h, c, *weights):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        return torch.func.functional_call(one, dict(zip(names, weights, strict=True)), (x, (h, c)))

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors, fast_mode=True)


def test_a_chain_of_cells_carries_gradients_through_both_states(nn):
    one, x = cell(nn), randn(T, B, I)
    h, c = (s.squeeze(0).requires_grad_() for s in states())
    first = h, c
    for step in x:
        h, c = one(step, (h, c))
    (h + c).sum().backward()
    assert all(s.grad.abs().min() > 0 for s in first) and all(p.grad.any() for p in one.parameters())


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_any_one_result_alone_has_gradients(nn, used):
    lstm, x, hx = layer(nn, num_layers=2), sequence().requires_grad_(), states(num_layers=2)
    results = dict(zip(("output", "h_n", "c_n"), flat(lstm(x, hx)), strict=True))
    all_of_them = torch.autograd.grad(loss([results[used]]) + 0 * loss(results.values()), x, retain_graph=True)
    alone = torch.autograd.grad(loss([results[used]]), x)
    close(alone, all_of_them)
    assert alone[0].any()


def test_gradients_add_up_over_calls_until_they_are_set_to_zero(nn):
    lstm, x = layer(nn), sequence()
    loss(flat(lstm(x))).backward()
    once = [p.grad.clone() for p in lstm.parameters()]
    loss(flat(lstm(x))).backward()
    close([p.grad for p in lstm.parameters()], [2 * g for g in once])
    lstm.zero_grad()
    assert all(p.grad is None for p in lstm.parameters())


def test_a_graph_is_gone_after_backward_unless_it_is_retained(nn):
    lstm, x = layer(nn), sequence()
    total = loss(flat(lstm(x)))
    total.backward(retain_graph=True)
    total.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        total.backward()


@pytest.mark.parametrize("changed", ["input", "weight_hh_l0", "weight_ih_l0"])
def test_a_change_in_place_before_backward_is_seen(nn, changed):
    lstm, x = layer(nn), sequence()
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    total = loss(flat(lstm(inner)))
    with torch.no_grad():
        (inner if changed == "input" else getattr(lstm, changed)).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_arguments_are_not_written_to(nn):
    lstm, x, hx = layer(nn, num_layers=2, bidirectional=True), sequence(), states(num_layers=2, bidirectional=True)
    before = [t.clone() for t in (x, *hx)]
    versions = [t._version for t in (x, *hx, *lstm.parameters())]
    loss(flat(lstm(x, hx))).backward()
    assert all(torch.equal(a, b) for a, b in zip((x, *hx), before, strict=True))
    assert [t._version for t in (x, *hx, *lstm.parameters())] == versions


def test_results_may_be_written_to(nn):
    lstm, x = layer(nn), sequence()
    with torch.no_grad():
        output, (h_n, c_n) = lstm(x)
        copies = h_n.clone(), c_n.clone()
        output.zero_()
        assert torch.equal(c_n, copies[1])
        c_n.add_(1)
        assert x.any() and all(p.any() for p in lstm.parameters())
    one, h, c = cell(nn), randn(B, H), randn(B, H)
    with torch.no_grad():
        new_h, new_c = one(randn(B, I), (h, c))
        kept = h.clone(), c.clone()
        new_h.zero_(), new_c.zero_()
    assert torch.equal(h, kept[0]) and torch.equal(c, kept[1])


def test_no_gradient_is_recorded_where_none_is_wanted(nn):
    lstm, one, x = layer(nn), cell(nn), sequence()
    with torch.no_grad():
        assert not any(t.requires_grad for t in (*flat(lstm(x)), *one(x[0])))
    with torch.inference_mode():
        assert all(t.is_inference() for t in (*flat(lstm(x)), *one(x[0])))
    lstm.requires_grad_(False)
    assert not any(t.requires_grad for t in flat(lstm(x)))
    x.requires_grad_()
    lstm(x)[0].sum().backward()
    assert x.grad.any() and all(p.grad is None for p in lstm.parameters())


@pytest.mark.parametrize("frozen", ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "weight_hr_l1", "_l1"])
def test_frozen_parameters_get_no_gradient_and_the_others_the_same(nn, frozen):
    lstm, x = layer(nn, num_layers=2, proj_size=P), sequence()
    loss(flat(lstm(x))).backward()
    expected = {name: p.grad.clone() for name, p in lstm.named_parameters()}
    lstm.zero_grad()
    for name, p in lstm.named_parameters():
        p.requires_grad_(not name.endswith(frozen))
    loss(flat(lstm(x))).backward()
    for name, p in lstm.named_parameters():
        if name.endswith(frozen):
            assert p.grad is None
        else:
            close(p.grad, expected[name])


def test_a_parameters_own_hooks_are_called(nn):
    lstm, calls = layer(nn), []
    lstm.weight_hh_l0.register_hook(lambda g: g * 0)
    lstm.bias_hh_l0.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.shape))
    loss(flat(lstm(sequence()))).backward()
    assert not lstm.weight_hh_l0.grad.any() and lstm.weight_ih_l0.grad.any() and calls == [(GATES,)]


# Layouts in memory


def layouts(t):
    """The same values in other layouts, by name; the last dimension of `t` is not the only one."""
    wide = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 3, dtype=t.dtype)
    wide[..., 1 : 1 + 2 * t.shape[-1] : 2] = t
    order = list(range(t.dim()))[::-1]
    return {
        "reversed strides": t.permute(order).contiguous().permute(order),
        "every second element": wide[..., 1 : 1 + 2 * t.shape[-1] : 2],
        "a swapped pair": t.transpose(0, -2).contiguous().transpose(0, -2),
        "behind an offset": torch.cat([t.new_zeros(1, *t.shape[1:]), t])[1:],
    }


LAYOUTS = list(layouts(torch.zeros(2, 3, 4)))


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
def test_the_layout_of_the_arguments_changes_nothing(nn, options, name):
    lstm, x, hx = layer(nn, **options), sequence(**options), states(**options)
    tensors = [t.requires_grad_() for t in (x, *hx)]
    expected = flat(lstm(x, hx))
    others = [layouts(t.detach())[name].requires_grad_() for t in tensors]
    assert name == "behind an offset" or not all(t.is_contiguous() for t in others)
    actual = flat(lstm(others[0], tuple(others[1:])))
    close(actual, expected)
    parameters = list(lstm.parameters())
    close(gradients(actual, [*others, *parameters]), gradients(expected, [*tensors, *parameters]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_of_the_arguments_changes_nothing_for_a_cell(nn, name):
    one, tensors = cell(nn), [randn(B, n, requires_grad=True) for n in (I, H, H)]
    expected = one(tensors[0], tuple(tensors[1:]))
    others = [layouts(t.detach())[name].requires_grad_() for t in tensors]
    actual = one(others[0], tuple(others[1:]))
    close(tuple(actual), tuple(expected))
    parameters = list(one.parameters())
    close(gradients(actual, [*others, *parameters]), gradients(expected, [*tensors, *parameters]))


def test_expanded_arguments_are_as_their_copies(nn):
    lstm, x = layer(nn, num_layers=2), randn(T, 1, I, requires_grad=True)
    h, c = randn(1, 1, H, requires_grad=True), randn(H, requires_grad=True)
    shape = (2, B, H)
    actual = flat(lstm(x.expand(T, B, I), (h.expand(shape), c.expand(shape))))
    expected = flat(lstm(x.repeat(1, B, 1), (h.repeat(2, B, 1), c.repeat(2, B, 1))))
    close(actual, expected)
    close(gradients(actual, [x, h, c]), gradients(expected, [x, h, c]))


def test_the_layout_of_the_gradients_that_come_in_changes_nothing(nn):
    lstm, x = layer(nn, bidirectional=True), sequence().requires_grad_()
    leaves = [x, *lstm.parameters()]
    output, (h_n, c_n) = lstm(x)
    for upstream in (randn(1, 1, 1).expand_as(output), randn(2 * H, B, T).permute(2, 1, 0)):
        incoming = [upstream, randn(1, 1, H).expand_as(h_n), randn(B, 2, H).transpose(0, 1)]
        actual = torch.autograd.grad([output, h_n, c_n], leaves, incoming, retain_graph=True)
        dense = [g.clone(memory_format=torch.contiguous_format) for g in incoming]
        assert not any(g.is_contiguous() for g in incoming[:2])
        close(actual, torch.autograd.grad([output, h_n, c_n], leaves, dense, retain_graph=True))


def test_the_layout_of_the_parameters_changes_nothing(nn):
    lstm, x = layer(nn, proj_size=P), sequence()
    expected = flat(lstm(x))
    wanted = gradients(expected, list(lstm.parameters()))
    for name, p in list(lstm.named_parameters()):
        if p.dim() == 2:
            setattr(lstm, name, Parameter(p.detach().t().contiguous().t()))
            assert not getattr(lstm, name).is_contiguous()
    actual = flat(lstm(x))
    close(actual, expected)
    close(gradients(actual, list(lstm.parameters())), wanted)


# Moves


def test_flattening_the_parameters_changes_nothing_on_a_cpu(nn):
    lstm, x = layer(nn, num_layers=2), sequence()
    before, expected = list(lstm.parameters()), flat(lstm(x))
    assert lstm.flatten_parameters() is None
    assert all(a is b for a, b in zip(before, lstm.parameters(), strict=True))
    close(flat(lstm(x)), expected)


@pytest.mark.parametrize("swap", [False, True], ids=["by data", "by swapping"])
def test_a_move_to_another_type_keeps_the_parameter_objects_and_their_values(nn, swap):
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        for module in (nn.LSTM(I, H, 2, proj_size=P), nn.LSTMCell(I, H)):
            x = torch.randn(T, B, I) if isinstance(module, nn.LSTM) else torch.randn(B, I)
            before, expected = list(module.parameters()), module(x)[0].detach()
            assert module.double() is module
            assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
            assert {p.dtype for p in module.parameters()} == {torch.float64}
            torch.testing.assert_close(module(x.double())[0].float(), expected)
            module.to(torch.float32)
            torch.testing.assert_close(module(x)[0], expected)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_results_have_the_type_of_the_parameters(nn, dtype):
    lstm, one = nn.LSTM(I, H, 2, bidirectional=True, proj_size=P).to(dtype), nn.LSTMCell(I, H).to(dtype)
    x = torch.randn(T, B, I, dtype=dtype)
    results = (*flat(lstm(x)), *one(x[0]))
    assert {t.dtype for t in results} == {dtype}
    sum(t.sum() for t in results).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for m in (lstm, one) for p in m.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_half_types_are_near_float64(nn, dtype, tolerance):
    lstm, x = nn.LSTM(I, H, 2).to(dtype), torch.randn(T, B, I).to(dtype)
    half = flat(lstm(x))
    torch.testing.assert_close(
        [t.double() for t in half], list(flat(lstm.double()(x.double()))), rtol=0, atol=tolerance
    )


def test_a_module_on_meta_has_shapes_and_comes_back_empty(nn):
    lstm = nn.LSTM(I, H, 2, batch_first=True).to("meta")
    output, (h_n, _) = lstm(torch.empty(B, T, I, device="meta"))
    assert output.is_meta and output.shape == (B, T, H) and h_n.shape == (2, B, H)
    assert nn.LSTMCell(I, H, device="meta")(torch.empty(B, I, device="meta"))[0].shape == (B, H)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        lstm.to("cpu")
    lstm.to_empty(device="cpu").reset_parameters()
    assert lstm(torch.zeros(B, T, I))[0].isfinite().all()


def test_shared_memory_holds_the_parameters(nn):
    lstm, x = nn.LSTM(I, H), torch.randn(T, B, I)
    expected = lstm(x)[0]
    assert lstm.share_memory() is lstm and all(p.is_shared() for p in lstm.parameters())
    torch.testing.assert_close(lstm(x)[0], expected)


def test_autocast_lowers_a_layer(nn):
    lstm = nn.LSTM(I, H, 2, bidirectional=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, (h_n, c_n) = lstm(torch.randn(T, B, I))
    assert {output.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    output.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in lstm.parameters())


# Parameters exchanged


def test_a_new_parameter_is_used_and_listed(nn):
    lstm, x = layer(nn, num_layers=2), sequence()
    before = lstm(x)[0]
    for name in ("weight_hh_l0", "weight_ih_l1", "bias_hh_l1"):
        new = Parameter(randn(*getattr(lstm, name).shape))
        setattr(lstm, name, new)
        after = lstm(x)[0]
        assert not torch.allclose(after, before) and dict(lstm.named_parameters())[name] is new
        assert torch.autograd.grad(after.sum(), new)[0].any()
        before = after


def test_what_is_no_parameter_cannot_take_the_place_of_one(nn):
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight_hh_l0'"):
        layer(nn).weight_hh_l0 = randn(GATES, H)
    with pytest.raises(TypeError, match=r"cannot assign .* as parameter 'weight_ih'"):
        cell(nn).weight_ih = randn(GATES, I)


def test_new_values_in_a_parameter_are_used(nn):
    lstm, x = layer(nn), sequence()
    outputs = [lstm(x)[0]]
    with torch.no_grad():
        lstm.weight_hh_l0.mul_(2)
    outputs.append(lstm(x)[0])
    lstm.bias_ih_l0.data = randn(GATES)
    outputs.append(lstm(x)[0])
    lstm.weight_ih_l0.data.zero_()
    outputs.append(lstm(x)[0])
    assert all(not torch.allclose(a, b) for a, b in itertools.pairwise(outputs))
    close(outputs[-1], lstm(torch.zeros_like(x))[0])


def test_the_forget_gates_bias_is_the_second_quarter(nn):
    lstm, c = layer(nn), torch.ones(1, B, H, dtype=torch.float64)
    for name, p in lstm.named_parameters():
        torch.nn.init.zeros_(p)
        if "bias_ih" in name:
            torch.nn.init.constant_(p[H : 2 * H], 30.0)
    _, (_, c_n) = lstm(sequence(), (torch.zeros_like(c), c))
    torch.testing.assert_close(c_n, c)
    torch.nn.init.constant_(lstm.bias_ih_l0[H : 2 * H], -30.0)
    assert lstm(sequence(), (torch.zeros_like(c), c))[1][1].abs().max() < 1e-12


def test_tied_weights_are_one_parameter_with_the_sum_of_the_gradients(nn):
    tied, free = layer(nn, num_layers=2, bias=False), layer(nn, num_layers=2, bias=False)
    tied.weight_hh_l1 = tied.weight_hh_l0
    free.load_state_dict(tied.state_dict())
    assert len(list(tied.parameters())) == 3 and len(tied.state_dict()) == 4
    x = sequence()
    outputs = [flat(m(x)) for m in (tied, free)]
    close(*outputs)
    (both,) = gradients(outputs[0], [tied.weight_hh_l0])
    close(both, sum(gradients(outputs[1], [free.weight_hh_l0, free.weight_hh_l1])))
    tied.float().double()
    assert tied.weight_hh_l1 is tied.weight_hh_l0 and tied(x)[0].isfinite().all()


def test_one_parameter_for_two_modules(nn):
    lstm, one, x = layer(nn), cell(nn), randn(1, B, I)
    for name, p in lstm.named_parameters():
        setattr(one, name.removesuffix("_l0"), p)
    close(lstm(x)[0][0], one(x[0])[0])
    (lstm(x)[0].sum() + one(x[0])[0].sum()).backward()
    assert one.weight_ih.grad is lstm.weight_ih_l0.grad and one.weight_ih.grad.any()


def test_a_call_with_other_parameters_uses_them_and_leaves_the_module_alone(nn):
    lstm, other, x = layer(nn, num_layers=2), layer(nn, num_layers=2), sequence()
    before, expected = flat(lstm(x)), flat(other(x))
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    result = flat(torch.func.functional_call(lstm, weights, (x,)))
    close(result, expected)
    close(gradients(result, list(weights.values())), gradients(expected, list(other.parameters())))
    close(flat(lstm(x)), before)
    part = torch.func.functional_call(lstm, {"bias_hh_l1": weights["bias_hh_l1"]}, (x,))
    assert not torch.allclose(part[0], before[0]) and not torch.allclose(part[0], expected[0])


def test_a_functional_gradient_is_the_gradient(nn):
    lstm, x = layer(nn), sequence()
    weights = {name: p.detach() for name, p in lstm.named_parameters()}
    found = torch.func.grad(lambda w: loss(flat(torch.func.functional_call(lstm, w, (x,)))))(weights)
    close(list(found.values()), list(gradients(flat(lstm(x)), list(lstm.parameters()))))


def test_parameters_go_to_a_vector_and_back(nn):
    one, two, x = layer(nn, num_layers=2), layer(nn, num_layers=2), sequence()
    vector = parameters_to_vector(one.parameters())
    assert vector.shape == (4 * H * (I + H + 2) + 4 * H * (2 * H + 2),)
    vector_to_parameters(vector.detach().clone(), two.parameters())
    close(flat(two(x)), flat(one(x)))


def test_the_norm_of_the_gradients_is_clipped(nn):
    lstm = layer(nn)
    loss(flat(lstm(sequence()))).backward()
    total = torch.cat([p.grad.flatten() for p in lstm.parameters()]).norm()
    close(clip_grad_norm_(lstm.parameters(), 0.01), total)
    torch.testing.assert_close(
        torch.cat([p.grad.flatten() for p in lstm.parameters()]).norm().item(), 0.01, rtol=1e-3, atol=0
    )


# Weights that are computed


@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_ih_l1", "weight_hh_l0_reverse"])
def test_a_weight_normed_layer_computes_the_same_and_trains_length_and_direction(nn, name):
    lstm, x = layer(nn, num_layers=2, bidirectional=True), sequence()
    expected = flat(lstm(x))
    parametrizations.weight_norm(lstm, name)
    assert name not in dict(lstm.named_parameters())
    close(flat(lstm(x)), expected)
    g = getattr(lstm.parametrizations, name).original0
    (gradient,) = torch.autograd.grad(loss(flat(lstm(x))), g)
    assert gradient.any()
    with torch.no_grad():
        g.mul_(2)
    assert not torch.allclose(lstm(x)[0], expected[0])
    with torch.no_grad():
        g.div_(2)
    parametrize.remove_parametrizations(lstm, name)
    close(flat(lstm(x)), expected)
    assert type(lstm) is nn.LSTM


def test_a_weight_normed_cell_computes_the_same(nn):
    one, x = cell(nn), randn(B, I)
    expected = tuple(one(x))
    parametrizations.weight_norm(one, "weight_hh")
    close(tuple(one(x)), expected)
    loss(one(x, (randn(B, H), randn(B, H)))).backward()
    assert one.parametrizations.weight_hh.original0.grad.any()


def test_the_older_weight_norm_works_and_can_be_removed(nn):
    lstm, x = layer(nn), sequence()
    expected = flat(lstm(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(lstm, "weight_hh_l0")
    close(flat(lstm(x)), expected)
    with torch.no_grad():
        lstm.weight_hh_l0_g.mul_(3)
    changed = flat(lstm(x))
    assert not torch.allclose(changed[0], expected[0])
    gradient = gradients(changed, [lstm.weight_hh_l0_g, lstm.weight_hh_l0_v])
    assert all(g.any() for g in gradient)
    torch.nn.utils.remove_weight_norm(lstm, "weight_hh_l0")
    close(flat(lstm(x)), changed)
    assert isinstance(lstm.weight_hh_l0, Parameter)


def test_a_spectrally_normed_weight_has_norm_one(nn):
    lstm, x = layer(nn), sequence()
    parametrizations.spectral_norm(lstm, "weight_hh_l0", n_power_iterations=30)
    lstm.eval()
    assert abs(torch.linalg.matrix_norm(lstm.weight_hh_l0, 2) - 1) < 1e-6
    plain = layer(nn)
    plain.load_state_dict({name: getattr(lstm, name).detach() for name in plain.state_dict()})
    close(flat(lstm(x)), flat(plain(x)))


def test_pruned_weights_are_used_masked_and_get_masked_gradients(nn):
    lstm, x = layer(nn), sequence()
    prune.random_unstructured(lstm, "weight_hh_l0", amount=0.6)
    assert "weight_hh_l0_mask" in dict(lstm.named_buffers())
    plain = layer(nn)
    plain.load_state_dict({name: getattr(lstm, name).detach() for name in plain.state_dict()})
    result = flat(lstm(x))
    close(result, flat(plain(x)))
    (gradient,) = gradients(result, [lstm.weight_hh_l0_orig])
    assert torch.equal(gradient == 0, lstm.weight_hh_l0_mask == 0)
    prune.remove(lstm, "weight_hh_l0")
    close(flat(lstm(x)), flat(plain(x)))


# Copies and checkpoints


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[5]], ids=str)
@pytest.mark.parametrize(
    "how",
    [
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
        lambda m: torch.load(saved(m), weights_only=False),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_compute_the_same_and_are_independent(nn, how, options):
    lstm, x = layer(nn, **options), sequence(**options)
    expected = flat(lstm(x))
    other = how(lstm.eval())
    assert type(other) is nn.LSTM and repr(other) == repr(lstm) and other.training is False
    close(flat(other(x)), expected)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in lstm.parameters()}
    with torch.no_grad():
        other.weight_hh_l0.add_(1)
    assert not torch.allclose(other(x)[0], expected[0])
    close(flat(lstm(x)), expected)
    for name in [name for name, _ in other.named_parameters() if name.startswith("weight_ih_l0")]:
        setattr(other, name, Parameter(torch.zeros_like(other.weight_ih_l0)))
    close(other(x)[0], other(torch.zeros_like(x))[0])


def test_copies_of_a_cell_compute_the_same(nn):
    one, x = cell(nn, bias=False), randn(B, I)
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        close(tuple(other(x)), tuple(one(x)))
        assert repr(other) == repr(one) and other.bias_ih is None


def test_a_copy_after_a_change_of_parameters_has_the_change(nn):
    lstm, x = layer(nn), sequence()
    lstm.weight_hh_l0 = Parameter(randn(GATES, H))
    lstm.bias_ih_l0.data = randn(GATES)
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        close(flat(other(x)), flat(lstm(x)))


def test_tied_weights_are_tied_in_copies(nn):
    lstm = layer(nn, num_layers=2)
    lstm.weight_hh_l1 = lstm.weight_hh_l0
    for other in (copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm))):
        assert other.weight_hh_l1 is other.weight_hh_l0 and other.weight_hh_l0 is not lstm.weight_hh_l0


def test_a_pickle_from_before_projections_loads_without_one(nn):
    lstm, x = layer(nn), sequence()
    state = lstm.__getstate__()
    state = {name: value for name, value in state.items() if name != "proj_size"}
    old = nn.LSTM.__new__(nn.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0
    close(flat(old(x)), flat(lstm(x)))


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return buffer


def test_a_state_dict_goes_through_a_file(nn):
    one, two, x = layer(nn, num_layers=2), layer(nn, num_layers=2), sequence()
    assert str(two.load_state_dict(torch.load(saved(one.state_dict())))) == "<All keys matched successfully>"
    close(flat(two(x)), flat(one(x)))


def test_a_state_dict_is_strict(nn):
    lstm = layer(nn)
    state = lstm.state_dict()
    missing = {name: value for name, value in state.items() if name != "bias_hh_l0"}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "bias_hh_l0"'):
        lstm.load_state_dict(missing)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "weight_ih_l1"'):
        lstm.load_state_dict({**state, "weight_ih_l1": randn(1)})
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_hh_l0: .*\[28, 6\].*\[28, 7\]"):
        lstm.load_state_dict({**state, "weight_hh_l0": randn(GATES, H - 1)})
    result = lstm.load_state_dict({**missing, "more": randn(1)}, strict=False)
    assert result.missing_keys == ["bias_hh_l0"] and result.unexpected_keys == ["more"]


def test_a_state_dict_shares_memory_and_loading_copies_into_the_parameters(nn):
    lstm, x = layer(nn), sequence()
    state = lstm.state_dict(prefix="a.")
    assert next(iter(state)) == "a.weight_ih_l0" and not state["a.weight_ih_l0"].requires_grad
    assert state["a.weight_ih_l0"].data_ptr() == lstm.weight_ih_l0.data_ptr()
    assert lstm.state_dict(keep_vars=True)["weight_hh_l0"] is lstm.weight_hh_l0
    kept, before = list(lstm.parameters()), lstm(x)[0]
    lstm.load_state_dict({name: value.float() for name, value in layer(nn).state_dict().items()})
    assert all(a is b for a, b in zip(kept, lstm.parameters(), strict=True))
    assert lstm.weight_ih_l0.dtype == torch.float64 and not torch.allclose(lstm(x)[0], before)


def test_a_state_dict_can_be_assigned_to_a_module_without_memory(nn):
    lstm, empty, x = layer(nn, num_layers=2), layer(nn, num_layers=2, device="meta"), sequence()
    empty.load_state_dict(lstm.state_dict(), assign=True)
    assert empty.weight_hh_l1.data_ptr() == lstm.weight_hh_l1.data_ptr()
    close(flat(empty(x)), flat(lstm(x)))


# Modules among modules


def test_a_layer_is_a_module_among_others(nn):
    model = Sequential(
        collections.OrderedDict(lstm=nn.LSTM(I, H, bidirectional=True), output=Output(), head=Linear(2 * H, 3))
    )
    assert model(torch.randn(T, B, I)).shape == (T, B, 3)
    assert [name for name, _ in model.named_modules()] == ["", "lstm", "output", "head"]
    assert list(model.state_dict())[:2] == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    assert list(model.state_dict())[-1] == "head.bias" and isinstance(model.lstm, Module)
    held = ModuleDict({"list": ModuleList([nn.LSTM(I, H), nn.LSTMCell(I, H)])})
    assert [name for name, _ in held.named_parameters()][::4] == ["list.0.weight_ih_l0", "list.1.weight_ih"]
    held.eval()
    assert not held["list"][0].training
    held.double()
    assert held["list"][1].bias_hh.dtype == torch.float64


def test_a_function_is_applied_to_every_module(nn):
    def orthogonal(module):
        for p in module.parameters(recurse=False):
            torch.nn.init.orthogonal_(p) if p.dim() == 2 else torch.nn.init.zeros_(p)

    model = ModuleList([nn.LSTM(I, H, dtype=torch.float64), nn.LSTMCell(I, H, dtype=torch.float64)])
    assert model.apply(orthogonal) is model
    for weight in (model[0].weight_hh_l0, model[1].weight_hh):
        torch.testing.assert_close(weight.T @ weight, torch.eye(H, dtype=torch.float64))


def test_a_subclass_extends_forward_and_construction(nn):
    class Last(nn.LSTM):
        def __init__(self, *args, scale=2.0, **kwargs):
            super().__init__(*args, bidirectional=True, **kwargs)
            self.scale = scale
            self.head = Linear(2 * self.hidden_size, 1, dtype=self.weight_ih_l0.dtype)

        def forward(self, input, hx=None):
            output, _ = super().forward(self.scale * input, hx)
            return self.head(output[-1])

    last, x = Last(I, H, num_layers=2, dtype=torch.float64), sequence()
    base = layer(nn, num_layers=2, bidirectional=True)
    base.load_state_dict(last.state_dict(), strict=False)
    close(last(x), last.head(base(2 * x)[0][-1]))
    text = f"Last(\n  5, 7, num_layers=2, bidirectional=True{library(nn)}\n  (head): Linear"
    assert repr(last).startswith(text)


# Hooks


def test_forward_hooks_see_and_change_inputs_and_outputs(nn):
    lstm, x, hx, seen = layer(nn), sequence(), states(), []
    expected = flat(lstm(3 * x, hx))
    handles = [
        lstm.register_forward_pre_hook(lambda m, args: (3 * args[0], *args[1:])),
        lstm.register_forward_hook(lambda m, args, output: seen.append((m, args, output))),
        lstm.register_forward_hook(lambda m, args, output: (output[0] + 1, output[1])),
    ]
    output, (h_n, c_n) = lstm(x, hx)
    close((output - 1, h_n, c_n), expected)
    module, args, before = seen[0]
    assert module is lstm and args[1] is hx
    close(args[0], 3 * x)
    close(flat(before), expected)
    for handle in handles:
        handle.remove()
    close(flat(lstm(3 * x, hx)), expected)


def test_hooks_see_and_change_keyword_arguments(nn):
    lstm, x, hx, seen = layer(nn), sequence(), states(), []
    expected = flat(lstm(x))

    def without_states(module, args, kwargs):
        seen.append(sorted(kwargs))
        return args, {**kwargs, "hx": None}

    lstm.register_forward_pre_hook(without_states, with_kwargs=True)
    lstm.register_forward_hook(lambda m, args, kwargs, output: seen.append(kwargs["hx"]), with_kwargs=True)
    close(flat(lstm(input=x, hx=hx)), expected)
    assert seen == [["hx", "input"], None]


def test_a_hook_that_is_always_called_is_called_when_forward_fails(nn):
    lstm, seen = layer(nn), []
    lstm.register_forward_hook(lambda m, args, output: seen.append(output), always_call=True)
    with pytest.raises(RuntimeError):
        lstm(randn(T, B, I + 1))
    assert seen == [None]


def test_backward_hooks_see_and_change_gradients(nn):
    lstm, one, seen = layer(nn), cell(nn), []
    for module in (lstm, one):
        module.register_full_backward_pre_hook(lambda m, grads: tuple(None if g is None else 2 * g for g in grads))
        module.register_full_backward_hook(lambda m, inputs, outputs: seen.append((inputs, outputs)))
    x = sequence().requires_grad_()
    lstm(x)[0].sum().backward()
    inputs, outputs = seen.pop()
    close(outputs[0], torch.full((T, B, H), 2.0, dtype=torch.float64))
    close(inputs[0], x.grad)
    step = randn(B, I, requires_grad=True)
    h, c = one(step)
    (h.sum() + 3 * c.sum()).backward()
    inputs, outputs = seen.pop()
    close(outputs, (torch.full((B, H), 2.0, dtype=torch.float64), torch.full((B, H), 6.0, dtype=torch.float64)))
    close(inputs[0], step.grad)


def test_packed_sequences_go_through_forward_hooks(nn):
    lstm, seen = layer(nn), []
    lstm.register_forward_pre_hook(lambda m, args: seen.append(type(args[0])))
    lstm.register_forward_hook(lambda m, args, output: seen.append(type(output[0])))
    lstm(pack_sequence([randn(3, I), randn(1, I)]))
    assert seen == [PackedSequence, PackedSequence]
