"""The harness on a CPU: every provider right before it is timed, every fault a row, rows on the disk as they finish."""

import io
import math
import re
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lstm_triton_kernels import gpus
from lstm_triton_kernels.limit import Constants
from lstm_triton_kernels.watch import error_words_of
from rich.console import Console

from benchmarks import bench, check, gpu, rows, run, suites, timing, warm
from benchmarks.environment import environment
from benchmarks.problem import MOST_SETS, make_problem
from benchmarks.providers import (
    BASELINES,
    PROVIDERS,
    ByHand,
    CompiledReference,
    FlashRNN,
    How,
    LstmTriton,
    ModuleModel,
    TorchLSTM,
    TorchRL,
    baseline_of,
)
from benchmarks.suites import FORWARD, TRAINING, Case
from benchmarks.worker import Worker
from lstm_triton import captured, routing, session
from tests.support import planted

CPU = torch.device("cpu")
CASE = Case("odd", T=5, B=3, I=6, H=7, dtype="float32", mode=TRAINING)
LONG = replace(CASE, T=check.STEPS + 3)
WHERE = dict(gpu="a CPU", driver="", torch="2.13.0", triton="", cudnn="", commit="abc", date="2026-11-24")
STREAM = replace(CASE, suite="streaming", mode=FORWARD, stream=True)
BASELINE, AUTO, SESSION = TorchLSTM("aten"), LstmTriton("auto"), LstmTriton("session")
TIMES = timing.columns([1.0, 2.0, 4.0], [2.0, 3.0, 5.0])


@pytest.fixture(autouse=True)
def precision():
    """Rows set PyTorch's switches for float32; other tests find them as they were."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


@pytest.fixture
def measured():
    """A bench that takes little time."""
    return bench.Bench(CPU, BASELINES, 0.01)


def row_of(provider, case, found, device_type="cpu"):
    return run.row(run.Task(provider, case), found, WHERE, None, device_type)


# The problem


def test_the_same_seed_gives_the_same_problem_and_another_another():
    first, second, other = (make_problem(CASE, CPU, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs[0], second.inputs[0]) and not torch.equal(first.inputs[0], other.inputs[0])
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    for options in ({}, dict(num_layers=2, bidirectional=True, proj_size=3)):
        case = replace(CASE, L=2, D=2, P=3) if options else CASE
        named = torch.nn.LSTM(CASE.I, CASE.H, **options).named_parameters()
        found = make_problem(case, CPU)
        assert {name: w.shape for name, w in found.weights.items()} == {name: w.shape for name, w in named}
        assert found.grad_output.shape == (5, 3, 2 * 3 if options else 7)


def test_inputs_that_would_fit_the_cache_come_in_several_sets():
    bytes_of_x = 5 * 3 * 6 * 4
    assert len(make_problem(CASE, CPU, cache_bytes=bytes_of_x - 1).inputs) == 1
    few = make_problem(CASE, CPU, cache_bytes=3 * bytes_of_x).inputs
    assert len(few) == 6 and len({tuple(x.flatten().tolist()) for x in few}) > 1
    assert len(make_problem(CASE, CPU, cache_bytes=10**9).inputs) == MOST_SETS
    assert all(x.requires_grad for x in few)
    assert not make_problem(replace(CASE, mode=FORWARD), CPU).inputs[0].requires_grad


def test_ragged_lengths_are_in_range_and_reach_t():
    lengths = make_problem(replace(CASE, T=9, B=200, ragged=True), CPU).lengths
    assert lengths.min() == 1 and lengths.max() == 9 and lengths[0] == 9 and len(set(lengths.tolist())) == 9


# Right or wrong


CASES = [
    CASE,
    LONG,
    replace(CASE, L=2, D=2),
    replace(LONG, P=3),
    replace(CASE, L=2, D=2, P=3, variant="diagonal+current"),
    replace(CASE, T=1, cell=True),
    replace(CASE, dtype="bfloat16"),
    replace(CASE, variant="coupled"),
    replace(LONG, variant="full", D=2),
    replace(CASE, T=1, cell=True, variant="diagonal+current"),
]


@pytest.mark.parametrize("mode", suites.MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_provider_of_the_cpu_is_right_and_timed(measured, case, mode):
    case = replace(case, mode=mode)
    for provider in (BASELINE, AUTO, CompiledReference(backend="eager")):
        if (refusal := provider.refuses(case, "cpu")) is not None:
            alone = case.L * case.D > 1 or case.P
            assert case.variant != "standard" if provider is BASELINE else alone, refusal
            continue
        found = measured.measure(provider, case)
        row = row_of(provider, case, found)
        assert found.failure is None and 0 < row["error"] < check.ALLOWED[case.dtype] and row["P"] == case.P
        assert 0 < row["ms_p20"] <= row["ms_median"] <= row["ms_p80"] and row["peak_mib"] > 0
        assert row["cpu_us_per_call"] > 0 and row["baseline_ratio"] == row["baseline_ms"] / row["ms_median"]
        assert (row["ratio_p20"] is None) == (provider is BASELINE) == (rows.ratio_of(row) is None)


@pytest.mark.parametrize("mode", suites.MODES)
@pytest.mark.parametrize("variant", suites.VARIANTS)
@pytest.mark.parametrize("suite, T", [("overhead", 1), ("overhead", 3), ("overhead-cell", 1)])
def test_a_step_by_hand_is_right_and_the_baseline_of_variants(measured, suite, T, variant, mode):
    case = replace(CASE, suite=suite, T=T, variant=variant, mode=mode, cell=suite == "overhead-cell")
    for provider in (ByHand(), AUTO):
        found = measured.measure(provider, case)
        assert found.failure is None and found.columns["error"] < 1e-5
        baseline = "torch.nn.LSTM" if variant == "standard" else "by-hand"
        row = row_of(provider, case, found)
        assert row["baseline"] == baseline and (rows.ratio_of(row) is None) == (provider.name == baseline)


def test_the_baseline_computes_the_case_or_the_standard_cell_of_its_sizes():
    coupled = replace(CASE, variant="coupled")
    few = replace(coupled, suite="overhead")
    for case, device, key, theirs in (
        (CASE, "cpu", "torch.nn.LSTM:aten", CASE), (CASE, "cuda", "torch.nn.LSTM:cudnn", CASE),
        (coupled, "cpu", "torch.nn.LSTM:aten", CASE), (few, "cpu", "by-hand:eager", few),
    ):  # fmt: skip
        provider, computed = baseline_of(case, device)
        assert (provider.key, computed) == (key, theirs)
    assert ByHand().refuses(CASE, "cpu") and ByHand().refuses(replace(few, variant="full+current"), "cpu")


def test_nothing_is_entered_around_a_call_where_nothing_is_asked():
    """It would be entered within the time of the call, and of this library's calls alone."""
    problem = make_problem(CASE, CPU)
    none = type(BASELINE.build(problem).settings())
    assert type(AUTO.build(problem).settings()) is none
    assert type(LstmTriton("torch").build(problem).settings()) is not none


