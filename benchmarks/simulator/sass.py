"""SASS of a kernel: instructions with their control bits and source lines, basic blocks, loops.

Since Volta, bits 105 to 125 of the 128 of an instruction tell the scheduler: cycles until the next issue of this warp
(stall), the scoreboard that its result or the reading of its operands clears (write, read; 7: none), and the mask of
scoreboards to wait for before issue.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from lstm_triton_kernels.settle import run_tool

NONE = 7
"""The number of a scoreboard that stands for no scoreboard."""

LINE = re.compile(r'(?:File )?"([^"]+)", line (\d+)')
CODE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s+/\* 0x([0-9a-f]{16}) \*/")
HIGH = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")


@dataclass(frozen=True)
class Instruction:
    """One instruction; lines: (file, line) of the source, innermost first, outermost last."""

    address: int
    predicate: str
    opcode: str
    operands: str
    stall: int
    yields: bool
    write: int
    read: int
    wait: int
    lines: tuple[tuple[str, int], ...]
    label: str | None = None

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        """The label that a branch goes to."""
        match = re.search(r"`\((\.L_x_\d+)\)", self.operands)
        return match[1] if match and self.name in ("BRA", "BRX", "CALL", "BSSY") else None

    @property
    def width(self) -> int:
        """Bytes that a load or store moves in a lane."""
        for bits in (128, 64, 16, 8):
            if f".{bits}" in self.opcode or f".U{bits}" in self.opcode:
                return bits // 8
        return 4

    def __str__(self) -> str:
        waits = "".join(str(n) if self.wait >> n & 1 else "-" for n in range(6))
        barriers = f"W{self.write if self.write < NONE else '-'} R{self.read if self.read < NONE else '-'}"
        where = " < ".join(f"{os.path.basename(file)}:{number}" for file, number in self.lines)
        text = f"{self.predicate:5}{self.opcode} {self.operands}"
        return f"{self.address:05x} {waits} {barriers} s{self.stall:<2}{'Y' if self.yields else ' '} {text:70} {where}"


@dataclass
class Block:
    """Instructions that run one after another; successors by index."""

    index: int
    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)


Loop = tuple[int, frozenset[int]]
"""Index of the head of a loop, and of all its blocks."""


@functools.cache
def disassemble(cubin: bytes) -> list[Instruction]:
    """Return the instructions of the only kernel of a cubin. Raises RuntimeError where the disassembler fails."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return list(parse(run_tool("nvdisasm", "-c", "-hex", "-gi", file.name)))


def parse(text: str) -> Iterator[Instruction]:
    """Yield the instructions of nvdisasm's text; the second line of each has the high half of the encoding."""
    lines: list[tuple[str, int]] = []
    fresh, label, pending = True, None, None
    for line in text.splitlines():
        if line.lstrip().startswith("//## File"):
            if fresh:
                lines, fresh = [], False
            found = [(file, int(number)) for file, number in LINE.findall(line)]
            lines += [place for place in found if not lines or lines[-1] != place]
        elif match := re.match(r"(\.L_x_\d+):", line.strip()):
            label = match[1]
        elif match := CODE.search(line):
            pending, fresh = match, True
        elif pending is not None and (match := HIGH.search(line)):
            yield decode(int(pending[1], 16), pending[2], int(match[1], 16), tuple(lines), label)
            pending, label = None, None


def decode(address: int, text: str, high: int, lines: tuple[tuple[str, int], ...], label: str | None) -> Instruction:
    """Return an instruction from its text and the high 64 bits of its encoding."""
    predicate, rest = "", text
    if text.startswith("@"):
        predicate, rest = text.split(None, 1)
    opcode, _, operands = rest.partition(" ")
    control = high >> 41
    return Instruction(
        address=address,
        predicate=predicate,
        opcode=opcode,
        operands=operands.strip(),
        stall=control & 15,
        yields=not control >> 4 & 1,
        write=control >> 5 & 7,
        read=control >> 8 & 7,
        wait=control >> 11 & 63,
        lines=lines,
        label=label,
    )


def basic_blocks(code: list[Instruction]) -> list[Block]:
    """Return the blocks in the order of addresses."""
    starts = {0} | {n for n, one in enumerate(code) if one.label}
    starts |= {n + 1 for n, one in enumerate(code[:-1]) if one.name in ("BRA", "EXIT", "RET", "CALL", "BRX")}
    order = sorted(starts)
    blocks = [Block(n, code[a:b]) for n, (a, b) in enumerate(zip(order, [*order[1:], len(code)], strict=True))]
    at = {block.instructions[0].label: block.index for block in blocks if block.instructions[0].label}
    for block in blocks:
        last = block.instructions[-1]
        if last.name == "BRA" and last.target:
            block.successors.append(at[last.target])
        conditional = bool(last.predicate) or (last.name == "BRA" and re.match(r"!?U?P\d", last.operands))
        if (last.name not in ("BRA", "EXIT", "RET") or conditional) and block.index + 1 < len(blocks):
            block.successors.append(block.index + 1)
    return blocks


def loops(blocks: list[Block]) -> list[Loop]:
    """Return the natural loops. ptxas keeps a loop's blocks together or moves cold ones to the end."""
    predecessors: dict[int, list[int]] = {block.index: [] for block in blocks}
    for block in blocks:
        for after in block.successors:
            predecessors[after].append(block.index)
    found: dict[int, set[int]] = {}
    for block in blocks:
        for head in block.successors:
            if head <= block.index and block.index in reachable(blocks, head):
                body, work = {head, block.index}, [block.index]
                while work:
                    for before in predecessors[work.pop()]:
                        if before not in body and before >= head:
                            body.add(before)
                            work.append(before)
                found.setdefault(head, set()).update(body)
    return [(head, frozenset(body)) for head, body in sorted(found.items())]


def reachable(blocks: list[Block], start: int) -> set[int]:
    """Return the blocks that can come after one, itself included."""
    seen, work = {start}, [start]
    while work:
        for after in blocks[work.pop()].successors:
            if after not in seen:
                seen.add(after)
                work.append(after)
    return seen


def time_loop(blocks: list[Block]) -> Loop:
    """Return the loop over time: the one with most products, and of those the one with most blocks."""

    def products(loop: Loop) -> int:
        return sum(one.name in ("HMMA", "HGMMA", "FFMA") for n in loop[1] for one in blocks[n].instructions)

    return max(loops(blocks), key=lambda loop: (products(loop), len(loop[1])))


def loops_inside(blocks: list[Block], loop: Loop) -> list[Loop]:
    """Return the loops inside of one."""
    return [inner for inner in loops(blocks) if inner[0] in loop[1] and inner[0] != loop[0]]
