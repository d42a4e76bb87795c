"""Faults planted in the compiled kernels, each of which must be seen: what `test_executed` would not let pass."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from lstm_triton_kernels import sequence_persistent

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


EARLY = {
    "exchanged_forward_kernel": (
        "publish_state(slot_ptr + slot_stride, own_place, c, c, h_mask, c_mask, HIDDEN, V, TILED, FULL, PRECISION)"
    ),
    "exchanged_backward_kernel": (
        "publish_gates(slot_ptr, first_unit, rows, by_i, by_f, by_g, by_o, H, G, P, V, TILED, ROWS, UNITS, PARTS, "
        "WARPS, PRECISION)"
    ),
}
"""By kernel, a line that is inserted before its product: something else is published first."""


@pytest.mark.parametrize("weak", [False, True])
@pytest.mark.parametrize("name", EARLY)
def test_a_value_that_is_published_early_is_seen(name, weak, tmp_path, monkeypatch):
    """Others take it for the one that they wait for. The source is changed, not the PTX."""
    module = sys.modules[getattr(sequence_persistent, name).__module__]
    before, inserted = "        if STREAMED > 0:\n            recurrent, ", f"        {EARLY[name]}\n"
    source = Path(module.__file__).read_text()
    assert source.count(before) == 1
    path = tmp_path / f"early_{name}.py"
    path.write_text(source.replace(before, inserted + before))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    early = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, early)
    spec.loader.exec_module(early)
    case = replace(faults.POLLED, weak=weak)
    assert not faults.control(case)
    monkeypatch.setattr(sequence_persistent, name, getattr(early, name))
    assert faults.seen(case, None)


def test_the_quick_faults_are_among_all():
    assert {fault.name for fault in faults.faults()} >= QUICK