@pytest.mark.parametrize("mode", suites.MODES)
def test_a_compiled_module_is_right_in_one_graph(measured, monkeypatch, mode):
    monkeypatch.setitem(LstmTriton.HOW, "torch.compile", How(compiler="aot_eager"))
    torch._dynamo.reset()
    compiled, case = LstmTriton("torch.compile"), replace(LONG, suite="compile", mode=mode)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = measured.measure(compiled, case)
    assert found.failure is None and found.columns["error"] < 1e-5 and found.columns["ratio_p20"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert compiled.refuses(CASE, "cpu") == "is measured in smaller suites"
    assert {p.key for p in PROVIDERS.values() if p.refuses(case, "cpu") is None} == {
        "torch.nn.LSTM:aten", "lstm_triton:auto", "lstm_triton:torch.compile"
    }  # fmt: skip


def test_ragged_rows_end_where_packed_ones_do(measured):
    case = replace(CASE, T=check.STEPS + 5, B=5, D=2, L=2, ragged=True)
    mean_rows = float(make_problem(case, CPU).lengths.sum()) / case.T
    for provider in (BASELINE, AUTO, LstmTriton("lengths")):
        found = measured.measure(provider, case)
        assert found.failure is None and found.columns["error"] < 1e-5 and found.mean_rows == pytest.approx(mean_rows)


@pytest.mark.parametrize("mode", suites.MODES)
def test_rows_that_begin_anew_are_right_beside_the_standard_cell_without_resets(measured, mode):
    case = replace(LONG, suite="own", B=40, resets=0.1, mode=mode)
    problem = make_problem(case, CPU)
    assert problem.resets.shape == (case.T, case.B) and 0.05 < problem.resets.float().mean() < 0.15
    assert make_problem(CASE, CPU).resets is None and case.layer.ragged
    assert BASELINE.refuses(case, "cpu") == "takes no resets"
    assert baseline_of(case, "cpu") == (BASELINES[1], replace(case, resets=0.0))
    for provider in (AUTO, CompiledReference(backend="eager")):
        row = row_of(provider, case, measured.measure(provider, case))
        assert row["error"] < 1e-5 and rows.ratio_of(row) and row["baseline"] == "torch.nn.LSTM"
    both = replace(case, ragged=True, variant="coupled")
    for provider in (AUTO, LstmTriton("lengths")):
        assert measured.measure(provider, both).columns["error"] < 1e-5
    without = replace(problem, resets=None)
    assert (
        max(
            check.Oracle(problem)
            .errors(AUTO.build(make_problem(replace(case, T=check.STEPS, resets=0.0), CPU)), AUTO.build(without))
            .values()
        )
        > 0.01
    )


def test_every_suite_is_measured_at_small_sizes(monkeypatch):
    """Each case with its layers, directions, projection, cell, lengths, resets and name; few steps, rows and units."""
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 2)
    monkeypatch.setattr(timing, "peak_mib", lambda *_: 0.0)  # which takes longer than all the rest
    monkeypatch.setattr(bench, "free", lambda device: None)
    least = dict(T=3, B=2, I=3, H=4, P=2)
    small = {
        replace(case, **{size: min(most, getattr(case, size)) for size, most in least.items()}, rank=0)
        for case in suites.cases(suites.SUITES)
    }
    measured = bench.Bench(CPU, BASELINES, 1e-6)
    assert {case.suite for case in small} == set(suites.SUITES)
    for case in sorted(small, key=str):
        for provider in (AUTO, SESSION) if case.stream else (AUTO,):
            row = row_of(provider, case, measured.measure(provider, case))
            assert row["ms_median"], f"{provider.key} {case}: {row['error']}"
            assert (row["suite"], row["name"]) == (case.suite, case.name)


