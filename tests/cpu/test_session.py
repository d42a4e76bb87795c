"""A session computes in chunks what one call computes; and how calls are captured, with a "graph" that is a function.

The stand-in for CUDA graphs behaves as they do: nothing is computed while one is captured, and a replay reads and
writes the memory of the capture.
"""

import copy
import inspect
import threading
from contextlib import contextmanager

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, session

I, H, B = 5, 8, 3  # noqa: E741
OPTIONS = {
    "one layer": dict(),
    "two layers": dict(num_layers=2, dropout=0.5),
    "projection": dict(num_layers=2, proj_size=3),
    "batch first": dict(num_layers=2, batch_first=True, bias=False),
}
EXACT, NEAR = dict(rtol=1e-12, atol=1e-12), dict(rtol=1e-5, atol=1e-6)


def lstm(spec=None, dtype=torch.float64, **options):
    spec = spec or lstm_triton.LSTMSpec()
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    return lstm_triton.LSTM(I, H, dtype=dtype, **variant, **options)


def sequence(T, module, dtype=torch.float64):
    return torch.randn((B, T, I) if module.batch_first else (T, B, I), dtype=dtype)


def in_chunks(held, x, sizes, resets=None):
    """The output of all chunks, one after the other."""
    time = 1 if held.module.batch_first else 0
    parts = [part.split(sizes, time) if part is not None else [None] * len(sizes) for part in (x, resets)]
    return torch.cat([held(*own, resets=flags) for *own, flags in zip(*parts, strict=True)], time)


def assert_same(held, found, wanted, **tolerance):
    """The output, and the states that the session ends with, are those of one call."""
    output, states = wanted
    for actual, expected in zip((found, *held.state), (output, *states), strict=True):
        torch.testing.assert_close(actual, expected.detach(), **tolerance)


# What is computed.


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_chunks_compute_what_one_call_does(spec, options):
    module = lstm(spec, **options)
    sizes = (1, 3, 7, 1, 1, 64, 2)
    x = sequence(sum(sizes), module)
    held = module.session(B)
    found = in_chunks(held, x, sizes)
    module.eval()
    assert_same(held, found, module(x), **EXACT)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunks_in_float32(options):
    module = lstm(dtype=torch.float32, **options).eval()
    x = sequence(75, module, torch.float32)
    held = module.session(B)
    assert_same(held, in_chunks(held, x, (1, 3, 7, 64)), module(x), **NEAR)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("spec", VARIANTS[::3], ids=lambda spec: spec.name)
def test_resets_within_chunks(spec, options):
    module = lstm(spec, **options).eval()
    x = sequence(20, module)
    resets = torch.rand(x.shape[:2]) < 0.2
    held = module.session(B)
    assert_same(held, in_chunks(held, x, (1, 7, 3, 9), resets), module(x, resets=resets), **EXACT)


@pytest.mark.parametrize(
    "rows",
    [
        torch.tensor([True, False, True]),
        torch.tensor([2, 0]),
        torch.tensor([2, 0], dtype=torch.int32),
        [0, 2],
        (2, 0, 2),
    ],
    ids=["mask", "indices", "int32", "list", "tuple"],
)
def test_a_reset_of_rows_is_a_reset_at_their_next_step(rows):
    module = lstm(num_layers=2).eval()
    x = sequence(9, module)
    resets = torch.zeros(9, B, dtype=torch.bool)
    resets[4, [0, 2]] = True
    held = module.session(B)
    first = held(x[:4])
    held.reset(rows)
    assert_same(held, torch.cat([first, held(x[4:])]), module(x, resets=resets), **EXACT)


def test_a_reset_of_one_row_and_of_no_row():
    held = lstm().session(B)
    held(torch.randn(2, B, I).double())
    before = held.state
    held.reset([])
    held.reset(torch.zeros(B, dtype=torch.bool))
    assert all(torch.equal(*pair) for pair in zip(before, held.state, strict=True))
    held.reset(1)
    for old, new in zip(before, held.state, strict=True):
        assert torch.equal(new[:, [0, 2]], old[:, [0, 2]]) and not new[:, 1].any()


