"""Which strategy computes a layer, what the user's choice is worth, and what is said where it cannot be had."""

import copy
import importlib
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.gpus import GPUS, INTERPRETER
from lstm_triton_kernels.persistent_plan import PersistentPlan
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import VARIANTS, CoupledLSTM, LSTMSpec, aten, autograd, dispatch, functional, layer, selection
from lstm_triton.selection import Choice, Layer
from tests.support.parity import Case, errors, expected_results, laid_out, random_inputs, results

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
H100 = GPUS["h100"]
STANDARD, COUPLED = LSTMSpec(), LSTMSpec(coupled=True)
FULL, FULL_CURRENT = LSTMSpec(peephole="full"), LSTMSpec(peephole="full", output_peephole="current")
ANCHOR = Layer(STANDARD, 1024, 16, 768, 1, False, torch.bfloat16, "ieee", training=False)
FITS = "a plan fits, and by estimate nothing else is faster"

OBSTACLES = [
    (dict(projected=True), "a projection needs a product between two steps, which no persistent kernel has"),
    (dict(spec=FULL_CURRENT, H=64), "a full peephole on c_t needs a product within the step"),
    (dict(spec=replace(FULL_CURRENT, coupled=True), H=64), "a full peephole on c_t needs a product within the step"),
    (dict(dtype=torch.float64), "forward pass: float64 has no persistent kernel"),
    (dict(H=2048), r"forward pass: .*the recurrent weights, 32\.0 MiB"),
    (dict(B=0), "forward pass: there are no rows"),
]
SLOW = [
    (dict(T=1), "a single step has no weights to keep"),
    (
        dict(B=4096),
        r"\d+\.\d us a step by estimate \(forward, up to \d+ row blocks .* \d+\.\d us",
    ),
]


def of(fields):
    return ANCHOR._replace(**fields)


layers = st.builds(
    Layer,
    spec=st.sampled_from(VARIANTS), T=st.sampled_from((1, 2, 1024)), B=st.sampled_from((0, 1, 16, 300, 4096)),
    H=st.one_of(st.integers(1, 128), st.integers(1, 2500)), D=st.sampled_from((1, 2)), projected=st.booleans(),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)),
    precision=st.sampled_from(("ieee", "tf32")), training=st.booleans(),
)  # fmt: skip
machines = st.sampled_from((*GPUS.values(), INTERPRETER))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(layers, machines, st.booleans())
def test_the_users_choice_wins_or_is_an_error_and_auto_always_finds_something(sizes, gpu, cudnn_may):
    asked = Choice("stepwise", "asked for")
    assert (
        selection.strategy_of("stepwise", sizes, gpu, cudnn_may) == asked == selection.kernels("stepwise", sizes, gpu)
    )
    assert selection.strategy_of("cudnn", sizes, gpu, cudnn_may) == ("cudnn", "asked for")
    obstacle = selection.why_not_persistent(sizes, gpu)
    for decide in (selection.kernels, lambda *given: selection.strategy_of(*given, cudnn_may)):
        if obstacle is None:
            assert decide("persistent", sizes, gpu) == ("persistent", "asked for")
        else:
            with pytest.raises(RuntimeError) as raised:
                decide("persistent", sizes, gpu)
            assert str(raised.value) == f"strategy 'persistent' cannot run here: {obstacle}"
    chosen = selection.kernels("auto", sizes, gpu)
    rather = obstacle or selection.why_rather_not_persistent(sizes, gpu)
    assert chosen == (("persistent", FITS) if rather is None else ("stepwise", rather))
    best = selection.strategy_of("auto", sizes, gpu, cudnn_may)
    if cudnn_may and sizes.spec.peephole is None and selection.cudnn_is_persistent(sizes):
        assert best.name == "cudnn" and selection.SHOWN_FASTER in best.reason
    elif cudnn_may and sizes.spec.peephole is None and chosen.name == "stepwise":
        assert best.name == "cudnn" and best.reason.endswith(chosen.reason)
    else:
        assert best == chosen


