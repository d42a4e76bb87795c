"""What `torch.nn.LSTM` cannot take: lengths, resets and every cell state; and how a PackedSequence is taken apart."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.order import Order
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, eager, functional
from lstm_triton.ragged import Packing

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([4, 6, 1, 3])


def layer(spec=LSTMSpec(), **options):  # noqa: B008
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    return lstm_triton.LSTM(I, H, dtype=torch.float64, **variant, **options)


def sequence(*shape):
    return torch.randn(*(shape or (T, B, I)), dtype=torch.float64)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def every_spec(function):
    return pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)(function)


@every_spec
def test_each_row_is_as_if_it_were_alone(spec):
    lstm, x = layer(spec, num_layers=2, bidirectional=True), sequence()
    states = (sequence(4, B, H), sequence(4, B, H))
    output, (h_n, c_n), cells = lstm(x, states, lengths=LENGTHS, return_cell_states=True)
    for b, length in enumerate(LENGTHS):
        row = slice(b, b + 1)
        own = lstm(x[:length, row], tuple(s[:, row] for s in states), return_cell_states=True)
        close((output[:length, row], (h_n[:, row], c_n[:, row]), cells[:length, row]), own)
        assert not output[length:, b].any() and not cells[length:, b].any()


@every_spec
def test_what_stands_beyond_a_length_is_not_read(spec):
    lstm, x = layer(spec, bidirectional=True), sequence()
    found = {}
    for filler in (0.0, float("nan")):
        filled = x.masked_fill((torch.arange(T)[:, None] >= LENGTHS)[..., None], filler).requires_grad_()
        output, (h_n, c_n), cells = lstm(filled, lengths=LENGTHS, return_cell_states=True)
        loss = output.square().sum() + h_n.sum() + c_n.sum() + cells.sum()
        found[filler == 0] = (output, h_n, c_n, cells, *torch.autograd.grad(loss, (filled, *lstm.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(found[True], found[False], strict=True))
    assert all(t.isfinite().all() for t in found[False])


@every_spec
def test_a_reset_begins_a_new_episode(spec):
    """The two parts, run one after the other from zero, in each direction by itself."""
    lstm, x = layer(spec), sequence()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    output, (h_n, c_n), cells = lstm(x, (sequence(1, B, H),) * 2, resets=resets, return_cell_states=True)
    later = lstm(x[2:], return_cell_states=True)
    close((output[2:], (h_n, c_n), cells[2:]), later)
    at_once, _ = lstm(x, (sequence(1, B, H),) * 2, resets=torch.ones(T, B, dtype=torch.bool))
    close(at_once, torch.stack([lstm(x_t[None])[0][0] for x_t in x]))


def test_in_the_second_direction_the_state_is_zero_before_the_step_that_it_comes_to():
    lstm, x = layer(bidirectional=True), sequence()
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 1] = True
    output, (h_n, _) = lstm(x, resets=resets)
    backwards = lstm(x[:3])[0][:, 1, H:]
    close(output[:3, 1, H:], backwards)
    close(h_n[1, 1], backwards[0])
    close(output[:, [0, 2, 3]], lstm(x)[0][:, [0, 2, 3]])


def test_lengths_and_resets_follow_the_layout_of_the_input():
    resets = torch.rand(T, B) < 0.4
    plain, first = layer(bidirectional=True), layer(bidirectional=True, batch_first=True)
    first.load_state_dict(plain.state_dict())
    x = sequence()
    expected = plain(x, lengths=LENGTHS, resets=resets, return_cell_states=True)
    actual = first(x.transpose(0, 1), lengths=LENGTHS, resets=resets.t(), return_cell_states=True)
    close((actual[0].transpose(0, 1), actual[1], actual[2].transpose(0, 1)), expected)
    alone = plain(x[:, 0], lengths=LENGTHS[:1], resets=resets[:, 0], return_cell_states=True)
    close(alone[0], expected[0][:, 0])
    close(alone[2], expected[2][:, 0])
    assert alone[1][0].shape == (2, H)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_rows_that_all_have_every_step_are_as_without_lengths(dtype):
    lstm, x = layer(num_layers=2, bidirectional=True), sequence()
    close(lstm(x, lengths=torch.full((B,), T, dtype=dtype)), lstm(x))
    sequences = pack_padded_sequence(x, [T] * B)
    output, last = lstm(sequences)
    close((pad_packed_sequence(output)[0], last), lstm(x))
    close(lstm(x, resets=torch.zeros(T, B, dtype=torch.bool)), lstm(x))


@every_spec
def test_cell_states_end_in_the_last_ones(spec):
    lstm, x = layer(spec, num_layers=2, bidirectional=True, proj_size=2), sequence()
    output, (_, c_n), cells = lstm(x, return_cell_states=True)
    assert output.shape == (T, B, 4) and cells.shape == (T, B, 2 * H)
    close(cells[-1, :, :H], c_n[2])
    close(cells[0, :, H:], c_n[3])
    with torch.no_grad():
        assert torch.equal(lstm(x, return_cell_states=True)[2], cells)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cell_states_are_of_the_input_s_type(dtype):
    lstm = layer().to(dtype)
    output, (_, c_n), cells = lstm(sequence().to(dtype), lengths=LENGTHS, return_cell_states=True)
    assert output.dtype == c_n.dtype == cells.dtype == dtype
    assert torch.equal(cells[LENGTHS - 1, torch.arange(B)], c_n[0])


def packed(sort, **options):
    rows = [sequence(length, I).requires_grad_() for length in LENGTHS]
    if sort:
        rows.sort(key=len, reverse=True)
    return rows, pack_sequence(rows, enforce_sorted=sort), layer(bidirectional=True, **options)


@pytest.mark.parametrize("sort", [True, False], ids=["sorted", "unsorted"])
@every_spec
def test_a_packed_sequence_is_as_its_rows_with_lengths(spec, sort):
    rows, sequences, _ = packed(sort)
    lstm = layer(spec, num_layers=2, bidirectional=True)
    resets, states = torch.rand(T, B) < 0.4, (sequence(4, B, H), sequence(4, B, H))
    output, last, cells = lstm(sequences, states, resets=resets, return_cell_states=True)
    assert isinstance(output, PackedSequence) and isinstance(cells, PackedSequence)
    lengths = torch.tensor([len(row) for row in rows])
    wanted = lstm(pad_sequence(rows), states, lengths=lengths, resets=resets, return_cell_states=True)
    close((pad_packed_sequence(output)[0], last, pad_packed_sequence(cells)[0]), wanted)
    assert torch.equal(output.batch_sizes, sequences.batch_sizes)
    arguments = (*rows, *lstm.parameters())
    gradients = torch.autograd.grad(output.data.square().sum() + cells.data.sum() + last[1].sum(), arguments)
    expected = torch.autograd.grad(wanted[0].square().sum() + wanted[2].sum() + wanted[1][1].sum(), arguments)
    close(gradients, expected)


def test_last_states_without_a_gradient_add_nothing_to_a_step(monkeypatch):
    given = []
    backward = eager.backward
    monkeypatch.setattr(eager, "backward", lambda *a: given.append(a[:2]) or backward(*a))
    lstm, x = layer(LSTMSpec(coupled=True), bidirectional=True), sequence()
    output, (h_n, c_n) = lstm(x, lengths=LENGTHS)
    output.sum().backward(retain_graph=True)
    assert all(of_output is not None and of_states is None for of_output, of_states in given)
    given.clear()
    h_n.sum().backward(retain_graph=True)
    assert all(of_output is not None and of_states is None for of_output, of_states in given)
    given.clear()
    c_n.sum().backward()
    assert len(given) == 2 and all(of_output is None and of_states is not None for of_output, of_states in given)


def test_the_order_of_rows_is_the_user_s():
    """The resets and the states of a batch that was sorted for packing."""
    rows, sequences, lstm = packed(sort=False)
    states = (sequence(2, B, H), sequence(2, B, H))
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[0, 0] = True  # the row of length 4, which packing puts second
    _, (h_n, _) = lstm(sequences, states, resets=resets)
    for b, row in enumerate(rows):
        own = tuple(s[:, b] * torch.tensor([[0.0], [1.0]]) if b == 0 else s[:, b] for s in states)
        close(h_n[0, b], lstm(row, own)[1][0][0])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4))
def test_padding_and_packing_on_the_device_are_torch_s(lengths, features):
    rows = [torch.randn(length, features) for length in lengths]
    sequences = pack_sequence(rows, enforce_sorted=False)
    packing = Packing(sequences)
    padded, sorted_lengths = pad_packed_sequence(PackedSequence(sequences.data, sequences.batch_sizes))
    assert padded.shape[:2] == (packing.T, packing.B)
    assert packing.full == (len(set(lengths)) == 1)
    assert packing.lengths is None if packing.full else torch.equal(packing.lengths, sorted_lengths)
    assert torch.equal(packing.pad(sequences.data), padded)
    assert torch.equal(packing.pack(padded), sequences.data)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_rows_are_flipped_within_their_lengths(data):
    steps = data.draw(st.integers(1, 7))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, steps), min_size=1, max_size=5)))
    x = torch.randn(steps, len(lengths), 2)
    order = Order(steps, lengths)
    flipped = order.flip(x)
    for b, n in enumerate(lengths):
        assert torch.equal(flipped[:n, b], x[:n, b].flip(0)) and torch.equal(flipped[n:, b], x[n:, b])
    assert torch.equal(order.flip(flipped), x)
    assert torch.equal(order.flip(x[..., 0]), flipped[..., 0])
    cells = torch.randn(steps + 1, len(lengths), 2)
    for b, n in enumerate(lengths + 1):
        assert torch.equal(order.flip(cells)[:n, b], cells[:n, b].flip(0))


def zeros(*shape, dtype=torch.bool):
    return torch.zeros(*shape, dtype=dtype)


REFUSED = {
    "a length of zero": (dict(lengths=torch.tensor([4, 0, 1, 3])), ValueError, "1 to the 6 steps .* got 0 in row 1"),
    "a negative length": (dict(lengths=torch.tensor([4, 6, 1, -3])), ValueError, "got -3 in row 3"),
    "a length beyond T": (dict(lengths=torch.tensor([7, 6, 1, 3])), ValueError, "got 7 in row 0"),
    "too few lengths": (dict(lengths=LENGTHS[:3]), ValueError, r"Expected lengths size \(4,\).* got \[3\]"),
    "lengths of two dimensions": (dict(lengths=LENGTHS[None]), ValueError, r"Expected lengths size \(4,\)"),
    "lengths that are floats": (dict(lengths=LENGTHS.float()), TypeError, "int32 or int64, got: torch.float32"),
    "lengths that are bools": (dict(lengths=LENGTHS > 2), TypeError, "int32 or int64, got: torch.bool"),
    "lengths in a list of floats": (dict(lengths=[4, 6.0, 1, 3]), TypeError, "lengths should be integers, got: .*6.0"),
    "lengths in a list too short": (dict(lengths=[4, 6]), ValueError, r"Expected lengths size \(4,\).* got \[2\]"),
    "lengths in a set": (dict(lengths={4, 6, 1, 3}), TypeError, "a list of integers or a Tensor .*, got: set"),
    "resets turned round": (dict(resets=zeros(B, T)), ValueError, r"Expected resets size \(6, 4\).* got \[4, 6\]"),
    "resets of one row": (dict(resets=zeros(T)), ValueError, r"Expected resets size \(6, 4\)"),
    "resets of another T": (dict(resets=zeros(T + 1, B)), ValueError, r"Expected resets size \(6, 4\)"),
    "resets that are numbers": (dict(resets=zeros(T, B, dtype=torch.uint8)), TypeError, "bool, got: torch.uint8"),
    "resets in a list": (dict(resets=[[False] * B] * T), TypeError, "Tensor of bool, got: list"),
    "a flag that is none": (dict(return_cell_states=1), TypeError, "return_cell_states should be of type bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_computed(name, monkeypatch):
    arguments, error, words = REFUSED[name]
    computed = []
    monkeypatch.setattr(functional, "run_layer", lambda *_: computed.append(1))
    for spec in (LSTMSpec(), LSTMSpec(coupled=True, peephole="diagonal")):
        with pytest.raises(error, match=words):
            layer(spec)(sequence(), **arguments)
    assert not computed


def test_what_does_not_fit_a_batch_first_or_unbatched_input():
    with pytest.raises(ValueError, match=r"Expected resets size \(4, 6\).* got \[6, 4\]"):
        layer(batch_first=True)(sequence(B, T, I), resets=zeros(T, B))
    with pytest.raises(ValueError, match=r"Expected resets size \(6,\).* got \[6, 1\]"):
        layer()(sequence(T, I), resets=zeros(T, 1))
    with pytest.raises(ValueError, match=r"Expected lengths size \(1,\)"):
        layer()(sequence(T, I), lengths=torch.tensor(3))


def test_what_does_not_fit_a_packed_sequence():
    _, sequences, lstm = packed(sort=False)
    with pytest.raises(ValueError, match="a PackedSequence has the lengths of its rows"):
        lstm(sequences, lengths=LENGTHS)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(2, 4, 5\), got \[2, 3, 5\]"):
        lstm(sequences, (sequence(2, 3, H), sequence(2, 3, H)))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 4, 5\), got \[1, 4, 5\]"):
        lstm(sequences, (sequence(2, B, H), sequence(1, B, H)))
    with pytest.raises(RuntimeError, match="also be 3-D"):
        lstm(sequences, (sequence(B, H), sequence(B, H)))
    with pytest.raises(ValueError, match="RNN input dtype"):
        lstm(sequences.float())
    with pytest.raises(RuntimeError, match="Expected 3, got 4"):
        lstm(pack_padded_sequence(sequence(T, B, 4), LENGTHS, enforce_sorted=False))
    with pytest.raises(RuntimeError, match="input must have 2 dimensions, got 1"):
        lstm(pack_padded_sequence(sequence(T, B), LENGTHS, enforce_sorted=False))
    with pytest.raises(ValueError, match=r"Expected resets size \(6, 4\)"):
        lstm(sequences, resets=zeros(T, 3))


@pytest.mark.parametrize(
    "rows, batch_sizes, words",
    [
        (6, torch.tensor([2, 2, 2, 1]), "batch_sizes of 7 in all has 6 rows of data"),
        (9, torch.tensor([2, 2, 2, 1]), "batch_sizes of 7 in all has 9 rows of data"),
        (5, torch.tensor([1, 2, 2]), r"must be positive and never increase, got \[1, 2, 2\]"),
        (3, torch.tensor([2, 1, 0]), "must be positive and never increase"),
        (5, torch.tensor([3, 2], dtype=torch.int32), "1-D int64 tensor on the CPU, got 1-D torch.int32"),
        (5, torch.tensor([[3, 2]]), "got 2-D"),
        (0, torch.tensor([], dtype=torch.int64), "sequence length to be larger than 0"),
    ],
    ids=["too short", "too long", "increasing", "an empty step", "int32", "2-D", "no step"],
)
def test_a_packed_sequence_whose_parts_do_not_fit_is_refused(rows, batch_sizes, words):
    data = sequence(rows, I)
    unchecked = PackedSequence.__new__(PackedSequence, data, batch_sizes)
    for spec in (LSTMSpec(), LSTMSpec(coupled=True)):
        with pytest.raises(RuntimeError, match=words):
            layer(spec)(unchecked)


@every_spec
def test_a_packed_stack_is_padded_once(spec, monkeypatch):
    """Between layers nothing is packed or padded, whoever computes them."""
    done = []
    for name in ("pad", "pack"):
        method = getattr(Packing, name)
        monkeypatch.setattr(Packing, name, lambda *a, name=name, method=method: done.append(name) or method(*a))
    _, sequences, _ = packed(sort=False)
    layer(spec, num_layers=3, bidirectional=True)(sequences)
    assert done == (["pad", "pack"] if spec.peephole else [])


def test_lengths_are_checked_when_compiled_too():
    torch._dynamo.reset()
    lstm, x = layer(LSTMSpec(coupled=True)), sequence()
    compiled = torch.compile(lstm, fullgraph=True, backend="aot_eager")
    close(compiled(x, lengths=LENGTHS)[0], lstm(x, lengths=LENGTHS)[0])
    with pytest.raises(ValueError, match="got 7 in row 0"):
        compiled(x, lengths=LENGTHS + 3)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_model_called_behind_the_back_of_fsdp_is_refused(one_process):
    model, x = layer(), sequence()
    expected = model(x)[0]
    weight = model.weight_hh_l0.detach().clone()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
    words = r"weight_ih_l0 is sharded over 1 processes \(a DTensor\): call the module itself"
    with pytest.raises(RuntimeError, match=words):
        model.forward(x)
    with pytest.raises(RuntimeError, match=words):
        functional.lstm(x, None, list(model.parameters()))
    close(model(x)[0], expected)
    for convert in (lstm_triton.convert.from_torch, lstm_triton.convert.to_torch):
        with pytest.raises(ValueError, match=r"0 \(FSDPLSTM\) is sharded: convert the model before fully_shard"):
            convert(torch.nn.Sequential(model))
    cell = lstm_triton.LSTMCell(I, H, dtype=torch.float64)
    fully_shard(cell, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(RuntimeError, match="weight_ih is sharded"):
        cell.forward(x[0])
    assert cell(x[0])[0].shape == (B, H)
    model.unshard()
    close(model.forward(x)[0], expected)
    assert torch.equal(model.weight_hh_l0, weight)
