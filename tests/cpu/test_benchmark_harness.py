"""The harness on a CPU: every provider right before it is timed, every fault a row, rows on the disk as they finish."""

import io
import itertools
import json
import math
import re
import sys
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lstm_triton_kernels import gpus
from lstm_triton_kernels.limit import Constants
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.watch import error_words_of
from rich.console import Console

from benchmarks import bench, check, gpu, rows, run, suites, timing, warm
from benchmarks.environment import Environment, environment
from benchmarks.problem import MOST_SETS, make_problem
from benchmarks.providers import (
    BASELINES,
    PROVIDERS,
    ByHand,
    CompiledReference,
    How,
    LstmTriton,
    ModuleModel,
    TorchLSTM,
    baseline_of,
)
from benchmarks.suites import FORWARD, TRAINING, Case
from benchmarks.worker import Worker
from lstm_triton import estimates, routing
from tests.support import planted

CPU = torch.device("cpu")
CASE = Case("odd", T=5, B=3, I=6, H=7, dtype="float32", mode=TRAINING)
LONG = replace(CASE, T=check.STEPS + 3)
WHERE = Environment("a processor", "", "2.13.0", "", "", "abc", "2026-11-24")
BASELINE = TorchLSTM("aten")
TIMES = timing.Times(ms=(1.0, 2.0, 4.0), baseline_ms=3.0, spread=(1.25, 1.75))


@pytest.fixture(autouse=True)
def precision():
    """Rows set PyTorch's switches for float32; other tests find them as they were."""
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def new_bench(seconds=0.01):
    return bench.Bench(CPU, BASELINES, seconds)


# The problem


