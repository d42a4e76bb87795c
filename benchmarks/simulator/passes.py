"""The passes of a layer as `python -m benchmarks simulate` shows them: text, JSON, every plan, the instructions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import triton
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.settle import Usage

from benchmarks.simulator.kernels import H100 as GPU
from benchmarks.simulator.kernels import Case, compile_case, compile_plan
from benchmarks.simulator.machine import Machine
from benchmarks.simulator.sass import disassemble
from benchmarks.simulator.step import PHASES, step_of
from benchmarks.simulator.step_time import StepTime, simulate


class Pass(NamedTuple):
    """A pass of a layer on the plan that would run, its kernel as compiled, and a simulated step of it."""

    plan: PersistentPlan
    usage: Usage
    time: StepTime


def passes(case: Case) -> dict[str, Case]:
    """Return the case of each pass of a layer, by name."""
    return {"forward": replace(case, backward=False), "backward": replace(case, backward=True)}


def has_plan(case: Case) -> bool:
    """Return whether a pass of the layer has a persistent plan."""
    return any(
        not isinstance(ranked_plans(one.layer, one.backward, GPU, one.wanted), str) for one in passes(case).values()
    )


def simulate_pass(case: Case, machine: Machine) -> Pass:
    """Compile a pass of a layer and simulate a step of it. Raises LookupError with the reason if it has no plan."""
    compiled = compile_case(case)
    return Pass(compiled.plan, compiled.usage, simulate(compiled, machine))


def as_json(case: Case, machine: Machine) -> Iterator[str]:
    """Yield the one line of JSON: both passes, and the release of Triton. A pass without a plan has its `reason`."""
    values: dict[str, Any] = {}
    for name, one in passes(case).items():
        try:
            values[name] = values_of(simulate_pass(one, machine))
        except LookupError as error:
            values[name] = {"reason": error.args[0]}
    yield json.dumps(values | {"triton": triton.__version__})


def values_of(found: Pass) -> dict[str, Any]:
    """Return a pass as values for JSON: of a time step, but registers and spilled ones of a thread."""
    time = found.time
    return dict(
        cycles=round(time.cycles, 1),
        us=round(time.us, 3),
        plan=found.plan.describe(),
        phases={name: round(cycles, 1) for name, cycles in time.phases.items()},
        registers=found.usage.registers,
        spilled=found.usage.spilled,
        barriers=time.counts["BAR"],
        wavefronts=round(time.wavefronts, 1),
        needed=time.needed,
        early=round(time.early, 2),
    )


def as_text(case: Case, machine: Machine) -> Iterator[str]:
    """Yield the lines that show what is simulated: heading, and each pass."""
    yield from of_each(case, machine, described)


def every_plan(case: Case, machine: Machine) -> Iterator[str]:
    """Yield a line for every plan of each pass, in the planner's order: its estimate beside a simulated step."""
    yield from of_each(case, machine, ranked)


def instructions(case: Case, machine: Machine) -> Iterator[str]:
    """Yield the instructions of a time step of each pass, each with its phase.

    A line: phase, address, scoreboards waited for, those set (W: by the result, R: by reading the operands), stall
    count, instruction, source lines.
    """
    yield from of_each(case, machine, listed)


def of_each(case: Case, machine: Machine, lines: Callable[[Case, Machine], Iterator[str]]) -> Iterator[str]:
    """Yield the heading, and the lines of each pass; a pass without a plan has a sentence instead."""
    yield heading(case, machine)
    for name, one in passes(case).items():
        yield ""
        yield f"{name}:"
        try:
            yield from lines(one, machine)
        except LookupError as error:
            yield f"  no persistent kernel: {error.args[0]}"


def heading(case: Case, machine: Machine) -> str:
    """Return what is simulated, in one line."""
    more = f" D={case.D}" * (case.D > 1) + f" P={case.P}" * (case.P > 0)
    skew = f", others publish {machine.skew} cycles later" * (machine.skew > 0)
    return (
        f"One time step of B={case.B} H={case.H}{more} {case.variant} {case.dtype} on an {GPU.name} at "
        f"{machine.clock_ghz} GHz, simulated from the code of Triton {triton.__version__}{skew}"
    )


def described(case: Case, machine: Machine) -> Iterator[str]:
    """Yield the lines of a pass on the plan that would run. Raises LookupError with the reason if it has no plan."""
    plan, usage, time = simulate_pass(case, machine)
    yield f"  plan {plan.describe()}, {plan.num_warps} warps"
    yield f"  simulated {time.cycles:.0f} cycles, {time.us:.2f} us"
    for phase, words in PHASES.items():
        yield f"    {phase:12} {time.phases[phase]:6.0f}  {words}"
    yield f"  {usage.registers} registers a thread, {usage.spilled} spilled"
    named = ", ".join(f"{time.counts[name]} {name}" for name in ("BAR", "MUFU", "HMMA", "FFMA"))
    yield f"  {sum(time.counts.values())} instructions a warp, {time.stalls} cycles by their stall counts: {named}"
    yield f"  {time.wavefronts:.0f} wavefronts of shared memory, {time.needed} without bank conflicts"
    yield f"  {time.early:.1f} polls a step that are repeated"


def ranked(case: Case, machine: Machine) -> Iterator[str]:
    """Yield a line for every plan of a pass. Raises LookupError with the reason if it has no plan."""
    plans = ranked_plans(case.layer, case.backward, GPU, case.wanted)
    if isinstance(plans, str):
        raise LookupError(plans)
    yield f"  {'plan':50} {'estimate us':>11} {'simulated us':>12} registers spilled"
    for plan in plans:
        compiled = compile_plan(case.layer, case.backward, plan)
        us, usage = simulate(compiled, machine).us, compiled.usage
        yield f"  {plan.describe():50} {plan.estimate_us:11.2f} {us:12.2f} {usage.registers:9} {usage.spilled:7}"


def listed(case: Case, machine: Machine) -> Iterator[str]:
    """Yield the instructions of a step of a pass. Raises LookupError with the reason if it has no plan."""
    step = step_of(disassemble(compile_case(case).cubin))
    for one, phase in zip(step.code, step.phases, strict=True):
        yield f"  {phase:12} {one}"