@settings(max_examples=200, deadline=None, derandomize=True)
@given(layers, machines)
def test_a_layer_without_obstacle_has_every_plan(sizes, gpu):
    if selection.why_not_persistent(sizes, gpu) is None:
        plans = selection.plans(sizes, gpu)
        assert list(plans) == (["forward", "backward"] if sizes.training else ["forward"])
        assert all(isinstance(plan, PersistentPlan) and plan.directions == sizes.D for plan in plans.values())


@pytest.mark.parametrize("fields, reason", OBSTACLES)
def test_what_keeps_the_persistent_kernels_from_running(fields, reason):
    assert re.match(reason, selection.why_not_persistent(of(fields), H100))
    with pytest.raises(RuntimeError, match=f"strategy 'persistent' cannot run here: {reason}"):
        selection.kernels("persistent", of(fields), H100)
    chosen = selection.kernels("auto", of(fields), H100)
    assert chosen.name == "stepwise" and re.match(reason, chosen.reason)


@pytest.mark.parametrize("fields, reason", SLOW)
def test_where_auto_does_without_them_they_can_be_had(fields, reason):
    assert selection.why_not_persistent(of(fields), H100) is None
    assert re.fullmatch(reason, selection.why_rather_not_persistent(of(fields), H100))
    assert selection.kernels("auto", of(fields), H100).name == "stepwise"
    assert selection.kernels("persistent", of(fields), H100) == ("persistent", "asked for")


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_auto_takes_the_persistent_kernels_where_a_plan_fits(spec):
    sizes = of(dict(spec=spec, H=256, training=True))
    if spec.full and spec.output_current:
        assert selection.strategy_of("auto", sizes, H100, cudnn_may=True).name == "stepwise"
    else:
        assert selection.strategy_of("auto", sizes, H100, cudnn_may=True) == ("persistent", FITS)


def test_a_pass_without_a_plan_is_named(monkeypatch):
    plan = selection.persistent_plan

    def no_backward(work, gpu, *more, **options):
        return "it does not fit" if work.backward else plan(work, gpu, *more, **options)

    monkeypatch.setattr(selection, "persistent_plan", no_backward)
    assert selection.why_not_persistent(ANCHOR, H100) is None
    assert selection.why_not_persistent(of(dict(training=True)), H100) == "backward pass: it does not fit"


def test_both_passes_together_decide_for_training(monkeypatch):
    plan = selection.persistent_plan
    took = {False: 9.0, True: 7.0}

    def timed(work, gpu, *more, **options):
        return replace(plan(work, gpu, *more, **options), estimate_us=took[work.backward])

    monkeypatch.setattr(selection, "persistent_plan", timed)
    training = of(dict(training=True))
    assert "9.0 us a step by estimate (forward, " in selection.why_rather_not_persistent(ANCHOR, H100)
    assert selection.why_rather_not_persistent(training, H100) is None
    took[True] = 9.0
    assert "18.0 us a step by estimate (forward and backward, " in selection.why_rather_not_persistent(training, H100)


def test_the_stepwise_estimate_by_hand():
    work = selection.recurrence(of(dict(spec=FULL, D=2)), backward=False)
    operations = 2 * 16 * 768 * 768 * (4 + 3) * 2
    wanted = 2 * selection.STEPWISE_US[False] + operations / (0.5 * 989e6)
    assert selection.stepwise_estimate_us(work, H100) == pytest.approx(wanted, rel=1e-12)


NO_PLAN = [fields for fields, _ in OBSTACLES + SLOW if "spec" not in fields] + [dict(H=3000)]


@pytest.mark.parametrize("fields", NO_PLAN, ids=str)
def test_auto_takes_cudnn_for_variants_without_peepholes_alone(fields):
    chosen = selection.strategy_of("auto", of(fields), H100, cudnn_may=True)
    assert chosen.name == "cudnn"
    assert chosen.reason.startswith("it has this variant, and the persistent kernels are out: ")
    assert chosen.reason.endswith(selection.kernels("auto", of(fields), H100).reason)
    assert selection.strategy_of("auto", of(fields), H100, cudnn_may=False).name == "stepwise"
    for spec in VARIANTS:
        variant = of(fields | dict(spec=spec))
        kernels = selection.kernels("auto", variant, H100)
        assert kernels.name == "stepwise" or (fields == dict(H=2048) and spec.coupled)  # three gates fit
        chosen = selection.strategy_of("auto", variant, H100, cudnn_may=True)
        if spec.peephole is None and kernels.name == "stepwise":
            assert chosen.name == "cudnn"
        else:
            assert chosen == kernels