def test_the_same_seed_gives_the_same_problem_and_another_another():
    first, second, other = (make_problem(CASE, CPU, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.inputs[0], second.inputs[0]) and not torch.equal(first.inputs[0], other.inputs[0])
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
    module = torch.nn.LSTM(CASE.I, CASE.H)
    assert {name: tuple(w.shape) for name, w in first.weights.items()} == {
        name: tuple(w.shape) for name, w in module.named_parameters()
    }


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


@pytest.mark.parametrize("mode", suites.MODES)
@pytest.mark.parametrize(
    "case",
    [
        CASE,
        LONG,
        replace(CASE, L=2, D=2),
        replace(CASE, T=1, cell=True),
        replace(CASE, dtype="bfloat16"),
        replace(CASE, variant="coupled"),
        replace(LONG, variant="full", D=2),
        replace(CASE, T=1, cell=True, variant="diagonal+current"),
    ],
    ids=str,
)
def test_every_provider_of_the_cpu_is_right_and_timed(case, mode):
    case = replace(case, mode=mode)
    measured = new_bench()
    providers = [BASELINE, LstmTriton("auto"), CompiledReference(backend="eager")]
    for provider in providers:
        if provider.refuses(case, "cpu") is not None and provider is BASELINE:
            assert case.variant != "standard"
            continue
        found = measured.measure(provider, case)
        assert found.failure is None
        times = found.times
        assert 0 < times.ms[0] <= times.ms[1] <= times.ms[2] and found.peak_mib > 0 and found.cpu_us > 0
        assert 0 < found.error < check.ALLOWED[case.dtype] and times.ratio == times.baseline_ms / times.ms[1] > 0
        assert (times.ratio == 1.0 and times.spread is None) if provider is BASELINE else len(times.spread) == 2


@pytest.mark.parametrize("mode", suites.MODES)
@pytest.mark.parametrize("variant", ByHand.STEPS)
@pytest.mark.parametrize("suite, T", [("overhead", 1), ("overhead", 3), ("overhead-cell", 1)])
def test_a_step_by_hand_is_right_and_the_baseline_of_variants(suite, T, variant, mode):
    case = replace(CASE, suite=suite, T=T, variant=variant, mode=mode, cell=suite == "overhead-cell")
    measured = new_bench()
    for provider in (ByHand(), LstmTriton("auto")):
        found = measured.measure(provider, case)
        assert found.failure is None and found.error < 1e-5
        row = run.row(run.Task(provider, case), found, WHERE, None, "cpu")
        assert row.baseline == ("torch.nn.LSTM" if variant == "standard" else "by-hand")
        assert row.is_baseline == (provider.name == row.baseline)


def test_the_baseline_computes_the_case_or_the_standard_cell_of_its_sizes():
    coupled = replace(CASE, variant="coupled")
    assert baseline_of(CASE, "cpu")[0].key == "torch.nn.LSTM:aten" and baseline_of(CASE, "cpu")[1] == CASE
    assert baseline_of(CASE, "cuda")[0].key == "torch.nn.LSTM:cudnn"
    assert baseline_of(coupled, "cpu")[0].key == "torch.nn.LSTM:aten" and baseline_of(coupled, "cpu")[1] == CASE
    few = replace(coupled, suite="overhead")
    assert baseline_of(few, "cpu")[0].key == "by-hand:eager" and baseline_of(few, "cpu")[1] == few
    assert ByHand().refuses(CASE, "cpu") and ByHand().refuses(replace(few, variant="full+current"), "cpu")


def test_nothing_is_entered_around_a_call_where_nothing_is_asked():
    """It would be entered within the time of the call, and of this library's calls alone."""
    problem = make_problem(CASE, CPU)
    none = type(BASELINE.build(problem).settings())
    assert type(LstmTriton("auto").build(problem).settings()) is none
    assert type(LstmTriton("torch").build(problem).settings()) is not none


@pytest.mark.parametrize("mode", suites.MODES)
def test_a_compiled_module_is_right_in_one_graph(monkeypatch, mode):
    monkeypatch.setitem(LstmTriton.HOW, "torch.compile", How(compiler="aot_eager"))
    torch._dynamo.reset()
    compiled, case = LstmTriton("torch.compile"), replace(LONG, suite="compile", mode=mode)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = new_bench().measure(compiled, case)
    assert found.failure is None and found.error < 1e-5 and found.times.spread
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before
    assert compiled.refuses(CASE, "cpu") == "is measured in smaller suites"
    assert {p.key for p in PROVIDERS.values() if p.refuses(case, "cpu") is None} == {
        "torch.nn.LSTM:aten", "lstm_triton:auto", "lstm_triton:torch.compile"
    }  # fmt: skip


def test_ragged_rows_end_where_packed_ones_do():
    case = replace(CASE, T=check.STEPS + 5, B=5, D=2, L=2, ragged=True)
    found = new_bench().measure(BASELINE, case)
    assert found.failure is None and found.error < 1e-5
    assert found.rows == pytest.approx(float(make_problem(case, CPU).lengths.sum()) / case.T)
    for strategy in ("auto", "lengths"):
        ours = new_bench().measure(LstmTriton(strategy), case)
        assert ours.failure is None and ours.error < 1e-5 and ours.rows == found.rows


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
def test_a_planted_fault_becomes_words_and_the_next_row_is_measured(provider, case, words):
    measured = new_bench()
    found = measured.measure(provider, case)
    assert found.failure.startswith(words) and found.times is None
    assert measured.measure(LstmTriton("auto"), case).failure is None


def test_a_fault_beyond_the_first_steps_is_seen():
    """Only the look at all steps can see it: the last step is not among the first ones."""
    model = planted.WRONG_LAST_STEP.build(make_problem(LONG, CPU))
    problem = make_problem(LONG, CPU)
    oracle = check.Oracle(problem)
    errors = oracle.errors(BASELINE.build(oracle.problem), model)
    wrong = {name for name, error in errors.items() if error > 1e-4}
    assert wrong == {f"output of {check.ROWS} rows over all steps"}


def test_a_forgotten_gradient_is_seen():
    problem = make_problem(CASE, CPU)
    with pytest.raises(RuntimeError, match="no gradient of weight_ih_l0"):
        check.results(planted.NoGradient(torch.nn.LSTM(CASE.I, CASE.H), problem), problem)


def test_a_baseline_that_fails_leaves_the_others_without_a_ratio():
    measured = bench.Bench(CPU, (planted.RAISES,), 0.01)
    assert measured.measure(planted.RAISES, CASE).failure.startswith("failed: ValueError")
    found = measured.measure(LstmTriton("auto"), CASE)
    assert found.failure is None and found.times.ms and found.times.ratio is None and found.times.spread is None


def test_a_row_whose_launch_timed_out_has_no_time_and_the_next_row_has():
    def times_out(run_model, x):
        error_words_of(CPU).take("a launch of the test")[0] = 2
        return run_model(x)

    measured = new_bench()
    found = measured.measure(planted.Planted("times out", times_out), CASE)
    assert found.failure.startswith("failed: RuntimeError: a persistent launch timed out") and not found.times
    assert "a launch of the test (values were not published)" in found.failure
    error_words_of(CPU).take("of a row that fails anyhow")[0] = 1
    assert measured.measure(planted.RAISES, CASE).failure.startswith("failed: ValueError")
    assert measured.measure(LstmTriton("auto"), CASE).failure is None


@pytest.mark.parametrize("mode", suites.MODES)
def test_what_a_model_needs_holds_forward_and_backward(mode):
    """A preference for plans among it, which the backward pass asks for, too."""
    sequence_persistent = pytest.importorskip("lstm_triton_kernels.sequence_persistent")
    problem = make_problem(replace(CASE, mode=mode), CPU)
    model = LstmTriton("persistent-data").build(problem)
    model.module.strategy = "auto"
    seen = []
    if mode == TRAINING:
        problem.inputs[0].register_hook(lambda grad: seen.append(sequence_persistent.preference()))
    model.module.register_forward_hook(lambda *_: seen.append(sequence_persistent.preference()))
    bench.timed_call(model, problem).call()
    check.results(model, problem)
    assert {preference.wait for preference in seen} == {"data"} and len(seen) == (4 if mode == TRAINING else 2)
    assert sequence_persistent.preference().wait is None


@pytest.mark.parametrize("dtype", sorted(suites.STORAGE))
def test_what_is_allowed(dtype):
    assert check.allowed(dtype, None) == check.ALLOWED[dtype]
    assert check.allowed(dtype, 0.0) == check.FLOOR[dtype] < check.ALLOWED[dtype]
    assert check.allowed(dtype, 1.0) == 4.0


def test_another_shape_is_an_error():
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
    rounds = [log[n : n + 4] for n in range(0, len(log), 4)]
    in_order = {0: ["before a", "a", "before b", "b"], 1: ["before b", "b", "before a", "a"]}
    assert [len(column) for column in columns] == [timing.LEAST_ROUNDS] * 2
    warm_up = len(rounds) - timing.LEAST_ROUNDS
    assert warm_up >= 1
    assert rounds[warm_up:] == [in_order[n % 2] for n in range(timing.LEAST_ROUNDS)]


@pytest.fixture
def clock(monkeypatch):
    """A host's clock that moves by what is added to `seconds`, and by nothing else."""
    clock = SimpleNamespace(seconds=0.0, perf_counter=lambda: clock.seconds)
    monkeypatch.setattr(timing, "time", clock)
    return clock


def advancing(clock, *milliseconds):
    """Something to time whose calls take these times, one after the other and round again; preparing it takes more."""
    times = itertools.cycle(milliseconds)

    def call():
        clock.seconds += 1e-3 * next(times)

    def before():
        clock.seconds += 5.0

    return timing.Timed(before, call)


def test_what_is_measured_is_the_call_alone_and_the_rounds_fit_the_time(clock):
    few = timing.in_turns([advancing(clock, 20.0), advancing(clock, 5.0)], CPU, seconds=0.1)
    assert [len(column) for column in few] == [timing.LEAST_ROUNDS] * 2  # preparing counts in the time there is
    assert few[0] == pytest.approx([20.0] * 5) and few[1] == pytest.approx([5.0] * 5)
    many = timing.in_turns([timing.Timed(lambda: None, advancing(clock, 1.0).call)], CPU, seconds=0.05)
    assert len(many[0]) in (49, 50)
    most = timing.in_turns([timing.Timed(lambda: None, advancing(clock, 1.0).call)], CPU, seconds=9.0)
    assert len(most[0]) == timing.MOST_ROUNDS


def test_the_ratio_is_the_quotient_of_the_two_times_of_the_same_turns(monkeypatch):
    """So that a row's time, the baseline's beside it and the ratio agree, whenever the baseline's own row was timed."""
    monkeypatch.setattr(timing, "in_turns", lambda timed, *_: [[4.0, 2.0, 8.0], [2.0, 3.0, 5.0]][: len(timed)])
    found = new_bench().measure(LstmTriton("auto"), CASE)
    row = run.row(run.Task(LstmTriton("auto"), CASE), found, WHERE, None, "cpu")
    assert (row.ms_median, row.baseline_ms, row.baseline_ratio) == (4.0, 3.0, 0.75)
    low, high = np.quantile([2 / 4, 3 / 2, 5 / 8], [0.2, 0.8])
    assert (row.ratio_p20, row.ratio_p80) == pytest.approx((low, high)) and row.noise and not row.is_baseline
    own = run.row(run.Task(BASELINE, CASE), new_bench().measure(BASELINE, CASE), WHERE, None, "cpu")
    assert (own.ms_median, own.baseline_ms, own.baseline_ratio, own.ratio_p20) == (4.0, 4.0, 1.0, None)
    assert own.is_baseline


def test_quantiles_are_numpys():
    values = np.random.default_rng(0).exponential(size=37)
    assert timing.quantiles(values.tolist()) == pytest.approx(np.quantile(values, [0.2, 0.5, 0.8]).tolist())


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
    assert [x is problem.inputs[n % len(problem.inputs)] for n, (x, _) in enumerate(seen)] == [True] * len(seen)
    assert all(grad is None for _, grads in seen for grad in grads)
    assert all(p.grad is not None for p in model.parameters().values())


# The worker


def test_a_row_that_crashes_or_hangs_is_a_row_and_the_next_one_is_measured(tmp_path):
    worker = Worker("cpu", BASELINES, 0.01, tmp_path / "log")
    try:
        assert worker.measure(LstmTriton("auto"), CASE, 60.0).failure is None
        crashed = worker.measure(planted.CRASHES, CASE, 60.0)
        assert crashed.failure == "failed: the process that computed it ended (exit code 9)" and not crashed.stopped
        hung = worker.measure(planted.HANGS, CASE, 1.0)
        assert hung.failure == "failed: not done after 1 s, stopped" and hung.stopped
        assert worker.measure(LstmTriton("auto"), CASE, 60.0).failure is None
    finally:
        worker.close()


# The run


class FakeMeasures:
    """Answers at once; a clock moves on by what the row is said to take, and no further than the timeout."""

    def __init__(self, seconds, answer=None):
        self.now, self.seconds, self.answer, self.asked = 0.0, seconds, answer, []

    def measure(self, provider, case, timeout):
        self.asked.append((provider.key, case))
        taken = self.seconds(case)
        self.now += min(taken, timeout)
        if taken > timeout:
            return bench.Measurement(failure="failed: not done", stopped=True)
        return self.answer or bench.Measurement(times=TIMES, error=1e-6, rows=3.0)

    def close(self):
        pass


def rows_of(tmp_path, todo, fake, budget, name="x.csv"):
    pace = run.Pace(budget, lambda: fake.now)
    path = tmp_path / name

    def make_row(task, found):
        return run.row(task, found, WHERE, None, "cpu")

    return list(run.measure(todo, fake, pace, make_row, path)), path, pace


def test_the_most_telling_rows_come_first_and_providers_only_get_what_they_compute():
    cases = suites.cases(("cpu", "variants"), modes=(FORWARD,))
    todo = run.tasks(cases, list(PROVIDERS.values()), "cpu")
    ranks = [task.provider.rank(task.case) for task in todo]
    assert ranks == sorted(ranks) and len(set(todo)) == len(todo)
    assert {task.provider.key for task in todo} == {
        "torch.nn.LSTM:aten", "lstm_triton:auto", "reference:torch.compile"
    }  # fmt: skip
    ragged = run.tasks(suites.cases(("ragged",), modes=(FORWARD,)), list(PROVIDERS.values()), "cpu")
    assert {task.provider.key for task in ragged} == {"torch.nn.LSTM:aten", "lstm_triton:auto", "lstm_triton:lengths"}
    assert all(task.case.variant == "standard" for task in todo if task.provider.name == "torch.nn.LSTM")
    on_gpu = {
        task.provider.key
        for task in run.tasks(suites.cases(("core",)), [BASELINE, PROVIDERS["torchrl:triton"]], "cuda")
    }
    assert on_gpu == {"torchrl:triton"}


@pytest.fixture
def h100(monkeypatch):
    """Providers and plans see an H100 behind "cuda"."""
    monkeypatch.setattr(gpus, "gpu_of", lambda device: gpus.GPUS["h100"])
    monkeypatch.setattr(routing, "gpu_of", lambda device: gpus.GPUS["h100"])
    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: None)
    only_standard = "it has the standard variant alone"
    monkeypatch.setattr(routing, "why_not_cudnn", lambda device, spec: None if spec.standard else only_standard)


