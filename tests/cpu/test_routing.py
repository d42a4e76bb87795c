"""Who computes a layer and why: what the user's choice is worth, and what is said where it cannot be had."""

import copy
import itertools
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels.gpus import GPUS, INTERPRETER
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import VARIANTS, CoupledLSTM, LSTMSpec, aten, autograd, estimates, functional, routing
from lstm_triton.estimates import CUDNN_US, HOST_US, STEPWISE_US
from lstm_triton.routing import FASTER, Choice, Facts, decide

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
H100 = GPUS["h100"]
STANDARD, COUPLED, DIAGONAL = LSTMSpec(), LSTMSpec(coupled=True), LSTMSpec(peephole="diagonal")
FULL, FULL_CURRENT = LSTMSpec(peephole="full"), LSTMSpec(peephole="full", output_peephole="current")
ANCHOR = Layer(STANDARD, 1024, 16, 768, 1, torch.bfloat16)
FITS = "a plan fits, and by estimate nothing else is faster"
HALF = dict(dtype=torch.float16)
FEW = HALF | dict(H=64)
"""Units for which cuDNN's persistent kernel takes less time than ours."""


def of(fields):
    return ANCHOR._replace(**fields)


layers = st.builds(
    Layer,
    spec=st.sampled_from(VARIANTS), T=st.sampled_from((1, 2, 1024)), B=st.sampled_from((0, 1, 16, 300, 4096)),
    H=st.one_of(st.integers(1, 128), st.integers(1, 2500)), D=st.sampled_from((1, 2)), P=st.sampled_from((0, 0, 1)),
    dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)), I=st.just(0),
    precision=st.sampled_from(("ieee", "tf32")), training=st.booleans(), ragged=st.booleans(), L=st.integers(1, 4),
)  # fmt: skip
machines = st.sampled_from((*GPUS.values(), INTERPRETER))
obstacles = st.sampled_from((None, "an obstacle"))
thorough = settings(max_examples=300, deadline=None, derandomize=True)


@thorough
@given(
    layers,
    machines,
    st.sampled_from(routing.STRATEGIES),
    st.sampled_from(routing.BACKENDS),
    obstacles,
    obstacles,
    obstacles,
)
def test_the_users_choice_wins_or_is_an_error_and_auto_always_finds_something(
    layer, gpu, strategy, backend, no_kernels, no_operator, no_cudnn
):
    facts = Facts(layer, gpu, strategy, backend, no_kernels, no_operator, no_cudnn)
    try:
        found = decide(facts)
    except RuntimeError as error:
        assert strategy != "auto" or (backend == "triton" and no_kernels)
        assert "cannot run here: " in str(error)
        return
    computed = {"persistent": "kernels", "stepwise": "kernels", "operator": "operator", "eager": "eager"}[found.name]
    assert found.reason.strip()
    if computed == "kernels":
        assert no_kernels is None and backend != "torch"
    if computed == "operator":
        assert no_operator is None and backend != "triton"
    if strategy == "cudnn":
        assert found == ("operator", "asked for") and no_cudnn is None
    elif computed == "kernels" and layer.B == 0:
        assert found == ("stepwise", "there are no rows")
    elif strategy != "auto":
        assert found == (strategy, "asked for")
    elif backend == "triton":
        assert computed == "kernels"
    elif backend == "torch" or no_kernels:
        assert computed in ("operator", "eager") and found.reason == (no_kernels if backend == "auto" else "asked for")
        short = layer.spec.coupled and layer.T == 1
        assert (computed == "eager") == (no_operator is not None or short)
    elif no_operator or no_cudnn or layer.B == 0:
        assert found == routing.kernels("auto", layer, gpu)
    else:
        persistent = layer.T > 1 and routing.why_not_persistent(layer, gpu) is None
        faster = persistent and estimates.call_us("persistent", layer, gpu) < FASTER * estimates.call_us(
            "operator", layer, gpu
        )
        assert found.name == ("persistent" if faster else "operator")


@thorough
@given(layers, machines)
def test_a_layer_without_obstacle_has_plans_for_every_pass(layer, gpu):
    plans = [ranked_plans(layer, backward, gpu) for backward in estimates.passes(layer).values()]
    assert list(estimates.passes(layer)) == (["forward", "backward"] if layer.training else ["forward"])
    assert (routing.why_not_persistent(layer, gpu) is None) == all(isinstance(p, tuple) for p in plans)


OBSTACLES = [
    (dict(dtype=torch.float64), "float64 has no persistent kernel"),
    (dict(H=5000), r".*the recurrent weights, 190\.7 MiB"),
    (dict(H=2048, dtype=torch.float32), r".*the recurrent weights, 64\.0 MiB"),
    (dict(H=5000, dtype=torch.float32, precision="tf32"), r".*the recurrent weights, 381\.5 MiB"),
]
SLOW = [
    (dict(T=1), "a single time step reads the weights once, so that keeping them on the chip gains nothing"),
    (dict(B=4096), r"\d+\.\d us a step by estimate \(forward\); step by step it takes \d+\.\d us"),
]


