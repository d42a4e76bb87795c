"""What a step of the anchor costs, counted by executing one thread block: bank conflicts and barriers.

BOUNDS holds what the kernels have; a change that lowers a number lowers it there, too.
"""

import re
from dataclasses import replace
from typing import NamedTuple

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from benchmarks.simulator.kernels import Case, accesses_of, arguments_of_one, compile_case
from tests.emulator.machine import Machine


class Bound(NamedTuple):
    """In the time loop: barriers; wavefronts of an access to shared memory for each without bank conflicts, at most."""

    barriers: int
    wavefronts: float = 1.0


ANCHOR = Case(16, 768)
BOUNDS = {
    "forward": (ANCHOR, Bound(barriers=2)),
    "backward": (replace(ANCHOR, backward=True), Bound(barriers=2)),
    "forward, TF32": (replace(ANCHOR, dtype="tf32"), Bound(barriers=2)),
    "backward, TF32": (replace(ANCHOR, dtype="tf32", backward=True), Bound(barriers=2)),
}
"""B=16, H=768, bfloat16, on the plan that is ranked first for an H100."""


def barriers_of_a_step(compiled):
    """How many barriers a warp passes in a step: those that it passes in every step, no wait being repeated."""
    machine = Machine(compiled.ptx, (1, 1, 1), arguments_of_one(compiled), compiled.usage.shared, stats=True)
    machine.run()
    (cta,) = machine.ctas
    steps = compiled.launch.layer.T
    assert steps > 1, "else what is ahead of the loop would be taken for a part of it"
    times = [cta.stats[f"segment {n}"] for n, segment in enumerate(machine.kernel.segments) if segment.end == "barrier"]
    return sum(each // (steps * compiled.plan.num_warps) for each in times)


def conflicts_of(accesses):
    """The most wavefronts that an access takes for each that it would take without bank conflicts."""
    return max(access.wavefronts / max(1, access.size // 4) for access in accesses)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_of_the_anchor_has_few_barriers_and_no_bank_conflicts(name):
    case, bound = BOUNDS[name]
    compiled = compile_case(case)
    assert barriers_of_a_step(compiled) <= bound.barriers
    assert conflicts_of(accesses_of(compiled)) <= bound.wavefronts


def test_more_barriers_are_seen():
    """A test of the test: every barrier twice."""
    case, bound = BOUNDS["forward"]
    compiled = compile_case(case)
    doubled = replace(compiled, ptx=re.sub(r"bar\.sync\s+0;", "bar.sync 0;\nbar.sync 0;", compiled.ptx))
    assert barriers_of_a_step(doubled) == 2 * barriers_of_a_step(compiled) > bound.barriers
