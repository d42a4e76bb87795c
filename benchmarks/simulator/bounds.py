"""How far the simulated step of one shape moves with the machine's constants: all at their best, at their worst, each.

`python -m benchmarks.simulator.bounds` takes B=16 H=768 bfloat16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.simulator.kernels import RELEASE, Case, compile_case
from benchmarks.simulator.machine import H100
from benchmarks.simulator.step_time import describe, simulate, tile

BEST = replace(
    H100, l2=0, port=1e9, l2_bytes=1e12, shared=19, shuffle=20, mufu=14, redux=20, barrier=(8, 1), hmma_gap=4,
    constant=8, branch=0, operand_read=4, fence=0, dram=0,
)  # fmt: skip
WORST = replace(
    H100, l2=470, port=38, l2_bytes=3942, shared=29, shuffle=25, mufu=30, redux=40, barrier=(21, 2), hmma_gap=8,
    branch=12, operand_read=20, fence=424, skew=300,
)  # fmt: skip
EACH: dict[str, Any] = dict(
    l2=470, port=32.0, l2_bytes=2560.0, shared=29, mufu=40, barrier=(21, 2), hmma_gap=8, skew=600, fence=764, dram=900
)
"""One constant that is worse than assumed, the others as assumed."""

CASES = (
    Case(16, 768, backward=False, wait="data"),
    Case(16, 768, backward=False, wait="counter"),
    Case(16, 768, backward=True, wait="counter"),
)


def main() -> None:
    """Print the simulated cycles of a step under other constants."""
    print(f"Simulated cycles of a step, Triton {RELEASE}")
    for case in CASES:
        compiled = compile_case(case)
        best, usual, worst = (simulate(compiled, machine).cycles for machine in (BEST, H100, WORST))
        print(
            f"{describe(case)} {tile(compiled.plan)}: best {best:.0f}, as assumed {usual:.0f}, worst {worst:.0f}",
            flush=True,
        )
        for constant, value in EACH.items():
            change = simulate(compiled, replace(H100, **{constant: value})).cycles - usual
            print(f"    {constant}={value}: {change:+.0f}", flush=True)


if __name__ == "__main__":
    main()