@pytest.mark.parametrize("fields, reason", OBSTACLES)
def test_what_keeps_the_persistent_kernels_from_running(fields, reason):
    assert re.match(reason, routing.why_not_persistent(of(fields), H100))
    with pytest.raises(RuntimeError, match=f"strategy 'persistent' cannot run here: {reason}"):
        routing.kernels("persistent", of(fields), H100)
    chosen = routing.kernels("auto", of(fields), H100)
    assert chosen.name == "stepwise" and re.match(reason, chosen.reason)


@pytest.mark.parametrize("fields, reason", SLOW)
def test_where_auto_does_without_them_they_can_be_had(fields, reason):
    assert routing.why_not_persistent(of(fields), H100) is None
    assert re.fullmatch(reason, routing.why_rather_not_persistent(of(fields), H100))
    assert routing.kernels("auto", of(fields), H100).name == "stepwise"
    assert routing.kernels("persistent", of(fields), H100) == ("persistent", "asked for")


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_auto_takes_the_persistent_kernels_where_a_plan_fits(spec):
    layer = of(dict(spec=spec, H=256, training=True))
    assert routing.kernels("auto", layer, H100).name == "persistent"
    assert routing.kernels("auto", layer._replace(P=100), H100).name == "persistent"


def test_a_pass_without_a_plan_is_named(monkeypatch):
    plans = routing.ranked_plans
    no_backward = lambda layer, backward, gpu: "it does not fit" if backward else plans(layer, backward, gpu)  # noqa: E731
    monkeypatch.setattr(routing, "ranked_plans", no_backward)
    assert routing.why_not_persistent(ANCHOR, H100) is None
    assert routing.why_not_persistent(of(dict(training=True)), H100) == "backward pass: it does not fit"


def test_both_passes_together_decide_for_training(monkeypatch):
    plans = routing.ranked_plans
    took = {False: 9.0, True: 7.0}

    def timed(layer, backward, gpu):
        return [replace(plans(layer, backward, gpu)[0], estimate_us=took[backward])]

    monkeypatch.setattr(estimates, "ranked_plans", timed)
    training = of(dict(training=True))
    assert "9.0 us a step by estimate (forward)" in routing.why_rather_not_persistent(ANCHOR, H100)
    assert routing.why_rather_not_persistent(training, H100) is None
    took[True] = 11.0
    assert "20.0 us a step by estimate (forward and backward)" in routing.why_rather_not_persistent(training, H100)


def test_the_estimates_by_hand():
    layer = of(dict(spec=FULL, D=2, training=True))
    product = 2 * 16 * 768 * 768 * (4 + 3) / (0.5 * 989e6)
    both = 2 * (STEPWISE_US[False] + 6 * product) + 2 * (STEPWISE_US[True] + 6 * product)
    assert estimates.estimate_us("stepwise", layer, H100) == pytest.approx(both, rel=1e-12)
    product = 2 * 768 * 768 * 4 / (0.5 * 989e6)
    for B, rows in ((128, 6 * 128), (129, 6 * 128), (4096, 4096)):
        step = STEPWISE_US[False] + rows * product
        assert estimates.estimate_us("stepwise", of(dict(B=B)), H100) == pytest.approx(step, rel=1e-12)
    wide = of(dict(H=4096, B=4))  # 128 MiB of weights, of which L2 holds 25 between two steps
    from_memory = 103 * 2**20 / 3.352e6
    assert estimates.estimate_us("stepwise", wide, H100) == pytest.approx(STEPWISE_US[False] + from_memory, rel=1e-12)
    standard = CUDNN_US["standard, capability 9.0"][False] + from_memory
    assert estimates.estimate_us("operator", wide, H100) == pytest.approx(standard, rel=1e-12)
    assert estimates.weights_us(of(dict(H=1024)), H100) == 0
    plans = [ranked_plans(layer, backward, H100)[0] for backward in (False, True)]
    assert estimates.estimate_us("persistent", layer, H100) == sum(plan.estimate_us for plan in plans)
    product = 2.5 * 2 * 16 * 768 * 768 * 4 / (0.5 * 989e6)
    assert estimates.estimate_us("operator", ANCHOR, H100) == 10.0  # the host
    assert estimates.estimate_us("operator", of(dict(training=True, D=2)), H100) == 2 * (10 + 20)
    for B, rate, fields in (
        (1600, 989, dict()), (1600, 67, dict(dtype=torch.float32)),
        (1600, 494, dict(dtype=torch.float32, precision="tf32")),
        (80, 67, dict(dtype=torch.float32, precision="tf32", H=1150)),  # float32 where 4 does not divide H
    ):  # fmt: skip
        layer = of(fields | dict(B=B))
        step = 8.4 + 2.5 * 2 * B * layer.H**2 * 4 / (0.5 * rate * 1e6)
        assert estimates.estimate_us("operator", layer, H100) == pytest.approx(step, rel=1e-12)
    assert estimates.estimate_us("operator", of(dict(ragged=True)), H100) == pytest.approx(16 + product, rel=1e-12)
    product = 2.5 * 2 * 800 * 768 * 768 * 4 / (0.5 * 312e6)
    assert estimates.estimate_us("operator", of(dict(B=800)), GPUS["a100"]) == pytest.approx(6 + product, rel=1e-12)
    forward, backward = 1.3 + 0.8 * 768 / 1024, 3.1 + 1.7 * 768 / 1024
    for fields, estimate in (
        (HALF, forward), (HALF | dict(training=True), forward + backward),
        (HALF | dict(training=True, B=64), 6.4 + 0.17 * 64), (HALF | dict(H=64, training=True), 0.4 + 0.76),
        (HALF | dict(H=128), 1.7), (HALF | dict(H=192, B=1000, training=True), 100 + 20.0),
    ):  # fmt: skip
        assert estimates.estimate_us("operator", of(fields), GPUS["a100"]) == pytest.approx(estimate)
    assert all(set(entry) == {False, True} for entry in (*CUDNN_US.values(), *HOST_US.values()))