def test_a_reset_of_all_rows_starts_anew_also_after_nan():
    module = lstm(num_layers=2)
    held = module.session(B)
    x = sequence(3, module)
    first = held(x)
    held(torch.full_like(x, torch.nan))
    held.reset([0])
    held.reset(torch.tensor([False, True, True]))
    assert torch.equal(held(x), first)
    held.reset()
    assert not any(state.any() for state in held.state)


def test_the_state_can_be_taken_and_given_back():
    module = lstm(num_layers=2, proj_size=3)
    held, other = module.session(B), module.session(B)
    x = sequence(8, module)
    held(x[:5])
    kept = held.state
    assert [tuple(state.shape) for state in kept] == [(2, B, 3), (2, B, H)]
    last = held(x[5:])
    assert not torch.equal(kept[0], held.state[0])  # copies
    for target in (held, other):
        target.load_state(kept)
        assert torch.equal(target(x[5:]), last)
    kept[0].zero_()
    assert other.state[0].any()


def test_it_computes_as_in_eval_mode_without_gradients_or_autocast():
    module = lstm(dtype=torch.float32, num_layers=2, dropout=0.9).train()
    x = sequence(4, module, torch.float32).requires_grad_()
    held = module.session(B)
    with torch.autocast("cpu", torch.bfloat16):
        found = held(x)
    assert module.training and not found.requires_grad and not held.state[0].requires_grad
    assert_same(held, found, module.eval()(x), **NEAR)


def test_inside_and_outside_of_inference_mode():
    module = lstm()
    x = sequence(6, module)
    with torch.inference_mode():
        held = module.session(B)
        first = held(x[:2])
    second = held(x[2:4])
    with torch.inference_mode():
        third = held(x[4:].clone())
        held.reset([])
    assert not first.is_inference()
    assert_same(held, torch.cat([first, second, third]), module.eval()(x), **EXACT)


def test_a_session_sees_new_values_and_follows_the_module_to_another_type():
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    held(x)
    state = held.state
    module.load_state_dict(lstm().state_dict())
    assert_same(held, held(x), module(x, state), **EXACT)
    state = held.state
    module.float()
    with pytest.raises(ValueError, match="input dtype"):
        held(x)
    state = tuple(part.float() for part in state)
    assert_same(held, held(x.float()), module(x.float(), state), **NEAR)


def test_half_types_and_one_row():
    module = lstm(dtype=torch.bfloat16).eval()
    x = torch.randn(6, 1, I, dtype=torch.bfloat16)
    held = module.session(1)
    found = torch.cat([held(step[None]) for step in x])
    torch.testing.assert_close(found, module(x)[0], rtol=0.05, atol=0.02)
    assert found.dtype == held.state[1].dtype == torch.bfloat16


# What does not fit.


def test_a_bidirectional_module_has_no_session():
    with pytest.raises(ValueError, match="the second direction of a bidirectional LSTM starts at the last step"):
        lstm(bidirectional=True).session(B)


@pytest.mark.parametrize(
    "given, error", [((0,), ValueError), ((-1,), ValueError), ((2.0,), TypeError), ((True,), TypeError)]
)
def test_what_is_no_batch_size(given, error):
    with pytest.raises(error, match="batch_size"):
        lstm().session(*given)
    with pytest.raises(TypeError, match="graphs should be of type bool"):
        lstm().session(1, graphs=1)