HALF = dict(dtype=torch.float16)
PERSISTENT = [
    HALF, HALF | dict(training=True), HALF | dict(H=128, B=8), HALF | dict(H=1024, B=128), HALF | dict(H=192, B=7),
    HALF | dict(H=100, B=1, D=2), HALF | dict(H=128, training=True, D=2), HALF | dict(spec=COUPLED),
    dict(dtype=torch.float32, H=192), dict(dtype=torch.float32, H=65, training=True),
]  # fmt: skip
STANDARD_ALGORITHM = [
    dict(), dict(H=64), dict(dtype=torch.float32), HALF | dict(B=12), HALF | dict(B=9), HALF | dict(H=704),
    HALF | dict(D=2, H=256), HALF | dict(ragged=True), HALF | dict(H=193, B=7), HALF | dict(H=150, B=7, training=True),
    HALF | dict(H=64, ragged=True),
]  # fmt: skip


@pytest.mark.parametrize("fields", PERSISTENT, ids=str)
def test_auto_takes_cudnn_where_it_has_a_persistent_kernel_that_a_result_shows_faster(fields):
    chosen = selection.strategy_of("auto", of(fields), H100, cudnn_may=True)
    assert chosen == (
        "cudnn",
        f"its own persistent kernel serves here, faster on an H200 ({selection.SHOWN_FASTER})",
    )
    assert (Path(__file__).parents[2] / selection.SHOWN_FASTER).is_file()
    diagonal = of(fields | dict(spec=LSTMSpec(peephole="diagonal")))
    for sizes, may in ((of(fields), False), (diagonal, True)):
        assert selection.strategy_of("auto", sizes, H100, may) == selection.kernels("auto", sizes, H100)
    for asked in ("persistent", "stepwise", "cudnn"):
        assert selection.strategy_of(asked, of(fields), H100, cudnn_may=True) == (asked, "asked for")


@pytest.mark.parametrize("fields", STANDARD_ALGORITHM, ids=str)
def test_auto_takes_the_persistent_kernels_where_cudnn_has_none(fields):
    assert not selection.cudnn_is_persistent(of(fields))
    assert selection.strategy_of("auto", of(fields), H100, True) == selection.kernels("auto", of(fields), H100)


def test_the_sizes_of_a_layer():
    case = Case(COUPLED, T=3, B=2, I=5, H=7, bidirectional=True, proj_size=4, dtype=torch.float32)
    x, _, c_0, *flat = (t.detach() for t in random_inputs(case).values())
    weights = autograd.group(flat, COUPLED, True, True)
    expected = Layer(COUPLED, 3, 2, 7, 2, True, torch.float32, selection.matmul_precision(), True)
    assert selection.layer_of(x, c_0, weights, COUPLED, True) == expected
    ragged = selection.layer_of(x, c_0, weights, COUPLED, True, ragged=True)
    assert ragged == expected._replace(ragged=True)
    assert selection.recurrence(ragged, backward=True).ragged and not selection.recurrence(expected, True).ragged
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32"
        assert selection.layer_of(x, c_0, weights, COUPLED, False) == expected._replace(
            precision="tf32", training=False
        )
    finally:
        switch.fp32_precision = before


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with torch.backends.cudnn.flags(enabled=True):
        yield


def test_what_keeps_cudnn_from_running(cudnn, monkeypatch):
    assert selection.why_not_cudnn(CUDA, STANDARD) is None
    assert selection.why_not_cudnn(CPU, STANDARD) == "it computes on CUDA devices, not on cpu"
    for spec in VARIANTS:
        wanted = f"it has no peepholes, as {spec.name!r} has" if spec.peephole else None
        assert selection.why_not_cudnn(CUDA, spec) == wanted
    with torch.backends.cudnn.flags(enabled=False):
        assert selection.why_not_cudnn(CUDA, STANDARD) == "cuDNN is not available, or switched off"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert selection.why_not_cudnn(CUDA, STANDARD) == "cuDNN is not available, or switched off"


