"""On a GPU: the persistent kernels are right by both waits, in graphs and beside other work, and never time out.

Products on tensor cores are those of the kernels in Gluon, whose programs wait by the data; float32 "ieee" those of the
kernels in plain Triton, which have both waits.
"""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch

from lstm_triton import routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from dataclasses import replace

from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.gpus import GPUS, gpu_of
from lstm_triton_kernels.plan import Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import next_power_of_2

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, functional
from tests.support import persistent as layers
from tests.support.gpu import (
    NEEDS_GPU,
    TYPES,
    Pass,
    assert_as_near_as_cudnn,
    assert_same,
    bounds,
    finish,
    layer_of,
)
from tests.support.parity import Case, call, errors

pytestmark = NEEDS_GPU

STANDARD = LSTMSpec()
SERVED_TYPES = {name: TYPES[name] for name in ("bfloat16", "float32 tf32", "float16", "float32 ieee")}
EXACT = "float32 ieee"
WAITS = {name: ("counter", "data") if name == EXACT else ("data",) for name in SERVED_TYPES}

MOST_UNITS_OF_ONE = {name: 128 if name == EXACT else 16 for name in SERVED_TYPES}
"""Units that one program can hold; the kernels in Gluon then exchange values with themselves."""

WAYS = [("bfloat16", "data"), (EXACT, "data"), (EXACT, "counter")]
"""Types and waits; of those on tensor cores one is enough where values do not matter."""
WITH_ALONE = [*WAYS, ("bfloat16", None), (EXACT, None)]
"""Also without a wait: one program holds all units."""

each_way = pytest.mark.parametrize("precision, wait", WAYS, indirect=["precision"])
each_way_and_alone = pytest.mark.parametrize("precision, wait", WITH_ALONE, indirect=["precision"])

TOGETHER = {
    "odd": dict(T=33, B=12, I=300, H=500),
    "anchor": dict(T=64, B=16, I=768, H=768),
    "many rows": dict(T=9, B=200, I=64, H=130),
    "several row blocks": dict(T=9, B=500, I=64, H=130),
    "rows shared by warps": dict(T=5, B=2000, I=40, H=192),
    "many units": dict(T=5, B=12, I=40, H=900),
    "weights beyond the chip": dict(T=5, B=12, I=40, H=2600),
    "many rows and units": dict(T=9, B=64, I=40, H=512),
    "both directions": dict(T=17, B=5, I=33, H=130, L=2, bidirectional=True),
    "one row": dict(T=17, B=1, I=33, H=130),
    "one step": dict(T=1, B=12, I=33, H=130),
    "two steps": dict(T=2, B=12, I=33, H=130),
    "projected": dict(T=17, B=12, I=33, H=260, proj_size=100),
    "projected, both directions": dict(T=9, B=33, I=33, H=130, proj_size=50, bidirectional=True),
}
"""Shapes whose programs wait for each other."""

ALONE = {
    "alone": dict(T=33, B=12, I=40, H=64),
    "alone, many rows": dict(T=9, B=200, I=40, H=64, bidirectional=True),
    "few units": dict(T=9, B=12, I=40, H=12),
    "few units, many rows": dict(T=9, B=5000, I=40, H=12, bidirectional=True),
    "one unit": dict(T=9, B=50, I=5, H=1),
}
"""Shapes of which one program holds all units: of the kernels in Gluon, no more than 16."""


def waits(precision: str, shape: str) -> tuple[str | None, ...]:
    """How programs wait, None where one holds all units."""
    alone = shape in ALONE and ALONE[shape]["H"] <= MOST_UNITS_OF_ONE[precision]
    return (None,) if alone else WAITS[precision]


def preference(precision: str, wait: str | None, H: int, several_row_blocks: bool = False) -> Preference:
    """Plans that wait so; without a wait, plans of programs that hold all units: others have fewer of them."""
    if wait is None:
        return Preference(block_u=max(16, next_power_of_2(H)))
    block_u = 8 if precision == EXACT else 16  # on tensor cores 8 are too few backward
    return Preference(wait, block_u, block_b=16) if several_row_blocks else Preference(wait)


