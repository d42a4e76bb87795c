"""What the checks of a launch found, and where."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.emulator.parse import Kernel


@dataclass
class Finding:
    """What a check saw, at which instruction, and how often."""

    check: str
    where: str
    message: str
    times: int = 1

    def __str__(self) -> str:
        return f"{self.check}: {self.message} (x{self.times}) at {self.where}"


class Findings:
    """The findings of a launch: one for each check, instruction and kind of message."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.found: dict[tuple[str, int, str], Finding] = {}

    def report(self, check: str, index: int, message: str) -> None:
        """Record what a check saw at the instruction of this index."""
        key = (check, index, re.sub(r"\d+", "N", message))
        if key in self.found:
            self.found[key].times += 1
        else:
            where = f"{self.kernel.name}: {self.kernel.instructions[index]}"
            self.found[key] = Finding(check, where, message)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.found.values())

    def __len__(self) -> int:
        return len(self.found)
