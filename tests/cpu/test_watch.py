"""What the host knows of persistent launches: which of them timed out, and whose turn it is on a device."""

import importlib.util
import threading
from types import SimpleNamespace

import pytest
import torch
from lstm_triton_kernels import watch
from lstm_triton_kernels.watch import WORDS, ErrorWords

import lstm_triton

CPU, CUDA, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
TIMED_OUT = (
    "a persistent launch timed out waiting for the other thread blocks; the results are invalid; often another "
    "process holds multiprocessors: "
)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    """No test sees the flags of another."""
    monkeypatch.setattr(watch, "_error_words", {})


def said(flags):
    with pytest.raises(RuntimeError) as raised:
        flags.check()
    text = str(raised.value)
    assert text.startswith(TIMED_OUT)
    return text.removeprefix(TIMED_OUT)


def test_a_word_is_one_zero_that_a_launch_can_write():
    flags = ErrorWords(CPU)
    word = flags.take("first")
    assert word.shape == (1,) and word.dtype == torch.int32 and word.item() == 0
    assert word.data_ptr() != flags.take("second").data_ptr()
    flags.check()
    word.fill_(1)
    assert said(flags) == "first (a count was not reached)"


@pytest.mark.parametrize(
    "code, words",
    [
        (1, "a count was not reached"),
        (2, "values were not published"),
        (3, "a count was not reached and values were not published"),
    ],
)
def test_the_bits_are_told_in_words(code, words):
    flags = ErrorWords(CPU)
    flags.take("a launch").fill_(code)
    assert said(flags) == f"a launch ({words})"


def test_a_failure_is_told_once():
    flags = ErrorWords(CPU)
    word = flags.take("a launch")
    word.fill_(2)
    said(flags)
    assert word.item() == 0
    flags.check()
    word.fill_(1)  # a replayed graph writes the same word again
    assert said(flags) == "a launch (a count was not reached)"
    flags.check()


def test_several_failures_are_told_together_in_the_order_of_launches():
    flags = ErrorWords(CPU)
    words = [flags.take(f"launch {n}") for n in range(5)]
    words[3].fill_(1)
    words[1].fill_(2)
    assert said(flags) == "launch 1 (values were not published); launch 3 (a count was not reached)"
    flags.check()


def test_words_are_used_again_after_so_many_launches_and_named_anew():
    flags = ErrorWords(CPU)
    words = [flags.take(f"launch {n}") for n in range(WORDS + 3)]
    assert len({word.data_ptr() for word in words}) == WORDS
    assert all(words[n].data_ptr() == words[WORDS + n].data_ptr() for n in range(3))
    words[2].fill_(1)
    assert said(flags) == f"launch {WORDS + 2} (a count was not reached)"
    words[3].fill_(1)
    assert said(flags) == "launch 3 (a count was not reached)"
    words[WORDS - 1].fill_(1)
    assert said(flags) == f"launch {WORDS - 1} (a count was not reached)"


def test_the_bits_are_those_that_the_kernels_write():
    from lstm_triton_kernels import sync

    assert set(watch.TIMED_OUT) == {sync.TIMED_OUT_COUNT.value, sync.TIMED_OUT_DATA.value}
    assert "count" in watch.TIMED_OUT[sync.TIMED_OUT_COUNT.value]


def test_a_device_has_its_flags_once(monkeypatch):
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **k: torch.full(shape, int(pin_memory), **k))
    host, first, second = watch.error_words_of(CPU), watch.error_words_of(CUDA), watch.error_words_of(OTHER)
    assert watch.error_words_of(CUDA) is first and watch.error_words_of(CPU) is host and len({host, first, second}) == 3
    assert host.words[0] == 0 and first.words[0] == 1, "the words of a GPU are in pinned memory"
    assert len(first.words) == WORDS


def test_check_launches_asks_every_device():
    lstm_triton.check_launches()
    assert lstm_triton.check_launches is watch.check_launches
    watch._error_words.update({CUDA: ErrorWords(CPU), OTHER: ErrorWords(CPU)})
    lstm_triton.check_launches()
    for device in (OTHER, CUDA):
        watch.error_words_of(device).take(f"a launch on {device}").fill_(1)
        with pytest.raises(RuntimeError, match=f"a launch on {device} "):
            lstm_triton.check_launches()
        lstm_triton.check_launches()


# The library asks whenever it is called.


def give_up(name="the forward pass of 7 units"):
    watch.error_words_of(CPU).take(name).fill_(1)


@pytest.mark.parametrize("grad", [True, False])
def test_the_next_call_of_a_layer_raises(grad):
    layer, x = lstm_triton.LSTM(3, 4, peephole="full").requires_grad_(grad), torch.randn(2, 1, 3)
    expected = layer(x)[0]
    give_up()
    with pytest.raises(RuntimeError, match=r"holds multiprocessors: the forward pass of 7 units \(a count"):
        layer(x)
    torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("peephole", [None, "full"])
def test_the_next_call_of_a_cell_raises(peephole):
    cell = lstm_triton.LSTMCell(3, 4, peephole=peephole)
    give_up()
    with pytest.raises(RuntimeError, match="the forward pass of 7 units"):
        cell(torch.randn(2, 3))


def test_the_backward_pass_raises_and_leaves_no_gradients():
    layer, x = lstm_triton.LSTM(3, 4, peephole="full"), torch.randn(2, 1, 3)
    loss = layer(x)[0].sum()
    give_up("the forward pass of this layer")
    with pytest.raises(RuntimeError, match="the forward pass of this layer"):
        loss.backward()
    assert all(p.grad is None for p in layer.parameters())


