"""Each check sees the least fault of its kind, and is silent where the fault is not."""

import pytest
import torch

from tests.emulator import Fault
from tests.emulator.memory import GARBAGE
from tests.emulator.small_kernels import checks, run, zeros

PLACE = "mul.wide.u32 %d20, %tid, 4; add.s64 %d20, %d20, %d0; shl.b32 %r20, %tid, 2; mov.u32 %r21, global_smem;"
PLACE += "add.u32 %r20, %r20, %r21; mov.b32 %r9, 1;"


def found(body, *arguments, **options):
    """What the checks find in a kernel; %d20 and %r20 are the thread's place in the first argument and in shared."""
    return checks(run(PLACE + body, *(arguments or (zeros(64),)), **options))


@pytest.mark.parametrize(
    "statement",
    ["st.global.b32 [%d20{}], %r9;", "ld.global.b32 %r1, [%d20{}];", "red.global.gpu.relaxed.add.u32 [%d20{}], 1;"],
)
def test_global_accesses_outside_of_a_tensor(statement):
    assert found(statement.format("+128")) == []
    assert found(statement.format("+132")) == ["memcheck"]
    assert found(statement.format("+-4")) == ["memcheck"]
    assert found(statement.format("+132"), zeros(64), zeros(64)) == ["memcheck"], "beside it lies another tensor"


def test_what_is_outside_is_neither_read_nor_written():
    out = zeros(64)
    run(PLACE + "st.global.b32 [%d20+132], %r9;", out)
    assert out[33:].tolist() == [1] * 31 and not out[:33].any()


def test_a_view_of_a_tensor_ends_where_it_ends():
    whole = zeros(64)
    assert found("st.global.b32 [%d20], %r9;", whole[32:]) == []
    assert found("st.global.b32 [%d20+4], %r9;", whole[16:48]) == ["memcheck"]


@pytest.mark.parametrize(
    "statement", ["st.shared.b32 [%r20{}], %r9;", "st.shared.b32 [%r20], %r9; ld.shared.b32 %r1, [%r20{}];"]
)
def test_shared_accesses_outside_of_what_the_launch_asks_for(statement):
    assert found(statement.format(""), shared=128) == []
    assert "memcheck" in found(statement.format("+4"), shared=128)
    assert "memcheck" in found(statement.format("+-4"), shared=128)


@pytest.mark.parametrize(
    "statement", ["ld.global.v2.b32 {%r1, %r2}, [%d0+4];", "st.shared.v2.b32 [%r21+4], {%r9, %r9};"]
)
def test_accesses_that_are_not_aligned(statement):
    assert found(statement) == ["memcheck"]
    assert found(statement.replace("+4", "+8")) == []


def test_global_memory_that_nobody_wrote():
    never = torch.full((64,), GARBAGE - 0x10000, dtype=torch.int16).view(torch.int32)
    read = "ld.global.b32 %r1, [%d20];"
    assert found(read, never.clone()) == ["initcheck"]
    assert found("st.global.b32 [%d20], %r9;" + read, never.clone()) == []
    assert found("st.global.b32 [%d20], %r9;" + read, never.clone(), weak=True) == []
    assert found("red.global.gpu.relaxed.add.u32 [%d20], 1;", never.clone()) == ["initcheck"]
    some = never.clone()
    some[:31] = 0
    assert found(read, some) == ["initcheck"], "of the last lane"


def test_shared_memory_that_nobody_wrote():
    assert found("ld.shared.b32 %r1, [%r20];") == ["initcheck"]
    assert found("st.shared.b32 [%r20], %r9; ld.shared.b32 %r1, [%r20];") == []
    assert found("setp.ne.u32 %p1, %tid, 3; @%p1 st.shared.b32 [%r20], %r9; ld.shared.b32 %r1, [%r20];") == [
        "initcheck"
    ]


OTHER_WARP = "xor.b32 %r22, %r20, 128;"
BARRIER = "bar.sync 0;"
STORE, LOAD = "st.shared.b32 [%r20], %tid;", "ld.shared.b32 %r1, [%r22];"


