"""The library's own launches of its kernels, executed in the emulator instead of on a GPU.

A launch is compiled by Triton's JIT for a GPU that is not there, so with the specialization that it would have on one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from lstm_triton_kernels import cell, cell_tangents, draw, gates, normalized_cell, sequence_persistent, settle
from torch import Tensor

from tests.emulator.far import Far
from tests.emulator.findings import Finding
from tests.emulator.machine import Machine
from tests.emulator.memory import GARBAGE

KERNELS = {
    sequence_persistent: [
        "persistent_forward_kernel", "persistent_backward_kernel", "exchanged_forward_kernel",
        "exchanged_backward_kernel", "pack_weights_kernel",
    ],
    gates: ["gate_preactivations_kernel", "output_peephole_kernel"],
    cell: ["cell_forward_kernel", "cell_backward_kernel"],
    normalized_cell: ["normalized_forward_kernel", "normalized_backward_kernel"],
    cell_tangents: ["cell_tangents_kernel", "cell_sources_kernel"],
    draw: ["draw_codes_kernel", "draw_factors_kernel"],
}  # fmt: skip
"""By module."""

Change = Callable[[str, str], str]
"""(kernel, PTX) -> PTX, to plant a fault."""


@dataclass
class Emulation:
    """How launches are emulated (see `Machine`), and what came of it.

    change: to the PTX; max_polls: how often a program looks before it gives up waiting, None: as often as on a GPU;
    far: the rows of a launch are the last ones of a larger batch.
    """

    capability: int = 90
    gang: str = "cta"
    weak: bool = False
    torn: bool = False
    seed: int = 0
    stats: bool = False
    change: Change | None = None
    max_polls: int | None = None
    far: Far | None = None
    findings: list[Finding] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    statistics: list[tuple[str, dict[int, Counter[str]]]] = field(default_factory=list)

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        """Compile a jitted kernel and run it; every launch has another seed."""
        first, spreads = (0, 0, 0), None
        if self.far is not None:
            first, spreads, arguments = self.far.launch(kernel.__name__, grid, arguments)
        compiled = kernel.run(grid=grid, warmup=True, **arguments)
        ptx = compiled.asm["ptx"]
        if self.change is not None:
            ptx = self.change(kernel.__name__, ptx)
        given = flat(arguments, compiled.src.signature)
        self.seed += 1
        machine = Machine(
            ptx, grid, given, compiled.metadata.shared,
            gang=self.gang, weak=self.weak, torn=self.torn, seed=self.seed, stats=self.stats, first=first,
            spreads=spreads,
        )  # fmt: skip
        try:
            machine.run()
        finally:
            self.findings += machine.findings
        self.launches[kernel.__name__] += 1
        if self.stats:
            self.statistics.append((kernel.__name__, machine.statistics()))


def flat(arguments: dict[str, Any], signature: dict[str, Any]) -> list[Any]:
    """Return the arguments that a compiled kernel has, by its signature: those of a tuple one by one, no constants."""
    found = []
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            fields = zip(arguments[name], kind, strict=True)
            found += [value for value, of_field in fields if of_field != "constexpr"]
        elif kind != "constexpr":
            found.append(arguments[name])
    return found


class StandIn:
    """In place of a jitted kernel."""

    def __init__(self, kernel: Any, emulation: Emulation) -> None:
        self.kernel, self.emulation = kernel, emulation

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.emulation.launch(self.kernel, grid, arguments)


def garbage(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `make`, a function like torch.empty, with memory that the emulator knows as never written."""

    def made(*args: Any, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        if tensor.numel() and tensor.element_size() >= 2 and tensor.is_contiguous():
            tensor.view(torch.int16).fill_(GARBAGE - 0x10000)
        return tensor

    return made


@contextmanager
def emulated(emulation: Emulation) -> Iterator[None]:
    """Inside, launches of the library's kernels run in the emulator, and new memory holds garbage."""
    with ExitStack() as stack:
        stack.enter_context(settle.absent_gpu(emulation.capability))
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, StandIn(getattr(module, name), emulation)))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, garbage(getattr(owner, name))))
        if emulation.max_polls is not None:
            stack.enter_context(mock.patch.object(sequence_persistent, "POLLS", emulation.max_polls))
        yield
