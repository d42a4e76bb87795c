"""Several layers at the same time: the schedule and its simulation, and when the chooser takes it."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lstm_triton_kernels.gpus import GPUS, share_of
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.schedule import Schedule, Times, makespan, simulate
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import STANDARD
from lstm_triton_kernels.tensor_core_plan import product_clocks

import lstm_triton
from lstm_triton import LSTMSpec, captured, overlap, plan_words, stack

H100 = GPUS["h100"]


def some_schedules(count: int = 300):
    """Schedules of all sizes, with times at random."""
    rng = random.Random(7)
    for _ in range(count):
        layers, steps, lanes = rng.randint(1, 9), rng.randint(1, 70), rng.randint(1, 6)
        times = Times(*(rng.choice((0.0, rng.random() * 20)) for _ in range(3)), rng.random() * 5, rng.random())
        yield Schedule(layers, steps, rng.randint(1, steps), lanes), times


def stack_of(T: int, B: int, H: int, L: int, I: int = 0, dtype: torch.dtype = torch.float16) -> Layer:  # noqa: E741
    """The first layer of a stack in training."""
    return Layer(STANDARD, T, B, H, 1, dtype, I=I or H, L=L, training=True)


def times_of(layer: Layer, backward: bool, lanes: int, chunk: int) -> Times:
    """Of the tasks of a pass on an H100."""
    found = overlap.times_of(layer, backward, H100, lanes, chunk)
    assert isinstance(found, Times), found
    return found


def alone_us(layer: Layer, backward: bool) -> float:
    """The time of one layer alone on the whole H100, by its best plan, its matrix product included."""
    product = times_of(layer, False, 1, layer.T).product
    times = times_of(layer, backward, 1, layer.T)
    return product + times.start + layer.T * times.step


def test_every_task_is_launched_once_after_those_that_it_needs():
    for schedule, _ in some_schedules():
        tasks = list(schedule.tasks())
        place = {(task.layer, task.chunk): n for n, task in enumerate(tasks)}
        assert sorted(place) == list(itertools.product(range(schedule.layers), range(schedule.chunks)))
        for (layer, chunk), n in place.items():
            assert layer == 0 or place[layer - 1, chunk] < n
            assert chunk == 0 or place[layer, chunk - 1] < n
        assert {task.lane for task in tasks} <= set(range(schedule.lanes))


@pytest.mark.parametrize("backward", [False, True])
def test_the_chunks_are_all_time_steps_in_turn(backward):
    for schedule, _ in some_schedules():
        steps = [range(schedule.steps)[schedule.span(n, backward)] for n in range(schedule.chunks)]
        assert all(1 <= len(part) <= schedule.chunk for part in steps)
        in_turn = [t for part in (steps[::-1] if backward else steps) for t in part]
        assert in_turn == list(range(schedule.steps))


def test_the_simulation_keeps_to_lanes_and_dependencies_and_leaves_no_lane_idle_without_a_reason():
    for schedule, times in some_schedules():
        intervals = simulate(schedule, times)
        of = {(each.task.layer, each.task.chunk): each for each in intervals}
        before = {}
        for number, each in enumerate(intervals):
            layer, chunk, lane = each.task
            steps = range(schedule.steps)[schedule.span(chunk)]
            above = of[layer - 1, chunk].end if layer else 0.0
            begins = (before[lane].end if lane in before else 0.0, above, (number + 1) * times.host)
            assert each.begin == max(begins)
            last = of[layer, chunk - 1].end if chunk else 0.0
            product = (times.product if layer else times.first_product) * len(steps) / schedule.chunk
            assert each.steps_begin == pytest.approx(max(each.begin + product, last))
            assert each.end - each.steps_begin == pytest.approx(times.start + len(steps) * times.step)
            before[lane] = each


def test_a_simulation_that_can_be_counted_on_fingers():
    """Three layers, three chunks of two steps, a microsecond each, on enough lanes: five chunks one after the other."""
    assert makespan(Schedule(3, 6, 2, 3), Times(0, 0, 0, 1.0)) == 10
    assert makespan(Schedule(3, 6, 2, 1), Times(0, 0, 0, 1.0)) == 18
    assert makespan(Schedule(3, 6, 6, 3), Times(0, 0, 0, 1.0)) == 18
    # From layer to layer a product, a start and two steps; within the last layer the product is there in time.
    assert makespan(Schedule(3, 6, 2, 3), Times(3, 3, 1, 1.0)) == 3 * (3 + 1 + 2) + 2 * (1 + 2)
    assert makespan(Schedule(2, 4, 2, 2), Times(0, 0, 0, 1.0, host=5.0)) == 4 * 5 + 2  # the host launches one each 5 us


def test_never_more_programs_than_have_a_place():
    """At any time of the simulation, in every multiprocessor's worth of places; a program has a place by itself."""
    checked = 0
    for B, H, L, backward in itertools.product((1, 16, 64, 100), (64, 256, 512, 1000), (2, 5, 9), (False, True)):
        layer = stack_of(90, B, H, L)
        for lanes in range(2, min(L, overlap.MOST_LANES) + 1):
            plans = ranked_plans(layer, backward, share_of(H100, lanes))
            if isinstance(plans, str):
                continue
            intervals = simulate(Schedule(L, 90, 16, lanes), times_of(layer, backward, lanes, 16))
            most = 0
            for each in intervals:
                running = [other for other in intervals if other.begin <= each.begin < other.end]
                most = max(most, len(running))
                assert len({other.task.lane for other in running}) == len(running)
            for plan in plans[:4]:  # any of these may be settled for, if those before it spill
                assert plan.alone or most * plan.programs <= plan.together * H100.multiprocessors
                checked += 1
    assert checked > 300


