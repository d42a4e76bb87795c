"""PTX to Python: one function for each segment of a kernel, once for all lanes of a gang and once for some."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.emulator import Fault, asynchronous, global_accesses, shared_accesses, tensor_cores, values, warps
from tests.emulator.opcodes_of_effects import EFFECTS
from tests.emulator.opcodes_of_values import VALUES
from tests.emulator.parse import Instruction, Kernel
from tests.emulator.writer import Constants, Writer

MODULES = (values, tensor_cores, warps, shared_accesses, global_accesses, asynchronous)
"""What translated code calls."""


class Program:
    """A kernel and its code: code[masked][segment](gang, registers, lanes that are here).

    Most segments are only ever reached by all lanes together: of a segment that some reach, the code is made then.
    """

    def __init__(self, ptx: str, fine: bool) -> None:
        self.kernel = Kernel(ptx, fine)
        self.constants = Constants()
        self.names: dict[str, Any] = {"Fault": Fault, "np": np, "where": np.where}
        for module in MODULES:
            self.names |= vars(module)
        every = range(len(self.kernel.segments))
        self.code = {False: self.functions(every, masked=False), True: [functools.partial(self.some, n) for n in every]}

    def functions(self, segments: Iterable[int], masked: bool) -> list[Any]:
        """Return the functions of segments."""
        text = []
        for n in segments:
            writer = Writer(self.kernel, self.constants, masked)
            for instruction in self.kernel.segments[n].instructions:
                translate(writer, instruction)
            text += [f"def s{n}(g, R, m):", *writer.lines, " pass"]
        exec(compile("\n".join(text), self.kernel.name, "exec"), self.names)
        return [self.names[f"s{n}"] for n in segments]

    def some(self, n: int, *arguments: Any) -> None:
        """Run a segment for some lanes for the first time: its numbers are among those of the code for all lanes."""
        (self.code[True][n],) = self.functions([n], masked=True)
        self.code[True][n](*arguments)


def translate(writer: Writer, instruction: Instruction) -> None:
    """Write an instruction. Raises Fault if it is not modelled."""
    name = instruction.name
    try:
        if name in EFFECTS:
            EFFECTS[name](writer, instruction)
        elif name in VALUES:
            writer.write(instruction, instruction.operands[0], VALUES[name](writer, instruction))
        else:
            raise Fault(f"no such opcode here: {instruction}")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise Fault(f"no such form here: {instruction} ({error!r})") from error


@functools.lru_cache(maxsize=256)
def program(ptx: str, fine: bool) -> Program:
    """Return the program of a PTX text, for gangs of one warp each (fine) or of whole CTAs."""
    return Program(ptx, fine)
