"""The model of a time step: decoding, control flow, the machine on code made by hand, bank conflicts."""

import ast
from dataclasses import replace
from pathlib import Path

import lstm_triton_kernels
import pytest

from benchmarks.simulator import step as steps
from benchmarks.simulator.conflicts import Access, bytes_of, needed_wavefronts, wavefronts_of
from benchmarks.simulator.machine import H100, ThreadBlock
from benchmarks.simulator.sass import NONE, Instruction, basic_blocks, decode, loops, parse, time_loop
from benchmarks.simulator.step import PHASES, Step, phases_of, step_of


def one(text, *, stall=1, write=NONE, read=NONE, wait=0, function="somewhere", line=1, label=None):
    """An instruction; a file that does not exist stands for the function of its name."""
    predicate, text = text.split(" ", 1) if text.startswith("@") else ("", text)
    opcode, _, operands = text.partition(" ")
    lines = ((function, line),)
    return Instruction(0, predicate, opcode, operands, stall, False, write, read, wait, lines, label)


def run(code, warps=1, *, machine=H100, phases=None, detours=None, wavefronts=None, iterations=1, counter=False):
    step = Step(code, phases or ["ahead"] * len(code), detours or {}, wavefronts or {})
    block = ThreadBlock(step, warps, machine, readers=1, counter=counter, row_blocks=1, fill=1.0)
    block.run(iterations)
    return block


def issued(block, warp=0):
    return [issue.cycle for issue in block.warps[warp].log]


# Decoding


def test_the_control_bits_of_an_encoding():
    control = 0b100001_111_010_0_0101  # wait, read, write, does not yield, stall
    found = decode(0x10, "@!P0 LDS.128 R4, [R2] ", control << 41, (("kernel.py", 7),), ".L_x_3")
    assert (found.stall, found.yields, found.write, found.read, found.wait) == (5, True, 2, NONE, 0b100001)
    assert (found.predicate, found.opcode, found.operands, found.name) == ("@!P0", "LDS.128", "R4, [R2]", "LDS")
    assert found.width == 16 and found.lines == (("kernel.py", 7),) and found.label == ".L_x_3"
    assert decode(0, "NOP", (1 << 4) << 41, (), None).yields is False


@pytest.mark.parametrize(
    "opcode, width",
    [("LDG.E.64", 8), ("LDG.E.LTC128B", 4), ("STG.E.U16", 2), ("LDS.U8", 1), ("STS", 4), ("LDG.E.128.STRONG.SYS", 16)],
)
def test_the_bytes_of_an_access(opcode, width):
    assert one(f"{opcode} R0, [R2]").width == width


LISTING = """\
	//## File "/k/forward.py", line 12
        /*0000*/                   MOV R1, c[0x0][0x28] ;               /* 0x00000a0000017a02 */
                                                                        /* 0x000fe20000000f00 */
.L_x_1:
	//## File "/k/resident.py", line 3 inlined at "/k/forward.py", line 20
	//## File "/k/forward.py", line 20
        /*0010*/              @P0  BRA `(.L_x_1) ;                      /* 0x0000000000000947 */
                                                                        /* 0x002fea0003800000 */
"""


def test_the_text_of_the_disassembler():
    first, second = parse(LISTING)
    assert (first.opcode, first.label, first.lines) == ("MOV", None, (("/k/forward.py", 12),))
    assert first.stall == 1 and first.wait == 0
    assert (second.predicate, second.name, second.label, second.target) == ("@P0", "BRA", ".L_x_1", ".L_x_1")
    assert second.lines == (("/k/resident.py", 3), ("/k/forward.py", 20))
    assert second.wait == 0b000010 and second.stall == 5 and second.address == 0x10


# Blocks, loops, phases

POLLED = [
    one("MOV R0, R1"),
    one("LDG.E.STRONG.SYS R2, [R4]", label=".L_x_0", function="load_bits"),
    one("@!P0 BRA `(.L_x_2)", function="load_bits"),
    one("LDG.E.STRONG.SYS R2, [R4]", label=".L_x_1", function="load_bits"),
    one("@P1 BRA `(.L_x_1)", function="load_bits"),
    one("LDSM.16.M88.4 R8, [R6]", label=".L_x_2"),
    one("HMMA.16816.F32.BF16 R0, R8, R2, R0", function="multiply_add"),
    one("MUFU.EX2 R3, R0", function="sigmoid"),
    one("STG.E [R4], R3", function="publish"),
    one("IADD3 R5, R5, 1, RZ"),
    one("@P2 BRA `(.L_x_0)"),
    one("EXIT"),
]
"""A loop over time with a loop that polls, and the way around it."""


