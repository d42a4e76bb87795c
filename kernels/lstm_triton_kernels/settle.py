"""Settling which of the ranked plans of a launch runs: the first that compiles to hardly any spilled register.

A kernel is compiled where it is first used on a device, and what the compiler made of it decides. Kept for the process;
Triton's cache on the disk keeps the kernels.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import OutOfResources

from lstm_triton_kernels.planner import MOST_SPILLED, MOST_TRIES

Plan = TypeVar("Plan", bound=Hashable)


class Usage(NamedTuple):
    """Registers and spilled registers of a thread of a compiled kernel, and bytes of shared memory of a program."""

    registers: int
    spilled: int
    shared: int


def first_clean(plans: Sequence[Plan], usage_of: Callable[[Plan], Usage | None]) -> Plan | None:
    """Return the first of the ranked plans that spills no more than MOST_SPILLED registers.

    usage_of: compiles a plan; None where it does not fit the device. Of MOST_TRIES plans that all spill more, the one
    that spills least; None if no plan fits.
    """
    spilling: list[tuple[int, int]] = []
    for n, plan in enumerate(plans):
        if n >= MOST_TRIES and spilling:
            break
        usage = usage_of(plan)
        if usage is None:
            continue
        if usage.spilled <= MOST_SPILLED:
            return plan
        spilling.append((usage.spilled, n))
    return plans[min(spilling)[1]] if spilling else None


SETTLED: dict[tuple[Any, ...], Any] = {}
"""The plan by the key of a launch, in the order in which they were settled."""

_settling = threading.Lock()


def settled(
    key: tuple[Any, ...], plans: Sequence[Plan], usage_of: Callable[[Plan], Usage | None], device: torch.device
) -> Plan:
    """Return the plan that runs for a launch of this key on the device; its kernel is compiled and loaded.

    While a CUDA graph is captured nothing is tried: what was settled before, else the first. Raises RuntimeError if no
    plan fits the device.
    """
    plan = SETTLED.get(key)
    if plan is not None:
        return plan
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return plans[0]
    with _settling:
        if key not in SETTLED:
            found = first_clean(plans, usage_of)
            if found is None:
                raise RuntimeError(f"strategy 'persistent' cannot run here: no plan fits {device} as compiled")
            SETTLED[key] = found
    return SETTLED[key]


def usage_on_device(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> Usage | None:
    """Compile a launch for the current device and load it; None where it does not fit the device."""
    compiled = kernel.warmup(grid=grid, **arguments)
    try:
        compiled._init_handles()
    except OutOfResources:
        return None
    return Usage(compiled.n_regs, compiled.n_spills, compiled.metadata.shared)


def usage_elsewhere(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], capability: int) -> Usage:
    """Compile a launch for a GPU that need not be here; capability: its compute capability times ten.

    Raises RuntimeError where the CUDA tool that reads the compiled kernel (part of Triton's wheel) fails.
    """
    with absent_gpu(capability):
        compiled = kernel.run(grid=grid, warmup=True, **arguments)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        text = run_tool("cuobjdump", "--dump-resource-usage", str(binary))
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    return Usage(registers, stack // 4, compiled.metadata.shared)


def run_tool(name: str, *arguments: str) -> str:
    """Run a CUDA tool of Triton's wheel and return what it prints. Raises RuntimeError with its words if it fails."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    try:
        done = subprocess.run([path, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{name} of Triton {triton.__version__} does not run: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{name} of Triton {triton.__version__} failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


class _AbsentGPU:
    """A driver for compiling: it answers what Triton asks then."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return -self.capability  # of its own in Triton's cache of compiled kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def absent_gpu(capability: int) -> Iterator[None]:
    """Compile for a GPU of that compute capability times ten inside of the block. Holds for all threads."""
    driver = triton.runtime.driver
    before = driver._active  # not `active`, which would look for a GPU
    driver.set_active(_AbsentGPU(capability))
    try:
        yield
    finally:
        driver._active = before
