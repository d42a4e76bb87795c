"""The plain persistent kernels against the float64 reference: outputs, states, every cell state and every gradient.

One program that holds all units runs in the plain interpreter; programs that wait for each other all run at once, held
up at random, with stores that others see late. The interpreter does not run the kernels in Gluon: tests/compiled does.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from lstm_triton_kernels import persistent_backward, persistent_forward, sequence_persistent
from lstm_triton_kernels.rows import at_time
from lstm_triton_kernels.sync import arrive, publish, wait_for_count
from lstm_triton_kernels.watch import check_launches

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec
from tests.support.concurrent import ProgramFailed
from tests.support.persistent import (
    LayerCase,
    assert_right,
    computed,
    concurrently,
    errors,
    expected,
    inputs_of,
    plan_of,
)

STANDARD = LSTMSpec()
ALONE = [
    LayerCase(spec, plan_of(B, H, D, wait=None), T, B, H, **options)
    for spec in VARIANTS
    for T, B, H, D, options in (
        (4, 19, 11, 2, dict(lengths=True, resets=True)),
        (1, 3, 17, 1, dict(bias=False)),
        (5, 2, 1, 2, dict(recompute=True, lengths=True, resets=True, gradients=(True, False, False, True))),
    )
]


PROJECTED = [
    LSTMSpec(),
    LSTMSpec(True, "diagonal", "current"),
    LSTMSpec(False, "full"),
    LSTMSpec(True, "full", "current"),
]
ALONE += [
    LayerCase(spec, plan_of(B, H, D, wait=None), T, B, H, P=P, **options)
    for spec in PROJECTED
    for T, B, H, P, D, options in (
        (4, 19, 11, 5, 2, dict(lengths=True, resets=True)),
        (1, 3, 17, 16, 1, dict(bias=False)),
        (3, 2, 3, 1, 1, dict(recompute=True, resets=True, gradients=(True, False, False, True))),
    )
]


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_one_program_with_all_units(case):
    assert_right(case)


WAITING = [
    LayerCase(spec, plan_of(B, H, D, wait=wait, **cut), T, B, H, **options)
    for spec in VARIANTS
    for wait in ("counter", "data")
    for T, B, H, D, cut, options in (
        # three parts of the units, two row blocks in one program, columns shared among warps
        (3, 9, 19, 1, dict(rows=5, row_programs=1, parts=8), dict(lengths=True, resets=True)),
        # both directions, two parts, two programs of rows, several chunks
        (4, 20, 13, 2, dict(row_programs=2, block_u=8), dict(bias=False)),
    )
]


WAITING += [
    LayerCase(spec, plan_of(B, H, D, wait=wait, **cut), T, B, H, P=P, **options)
    for spec in PROJECTED
    for wait in ("counter", "data")
    for T, B, H, P, D, cut, options in (
        (3, 9, 19, 7, 1, dict(rows=5, row_programs=1, parts=8), dict(lengths=True, resets=True)),
        (3, 20, 13, 10, 2, dict(row_programs=2, block_u=8), dict(bias=False)),
    )
]


@pytest.mark.parametrize("case", WAITING, ids=str)
def test_programs_that_wait_for_each_other(case):
    assert_right(case, concurrently(delay=1e-4))


MANY = [
    LayerCase(STANDARD, plan_of(5, 61, wait="counter", rows=3, row_programs=1), 4, 5, 61),  # eight parts
    LayerCase(STANDARD, plan_of(2, 61, wait="data", parts=2, group=1), 4, 2, 61, lengths=True),
    LayerCase(LSTMSpec(peephole="full"), plan_of(2, 40, wait="data", group=1), 4, 2, 40, resets=True),
    LayerCase(LSTMSpec(True, "full"), plan_of(3, 40, wait="counter", parts=4), 4, 3, 40, recompute=True),
    LayerCase(STANDARD, plan_of(1, 9, wait="data"), 1, 1, 9),
    LayerCase(STANDARD, plan_of(40, 9, wait="data", rows=7, row_programs=2), 3, 40, 9, lengths=True),
]  # fmt: skip


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("case", MANY, ids=str)
def test_more_programs_chunks_and_row_blocks_under_delays(case, seed):
    assert_right(case, concurrently(delay=2e-3, seed=seed))


@pytest.mark.parametrize("wait", ["counter", "data", None])
@pytest.mark.parametrize("peephole", ["diagonal", "full"])
def test_float32(wait, peephole):
    plan = plan_of(3, 21, wait=wait)
    case = LayerCase(LSTMSpec(peephole=peephole), plan, 5, 3, 21, dtype=torch.float32, recompute=peephole == "full")
    assert_right(case, concurrently(delay=0.0) if wait else None)


@pytest.mark.parametrize("wait", ["counter", "data"])
@pytest.mark.parametrize("gradient", range(4))
def test_the_gradient_of_one_result_alone(wait, gradient):
    gradients = tuple(n == gradient for n in range(4))
    spec = LSTMSpec(coupled=True, peephole="diagonal", output_peephole="current")
    case = LayerCase(spec, plan_of(3, 12, wait=wait), 3, 3, 12, gradients=gradients, lengths=True)
    assert_right(case, concurrently(delay=0.0))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("H", [16, 19])
def test_results_are_contiguous_as_their_fakes_are(H, D):
    """Of 19 units the kernels write rows of 32."""
    case = LayerCase(STANDARD, plan_of(3, H, D, wait="counter"), 3, 3, H)
    with concurrently(delay=0.0):
        found = computed(case, inputs_of(case))
    assert all(tensor.is_contiguous() for tensor in found[:4])


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_any_shape(data):
    """One program with all units, whatever T, B, H and the variant are."""
    T, B, H = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40)), data.draw(st.integers(1, 33))
    D, flags = data.draw(st.integers(1, 2)), {name: data.draw(st.booleans()) for name in ("lengths", "resets", "bias")}
    plan = plan_of(B, H, D, wait=None, rows=data.draw(st.integers(1, 16)))
    assert_right(
        LayerCase(data.draw(st.sampled_from(VARIANTS)), plan, T, B, H, seed=data.draw(st.integers(0, 9)), **flags)
    )


@pytest.mark.parametrize("wait", ["counter", "data"])
def test_the_same_bits_from_run_to_run(wait):
    case = LayerCase(STANDARD, plan_of(4, 19, wait=wait, parts=2), 4, 4, 19, dtype=torch.float32, lengths=True)
    first, second = (computed(case, inputs_of(case), concurrently(seed=seed)) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("wait", ["counter", "data", None])
def test_nan_and_infinity_flow_through_and_stall_nobody(wait):
    """The all-ones NaN that means "not yet" among them, in the initial states, too."""
    case = LayerCase(STANDARD, plan_of(5, 11, wait=wait), 4, 5, 11, dtype=torch.float32)
    inputs = inputs_of(case)
    inputs.x[1, 0, 0], inputs.x[2, 1, 0], inputs.x[1, 2, 0] = float("nan"), float("inf"), float("-inf")
    inputs.h_0[0, 3, 2] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    actual = computed(case, inputs, concurrently(delay=0.0) if wait else None)
    wanted = expected(case, inputs)
    torch.testing.assert_close(actual[0].double(), wanted[0], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert actual[0][1:, 0].isnan().all() and actual[0][0, 0].isfinite().all() and actual[0][:, 4].isfinite().all()
    check_launches()


@pytest.mark.parametrize("wait", ["counter", "data"])
def test_a_launch_that_waits_in_vain_is_named_at_the_next_call(wait, monkeypatch):
    """One of three programs does nothing: the others time out, all of the launch ends, the host is told."""
    monkeypatch.setattr(sequence_persistent, "POLLS", 200)
    case = LayerCase(STANDARD, plan_of(2, 19, wait=wait), 30, 2, 19, dtype=torch.float32)
    inputs = inputs_of(case)
    monkeypatch.setattr(persistent_forward, "exchange_store", store_of_all_but_one)
    monkeypatch.setattr(persistent_forward, "exchange_arrive", arrival_of_all_but_one)
    monkeypatch.setattr(persistent_backward, "exchange_load", none_published)
    computed(case, inputs, concurrently(delay=0.0, deadline=60))
    with pytest.raises(RuntimeError, match=r"timed out.*the forward pass of 19 units, 30 steps of 2 rows, 3 programs"):
        lstm_triton.LSTM(2, 3, coupled=True)(torch.randn(2, 1, 2))
    check_launches()  # told once


def layer_and_input(dtype, training):
    layer = lstm_triton.LSTM(5, 12, bidirectional=True, peephole="diagonal", dtype=dtype).requires_grad_(training)
    return layer, torch.randn(3, 4, 5, dtype=dtype)


def outputs(layer, x, strategies):
    """By strategy, all by the kernels; and of strategy `auto` by whatever backend is taken."""
    results = {}
    with lstm_triton.backend("triton"):
        for strategy in strategies:
            layer.strategy = strategy
            results[strategy] = layer(x)[0]
    layer.strategy = "auto"
    return results | {"any backend": layer(x)[0]}


@pytest.mark.parametrize("training", [True, False])
def test_the_public_function_takes_the_persistent_kernels(training):
    """By `auto`, where a plan for the interpreter exists; the same as when asked for, bit for bit."""
    results = outputs(*layer_and_input(torch.float32, training), ("auto", "persistent", "stepwise"))
    assert torch.equal(results["auto"], results["persistent"])
    for other in ("stepwise", "any backend"):
        torch.testing.assert_close(results["persistent"], results[other], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_types_of_the_kernels_in_gluon_are_computed_step_by_step(dtype, training):
    """The interpreter does not run the kernels in Gluon: by `auto` bit for bit the stepwise ones, else an error."""
    layer, x = layer_and_input(dtype, training)
    results = outputs(layer, x, ("auto", "stepwise"))
    assert torch.equal(results["auto"], results["stepwise"])
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(results["stepwise"], results["any backend"], rtol=tolerance, atol=tolerance)
    layer.strategy = "persistent"
    with (
        lstm_triton.backend("triton"),
        pytest.raises(RuntimeError, match="interpreter does not run the kernels in Gluon"),
    ):
        layer(x)


# Tests of the tests: each planted fault makes the checks above fail.


@triton.jit
def store_of_all_but_one(ptr, value, mask, WAIT: tl.constexpr):
    if tl.program_id(0) != 1:
        if WAIT == "data":
            publish(ptr, value, mask)
        else:
            tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def arrival_of_all_but_one(counter_ptr, WAIT: tl.constexpr):
    if WAIT == "counter" and tl.program_id(0) != 1:
        arrive(counter_ptr)


@triton.jit
def none_published(pointers, masks, max_polls, error_ptr, WAIT: tl.constexpr):
    blocks = ()
    for n in tl.static_range(len(pointers)):
        blocks = blocks + (tl.load(pointers[n], mask=masks[n], other=0.0),)  # noqa: RUF005
    return blocks, max_polls


@triton.jit
def no_wait(counter_ptr, target, max_polls, error_ptr, WAIT: tl.constexpr):
    return max_polls


@triton.jit
def an_epoch_behind(counter_ptr, target, max_polls, error_ptr, WAIT: tl.constexpr):
    return wait_for_count(counter_ptr, target - tl.num_programs(0), max_polls, error_ptr)


@triton.jit
def arrival_before_the_stores_are_seen(counter_ptr, WAIT: tl.constexpr):
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def half_a_result_first(ptr, value, mask, WAIT: tl.constexpr):
    publish(ptr, value * 0.5, mask)
    tl.debug_barrier()
    publish(ptr, value, mask)


FAULTS = {
    "missing wait": ("counter", "exchange_wait", no_wait),
    "wrong epoch": ("counter", "exchange_wait", an_epoch_behind),
    "early arrival": ("counter", "exchange_arrive", arrival_before_the_stores_are_seen),
    "missing data wait": ("data", "exchange_load", none_published),
    "early publish": ("data", "exchange_store", half_a_result_first),
}
DELAYS = (4e-3,) * 4 + (16e-3,) * 3 + (64e-3,) * 3
"""Of a few runs, seconds: on a busy machine a step takes long, and only longer pauses put programs out of step."""


def is_seen(wait: str, delays: Sequence[float] = DELAYS) -> bool:
    """Whether one of a few runs comes out wrong."""
    case = LayerCase(STANDARD, plan_of(3, 19, wait=wait), 6, 3, 19)
    inputs = inputs_of(case)
    wanted = expected(case, inputs)
    for seed, delay in enumerate(delays):
        found = errors(case, computed(case, inputs, concurrently(delay=delay, seed=seed)), wanted)
        if max(found.values()) > 1e-9:
            return True
    return False


@pytest.mark.parametrize("module", [persistent_forward, persistent_backward], ids=["forward", "backward"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault, module, monkeypatch):
    wait, name, faulty = FAULTS[fault]
    monkeypatch.setattr(module, name, faulty)
    assert is_seen(wait)


@pytest.mark.parametrize("wait", ["counter", "data"])
def test_without_a_fault_nothing_is_seen(wait):
    assert not is_seen(wait, DELAYS[1:6:2])


def test_a_program_that_breaks_is_named():
    """A group that does not divide the chunks reads beyond the tiles."""
    case = LayerCase(STANDARD, plan_of(2, 40, wait="data", group=2), 2, 2, 40)
    with pytest.raises(ProgramFailed, match="persistent_forward_kernel failed"):
        computed(case, inputs_of(case), concurrently(delay=0.0))


@triton.jit
def offsets_kernel(out_ptr, base_ptr, t, size, HAS_LENGTHS: tl.constexpr):
    """out: bytes from base to index t of a buffer of float32 with `size` elements a step."""
    if HAS_LENGTHS:
        t = t + tl.arange(0, 2)
    place = at_time(base_ptr, t, size, HAS_LENGTHS)
    tl.store(out_ptr + tl.arange(0, 2), tl.ravel(place.to(tl.int64) - base_ptr.to(tl.int64)) if HAS_LENGTHS else
             tl.full((2,), 0, tl.int64) + (place.to(tl.int64) - base_ptr.to(tl.int64)))  # fmt: skip


@pytest.mark.parametrize("lengths", [False, True])
def test_time_offsets_pass_two_to_the_31(lengths):
    out = torch.zeros(2, dtype=torch.int64)
    offsets_kernel[(1,)](out, torch.zeros(1), 100_000, 16 * 3072, HAS_LENGTHS=lengths)
    assert out.tolist() == [4 * 100_000 * 16 * 3072, 4 * (100_000 + lengths) * 16 * 3072]
