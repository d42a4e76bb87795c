"""Python text for the operands, guards and results of PTX instructions.

Translated code names the gang `g`, its registers `R`, and the lanes that are here `m`.
"""

from __future__ import annotations

from typing import Any

from tests.emulator import Fault, shared
from tests.emulator.parse import Address, Instruction, Kernel


class Constants:
    """The numbers that occur in a kernel, by place: (value, bits)."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, int], int] = {}

    def place(self, value: int, bits: int) -> int:
        """Return the place of a number."""
        return self.places.setdefault((value & ((1 << bits) - 1), bits), len(self.places))


class Writer:
    """Writes `lines`, the body of a function; masked: not all lanes of the gang need be here."""

    def __init__(self, kernel: Kernel, constants: Constants, masked: bool) -> None:
        self.kernel, self.constants, self.masked = kernel, constants, masked
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        """Add a statement."""
        self.lines.append(f" {text}")

    def constant(self, value: int, bits: int) -> str:
        """Return a number as an array."""
        return f"g.K[{self.constants.place(value, bits)}]"

    def bits_of(self, register: str) -> int:
        """Return the width of a register."""
        return self.kernel.registers[register][1]

    def source(self, operand: Any, bits: int) -> str:
        """Return an operand as an array of that width."""
        if isinstance(operand, int):
            return self.constant(operand, bits)
        if operand in self.kernel.registers:
            n, own = self.kernel.registers[operand]
            if own == bits:
                return f"R[{n}]"
            if bits == 1 or own < bits:
                raise Fault(f"{operand} is {own} bits wide, wanted {bits}")
            return f"R[{n}].astype(u{bits // 8})"
        if isinstance(operand, str) and operand.startswith("%"):
            return f"g.special({operand!r})"
        if operand == "global_smem":
            return self.constant(shared.BASE, bits)
        raise Fault(f"operand {operand}")

    def sources(self, operands: list[Any], bits: int) -> list[str]:
        """Return operands as arrays of that width."""
        return [self.source(operand, bits) for operand in operands]

    def listed(self, operands: list[Any], bits: int) -> str:
        """Return operands as a list of arrays of that width."""
        return f"[{','.join(self.sources(operands, bits))}]"

    def address(self, operand: Address) -> str:
        """Return an address as an array."""
        if operand.base == "global_smem":
            return self.constant(shared.BASE + operand.offset, 32)
        n, bits = self.kernel.registers[operand.base]
        return f"R[{n}]" if operand.offset == 0 else f"(R[{n}]+{self.constant(operand.offset, bits)})"

    def mask(self, ins: Instruction) -> str:
        """Return the lanes that execute an instruction, "None": all."""
        if ins.guard is None:
            return "m" if self.masked else "None"
        n, _ = self.kernel.registers[ins.guard[0]]
        own = f"~R[{n}]" if ins.guard[1] else f"R[{n}]"
        return f"({own} & m)" if self.masked else own

    def write(self, ins: Instruction, register: str, value: str) -> None:
        """Write a register in the lanes that execute the instruction."""
        if register != "_":
            n, _ = self.kernel.registers[register]
            mask = self.mask(ins)
            self.line(f"R[{n}]={value}" if mask == "None" else f"R[{n}]=where({mask},{value},R[{n}])")

    def call(self, ins: Instruction, call: str, registers: list[str], bits: int = 0) -> None:
        """Write the list of arrays that a call returns; bits: of each, where a register may be wider."""
        self.line(f"v={call}")
        for n, register in enumerate(registers):
            if register != "_":
                own = self.bits_of(register)
                cast = f".astype(u{own // 8})" if bits and bits != own and own > 1 else ""
                self.write(ins, register, f"v[{n}]{cast}")

    def whole_warps(self, ins: Instruction) -> None:
        """Check that an instruction of whole warps has them."""
        if ins.guard is not None:
            raise Fault(f"guarded: {ins}")
        if self.masked:
            self.line(f"whole_warps(g,{self.mask(ins)},{ins.index})")
