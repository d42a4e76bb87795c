"""Loads, stores, atomics and copies; and what weak memory lets happen, and what it does not (litmus tests)."""

import itertools

import numpy as np
import pytest
import torch

from tests.emulator import Fault
from tests.emulator.small_kernels import checks, run, tensor_of, zeros

SEEDS = range(40)


def place_of(argument, size, register="%d20"):
    """Statements that point a register to each thread's element of an argument."""
    return f"mul.wide.u32 {register}, %tid, {size}; add.s64 {register}, {register}, %d{argument};"


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize(
    "vector, bits", [("", 16), ("", 32), ("", 64), (".v2", 16), (".v4", 16), (".v2", 32), (".v4", 32), (".v2", 64)]
)
def test_every_width_is_loaded_and_stored(vector, bits, weak):
    n = int(vector[2:] or 1)
    values = np.random.default_rng(0).integers(0, 2**bits, 32 * n, dtype=f"u{bits // 8}")
    out = tensor_of(np.zeros_like(values))
    letter = {16: "h", 32: "r", 64: "d"}[bits]
    registers = ", ".join(f"%{letter}{10 + k}" for k in range(n))
    registers = f"{{{registers}}}" if vector else registers
    size = n * bits // 8
    body = place_of(0, size) + place_of(1, size, "%d21")
    body += f"ld.global{vector}.b{bits} {registers}, [%d20]; st.global{vector}.b{bits} [%d21], {registers};"
    assert not checks(run(body, tensor_of(values), out, weak=weak))
    np.testing.assert_array_equal(out.numpy().view(values.dtype), values)


def test_bytes_are_loaded_and_kept_in_shared_memory():
    values = np.arange(32, dtype="u1") * 7
    out = zeros(32)
    body = place_of(0, 1) + "ld.global.b8 %r10, [%d20]; mov.u32 %r11, global_smem; add.u32 %r11, %r11, %tid;"
    body += "st.shared.b8 [%r11], %r10; bar.sync 0; xor.b32 %r12, %tid, 1; mov.u32 %r11, global_smem;"
    body += "add.u32 %r11, %r11, %r12; ld.shared.b8 %r10, [%r11];" + place_of(1, 4) + "st.global.b32 [%d20], %r10;"
    assert not checks(run(body, tensor_of(values), out))
    np.testing.assert_array_equal(out.numpy(), values[np.arange(32) ^ 1])


def test_bytes_are_stored_beside_each_other():
    out = torch.full((40,), 9, dtype=torch.uint8)
    body = "mul.lo.u32 %r10, %tid, 263;" + place_of(0, 1) + "st.global.b8 [%d20+3], %r10;"
    assert not checks(run(body, out))
    np.testing.assert_array_equal(out[3:35].numpy(), np.arange(32) * 263 % 256)
    assert out[:3].tolist() + out[35:].tolist() == [9] * 8
    assert checks(run("st.global.b8 [%d0], %tid;", out)) == ["racecheck"]
    with pytest.raises(Fault, match="in weak memory"):
        run(body, out, weak=True)


def test_a_narrow_load_widens_with_zeros():
    out = zeros(32)
    body = place_of(0, 2) + "ld.global.u16 %r10, [%d20];" + place_of(1, 4) + "st.global.b32 [%d20], %r10;"
    values = np.arange(32, dtype="u2") + 0xFFE0
    run(body, tensor_of(values), out)
    np.testing.assert_array_equal(out.numpy(), values.astype("i4"))


def test_a_hint_to_the_l2_cache_changes_no_value():
    values, out = np.arange(128, dtype="u4") * 5, zeros(128)
    body = place_of(0, 16) + place_of(1, 16, "%d21") + "createpolicy.fractional.L2::evict_first.b64 %d22, 1.0;"
    body += "ld.global.L1::evict_first.L2::cache_hint.v4.b32 {%r10, %r11, %r12, %r13}, [%d20], %d22;"
    body += "st.global.v4.b32 [%d21], {%r10, %r11, %r12, %r13};"
    assert not checks(run(body, tensor_of(values), out))
    np.testing.assert_array_equal(out.numpy(), values)
    with pytest.raises(Fault):
        run(body.replace(", %d22;", ";"), tensor_of(values), zeros(128))