@pytest.mark.parametrize("gang", ["cta", "warp"])
@pytest.mark.parametrize(
    "before, after",
    [(STORE, LOAD), (STORE + BARRIER + LOAD, STORE), (STORE, "st.shared.b32 [%r22], %tid;")],
    ids=["a read after a store", "a store after a read", "a store of another value after a store"],
)
def test_warps_that_touch_shared_memory_without_a_barrier(before, after, gang):
    for seed in range(4):
        options = dict(threads=64, gang=gang, seed=seed)
        assert found(OTHER_WARP + before + BARRIER + after, **options) == []
        assert "racecheck" in found(OTHER_WARP + before + after, **options)


@pytest.mark.parametrize("gang", ["cta", "warp"])
@pytest.mark.parametrize("writer", [0, 1])
def test_a_store_to_what_several_warps_read(writer, gang):
    """Both read it, so that whichever stores there, the other one read it."""
    body = f"st.shared.b32 [%r21], %r9; {BARRIER} ld.shared.b32 %r1, [%r21]; {{}}"
    body += f"shr.u32 %r2, %tid, 5; setp.eq.u32 %p1, %r2, {writer}; @%p1 st.shared.b32 [%r21], 5;"
    for seed in range(6):
        options = dict(threads=64, gang=gang, seed=seed)
        assert found(body.format(BARRIER), **options) == []
        assert found(body.format(""), **options) == ["racecheck"]


def test_warps_that_store_the_same_value_are_no_race():
    assert found("st.shared.b32 [%r21], %r9;", threads=64, gang="warp") == []


@pytest.mark.parametrize("statement", ["st.shared.b32 [%r21], {};", "st.global.b32 [%d0], {};"])
@pytest.mark.parametrize("weak", [False, True])
def test_lanes_of_one_store_that_disagree(statement, weak):
    assert found(statement.format("%r9"), weak=weak) == []
    assert found(statement.format("%tid"), weak=weak) == ["racecheck"]


@pytest.mark.parametrize("weak", [False, True])
def test_two_thread_blocks_that_store_to_one_element(weak):
    apart = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %d21, %r1, 128; add.s64 %d20, %d20, %d21;"
    assert found(apart + "st.global.b32 [%d20], %r9;", grid=(2,), weak=weak) == []
    assert found("st.global.b32 [%d20], %r9;", grid=(2,), weak=weak) == ["race"]


def test_a_barrier_that_a_part_of_the_threads_reaches():
    divergent = "setp.lt.u32 %p1, %tid, 16; @%p1 bra $over; bar.sync 0;\n$over:\nmov.b32 %r1, 0;"
    assert found(divergent) == ["synccheck"]
    assert found(divergent.replace("16", "32")) == []


def test_warps_that_meet_at_different_barriers():
    body = "setp.lt.u32 %p1, %tid, 32; @%p1 bra $over; bar.sync 0; bra.uni $end;\n$over:\nbar.sync 0;"
    body += "\n$end:\nmov.b32 %r1, 0;"
    assert found(body, threads=64, gang="warp") == ["synccheck"]


def test_a_barrier_that_others_never_reach_is_a_deadlock():
    body = "setp.lt.u32 %p1, %tid, 32; @%p1 bra $end; bar.sync 0;\n$end:\nmov.b32 %r1, 0;"
    with pytest.raises(Fault, match=r"deadlock: .*bar\.sync"):
        found(body, threads=64, gang="warp")


def test_a_loop_without_end_is_ended():
    with pytest.raises(Fault, match="not ended after 100 segments"):
        found("\n$again:\nmov.b32 %r1, 0; bra.uni $again;", limit=100)


@pytest.mark.parametrize(
    "statement",
    ["shfl.sync.bfly.b32 %r1, %r9, 1, 31, -1;", "redux.sync.add.u32 %r1, %r9, -1;", "bar.warp.sync -1;",
     "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r21];", "vote.sync.any.pred %p2, %p1, -1;",
     "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1, %r2, %r3, %r4}, {%r1, %r2, %r3, %r4}, {%r1, %r2}, "
     "{%r1, %r2, %r3, %r4};"],
)  # fmt: skip
def test_instructions_of_whole_warps_by_a_part_of_one(statement):
    body = "st.shared.v4.b32 [%r21], {{%r9, %r9, %r9, %r9}}; setp.ge.u32 %p1, %tid, {}; @%p1 bra $over;"
    body += "{}\n$over:\nmov.b32 %r3, 0;"
    sink = found(body.format(16, statement), threads=64)
    assert "synccheck" in sink
    assert "synccheck" not in found(body.format(32, statement), threads=64)


