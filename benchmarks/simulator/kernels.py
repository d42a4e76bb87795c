"""The library's persistent kernels, compiled for an H100 that need not be there, with the plan of a shape."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lstm_triton_kernels
import torch
import triton
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.persistent_forward import persistent_forward_kernel
from lstm_triton_kernels.plan import PersistentPlan, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.regularize import NONE, Rules
from lstm_triton_kernels.sequence_persistent import Launch, kernel_of, launch_without_data
from lstm_triton_kernels.settle import Usage, absent_gpu, first_clean, usage_elsewhere
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.tensor_core_plan import fits
from triton.runtime.interpreter import InterpretedFunction

from benchmarks.simulator.conflicts import Access, count_wavefronts
from benchmarks.suites import STORAGE, rules_of, spec_of

H100 = GPUS["h100"]

SOURCES = Path(lstm_triton_kernels.__file__).parent
"""The folder of the kernels that are simulated."""


STEPS = 1024
"""Time steps of a layer, on which no plan and no time of a step depends."""


@dataclass(frozen=True)
class Case:
    """One pass of a layer, with the usual gradients; of the plan what is wanted, None: as planned.

    - B, H, D: rows, units, directions; P: hidden size after projection, 0 without one
    - variant: of a `suites.Case`; dtype: a key of `suites.STORAGE`
    - rules: of regularised steps, None: those of the variant; draws: whether masks are drawn for those that are random
    """

    B: int
    H: int
    backward: bool = False
    wait: str | None = None
    variant: str = "standard"
    dtype: str = "bfloat16"
    D: int = 1
    block_u: int | None = None
    block_b: int | None = None
    P: int = 0
    rules: Rules | None = None
    draws: bool = True

    @property
    def layer(self) -> Layer:
        """Its sizes; a forward pass saves what a backward pass reads."""
        precision = "tf32" if self.dtype == "tf32" else "ieee"
        sizes = (self.B, self.H, self.D)
        spec, storage = spec_of(self.variant), STORAGE[self.dtype]
        return Layer(spec, STEPS, *sizes, storage, precision, P=self.P, training=True)

    @property
    def wanted(self) -> Preference:
        """What is wanted of the plan."""
        return Preference(wait=self.wait, block_u=self.block_u, block_b=self.block_b)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A pass of a layer on a plan, compiled for sm_90."""

    launch: Launch
    plan: PersistentPlan
    cubin: bytes
    ptx: str
    usage: Usage
    signature: dict[str, Any]


@functools.cache
def compile_case(case: Case) -> Compiled:
    """Compile the plan that would run: the first of the ranked ones that hardly spills (settle.py).

    Raises LookupError with the reason if there is none.
    """

    def usage_of(plan: PersistentPlan) -> Usage | None:
        usage = compile_plan(case.layer, case.backward, plan, rules, case.draws).usage
        return usage if fits(plan.together, usage.shared, H100) else None

    rules = rules_of(case.variant) if case.rules is None else case.rules
    plans = ranked_plans(case.layer, case.backward, H100, case.wanted)
    if isinstance(plans, str):
        raise LookupError(plans)
    plan = first_clean(plans, usage_of)
    if plan is None:
        raise LookupError("no plan fits the shared memory of a thread block as compiled")
    return compile_plan(case.layer, case.backward, plan, rules, case.draws)


@functools.cache
def compile_plan(
    layer: Layer, backward: bool, plan: PersistentPlan, rules: Rules = NONE, draws: bool = True
) -> Compiled:
    """Compile a pass of a layer on a plan, by the library's own launcher; rules, draws: as of a Case."""
    launch = launch_without_data(layer, backward, rules, draws)
    arguments, kernel = launch.arguments(plan), kernel_of(launch, plan)
    with own_cache():
        usage = usage_elsewhere(kernel, plan.grid, arguments, H100.capability)
        with absent_gpu(H100.capability):
            compiled = kernel.run(grid=plan.grid, warmup=True, **arguments)
    return Compiled(launch, plan, compiled.asm["cubin"], compiled.asm["ptx"], usage, compiled.src.signature)


@contextmanager
def own_cache() -> Iterator[None]:
    """Inside, Triton's cache on the disk is one of these sources.

    The same kernel in another checkout has other source files, whose lines give an instruction its phase.
    """
    checkout = hashlib.sha256(str(SOURCES).encode()).hexdigest()[:16]
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(Path(tempfile.gettempdir()) / f"lstm-triton-simulator-{os.getuid()}-{checkout}")
        yield


@functools.cache
def accesses_of(compiled: Compiled) -> list[Access]:
    """Return the accesses to shared memory in the time loop of a kernel, with their wavefronts."""
    plan = compiled.plan
    iterations = compiled.launch.layer.T * plan.blocks_per_program
    arguments = arguments_of_one(compiled)
    return count_wavefronts(compiled.ptx, arguments, compiled.usage.shared, plan.num_warps, iterations)


def kernels_are_interpreted() -> bool:
    """Return whether this process has Triton's interpreter instead of its compiler, so that nothing can be compiled."""
    return isinstance(persistent_forward_kernel, InterpretedFunction)


def arguments_of_one(compiled: Compiled) -> list[Any]:
    """Return the arguments with which one thread block runs alone, in order, compile-time constants apart.

    Tensors are zeros on the CPU; no wait is repeated, and all row blocks are those of the one thread block.
    """
    from tests.emulator.launches import flat

    plan = compiled.plan
    given = compiled.launch.arguments(plan) | dict(max_polls=0, row_blocks=plan.blocks_per_program)
    return [
        torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for value in flat(given, compiled.signature)
    ]