# Streams and CUDA graphs


@pytest.mark.parametrize(
    "change", [dict(), dict(T=1, L=2), dict(B=1, dtype="float16"), dict(P=3), dict(variant="full")], ids=str
)
def test_a_call_of_a_stream_goes_on_from_the_last_one_whoever_computes(measured, monkeypatch, change):
    monkeypatch.setattr(timing, "LEAST_ROUNDS", timing.LEAST_FOR_P99)
    case = replace(STREAM, **change)
    for provider in (BASELINE, AUTO, SESSION):
        if provider.refuses(case, "cpu") is None:
            row = row_of(provider, case, measured.measure(provider, case))
            assert row["error"] < 10 * check.FLOOR[case.dtype] and row["ms_median"] <= row["ms_p80"] <= row["ms_p99"]
    assert measured.measure(AUTO, replace(case, stream=False)).columns["ms_p99"] is None


def forgets(run_model, x):
    run_model.__self__.states = None
    return run_model(x)


def begins_at_the_first_chunk(run_model, x):
    model = run_model.__self__
    found = run_model(x)
    model.first = model.states = getattr(model, "first", model.states)
    return found


@pytest.mark.parametrize("fault", [forgets, begins_at_the_first_chunk])
def test_a_stream_that_does_not_go_on_is_wrong(measured, fault):
    provider = planted.Planted("planted", fault)
    assert measured.measure(provider, STREAM).failure.startswith("wrong: error")
    assert len(make_problem(STREAM, CPU).inputs) == 3
    assert measured.measure(planted.Planted("none", lambda run_model, x: run_model(x)), STREAM).failure is None


def test_a_row_of_graphs_that_could_not_be_captured_says_so(measured, monkeypatch):
    def fails(function):
        raise RuntimeError("planted")

    monkeypatch.setattr(session, "has_graphs", lambda device: True)
    recorder = SimpleNamespace(warm_up=lambda function: function(), capture=fails)
    monkeypatch.setattr(session, "Recorder", lambda device: recorder)
    found = measured.measure(SESSION, STREAM)
    assert found.failure == "failed: UserWarning: a session computes without CUDA graphs: capturing failed: planted"


@pytest.mark.parametrize("mode", suites.MODES)
def test_a_captured_stack_is_what_is_called(measured, monkeypatch, mode):
    asked, decide = [], captured.why_as_usual
    monkeypatch.setattr(captured, "why_as_usual", lambda *given, **more: asked.append(1) or decide(*given, **more))
    monkeypatch.setattr(LstmTriton, "why_not_captured", lambda *_: None)
    found = measured.measure(LstmTriton("captured"), replace(LONG, suite="deepbench", mode=mode))
    assert found.failure is None and found.columns["error"] < 1e-5 and len(asked) > timing.LEAST_ROUNDS


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("lstm_triton:session", dict(), "is for streams"),
        ("lstm_triton:session", dict(stream=True), None),
        ("lstm_triton:auto", dict(stream=True), None),
        ("lstm_triton:stepwise", dict(stream=True), "is not measured on streams"),
        ("lstm_triton:captured", dict(stream=True), "is not measured on streams"),
        ("torchrl:triton", dict(stream=True), "is called without states"),
        ("lstm_triton:captured", dict(), "is measured where a call computes little"),
        ("lstm_triton:captured", dict(suite="deepbench"), None),
        ("lstm_triton:captured", dict(suite="overhead", variant="full", resets=0.1), None),
        ("lstm_triton:captured", dict(suite="overhead", ragged=True), "is `auto` where rows have different lengths"),
        ("lstm_triton:captured", dict(suite="overhead", cell=True), "has no cell of one step"),
        ("lstm_triton:overlapped", dict(suite="overhead", L=2), "is measured where there are several layers"),
        ("lstm_triton:overlapped", dict(suite="deep"), "is `captured` here: there is one layer"),
        ("lstm_triton:overlapped", dict(suite="deep", D=2, L=2), "is `captured` here: a layer of both directions"),
    ],
)
def test_who_computes_from_graphs_and_who_streams(key, change, words):
    found = PROVIDERS[key].refuses(replace(CASE, **change), "cuda")
    assert found is None if words is None else found.startswith(words)
    for strategy, suite in (("captured", "deepbench"), ("overlapped", "deep")):
        assert LstmTriton(strategy).refuses(replace(CASE, suite=suite), "cpu") == "is `auto` on a CPU"


def test_a_stack_has_a_row_of_layers_at_the_same_time_where_that_gains(monkeypatch):
    monkeypatch.setattr(routing, "why_not_triton", lambda *_: None)
    monkeypatch.setattr(gpus, "gpu_of", lambda _: gpus.GPUS["h100"])
    provider = LstmTriton("overlapped")
    few = Case("deep", 512, 16, 512, 512, "float16", L=4)
    assert provider.refuses(few, "cuda") is None
    assert provider.plan(few, "cuda").startswith("by captured(overlap=True) forward 4 at a time in chunks of ")
    found = provider.refuses(Case("workloads", 557, 32, 240, 1024, "float16", L=2), "cuda")
    assert found is not None and found.startswith("one after another: forward, 2 layers at a time would take ")


