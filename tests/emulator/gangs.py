"""Thread blocks (CTAs), and the gangs of their threads: what they hold, which lanes are where, how they branch.

A gang is the threads that run in lockstep: a whole CTA, or one warp.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from tests.emulator import Fault, memory, shared
from tests.emulator.findings import Findings
from tests.emulator.memory import GlobalMemory
from tests.emulator.parse import Instruction, Kernel
from tests.emulator.shared import SharedMemory
from tests.emulator.tensor_cores import WARP
from tests.emulator.values import UNSIGNED, Array, i4, i8, u4, u8

CLOCKS = 1000
"""What %clock has grown by when it is read again: a kernel that lets some pass goes on at once."""

Stores = dict[int, tuple[int, int]]
"""Of stores that nobody else sees yet: by place in global memory (bytes, value)."""


class CTA:
    """A thread block.

    Weak memory: pool, the stores that its gangs share since a barrier; unreleased, the places of stores that no release
    made visible; l1, for each sector the state of the clock that the L1 holds. stats, ways: counts, see `counts`;
    measured: they are kept at all; counting: now, so not in a loop that waits.
    """

    def __init__(self, index: tuple[int, int, int], number: int, shared: SharedMemory, sectors: int) -> None:
        self.index, self.number, self.shared = index, number, shared
        self.gangs: list[Gang] = []
        self.pool: Stores = {}
        self.unreleased: list[Array] = []
        self.l1: Array = np.full(sectors, -1, i8)
        self.stats: Counter[str] = Counter()
        self.ways: Counter[tuple[int, int]] = Counter()
        self.measured = self.counting = False


class Launch:
    """What all gangs of a launch share: kernel, code (of each segment, for all lanes and for some), memory, numbers."""

    def __init__(
        self, kernel: Kernel, code: Any, constants: list[Array], global_memory: GlobalMemory, values: dict[str, int],
        grid: tuple[int, int, int], lanes: int, findings: Findings,
    ) -> None:  # fmt: skip
        self.kernel, self.code, self.constants, self.memory = kernel, code, constants, global_memory
        self.values, self.grid, self.lanes, self.findings = values, grid, lanes, findings
        self.divergences = 0
        self.params: dict[tuple[str, int], Array] = {}

    def undefined(self) -> list[Array]:
        """Return registers that nobody wrote. Arrays of registers are never written to, so one serves for many."""
        words = {w: np.full(self.lanes, 0xDEADBEEFDEADBEEF & ((1 << w) - 1), kind) for w, kind in UNSIGNED.items()}
        return [words[w] for w in self.kernel.widths]

    def param(self, name: str, width: int) -> Array:
        """Return a parameter of the kernel, for each lane of a gang."""
        if (name, width) not in self.params:
            value = self.values[name] & ((1 << width) - 1)
            self.params[name, width] = np.full(self.lanes, value, UNSIGNED[width])
        return self.params[name, width]


class Gang:
    """Threads in lockstep.

    R: the registers, arrays of [lanes]; K: the constants. All lanes are at segment `pc`, or, where they have diverged,
    at the segments of `fragments`. copies, products: groups of cp.async and of wgmma under way, the last one open.
    Weak memory: pending, the stores that only this gang sees; unreleased, see CTA; horizon: weak loads read no state
    before it.
    """

    def __init__(self, launch: Launch, cta: CTA, first_warp: int) -> None:
        self.launch, self.cta, self.shared, self.memory = launch, cta, cta.shared, launch.memory
        self.n = launch.lanes
        self.tid: Array = np.arange(self.n, dtype=u4) + u4(first_warp * WARP)
        self.warp: Array = (self.tid // WARP).astype(i4)
        self.K = launch.constants
        self.R = launch.undefined()
        self.pc = 0
        self.fragments: dict[int, Array] | None = None
        self.at_barrier: Instruction | None = None
        self.ended = False
        self.copies: list[list[Any]] = [[]]
        self.products: list[list[Array]] = [[]]
        self.pending: Stores = {}
        self.unreleased: list[Array] = []
        self.horizon = 0
        self.specials: dict[str, Array] = {}
        self.clock = 0

    def report(self, check: str, index: int, message: str) -> None:
        """Record what a check saw at the instruction of this index."""
        self.launch.findings.report(check, index, message)

    def step(self) -> None:
        """Run one segment."""
        kernel = self.launch.kernel
        at, mask = self.pc, None
        if self.fragments is not None:
            at = min(self.fragments)
            mask = self.fragments[at]
        if self.cta.measured:
            self.cta.counting = at not in kernel.retry
            warps = self.n // WARP if mask is None else int(mask.reshape(-1, WARP).any(1).sum())
            self.cta.stats[f"segment {at}"] += warps
        self.launch.code[mask is not None][at](self, self.R, mask)
        segment = kernel.segments[at]
        match segment.end:
            case "fall":
                self.go(at, {at + 1: mask}, mask)
            case "branch":
                self.branch(at, segment.target, segment.last, mask)
            case "barrier":
                assert segment.last is not None
                if mask is not None:
                    self.report("synccheck", segment.last.index, "a part of the threads reaches the barrier")
                self.at_barrier = segment.last
                self.go(at, {at + 1: mask}, mask)
            case "return":
                if mask is not None:
                    self.go(at, {}, mask)
                self.ended = not self.fragments
            case _:
                raise Fault("ran past the end")

    def branch(self, at: int, target: int, instruction: Instruction | None, mask: Array | None) -> None:
        """Move the lanes that take a branch, and those that do not."""
        assert instruction is not None
        if instruction.guard is None:
            self.go(at, {target: mask}, mask)
            return
        register, negated = instruction.guard
        taken = self.R[self.launch.kernel.registers[register][0]]
        taken = ~taken if negated else taken
        rest = ~taken
        if mask is not None:
            taken, rest = taken & mask, rest & mask
        if not rest.any():
            self.go(at, {target: mask}, mask)
        elif not taken.any():
            self.go(at, {at + 1: mask}, mask)
        else:
            self.launch.divergences += 1
            self.go(at, {target: taken, at + 1: rest}, mask)

    def go(self, at: int, to: dict[int, Array | None], mask: Array | None) -> None:
        """Move the lanes that are at a segment (None: all of the gang) to others, and join those that meet."""
        if mask is None and len(to) == 1:
            (self.pc,) = to
            return
        fragments = self.fragments or {}
        fragments.pop(at, None)
        for target, lanes in to.items():
            assert lanes is not None
            old = fragments.get(target)
            fragments[target] = lanes if old is None else old | lanes
        self.fragments = fragments
        if len(fragments) == 1:
            ((only, lanes),) = fragments.items()
            if lanes.all():
                self.pc, self.fragments = only, None

    def special(self, name: str) -> Array:
        """Return a special register, such as %tid.x; %clock grows by CLOCKS each time it is read."""
        if name == "%clock":
            self.clock += CLOCKS
            return np.full(self.n, self.clock, u4)
        if name not in self.specials:
            kind, _, axis = name[1:].partition(".")
            n = "xyz".index(axis) if axis else 0
            threads = (self.launch.kernel.threads, 1, 1)
            known = {
                "tid": self.tid if n == 0 else u4(0), "ntid": u4(threads[n]), "ctaid": u4(self.cta.index[n]),
                "nctaid": u4(self.launch.grid[n]), "laneid": self.tid % u4(WARP), "warpid": self.tid // u4(WARP),
            }  # fmt: skip
            if kind not in known:
                raise Fault(f"no such register here: {name}")
            self.specials[name] = np.broadcast_to(known[kind], (self.n,)).astype(u4)
        return self.specials[name]

    def warps(self, mask: Array | None) -> Array:
        """Return the warp of each of these lanes."""
        return self.warp if mask is None else self.warp[mask]

    def place(
        self, address: Array, total: int, mask: Array | None, index: int, space: str
    ) -> tuple[Array, Array | None]:
        """Return the offsets of the lanes whose access, "shared" or "global", is inside and aligned; and those lanes.

        total: bytes a lane; mask: the lanes that are here. Lanes None: all. Other accesses are reported and left out.
        """
        base, limit = (shared.BASE, self.shared.size) if space == "shared" else (memory.BASE, len(self.memory.bytes))
        off = address.astype(i8)
        off -= base
        if mask is not None:
            if mask.all():
                mask = None
            else:
                off = off[mask]
                if not len(off):
                    return off, mask
        if space == "global":
            off = self.memory.near(off, total)
        unsigned = off.view(u8)  # of which negative ones are beyond every limit
        last = int(np.maximum.reduce(unsigned)) + total
        aligned = not int(np.bitwise_or.reduce(unsigned)) & (total - 1)
        inside = last <= limit and (space == "shared" or self.memory.inside(int(np.minimum.reduce(unsigned)), last))
        if aligned and inside:
            return off, mask
        return self.place_some(off, total, mask, index, space, limit)

    def place_some(
        self, off: Array, total: int, mask: Array | None, index: int, space: str, limit: int
    ) -> tuple[Array, Array | None]:
        """Return what `place` does, lane by lane."""
        bad = (off < 0) | (off + total > limit)
        if space == "global" and not bad.any():
            valid = self.memory.valid
            bad = ~(valid[off] & valid[off + total - 1])
        if bad.any():
            message = f"{space} access of {total} bytes at offset {off[bad][0]} outside ({bad.sum()} lanes)"
            self.report("memcheck", index, message)
        skew = (off & (total - 1)) != 0
        if skew.any():
            self.report("memcheck", index, f"{space} access of {total} bytes not aligned")
            bad |= skew
        if not bad.any():
            return off, mask
        lanes = np.ones(self.n, bool) if mask is None else mask.copy()
        lanes[lanes] = ~bad
        return off[~bad], lanes

    @staticmethod
    def columns(values: list[Array], mask: Array | None, bits: int) -> Array:
        """Return the values of the lanes that are here as (lanes, values) of so many bits."""
        kind = UNSIGNED[bits]
        out = np.empty((len(values[0]) if mask is None else np.count_nonzero(mask), len(values)), kind)
        for n, value in enumerate(values):
            out[:, n] = value if mask is None else value[mask]
        return out

    def spread(self, data: Array, mask: Array | None) -> list[Array]:
        """Return the columns of data (lanes that are here, n) as arrays of all lanes, 0 in the others."""
        if mask is None:
            return list(data.T.copy()) if data.shape[1] > 1 else [data[:, 0]]
        full = np.zeros((data.shape[1], self.n), data.dtype)
        full[:, mask] = data.T
        return list(full)