def test_the_time_of_a_call_by_hand():
    """The longer of the host's and the device's; where cuDNN is launched step by step, their sum; a call of cuDNN's is
    that of all layers.
    """
    for T, fields in itertools.product((25, 1024), (HALF, HALF | dict(training=True))):
        layer = of(fields | dict(T=T))
        for engine in ("persistent", "operator"):
            host = HOST_US[engine][False] + (HOST_US[engine][True] if layer.training else 0)
            device = T * estimates.estimate_us(engine, layer, H100)
            assert estimates.call_us(engine, layer, H100) == max(host, device)
    standard = of(dict(T=25))
    device = 25 * estimates.estimate_us("operator", standard, H100)
    assert estimates.call_us("operator", standard, H100) == HOST_US["operator"][False] + device
    stack = standard._replace(L=3)
    assert estimates.call_us("operator", stack, H100) == HOST_US["operator"][False] / 3 + device
    assert estimates.call_us("persistent", stack, H100) == estimates.call_us("persistent", standard, H100)


@pytest.mark.parametrize("fields", [dict(), dict(training=True)])
def test_auto_leaves_a_few_steps_to_cudnn(fields):
    """What the host needs for a launch of ours is more than cuDNN needs for all of them."""
    few, many = (decide(Facts(of(fields | dict(T=T)), H100)) for T in (25, 256))
    assert few.name == "operator" and " ms a call, " in few.reason and many.name == "persistent"


PERSISTENT = [
    HALF, HALF | dict(training=True), HALF | dict(H=128, B=8), HALF | dict(H=1024, B=128), HALF | dict(H=192, B=7),
    HALF | dict(H=100, B=1, D=2), HALF | dict(H=128, training=True, D=2), HALF | dict(spec=COUPLED),
    dict(dtype=torch.float32, H=192), dict(dtype=torch.float32, H=65, training=True), HALF | dict(H=100, L=3),
]  # fmt: skip
STANDARD_ALGORITHM = [
    dict(), dict(H=64), dict(dtype=torch.float32), HALF | dict(B=12), HALF | dict(B=9), HALF | dict(H=704),
    HALF | dict(D=2, H=256), HALF | dict(ragged=True), HALF | dict(H=193, B=7), HALF | dict(H=150, B=7, training=True),
    HALF | dict(H=64, ragged=True), HALF | dict(P=5), HALF | dict(L=2),
]  # fmt: skip


@pytest.mark.parametrize("fields", PERSISTENT, ids=str)
def test_where_pytorch_asks_cudnn_for_a_persistent_kernel(fields):
    layer = of(fields)
    assert estimates.cudnn_is_persistent(layer, layer.training)


@pytest.mark.parametrize("fields", STANDARD_ALGORITHM, ids=str)
def test_where_pytorch_asks_cudnn_for_the_standard_algorithm(fields):
    layer = of(fields)
    assert not estimates.cudnn_is_persistent(layer, layer.training)


def test_pytorch_asks_for_each_pass_by_itself():
    """Of few units: 192 forward, in training as well, and 128 backward."""
    for H, forward, backward in ((128, True, True), (129, True, False), (192, True, False), (193, False, False)):
        layer = of(HALF | dict(H=H, B=7, training=True))
        assert estimates.cudnn_is_persistent(layer, False) == forward
        assert estimates.cudnn_is_persistent(layer, True) == backward