@pytest.mark.parametrize(
    "operation, kind, expected",
    [("add", "u32", 100 + sum(range(32))), ("max", "s32", 100), ("max", "u32", 100), ("min", "u32", 0),
     ("or", "b32", 100 | 31), ("xor", "b32", 100), ("and", "b32", 0), ("exch", "b32", 31)],
)  # fmt: skip
def test_atomics(operation, kind, expected):
    """Lanes in order: each gets what the one before left."""
    out, old = zeros(1) + 100, zeros(32)
    body = (
        f"atom.global.gpu.relaxed.{operation}.{kind} %r10, [%d0], %tid;"
        + place_of(1, 4)
        + "st.global.b32 [%d20], %r10;"
    )
    run(body, out, old)
    assert out.item() == expected
    assert old[0] == 100 and old[31] == {"add": 100 + sum(range(31)), "exch": 30}.get(operation, old[31])
    again = zeros(1) + 100
    run(f"red.global.gpu.relaxed.{operation}.{kind} [%d0], %tid;", again)
    assert again.item() == expected


def test_compare_and_swap_and_wide_atomics():
    out, total = zeros(1), tensor_of(np.array([2**40], "u8"))
    body = "atom.global.gpu.acq_rel.cas.b32 %r10, [%d0], %tid, 77; cvt.u64.u32 %d10, %tid;"
    run(body + "red.global.gpu.relaxed.add.u64 [%d1], %d10;", out, total)
    assert out.item() == 77, "the first lane found its own number, 0"
    assert total.item() == 2**40 + sum(range(32))


def test_a_copy_arrives_when_it_is_waited_for():
    """Two groups; of the second only 8 bytes of 16 are given, the others become 0."""
    values = np.arange(256, dtype="u4")
    out = zeros(2, 128)
    body = place_of(0, 16) + "shl.b32 %r11, %tid, 4; mov.u32 %r12, global_smem; add.u32 %r11, %r11, %r12;"
    body += "cp.async.cg.shared.global [%r11], [%d20], 16; cp.async.commit_group;"
    body += "mov.b32 %r13, 8; cp.async.cg.shared.global [%r11+512], [%d20+512], 16, %r13; cp.async.commit_group;"
    for group, wait in enumerate(("cp.async.wait_group 1;", "cp.async.wait_all;")):
        body += f"{wait} bar.sync 0; ld.shared.v4.b32 {{%r14, %r15, %r16, %r17}}, [%r11+{512 * group}];"
        body += place_of(1, 16, "%d21") + f"st.global.v4.b32 [%d21+{512 * group}], {{%r14, %r15, %r16, %r17}};"
    assert not checks(run(body, tensor_of(values), out))
    np.testing.assert_array_equal(out[0].numpy(), values[:128])
    np.testing.assert_array_equal(out[1].numpy(), np.where(np.arange(128) % 4 < 2, values[128:], 0))


# Litmus tests. Two CTAs of one warp, of which the first lanes act; what they saw is in `out`.

FIRST_LANE = "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %tid, 0; @%p1 bra $end; setp.eq.u32 %p2, %r1, 1; @%p2 bra $other;"


def litmus(one, other, memory=64, seeds=SEEDS, lanes="", **options):
    """Run two CTAs with every seed; what %r10 and %r11 of the other are in the end, and what the checks found.

    %d0: data; %d1: a flag, far away.
    """
    seen, found = set(), set()
    body = f"{FIRST_LANE}\n{one} bra.uni $end;\n$other:\n{other}\nst.global.v2.b32 [%d2], {{%r10, %r11}};\n$end:"
    for seed in seeds:
        data, flag, out = zeros(memory), zeros(1), zeros(2)
        machine = run(body, data, flag, out, grid=(2,), weak=True, seed=seed, **options)
        seen.add(tuple(out.tolist()))
        found |= set(checks(machine))
    return seen, found


PUBLISH = "mov.b32 %r5, 7; st.global.b32 [%d0], %r5; {store};"
RELAXED_STORE, RELEASE_STORE = "st.global.relaxed.gpu.b32 [%d1], 1", "red.global.gpu.release.add.u32 [%d1], 1"
RELAXED_ADD = "red.global.gpu.relaxed.add.u32 [%d1], 1"


def consume(order):
    """Wait for the flag, then read the data."""
    wait = f"\n$wait:\nld.global.gpu.{order}.b32 %r10, [%d1]; setp.eq.u32 %p3, %r10, 0; @%p3 bra $wait;"
    return wait + "ld.global.b32 %r11, [%d0];"


def test_message_passing_with_release_and_acquire_is_seen_whole():
    seen, found = litmus(PUBLISH.format(store=RELEASE_STORE), consume("acquire"))
    assert seen == {(1, 7)} and not found