RATIOS = {
    (64, 1024): (5.12, 5.14), (32, 1024): (4.63, 4.45), (16, 1024): (3.94, 3.21), (8, 1024): (2.88, 2.60),
    (64, 512): (4.47, 4.63), (16, 512): (2.35, 2.36), (8, 512): (1.80, 2.14), (64, 256): (3.17, 3.37),
}  # fmt: skip
"""(B, H) to the time of five layers of 557 steps in fp16, forward and backward, in times of one layer alone on the
whole H100: the least on two to five lanes, simulated."""


def least_us(layer: Layer, backward: bool) -> float:
    """The least time of the stack on two lanes or more, on an H100."""
    return min(
        makespan(Schedule(layer.L, layer.T, chunk, lanes), times)
        for lanes in range(2, layer.L + 1)
        for chunk in overlap.CHUNKS
        if chunk < layer.T and isinstance(times := overlap.times_of(layer, backward, H100, lanes, chunk), Times)
    )


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("B", "H"), RATIOS)
def test_five_layers_in_times_of_one(B, H, backward):
    """A better plan may move these numbers, but not by much without a word in the notes."""
    layer = stack_of(557, B, H, 5)
    least = least_us(layer, backward)
    assert least / alone_us(layer, backward) == pytest.approx(RATIOS[B, H][backward], abs=0.3)
    chosen = overlap.overlap_of(layer, backward, H100)
    apart = makespan(Schedule(5, 557, 557, 1), times_of(layer, backward, 1, 557))
    if isinstance(chosen, str):
        assert least >= overlap.FASTER * apart and "would take" in chosen
    else:
        assert chosen.us == least < overlap.FASTER * apart == overlap.FASTER * chosen.apart_us


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("B", [32, 64])
def test_the_layers_of_rnn_t_fill_the_gpu_one_by_one(B, backward):
    """Its two layers and its three: on half of the multiprocessors a step takes nearly twice as long."""
    for layer in (stack_of(557, B, 1024, 2, 240), stack_of(279, B, 1024, 3, 2048)):
        apart = makespan(Schedule(layer.L, layer.T, layer.T, 1), times_of(layer, backward, 1, layer.T))
        assert least_us(layer, backward) > 0.95 * apart
        assert "would take" in overlap.overlap_of(layer, backward, H100)


def test_what_five_layers_of_rnn_t_multiply_takes_twice_as_long_as_one_layer():
    """Of 64 rows: even if nobody ever waited, two and a half times one layer would take most of the tensor cores' rate.

    The rates are those of the estimates: of the products in a step, and of those between the layers.
    """
    layer = stack_of(557, 64, 1024, 5)
    operations = 2 * 64 * 4 * 1024 * 1024
    clocks = product_clocks(layer, H100)
    in_step = operations / (4096 * 4 * H100.multiprocessors / clocks * H100.clock_ghz * 1e3)
    between = operations / (overlap.PRODUCT_RATE * H100.tflop_per_s["float16"] * 1e6)
    assert 2.0 < 5 * (in_step + between) * 557 / alone_us(layer, False) < 2.2
    assert isinstance(ranked_plans(layer, False, share_of(H100, 5)), str)  # its weights do not fit a fifth