@pytest.fixture
def capability(monkeypatch):
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", True)
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "auto")

    def be(*pair):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pair)

    be(9, 0)
    return be


NEEDS_CUDA = r"it needs a CUDA device, move model and input there \(model.to\('cuda'\)\); CPU tensors only with TRITON_"


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
def test_the_kernels_run_where_the_backend_does(strategy, capability, monkeypatch):
    def refused(reason, device=CUDA, dtype=torch.float32):
        with pytest.raises(RuntimeError, match=f"^strategy '{strategy}' cannot run here: {reason}"):
            selection.check_runnable(strategy, device, dtype, COUPLED)

    selection.check_runnable(strategy, CUDA, torch.float32, COUPLED)
    refused(NEEDS_CUDA, device=CPU)
    refused("the kernels compute in .*, got torch.complex64", dtype=torch.complex64)
    refused("the kernels run on CUDA devices, not on mps", device=torch.device("mps"))
    for name in ("triton", "auto"):
        with lstm_triton.backend(name):
            selection.check_runnable(strategy, CUDA, torch.float32, COUPLED)
    with lstm_triton.backend("torch"):
        refused("backend 'torch' was asked for")
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "torch")
    refused("backend 'torch' was asked for")
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", "auto")
    capability(7, 5)
    refused(r"cuda:0 has compute capability 7\.5")
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    refused("triton is not installed")


def test_cudnn_and_auto_need_no_kernels(capability, cudnn, monkeypatch):
    capability(7, 5)
    monkeypatch.setattr(dispatch, "TRITON_INSTALLED", False)
    selection.check_runnable("cudnn", CUDA, torch.float32, STANDARD)
    with lstm_triton.backend("torch"):
        selection.check_runnable("cudnn", CUDA, torch.float32, STANDARD)
    selection.check_runnable("cudnn", CUDA, torch.float32, COUPLED)
    with pytest.raises(RuntimeError, match=r"^strategy 'cudnn' cannot run here: it has no peepholes, as 'full"):
        selection.check_runnable("cudnn", CUDA, torch.float32, FULL_CURRENT)
    for device in (CPU, CUDA):
        selection.check_runnable("auto", device, torch.complex64, COUPLED)


WHY_NOT_HERE = {
    "persistent": NEEDS_CUDA,
    "stepwise": NEEDS_CUDA,
    "cudnn": "it computes on CUDA devices, not on cpu",
}


@pytest.mark.parametrize("strategy", WHY_NOT_HERE)
@pytest.mark.parametrize("spec", [STANDARD, COUPLED], ids=lambda spec: spec.name)
def test_a_strategy_that_cannot_run_on_the_cpu_says_why(spec, strategy):
    module = lstm_triton.LSTM(3, 4, coupled=spec.coupled, strategy=strategy)
    x = torch.zeros(2, 1, 3)
    said = f"strategy '{strategy}' cannot run here: {WHY_NOT_HERE[strategy]}"
    for call in (
        lambda: functional.lstm(x, None, list(module.parameters()), coupled=spec.coupled, strategy=strategy),
        lambda: module(x),
        lambda: module.requires_grad_(False)(x),
        lambda: module(x[:1, :0]),
    ):
        with pytest.raises(RuntimeError, match=said):
            call()
    with lstm_triton.backend("torch"), pytest.raises(RuntimeError, match=f"strategy '{strategy}' cannot run here"):
        module(x)
    module.strategy = "auto"
    module(x)