@pytest.mark.parametrize(
    "store, order",
    [(RELAXED_STORE, "relaxed"), (RELAXED_ADD, "acquire"), (RELEASE_STORE, "relaxed")],
    ids=["neither", "no release", "no acquire"],
)
def test_message_passing_without_one_of_them_is_a_race_and_may_read_the_past(store, order):
    seen, found = litmus(PUBLISH.format(store=store), consume(order))
    assert seen == {(1, 7), (1, 0)}
    assert found == {"race"}


def test_volatile_loads_see_what_has_left_in_any_order():
    """Data that is its own flag: no race is reported, but a flag beside it says nothing of the data."""
    other = "\n$wait:\nld.volatile.global.b32 %r10, [%d1]; setp.eq.u32 %p3, %r10, 0; @%p3 bra $wait;"
    seen, found = litmus(PUBLISH.format(store=RELAXED_STORE), other + "ld.volatile.global.b32 %r11, [%d0];")
    assert seen == {(1, 7), (1, 0)} and not found


def test_stores_to_one_place_keep_their_order():
    """What was read once is never followed by what was stored before it."""
    one = "mov.b32 %r5, 1; st.global.b32 [%d0], %r5; mov.b32 %r5, 2; st.global.b32 [%d0], %r5;"
    other = "ld.volatile.global.b32 %r10, [%d0]; ld.volatile.global.b32 %r11, [%d0];"
    seen, _ = litmus(one, other, seeds=range(200))
    assert all(first <= second for first, second in seen)
    assert (0, 0) in seen and (2, 2) in seen


def test_both_of_two_stores_may_be_unseen_by_the_other():
    """Store buffering: each stores, then reads what the other stores."""
    body = "mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %tid, 0; @%p1 bra $end; mul.wide.u32 %d10, %r1, 128;"
    body += "add.s64 %d11, %d0, %d10; mov.b32 %r5, 1; st.global.b32 [%d11], %r5;"
    body += "mov.b64 %d12, 128; sub.s64 %d12, %d12, %d10;"
    body += "add.s64 %d12, %d0, %d12; ld.volatile.global.b32 %r10, [%d12]; mul.wide.u32 %d13, %r1, 4;"
    body += "add.s64 %d13, %d1, %d13; st.global.b32 [%d13], %r10;\n$end:"
    seen = {False: set(), True: set()}
    for weak, seed in itertools.product((False, True), range(60)):
        out = zeros(2) + 5
        run(body, zeros(64), out, grid=(2,), weak=weak, seed=seed)
        seen[weak].add(tuple(out.tolist()))
    assert (0, 0) in seen[True]
    assert (0, 0) not in seen[False] and seen[False] <= {(0, 1), (1, 0), (1, 1)}


def test_a_gang_sees_its_own_stores():
    one = "mov.b32 %r5, 3; st.global.b32 [%d0], %r5;"
    other = "mov.b32 %r5, 9; st.global.b32 [%d0+64], %r5; ld.global.b32 %r10, [%d0+64];"
    other += "atom.global.gpu.relaxed.add.u32 %r11, [%d0+64], 1;"
    seen, found = litmus(one, other)
    assert seen == {(9, 9)} and not found


@pytest.mark.parametrize("torn", [False, True])
def test_an_element_appears_whole_unless_stores_are_torn(torn):
    one = "mov.b32 %r5, 0x00050005; st.global.b32 [%d0], %r5;"
    other = "\n$wait:\nld.volatile.global.b32 %r10, [%d0]; setp.eq.u32 %p3, %r10, 0; @%p3 bra $wait; mov.b32 %r11, 0;"
    seen, _ = litmus(one, other, seeds=range(100), torn=torn)
    whole = {(0x50005, 0)}
    assert seen == (whole | {(5, 0), (0x50000, 0)} if torn else whole)


def test_elements_of_one_vector_store_appear_in_any_order():
    one = "mov.b32 %r5, 1; st.global.v2.b32 [%d0], {%r5, %r5};"
    other = "\n$wait:\nld.volatile.global.v2.b32 {%r10, %r11}, [%d0]; add.u32 %r12, %r10, %r11; "
    other += "setp.eq.u32 %p3, %r12, 0; @%p3 bra $wait;"
    seen, _ = litmus(one, other, seeds=range(100))
    assert seen == {(1, 1), (0, 1), (1, 0)}