def bad_calls():
    x = torch.randn(4, B, I).double()
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    state = torch.zeros(1, B, H).double()
    yield "rows", RuntimeError, "Expected 3 rows", lambda held: held(x[:, :2])
    yield "features", RuntimeError, "Expected 5, got 4", lambda held: held(x[..., :4])
    yield "unbatched", ValueError, "2-D", lambda held: held(x[:, 0])
    yield "packed", TypeError, "PackedSequence", lambda held: held(packed)
    yield "type", ValueError, "does not match weight dtype", lambda held: held(x.float())
    yield "device", RuntimeError, "Expected a chunk on cpu", lambda held: held(x.to("meta"))
    yield "no steps", RuntimeError, "larger than 0", lambda held: held(x[:0])
    yield "type of resets", TypeError, "bool", lambda held: held(x, resets=torch.zeros(4, B))
    yield "size of resets", ValueError, "size", lambda held: held(x, resets=torch.zeros(B, 4, dtype=torch.bool))
    yield "mask", ValueError, "size", lambda held: held.reset(torch.ones(B + 1, dtype=torch.bool))
    yield "index", ValueError, "from 0 to 2, got 3", lambda held: held.reset([0, 3])
    yield "negative index", ValueError, "got -1", lambda held: held.reset(torch.tensor([-1]))
    yield "fraction", TypeError, "rows should be", lambda held: held.reset(torch.tensor([0.0]))
    yield "bools in a list", TypeError, "rows should be", lambda held: held.reset([True, False, False])
    yield "two axes", TypeError, "rows should be", lambda held: held.reset(torch.tensor([[0]]))
    yield "words", TypeError, "rows should be", lambda held: held.reset("01")
    yield "no pair", TypeError, "pair of Tensors", lambda held: held.load_state(state)
    yield "size of h", RuntimeError, "Expected h size", lambda held: held.load_state((state[:, :2], state))
    yield "size of c", RuntimeError, "Expected c size", lambda held: held.load_state((state, state[0]))
    yield "type of c", RuntimeError, "torch.float32", lambda held: held.load_state((state, state.float()))
    yield "device of h", RuntimeError, "meta", lambda held: held.load_state((state.to("meta"), state))


@pytest.mark.parametrize("error, words, call", [pytest.param(*rest, id=name) for name, *rest in bad_calls()])
def test_a_call_that_does_not_fit_leaves_the_state_as_it_was(error, words, call):
    held = lstm().session(B)
    held(torch.randn(2, B, I).double())
    before = held.state
    with pytest.raises(error, match=words):
        call(held)
    assert all(torch.equal(*pair) for pair in zip(before, held.state, strict=True))
    held(torch.randn(1, B, I).double())  # and it goes on


def test_a_strategy_that_cannot_run_leaves_the_state_as_it_was():
    held = lstm().session(B)
    held(torch.randn(2, B, I).double())
    before = held.state
    held.module.strategy = "persistent"
    with pytest.raises(RuntimeError, match="cannot run here"):
        held(torch.randn(2, B, I).double())
    assert all(torch.equal(*pair) for pair in zip(before, held.state, strict=True))


# Graphs.


class Graphs:
    """Takes the place of `Recorder`, and tells what it was asked for."""

    def __init__(self):
        self.warm_ups, self.captures, self.replays, self.refuse = [], [], [], False

    def __call__(self, device):
        return self

    def warm_up(self, function):
        self.warm_ups.append(function())

    def capture(self, function):
        if self.refuse:
            raise RuntimeError("no graphs today")
        number = len(self.captures)
        result = torch.full_like(self.warm_ups[-1], torch.nan)
        self.captures.append(function)

        def replay():
            self.replays.append(number)
            result.copy_(function())

        return replay, result


@pytest.fixture
def graphs(monkeypatch):
    fake = Graphs()
    monkeypatch.setattr(session, "Recorder", fake)
    monkeypatch.setattr(session, "has_graphs", lambda device: True)
    return fake


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_number_of_steps_is_captured_once_and_replayed(options, graphs):
    module = lstm(**options)
    held = module.session(B)
    sizes = (3, 1, 3, 7, 1, 1, 3, 64)
    x = sequence(sum(sizes), module)
    assert_same(held, in_chunks(held, x, sizes), module.eval()(x), **EXACT)
    assert len(graphs.captures) == len(graphs.warm_ups) == 4
    assert graphs.replays == [0, 1, 0, 2, 1, 1, 0, 3]