def test_a_compiled_layer_raises():
    torch._dynamo.reset()
    layer, x = lstm_triton.LSTM(3, 4, coupled=True), torch.randn(2, 1, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)
    give_up()
    with pytest.raises(RuntimeError, match="the forward pass of 7 units"):
        compiled(x)
    compiled(x)


# Whose turn it is. CUDA is replaced by parts that note what they are asked.


class Stream:
    """A stream that notes what it waits for and what is recorded on it."""

    def __init__(self):
        self.waited, self.recorded = [], []

    def wait_event(self, event):
        assert event.stream is not None, "an event that nobody recorded holds up nothing"
        self.waited.append(event)


class Event:
    stream = None

    def record(self, stream):
        self.stream = stream
        stream.recorded.append(self)


@pytest.fixture
def cuda(monkeypatch):
    """What the calling thread's device does: `stream` is its current one, `capturing` whether a graph is captured."""
    state = SimpleNamespace(stream=Stream(), capturing=False, asked=[])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: state.asked.append(device) or state.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return state


@pytest.fixture
def own():
    """The module loaded anew: its lock, events and flags are no other test's, whatever becomes of them."""
    spec = importlib.util.find_spec("lstm_triton_kernels.watch")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ends(function, seconds=5.0):
    """Whether the function comes to its end, in a thread of its own; an exception of it is raised here."""
    raised = []

    def run():
        try:
            function()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()


def take_turn(own, device=CUDA):
    with own.one_at_a_time(device):
        pass


def test_on_the_cpu_a_turn_is_nothing(own, monkeypatch):
    def asked(*_):
        raise AssertionError("CUDA was asked")

    for name in ("current_stream", "is_current_stream_capturing", "Event"):
        monkeypatch.setattr(torch.cuda, name, asked)

    def nested():
        with own.one_at_a_time(CPU), own.one_at_a_time(CPU):
            pass

    assert ends(nested)
    assert own._last == {}


def test_the_same_stream_never_waits(own, cuda):
    for _ in range(3):
        take_turn(own)
    assert cuda.stream.waited == [] and len(cuda.stream.recorded) == 3
    assert cuda.asked == [CUDA] * 3


def test_another_stream_waits_for_the_last_launch(own, cuda):
    first, second, third = Stream(), Stream(), Stream()
    for stream in (first, first, second, second, third, first):
        cuda.stream = stream
        with own.one_at_a_time(CUDA):
            stream.before = (len(stream.waited), len(stream.recorded))
    assert second.waited == [first.recorded[1]]
    assert third.waited == [second.recorded[1]]
    assert first.waited == [third.recorded[0]]
    assert third.before == (1, 0), "it waits before the launch, and records after it"


def test_devices_take_turns_apart(own, cuda):
    here, there = Stream(), Stream()
    for stream, device in ((here, CUDA), (there, OTHER), (here, CUDA), (there, OTHER)):
        cuda.stream = stream
        take_turn(own, device)
    assert here.waited == there.waited == []
    cuda.stream = there
    take_turn(own, CUDA)
    assert there.waited == [here.recorded[1]]


def test_a_capture_neither_waits_nor_records(own, cuda):
    first, second = Stream(), Stream()
    cuda.stream = first
    take_turn(own)
    cuda.stream, cuda.capturing = second, True
    take_turn(own)
    assert second.waited == second.recorded == []
    cuda.stream, cuda.capturing = first, False
    take_turn(own)
    assert first.waited == [] and len(first.recorded) == 2, "the capture left no trace"
    cuda.stream = second
    take_turn(own)
    assert second.waited == [first.recorded[1]]


@pytest.mark.parametrize("capturing", [False, True])
def test_a_launch_that_fails_leaves_the_turn_to_others(own, cuda, capturing):
    first, second = Stream(), Stream()
    cuda.stream = first
    take_turn(own)
    cuda.capturing = capturing
    with pytest.raises(ZeroDivisionError), own.one_at_a_time(CUDA):
        raise ZeroDivisionError
    assert len(first.recorded) == 1
    cuda.stream, cuda.capturing = second, False
    assert ends(lambda: take_turn(own))
    assert second.waited == [first.recorded[0]]


def test_a_launch_takes_its_word_within_its_turn(own, cuda):
    """`sequence_persistent` makes the arguments of a launch inside its turn, the word for errors among them."""
    own._error_words[CUDA] = own.ErrorWords(CPU)

    def launch():
        with own.one_at_a_time(CUDA):
            own.error_words_of(CUDA).take("a launch")

    assert ends(launch, seconds=2.0), "the turn and the flags wait for each other"
    assert own._error_words[CUDA].names[0] == "a launch"


def test_two_threads_launch_one_after_the_other(own, cuda):
    inside, entered, leave = threading.Event(), threading.Event(), threading.Event()

    def first():
        with own.one_at_a_time(CUDA):
            inside.set()
            leave.wait(5.0)

    def second():
        with own.one_at_a_time(CUDA):
            entered.set()

    threads = [threading.Thread(target=f, daemon=True) for f in (first, second)]
    threads[0].start()
    assert inside.wait(5.0)
    threads[1].start()
    assert not entered.wait(0.1), "both launch at once"
    leave.set()
    assert entered.wait(5.0)
    for thread in threads:
        thread.join(5.0)