def test_blocks_and_loops_of_a_listing():
    blocks = basic_blocks(POLLED)
    assert [len(block.instructions) for block in blocks] == [1, 2, 2, 6, 1]
    assert [block.successors for block in blocks] == [[1], [3, 2], [2, 3], [1, 4], []]
    assert loops(blocks) == [(1, frozenset({1, 2, 3})), (2, frozenset({2}))]
    assert time_loop(blocks) == (1, frozenset({1, 2, 3}))


def test_a_step_is_the_loop_without_repeated_polls_which_are_its_detours():
    step = step_of(POLLED)
    assert step.code == [*POLLED[1:3], *POLLED[5:11]]
    assert step.detours == {1: POLLED[3:5]}
    assert step.phases == ["poll", "poll", "load", "products", "activations", "store", "rest", "rest"]
    assert set(step.phases) <= set(PHASES)


def test_an_instruction_of_no_known_function_has_the_phase_of_the_one_before():
    code = [one("IADD3 R0"), one("FADD R1", function="sum_parts"), one("FADD R2"), one("STG.E", function="publish")]
    assert phases_of(code, last_poll=-1) == ["ahead", "sums", "sums", "store"]


GROUPS = ("PRODUCTS", "SUMS", "POLLS", "LOADS", "STREAMS", "ONCE", "EQUATIONS", "STORES", "ARRIVES", "ONE_THREAD")


@pytest.mark.parametrize("group", GROUPS)
def test_every_name_of_a_group_is_a_function_of_the_kernels(group):
    sources = Path(lstm_triton_kernels.__file__).parent.glob("*.py")
    defined = {
        node.name for path in sources for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }  # fmt: skip
    assert getattr(steps, group) and not getattr(steps, group) - defined


# The machine


def test_stall_counts_are_obeyed():
    assert issued(run([one("NOP", stall=6), one("NOP", stall=2), one("NOP")])) == [0, 6, 8]


def test_a_scoreboard_is_waited_for():
    code = [one("MUFU.EX2 R0, R1", write=3), one("NOP"), one("FADD R0, R0, R1", wait=0b001000)]
    assert issued(run(code)) == [0, 1, H100.mufu]
    assert issued(run([*code[:2], replace(code[2], wait=0)])) == [0, 1, 2]


def test_a_sub_partition_issues_one_instruction_a_cycle():
    block = run([one("NOP")] * 3, warps=5)
    assert issued(block, 1) == [0, 1, 2]
    assert not set(issued(block, 0)) & set(issued(block, 4))
    assert sorted(issued(block, 0) + issued(block, 4)) == list(range(6))


@pytest.mark.parametrize(
    "opcode, apart",
    [("IADD3", 2), ("IMAD", 2), ("MUFU.EX2", 8), ("FFMA", 1), ("HMMA.16816.F32", 7), ("HMMA.1688.F32.TF32", 7)],
)
def test_pipes_take_their_time(opcode, apart):
    assert issued(run([one(opcode), one(opcode)])) == [0, apart]


def test_the_last_warp_releases_a_barrier():
    block = run([one("NOP"), one("NOP"), one("BAR.SYNC"), one("NOP")], warps=5)
    came, went = ([issued(block, warp)[n] for warp in range(5)] for n in (2, 3))
    release = max(came) + H100.barrier[0] + H100.barrier[1] * 5
    assert min(came) < max(came) and min(went) == release


def test_bank_conflicts_hold_the_path_and_delay_the_result():
    code = [one("LDS R0, [R1]", write=0), one("FADD R0, R0, R0", wait=1)]
    assert issued(run(code)) == [0, H100.shared]
    assert issued(run(code, wavefronts={0: 5.0})) == [0, H100.shared + 4]
    second = [issued(run(code, warps=2, wavefronts=waves), 1)[1] for waves in ({}, {0: 5.0})]
    assert second == [H100.shared + 1, H100.shared + 4 + 5]


POLL = [
    one("LDG.E.STRONG.SYS R0, [R2]", write=0, function="load_bits"),
    one("@P0 BRA", wait=1, function="load_bits"),
]


def poll(skew, iterations=6):
    code = [*POLL, one("STG.E [R2], R0", function="publish"), *[one("NOP", stall=15)] * 4]
    phases = ["poll", "poll", "store", "rest", "rest", "rest", "rest"]
    return run(code, phases=phases, detours={1: POLL}, iterations=iterations, machine=replace(H100, skew=skew))