def test_a_kept_sector_hides_what_came_later_until_an_acquire():
    """The data are read before the flag is seen, and after: through the L1 they are what they were."""

    def before_and_after(order, past_the_l1=""):
        wait = consume(order).replace("%r10", "%r12").replace("ld.global.b32 %r11", f"ld.global{past_the_l1}.b32 %r11")
        seen, _ = litmus(PUBLISH.format(store=RELEASE_STORE), "ld.global.b32 %r10, [%d0];" + wait, seeds=range(80))
        return seen

    assert before_and_after("relaxed") == {(0, 0), (7, 7)}
    assert before_and_after("relaxed", ".cg") == {(0, 0), (0, 7), (7, 0), (7, 7)}
    assert before_and_after("acquire") == {(0, 7), (7, 7)}


@pytest.mark.parametrize("fence", ["fence.acq_rel.gpu;", "fence.sc.sys;", "membar.gl;"])
def test_fences_around_relaxed_accesses_order_them(fence):
    publish = f"mov.b32 %r5, 7; st.global.b32 [%d0], %r5; {fence} {RELAXED_STORE};"
    other = consume("relaxed").replace("ld.global.b32 %r11", f"{fence} ld.global.b32 %r11")
    seen, found = litmus(publish, other)
    assert seen == {(1, 7)} and not found


@pytest.mark.parametrize("barrier", [True, False])
def test_a_release_makes_visible_what_a_barrier_ordered_before_it(barrier):
    """Warp 1 stores, warp 0 releases: only with a barrier between is the store published."""
    wait = "bar.sync 0;" if barrier else ""
    body = f"""
mov.u32 %r1, %ctaid.x;
setp.eq.u32 %p2, %r1, 1;
@%p2 bra $other;
mul.wide.u32 %d10, %tid, 4;
add.s64 %d10, %d0, %d10;
setp.ge.u32 %p3, %tid, 32;
mov.b32 %r5, 7;
@%p3 st.global.b32 [%d10], %r5;
{wait}
setp.eq.u32 %p4, %tid, 0;
@%p4 red.global.gpu.release.add.u32 [%d1], 1;
bra.uni $end;
$other:
ld.global.gpu.acquire.b32 %r10, [%d1];
setp.eq.u32 %p5, %r10, 0;
@%p5 bra $other;
mul.wide.u32 %d10, %tid, 4;
add.s64 %d11, %d0, %d10;
ld.global.b32 %r11, [%d11];
add.s64 %d12, %d2, %d10;
st.global.b32 [%d12], %r11;
$end:
"""
    results, found = set(), set()
    for seed in range(30):
        out = zeros(64)
        machine = run(body, zeros(64), zeros(1), out, grid=(2,), threads=64, gang="warp",
                      weak=True, seed=seed)  # fmt: skip
        results |= set(out[32:].tolist())
        found |= set(checks(machine))
    assert (results, found) == (({7}, set()) if barrier else ({0, 7}, {"race"}))


@pytest.mark.parametrize("barrier", [True, False])
def test_what_a_warp_acquired_others_see_after_a_barrier(barrier):
    """Of the reader warp 0 waits for the flag, then warp 1 reads the data: only with a barrier between is it there."""
    wait = "bar.sync 0;" if barrier else "mov.b32 %r7, 0;"
    body = f"""
mov.u32 %r1, %ctaid.x;
setp.ge.u32 %p3, %tid, 32;
setp.eq.u32 %p2, %r1, 1;
@%p2 bra $reader;
@%p3 bra $end;
setp.ne.u32 %p4, %tid, 0;
@%p4 bra $end;
{PUBLISH.format(store=RELEASE_STORE)}
bra.uni $end;
$reader:
@%p3 bra $over;
$wait:
ld.global.gpu.acquire.b32 %r10, [%d1];
setp.eq.u32 %p5, %r10, 0;
@%p5 bra $wait;
$over:
{wait}
@!%p3 bra $end;
ld.global.b32 %r11, [%d0];
{place_of(2, 4)}
st.global.b32 [%d20+-128], %r11;
$end:
"""
    results, found = set(), set()
    for seed in range(40):
        out = zeros(32)
        options = dict(grid=(2,), threads=64, gang="warp", weak=True, seed=seed)
        found |= set(checks(run(body, zeros(64), zeros(1), out, **options)))
        results |= set(out.tolist())
    assert (results, found) == (({7}, set()) if barrier else ({0, 7}, {"race"}))


def test_what_is_not_modelled_is_refused():
    for statement in ("st.global.v2.b8 [%d0], {%h1, %h1};", "ld.const.b32 %r1, [%d0];",
                      "atom.shared.add.u32 %r1, [%d0], 1;", "cp.async.bulk.commit_group;",
                      "atom.global.gpu.relaxed.add.f16x2 %r1, [%d0], 1;"):  # fmt: skip
        with pytest.raises(Fault):
            run(statement, zeros(8))