def test_the_kernels_must_be_faster_than_cudnn_by_a_margin(monkeypatch):
    layer = of(dict(training=True))
    ours, cudnn = estimates.call_us("persistent", layer, H100), estimates.call_us("operator", layer, H100)
    text = f"{ours / 1e3:.2f} ms a call, {cudnn / 1e3:.2f} ms by cuDNN's standard algorithm; both are estimates"
    assert ours < FASTER * cudnn and routing.persistent_or_cudnn(layer, H100) == ("persistent", text)
    monkeypatch.setattr(routing, "FASTER", ours / cudnn)
    routing.persistent_or_cudnn.cache_clear()
    chosen = routing.persistent_or_cudnn(layer, H100)
    assert chosen.name == "operator" and chosen.reason.endswith(text)
    for fields, reason in (*OBSTACLES, SLOW[0]):
        chosen = routing.persistent_or_cudnn(of(fields), H100)
        assert chosen.name == "operator"
        assert re.match(f"cuDNN has this variant, and the persistent kernels do not suit it: {reason}", chosen.reason)


H200_ROWS, H100_ROWS = "older/h200-2026-11-26-gpu.csv", "h100-80gb-hbm3-2026-11-26-suites.csv"
OLDER_H100_ROWS = "older/h100-80gb-hbm3-2026-11-26-gpu.csv"
"""Of kernels that took longer than those of today; its rows say whether they were the kernels' or cuDNN's."""


def measured(file, by_kernels=False):
    """What `auto` and cuDNN took for layers of the standard and the coupled variant.

    The layer, cuDNN's microseconds a step, and its time over that of `auto`. With by_kernels only rows that say that
    the persistent kernels computed them.
    """
    import csv

    types = dict(bfloat16=torch.bfloat16, float16=torch.float16, tf32=torch.float32, float32=torch.float32)
    with open(Path(__file__).parents[2] / "benchmarks/results" / file) as rows:
        for row in csv.DictReader(rows):
            if row["strategy"] != "auto" or row["suite"] in ("cell", "ragged"):
                continue
            if by_kernels and not row["plan"].startswith("forward"):
                continue
            if row["variant"] in ("standard", "coupled"):
                sizes = [int(row[name]) for name in "TBHD"]
                rest = dict(I=int(row["I"]), training=row["mode"] == "forward+backward", L=int(row["L"]))
                precision = "tf32" if row["dtype"] == "tf32" else "ieee"
                layer = Layer(LSTMSpec.parse(row["variant"]), *sizes, types[row["dtype"]], precision, **rest)
                us = 1e3 * float(row["baseline_ms"]) / (layer.T * int(row["L"]))
                yield layer, us, float(row["baseline_ratio"])


def takes_the_kernels(layer):
    """Whether `auto` does on an H100."""
    return routing.persistent_or_cudnn(layer, H100).name == "persistent"


@pytest.mark.parametrize("file", [H200_ROWS, OLDER_H100_ROWS, H100_ROWS])
def test_auto_never_takes_kernels_that_are_estimated_to_be_slower_than_cudnn_was_measured(file):
    found = list(measured(file))
    taken = [(layer, us) for layer, us, _ in found if takes_the_kernels(layer)]
    assert all(estimates.estimate_us("persistent", layer, H100) < us for layer, us in taken)
    assert len(found) > 40 and len(taken) > 20


def test_auto_takes_what_an_h100_measured_to_be_faster():
    """Of its rows the kernels where cuDNN took clearly longer; of so few steps that the host decides, cuDNN."""
    found = [(layer, ratio, takes_the_kernels(layer)) for layer, _, ratio in measured(H100_ROWS)]
    faster = [(layer, taken) for layer, ratio, taken in found if ratio > 1 / 0.9]
    assert len(faster) > 100 and all(taken for _, taken in faster)
    short = [taken for layer, _, taken in found if layer.T == 25]
    assert len(short) > 10 and not any(short)


def test_auto_does_not_take_kernels_where_an_h100_measured_them_to_be_clearly_slower():
    found = [(layer, ratio) for layer, _, ratio in measured(OLDER_H100_ROWS, by_kernels=True)]
    slower = [layer for layer, ratio in found if ratio < 0.9]
    assert len(found) > 60 and len(slower) > 10 and not [layer for layer in slower if takes_the_kernels(layer)]