def test_resets_have_a_graph_of_their_own_and_are_read_anew(graphs):
    module = lstm(num_layers=2).eval()
    held, x = module.session(B), sequence(8, module)
    resets = torch.rand(8, B) < 0.4
    resets[:2] = False
    found = [held(x[:2]), *(held(x[n : n + 2], resets=resets[n : n + 2]) for n in (2, 4, 6))]
    assert graphs.replays == [0, 1, 1, 1]
    assert_same(held, torch.cat(found), module(x, resets=resets), **EXACT)


def test_an_output_is_not_written_to_by_later_calls_and_an_input_may_be(graphs):
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    first = held(x)
    kept = first.clone()
    x.fill_(9.0)
    second = held(x)
    assert torch.equal(first, kept) and first.data_ptr() != second.data_ptr() and not torch.equal(first, second)


def test_states_are_replaced_in_place(graphs):
    """A graph reads them where they were when it was captured."""
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    first, state = held(x), held.state
    held.reset()
    assert torch.equal(held(x), first)
    held(x)
    held.load_state(state)
    second = held(x)
    held.reset([1])
    torch.testing.assert_close(held(x)[:, 1], first[:, 1], **EXACT)
    torch.testing.assert_close(second, module(x, state)[0].detach(), **EXACT)
    assert len(graphs.captures) == 1


def test_the_graph_that_was_not_used_for_longest_goes(graphs, monkeypatch):
    monkeypatch.setattr(session, "MOST_GRAPHS", 2)
    module = lstm()
    held = module.session(B)
    for T in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, and 2 that of 3
        held(sequence(T, module))
    assert len(graphs.captures) == 4 and graphs.replays == [0, 1, 0, 2, 0, 3]
    assert list(held._chunks) == [(1, False), (2, False)]


def test_long_chunks_are_not_captured(graphs):
    module = lstm()
    held = module.session(B)
    x = sequence(session.MOST_STEPS + 3, module)
    found = [held(x[:1]), held(x[1 : session.MOST_STEPS + 2]), held(x[-1:])]
    assert graphs.replays == [0, 0]
    assert_same(held, torch.cat(found), module.eval()(x), **EXACT)


def test_without_graphs(graphs):
    module = lstm()
    held, x = module.session(B, graphs=False), sequence(4, module)
    assert_same(held, in_chunks(held, x, (2, 2)), module.eval()(x), **EXACT)
    assert not graphs.warm_ups and not graphs.captures


def moved(module):
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def replaced(module):
    module.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(module.weight_hh_l0))


def flattened(module):
    """The parameters get other addresses and keep their values."""
    data = torch.cat([p.data.flatten() for p in module.parameters()])
    for parameter, part in zip(module.parameters(), data.split([p.numel() for p in module.parameters()]), strict=True):
        parameter.data = part.view_as(parameter)


@pytest.mark.parametrize("change", [moved, replaced, flattened], ids=lambda change: change.__name__)
def test_other_addresses_are_captured_anew(change, graphs):
    module = lstm().eval()
    held, x = module.session(B), sequence(2, module)
    held(x)
    held(x[:1])
    before = held.state
    change(module)
    assert_same(held, held(x), module(x, before), **EXACT)
    assert len(graphs.captures) == 3 and list(held._chunks) == [(2, False)]


def test_new_values_at_the_same_addresses_are_read_by_the_same_graph(graphs):
    module = lstm().eval()
    held, x = module.session(B), sequence(2, module)
    held(x)
    module.load_state_dict(lstm().state_dict())
    before = held.state
    assert_same(held, held(x), module(x, before), **EXACT)
    with torch.no_grad():
        module.weight_hh_l0.add_(1.0)
    before = held.state
    assert_same(held, held(x), module(x, before), **EXACT)
    assert len(graphs.captures) == 1