def ranked(case, preference):
    """The plans of each pass."""
    passes = estimates.passes(case.layer)
    return {n: ranked_plans(case.layer, b, gpus.GPUS["h100"], preference) for n, b in passes.items()}


def test_a_run_decides_between_the_candidates_before_all_else(h100):
    todo = run.tasks(suites.cases(suites.GPU_SUITES), list(PROVIDERS.values()), "cuda")
    first = [task for task in todo if task.case.suite == "anchor" and task.provider.rank(task.case) == 0]
    assert todo[: len(first)] == first
    for case in suites.cases(("anchor",)):
        strategies = {task.provider.strategy for task in first if task.case == case}
        assert strategies >= {"cudnn", "auto", "persistent"}
        measured = [task.provider.plan(case, "cuda") for task in first if task.case == case and is_persistent(task)]
        possible = {
            "; ".join(f"{name} {plans[0].describe()}" for name, plans in found.items())
            for how in LstmTriton.HOW.values() if how.strategy == "persistent"
            for found in [ranked(case, how.preference)]
            if all(isinstance(plans, tuple) for plans in found.values())
        }  # fmt: skip
        assert set(measured) == possible and len(possible) > 1
    assert all(task.case.suite in LstmTriton.CANDIDATE_SUITES for task in todo if "t-" in task.provider.strategy)
    assert {task.case.suite for task in todo if task.provider.strategy == "persistent"} >= {"core", "deep"}


