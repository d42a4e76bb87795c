"""A launch of a kernel: its thread blocks, who runs next, and the barriers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from tests.emulator import Fault, counts
from tests.emulator.findings import Findings
from tests.emulator.gangs import CTA, Gang, Launch
from tests.emulator.global_accesses import release
from tests.emulator.memory import SECTOR, GlobalMemory, Spread
from tests.emulator.shared import SharedMemory
from tests.emulator.tensor_cores import WARP
from tests.emulator.translate import program
from tests.emulator.values import UNSIGNED, u4

LEAVING_RATES = (0.05, 0.1, 0.4)
"""Of pending stores, how many leave their buffer at a time; one rate a launch."""


class Machine:
    """One launch of the PTX of a kernel.

    grid: of 1 to 3 numbers; arguments: of the PTX's parameters, tensors and numbers, in order, pointers to scratch
    memory apart; shared: bytes of shared memory a CTA; gang: "cta" or "warp", what runs in lockstep; weak: memory;
    torn: stores leave their buffer 16 bits at a time; seed: of scheduler and memory; checked: of how many CTAs shared
    memory is checked; stats: count what those execute; limit: of segments that run. Of thread blocks that are the last
    of a larger grid, first: the index of the first one; spreads: by id the tensors of which there is a larger one.
    """

    def __init__(
        self, ptx: str, grid: tuple[int, ...], arguments: list[Any], shared: int, *, gang: str = "cta",
        weak: bool = False, seed: int = 0, checked: int = 3, stats: bool = False, limit: int = 50_000_000,
        torn: bool = False, first: tuple[int, int, int] = (0, 0, 0), spreads: Mapping[int, Spread] | None = None,
    ) -> None:  # fmt: skip
        translated = program(ptx, gang == "warp")
        self.kernel = translated.kernel
        self.findings = Findings(self.kernel)
        self.weak, self.limit, self.segments_run = weak, limit, 0
        self.generator = random.Random(seed)
        self.rate = self.generator.choice(LEAVING_RATES)
        tensors = [a for a in arguments if hasattr(a, "untyped_storage")]
        self.memory = GlobalMemory(tensors, self.generator, seed, weak, torn)
        if spreads:
            self.memory.spread(spreads)
        warps = self.kernel.threads // WARP
        size = warps if gang == "cta" else 1
        lanes = size * WARP
        constants = [np.full(lanes, value, UNSIGNED[bits]) for value, bits in translated.constants.places]
        x, y, z = (*grid, 1, 1)[:3]
        values = self.parameters(arguments)
        whole = (first[0] + x, first[1] + y, first[2] + z)
        self.launch = Launch(self.kernel, translated.code, constants, self.memory, values, whole, lanes, self.findings)
        count = x * y * z
        if count <= checked:
            looked_at = set(range(count))
        else:
            looked_at = {0, count - 1} | {self.generator.randrange(count) for _ in range(checked - 2)}
        indices = [(first[0] + i, first[1] + j, first[2] + k) for k in range(z) for j in range(y) for i in range(x)]
        sectors = len(self.memory.bytes) // SECTOR if weak else 0
        self.ctas = []
        for number, index in enumerate(indices):
            cta = CTA(index, number, SharedMemory(shared, number in looked_at, self.findings), sectors)
            cta.measured = cta.counting = stats and number in looked_at
            cta.gangs = [Gang(self.launch, cta, first) for first in range(0, warps, size)]
            self.ctas.append(cta)

    def parameters(self, arguments: list[Any]) -> dict[str, int]:
        """Return the value of each parameter; at most two pointers to scratch memory follow the arguments."""
        addresses = self.memory.address_of
        values = [addresses[id(a)] if hasattr(a, "untyped_storage") else number(a) for a in arguments]
        names = [name for _, name in self.kernel.params]
        if not len(values) <= len(names) <= len(values) + 2:
            raise Fault(f"{len(values)} arguments for {len(names)} parameters")
        return dict(zip(names, [*values, 0, 0], strict=False))

    @property
    def divergences(self) -> int:
        """How often lanes of a gang took different branches."""
        return self.launch.divergences

    def run(self) -> None:
        """Run all thread blocks to their end and write the tensors. Raises Fault where they cannot go on."""
        with np.errstate(all="ignore"):
            self.schedule()
            for cta in self.ctas:
                for gang in cta.gangs:
                    release(gang)
                    if any(gang.copies):
                        self.findings.report("synccheck", 0, "ended with cp.async in flight")
        self.memory.copy_back()

    def schedule(self) -> None:
        """Let gangs take turns, of some segments each, in random order, until all have ended."""
        running = [gang for cta in self.ctas for gang in cta.gangs]
        turns = 8 if self.weak or self.launch.lanes > WARP else 3
        while running:
            n = self.generator.randrange(len(running))
            gang = running[n]
            for _ in range(self.generator.randint(1, turns)):
                gang.step()
                self.segments_run += 1
                if gang.ended or gang.at_barrier is not None:
                    break
            if self.segments_run > self.limit:
                raise Fault(f"not ended after {self.limit} segments")
            if self.weak and self.generator.random() < 0.5:
                self.drain()
            if gang.ended or gang.at_barrier is not None:
                running[n] = running[-1]
                running.pop()
                running += self.after_waiting(gang.cta)

    def after_waiting(self, cta: CTA) -> list[Gang]:
        """Return the gangs that may go on, now that one of the CTA waits or has ended."""
        waiting = [gang for gang in cta.gangs if gang.at_barrier is not None]
        if len(waiting) == len(cta.gangs):
            self.pass_barrier(cta)
            return cta.gangs
        if waiting and all(gang.ended or gang.at_barrier is not None for gang in cta.gangs):
            stuck = waiting[0].at_barrier
            assert stuck is not None
            message = "warps wait at a barrier while others of the CTA have ended"
            self.findings.report("synccheck", stuck.index, message)
            raise Fault(f"deadlock: {stuck}")
        return []

    def pass_barrier(self, cta: CTA) -> None:
        """Let all gangs of a CTA go on; each sees what the others stored, and acquired, before."""
        barriers = [gang.at_barrier.index for gang in cta.gangs if gang.at_barrier is not None]
        if len(set(barriers)) > 1:
            self.findings.report("synccheck", barriers[0], "warps of a CTA meet at different barriers")
        cta.shared.epoch += 1
        horizon = max(gang.horizon for gang in cta.gangs)
        for gang in cta.gangs:
            gang.at_barrier = None
            gang.horizon = horizon
            for place, entry in gang.pending.items():
                if place in cta.pool:  # one address keeps its order
                    self.memory.leave(place, *cta.pool.pop(place))
                cta.pool[place] = entry
            gang.pending.clear()
            cta.unreleased += gang.unreleased
            gang.unreleased = []

    def drain(self) -> None:
        """Let some pending stores of a random CTA leave."""
        cta = self.generator.choice(self.ctas)
        for buffer in [cta.pool, *(gang.pending for gang in cta.gangs)]:
            for place in list(buffer):
                if self.generator.random() < self.rate:
                    self.memory.leave(place, *buffer.pop(place))

    def statistics(self) -> dict[int, Counter[str]]:
        """Return for each measured CTA what it executed: see `counts.statistics`."""
        return {cta.number: counts.statistics(cta, self.kernel) for cta in self.ctas if cta.measured}


def number(value: float) -> int:
    """Return a number as a parameter has it: of a float the bits of float32."""
    return int(np.float32(value).view(u4)) if isinstance(value, float) else int(value)