COPY = "shl.b32 %r22, %tid, 4; add.u32 %r22, %r22, %r21; mul.wide.u32 %d21, %tid, 16; add.s64 %d21, %d21, %d0;"
COPY += "cp.async.cg.shared.global [%r22], [%d21], 16; cp.async.commit_group;"


@pytest.mark.parametrize("touch", ["ld.shared.b32 %r1, [%r22];", "st.shared.b32 [%r22], %r9;"])
def test_a_copy_that_is_not_waited_for(touch):
    arrived = "cp.async.wait_group 0;"
    assert found(COPY + arrived + touch, zeros(128)) == []
    assert "racecheck" in found(COPY + "cp.async.wait_group 1;" + touch + arrived, zeros(128))
    assert found(COPY, zeros(128)) == ["synccheck"], "it ends under way"
    assert "memcheck" in found(COPY + arrived, zeros(127)), "the source ends before"


ZEROS = "st.shared.v4.b32 [%r22], {%r8, %r8, %r8, %r8};"
PRODUCT = """
mov.b32 %r8, 0; shl.b32 %r22, %tid, 4; add.u32 %r22, %r22, %r21;
{store}
{fence}
{barrier}
setp.eq.u32 %p1, %tid, %tid;
mov.b64 %d10, {descriptor};
wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
{{%r30, %r31, %r32, %r33}}, {{%r34, %r35, %r36, %r37}}, %d10, %p1, 1, 1, 0;
wgmma.commit_group.sync.aligned;
{wait}
{after}
wgmma.wait_group.sync.aligned 0;
"""


DESCRIPTOR = 1 << 62 | 64 << 32 | 0x400 >> 4  # rows of 128 bytes, 8 of them 1,024 bytes apart, from the first byte on
WAIT = "wgmma.wait_group.sync.aligned 0; bar.sync 0;"


def product(**changed):
    parts = dict(store=ZEROS, fence="fence.proxy.async.shared::cta;", barrier="bar.sync 0;", after=ZEROS, wait=WAIT)
    return PRODUCT.format(**dict(parts, descriptor=DESCRIPTOR) | changed)


@pytest.mark.parametrize("gang", ["cta", "warp"])
def test_products_under_way(gang):
    def of(**changed):
        return found(product(**changed), zeros(64), threads=128, gang=gang, shared=2048)

    assert of() == []
    assert of(fence="") == ["racecheck"], "no fence between the proxies"
    assert "racecheck" in of(barrier=""), "other warps wrote the operand"
    assert of(wait="bar.sync 0;") == ["racecheck"], "its operand is overwritten"
    assert of(store="") == ["initcheck"]
    assert "memcheck" in of(descriptor=DESCRIPTOR + (1536 >> 4))


def test_a_finding_names_the_instruction_and_counts():
    machine = run("mov.b32 %r1, 4;\nld.global.b32 %r9, [%d0+256];", zeros(64), grid=(3,))
    (finding,) = machine.findings
    assert finding.where.endswith("ld.global.b32 %r9, [%d0+256]") and finding.times == 3
    assert str(finding).startswith("memcheck: global access of 4 bytes at offset")


def test_only_some_thread_blocks_are_checked_and_they_include_the_first_and_the_last():
    body = "mov.u32 %r21, global_smem; ld.shared.b32 %r1, [%r21];"
    (finding,) = run(body, grid=(40,), checked=3).findings
    assert finding.times in (2, 3)
    for block in (0, 39):
        only = f"mov.u32 %r2, %ctaid.x; setp.ne.u32 %p1, %r2, {block}; @%p1 bra $end; {body}\n$end:\nmov.b32 %r1, 0;"
        assert checks(run(only, grid=(40,), checked=3)) == ["initcheck"]