def test_unknown_strategies_list_what_exists():
    said = r"strategy must be one of 'auto', 'persistent', 'stepwise', 'cudnn', got "
    module, x = lstm_triton.LSTM(3, 4), torch.zeros(2, 1, 3)
    for unknown in ("fast", "", None, "Persistent", 3):
        with pytest.raises(ValueError, match=said + re.escape(repr(unknown))):
            selection.check_strategy(unknown, STANDARD)
        with pytest.raises(ValueError, match=said):
            functional.lstm(x, None, list(module.parameters()), strategy=unknown)
        with pytest.raises(ValueError, match=said):
            lstm_triton.LSTM(3, 4, strategy=unknown)
    module.strategy = "fast"
    with pytest.raises(ValueError, match=said):
        module(x)
    for known in selection.STRATEGIES:
        selection.check_strategy(known, STANDARD)
        assert lstm_triton.LSTM(3, 4, strategy=known).strategy == known


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_cudnn_is_refused_for_peepholes_when_the_module_is_built(spec):
    options = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    if spec.peephole is None:
        assert lstm_triton.LSTM(3, 4, strategy="cudnn", **options).strategy == "cudnn"
        return
    refused = re.escape(f"strategy 'cudnn' computes no peepholes, got the variant {spec.name!r}")
    with pytest.raises(ValueError, match=refused):
        lstm_triton.LSTM(3, 4, strategy="cudnn", **options)
    module = lstm_triton.LSTM(3, 4, **options)
    with pytest.raises(ValueError, match=refused):
        functional.lstm(torch.zeros(2, 1, 3), None, list(module.parameters()), strategy="cudnn", **options)


@pytest.mark.parametrize("value", [1, 0, None, "yes", 0.5])
def test_recompute_is_a_bool(value):
    with pytest.raises(TypeError, match="recompute"):
        lstm_triton.LSTM(3, 4, recompute=value)


# Who computes a call, with everything replaced that asks a device.


@pytest.fixture
def called(monkeypatch):
    """The tensors pass for those of an H100 that has cuDNN; what would compute is noted: (module, strategy)."""
    calls = []

    def note(name):
        def compute(x, h_0, c_0, weights, *rest):
            calls.append((name, rest[1]) if name == "kernels" else (name, None))
            results = (x.new_zeros(*x.shape[:2], c_0.shape[2]), h_0, c_0)
            return results if name == "cudnn" else (*results, x.new_empty(0))

        return compute

    def chosen(device, dtype):
        name = dispatch.requested()
        return dispatch.Choice("triton" if name == "auto" else name, "")

    monkeypatch.setattr(dispatch, "choose", chosen)
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(selection, "why_not_cudnn", lambda device, spec: "a variant" if spec.peephole else None)
    monkeypatch.setattr(aten, "serves", lambda x, spec: aten.has(spec))
    monkeypatch.setattr(functional, "gpu_of", lambda device: H100)
    monkeypatch.setattr(aten, "lstm", note("cudnn"))
    monkeypatch.setattr(autograd, "lstm_layer", note("kernels"))

    def run(T=3, B=2, H=200, L=1, grad=True, dtype=torch.float32, **options):
        module = lstm_triton.LSTM(3, H, L, dtype=dtype, **options).requires_grad_(grad)
        calls.clear()
        module(torch.zeros(T, B, 3, dtype=dtype))
        assert len(calls) == (1 if calls[0][0] == "cudnn" else L) and len(set(calls)) == 1  # it takes a whole stack
        return calls[0]

    return run


def test_each_strategy_reaches_who_computes_it(called):
    assert called() == ("kernels", "auto")
    assert called(L=3) == ("kernels", "auto")
    assert called(T=1) == called(dtype=torch.float64) == ("cudnn", None)
    assert called(T=1, coupled=True) == called(dtype=torch.float64, coupled=True) == ("cudnn", None)
    assert called(T=1, peephole="full") == called(dtype=torch.float64, peephole="full") == ("kernels", "auto")
    for strategy in ("persistent", "stepwise"):
        for options in (dict(), dict(T=1), dict(coupled=True), dict(grad=False), dict(L=2)):
            assert called(strategy=strategy, **options) == ("kernels", strategy)
    assert called(strategy="cudnn") == called(strategy="cudnn", L=2) == ("cudnn", None)
    assert called(strategy="cudnn", coupled=True) == ("cudnn", None)