def test_outside_of_a_graph_the_host_would_decide():
    layer = stack_of(557, 16, 512, 5)
    chosen = overlap.overlap_of(layer, False, H100)
    times = times_of(layer, False, chosen.lanes, chosen.chunk)
    assert makespan(Schedule(5, 557, chosen.chunk, chosen.lanes), times) == chosen.us < 0.5 * chosen.apart_us
    with_host = times._replace(host=100.0)
    assert makespan(Schedule(5, 557, chosen.chunk, chosen.lanes), with_host) > chosen.apart_us


@pytest.mark.parametrize(
    ("change", "asked", "recompute", "reason"),
    [
        (dict(L=1), (), False, "one layer"),
        (dict(D=2), (), False, "both directions"),
        (dict(P=3), (), False, "projection"),
        (dict(spec=LSTMSpec(peephole="full")), (), False, "full peephole"),
        (dict(T=1), (), False, "nothing to cut"),
        (dict(B=0), (), False, "nothing to cut"),
        (dict(), ("lengths",), False, "lengths"),
        (dict(), ("return_cell_states",), False, "cell states"),
        (dict(), (), True, "recompute"),
    ],
)
def test_what_is_computed_one_layer_after_another(change, asked, recompute, reason):
    layer = stack_of(64, 4, 32, 3)
    assert overlap.why_not(layer) is None and overlap.why_not(layer, ("resets",)) is None
    found = overlap.why_not(layer._replace(**change), asked, recompute)
    assert found is not None and reason in found


def test_no_plan_on_a_share_is_said():
    found = overlap.overlap_of(stack_of(557, 64, 2600, 2), False, H100)
    assert "no plan fits a share" in found


def test_few_steps_are_one_chunk():
    assert "one chunk" in overlap.overlap_of(stack_of(16, 4, 64, 3), False, H100)


# Streams and events, with stand-ins that know what happened before what.


class FakeStream:
    """What is launched on a stream happens after all that it has seen: what was launched before, and waited for."""

    current: FakeStream

    def __init__(self, device=None):
        self.seen = set()

    def wait_stream(self, other):
        self.seen |= other.seen

    def wait_event(self, event):
        self.seen |= event.seen


class FakeEvent:
    def record(self, stream):
        self.seen = set(stream.seen)


@contextmanager
def on_stream(stream):
    before, FakeStream.current = FakeStream.current, stream
    try:
        yield
    finally:
        FakeStream.current = before


def follow_on_streams(schedule, fails):
    """Launch a schedule, and check before each part of a task that its stream has seen what the part needs."""
    FakeStream.current = caller = FakeStream()
    caller.seen.add("before")
    launched = []

    def product(task):
        seen = FakeStream.current.seen
        assert "before" in seen and (task.layer == 0 or (task.layer - 1, task.chunk) in seen)
        return "product", task

    def steps(task, found):
        seen = FakeStream.current.seen
        assert found == ("product", task) and (task.chunk == 0 or (task.layer, task.chunk - 1) in seen)
        if fails and len(launched) == schedule.layers * schedule.chunks // 2:
            raise MemoryError
        seen.add((task.layer, task.chunk))
        launched.append((task.layer, task.chunk))

    with pytest.raises(MemoryError) if fails else nullcontext():
        stack.follow(schedule, torch.device("cuda"), product, steps)
    assert FakeStream.current is caller and caller.seen == {"before", *launched}
    return launched


