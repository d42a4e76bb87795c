"""Waiting for other programs, all programs running at once: right values, no stall, planted faults seen."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from lstm_triton_kernels import sync
from lstm_triton_kernels.sync import (
    exchange_arrive,
    exchange_load,
    exchange_store,
    exchange_wait,
    load_when_published,
    publish,
    raise_if_timed_out,
    unpublish,
)  # fmt: skip

from tests.support.concurrent import ProgramFailed, ProgramsDidNotEnd, concurrent_programs, run_concurrently

MODULUS = 61
"""Exchanged values are integers below it: exact in every type."""

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


@triton.jit(do_not_specialize=["T", "limit", "absent"])
def recurrence_kernel(
    h_ptr, patience_ptr, counters_ptr, error_ptr, T, limit, absent,
    PROGRAMS: tl.constexpr, BLOCK: tl.constexpr, MODULUS: tl.constexpr, WAIT: tl.constexpr, FAULT: tl.constexpr,
):  # fmt: skip
    """h[t + 1] = (sum of the group's h[t] times (unit + 1) + t) mod MODULUS for h (T + 1, groups, PROGRAMS·BLOCK).

    Program: (part of the units, group); one counter a group. FAULT is None, or what is wrong with this kernel.
    The program `absent` of every group does nothing.
    """
    group = tl.program_id(1)
    UNITS: tl.constexpr = PROGRAMS * BLOCK
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    every = tl.arange(0, UNITS)
    step_size = tl.num_programs(1) * UNITS
    counter_ptr = counters_ptr + group
    max_polls = limit
    if tl.program_id(0) != absent:
        for t in range(T):
            target = t * PROGRAMS
            if FAULT == "an epoch behind":
                target -= PROGRAMS
            if FAULT == "a program short":
                target -= 1
            if FAULT != "no wait":
                max_polls = exchange_wait(counter_ptr, target, max_polls, error_ptr, WAIT)
            source = h_ptr + t * step_size + group * UNITS + every
            if FAULT == "no wait":
                h = tl.load(source)
            else:
                (h,), max_polls = exchange_load((source,), (every < UNITS,), max_polls, error_ptr, WAIT)
            total = tl.sum(h.to(tl.float32), 0).to(tl.int32)
            result = ((total * (unit + 1) + t) % MODULUS).to(tl.float32)
            out = h_ptr + (t + 1) * step_size + group * UNITS + unit
            if FAULT == "early arrival":
                exchange_arrive(counter_ptr, WAIT)
                tl.store(out, result.to(h_ptr.dtype.element_ty))
            elif FAULT == "no barrier":
                tl.store(out, result.to(h_ptr.dtype.element_ty))
                tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")
            else:
                exchange_store(out, result, unit < UNITS, WAIT)
                exchange_arrive(counter_ptr, WAIT)
    tl.store(patience_ptr + group * PROGRAMS + tl.program_id(0), max_polls)


class Recurrence:
    """One launch of `recurrence_kernel`: its buffers, and what must come out."""

    def __init__(self, wait, programs, *, groups=1, T=6, block=4, dtype=torch.float32, limit=100_000):
        self.wait, self.programs, self.groups, self.T, self.block, self.limit = wait, programs, groups, T, block, limit
        self.h = torch.zeros(T + 1, groups, programs * block, dtype=dtype)
        unpublish(self.h)
        self.h[0] = torch.arange(self.h[0].numel()).reshape(self.h[0].shape) % MODULUS
        self.max_polls = torch.zeros(groups, programs, dtype=torch.int32)
        self.counters = torch.zeros(groups, dtype=torch.int32)
        self.error = torch.zeros(1, dtype=torch.int32)

    def run(self, *, fault=None, absent=-1, **options):
        arguments = dict(
            h_ptr=self.h, patience_ptr=self.max_polls, counters_ptr=self.counters, error_ptr=self.error,
            T=self.T, limit=self.limit, absent=absent,
            PROGRAMS=self.programs, BLOCK=self.block, MODULUS=MODULUS, WAIT=self.wait, FAULT=fault,
        )  # fmt: skip
        run_concurrently(recurrence_kernel, (self.programs, self.groups), arguments, **options)

    def expected(self):
        h = [self.h[0].long()]
        unit = torch.arange(self.programs * self.block) + 1
        for t in range(self.T):
            h.append((h[-1].sum(1, keepdim=True) * unit + t) % MODULUS)
        return torch.stack(h)

    def is_right(self):
        return bool((self.h.double() == self.expected()).all())

    def check(self):
        assert self.is_right()
        assert self.error.item() == 0
        assert (self.max_polls == self.limit).all()
        assert (self.counters == (self.programs * self.T if self.wait == "counter" else 0)).all()


@pytest.mark.parametrize("wait", sync.WAIT_METHODS)
@pytest.mark.parametrize("programs, groups", [(2, 1), (4, 1), (8, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_program_sees_every_step_of_the_others(wait, programs, groups, seed):
    recurrence = Recurrence(wait, programs, groups=groups)
    recurrence.run(seed=seed)
    recurrence.check()


@pytest.mark.parametrize("wait", sync.WAIT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_type_can_be_exchanged(wait, dtype):
    recurrence = Recurrence(wait, 4, T=4, dtype=dtype)
    recurrence.run(seed=2)
    recurrence.check()


@pytest.mark.parametrize("wait", sync.WAIT_METHODS)
def test_without_delays(wait):
    recurrence = Recurrence(wait, 4, T=40)
    recurrence.run(delay=0.0)
    recurrence.check()


@pytest.mark.parametrize("wait", sync.WAIT_METHODS)
def test_waits_for_a_program_that_never_arrives_give_up(wait):
    """All later waits end at once: if each of the 60 took its 300 polls, the deadline would pass."""
    recurrence = Recurrence(wait, 4, T=60, limit=300)
    recurrence.run(absent=2, delay=0.0, deadline=15)
    code = {"counter": sync.TIMED_OUT_COUNT, "data": sync.TIMED_OUT_DATA}[wait].value
    assert recurrence.error.item() == code
    assert recurrence.max_polls.tolist() == [[0, 0, 300, 0]]
    with pytest.raises(RuntimeError, match=r"^my launch: .*timed out"):
        raise_if_timed_out(recurrence.error, "my launch")


def test_groups_do_not_wait_for_each_other():
    """A group whose count is not reached times out; the other does not notice."""
    recurrence = Recurrence("counter", 2, groups=2, limit=500)
    recurrence.counters[1] = -1000
    recurrence.run(delay=0.0)
    assert recurrence.max_polls.tolist() == [[500, 500], [0, 0]]
    assert (recurrence.h[:, 0].double() == recurrence.expected()[:, 0]).all()


def test_a_launch_that_did_not_give_up_raises_nothing():
    raise_if_timed_out(torch.zeros(1, dtype=torch.int32), "my launch")


@triton.jit(do_not_specialize=["limit"])
def pass_on_kernel(
    in_ptr, exchange_ptr, out_ptr, error_ptr, limit, SIZE: tl.constexpr, CANONICAL: tl.constexpr
):  # fmt: skip
    """out (2, SIZE): what each of two programs published of in (2, SIZE), as the other one read it."""
    element = tl.arange(0, SIZE)
    mine = tl.program_id(0) * SIZE + element
    other = (1 - tl.program_id(0)) * SIZE + element
    if CANONICAL:
        publish(exchange_ptr + mine, tl.load(in_ptr + mine), element < SIZE)
    else:
        tl.store(exchange_ptr + mine, tl.load(in_ptr + mine))
    (value,), _ = load_when_published((exchange_ptr + other,), (element < SIZE,), limit, error_ptr)
    tl.store(out_ptr + other, value)


def run_pass_on(bits, dtype, canonical=True, limit=100_000):
    """`pass_on_kernel` on values (2, SIZE) given as bits; returns the bits that came out, and the error flag."""
    exchange, out = torch.zeros(bits.shape, dtype=dtype), torch.zeros(bits.shape, dtype=dtype)
    unpublish(exchange)
    error = torch.zeros(1, dtype=torch.int32)
    arguments = dict(
        in_ptr=bits.view(dtype), exchange_ptr=exchange, out_ptr=out, error_ptr=error, limit=limit,
        SIZE=bits.shape[1], CANONICAL=canonical,
    )  # fmt: skip
    run_concurrently(pass_on_kernel, (2,), arguments, seed=3)
    return out.view(bits.dtype), error.item()


def special_bits(dtype):
    """NaNs of both signs (the pattern among them), infinities, zeros, subnormals, ordinary values: bits (2, 8)."""
    integer = BITS[dtype]
    limits = torch.finfo(dtype)
    special = torch.tensor(
        [float("inf"), -float("inf"), 0.0, -0.0, 1.0, limits.max, limits.min, limits.tiny / 4, -1.5, float("nan")],
        dtype=dtype,
    ).view(integer).tolist()  # fmt: skip
    quiet = torch.tensor(float("nan"), dtype=dtype).view(integer).item()
    extra = [-1, -2, torch.iinfo(integer).max, quiet | 1, quiet ^ torch.iinfo(integer).min, -1]
    return torch.tensor(special + extra, dtype=integer).reshape(2, 8)


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_nan_and_infinity_are_data(dtype):
    """Every bit pattern passes as it is, but for the NaN that means "not yet": it becomes another NaN."""
    bits = special_bits(dtype)
    out, error = run_pass_on(bits, dtype)
    assert error == 0
    expected = torch.where(bits == -1, torch.iinfo(bits.dtype).max, bits)
    assert out.tolist() == expected.tolist()
    assert out.view(dtype).isnan().tolist() == bits.view(dtype).isnan().tolist()


@pytest.mark.parametrize("dtype", list(BITS), ids=str)
def test_unpublish_fills_any_view_with_a_nan(dtype):
    buffer = torch.zeros(4, 6, dtype=dtype)
    unpublish(buffer[1:3, ::2].t())
    assert buffer.isnan().sum() == 6
    assert (buffer[1:3, ::2].view(BITS[dtype]) == -1).all()


# Tests of the tests: each fault makes the checks above fail.


FEW_RUNS = 10
"""One run mostly shows a fault; on a busy machine programs can happen to come in the right order in one of them."""


def is_seen(wait, fault):
    """Whether one of a few launches with the fault comes out wrong."""
    for seed in range(FEW_RUNS):
        recurrence = Recurrence(wait, 4, T=12)
        recurrence.run(fault=fault, seed=seed, delay=4e-3)
        if not recurrence.is_right():
            return True
    return False


@pytest.mark.parametrize("fault", ["no wait", "an epoch behind", "a program short", "early arrival", "no barrier"])
def test_a_wrong_counter_wait_is_seen(fault):
    assert is_seen("counter", fault)


def test_a_missing_data_wait_is_seen():
    assert is_seen("data", "no wait")


def test_a_right_wait_is_never_seen():
    assert not is_seen("counter", None) and not is_seen("data", None)


def test_a_buffer_that_was_not_unpublished_is_seen():
    recurrence = Recurrence("data", 4, T=12)
    recurrence.h[1:] = 0
    recurrence.run(delay=4e-3)
    assert not recurrence.is_right()


def test_a_result_that_looks_unpublished_is_seen():
    _, error = run_pass_on(special_bits(torch.float16), torch.float16, canonical=False, limit=50)
    assert error == sync.TIMED_OUT_DATA.value


@triton.jit
def axes_kernel(out_ptr):
    """out (3 axes of the grid): 1 + this program's number, each program its own element."""
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out_ptr + 2 * place, place + 1)


