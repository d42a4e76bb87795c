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
from typing import Any, NamedTuple

import torch
import triton
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.operands import INTERPRETED
from lstm_triton_kernels.plan import PersistentPlan, Preference, ranked_plans
from lstm_triton_kernels.sequence_persistent import Launch, launch_without_data
from lstm_triton_kernels.settle import Usage, absent_gpu, first_clean, usage_elsewhere
from lstm_triton_kernels.sizes import Layer

from benchmarks import ROOT
from benchmarks.simulator.conflicts import Access, count_wavefronts
from lstm_triton import LSTMSpec

RELEASE = ".".join(triton.__version__.split(".")[:2])
"""Of Triton."""

H100 = GPUS["h100"]


@dataclass(frozen=True)
class Case:
    """One pass of a layer of one direction, with the usual gradients; of the plan what is wanted, None: as planned."""

    B: int
    H: int
    backward: bool = False
    wait: str | None = None
    variant: str = "standard"
    dtype: str = "bfloat16"
    block_u: int | None = None
    block_b: int | None = None

    @property
    def layer(self) -> Layer:
        """Its sizes; a forward pass saves what a backward pass reads."""
        dtype = getattr(torch, self.dtype)
        return Layer(LSTMSpec.parse(self.variant), 1024, self.B, self.H, 1, dtype, training=True)


class Compiled(NamedTuple):
    """A pass of a layer on a plan, compiled for sm_90."""

    launch: Launch
    plan: PersistentPlan
    cubin: bytes
    ptx: str
    usage: Usage


@functools.cache
def compile_case(case: Case) -> Compiled:
    """Compile the plan that would run: the first of the ranked ones without spills. Raises LookupError if none fits."""
    wanted = Preference(wait=case.wait, block_u=case.block_u, block_b=case.block_b)
    plans = ranked_plans(case.layer, case.backward, H100, wanted)
    if isinstance(plans, str):
        raise LookupError(plans)
    plan = first_clean(plans, lambda plan: compile_plan(case.layer, case.backward, plan).usage)
    assert plan is not None  # compiled elsewhere, every plan has a usage
    return compile_plan(case.layer, case.backward, plan)


@functools.cache
def compile_plan(layer: Layer, backward: bool, plan: PersistentPlan) -> Compiled:
    """Compile a pass of a layer on a plan, by the library's own launcher."""
    if INTERPRETED:
        raise RuntimeError("compiles kernels: needs a process without TRITON_INTERPRET")
    launch = launch_without_data(layer, backward)
    arguments = launch.arguments(plan)
    with own_cache():
        usage = usage_elsewhere(launch.kernel, plan.grid, arguments, H100.capability)
        with absent_gpu(H100.capability):
            compiled = launch.kernel.run(grid=plan.grid, warmup=True, **arguments)
    return Compiled(launch, plan, compiled.asm["cubin"], compiled.asm["ptx"], usage)


@contextmanager
def own_cache() -> Iterator[None]:
    """Inside, Triton's cache on the disk is one of this checkout.

    The same kernel in another checkout has other source files, whose lines give an instruction its phase.
    """
    checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:16]
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


def arguments_of_one(compiled: Compiled) -> list[Any]:
    """Return the arguments with which one thread block runs alone, in order, compile-time constants apart.

    Tensors are zeros on the CPU; no wait is repeated, and all row blocks are those of the one thread block.
    """
    launch, plan = compiled.launch, compiled.plan
    given = launch.arguments(plan) | dict(max_polls=0, row_blocks=plan.blocks_per_program)
    values = [given[parameter.name] for parameter in launch.kernel.params if not parameter.is_constexpr]
    return [
        torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value
        for value in values
        if value is not None
    ]