def test_a_poll_that_comes_too_early_is_repeated():
    together, later = poll(0), poll(600)
    assert not together.failed_polls
    assert all(later.failed_polls[n] for n in range(1, 6))
    assert later.critical(4)[0] > together.critical(4)[0]
    assert later.critical(4)[1]["again"] and not together.critical(4)[1]["again"]


@pytest.mark.parametrize("skew", [0, 600])
def test_the_phases_of_an_iteration_add_up(skew):
    cycles, phases = poll(skew).critical(4)
    assert cycles == sum(phases.values()) and set(phases) <= set(PHASES)


def test_what_is_read_is_shared_among_the_thread_blocks():
    step = step_of(POLLED)
    alone, many = (ThreadBlock(step, 1, H100, readers, False, 1, 1.0) for readers in (1, 128))
    assert alone.port == H100.port and many.port == H100.l2_bytes / 128


def test_streamed_weights_come_at_the_rate_of_l2_or_of_device_memory():
    """A load of 16 bytes a lane is 512 bytes; the last instruction waits for all loads before it."""

    def took(opcode, loads, streams=1):
        code = [one(opcode, write=0, function="load_streamed") for _ in range(loads)] + [one("NOP", wait=1)]
        step = Step(code, ["ahead"] * len(code), {}, {})
        block = ThreadBlock(step, 1, H100, readers=128, counter=False, row_blocks=1, fill=1.0, streams=streams)
        block.run(1)
        return issued(block)[-1]

    of_l2, of_memory = "LDG.E.128.STRONG.GPU R4, [R2]", "LDG.E.EF.128 R4, [R2]"
    assert took(of_l2, 1) == int(H100.l2 + 512 / 40) and took(of_memory, 1) == int(H100.dram + 512 / 1910)
    assert took(of_l2, 11) - took(of_l2, 1) == pytest.approx(10 * 512 / 40, abs=1)
    assert took(of_memory, 11, streams=128) - took(of_memory, 1, streams=128) == pytest.approx(
        10 * 512 * 128 / 1910, abs=1
    )
    assert pytest.approx(3352, rel=1e-3) == H100.memory_bytes * H100.clock_ghz


def test_a_simulation_that_does_not_end_is_given_up():
    machine = replace(H100, skew=1 << 30)
    with pytest.raises(RuntimeError, match="has not ended"):
        run([*POLL, one("NOP")], detours={1: POLL}, machine=machine, iterations=2)


def test_an_instruction_that_the_model_does_not_have_is_an_error():
    with pytest.raises(NotImplementedError, match="has no HGMMA"):
        run([one("HGMMA.64x8x16.F32 R24, R4, gdesc[UR4], R24"), one("NOP")])


# Bank conflicts


@pytest.mark.parametrize(
    "opcode, waves",
    [("LDS", 1), ("LDS.128", 4), ("STS.64", 2), ("LDS.U16", 1), ("LDSM.16.M88.4", 4), ("LDSM.16.M88", 1)],
)
def test_wavefronts_without_conflicts(opcode, waves):
    assert needed_wavefronts(one(f"{opcode} R0, [R1]")) == waves


@pytest.mark.parametrize(
    "op, size",
    [
        ("ld.shared.v2.b32", 8),
        ("st.shared.b16", 2),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", 16),
        ("ld.shared.u8", 1),
    ],
)
def test_the_bytes_of_an_operation_of_ptx(op, size):
    assert bytes_of(op) == size


def test_an_access_gets_the_mean_wavefronts_of_the_accesses_most_like_it():
    accesses = [
        Access("ld", "rows.py:5", 16, 8.0), Access("ld", "rows.py:5", 16, 4.0), Access("ld", "rows.py:5", 4, 1.0),
        Access("ld", "sync.py:9", 4, 2.0), Access("ldmatrix", "rows.py:5", 16, 4.0),
    ]  # fmt: skip
    code = [
        one("LDS.128 R0, [R1]", function="/k/rows.py", line=5),  # operation, line and size: 8 and 4
        one("LDS.64 R0, [R1]", function="/k/sync.py", line=9),  # the line
        one("LDS R0, [R1]", function="/k/other.py", line=1),  # the size: 1 and 2
        one("LDS.64 R0, [R1]", function="/k/other.py", line=1),  # the operation
        one("STS R0, [R1]", function="/k/rows.py", line=5),  # nothing alike
        one("LDG.E R0, [R1]", function="/k/rows.py", line=5),  # no access to shared memory
        one("LDSM.16.M88.4 R0, [R1]", function="/k/rows.py", line=5),
    ]
    assert wavefronts_of(code, accesses) == {0: 6.0, 1: 2.0, 2: 1.5, 3: 3.75, 6: 4.0}