@pytest.mark.parametrize(
    "provider, case, words",
    [
        (planted.WRONG_OUTPUT, CASE, "wrong: error 1.0e-02 of"),
        (planted.WRONG_LAST_STEP, LONG, "wrong: error"),
        (planted.WRONG_LAST_STEP, replace(LONG, mode=FORWARD), "wrong: error"),
        (planted.NAN, CASE, "wrong: error inf of"),
        (planted.RAISES, CASE, "failed: ValueError: a planted failure"),
        (planted.MEMORY, CASE, "out of memory: planted: 1 TiB wanted"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_planted_fault_becomes_words_and_the_next_row_is_measured(measured, provider, case, words):
    found = measured.measure(provider, case)
    assert found.failure.startswith(words) and "ms_median" not in found.columns
    assert measured.measure(AUTO, case).failure is None


def test_a_fault_beyond_the_first_steps_is_seen():
    """Only the look at all steps can see it: the last step is not among the first ones."""
    problem = make_problem(LONG, CPU)
    oracle = check.Oracle(problem)
    errors = oracle.errors(BASELINE.build(oracle.problem), planted.WRONG_LAST_STEP.build(problem))
    assert {name for name, error in errors.items() if error > 1e-4} == {f"output of {check.ROWS} rows over all steps"}


def test_a_forgotten_gradient_is_seen():
    problem = make_problem(CASE, CPU)
    with pytest.raises(RuntimeError, match="no gradient of weight_ih_l0"):
        check.results(planted.NoGradient(torch.nn.LSTM(CASE.I, CASE.H), problem), problem)


@pytest.mark.parametrize("fault", [planted.RAISES, planted.WRONG_OUTPUT], ids=lambda fault: fault.name)
def test_a_baseline_that_fails_leaves_the_others_without_a_ratio(fault):
    measured = bench.Bench(CPU, (fault,), 0.01)
    assert measured.measure(fault, CASE).failure.startswith(("failed: ValueError", "wrong"))
    row = row_of(AUTO, CASE, measured.measure(AUTO, CASE))
    assert row["ms_median"] > 0 and row["baseline_ratio"] is None and rows.outcome_of(row) == "timed alone"


def test_a_row_whose_launch_timed_out_has_no_time_and_the_next_row_has(measured):
    def times_out(run_model, x):
        error_words_of(CPU).take("a launch of the test")[0] = 2
        return run_model(x)

    found = measured.measure(planted.Planted("times out", times_out), CASE)
    assert found.failure.startswith("failed: RuntimeError: a persistent launch timed out")
    assert "a launch of the test (values were not published)" in found.failure and "ms_median" not in found.columns
    error_words_of(CPU).take("of a row that fails anyhow")[0] = 1
    assert measured.measure(planted.RAISES, CASE).failure.startswith("failed: ValueError")
    assert measured.measure(AUTO, CASE).failure is None


def test_what_is_allowed_and_what_is_an_error():
    for dtype in suites.STORAGE:
        assert check.allowed(dtype, None) == check.ALLOWED[dtype]
        assert check.allowed(dtype, 0.0) == check.FLOOR[dtype] < check.ALLOWED[dtype]
        assert check.allowed(dtype, 1.0) == 4.0
    with pytest.raises(RuntimeError, match=r"output has shape \(2,\) instead of \(3,\)"):
        check.distances({"output": torch.ones(2)}, {"output": torch.ones(3)})
    with pytest.raises(RuntimeError, match="returns h instead of output"):
        check.distances({"h": torch.ones(2)}, {"output": torch.ones(2)})
    assert check.distances({"x": torch.tensor([1.0, math.nan])}, {"x": torch.ones(2)}) == {"x": math.inf}


# Timing


def test_calls_take_turns_and_every_one_is_prepared():
    log = []

    def timed(name):
        return timing.Timed(lambda: log.append(f"before {name}"), lambda: log.append(name))

    columns = timing.in_turns([timed("a"), timed("b")], CPU, seconds=0.0)
    turns = [log[n : n + 4] for n in range(0, len(log), 4)][-timing.LEAST_ROUNDS :]
    assert [len(column) for column in columns] == [timing.LEAST_ROUNDS] * 2 and len(log) > 4 * timing.LEAST_ROUNDS
    orders = (["before a", "a", "before b", "b"], ["before b", "b", "before a", "a"])
    assert turns == [orders[n % 2] for n in range(timing.LEAST_ROUNDS)]


@pytest.fixture
def clock(monkeypatch):
    """A host's clock that moves by what is added to `seconds`, and by nothing else."""
    clock = SimpleNamespace(seconds=0.0, perf_counter=lambda: clock.seconds)
    monkeypatch.setattr(timing, "time", clock)
    return clock


def test_what_is_measured_is_the_call_alone_and_the_rounds_fit_the_time(clock):
    def advance(seconds):
        clock.seconds += seconds

    def taking(milliseconds, before=0.0):
        return timing.Timed(lambda: advance(before), lambda: advance(1e-3 * milliseconds))

    few = timing.in_turns([taking(20.0, before=5.0), taking(5.0, before=5.0)], CPU, seconds=0.1)
    assert [len(column) for column in few] == [timing.LEAST_ROUNDS] * 2  # preparing counts in the time there is
    assert few[0] == pytest.approx([20.0] * 5) and few[1] == pytest.approx([5.0] * 5)
    assert len(timing.in_turns([taking(1.0)], CPU, seconds=0.05)[0]) in (49, 50)
    assert len(timing.in_turns([taking(1.0)], CPU, seconds=9.0)[0]) == timing.MOST_ROUNDS


def test_a_call_that_is_waited_for_takes_until_the_device_is_done(clock, monkeypatch):
    """The device works on what a call, or what prepares it, has started; who synchronizes waits for that."""
    waiting = []

    def wait(device):
        clock.seconds += sum(waiting)
        waiting.clear()

    monkeypatch.setattr(timing, "synchronize", wait)
    timed = [
        timing.Timed(lambda: waiting.append(9.0), lambda ms=ms: waiting.append(1e-3 * ms), True) for ms in (4.0, 7.0)
    ]
    found = timing.in_turns(timed, torch.device("cuda"), seconds=0.0)
    assert found[0] == pytest.approx([4.0] * timing.LEAST_ROUNDS) and found[1] == pytest.approx([7.0] * 5)
    problems = make_problem(STREAM, CPU), make_problem(CASE, CPU)
    assert [bench.timed_call(BASELINE.build(one), one).waited_for for one in problems] == [True, False]


def test_the_ratio_is_the_quotient_of_the_two_times_of_the_same_turns(measured, monkeypatch):
    """So that a row's time, the baseline's beside it and the ratio agree, whenever the baseline's own row was timed."""
    monkeypatch.setattr(timing, "in_turns", lambda timed, *_: [[4.0, 2.0, 8.0], [2.0, 3.0, 5.0]][: len(timed)])
    row = row_of(AUTO, CASE, measured.measure(AUTO, CASE))
    assert (row["ms_median"], row["baseline_ms"], row["baseline_ratio"]) == (4.0, 3.0, 0.75)
    low, high = np.quantile([2 / 4, 3 / 2, 5 / 8], [0.2, 0.8])
    assert (row["ratio_p20"], row["ratio_p80"]) == pytest.approx((low, high)) and rows.is_noise(row)
    own = row_of(BASELINE, CASE, measured.measure(BASELINE, CASE))
    assert (own["ms_median"], own["baseline_ms"], own["baseline_ratio"], own["ratio_p20"]) == (4.0, 4.0, 1.0, None)


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).exponential(size=37)
    assert timing.quantiles(values.tolist()) == pytest.approx(np.quantile(values, [0.2, 0.5, 0.8]).tolist())
    assert timing.p99(many := [*range(timing.LEAST_FOR_P99)]) == pytest.approx(np.quantile(many, 0.99))
    assert timing.p99(many[1:]) is None


def test_peak_memory_is_the_most_at_a_time():
    def call():
        a = torch.zeros(1024, 256)  # 1 MiB
        b = a + 1
        del a
        return b * 2 + 1  # b, b * 2 and the sum: 3 MiB

    assert timing.peak_mib(timing.Timed(lambda: None, call), CPU) == pytest.approx(3.0, abs=0.01)


def test_gradients_are_none_and_inputs_fresh_before_each_call():
    problem = make_problem(CASE, CPU, cache_bytes=3 * 5 * 3 * 6 * 4)
    model = ModuleModel(torch.nn.LSTM(CASE.I, CASE.H), problem)
    seen = []
    run_model = model.run
    model.run = lambda x: (seen.append((x, [p.grad for p in model.parameters().values()])), run_model(x))[1]
    timed = bench.timed_call(model, problem)
    for _ in range(2 * len(problem.inputs)):
        timed.before()
        timed.call()
    assert all(x is problem.inputs[n % len(problem.inputs)] for n, (x, _) in enumerate(seen))
    assert all(grad is None for _, grads in seen for grad in grads)
    assert all(p.grad is not None for p in model.parameters().values())


# The worker and the run


def test_a_row_that_crashes_or_hangs_is_a_row_and_the_next_one_is_measured(tmp_path):
    worker = Worker("cpu", BASELINES, 0.01, tmp_path / "log")
    try:
        assert worker.measure(AUTO, CASE, 60.0).failure is None
        crashed = worker.measure(planted.CRASHES, CASE, 60.0)
        assert crashed.failure == "failed: the process that computed it ended (exit code 9)" and not crashed.stopped
        hung = worker.measure(planted.HANGS, CASE, 1.0)
        assert hung.failure == "failed: not done after 1 s, stopped" and hung.stopped
        assert worker.measure(AUTO, CASE, 60.0).failure is None
    finally:
        worker.close()


class FakeMeasures:
    """Answers at once; a clock moves on by what the row is said to take, and no further than the timeout."""

    def __init__(self, seconds):
        self.now, self.seconds, self.asked = 0.0, seconds, 0

    def measure(self, provider, case, timeout):
        self.asked += 1
        self.now += min(self.seconds, timeout)
        return bench.failed("failed: not done", stopped=True) if self.seconds > timeout else bench.Measurement(TIMES)


def rows_of(path, todo, fake, budget):
    make_row = lambda task, found: row_of(*task, found)  # noqa: E731
    return list(run.measure(todo, fake, budget, make_row, path, lambda: fake.now))


@pytest.mark.parametrize("budget, done", [(60.0, 8), (0.0, 0), (math.inf, None)])
def test_a_run_stops_in_time_and_leaves_the_last_rows_out(tmp_path, budget, done):
    todo = run.tasks(suites.cases(("cpu",)), [BASELINE, AUTO], "cpu")
    fake = FakeMeasures(seconds=7.0)
    found = rows_of(tmp_path / "x.csv", todo, fake, budget)
    done = len(todo) if done is None else done
    assert [row is not None for row in found] == [True] * done + [False] * (len(todo) - done) and fake.now <= budget
    assert (len(rows.read(tmp_path / "x.csv")) if done else 0) == done


def test_a_row_cut_off_by_the_budget_is_not_called_a_failure_but_one_that_hangs_is(tmp_path):
    path, todo = tmp_path / "x.csv", [run.Task(planted.HANGS, CASE)]
    assert rows_of(path, todo, FakeMeasures(seconds=500.0), budget=50.0) == [None] and not path.exists()
    (hung,) = rows_of(path, todo, FakeMeasures(seconds=500.0), budget=math.inf)
    assert hung["error"] == "failed: not done" and rows.read(path)[0]["error"] == hung["error"]


def test_what_was_done_when_a_run_is_killed_is_in_the_file(tmp_path):
    class Killed(FakeMeasures):
        def measure(self, provider, case, timeout):
            if self.asked == 3:
                raise KeyboardInterrupt
            return super().measure(provider, case, timeout)

    todo = run.tasks(suites.cases(("cpu",)), [BASELINE], "cpu")
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path / "x.csv", todo, Killed(1.0), budget=math.inf)
    assert [row["H"] for row in rows.read(tmp_path / "x.csv")] == [task.case.H for task in todo[:3]]


def test_the_highest_priority_comes_first_and_providers_only_get_what_they_compute():
    todo = run.tasks(suites.cases(("cpu", "variants"), modes=(FORWARD,)), list(PROVIDERS.values()), "cpu")
    ranks = [task.provider.rank(task.case) for task in todo]
    assert ranks == sorted(ranks) and len(set(todo)) == len(todo)
    assert {task.provider.key for task in todo} == {
        "torch.nn.LSTM:aten", "lstm_triton:auto", "reference:torch.compile"
    }  # fmt: skip
    ragged = run.tasks(suites.cases(("ragged",), modes=(FORWARD,)), list(PROVIDERS.values()), "cpu")
    assert {task.provider.key for task in ragged} == {"torch.nn.LSTM:aten", "lstm_triton:auto", "lstm_triton:lengths"}
    assert all(task.case.variant == "standard" for task in todo if task.provider.name == "torch.nn.LSTM")


def test_a_row_says_what_was_measured_and_how_far_the_limit_is():
    task = run.Task(AUTO, replace(CASE, T=10, L=2, D=2, variant="full"))
    known = Constants(copy_gb_per_s=1e-3, matmul_tflop_per_s={"float32": 1e3})
    row = run.row(task, bench.Measurement(TIMES | {"plan": "this one"}, mean_rows=3.0), WHERE, known, "cpu")
    assert list(row) == list(rows.COLUMNS) and WHERE.items() <= row.items()
    assert row["us_per_step"] == pytest.approx(2000.0 / 40) and row["plan"] == "this one"
    assert row["limit_ratio"] == pytest.approx(row["us_per_step"] / row["limit_us_per_step"])
    failed = run.row(task, bench.failed("wrong"), WHERE, known, "cpu")
    assert (failed["error"], failed["ms_median"], failed["limit_ratio"]) == ("wrong", None, None)
    assert failed["limit_us_per_step"] > 0


def test_fewer_rows_on_average_lower_the_limit_of_a_ragged_case():
    case = replace(CASE, B=100, H=64, I=64, ragged=True)
    known = Constants(copy_gb_per_s=10.0, matmul_tflop_per_s={"float32": 0.1})
    full, half = (run.limit_us_per_step(case, mean, known) for mean in (100.0, 50.0))
    assert half == pytest.approx(full / 2)
    assert run.limit_us_per_step(replace(case, dtype="tf32"), None, known) is None
    assert 0 < run.limit_us_per_step(replace(case, P=32), 100.0, known) < full


def test_the_environment_names_processor_versions_and_commit():
    found = environment(CPU)
    assert "threads" in found["gpu"] and found["torch"] == torch.__version__ and found["date"].count("-") == 2


# Providers and plans on a GPU


@pytest.fixture
def h100(monkeypatch):
    """Providers and plans see an H100 behind "cuda"."""
    monkeypatch.setattr(gpus, "gpu_of", lambda device: gpus.GPUS["h100"])
    monkeypatch.setattr(routing, "gpu_of", lambda device: gpus.GPUS["h100"])
    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(routing, "cudnn_is_on", lambda: True)


@pytest.mark.parametrize(
    "strategy, change, words",
    [
        ("persistent", dict(H=8192), "no tiles of the recurrent weights"),
        ("persistent", dict(suite="core"), None),
        ("persistent", dict(cell=True, T=1), "is no strategy of one step"),
        ("cudnn", dict(cell=True, T=1), "is no strategy of one step"),
        ("cudnn", dict(variant="full"), "it has no peepholes"),
        ("cudnn", dict(variant="coupled"), None),
        ("cudnn", dict(resets=0.03), "takes no resets"),
        ("persistent", dict(resets=0.03), None),
        ("persistent", dict(variant="full+current"), None),
        ("persistent", dict(P=384), None),
        ("persistent", dict(H=4096, P=512), "no tiles of the recurrent weights"),
        ("cudnn", dict(P=384), None),
        ("stepwise", dict(cell=True, T=1, variant="full+current"), None),
        ("auto", dict(H=4096), None),
    ],
)
def test_a_strategy_that_cannot_compute_a_case_says_why(h100, strategy, change, words):
    case = replace(Case("anchor", T=9, B=16, I=768, H=768, dtype="bfloat16", mode=TRAINING), **change)
    found = LstmTriton(strategy).refuses(case, "cuda")
    assert found is None if words is None else re.match(words, found)


def test_on_a_cpu_there_is_nothing_but_auto():
    ours = [provider for provider in PROVIDERS.values() if provider.name == "lstm_triton"]
    assert [p.strategy for p in ours if p.refuses(replace(CASE, suite="anchor"), "cpu") is None] == ["auto"]


def test_a_row_names_the_plan_that_computed_it(h100):
    case = Case("anchor", T=512, B=16, I=768, H=768, dtype="bfloat16", mode=TRAINING)
    found = {strategy: LstmTriton(strategy).plan(case, "cuda") for strategy in LstmTriton.HOW}
    assert re.fullmatch(r"forward U\d+ .* data; backward U\d+ .* data", found["persistent"])
    assert found["auto"] == found["persistent"] and found["stepwise"] == found["cudnn"] == found["torch"] == ""
    assert AUTO.plan(replace(case, H=8192), "cuda") == "cudnn"
    assert AUTO.plan(replace(case, H=8192, variant="coupled"), "cuda") == "cudnn"
    assert AUTO.plan(replace(case, H=8192, variant="diagonal"), "cuda") == "stepwise"
    assert " streamed " in AUTO.plan(replace(case, H=4096, variant="diagonal"), "cuda")
    forward = AUTO.plan(replace(case, mode=FORWARD), "cuda")
    assert forward.startswith("forward") and "backward" not in forward and AUTO.plan(case, "cpu") == ""
    assert TorchLSTM("cudnn").plan(case, "cuda") == ""


# Packages that need not be there


def flashrnn_by_reference(Wx, R, b, function, backend, dtype):
    """As FlashRNN's plain step: Wx (B, T, 4, heads, H), R (4, heads, H, H), b (4, heads, H) -> states, last states."""
    assert function == "lstm" and backend == "cuda_fused" and f"torch.{dtype}" == str(Wx.dtype)
    (B, T, *_, H), weights = Wx.shape, R[:, 0].reshape(-1, R.shape[-1])
    h = c = Wx.new_zeros(B, H)
    states = []
    for t in range(T):
        i, f, g, o = ((Wx[:, t, :, 0] + b[:, 0]).flatten(1) + h @ weights.t()).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        states.append(torch.stack([h, c]))
    found = torch.stack(states, 2)[:, :, :, None]  # (2, B, T, heads, H)
    return found, found[:, :, -1:]


def torchrl_by_reference(x, hidden, cell, *weights_and_resets, compute_dtype, input_precision):
    """As torchrl's function: x (B, T, I), the states given for each step, four weights, resets (B, T)."""
    *weights, begins = weights_and_resets
    assert compute_dtype == x.dtype and input_precision == "ieee" and begins.dtype == torch.bool
    h, c, steps = hidden[:, 0], cell[:, 0], []
    for t in range(x.shape[1]):
        h, c = (torch.where(begins[:, t, None], a[:, t], b) for a, b in ((hidden, h), (cell, c)))
        h, c = torch.lstm_cell(x[:, t], (h, c), *weights)
        steps.append((h, c))
    return *(torch.stack(own, 1) for own in zip(*steps, strict=True)), h, c


@pytest.fixture
def packages(monkeypatch):
    """FlashRNN and torchrl as they are called, computed in PyTorch; rows of theirs on a CPU."""
    functions = {
        "flashrnn": dict(flashrnn=flashrnn_by_reference),
        "torchrl.modules.tensordict_module._rnn_triton": dict(lstm_triton=torchrl_by_reference),
    }
    for name in ("torchrl", "torchrl.modules", "torchrl.modules.tensordict_module"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    for name, of in functions.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**of))


