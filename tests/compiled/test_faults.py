"""Faults planted in the compiled kernels, each of which must be seen: what `test_executed` would not let pass."""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from tests.compiled import faults

QUICK = {
    "forward, an mma's operand registers swapped",
    "forward, no turn of a poll",
    "backward, a poll that sees one half of a word",
    "backward, a st.global without its mask",
    "no turn of the data wait",
    "a st.global without its mask",
    "wgmma waited for too few groups",
}


def planted():
    for fault in faults.faults():
        marks = [] if fault.name in QUICK else [pytest.mark.long]
        yield pytest.param(fault, id=fault.name, marks=marks)


@pytest.mark.parametrize("fault", list(planted()))
def test_a_planted_fault_is_seen(fault):
    assert not faults.control(fault.case)
    assert faults.seen(fault.case, fault.change)


def test_the_quick_faults_are_among_all():
    assert {fault.name for fault in faults.faults()} >= QUICK
