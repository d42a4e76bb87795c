"""Bank conflicts: wavefronts of the accesses to shared memory, counted by running a kernel's PTX in the emulator."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, NamedTuple

from benchmarks.simulator.sass import Instruction

SHARED = {"LDSM": "ldmatrix", "STSM": "stmatrix", "LDS": "ld", "STS": "st"}
"""Accesses to shared memory, in SASS and in PTX."""


def needed_wavefronts(one: Instruction) -> int:
    """Return the wavefronts of an access to shared memory without bank conflicts."""
    if one.name == "LDSM":
        return int(one.opcode[-1]) if one.opcode[-2:] in (".2", ".4") else 1
    return max(1, one.width // 4)


class Access(NamedTuple):
    """An access of the PTX: its operation, source line, bytes a lane, and mean wavefronts of a warp."""

    operation: str
    line: str
    size: int
    wavefronts: float


def wavefronts_of(code: list[Instruction], accesses: list[Access]) -> dict[int, float]:
    """Return the wavefronts of every access of some SASS, by place.

    The mean of the accesses of the PTX with its operation, line and size, else with its operation and line, its
    operation and size, its operation: ptxas reorders them, and some source lines are lost.
    """
    found: dict[int, float] = {}
    for n, one in enumerate(code):
        if one.name not in SHARED:
            continue
        size = 4 * needed_wavefronts(one) if one.name in ("LDSM", "STSM") else one.width
        path, number = one.lines[0] if one.lines else ("", 0)
        line = f"{path.rsplit('/', 1)[-1]}:{number}"
        kin = [access for access in accesses if access.operation == SHARED[one.name]]
        for alike in (
            [access for access in kin if (access.line, access.size) == (line, size)],
            [access for access in kin if access.line == line],
            [access for access in kin if access.size == size],
            kin,
        ):
            if alike:
                found[n] = sum(access.wavefronts for access in alike) / len(alike)
                break
    return found


def count_wavefronts(ptx: str, arguments: list[Any], shared: int, warps: int, iterations: int) -> list[Access]:
    """Return the accesses of the time loop, by running one thread block of a launch of so many iterations.

    arguments: of the kernel, on the CPU, in order, compile-time constants apart; shared: bytes of shared memory.
    """
    from tests.emulator.machine import Machine

    machine = Machine(ptx, (1, 1, 1), arguments, shared, stats=True)
    machine.run()
    cta, kernel = machine.ctas[0], machine.kernel
    executed: dict[int, int] = {}  # how often, in warps, by instruction
    for n, segment in enumerate(kernel.segments):
        for instruction in segment.instructions:
            executed[instruction.index] = cta.stats[f"segment {n}"]
    waves: Counter[int] = Counter()
    for (index, ways), phases in cta.ways.items():
        waves[index] += ways * phases
    found = []
    for instruction in kernel.instructions:
        operation = instruction.op.split(".")[0]
        if operation not in SHARED.values() or (operation in ("ld", "st") and "shared" not in instruction.op):
            continue
        times = executed.get(instruction.index, 0)
        if times >= iterations * warps:  # it is in the time loop
            line = instruction.where.split(" in ")[0]
            found.append(Access(operation, line, bytes_of(instruction.op), waves[instruction.index] / times))
    return found


def bytes_of(op: str) -> int:
    """Return the bytes that a lane moves in an operation of the PTX, such as `ld.shared.v2.b32`."""
    if matrices := re.search(r"\.x(\d)\.", op):
        return 4 * int(matrices[1])
    vector = re.search(r"\.v(\d)", op)
    bits = re.search(r"(\d+)$", op)
    assert bits is not None, op
    return (int(vector[1]) if vector else 1) * int(bits[1]) // 8