def cases():
    """(precision, case, preference): every served variant and type, every shape, each wait that both have.

    Without what an H100 has no plan for (test_cases.py says what that is).
    """
    for precision, dtype in SERVED_TYPES.items():
        for shape, sizes in {**TOGETHER, **ALONE}.items():
            for spec in VARIANTS:
                case = Case(spec, dtype=dtype, device="cuda", strategy="persistent", **sizes)
                for wait in waits(precision, shape):
                    wanted = preference(precision, wait, case.H, shape == "several row blocks")
                    if no_plan(case, precision, wanted):
                        continue
                    name = f"{shape}-{spec.name}-{precision}-{wait or 'none'}"
                    yield pytest.param(precision, case, wanted, id=name)


def no_plan(case: Case, precision: str, wanted: Preference) -> bool:
    """Whether a pass has none on an H100."""
    return any(isinstance(plan, str) for plan in plans(case, precision, wanted, GPUS["h100"]))


def plans(case: Case, precision: str, wanted: Preference, gpu):
    """The ranked plans of both passes, or a sentence where there is none."""
    return [ranked_plans(layer_of(case, precision), backward, gpu, wanted) for backward in (False, True)]


@contextmanager
def planned(case: Case, precision: str, wanted: Preference):
    """Inside, plans are as wanted; skips where this GPU has none."""
    for found in plans(case, precision, wanted, gpu_of(torch.device(case.device))):
        if isinstance(found, str):
            pytest.skip(f"{torch.cuda.get_device_name()}: {found}")
        assert all((plan.unit_programs == 1) == (wanted.wait is None) for plan in found)
        assert all(plan.exact == (precision == EXACT) for plan in found)
        assert wanted.block_b is None or all(plan.blocks_per_program > 1 for plan in found)
    with sequence_persistent.prefer(wanted):
        yield


@pytest.fixture(autouse=True)
def nothing_times_out():
    """After each test, no launch has timed out."""
    yield
    if torch.cuda.is_available():
        for n in range(torch.cuda.device_count()):
            finish(f"cuda:{n}")


ODD = Case(STANDARD, dtype=torch.bfloat16, device="cuda", strategy="persistent", **TOGETHER["odd"])
PAIR = (replace(ODD, T=200, H=1030), replace(ODD, T=150, H=1000, spec=LSTMSpec(coupled=True)))
"""Each takes nearly all of an H100: there is no room for a program of the other beside one of its own."""
FEW_UNITS = {precision: 64 if precision == EXACT else 12 for precision in SERVED_TYPES}
"""Of which one program holds all."""


def of_way(case: Case, precision: str, wait: str | None) -> tuple[Case, Preference]:
    """The case in that type, with few units where one program holds all; and what is wanted of its plans."""
    case = replace(case, dtype=TYPES[precision], H=FEW_UNITS[precision] if wait is None else case.H)
    return case, preference(precision, wait, case.H)


@each_way
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_the_same_bits_from_run_to_run(spec, precision, wait):
    case, wanted = of_way(replace(ODD, spec=spec), precision, wait)
    with planned(case, precision, wanted):
        compute = Pass(case, call)
        first = compute()
        for _ in range(5):
            assert_same(compute(), first)


@each_way_and_alone
def test_a_captured_graph_replays_to_what_was_computed_without(precision, wait):
    """Forward and backward in one graph, for inputs that it was not captured with."""
    case, wanted_plan = of_way(ODD, precision, wait)
    with planned(case, precision, wanted_plan):
        compute, others = Pass(case, call), [Pass(case, call, seed) for seed in (1, 2, 3)]
        expected = [other() for other in others]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = compute()
        for other, wanted in zip(others, expected, strict=True):
            for name, tensor in compute.inputs.items():
                tensor.data.copy_(other.inputs[name])
            for gradient, value in zip(compute.gradients, other.gradients, strict=True):
                gradient.copy_(value)
            for _ in range(3):
                graph.replay()
            torch.cuda.synchronize()
            assert max(errors(captured, wanted).values()) < 4e-3  # the GEMMs around may take another algorithm