@pytest.mark.parametrize("grid", [(3,), (2, 3), (2, 1, 2)], ids=str)
def test_every_program_of_the_grid_runs_once_and_views_are_kept(grid):
    buffer = torch.zeros(2 * torch.Size(grid).numel() + 3, dtype=torch.int32)
    run_concurrently(axes_kernel, grid, dict(out_ptr=buffer[3:]))
    assert buffer[3::2].tolist() == list(range(1, torch.Size(grid).numel() + 1))
    assert (buffer[:3] == 0).all() and (buffer[4::2] == 0).all()


@triton.jit
def endless_kernel(flag_ptr):
    """Program 1 waits for what nobody does; the others end."""
    if tl.program_id(0) == 1:
        while tl.atomic_add(flag_ptr, 0) == 0:
            pass


def test_programs_that_do_not_end_are_named():
    with pytest.raises(ProgramsDidNotEnd, match=r"endless_kernel: not ended after 0\.5 s: programs \(1, 0, 0\)$"):
        run_concurrently(endless_kernel, (3,), dict(flag_ptr=torch.zeros(1, dtype=torch.int32)), deadline=0.5)


@triton.jit
def failing_kernel(flag_ptr, WIDTH: tl.constexpr):
    """Program 1 breaks a rule of the language; program 0 waits for it."""
    if tl.program_id(0) == 1:
        tl.static_assert(WIDTH == 4, "not a width")
    while tl.atomic_add(flag_ptr, 0) == 0:
        pass


def test_a_program_that_raises_is_named_with_its_traceback():
    with pytest.raises(ProgramFailed, match=r"(?s)program \(1, 0, 0\) of failing_kernel failed:.*not a width"):
        run_concurrently(failing_kernel, (2,), dict(flag_ptr=torch.zeros(1, dtype=torch.int32), WIDTH=3))


@triton.jit
def aliased_kernel(left_ptr, right_ptr):
    """Program 0 writes at left, program 1 waits for it at right, then writes there."""
    if tl.program_id(0) == 0:
        tl.store(left_ptr, 1)
    else:
        while tl.load(right_ptr, volatile=True) == 0:
            pass
        tl.store(right_ptr + 1, 2)


def launch_aliased(buffer):
    aliased_kernel[(2,)](left_ptr=buffer[1:], right_ptr=buffer[1:3], num_warps=4, launch_cooperative_grid=True)


def test_launchers_run_as_they_are_and_arguments_may_share_a_storage():
    import sys

    buffer = torch.zeros(4, dtype=torch.int32)
    with concurrent_programs({sys.modules[__name__]: ["aliased_kernel"]}) as grids:
        launch_aliased(buffer)
    assert buffer.tolist() == [0, 1, 2, 0]
    assert grids == [(2,)]
