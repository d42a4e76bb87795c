"""Every plan of a layer's pass on an H100: the planner's estimate beside the simulated time of a step.

`python -m benchmarks.simulator.candidates B H [--backward] [--variant standard] [--dtype bfloat16]`; of the plans that
differ in how programs wait, those of the usual wait.
"""

from __future__ import annotations

import argparse

from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.plan import candidates, usual_wait

from benchmarks.simulator.kernels import RELEASE, Case, compile_plan
from benchmarks.simulator.step_time import simulate


def main() -> None:
    """Print every plan: its estimate, the simulated time of a step, registers and spilled registers of a thread."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulator.candidates", description=main.__doc__)
    parser.add_argument("B", type=int, help="rows")
    parser.add_argument("H", type=int, help="hidden units")
    parser.add_argument("--backward", action="store_true", help="of the backward pass")
    parser.add_argument("--variant", default="standard", help="of the cell, by default standard")
    parser.add_argument("--dtype", default="bfloat16", help="by default bfloat16")
    given = parser.parse_args()
    layer = Case(given.B, given.H, variant=given.variant, dtype=given.dtype).layer
    direction = "backward" if given.backward else "forward"
    print(f"Triton {RELEASE}, B={given.B} H={given.H} {given.variant} {given.dtype} {direction}")
    print(f"{'plan':50} {'estimate us':>11} {'simulated us':>12} registers spilled")
    plans = [
        plan
        for plan in candidates(layer, given.backward, GPUS["h100"])
        if plan.wait in (None, usual_wait(plan, given.backward))
    ]
    for plan in sorted(plans, key=lambda plan: plan.estimate_us):
        compiled = compile_plan(layer, given.backward, plan)
        us, usage = simulate(compiled).us, compiled.usage
        print(
            f"{plan.describe():50} {plan.estimate_us:11.2f} {us:12.2f} {usage.registers:9} {usage.spilled:7}",
            flush=True,
        )


if __name__ == "__main__":
    main()
