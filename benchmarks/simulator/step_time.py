"""How long one time step of a persistent kernel takes on an H100, simulated from its machine code.

`python -m benchmarks.simulator.step_time` prints the usual shapes under the Triton that is imported, `... 16 768` one
shape (rows, units). A row has the simulated cycles and microseconds of a step; the cycles by phase (step.py); the sum
of the stall counts; the BAR, MUFU and HMMA instructions of a warp; polls that came too early; the wavefronts of all
accesses to shared memory, and those needed without bank conflicts; the simulated cycles without bank conflicts.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import NamedTuple

from lstm_triton_kernels.plan import PersistentPlan

from benchmarks.simulator.conflicts import SHARED, needed_wavefronts, wavefronts_of
from benchmarks.simulator.kernels import RELEASE, Case, Compiled, accesses_of, compile_case
from benchmarks.simulator.machine import H100, Machine, ThreadBlock
from benchmarks.simulator.sass import disassemble
from benchmarks.simulator.step import PHASES, step_of

SHAPES = ((16, 768), (64, 512), (16, 1024), (128, 256), (1, 256), (64, 64), (64, 128))
"""(B, H)."""

ITERATIONS = 8
SETTLED = 3
"""Iterations before the first one that counts."""


class StepTime(NamedTuple):
    """A simulated time step.

    - cycles, us: simulated; phases: cycles by phase
    - stalls: the sum of the stall counts, what one warp takes alone on a machine without any latency
    - counts: instructions of a warp by name, of one row block
    - wavefronts, needed: of all accesses to shared memory of an iteration, and without bank conflicts
    - early: polls of an iteration that came too early
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
    thread_block = ThreadBlock(step, plan.num_warps, machine, plan.programs, plan.wait == "counter", blocks, fill)
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
    return StepTime(
        cycles=total * per_step,
        us=total * per_step / machine.clock_ghz / 1e3,
        phases={name: spent[name] * per_step for name in PHASES},
        stalls=sum(one.stall for one in step.code),
        counts=Counter(one.name for one in step.code),
        wavefronts=plan.num_warps * sum(step.wavefronts.get(n, waves) for n, waves in needed.items()),
        needed=plan.num_warps * sum(needed.values()),
        early=sum(thread_block.failed_polls[n] for n in counted) / len(counted),
    )


NAME = 61
HEAD = (
    f"{'simulated':{NAME}} {'cycles':>6} {'us':>5}  {' '.join(f'{phase[:5]:>5}' for phase in PHASES)}  "
    "stall BAR MUF HMM early  waves needed  without conflicts"
)


def row(name: str, with_conflicts: StepTime, without: StepTime) -> str:
    """Return a row of the table."""
    phases = " ".join(f"{round(with_conflicts.phases[phase]):5}" for phase in PHASES)
    counts = " ".join(f"{with_conflicts.counts[instruction]:3}" for instruction in ("BAR", "MUFU", "HMMA"))
    return (
        f"{name:{NAME}} {with_conflicts.cycles:6.0f} {with_conflicts.us:5.2f}  {phases}  {with_conflicts.stalls:5} "
        f"{counts} {with_conflicts.early:5.1f} {with_conflicts.wavefronts:6.0f} {with_conflicts.needed:6.0f} "
        f"{without.cycles:6.0f}"
    )


def describe(case: Case) -> str:
    """Return what a row is of: release of Triton, shape, variant, pass, wait."""
    direction = "backward" if case.backward else "forward"
    return f"{RELEASE} B={case.B} H={case.H} {case.variant} {direction} {case.wait or 'alone'}"


def tile(plan: PersistentPlan) -> str:
    """Return the plan of a row: units and rows of a tile, warps, programs / row blocks of a program."""
    return f"U{plan.block_u}R{plan.block_b}w{plan.num_warps}x{plan.programs}/{plan.blocks_per_program}"


def main() -> None:
    """Simulate a time step of the persistent kernels on an H100."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator.step_time", description=main.__doc__)
    parser.add_argument("B", type=int, nargs="?", help="rows; without B and H the usual shapes")
    parser.add_argument("H", type=int, nargs="?", help="hidden units")
    parser.add_argument("--variant", default="standard", help="of the cell, by default standard")
    parser.add_argument("--dtype", default="bfloat16", help="by default bfloat16")
    given = parser.parse_args()
    if (given.B is None) != (given.H is None):
        parser.error("B and H, or neither")
    print(HEAD)
    for B, H in SHAPES if given.B is None else ((given.B, given.H),):
        for backward in (False, True):
            for wait in (None,) if H <= 128 else ("data", "counter"):
                case = Case(B, H, backward, wait, given.variant, given.dtype)
                try:
                    compiled = compile_case(case)
                except LookupError as error:
                    print(f"{describe(case)}: {error}")
                    continue
                name = f"{describe(case)} {tile(compiled.plan)}"
                print(row(name, simulate(compiled), simulate(compiled, conflicts=False)), flush=True)


if __name__ == "__main__":
    main()