def test_beside_coupled_rows_stands_pytorchs_own_operator(h100, monkeypatch):
    monkeypatch.setattr(routing, "why_not_cudnn", lambda device, spec: None if spec.peephole is None else "no")
    todo = run.tasks(suites.cases(("variants",), ("bfloat16",)), list(PROVIDERS.values()), "cuda")
    ranks = {(t.case, t.provider.key): t.provider.rank(t.case) for t in todo if t.case.variant == "coupled"}
    for case in {case for case, _ in ranks}:
        assert ranks[case, "lstm_triton:cudnn"] == ranks[case, "lstm_triton:auto"] < ranks[case, "lstm_triton:torch"]


def is_persistent(task):
    return task.provider.strategy.startswith("persistent")


@pytest.mark.parametrize(
    "strategy, change, words",
    [
        ("persistent", dict(H=4096), "no tiles of the recurrent weights"),
        ("persistent-data", dict(H=4096), "no tiles of the recurrent weights"),
        ("persistent-u32", dict(H=1024, dtype="float32"), "no plan is Preference"),
        ("persistent-u32", dict(H=1024), None),
        ("persistent-u8", dict(), "no plan is Preference"),  # backward
        ("persistent-u8", dict(mode=FORWARD), None),
        ("persistent-counter", dict(suite="core"), "is measured in smaller suites"),
        ("persistent", dict(suite="core"), None),
        ("persistent", dict(cell=True, T=1), "is no strategy of one step"),
        ("cudnn", dict(cell=True, T=1), "is no strategy of one step"),
        ("cudnn", dict(variant="full"), "it has the standard variant alone"),
        ("persistent", dict(variant="full+current"), "a full peephole on c_t needs"),
        ("stepwise", dict(cell=True, T=1, variant="full+current"), None),
        ("auto", dict(H=4096), None),
    ],
)
def test_a_strategy_that_cannot_compute_a_case_says_why(h100, strategy, change, words):
    case = replace(Case("anchor", T=9, B=16, I=768, H=768, dtype="bfloat16", mode=TRAINING), **change)
    found = LstmTriton(strategy).refuses(case, "cuda")
    assert found is None if words is None else re.match(words, found)