@each_way
def test_a_graphed_module_trains_as_the_module_does(precision, wait):
    dtype = TYPES[precision]
    module = lstm_triton.LSTM(40, 130, device="cuda", dtype=dtype, strategy="persistent")
    x = torch.randn(9, 12, 40, device="cuda", dtype=dtype)
    with sequence_persistent.prefer(Preference(wait)):
        plain = torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters()))
        graphed = torch.cuda.make_graphed_callables(module, (x.clone(),))
        actual = torch.autograd.grad(graphed(x)[0].square().sum(), list(module.parameters()))
    for one, other in zip(actual, plain, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert (one - other).norm() < 4e-3 * other.norm()


@pytest.mark.parametrize(
    "ways",
    list(itertools.combinations_with_replacement(WAYS, 2)),
    ids=lambda ways: "-".join(f"{precision} {wait}" for precision, wait in ways),
)
def test_two_modules_on_two_streams_at_once(ways):
    """Neither launch may hold what the other needs to begin."""
    both = [of_way(case, *way) for case, way in zip(PAIR, ways, strict=True)]
    passes = [Pass(case, call, seed) for seed, (case, _) in enumerate(both)]
    expected = []
    for compute, (precision, _), (_, wanted) in zip(passes, ways, both, strict=True):
        with planned(compute.case, precision, wanted):
            expected.append(compute())
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in passes], [[], []]
    for _ in range(10):
        for compute, (_, wanted), stream, results in zip(passes, both, streams, found, strict=True):
            with torch.cuda.stream(stream), sequence_persistent.prefer(wanted):
                results.append(compute())
    torch.cuda.synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            assert max(errors(result, right).values()) < 4e-3


@pytest.mark.parametrize("busy", ["a sleeping kernel", "products"])
@each_way
def test_while_another_kernel_runs(precision, wait, busy):
    case, wanted = of_way(ODD, precision, wait)
    with planned(case, precision, wanted):
        compute = Pass(case, call)
        expected = compute()
        a = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(a)
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        found = []
        for _ in range(5):
            with torch.cuda.stream(other):
                if busy == "products":
                    for _ in range(40):
                        torch.mm(a, a, out=out)
                else:
                    torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
            found.append(compute())
        torch.cuda.synchronize()
    for result in found:
        assert max(errors(result, expected).values()) < 4e-3


@pytest.mark.parametrize(
    "precision, wait",
    [(name, wait) for name, of_type in WAITS.items() for wait in (*of_type, None)],
    indirect=["precision"],
)
def test_nan_and_infinity_flow_through_and_stall_nobody(precision, wait):
    """As through `torch.nn.LSTM` in float64; among them the NaN of all ones, which the kernels wait by."""
    dtype = TYPES[precision]
    T, B, H = 9, 12, 130 if wait is not None else FEW_UNITS[precision]
    expected = torch.nn.LSTM(30, H, dtype=torch.float64)
    module = lstm_triton.LSTM(30, H, device="cuda", dtype=dtype, strategy="persistent")
    module.load_state_dict(expected.state_dict())
    expected.load_state_dict(module.state_dict())
    x, h_0, c_0 = torch.randn(T, B, 30), torch.randn(1, B, H), torch.randn(1, B, H)
    x[3, 1, 0], x[5, 2, 1], x[5, 3, 1] = float("nan"), float("inf"), float("-inf")
    x, h_0 = x.to(dtype), h_0.to(dtype)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    x.view(bits)[4, 4, 2] = -1
    h_0.view(bits)[0, 5, 7] = -1
    c_0 = c_0.to(dtype)
    on_gpu = x.cuda().requires_grad_()
    with sequence_persistent.prefer(preference(precision, wait, H)):
        output = module(on_gpu, (h_0.cuda(), c_0.cuda()))[0]
        output.sum().backward()
    finish()
    wanted = expected(x.double(), (h_0.double(), c_0.double()))[0]
    tolerance = {torch.float32: 1e-2, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(output.cpu().double(), wanted, equal_nan=True, rtol=tolerance, atol=tolerance)
    assert output[3:, 1].isnan().all() and output[4:, 4].isnan().all() and output[:, 5].isnan().all()
    assert output[:, 6:].isfinite().all() and on_gpu.grad[:, 6:].isfinite().all()
    assert on_gpu.grad[:, [1, 4, 5]].isnan().any(2).any(0).all()


@each_way_and_alone
def test_every_device_computes_the_same(precision, wait):
    """Whichever device is the current one."""
    case, wanted = of_way(ODD, precision, wait)
    expected = None
    for n in range(torch.cuda.device_count()):
        on_this = replace(case, device=f"cuda:{n}")
        with planned(on_this, precision, wanted):
            found = Pass(on_this, call)()
        finish(f"cuda:{n}")
        assert all(tensor.device.index == n for tensor in found.values())
        expected = expected or found
        on_first = {name: tensor.to("cuda:0") for name, tensor in found.items()}
        assert max(errors(on_first, expected).values()) < 4e-3


@each_way
def test_a_launch_that_times_out_ends_and_is_named(precision, wait, monkeypatch):
    """A test of the test: with no max_polls at all, some program looks before the others have stored."""
    case, wanted = of_way(ODD, precision, wait)
    with planned(case, precision, wanted), monkeypatch.context() as patch:
        patch.setattr(sequence_persistent, "POLLS", 0)
        with torch.no_grad():
            call(case, *Pass(case, call).inputs.values())
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=r"timed out.*the forward pass of 500 units, 33 steps of 12 rows"):
            lstm_triton.check_launches()
    compute = Pass(case, call)
    assert all(tensor.isfinite().all() for tensor in compute().values())


