"""PTX text to instructions, registers and segments.

A segment is a run of instructions that is executed without interruption: it ends at a branch, a barrier, an access to
global memory that other threads may see, or after 64 instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.emulator import Fault

ORDERED = {"volatile", "acquire", "relaxed"}
"""Of a load: it sees what others store."""

KINDS = {
    "mma": "mma", "wgmma": "wgmma", "bar": "bar.sync", "shfl": "shfl", "redux": "redux", "ldmatrix": "ldmatrix",
    "stmatrix": "stmatrix", "ex2": "mufu", "div": "mufu", "rcp": "mufu", "lg2": "mufu", "sqrt": "mufu", "rsqrt": "mufu",
    "tanh": "mufu", "atom": "atom", "red": "atom",
}  # fmt: skip
"""The name under which an opcode is counted, where that is not its own."""

MOST_INSTRUCTIONS = 64
"""Of a segment."""

MOST_INSTRUCTIONS_TO_SHARED = 12
"""Of a segment, at an access to shared memory, where every warp runs at its own pace."""


@dataclass(frozen=True)
class Vector:
    """An operand in braces: several registers or numbers."""

    parts: list[Any]


@dataclass(frozen=True)
class Address:
    """An operand in brackets: a register, or the name of a variable, and an offset in bytes."""

    base: str
    offset: int


@dataclass
class Instruction:
    """An opcode with all its modifiers, the operands, and the predicate register of its guard (and whether negated)."""

    op: str
    guard: tuple[str, bool] | None
    operands: list[Any]
    where: str
    text: str
    index: int = 0

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.op.split(".")[0]

    @property
    def modifiers(self) -> list[str]:
        """The opcode's words, its name first."""
        return self.op.split(".")

    def __str__(self) -> str:
        return f"{self.where}  {self.text}"


@dataclass
class Segment:
    """Instructions that run without interruption, and how they end.

    end: "fall" (into the next segment), "branch" (to target, where the guard of `last` holds), "barrier", "return",
    "nothing" (the end of the text). kinds: how many instructions of each kind, `last` among them.
    """

    instructions: list[Instruction] = field(default_factory=list)
    end: str = "fall"
    last: Instruction | None = None
    target: int = -1
    kinds: Counter[str] = field(default_factory=Counter)


def kind_of(op: str) -> str:
    """Return the name under which an instruction is counted."""
    name = op.split(".")[0]
    if name in ("ld", "st"):
        return f"{name}.{'shared' if 'shared' in op else 'param' if 'param' in op else 'global'}"
    if name == "cp":
        return "cp.async"
    return KINDS.get(name, "fma/alu f32" if op.endswith(".f32") and name in ("fma", "add", "mul", "sub") else "other")


def parse_operand(text: str) -> Any:
    """Return a register's name (str), a number (int), a Vector or an Address."""
    text = text.strip()
    if text.startswith("{"):
        return Vector([parse_operand(part) for part in text[1:-1].split(",")])
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text):
        return int(text[2:], 16)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.rstrip("U"), 0)
    return text


def split_operands(text: str) -> list[str]:
    """Split at the commas outside of braces and brackets."""
    parts, depth, start = [], 0, 0
    for n, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:n])
            start = n + 1
    return [p for p in [*parts, text[start:]] if p.strip()]


def required(pattern: str, text: str, flags: int = 0) -> re.Match[str]:
    """Return the first match; raise where there is none."""
    match = re.search(pattern, text, flags)
    if match is None:
        raise Fault(f"no {pattern!r} in {text[:100]!r}")
    return match


