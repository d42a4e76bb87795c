"""PTX to Python: one function for each segment of a kernel, once for all lanes of a gang and once for some."""

from __future__ import annotations

import functools
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
    """A kernel and its code: code[masked][segment](gang, registers, lanes that are here)."""

    def __init__(self, ptx: str, fine: bool) -> None:
        self.kernel = Kernel(ptx, fine)
        self.constants = Constants()
        self.names: dict[str, Any] = {"Fault": Fault, "np": np, "where": np.where}
        for module in MODULES:
            self.names |= vars(module)
        self.code = {masked: self.functions(masked) for masked in (False, True)}

    def functions(self, masked: bool) -> list[Any]:
        """Return the functions of all segments."""
        text = []
        for n, segment in enumerate(self.kernel.segments):
            writer = Writer(self.kernel, self.constants, masked)
            for instruction in segment.instructions:
                translate(writer, instruction)
            text += [f"def s{n}(g, R, m):", *writer.lines, " pass"]
        exec(compile("\n".join(text), self.kernel.name, "exec"), self.names)
        return [self.names[f"s{n}"] for n in range(len(self.kernel.segments))]


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