# Every variant and type


@pytest.mark.parametrize("precision, wait", [*WAYS, ("float32 tf32", "data")], indirect=["precision"])
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_rows_of_their_own_length_and_resets(spec, precision, wait):
    """With every c_t; the bound is the largest that `bounds` has for the same sizes, whichever result it is of."""
    T, B, H, D = 17, 12, 130, 2
    case = layers.LayerCase(
        spec, layers.plan_of(B, H, D, wait=None), T, B, H, 33, lengths=True, resets=True, dtype=TYPES[precision]
    )
    inputs = layers.inputs_of(case)
    wanted = layers.expected(case, inputs)
    with sequence_persistent.prefer(Preference(wait)):
        found = [result.cpu() for result in layers.both_passes(case, on_gpu(inputs))]
    same = Case(
        spec, T=T, B=B, I=33, H=H, bidirectional=True, dtype=TYPES[precision], device="cuda",
        lengths=True, resets=True, states=True,
    )  # fmt: skip
    allowed = max(bounds(same).values())
    wrong = {name: error for name, error in layers.errors(case, found, wanted).items() if not error <= allowed}
    assert not wrong, f"{case}: beyond {allowed:.1e}: {wrong}"


def on_gpu(inputs):
    """The tensors of a layer, moved to the GPU."""
    return replace(inputs.map(lambda tensor: tensor.cuda()), lengths=inputs.lengths.cuda(), resets=inputs.resets.cuda())


def call_recomputing(case, x, h_0, c_0, *weights):
    """As `call`, the gates computed again for the backward pass."""
    output, (h_n, c_n) = functional.lstm(
        x, (h_0, c_0), weights, num_layers=case.L, bias=case.bias, bidirectional=case.bidirectional,
        strategy=case.strategy, recompute=True, **case.variant,
    )  # fmt: skip
    return output, h_n, c_n


@pytest.mark.parametrize("precision", SERVED_TYPES, indirect=True)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_with_gates_that_are_computed_again(spec, precision):
    case = Case(
        spec, T=17, B=12, I=33, H=130, bidirectional=True, dtype=TYPES[precision], device="cuda", strategy="persistent"
    )
    assert_as_near_as_cudnn(case, call_recomputing)


@pytest.mark.parametrize("precision, case, wanted", list(cases()), indirect=["precision"])
def test_as_near_to_the_reference_as_cudnn(precision, case, wanted):
    with planned(case, precision, wanted):
        assert_as_near_as_cudnn(case, call)