@pytest.mark.parametrize("mode", suites.MODES)
def test_providers_of_other_packages_get_the_same_problem(packages, measured, mode):
    for provider, resets in ((FlashRNN("cuda_fused"), 0.0), (TorchRL(), 0.0), (TorchRL(), 0.2)):
        case = replace(LONG, mode=mode, resets=resets)
        assert provider.refuses(case, "cuda") is None and provider.refuses(case, "cpu") == "computes on CUDA devices"
        found = measured.measure(provider, case)
        assert found.failure is None and found.columns["error"] < 1e-5


@pytest.mark.parametrize(
    "key, change, words",
    [
        ("flashrnn:cuda_fused", dict(resets=0.03), "takes no resets"),
        ("flashrnn:triton_fused", dict(H=65), "has H <= 64"),
        ("flashrnn:cuda_fused", dict(variant="coupled"), "has the standard variant alone"),
        ("torchrl:triton", dict(L=2), "computes one layer in one direction"),
        ("flashrnn:cuda_fused", dict(P=3), "has no projection"),
        ("torchrl:triton", dict(P=3), "has no projection"),
        (
            "reference:torch.compile",
            dict(P=3),
            "computes one layer in one direction, without lengths, projection and regularised steps",
        ),
        ("by-hand:eager", dict(suite="overhead", P=3), "has no projection"),
        ("torchrl:triton", dict(ragged=True), "takes no lengths"),
        ("torchrl:triton", dict(dtype="float16"), "has no float16"),
        ("torchrl:triton", dict(cell=True, T=1), "has no cell of one step"),
    ],
)
def test_what_other_packages_do_not_compute_has_no_row(key, change, words):
    assert PROVIDERS[key].refuses(replace(CASE, **change), "cuda") == words