def test_the_same_plan_is_measured_once(h100):
    case = Case("anchor", T=9, B=16, I=768, H=768, dtype="float32", mode=FORWARD)
    asked = {
        strategy: LstmTriton(strategy).refuses(case, "cuda") for strategy in ("persistent-counter", "persistent-data")
    }
    assert sorted(asked.values(), key=str) == [None, "is what `persistent` takes"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
def test_a_wait_that_there_is_not_on_tensor_cores_is_refused(h100, dtype):
    case = Case("anchor", T=9, B=16, I=768, H=768, dtype=dtype, mode=TRAINING)
    assert LstmTriton("persistent-counter").refuses(case, "cuda").startswith("no plan is Preference(wait='counter'")
    assert LstmTriton("persistent-data").refuses(case, "cuda") == "is what `persistent` takes"


def test_on_a_cpu_there_is_nothing_but_auto():
    ours = [provider for provider in PROVIDERS.values() if provider.name == "lstm_triton"]
    assert [p.strategy for p in ours if p.refuses(replace(CASE, suite="anchor"), "cpu") is None] == ["auto"]


def test_a_row_names_the_plan_that_computed_it(h100):
    case = Case("anchor", T=512, B=16, I=768, H=768, dtype="bfloat16", mode=TRAINING)
    auto = LstmTriton("auto")
    for dtype in ("float32", "bfloat16"):
        one = replace(case, dtype=dtype)
        found = {strategy: LstmTriton(strategy).plan(one, "cuda") for strategy in LstmTriton.HOW}
        assert re.fullmatch(r"forward U\d+ .* data; backward U\d+ .* data", found["persistent-data"])
        units = "8" if dtype == "float32" else "32"  # on tensor cores 8 units are too few backward
        other = found[f"persistent-u{units}"]
        assert other.startswith(f"forward U{units} ") and f"; backward U{units} " in other
        assert found["auto"] == found["persistent"] != other
        assert found["stepwise"] == found["cudnn"] == found["torch"] == ""
        if dtype == "float32":
            assert re.fullmatch(r"forward U\d+ .* counter; backward U\d+ .* counter", found["persistent-counter"])
    assert auto.plan(replace(case, H=4096), "cuda") == "cudnn"
    assert auto.plan(replace(case, H=4096, variant="coupled"), "cuda") == "stepwise"
    assert auto.plan(replace(case, mode=FORWARD), "cuda").startswith("forward") and auto.plan(case, "cpu") == ""
    row = run.row(run.Task(auto, case), bench.Measurement(failure="failed", plan="this one"), WHERE, None, "cuda")
    assert row.plan == "this one" and TorchLSTM("cudnn").plan(case, "cuda") == ""


def test_a_run_stops_in_time_and_says_what_it_left(tmp_path):
    todo = run.tasks(suites.cases(("cpu",)), [BASELINE, LstmTriton("auto")], "cpu")
    fake = FakeMeasures(lambda case: 7.0)
    outcomes, path, pace = rows_of(tmp_path, todo, fake, budget=60.0)
    done = [task for task, row, _ in outcomes if row]
    assert 30.0 < pace.elapsed <= 60.0 and len(done) == pace.elapsed // 7 and len(outcomes) == len(todo)
    assert done[:4] == todo[:4]
    assert len(rows.read(path)) == len(done)


def test_a_small_case_still_fits_where_a_large_one_does_not(tmp_path):
    """A row takes as long as its work; after the first ones, only cases of little work end in time."""
    todo = run.tasks(suites.cases(("cpu",)), [BASELINE, LstmTriton("auto")], "cpu")
    most = max(task.case.work for task in todo)
    fake = FakeMeasures(lambda case: 40.0 * case.work / most)
    outcomes, _, pace = rows_of(tmp_path, todo, fake, budget=100.0)
    measured = [row is not None for _, row, _ in outcomes]
    assert pace.elapsed <= 100.0 and sum(measured) > 10
    first_left = measured.index(False)
    assert todo[first_left].case.work > todo[0].case.work / 2 and any(measured[first_left:])


def test_without_a_budget_every_row_is_measured(tmp_path):
    todo = run.tasks(suites.cases(("cpu",)), [BASELINE, LstmTriton("auto")], "cpu")
    outcomes, path, _ = rows_of(tmp_path, todo, FakeMeasures(lambda case: 100.0), budget=None)
    assert len(rows.read(path)) == len(todo) == len(outcomes)


def test_a_row_cut_off_by_the_budget_is_not_called_a_failure_but_one_that_hangs_is(tmp_path):
    stopped = bench.Measurement(failure="failed: not done", stopped=True)
    todo = [run.Task(planted.HANGS, CASE)]
    cut_off, path, _ = rows_of(tmp_path, todo, FakeMeasures(lambda case: 50.0, stopped), budget=50.0)
    assert cut_off == [(todo[0], None, None)] and not path.exists()
    hung, path, _ = rows_of(tmp_path, todo, FakeMeasures(lambda case: 500.0, stopped), budget=None)
    assert hung[0][1].error == "failed: not done" and rows.read(path) == [hung[0][1]]


def test_what_was_done_when_a_run_is_killed_is_in_the_file(tmp_path):
    class Killed(FakeMeasures):
        def measure(self, provider, case, timeout):
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().measure(provider, case, timeout)

    todo = run.tasks(suites.cases(("cpu",)), [BASELINE], "cpu")
    with pytest.raises(KeyboardInterrupt):
        rows_of(tmp_path, todo, Killed(lambda case: 1.0), budget=None)
    assert [row.H for row in rows.read(tmp_path / "x.csv")] == [task.case.H for task in todo[:3]]


def test_a_row_says_what_was_measured_and_how_far_the_limit_is():
    case = replace(CASE, T=10, L=2, D=2, variant="full")
    constants = Constants(copy_gb_per_s=1e-3, matmul_tflop_per_s={"float32": 1e3})
    found = bench.Measurement(times=TIMES, cpu_us=5.0, peak_mib=6.0, error=1e-6, rows=3.0)
    row = run.row(run.Task(LstmTriton("auto"), case), found, WHERE, constants, "cpu")
    assert (row.ms_p20, row.ms_median, row.ms_p80) == (1.0, 2.0, 4.0)
    assert row.us_per_step == pytest.approx(2000.0 / 40)
    assert row.limit_ratio == pytest.approx(row.us_per_step / row.limit_us_per_step)
    assert {k: v for k, v in asdict(row).items() if k in asdict(WHERE)} == asdict(WHERE)
    failed = run.row(run.Task(LstmTriton("auto"), case), bench.Measurement(failure="wrong"), WHERE, constants, "cpu")
    assert failed.error == "wrong" and not failed.timed and failed.limit_ratio is None and failed.limit_us_per_step > 0


def test_fewer_rows_on_average_lower_the_limit_of_a_ragged_case():
    case = replace(CASE, B=100, H=64, I=64, ragged=True)
    constants = Constants(copy_gb_per_s=10.0, matmul_tflop_per_s={"float32": 0.1})
    full, half = (run.limit_us_per_step(case, mean, constants) for mean in (100.0, 50.0))
    assert half == pytest.approx(full / 2)
    assert run.limit_us_per_step(replace(case, dtype="tf32"), None, constants) is None


def test_which_algorithm_the_kernels_show(tmp_path):
    assert run.shown_algorithm(["void LSTM_elementWise_fp", "gemm"]) == "standard"
    assert run.shown_algorithm(["RNN_blockPersist_fp_LSTM", "gemm"]) == "persistent"
    assert run.shown_algorithm([]) == "none seen"
    path = tmp_path / "x-kernels.json"
    run.save_kernels(path, {"a case": dict(asked="cudnn-standard", shown="standard", kernels=["gemm"])})
    assert json.loads(path.read_text())["a case"]["kernels"] == ["gemm"]


def test_the_environment_names_processor_versions_and_commit():
    found = environment(CPU)
    assert "threads" in found.gpu and found.torch == torch.__version__ and found.date.count("-") == 2


# The visit to a GPU


def test_the_librarys_rows_are_computed_once_the_most_telling_first(monkeypatch):
    seen = []

    class Timed:
        def __init__(self, task, problem):
            self.names, self.T = (task.provider.key, problem.case.suite), problem.case.T

        def before(self):
            pass

        def call(self):
            seen.append((*self.names, self.T))
            if self.T == 1:
                raise RuntimeError("it does not compile")

    cases = suites.cases(("cpu", "overhead-cell"), modes=(suites.FORWARD,))
    todo = warm.tasks(cases, "cpu")
    assert {task.provider.key for task in todo} == {"lstm_triton:auto"} and len(todo) == len(cases)
    providers = iter(todo)
    monkeypatch.setattr(bench, "timed_call", lambda model, problem: Timed(next(providers), problem))
    cells = sum(case.cell for case in cases)
    assert warm.compute_once(todo, "cpu", time.monotonic() + 100) == len(todo) - cells > 0  # those fail
    assert {T for *_, T in seen} == {1, warm.STEPS} and len(seen) == len(todo)
    assert warm.compute_once(todo, "cpu", time.monotonic()) == 0 and len(seen) == len(todo)


def test_processes_share_the_rows_out():
    cases = suites.cases(("overhead-cell",), modes=(suites.FORWARD,))
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


@pytest.mark.parametrize("parity", [None, "ended with code 1"])
def test_a_visit_runs_parity_then_constants_then_suites_within_its_budget(tmp_path, monkeypatch, h100, parity):
    ran = []

    def record(seconds, command, log=None):
        ran.append((seconds, " ".join(command[1:])))
        if log is not None:
            log.write_text("....\n571 passed\n")
        if "run" in command:
            rows.append(tmp_path / "h100-2026-11-24-gpu.csv", recorded)
        return parity if log is not None else None

    todo = [run.Task(LstmTriton("auto"), replace(CASE, suite="core"))]
    found = bench.Measurement(times=TIMES, cpu_us=5.0, peak_mib=6.0, error=1e-6, rows=3.0)
    recorded = run.row(todo[0], found, replace(WHERE, gpu="NVIDIA H100"), None, "cuda")
    monkeypatch.setattr(gpu, "stopped_after", record)
    monkeypatch.setattr(gpu, "environment", lambda device: replace(WHERE, gpu="NVIDIA H100"))
    monkeypatch.setattr(gpu, "machine", lambda device: "NVIDIA H100")
    out = Console(width=140, file=io.StringIO())
    code = gpu.run_all(540.0, tmp_path, out)
    parts = ["benchmarks steps", "pytest", "micro", "warm", "run"]
    assert [name for _, words in ran for name in parts if f" {name}" in words] == parts
    assert sum(seconds for seconds, _ in ran[:4]) < 540.0 and ran[4][0] <= 540.0
    assert "--shape 16x768" in ran[0][1] and "-m gpu tests/gpu" in ran[1][1]
    assert "--suite gpu" in ran[3][1] and "--suite gpu" in ran[4][1]
    text = out.file.getvalue()
    assert "571 passed" in text and "1.50" in text and "suites: done" in text
    assert (code, f"parity: {parity or 'done'}" in text) == (1 if parity else 0, True)
    assert (tmp_path / "h100-2026-11-24-parity.txt").exists()