def test_another_type_or_switch_is_captured_anew(graphs):
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    held(x)
    module.float()
    held(x.float())
    assert len(graphs.captures) == 2 and held.state[0].dtype == torch.float32
    with lstm_triton.backend("torch"):
        held(x.float())
    assert len(graphs.captures) == 3
    module.batch_first = True
    held(x.float().transpose(0, 1))
    assert len(graphs.captures) == 4


def test_computed_weights_are_used_without_a_graph(graphs):
    module = lstm()
    torch.nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    held, x = module.session(B), sequence(4, module)
    assert_same(held, in_chunks(held, x, (1, 3)), module(x), **EXACT)
    assert not graphs.captures


def test_a_capture_that_fails_warns_once_and_calls_go_on(graphs):
    graphs.refuse = True
    module = lstm()
    held, x = module.session(B), sequence(6, module)
    with pytest.warns(UserWarning, match="computes without CUDA graphs: capturing failed: no graphs today"):
        first = held(x[:2])
    assert not held.graphs
    assert_same(held, torch.cat([first, held(x[2:5]), held(x[5:])]), module.eval()(x), **EXACT)
    assert len(graphs.warm_ups) == 1


def test_errors_of_a_call_are_not_taken_for_a_capture_that_failed(graphs):
    module = lstm(strategy="stepwise")
    held, x = module.session(B), sequence(2, module)
    with pytest.raises(RuntimeError, match="cannot run here"):
        held(x)
    assert held.graphs
    module.strategy = "auto"
    assert_same(held, held(x), module.eval()(x), **EXACT)


def test_a_failing_call_leaves_state_and_graphs(graphs):
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    held(x)
    before = held.state
    for bad in (x[:, :2], x.float(), x[..., 1:], x[:0]):
        with pytest.raises((RuntimeError, ValueError)):
            held(bad)
    assert all(torch.equal(*pair) for pair in zip(before, held.state, strict=True))
    held(x)
    assert graphs.replays == [0, 0]


def test_several_threads_take_turns(graphs):
    """Each gives all its rows the same chunk; whatever the order, as many steps are counted."""
    module = lstm()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_ih_l0[:H], module.bias_ih_l0[H : 2 * H], module.bias_ih_l0[2 * H : 3 * H] = 50.0, 50.0, 50.0
    held = module.session(B)
    x = torch.zeros(1, B, I).double()
    threads = [threading.Thread(target=lambda: [held(x) for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(held.state[1], torch.full((1, B, H), 80.0).double())


def test_on_a_cpu_nothing_is_captured_and_a_module_with_a_session_can_be_copied():
    assert not session.has_graphs(torch.device("cpu"))
    module = lstm()
    held, x = module.session(B), sequence(2, module)
    first = held(x)
    assert torch.equal(copy.deepcopy(module).session(B)(x), first)
    assert "batch_size=3" in repr(held)


def test_a_recorder_warms_up_and_captures_on_one_stream_with_one_pool(monkeypatch):
    """What it asks of PyTorch, in order; PyTorch's own signatures take these arguments."""
    told, signature = [], inspect.signature(torch.cuda.graph.__init__)

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            told.append("replay")

    @contextmanager
    def stream(which):
        told.append(f"on {which.name}")
        yield

    @contextmanager
    def graph(*args, **kwargs):
        asked = signature.bind(None, *args, **kwargs).arguments
        told.append(f"capture on {asked['stream'].name} in {asked['pool']}, {asked['capture_error_mode']}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream("own"))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    recorder = session.Recorder(torch.device("cuda"))
    recorder.warm_up(lambda: told.append("computed"))
    replay, result = recorder.capture(lambda: torch.ones(1))
    replay()
    assert result.item() == 1
    assert told == [
        "side waits for own", "on side", "computed", "own waits for side",
        "side waits for own", "capture on side in the pool, thread_local", "own waits for side",
        "replay",
    ]  # fmt: skip
