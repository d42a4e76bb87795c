"""Offsets beyond 2^31 and 2^32 elements: the last rows of a batch that fills a time step up to what is allowed.

The compiled kernels are executed as in `test_executed`; of the batch there are only the rows that the programs have
(tests/emulator/far.py). The persistent kernels get the largest batch for which the planner has plans. An address that
is computed in 32 bits lies outside of all tensors, or in another row: faults of this kind are planted, and seen.
"""

import importlib
import re
import shutil
from bisect import bisect
from pathlib import Path

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

import lstm_triton_kernels
from lstm_triton_kernels.planner import why_not
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.sizes import Layer

from tests.compiled import layers
from tests.compiled.layers import DTYPES, Case
from tests.emulator.far import Far
from tests.emulator.launches import KERNELS

STEPWISE = 2**34
"""Elements that the gates of a time step have here: those kernels compute offsets within a step in 64 bits, too. Only
the number of a row has 32 bits."""

MAX_POLLS = 50


def most_rows(case):
    """Return the rows of the largest batch for which there is a plan; step by step so many as STEPWISE says."""
    if case.stepwise:
        return min(STEPWISE // (len(case.spec.gates) * case.H), 2**30)
    sizes = Layer(case.spec, case.T, 1, case.H, case.D, DTYPES[case.dtype], case.precision, P=case.P)
    return bisect(range(1, 2**31), False, key=lambda B: why_not(sizes._replace(B=B)) is not None)


def executed(case):
    """Return what came of a case in the largest batch, and the largest offset of each argument of each kernel."""
    emulation = case.emulation()
    emulation.far, emulation.max_polls = Far(most_rows(case)), MAX_POLLS
    return layers.run(case, emulation), emulation.far.reached


GLUON = Case("standard", "bf16", 5, 5, 24, 2, lengths=True).with_blocks_of(3)
SEVERAL = Case("coupled", "tf32", 5, 3, 72, 2, wait="data")
FULL = Case("full", "fp16", 5, 3, 40, 2, wait="data", lengths=True).with_fields(tiled=True)
TURNS = Case("diagonal", "bf16", 5, 11, 72, 2, wait="data", lengths=True).with_blocks_of(3, row_programs=2)
FEW_UNITS = Case("coupled", "bf16", 8, 3, 2, 2, lengths=True, resets=True)
"""So many rows that resets, which have no units, reach as far; and that the exchange buffer does within one step."""
STREAMED = Case("standard", "bf16", 5, 5, 72, 2, wait="data").with_streamed_weights(16, 8, 2)
WITHIN = Case("full+current", "bf16", 5, 5, 40, 2, wait="data", P=24, lengths=True).with_blocks_of(3)
RULED = Case(
    "coupled", "fp16", 5, 11, 40, 2, wait="data", P=36, lengths=True,
    rules=Rules.rounded(0.4, 0.3, 0.3, 0.2, 0.0, 0.6),
).with_blocks_of(3, row_programs=2)  # fmt: skip
NORMALIZED = Case("norm", "bf16", 5, 11, 24, 2, wait="data", lengths=True).with_blocks_of(3, row_programs=2)
PADDED_UNITS = Case("coupled", "fp32", 5, 3, 9, 2)
"""The rows of the plain kernels' hidden states are longer than those of the gates."""
ALONE = Case("standard", "fp32", 5, 5, 8, 2, lengths=True)
DATA = Case("full", "fp32", 5, 3, 40, 2, wait="data", lengths=True)
COUNTER = Case("coupled+diagonal", "fp32", 5, 5, 40, 2, wait="counter").with_blocks_of(3)
PLAIN_TURNS = Case("standard", "fp32", 5, 11, 40, 2, wait="data", lengths=True).with_blocks_of(3, row_programs=2)
PLAIN_WITHIN = Case("full+current", "fp32", 5, 5, 40, 2, wait="counter", P=24).with_blocks_of(3)
DATA_WITHIN = Case("coupled", "fp32", 5, 5, 40, 2, wait="data", P=24, lengths=True)
FEW_PLAIN_UNITS = Case("coupled", "fp32", 40, 3, 2, lengths=True, resets=True)
STEPS = Case("standard", "bf16", 5, 17, 24, 2, stepwise=True)
RESET_STEPS = Case("coupled+diagonal", "fp16", 5, 5, 2, 2, stepwise=True, resets=True)
FULL_STEPS = Case("full+current", "fp32", 5, 5, 24, stepwise=True, lengths=True)

CASES = [
    GLUON, SEVERAL, FULL, TURNS, FEW_UNITS, STREAMED, RULED, NORMALIZED, PADDED_UNITS, ALONE, DATA, COUNTER,
    PLAIN_TURNS, FEW_PLAIN_UNITS, STEPS, RESET_STEPS, FULL_STEPS, WITHIN, PLAIN_WITHIN, DATA_WITHIN,
]  # fmt: skip
QUICK = {GLUON, RULED, NORMALIZED, FEW_UNITS, TURNS, PADDED_UNITS, DATA, FEW_PLAIN_UNITS, STEPS, FULL_STEPS, WITHIN}

OF_ALL_STEPS = {
    "gates_ptr", "d_gates_ptr", "gate_input_ptr", "cells_ptr", "output_ptr", "hidden_ptr", "grad_output_ptr",
    "grad_cells_ptr", "exchange_ptr", "peephole_exchange_ptr", "projection_exchange_ptr", "d_hidden_ptr",
    "unprojected_ptr", "rules.0", "rules.2", "norm.product_exchange", "norm.cell_exchange", "norm.products",
}  # fmt: skip
"""Arguments with an axis of time steps; beside resets, which reach as far only with few units."""


def marked(values, quick):
    marks = {value: [] if value in quick else [pytest.mark.long] for value in values}
    return [pytest.param(value, id=str(value), marks=own) for value, own in marks.items()]


@pytest.mark.parametrize("case", marked(CASES, QUICK))
def test_offsets_beyond_32_bits_are_right(case):
    outcome, reached = executed(case)
    assert not outcome.wrong
    far = {place: offset / 2**31 for place, offset in reached.items() if place[1] in OF_ALL_STEPS}
    assert min(far.values()) > 1 and max(far.values()) > 4, far
    if case.H == 2:
        assert min(offset for (_, name), offset in reached.items() if name == "resets_ptr") > 2**31


def test_the_exchange_buffer_of_one_step_may_be_as_large():
    """The planner does not count its padding: in a slot, too, offsets are computed in 64 bits."""
    outcome, reached = executed(FEW_UNITS)
    assert not outcome.wrong
    slots = FEW_UNITS.D * (FEW_UNITS.T + 1)
    exchanged = [offset for (_, name), offset in reached.items() if name == "exchange_ptr"]
    assert len(exchanged) == 2 and min(exchanged) > slots * 2**32


FORWARD, BACKWARD = "exchanged_forward", "exchanged_backward"
PLAIN_FORWARD, PLAIN_BACKWARD = "persistent_forward", "persistent_backward"
CUT = r"(\g<0>).to({0}.int32)"
"""In place of a product: what 32 bits hold of it."""

OF_TIME = r"\bt\.to\(tl\.int64\)(?:\[:, None\])? \* stride"

OF_RESETS = r"\bt\.to\({}\.int64\) \* B(?= \+ row)"

FAULTS = {
    "forward, the time of a step": (FORWARD, "rows", OF_TIME, GLUON),
    "backward, the time of a step": (BACKWARD, "rows", OF_TIME, GLUON),
    "plain forward, the time of a step": (PLAIN_FORWARD, "rows", OF_TIME, ALONE),
    "plain backward, the time of a step": (PLAIN_BACKWARD, "rows", OF_TIME, ALONE),
    "forward, the slot of a step": (FORWARD, FORWARD, r"\bn\.to\(gl\.int64\) \* slot_stride", GLUON),
    "backward, the slot of a step": (BACKWARD, BACKWARD, r"\bn\.to\(gl\.int64\) \* slot_stride", GLUON),
    "forward, a row block in a slot": (FORWARD, FORWARD, r"\bb\.to\(gl\.int64\) \* block_stride", FEW_UNITS),
    "backward, a row block in a slot": (BACKWARD, BACKWARD, r"\bb\.to\(gl\.int64\) \* block_stride", FEW_UNITS),
    "forward, a slot": (FORWARD, FORWARD, r"row_blocks\.to\(gl\.int64\) \* block_stride", FEW_UNITS),
    "backward, a slot": (BACKWARD, BACKWARD, r"row_blocks\.to\(gl\.int64\) \* block_stride", FEW_UNITS),
    "forward, the slots of a direction": (FORWARD, FORWARD, r"side \* \(T \+ 1\) \* slot_stride", GLUON),
    "backward, the slots of a direction": (BACKWARD, BACKWARD, r"side \* \(T \+ 1\) \* slot_stride", GLUON),
    "forward, the gates of a direction": (FORWARD, FORWARD, r"side \* T \* gates_stride", GLUON),
    "backward, the gates of a direction": (BACKWARD, BACKWARD, r"side \* T \* gates_stride", GLUON),
    "forward, the cells of a direction": (FORWARD, FORWARD, r"side \* \(T \+ 1\) \* cells_stride", GLUON),
    "backward, the cells of a direction": (
        BACKWARD,
        BACKWARD,
        r"\(side \* \(T \+ 1\) .*\) \* cells_stride",
        GLUON,
    ),
    **{
        f"{name}, the slot of a step of the exchange for {of}": (
            kernel,
            kernel,
            rf"\(n\.to\(gl\.int64\) \* row_blocks \+ b\) \* {of}_stride",
            WITHIN,
        )
        for name, kernel in (("forward", FORWARD), ("backward", BACKWARD))
        for of in ("peephole", "projection")
    },
    "forward, the codes of a direction": (FORWARD, FORWARD, r"side \* T \* cells_stride", RULED),
    "backward, the codes of a direction": (BACKWARD, BACKWARD, r"side \* T \* cells_stride", RULED),
    "backward, the clipped of a direction": (BACKWARD, BACKWARD, r"side \* T \* states_stride", RULED),
    "forward, steps beyond a row's length": (FORWARD, FORWARD, r"output_stride \* n\b", FEW_UNITS),
    "backward, steps beyond a row's length": (BACKWARD, BACKWARD, r"gates_stride \* n\b", FEW_UNITS),
    "forward, resets": (FORWARD, FORWARD, OF_RESETS.format("gl"), FEW_UNITS),
    "backward, resets": (BACKWARD, BACKWARD, OF_RESETS.format("gl"), FEW_UNITS),
    "plain forward, the slot of h_0": (PLAIN_FORWARD, PLAIN_FORWARD, r"T \* hidden_stride", DATA),
    "plain forward, resets": (PLAIN_FORWARD, PLAIN_FORWARD, OF_RESETS.format("tl"), FEW_PLAIN_UNITS),
    "plain backward, resets": (
        PLAIN_BACKWARD,
        PLAIN_BACKWARD,
        OF_RESETS.format("tl"),
        FEW_PLAIN_UNITS,
    ),
    "plain backward, the gates of a direction": (PLAIN_BACKWARD, PLAIN_BACKWARD, r"side \* T \* gates_stride", ALONE),
    "cell forward, gates": ("cell_forward", "cell", r"\bt\.to\(tl\.int64\) \* B \* \(F \+ 3\) \* H", STEPS),
    "cell forward, h_t": ("cell_forward", "cell", r"hidden_t\.to\(tl\.int64\) \* stride_ht", STEPS),
    "cell forward, c_t": ("cell_forward", "cell", r"current\.to\(tl\.int64\) \* B \* H", STEPS),
    "cell forward, a row": ("cell_forward", "cell", r"row\[:, None\] \* H", STEPS),
    "cell backward, gates": ("cell_backward", "cell", r"\bt\.to\(tl\.int64\) \* B \* \(F \+ 3\) \* H", STEPS),
    "cell backward, c_{t-1}": ("cell_backward", "cell", r"previous\.to\(tl\.int64\) \* B \* H", STEPS),
    "cell backward, the gradient of h_t": ("cell_backward", "cell", r"\bt\.to\(tl\.int64\) \* stride_gt", STEPS),
    "cell backward, resets": ("cell_backward", "cell", OF_RESETS.format("tl"), RESET_STEPS),
    "gate product, gate inputs": ("gate_preactivations", "gates", r"\bt\.to\(tl\.int64\) \* B \* GATES \* H", STEPS),
    "gate product, h_{t-1}": ("gate_preactivations", "gates", r"h_t\.to\(tl\.int64\) \* stride_ht", STEPS),
    "gate product, a row": ("gate_preactivations", "gates", r"row\[:, None\] \* stride_ab", STEPS),
    "gate product, c_{t-1}": ("gate_preactivations", "gates", r"c_slot\.to\(tl\.int64\) \* B \* H", FULL_STEPS),
    "output peephole, c_t": ("output_peephole", "gates", r"c_slot\.to\(tl\.int64\) \* B \* H", FULL_STEPS),
}
"""By name: the kernel that is changed, the file and the product in it that is cut to 32 bits, and the case."""

QUICK_FAULTS = {
    "forward, the time of a step", "backward, the slot of a step", "plain backward, the time of a step",
    "plain forward, resets", "cell forward, gates", "gate product, a row",
}  # fmt: skip


@pytest.mark.parametrize("name", marked(FAULTS, QUICK_FAULTS))
def test_an_offset_that_is_computed_in_32_bits_is_seen(name, tmp_path, monkeypatch):
    kernel, file, product, case = FAULTS[name]
    full_name = f"{kernel}_kernel"
    owner = next(module for module, names in KERNELS.items() if full_name in names)
    source = getattr(owner, full_name).fn.__module__.removeprefix("lstm_triton_kernels")
    package = f"planted_{re.sub(r'[^a-z]', '_', name)}"
    root = tmp_path / package
    shutil.copytree(Path(lstm_triton_kernels.__file__).parent, root, ignore=shutil.ignore_patterns("__pycache__"))
    for path in root.glob("*.py"):
        path.write_text(path.read_text().replace("lstm_triton_kernels", package))
    path = root / f"{file}.py"
    text, count = re.subn(product, CUT.format("gl" if file.startswith("exchanged") else "tl"), path.read_text())
    assert count
    path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    planted = importlib.import_module(package + source)
    monkeypatch.setattr(owner, full_name, getattr(planted, full_name))
    outcome, _ = executed(case)
    assert "memcheck" in outcome.wrong or "beyond" in outcome.wrong