def test_auto_leaves_to_cudnn_neither_what_was_asked_of_the_kernels_nor_an_empty_batch(called):
    assert called(T=1) == ("cudnn", None)
    assert called(T=1, B=0) == ("kernels", "auto")
    with lstm_triton.backend("triton"):
        assert called(T=1) == ("kernels", "auto")
    with lstm_triton.backend("torch"):
        assert called(T=1) == ("cudnn", None)  # PyTorch's own operator
        assert called(T=2, coupled=True) == ("cudnn", None)
        assert called(T=2, peephole="full") == ("kernels", "torch")


def test_auto_asks_for_the_passes_that_will_run(called):
    """Of 150 units cuDNN has a persistent kernel forward, and none backward."""
    assert called(H=150, grad=True) == ("kernels", "auto")
    assert called(H=150, grad=False) == ("cudnn", None)
    with torch.no_grad():
        assert called(H=150, grad=True) == ("cudnn", None)


def test_the_operators_run_what_the_selection_says(monkeypatch):
    case = Case(COUPLED, T=3, B=2, I=5, H=7, dtype=torch.float32)
    x, _, c_0, *flat = (t.detach() for t in random_inputs(case).values())

    def modules(strategy, x=x, c_0=c_0, spec=COUPLED, training=True, ragged=False):
        found = autograd.passes(strategy, x, c_0, autograd.group(flat, spec, True, False), spec, training, ragged)
        return [getattr(f, "keywords", {}).get("steps", f) for f in found]

    from lstm_triton import eager, persistent

    monkeypatch.setattr(autograd, "gpu_of", lambda device: H100)
    resident = [persistent.forward, persistent.backward]
    stepwise = [importlib.import_module(autograd.STEPS["stepwise"])] * 2
    assert modules("torch") == [eager, eager]
    assert modules("auto") == modules("persistent") == modules("persistent", ragged=True) == resident
    assert modules("stepwise") == modules("auto", x=x[:1]) == stepwise
    assert modules("persistent", x=x[:1]) == resident
    assert modules("auto", x=x.double()) == stepwise
    with pytest.raises(RuntimeError, match="strategy 'persistent' cannot run here: forward pass: float64"):
        modules("persistent", x=x.double())
    # An empty batch has nothing to launch, and nothing to refuse.
    assert modules("auto", x[:, :0], c_0[:, :0]) == modules("persistent", x[:, :0], c_0[:, :0]) == stepwise


# The module.


def test_repr_shows_what_is_not_the_default():
    assert repr(lstm_triton.LSTM(3, 4)) == "LSTM(3, 4)"
    assert repr(lstm_triton.LSTM(3, 4, strategy="stepwise")) == "LSTM(3, 4, strategy='stepwise')"
    module = CoupledLSTM(3, 4, 2, strategy="persistent", recompute=True)
    assert repr(module) == "CoupledLSTM(3, 4, num_layers=2, coupled=True, strategy='persistent', recompute=True)"
    module.strategy, module.recompute = "auto", False
    assert repr(module) == "CoupledLSTM(3, 4, num_layers=2, coupled=True)"


def test_copies_keep_the_strategy():
    module = lstm_triton.LSTM(3, 4, strategy="cudnn", recompute=True)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert (again.strategy, again.recompute) == ("cudnn", True)
    assert not {"strategy", "recompute"} & module.state_dict().keys()


def test_a_module_pickled_without_strategy_and_recompute_still_works():
    module = lstm_triton.LSTM(3, 4, coupled=True)
    x = torch.randn(2, 1, 3)
    expected = module(x)[0]
    del module.__dict__["strategy"], module.__dict__["recompute"]
    again = pickle.loads(pickle.dumps(module))
    assert not {"strategy", "recompute"} & again.__dict__.keys()
    assert (again.strategy, again.recompute) == ("auto", False)
    assert repr(again) == "LSTM(3, 4, coupled=True)"
    torch.testing.assert_close(again(x)[0], expected, rtol=0, atol=0)
    again(x)[0].sum().backward()


# Gates that are computed again.


def calling(recompute):
    """A function as `parity.results` takes it, with or without recomputed gates."""

    def call(case, x, h_0, c_0, *weights):
        output, (h_n, c_n) = functional.lstm(
            laid_out(case, x), (h_0, c_0), weights, num_layers=case.L, bias=case.bias, proj_size=case.proj_size,
            bidirectional=case.bidirectional, recompute=recompute, **case.variant,
        )  # fmt: skip
        return output, h_n, c_n

    return call


