"""How long one time step of a persistent kernel takes on an H100, simulated from its machine code."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lstm_triton_kernels.sizes import ceil_div

from benchmarks.simulator.conflicts import SHARED, needed_wavefronts, wavefronts_of
from benchmarks.simulator.kernels import Compiled, accesses_of
from benchmarks.simulator.machine import H100, Machine, ThreadBlock
from benchmarks.simulator.sass import disassemble
from benchmarks.simulator.step import PHASES, step_of

ITERATIONS = 8
SETTLED = 3
"""Iterations before the first one that counts."""


class StepTime(NamedTuple):
    """A simulated time step, of all row blocks of a program.

    - cycles, us: simulated; phases: cycles by phase (step.py)
    - stalls: the sum of the stall counts, what one warp takes alone on a machine without any latency
    - counts: instructions of a warp by name
    - wavefronts, needed: of all accesses to shared memory, and without bank conflicts
    - early: polls that came too early
    """

    cycles: float
    us: float
    phases: dict[str, float]
    stalls: int
    counts: Counter[str]
    wavefronts: float
    needed: int
    early: float


def simulate(compiled: Compiled, machine: Machine = H100, conflicts: bool = True) -> StepTime:
    """Simulate a step of a compiled kernel: as many iterations of its time loop as a program has row blocks.

    Without `conflicts`, as if shared memory had no bank conflicts.
    """
    plan = compiled.plan
    step = step_of(disassemble(compiled.cubin))
    if conflicts:
        step.wavefronts = wavefronts_of(step.code, accesses_of(compiled))
    blocks = plan.blocks_per_program
    fill = min(plan.rows, compiled.launch.layer.B) / plan.block_b
    readers, counter = ceil_div(plan.programs, plan.together), plan.wait == "counter"
    by_warp = not plan.exact and plan.parts == 1 < plan.num_warps
    streams = plan.unit_programs * plan.directions  # others with the same units read the same weights
    thread_block = ThreadBlock(
        step, plan.num_warps, machine, readers, counter, blocks, fill, plan.together, by_warp, streams
    )
    thread_block.run(ITERATIONS)
    counted = range(SETTLED, ITERATIONS)
    spent: Counter[str] = Counter()
    total = 0
    for n in counted:
        cycles, phases = thread_block.critical(n)
        total += cycles
        spent.update(phases)
    per_step = blocks / len(counted)
    needed = {n: needed_wavefronts(one) for n, one in enumerate(step.code) if one.name in SHARED}
    waves = sum(step.wavefronts.get(n, without) for n, without in needed.items())
    return StepTime(
        cycles=total * per_step,
        us=total * per_step / machine.clock_ghz / 1e3,
        phases={name: spent[name] * per_step for name in PHASES},
        stalls=blocks * sum(one.stall for one in step.code),
        counts=Counter({name: blocks * count for name, count in Counter(one.name for one in step.code).items()}),
        wavefronts=blocks * plan.num_warps * waves,
        needed=blocks * plan.num_warps * sum(needed.values()),
        early=sum(thread_block.failed_polls[n] for n in counted) * per_step,
    )
