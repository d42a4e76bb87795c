"""The tests of the emulator reach every opcode that it translates; and what it counts."""

import ast
import re
from pathlib import Path

import pytest

from tests.emulator import Fault
from tests.emulator.gangs import CLOCKS
from tests.emulator.machine import Machine
from tests.emulator.opcodes_of_effects import EFFECTS
from tests.emulator.opcodes_of_values import VALUES
from tests.emulator.small_kernels import ptx_of, run, zeros
from tests.emulator.translate import program


def texts(path):
    """The strings in a test's code, f-strings with the values that they take left out, docstrings apart."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""  # a docstring
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_opcode_is_in_a_test():
    here = Path(__file__)
    written = [text for path in here.parent.glob("test_*.py") if path != here for text in texts(path)]
    statements = re.findall(r"(?<![\w.%])([a-z]\w+)\.", "\n".join(written))
    parts = [
        text.split(".")[0] for text in written if re.fullmatch(r"[a-z]\w+(\.\w+)*", text)
    ]  # "mul.lo", put together
    assert not {*VALUES, *EFFECTS} - {*statements, *parts}
    assert not VALUES.keys() & EFFECTS.keys()


def test_an_opcode_that_is_not_there_is_refused():
    with pytest.raises(Fault, match=r"no such opcode here: .*popc"):
        run("popc.b32 %r1, %tid;")


def test_a_kernel_is_translated_once():
    ptx = ptx_of("mov.b32 %r1, 0;", [zeros(1)])
    assert program(ptx, False) is program(ptx, False)
    assert program(ptx, False) is not program(ptx, True)


def test_segments_end_at_what_others_may_see():
    body = (
        "mov.b32 %r1, 0; ld.volatile.global.b32 %r2, [%d0]; add.u32 %r1, %r1, %r2; bar.sync 0; add.u32 %r1, %r1, %r2;"
    )
    segments = program(ptx_of(body, [zeros(1)]), False).kernel.segments
    assert [segment.end for segment in segments] == ["fall", "barrier", "return", "nothing"]


@pytest.mark.parametrize(
    "text, words", [("guarded", "@%p1 ret;"), ("barrier", "bar.sync 1;"), ("behind", "ret; mov.b32 %r1, 0;}\n")]
)
def test_what_the_parser_does_not_read_is_refused(text, words):
    with pytest.raises(Fault, match=text):
        program(ptx_of(words, []).replace("\nret;\n}", "\n}") if text == "behind" else ptx_of(words, []), False)


def test_operands_and_arguments_that_do_not_fit_are_refused():
    with pytest.raises(Fault, match="operand nowhere"):
        run("mov.b32 %r1, nowhere;")
    with pytest.raises(Fault, match="no such register here: %smid"):
        run("mov.u32 %r1, %smid;")
    with pytest.raises(Fault, match="wide, wanted 64"):
        run("mov.b64 %d1, %r1;")
    with pytest.raises(Fault, match="0 arguments for 3 parameters"):
        Machine(ptx_of("mov.b32 %r1, 0;", [1, 2, 3]), (1,), [], 0)


def test_the_clock_grows():
    body = "mov.u32 %r20, %clock;\n$again:\nmov.u32 %r1, %clock; sub.u32 %r1, %r1, %r20; setp.lt.u32 %p1, %r1, 2500;"
    passed = zeros(1)
    run(body + "@%p1 bra $again; st.global.b32 [%d0], %r1;", passed)
    assert passed.item() == 3 * CLOCKS


def counted(body, threads=32):
    """The counts of one CTA."""
    place = "shl.b32 %r20, %tid, 2; mov.u32 %r21, global_smem; add.u32 %r20, %r20, %r21; mul.wide.u32 %d20, %tid, 4;"
    machine = run(place + "add.s64 %d20, %d20, %d0;" + body, zeros(2048), threads=threads, shared=8192, stats=True)
    return machine.statistics()[0]


@pytest.mark.parametrize("stride, ways", [(1, 1), (2, 2), (8, 8), (32, 32), (33, 1)])
def test_bank_conflicts_are_counted(stride, ways):
    """A stride of so many words: lanes in one bank take turns."""
    body = f"mul.lo.u32 %r22, %tid, {4 * stride}; add.u32 %r22, %r22, %r21; st.shared.b32 [%r22], %tid;"
    found = counted(body + "ld.shared.b32 %r1, [%r22];")
    for kind in ("st.shared", "ld.shared"):
        assert (found[f"{kind} phases"], found[f"{kind} wavefronts"]) == (1, ways)


@pytest.mark.parametrize("n", [2, 4])
def test_wide_accesses_take_a_wavefront_for_each_128_bytes(n):
    registers = "{" + ", ".join(["%tid"] * n) + "}"
    found = counted(
        f"mul.lo.u32 %r22, %tid, {4 * n}; add.u32 %r22, %r22, %r21; st.shared.v{n}.b32 [%r22], {registers};"
    )
    assert (found["st.shared phases"], found["st.shared wavefronts"], found["st.shared"]) == (n, n, 1)


@pytest.mark.parametrize("stride, ways", [(16, 1), (32, 2), (128, 8), (144, 1)])
def test_bank_conflicts_of_matrices_are_counted(stride, ways):
    """Rows of 16 bytes, so many bytes apart."""
    fill = "mov.b32 %r1, 0;\n$fill:\nshl.b32 %r2, %r1, 7; add.u32 %r2, %r2, %r20; st.shared.b32 [%r2], %tid;"
    fill += "add.u32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 60; @%p1 bra $fill;"
    body = f"mul.lo.u32 %r22, %tid, {stride}; add.u32 %r22, %r22, %r21;"
    found = counted(fill + body + "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r3, %r4, %r5, %r6}, [%r22];")
    assert (found["ldmatrix phases"], found["ldmatrix wavefronts"], found["ldmatrix"]) == (4, 4 * ways, 1)


def test_sectors_are_counted():
    found = counted(
        "ld.global.b32 %r1, [%d20]; mul.wide.u32 %d21, %tid, 32; add.s64 %d21, %d21, %d0; st.global.b32 [%d21], %tid;"
    )
    assert found["ld.global requests"] == found["st.global requests"] == 1
    assert found["st.global sectors"] == 32 and found["ld.global sectors"] in (4, 5)  # tensors lie 16 bytes apart


def test_instructions_are_counted_by_warp_and_loops_that_wait_apart():
    wait = "mov.b32 %r2, 0;\n$wait:\nld.volatile.global.b32 %r1, [%d0]; add.u32 %r2, %r2, 1;"
    wait += "setp.lt.u32 %p1, %r2, 5; @%p1 bra $wait;"
    found = counted("bar.sync 0; fma.rn.f32 %r1, %r20, %r20, %r20;" + wait, threads=96)
    assert (found["bar.sync"], found["fma/alu f32"]) == (3, 3)
    assert found["(instructions of retries)"] == 3 * 5 * 4