RECOMPUTED = [
    dict(T=7, L=2, bidirectional=True),
    dict(T=2, B=1),
    dict(T=4, proj_size=3, bidirectional=True, bias=False, layout="transposed"),
]


@pytest.fixture
def written_out(monkeypatch):
    """The standard variant, too, is computed by the steps in `eager`."""
    monkeypatch.setattr(aten, "serves", lambda *_: False)


@pytest.mark.parametrize("shape", RECOMPUTED, ids=str)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_recomputed_gates_give_the_same_gradients(spec, shape, written_out, monkeypatch):
    again = []
    compute = layer.activated_gates
    monkeypatch.setattr(layer, "activated_gates", lambda *a, **k: again.append(1) or compute(*a, **k))
    case = Case(spec, **shape)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    for recompute in (False, True):
        again.clear()
        found = errors(results(case, inputs, calling(recompute)), expected)
        assert max(found.values()) < 1e-12, (recompute, found)
        assert len(again) == (case.L * case.D if recompute else 0)


@pytest.mark.parametrize("gate", [0, -1])
def test_a_wrong_recomputed_gate_is_seen(gate, written_out, monkeypatch):
    """Test of the test: the recomputed gates decide about the gradients."""
    compute = layer.activated_gates

    def wrong(*arguments, **options):
        gates = compute(*arguments, **options)
        gates[0, 0, gate] *= 1 + 1e-6
        return gates

    monkeypatch.setattr(layer, "activated_gates", wrong)
    case = Case(COUPLED)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    assert max(errors(results(case, inputs, calling(False)), expected).values()) < 1e-12
    assert max(errors(results(case, inputs, calling(True)), expected).values()) > 1e-10


@pytest.mark.parametrize("spec", [COUPLED, FULL_CURRENT], ids=lambda spec: spec.name)
def test_recomputing_keeps_no_gates(spec):
    case = Case(spec, T=5)
    x, h_0, c_0, *weights = (t.detach() for t in random_inputs(case).values())
    parameters, none = (spec.name, True, False, "torch"), (None, None)
    inputs = (x, h_0, c_0, weights, *none)
    gates = {
        (save, recompute): autograd.layer_forward(*inputs, *parameters, save, recompute, False)[4].numel()
        for save in (True, False)
        for recompute in (True, False)
    }
    kept = 5 * case.B * len(spec.gates) * case.H
    assert gates == {(True, False): kept, (True, True): 0, (False, False): 0, (False, True): 0}


def test_the_module_recomputes_and_may_be_told_later(monkeypatch):
    asked = []
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda *a, **k: asked.append(a[5]) or forward(*a, **k))
    module, x = lstm_triton.LSTM(3, 4, peephole="full", recompute=True), torch.randn(2, 1, 3)
    module(x)[0].sum().backward()
    first = module.weight_hh_l0.grad.clone()
    module.recompute = False
    module.zero_grad()
    module(x)[0].sum().backward()
    assert asked == [layer.Keep(True, True), layer.Keep(True, False)]
    torch.testing.assert_close(module.weight_hh_l0.grad, first)


def test_second_gradients_through_recomputed_gates():
    case = Case(COUPLED, T=3, B=2, I=2, H=3)
    inputs = random_inputs(case)
    second = {}
    for recompute in (False, True):
        output = calling(recompute)(case, *inputs.values())[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), inputs["x"], create_graph=True)
        (second[recompute],) = torch.autograd.grad(gradient.square().sum(), inputs["weight_hh_l0"])
    torch.testing.assert_close(second[True], second[False], rtol=1e-12, atol=1e-14)
    assert second[True].abs().max() > 0


def test_recompute_compiles_into_one_graph():
    torch._dynamo.reset()
    case = Case(COUPLED, T=3)
    inputs = random_inputs(case)
    compiled = torch.compile(lambda *t: calling(True)(case, *t), fullgraph=True, backend="aot_eager")
    actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    assert max(errors(actual, expected_results(case, inputs)).values()) < 1e-12