def test_a_package_is_imported_by_the_rows_of_its_provider_alone(monkeypatch):
    monkeypatch.setattr("benchmarks.providers.find_spec", lambda name: name == "torchrl" or None)
    missing = {one.key: one.missing() for one in PROVIDERS.values()}
    install = "flashrnn is not installed: pip install flashrnn"
    assert {key: words for key, words in missing.items() if words} == dict.fromkeys(
        ("flashrnn:cuda_fused", "flashrnn:triton_fused"), install
    )
    assert not {"flashrnn", "torchrl"} & sys.modules.keys()


# Before a run, and everything on a GPU


def test_the_librarys_rows_are_computed_once_over_few_steps_unless_it_is_too_late(monkeypatch):
    cases = suites.cases(("cpu", "overhead-cell"), modes=(FORWARD,))
    seen = []
    monkeypatch.setattr(warm, "make_problem", lambda case, device: seen.append(case) or make_problem(case, device))
    for case in (cases[0], next(case for case in cases if case.cell)):
        assert warm.compute_once(run.Task(AUTO, case), "cpu", time.monotonic() + 100)
    assert [case.T for case in seen] == [warm.STEPS, 1]
    assert not warm.compute_once(run.Task(AUTO, cases[0]), "cpu", time.monotonic()) and len(seen) == 2
    assert not warm.compute_once(run.Task(planted.RAISES, CASE), "cpu", time.monotonic() + 100)  # and raises nothing