@pytest.fixture
def cudnn(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    with torch.backends.cudnn.flags(enabled=True):
        yield


def test_what_keeps_cudnn_from_running(cudnn, monkeypatch):
    assert routing.why_not_cudnn(CUDA, STANDARD) is None
    assert routing.why_not_cudnn(CPU, STANDARD) == "it computes on CUDA devices, not on cpu"
    for spec in VARIANTS:
        wanted = f"it has no peepholes, as {spec.name!r} has" if spec.peephole else None
        assert routing.why_not_cudnn(CUDA, spec) == wanted
        assert routing.why_not_operator(CUDA, of(dict(spec=spec)), ()) == wanted
    with torch.backends.cudnn.flags(enabled=False):
        assert routing.why_not_cudnn(CUDA, STANDARD) == "cuDNN is not available, or switched off"
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert routing.why_not_cudnn(CUDA, STANDARD) == "cuDNN is not available, or switched off"


def test_what_keeps_pytorchs_operator_from_running():
    assert routing.why_not_operator(CUDA, of(dict(T=65_535)), ()) is None
    assert routing.why_not_operator(CUDA, of(dict(T=65_536)), ()) == "cuDNN fails on more than 65535 steps, got 65536"
    assert routing.why_not_operator(CPU, of(dict(T=65_536, dtype=torch.float32)), ()) is None
    assert routing.why_not_operator(CPU, ANCHOR, ()) == "in torch.bfloat16 it rounds the cell state at every step"
    asked = ("resets", "lengths")
    assert routing.why_not_operator(CUDA, ANCHOR, asked) == "torch.nn.LSTM's operator takes no resets, lengths"
    hidden = "torch.func and forward-mode differentiation do not see through torch.nn.LSTM's operator"
    with torch.autograd.forward_ad.dual_level():
        assert routing.why_not_operator(CUDA, ANCHOR, ()) == hidden
    torch.func.vmap(lambda x: x + (routing.why_not_operator(CUDA, ANCHOR, ()) == hidden))(torch.ones(2)).eq(2).all()


def test_a_sequence_too_long_for_cudnn_goes_to_the_kernels():
    facts = Facts(of(FEW | dict(T=70_000)), H100)
    assert decide(facts).name == "operator"
    facts = facts._replace(no_operator=routing.why_not_operator(CUDA, facts.layer, ()))
    assert decide(facts) == ("persistent", FITS)
    with pytest.raises(RuntimeError, match="strategy 'cudnn' cannot run here: cuDNN fails on more than 65535 steps"):
        decide(facts._replace(strategy="cudnn"))
    assert decide(facts._replace(backend="torch")) == ("eager", "asked for")


@pytest.fixture
def capability(monkeypatch):
    """The tensors pass for those of a CUDA device of that capability, an H100's otherwise."""
    monkeypatch.setattr(routing, "TRITON_INSTALLED", True)
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    monkeypatch.setattr(routing, "gpu_of", lambda device: H100)

    def be(*pair):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pair)

    be(9, 0)
    return be


NEEDS_CUDA = r"it needs a CUDA device, move model and input there \(model.to\('cuda'\)\); CPU tensors only with TRITON_"


@pytest.mark.parametrize("strategy", ["persistent", "stepwise"])
def test_the_kernels_run_where_the_backend_does(strategy, capability, monkeypatch):
    def routed(device=CUDA, dtype=torch.float32):
        return routing.route(of(dict(spec=COUPLED, dtype=dtype)), device, strategy)

    def refused(reason, **options):
        with pytest.raises(RuntimeError, match=f"^strategy '{strategy}' cannot run here: {reason}"):
            routed(**options)

    assert routed() == (strategy, "asked for")
    refused(NEEDS_CUDA, device=CPU)
    refused("the kernels compute in .*, got torch.complex64", dtype=torch.complex64)
    refused("the kernels run on CUDA devices, not on mps", device=torch.device("mps"))
    for name in ("triton", "auto"):
        with lstm_triton.backend(name):
            assert routed() == (strategy, "asked for")
    with lstm_triton.backend("torch"):
        refused("backend 'torch' was asked for")
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "torch")
    refused("backend 'torch' was asked for")
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    capability(7, 5)
    refused(r"cuda:0 has compute capability 7\.5")
    monkeypatch.setattr(routing, "TRITON_INSTALLED", False)
    refused("triton is not installed")


def test_cudnn_and_auto_need_no_kernels(capability, cudnn, monkeypatch):
    capability(7, 5)
    monkeypatch.setattr(routing, "TRITON_INSTALLED", False)
    for spec in (STANDARD, COUPLED):
        assert routing.route(of(dict(spec=spec)), CUDA, "cudnn") == ("operator", "asked for")
    with lstm_triton.backend("torch"):
        assert routing.route(ANCHOR, CUDA, "cudnn") == ("operator", "asked for")
    with pytest.raises(RuntimeError, match=r"^strategy 'cudnn' cannot run here: it has no peepholes, as 'full"):
        routing.route(of(dict(spec=FULL_CURRENT)), CUDA, "cudnn")
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match="backend 'triton' was asked for"):
        routing.route(ANCHOR, CUDA, "cudnn")
    for device in (CPU, CUDA):
        assert routing.route(of(dict(dtype=torch.complex64)), device).name == "operator"


def test_auto_on_a_gpu(capability, cudnn):
    def routed(backend="auto", asked=(), packed=False, **fields):
        with lstm_triton.backend(backend):
            return routing.route(of(fields), CUDA, "auto", asked, packed).name

    for asked in ("resets", "lengths", "return_cell_states"):
        assert routed(asked=(asked,), **FEW) == "persistent"
    assert routed(**FEW) == routed(packed=True, **FEW) == routed("torch") == "operator"
    assert routed(**HALF) == routed(packed=True, **HALF) == "persistent"
    assert routed(T=1) == routed(dtype=torch.float64) == routed(H=5000) == "operator"
    assert routed(P=300) == "persistent"
    assert routed("triton", T=1) == routed(T=1, B=0) == routed(T=1, spec=DIAGONAL) == "stepwise"
    assert routed("torch", spec=DIAGONAL) == "eager" and routed("torch", T=1, spec=DIAGONAL) == "reference"
    # Of 150 units cuDNN has a persistent kernel forward, and none backward.
    small = dict(dtype=torch.float32, H=150)
    assert routed(**small) == "operator" and routed(training=True, **small) == "persistent"


