"""Threads that work together or part: shuffles, reductions, votes, branches, predicates, barriers."""

import numpy as np
import pytest

from tests.emulator import Fault
from tests.emulator.small_kernels import checks, evaluate, run, zeros

LANES = np.arange(64)
VALUES = np.random.default_rng(0).integers(0, 2**32, 64, dtype="u4")


def source_lane(mode, lane, b, clamp, segment):
    """The PTX ISA's own description of shfl.sync."""
    most = lane & segment | clamp & ~segment
    least = lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | b & ~segment}[mode]
    inside = source >= most if mode == "up" else source <= most
    return (source if inside else lane), inside


@pytest.mark.parametrize(
    "mode, c", [("up", 0), ("down", 31), ("bfly", 31), ("idx", 31), ("down", 0x1807), ("idx", 0x100F)]
)
@pytest.mark.parametrize("b", [0, 1, 3, 16, 31])
def test_shuffles(mode, c, b):
    statement = f"shfl.sync.{mode}.b32 %o|%p1, %a, {b}, {c}, 0xffffffff;"
    expected = [source_lane(mode, lane % 32, b, c & 31, c >> 8 & 31) for lane in LANES]
    taken = np.array([VALUES[lane // 32 * 32 + source] for lane, (source, _) in zip(LANES, expected, strict=True)])
    np.testing.assert_array_equal(evaluate(statement, [VALUES], "u4"), taken)
    inside = evaluate(statement.replace("%o", "%r20").replace("%p1", "%o"), [VALUES], "bool")
    np.testing.assert_array_equal(inside, [fits for _, fits in expected])


@pytest.mark.parametrize(
    "operation, kind",
    [("add", "u32"), ("max", "s32"), ("min", "s32"), ("max", "u32"), ("min", "u32"), ("or", "b32"), ("and", "b32"),
     ("xor", "b32")],
)  # fmt: skip
def test_reductions_over_a_warp(operation, kind):
    functions = {"add": np.add, "max": np.maximum, "min": np.minimum, "or": np.bitwise_or, "and": np.bitwise_and,
                 "xor": np.bitwise_xor}  # fmt: skip
    warps = VALUES.view("i4" if kind == "s32" else "u4").reshape(2, 32)
    expected = np.repeat(functions[operation].reduce(warps, 1), 32).astype(warps.dtype).view("u4")
    found = evaluate(f"redux.sync.{operation}.{kind} %o, %a, 0xffffffff;", [VALUES], "u4")
    np.testing.assert_array_equal(found, expected)


def test_votes_of_a_warp():
    some = (LANES % 3 == 0) & (LANES < 32) | (LANES >= 40)
    none, every = np.zeros(64, bool), np.ones(64, bool)
    ballot = evaluate("vote.sync.ballot.b32 %o, %a, -1;", [some], "u4")
    assert set(ballot[:32].tolist()) == {sum(1 << n for n in range(0, 32, 3))}
    assert set(ballot[32:].tolist()) == {0xFFFFFF00}
    for votes, any_of_them, all_of_them in ((some, True, False), (none, False, False), (every, True, True)):
        assert (evaluate("vote.sync.any.pred %o, %a, -1;", [votes], "bool") == any_of_them).all()
        assert (evaluate("vote.sync.all.pred %o, %a, -1;", [votes], "bool") == all_of_them).all()


STORE = "mul.wide.u32 %d9, %tid, 4; add.s64 %d9, %d0, %d9; st.global.b32 [%d9], %r9;"


def test_a_guard_keeps_lanes_from_writing():
    out = zeros(64)
    body = "mov.b32 %r9, 5; and.b32 %r8, %tid, 1; setp.eq.u32 %p1, %r8, 0;"
    run(body + "@%p1 mov.b32 %r9, 7; @!%p1 add.u32 %r9, %r9, 1;" + STORE, out, threads=64)
    np.testing.assert_array_equal(out.numpy(), np.where(LANES % 2 == 0, 7, 6))


@pytest.mark.parametrize("gang", ["cta", "warp"])
def test_lanes_that_branch_apart_run_apart_and_meet_again(gang):
    """Each thread's loop runs as often as its number; at the end all lanes shuffle together."""
    body = f"""
mov.b32 %r9, 0;
mov.b32 %r8, 0;
setp.gt.u32 %p1, %tid, 40;
@%p1 bra $skipped;
$loop:
add.u32 %r9, %r9, %r8;
add.u32 %r8, %r8, 1;
setp.le.u32 %p2, %r8, %tid;
@%p2 bra $loop;
bra.uni $end;
$skipped:
mov.b32 %r9, 1000;
$end:
shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
{STORE}"""
    out = zeros(64)
    machine = run(body, out, threads=64, gang=gang)
    assert machine.divergences > 0 and not checks(machine)
    expected = np.where(LANES > 40, 1000, LANES * (LANES + 1) // 2)
    np.testing.assert_array_equal(out.numpy(), expected[LANES ^ 1])


def test_names_in_braces_are_of_those_braces():
    """Two pieces of inline PTX with one label and one register of the same names."""
    piece = """
{{
.reg .b32 %mine;
mov.b32 %mine, {start};
again:
add.u32 %mine, %mine, 1;
setp.lt.u32 %p1, %mine, {end};
@%p1 bra again;
add.u32 %r9, %r9, %mine;
}}
"""
    out = zeros(32)
    run("mov.b32 %r9, 0;" + piece.format(start=0, end=3) + piece.format(start=10, end=20) + STORE, out)
    assert out.tolist() == [23] * 32


@pytest.mark.parametrize("gang", ["cta", "warp"])
@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_orders_shared_memory(gang, seed):
    body = f"""
shl.b32 %r1, %tid, 2;
mov.u32 %r2, global_smem;
add.u32 %r2, %r2, %r1;
st.shared.b32 [%r2], %tid;
bar.sync 0;
xor.b32 %r3, %r1, 252;
mov.u32 %r2, global_smem;
add.u32 %r2, %r2, %r3;
ld.shared.b32 %r9, [%r2];
bar.warp.sync -1;
{STORE}"""
    out = zeros(64)
    assert not checks(run(body, out, threads=64, gang=gang, seed=seed))
    np.testing.assert_array_equal(out.numpy(), 63 - LANES)


def test_some_lanes_of_a_reduction_are_refused():
    with pytest.raises(Fault, match="some lanes"):
        evaluate("redux.sync.add.u32 %o, %a, 1;", [VALUES], "u4")
    with pytest.raises(Fault, match="no such form"):
        evaluate("vote.sync.any.pred %o, %a, 1;", [VALUES > 0], "bool")
    with pytest.raises(Fault, match="guarded"):
        evaluate("setp.eq.u32 %p1, %a, 0; @%p1 shfl.sync.bfly.b32 %o, %a, 1, 31, -1;", [VALUES], "u4")