def test_processes_share_the_rows_out():
    cases = suites.cases(("overhead-cell",), modes=(FORWARD,))
    assert warm.compile_all(cases, "cpu", processes=2, seconds=100) == (len(cases), len(cases))


def test_a_command_that_is_stopped_may_say_what_it_found(tmp_path):
    script = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('1 failed, 2 passed')"
    assert gpu.stopped_after(1.5, [sys.executable, "-c", script], tmp_path / "log") == "not done after 2 s, stopped"
    assert gpu.last_line(tmp_path / "log") == "1 failed, 2 passed"


def test_a_command_is_stopped_with_all_it_started(tmp_path, monkeypatch):
    log = tmp_path / "log"
    child = "import time; time.sleep(3); print('alive', flush=True)"
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    script = (
        f"import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"print('begun', flush=True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    assert gpu.stopped_after(1.5, [sys.executable, "-c", script], log) == "not done after 2 s, stopped"
    time.sleep(2.5)
    assert gpu.last_line(log) == "begun"
    assert gpu.stopped_after(20, [sys.executable, "-c", "raise SystemExit(3)"], log) == "ended with code 3"
    assert gpu.stopped_after(20, [sys.executable, "-c", "print('hello\\n')"], log) is None
    assert gpu.last_line(log) == "hello"


@pytest.mark.parametrize("parity, pandas", [(None, True), (None, False), ("ended with code 1", True)])
def test_a_gpu_is_measured_part_by_part_within_the_budget(tmp_path, monkeypatch, h100, parity, pandas):
    ran = []

    def record(seconds, command, log=None):
        ran.append((seconds, " ".join(command[1:])))
        if log is not None:
            log.write_text("....\n571 passed\n")
        if "run" in command:
            case = replace(CASE, suite="core")
            rows.append(tmp_path / "h100-2026-11-24-gpu.csv", row_of(AUTO, case, bench.Measurement(TIMES), "cuda"))
        return parity if log is not None else None

    monkeypatch.setattr(gpu, "stopped_after", record)
    monkeypatch.setattr(gpu, "find_spec", lambda name: (name != "pandas" or pandas) or None)
    monkeypatch.setattr(gpu, "environment", lambda device: WHERE)
    monkeypatch.setattr(gpu, "machine", lambda device: "NVIDIA H100")
    out = Console(width=140, file=io.StringIO())
    code = gpu.run_all(540.0, tmp_path, out)
    parts = ["benchmarks steps", "pytest", "micro", "warm", "run", *["benchmarks report"] * pandas]
    assert all(f" {name}" in words for name, (_, words) in zip(parts, ran, strict=True))
    assert sum(seconds for seconds, _ in ran[:4]) < 540.0 and ran[4][0] <= 540.0
    assert "--shape 16x768" in ran[0][1] and "-m gpu tests/gpu" in ran[1][1]
    assert "--suite gpu" in ran[3][1] and "--suite gpu" in ran[4][1]
    text = out.file.getvalue()
    assert "571 passed" in text and "1.50" in text and "suites: done" in text
    assert (code, f"parity: {parity or 'done'}" in text) == (1 if parity else 0, True)
    assert ("`python -m benchmarks report` makes the report" in text) != pandas
    assert (tmp_path / "h100-2026-11-24-parity.txt").exists()