def test_an_empty_batch_has_nothing_to_launch_and_nothing_to_refuse(capability):
    assert routing.route(of(dict(B=0)), CUDA, "persistent").name == "stepwise"
    for engine in ("kernels", "persistent", "stepwise"):
        assert routing.now(engine, of(dict(B=0)), CUDA) == "stepwise"


def test_an_operator_decides_as_the_router_does_when_its_sizes_are_known(capability):
    assert [routing.now(engine, ANCHOR, CUDA) for engine in ("operator inside", "eager")] == [
        "operator inside",
        "eager",
    ]
    assert routing.now("kernels", ANCHOR, CUDA) == routing.now("persistent", of(dict(T=1)), CUDA) == "persistent"
    assert routing.now("kernels", of(dict(T=1)), CUDA) == routing.now("stepwise", ANCHOR, CUDA) == "stepwise"
    with pytest.raises(RuntimeError, match="strategy 'persistent' cannot run here: float64"):
        routing.now("persistent", of(dict(dtype=torch.float64)), CUDA)


# Backends.


def test_auto_is_pytorch_on_the_cpu(monkeypatch):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    assert routing.choose_backend(CPU, torch.float32) == ("torch", "the kernels run on CUDA devices, not on cpu")


@pytest.mark.parametrize(
    "pair, dtype, name, reason",
    [
        ((9, 0), torch.bfloat16, "triton", "the kernels can run here"),
        ((8, 0), torch.float32, "triton", "the kernels can run here"),
        ((7, 5), torch.float16, "torch", r"compute capability 7\.5, the kernels need 8\.0"),
        ((9, 0), torch.complex64, "torch", "the kernels compute in"),
    ],
)
def test_the_backend_on_cuda(pair, dtype, name, reason, capability):
    capability(*pair)
    chosen = routing.choose_backend(CUDA, dtype)
    assert chosen.name == name and re.search(reason, chosen.reason)
    with lstm_triton.backend("torch"):
        assert routing.choose_backend(CUDA, dtype) == Choice("torch", "asked for")
    with lstm_triton.backend("triton"):
        if name == "triton":
            assert routing.choose_backend(CUDA, dtype) == Choice("triton", "asked for")
        else:
            with pytest.raises(RuntimeError, match=reason):
                routing.choose_backend(CUDA, dtype)


def test_triton_where_it_cannot_run_says_why(monkeypatch):
    module, x = lstm_triton.LSTM(3, 4), torch.zeros(2, 1, 3)
    with (
        lstm_triton.backend("triton"),
        pytest.raises(RuntimeError, match="cannot run here: it needs a CUDA device, move"),
    ):
        module(x)
    monkeypatch.setattr(routing, "TRITON_INSTALLED", False)
    with lstm_triton.backend("triton"), pytest.raises(RuntimeError, match="triton is not installed"):
        module(x)
    assert routing.choose_backend(CUDA, torch.float32) == ("torch", "triton is not installed (pip install triton)")


def test_the_innermost_request_wins_and_ends_with_its_block(monkeypatch):
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "torch")
    assert routing.requested() == "torch"
    with lstm_triton.backend("triton"):
        with lstm_triton.backend("auto"):
            assert routing.requested() == "auto"
        assert routing.requested() == "triton"
        with pytest.raises(ZeroDivisionError), lstm_triton.backend("torch"):
            raise ZeroDivisionError
        assert routing.requested() == "triton"
    assert routing.requested() == "torch"


def test_unknown_names_list_what_exists(monkeypatch):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'torch', got 'cuda'"):
        lstm_triton.backend("cuda").__enter__()
    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "gpu")
    with pytest.raises(ValueError, match=r"LSTM_TRITON_BACKEND must be one of .* got 'gpu'"):
        lstm_triton.LSTM(3, 4)(torch.zeros(2, 1, 3))


WITHOUT_TRITON = """
import importlib.abc, sys

class NoTriton(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "triton" else found(name, package)
sys.meta_path.insert(0, NoTriton())
import torch, lstm_triton
layer = lstm_triton.LSTM(3, 4, 2, coupled=True, peephole="full")
x = torch.randn(5, 2, 3, requires_grad=True)
layer(x)[0].sum().backward()
lstm_triton.LSTMCell(3, 4)(x[0])
assert x.grad.abs().sum() > 0 and "triton" not in sys.modules
try:
    with lstm_triton.backend("triton"):
        layer(x)
except RuntimeError as error:
    print(error)
"""


def test_everything_works_without_triton():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout


def test_importing_touches_no_device_and_no_triton():
    program = "import sys, torch, lstm_triton; assert not torch.cuda.is_initialized(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


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
            routing.check_strategy(unknown, STANDARD)
        with pytest.raises(ValueError, match=said):
            functional.lstm(x, None, list(module.parameters()), strategy=unknown)
        with pytest.raises(ValueError, match=said):
            lstm_triton.LSTM(3, 4, strategy=unknown)
    module.strategy = "fast"
    with pytest.raises(ValueError, match=said):
        module(x)
    for known in routing.STRATEGIES:
        routing.check_strategy(known, STANDARD)
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


# Who computes a call, on tensors of the CPU that pass for those of an H100 with cuDNN.


@pytest.fixture
def called(capability, monkeypatch):
    """Who is called, by engine; what would be computed is noted."""
    calls = []

    def note(x, h_0, c_0, weights, *rest):
        results = (x.new_zeros(*x.shape[:2], c_0.shape[2]), h_0, c_0)
        if isinstance(rest[0], aten.Options):
            calls.append("operator")
            return results
        calls.append(rest[1].engine)
        return *results, x.new_empty(0)

    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(routing, "why_not_cudnn", lambda device, spec: "a variant" if spec.peephole else None)
    monkeypatch.setattr(aten, "lstm", note)
    monkeypatch.setattr(autograd, "lstm_layer", note)
    facts = routing.facts_of
    monkeypatch.setattr(routing, "facts_of", lambda layer, device, *rest: facts(layer, CUDA, *rest))

    def run(T=256, B=2, I=3, H=200, L=1, grad=True, dtype=torch.float32, **options):  # noqa: E741
        module = lstm_triton.LSTM(I, H, L, dtype=dtype, **options).requires_grad_(grad)
        calls.clear()
        module(torch.zeros(T, B, I, dtype=dtype))
        assert len(calls) == (1 if calls[0] == "operator" else L) and len(set(calls)) == 1  # it takes a whole stack
        return calls[0]

    return run


def test_each_strategy_reaches_who_computes_it(called):
    assert called() == called(L=3) == "persistent"
    assert called(T=1) == called(dtype=torch.float64) == "operator"
    assert called(T=1, coupled=True) == called(dtype=torch.float64, coupled=True) == "operator"
    assert called(T=1, peephole="full") == called(dtype=torch.float64, peephole="full") == "stepwise"
    for strategy in ("persistent", "stepwise"):
        for options in (dict(), dict(T=1), dict(coupled=True), dict(grad=False), dict(L=2)):
            assert called(strategy=strategy, **options) == strategy
    assert called(strategy="cudnn") == called(strategy="cudnn", L=2) == "operator"
    assert called(strategy="cudnn", coupled=True) == "operator"


def test_auto_leaves_to_cudnn_neither_what_was_asked_of_the_kernels_nor_an_empty_batch(called):
    assert called(T=1) == "operator"
    assert called(T=1, B=0) == "stepwise"
    with lstm_triton.backend("triton"):
        assert called(T=1) == "stepwise"
    with lstm_triton.backend("torch"):
        assert called(T=1) == "operator"  # PyTorch's own
        assert called(T=2, coupled=True) == "operator"
        assert called(T=2, peephole="full") == "eager"


def test_auto_asks_for_the_passes_that_will_run(called):
    """Of 150 units cuDNN has a persistent kernel forward, and none backward."""
    assert called(H=150, grad=True) == "persistent"
    assert called(H=150, grad=False) == "operator"
    with torch.no_grad():
        assert called(H=150, grad=True) == "operator"


def test_auto_knows_that_pytorch_asks_for_no_persistent_kernel_of_a_stack(called):
    sizes = dict(T=64, B=8, I=256, H=256, dtype=torch.float16, grad=False)
    assert called(**sizes) == "operator" and called(**sizes, L=2) == "persistent"


# The module.


def test_repr_shows_what_is_not_the_default():
    assert repr(lstm_triton.LSTM(3, 4)) == "LSTM(3, 4, lstm_triton)"
    assert repr(lstm_triton.LSTM(3, 4, strategy="stepwise")) == "LSTM(3, 4, strategy='stepwise', lstm_triton)"
    module = CoupledLSTM(3, 4, 2, strategy="persistent", recompute=True)
    text = "CoupledLSTM(3, 4, num_layers=2, coupled=True, strategy='persistent', recompute=True, lstm_triton)"
    assert repr(module) == text
    module.strategy, module.recompute = "auto", False
    assert repr(module) == "CoupledLSTM(3, 4, num_layers=2, coupled=True, lstm_triton)"


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
    assert repr(again) == "LSTM(3, 4, coupled=True, lstm_triton)"
    torch.testing.assert_close(again(x)[0], expected, rtol=0, atol=0)
    again(x)[0].sum().backward()


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

    monkeypatch.setattr(routing, "FROM_ENVIRONMENT", "auto")
    monkeypatch.setattr(routing, "why_not_triton", lambda device, dtype: None)
    monkeypatch.setattr(routing, "why_not_cudnn", untraceable)
    monkeypatch.setattr(routing, "gpu_of", lambda device: H100)
    facts = routing.facts_of
    monkeypatch.setattr(routing, "facts_of", lambda layer, device, *rest: facts(layer, CUDA, *rest))
    module = lstm_triton.LSTM(3, 8 if faster else 200)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=reached)
    with pytest.raises(Exception, match=", operator inside, " if faster else ", kernels, ") as error:
        compiled(torch.zeros(5, 4, 3))
    assert "Reached" in str(error.value)
    # Of packed rows PyTorch's operator would read the batch sizes while it is traced: the kernels compute them.
    with pytest.raises(Exception, match=", kernels, ") as error:
        compiled(pack_padded_sequence(torch.zeros(5, 4, 3), torch.tensor([5, 3, 3, 2])))
    assert "Reached" in str(error.value)