def test_cudnn_is_refused_what_its_operator_does_not_have_or_hides(cudnn):
    device = torch.device("cuda")
    refused = r"^strategy 'cudnn' cannot run here: "
    with pytest.raises(RuntimeError, match=refused + "torch.nn.LSTM's operator takes no resets, lengths"):
        selection.check_runnable("cudnn", device, torch.float32, STANDARD, "resets, lengths")
    hidden = refused + "torch.func and forward-mode differentiation do not see through"
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=hidden):
        selection.check_runnable("cudnn", device, torch.float32, STANDARD)
    with pytest.raises(RuntimeError, match=hidden):
        torch.func.vmap(lambda x: (selection.check_runnable("cudnn", device, x.dtype, STANDARD), x)[1])(torch.ones(2))
    selection.check_runnable("cudnn", device, torch.float32, STANDARD)


class Reached(Exception):
    """A compiled graph has reached its backend."""


def reached(graph, inputs):
    raise Reached(str(graph.graph))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("faster", [False, True], ids=["kernels", "cuDNN"])
def test_auto_decides_for_cudnn_while_it_is_compiled(monkeypatch, faster, dynamic):
    """As on a GPU, where Dynamo can trace neither whether there is cuDNN nor what the GPU is like."""

    def untraceable(device, spec):
        assert torch.backends.cudnn.is_available() in (True, False)

    monkeypatch.setattr(dispatch, "choose", lambda device, dtype: Choice("triton", ""))
    monkeypatch.setattr(aten, "serves", lambda x, spec: aten.has(spec))
    monkeypatch.setattr(selection, "why_not_cudnn", untraceable)
    monkeypatch.setattr(selection, "gpu_of", lambda device: H100)
    module = lstm_triton.LSTM(3, 8 if faster else 200)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=reached)
    with pytest.raises(Exception, match=", aten, " if faster else ", auto, ") as error:
        compiled(torch.zeros(5, 4, 3))
    assert "Reached" in str(error.value)
    # Of packed rows PyTorch's operator would read the batch sizes while it is traced: the kernels compute them.
    with pytest.raises(Exception, match=", auto, ") as error:
        compiled(pack_padded_sequence(torch.zeros(5, 4, 3), torch.tensor([5, 3, 3, 2])))
    assert "Reached" in str(error.value)


def test_whether_cudnn_is_on_is_asked_once_by_a_compiled_function():
    compiled = torch.compile(lambda x: x + selection.cudnn_is_on(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [float(selection.cudnn_is_on())] * 2


def test_pytorchs_operator_runs_without_autocast(monkeypatch):
    """Autocast casts its arguments to float16 on a GPU, also where bfloat16 is asked for; they are cast before."""
    seen = []

    def lstm(x, *rest):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return operator(x, *rest)

    operator = aten.lstm
    monkeypatch.setattr(aten, "lstm", lstm)
    monkeypatch.setattr(aten, "serves", lambda x, spec: aten.has(spec))
    module = lstm_triton.LSTM(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(torch.zeros(5, 4, 3))
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.bfloat16 and seen == [(torch.bfloat16, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gpu_computes_a_step_of_the_standard_cell_by_pytorchs_own(dtype, monkeypatch):
    class Input:
        device = CUDA
        is_floating_point = staticmethod(lambda: True)

    Input.dtype = dtype
    weight = torch.nn.Parameter(torch.zeros(1))
    assert functional.torch_cell_serves(Input, weight, None, None)
    assert not functional.torch_cell_serves(Input, weight, weight, None)
    with lstm_triton.backend("triton"):
        assert not functional.torch_cell_serves(Input, weight, None, None)
    with forward_ad.dual_level():
        assert not functional.torch_cell_serves(Input, weight, None, None)
    Input.dtype = torch.complex64
    assert not functional.torch_cell_serves(Input, weight, None, None)
    Input.dtype = dtype
    monkeypatch.setattr(functional, "autocast_dtype", lambda x: torch.bfloat16)
    assert not functional.torch_cell_serves(Input, weight, None, None)