@pytest.mark.parametrize("fails", [False, True])
def test_streams_wait_for_what_a_task_needs_and_are_joined(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: FakeStream.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for schedule, _ in some_schedules(60):
        monkeypatch.setattr(stack, "_streams", {})
        launched = follow_on_streams(schedule, fails)
        assert fails or launched == [(task.layer, task.chunk) for task in schedule.tasks()]
        assert len(stack.others(torch.device("cuda"), 0)) == 0 and len(*stack._streams.values()) == schedule.lanes - 1


# Who asks for it, and what is said of it.


def test_a_stack_is_overlapped_while_its_graphs_are_captured_and_then_alone(monkeypatch):
    asked = []

    def make_graphed(function, static, **_):
        asked.append(getattr(stack._asked, "how", None))
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed)
    monkeypatch.setattr(captured, "has_graphs", lambda device: True)
    module, x = lstm_triton.LSTM(3, 4, num_layers=2), torch.randn(5, 2, 3)
    for fast in (module.captured(), module.captured(overlap=True)):
        assert torch.equal(fast(x)[0], module(x)[0])
        assert getattr(stack._asked, "how", None) is None
    assert asked == [None, (None,)]
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert again.overlap and repr(again).endswith(", overlap=True)")
    with pytest.raises(TypeError, match="overlap should be of type bool"):
        module.captured(overlap=1)


def test_asking_holds_for_the_block_and_the_thread():
    with stack.overlapping(overlap.Overlap(2, 16)):
        with stack.overlapping():
            assert stack._asked.how == (None,)
        assert stack._asked.how == (overlap.Overlap(2, 16),)
    assert stack._asked.how is None


def explained(B: int, H: int = 512, **options) -> str | None:
    """The line on the layers in an explanation of five layers on an H100."""
    options = dict(num_layers=5, strategy="persistent", dtype=torch.float16, device="meta") | options
    call = {name: options.pop(name) for name in ("lengths", "return_cell_states") if name in options}
    module = lstm_triton.LSTM(H, H, **options)
    x = torch.empty(557, B, H, dtype=torch.float16, device="meta")
    (report,) = module.explain(x, gpu="h100", **call).reports
    assert module.explain(x, gpu="h100", **call).to_dict()["devices"][0]["layers"] == report.layers
    assert (f"  layers         {(report.layers or '')[:30]}" in str(module.explain(x, gpu="h100", **call))) == (
        report.layers is not None
    )
    return report.layers


def test_an_explanation_says_whether_layers_overlap():
    few = explained(16)
    assert few.startswith("by captured(overlap=True) forward 4 at a time in chunks of ")
    assert "; backward 4 at a time in chunks of " in few and few.endswith(" simulated; else one after another")
    of_rnn_t = explained(64, 1024)
    assert of_rnn_t.startswith("one after another: forward, 2 layers at a time would take ")
    assert "; backward, 2 layers at a time would take " in of_rnn_t
    one = overlap.Overlap(2, 32, 50.0, 100.0)
    assert plan_words.layers({"forward": one}) == (
        "by captured(overlap=True) forward 2 at a time in chunks of 32 steps: 0.50 of the time of one after another, "
        "simulated; else one after another"
    )
    assert explained(16, return_cell_states=True) == "one after another: the cell states are returned"
    assert explained(16, recompute=True).startswith("one after another: recompute=True")
    assert explained(16, num_layers=1) is None
    assert explained(16, strategy="stepwise") is None


# Dropout.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_dropout_drawn_ahead_and_applied_in_parts_is_that_of_pytorch(p, dtype):
    """Bit for bit, the gradient too; two layers, one after the other from the same generator."""
    sequences = [torch.randn(7, 3, 5, dtype=dtype, requires_grad=True) for _ in range(2)]
    gradients = [torch.randn(7, 3, 5, dtype=dtype) for _ in range(2)]
    torch.manual_seed(3)
    wanted = [torch.nn.functional.dropout(x, p) for x in sequences]
    left = torch.rand(3)
    torch.manual_seed(3)
    masks = [stack.dropout_mask(torch.ones(7, 3, 5, dtype=dtype), p) for _ in range(2)]
    assert torch.equal(torch.rand(3), left)
    for x, mask, result, gradient in zip(sequences, masks, wanted, gradients, strict=True):
        found, grads = torch.empty_like(result), []
        for part in (slice(0, 4), slice(4, 7)):
            stack.drop(x.detach()[part], mask[part], p, found[part])
            grads.append(stack.drop_backward(gradient[part], mask[part], p))
        assert torch.equal(found, result)
        assert torch.equal(torch.cat(grads), *torch.autograd.grad(result, x, gradient))