class Kernel:
    """A PTX entry: parameters (type, name), threads, registers (index, bits), instructions and segments.

    fine: segments are short around accesses to shared memory, so that warps can interleave there. retry: the segments
    of loops that only wait, whose repeated loads are no work of a step.
    """

    def __init__(self, ptx: str, fine: bool) -> None:
        self.fine = fine
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"[^"]*?([^/"]+)"', ptx))
        self.name, head, body = required(r"\.entry\s+(\w+)\s*\((.*?)\)(.*)", ptx, re.S).groups()
        self.params = re.findall(r"\.param\s+\.(\w+)\s+(?:\.ptr\s+\.\w+\s+\.align\s+\d+\s+)?(\w+)", head)
        self.threads = int(required(r"\.reqntid\s+(\d+)", body)[1])
        if re.search(r"^\s*\.shared\s", ptx, re.M):
            raise Fault("static shared memory")
        self.registers: dict[str, tuple[int, int]] = {}
        self.widths: list[int] = []
        items = list(self.items(body[body.index("{") + 1 : body.rindex("}\n") if "}\n" in body else None]))
        self.instructions = [item for item in items if isinstance(item, Instruction)]
        for n, instruction in enumerate(self.instructions):
            instruction.index = n
        self.resolve_labels({item for item in items if isinstance(item, str)})
        self.segments = self.cut(items)
        self.retry = self.waiting_loops()

    def items(self, body: str) -> Iterator[str | Instruction]:
        """Yield labels and instructions in order; declare the registers.

        Names declared in the braces of inline PTX are of those braces: "@" and the number of the brace follow them.
        """
        where, pending = "", ""
        scopes, opened = [""], 0
        for raw in body.split("\n"):
            line = raw.split("//")[0].strip()
            label = re.fullmatch(r"(\$?[\w$]+):", line)
            if line.startswith(".loc"):
                where = self.source_line(line)
            elif label:
                yield label[1] + scopes[-1]
            elif line == "{":
                opened += 1
                scopes.append(f"{scopes[-1]}@{opened}")
            elif line == "}":
                scopes = scopes[:-1] or [""]  # (the entry's own brace opened none)
            elif line and not line.startswith((".section", ".b8", ".b32", ".b64")):
                pending += " " + line
                if not line.endswith(";"):
                    continue
                for statement in map(str.strip, pending.split(";")):
                    if statement.startswith(".reg"):
                        self.declare(statement, scopes[-1])
                    elif statement and not statement.startswith("."):
                        yield self.instruction(statement, where, scopes[-1])
                pending = ""

    def source_line(self, loc: str) -> str:
        """Return file and line of a .loc directive, and where that was inlined."""
        own = required(r"\.loc\s+(\d+)\s+(\d+)", loc)
        above = re.search(r"inlined_at\s+(\d+)\s+(\d+)", loc)
        where = f"{self.files.get(own[1], own[1])}:{own[2]}"
        return where + (f" in {self.files.get(above[1], above[1])}:{above[2]}" if above else "")

    def declare(self, statement: str, scope: str) -> None:
        """Add the registers of a .reg directive."""
        kind = required(r"\.reg\s+\.(\w+)", statement)[1]
        width = 1 if kind == "pred" else int(re.sub(r"\D", "", kind))
        names: list[str] = []
        for name in (n.strip() for n in statement.split(kind, 1)[1].split(",")):
            many = re.fullmatch(r"(%?\w+)<(\d+)>", name)
            names += [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]
        for name in names:
            if name + scope not in self.registers:
                self.registers[name + scope] = (len(self.widths), width)
                self.widths.append(width)

    def scoped(self, name: str, scope: str) -> str:
        """Return the register that a name means inside of these braces."""
        while scope and name + scope not in self.registers:
            scope = scope.rpartition("@")[0]
        return name + scope if name + scope in self.registers else name

    def renamed(self, operand: Any, scope: str) -> Any:
        """Return an operand with the registers that its names mean inside of these braces."""
        if isinstance(operand, Vector):
            return Vector([self.renamed(part, scope) for part in operand.parts])
        if isinstance(operand, Address):
            return Address(self.scoped(operand.base, scope), operand.offset)
        return self.scoped(operand, scope) if isinstance(operand, str) else operand

    def instruction(self, statement: str, where: str, scope: str) -> Instruction:
        """Return the instruction of a statement."""
        text = re.sub(r"\s+", " ", statement)
        match = re.match(r"@(!?)(%?\w+) ", text)
        guard = (self.scoped(match[2], scope), match[1] == "!") if match else None
        op, _, rest = text[match.end() if match else 0 :].partition(" ")
        operands = [self.renamed(parse_operand(part), scope) for part in split_operands(rest)]
        if op in ("bra", "bra.uni"):
            operands[0] += scope
        return Instruction(op, guard, operands, where, text)

    def resolve_labels(self, labels: set[str]) -> None:
        """Give every branch the label of the innermost braces around it that have one of its name."""
        for instruction in self.instructions:
            if instruction.name == "bra":
                target = instruction.operands[0]
                while target not in labels and "@" in target:
                    target = target.rpartition("@")[0]
                instruction.operands[0] = target

    def cut(self, items: list[str | Instruction]) -> list[Segment]:
        """Return the segments."""
        targets = {i.operands[0] for i in self.instructions if i.name == "bra"}
        segments, at = [Segment()], dict[str, int]()
        for item in items:
            current = segments[-1]
            if isinstance(item, str):
                if item in targets:
                    if current.instructions:
                        segments.append(Segment())
                    at[item] = len(segments) - 1
                continue
            current.kinds[kind_of(item.op)] += 1
            if end := self.end_of(item):
                current.end, current.last = end, item
                segments.append(Segment())
            else:
                current.instructions.append(item)
                if self.interrupts(item, len(current.instructions)):
                    segments.append(Segment())
        if segments[-1].instructions:
            raise Fault("code behind the last return")
        segments[-1].end = "nothing"
        for segment in segments:
            if segment.end == "branch":
                assert segment.last is not None
                segment.target = at[segment.last.operands[0]]
        return segments

    def end_of(self, instruction: Instruction) -> str:
        """Return how an instruction ends a segment; empty if it is one like others."""
        if instruction.name == "bra":
            return "branch"
        if instruction.name in ("ret", "exit"):
            if instruction.guard is not None:
                raise Fault(f"guarded: {instruction}")
            return "return"
        if instruction.op in ("bar.sync", "barrier.sync", "barrier.sync.aligned"):
            if instruction.operands != [0] or instruction.guard:
                raise Fault(f"barrier: {instruction}")
            return "barrier"
        return ""

    def interrupts(self, instruction: Instruction, count: int) -> bool:
        """Whether others may run after this instruction, the segment's count-th."""
        atomic = ".global" in instruction.op and instruction.name in ("atom", "red")
        visible = atomic or bool(ORDERED & set(instruction.modifiers)) or instruction.name == "fence"
        shared = self.fine and ".shared" in instruction.op
        return visible or (shared and count > MOST_INSTRUCTIONS_TO_SHARED) or count >= MOST_INSTRUCTIONS

    def waiting_loops(self) -> set[int]:
        """Return the segments of loops that only wait: they load what others store, multiply and store nothing."""
        found: set[int] = set()
        for n, segment in enumerate(self.segments):
            if segment.end == "branch" and segment.target <= n:
                body = range(segment.target, n + 1)
                inside = [i.op for k in body for i in self.segments[k].instructions]
                polls = any((op.startswith("ld.") and ORDERED & set(op.split("."))) or "acquire" in op for op in inside)
                works = any("mma" in op or op.startswith("st.global") or op == "fma.rn.f32" for op in inside)
                if polls and not works:
                    found |= set(body)
        return found