def test_whether_cudnn_is_on_is_asked_once_by_a_compiled_function():
    compiled = torch.compile(lambda x: x + routing.cudnn_is_on(), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(2)).tolist() == [float(routing.cudnn_is_on())] * 2


def test_pytorchs_operator_runs_without_autocast(monkeypatch):
    """Autocast casts its arguments to float16 on a GPU, also where bfloat16 is asked for; they are cast before."""
    seen = []

    def lstm(x, *rest):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return operator(x, *rest)

    operator = aten.lstm
    monkeypatch.setattr(aten, "lstm", lstm)
    monkeypatch.setattr(routing, "CPU_DTYPES", (torch.bfloat16,))
    module = lstm_triton.LSTM(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(torch.zeros(5, 4, 3))
        assert torch.is_autocast_enabled("cpu")
    assert output.dtype == torch.bfloat16 and seen == [(torch.bfloat16, False)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_gpu_computes_a_step_of_the_standard_cell_by_pytorchs_own(dtype, capability):
    layer = Layer(STANDARD, 1, 1, 4, 1, dtype)

    def routed(plain=True, **fields):
        return routing.cell(layer._replace(**fields), CUDA, plain).name

    assert routed() == "operator"
    assert routed(plain=False) == routed(spec=COUPLED) == "stepwise"
    with lstm_triton.backend("triton"):
        assert routed() == "stepwise"
    with lstm_triton.backend("torch"):
        assert routed() == "operator" and routed(plain=False) == routed(spec=COUPLED) == "reference"
    with forward_ad.dual_level():
        assert routed() == "reference"
    assert routed(dtype=torch.complex64) == "reference"


def test_a_cell_is_plain_unless_something_else_looks_at_its_tensors(monkeypatch):
    found = []
    cell = routing.cell
    monkeypatch.setattr(routing, "cell", lambda layer, device, plain: found.append(plain) or cell(layer, device, plain))
    module, x = lstm_triton.LSTMCell(3, 4), torch.zeros(2, 3)
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh]
    functional.lstm_cell(x, None, *weights)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
    with pytest.raises(ValueError, match="given: "):
        functional.lstm_cell(x, None, *weights[:3])
    assert found == [True, False, False]


def test_a_traced_graph_leaves_the_choice_of_kernels_to_its_run():
    assert decide(Facts(ANCHOR, None)) == ("kernels", "chosen when the graph runs")


@pytest.mark.parametrize("faster, engine", [(True, "operator inside"), (False, "kernels")])
def test_a_compiled_graph_holds_cudnn_where_that_is_faster_by_estimate(monkeypatch, faster, engine):
    asked = []
    monkeypatch.setattr(routing, "cudnn_when_compiled", lambda *sizes: asked.append(sizes) or faster)
    facts = Facts(ANCHOR, None)
    assert routing.when_compiled(decide(facts), facts, CUDA, packed=False).name == engine
    assert asked == [(CUDA, torch.bfloat16, "standard", 1, 768, 0, False)]
    assert routing.when_compiled(decide(facts), facts, CUDA, packed=True).name == "kernels"


def test_a_compiled_graph_cannot_hold_cudnn_with_packed_rows():
    facts = Facts(ANCHOR, None, "cudnn")
    with pytest.raises(RuntimeError, match="strategy 'cudnn' cannot run here: not with packed rows"):
        routing.when_compiled(decide(facts), facts, CUDA, packed=True)
    facts = Facts(ANCHOR, None, no_kernels="an obstacle")
    assert routing.when_compiled(decide(facts), facts, CUDA, packed=True).name == "eager"


def test_cudnn_is_not_asked_for_where_it_cannot_compute():
    assert not routing.cudnn_when_compiled(CPU, torch.float32, "standard", 1, 64, 0, False)


def test_a_packed_sequence_has_no_onnx_node():
    with pytest.raises(RuntimeError, match="a PackedSequence cannot be exported to ONNX"):
        routing.for_onnx(ANCHOR, (), packed=True)
