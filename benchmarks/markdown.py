"""Pieces of Markdown that the report and the README share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from benchmarks.rows import Row
from benchmarks.summary import GROUP_HEADS, Mean, name_key, number


def table(heads: Sequence[str], lines: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns `right` are aligned to the right."""
    aligned = set(right)
    rules = ["---:" if column in aligned else "---" for column in range(len(heads))]
    cells: list[Sequence[object]] = [heads, rules, *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in cells)


def _cell(content: object) -> str:
    """On one line, with no bar that Markdown would take for the cell's end."""
    return " ".join(str(content).split()).replace("|", "\\|")


def escaped(text: str) -> str:
    """Words of others as Markdown that shows them as they are (but for bars, which matter in a table alone)."""
    return re.sub(r"([\\`*_\[\]<>#~&$])", r"\\\1", " ".join(text.split()))


def link_target(path: str) -> str:
    """A path as the target of a link."""
    return re.sub(r"[^\w./~-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), str(path))


def counted(count: int, what: str) -> str:
    """A count and its noun, in the plural where there are several."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def dates(rows: Iterable[Row]) -> str:
    """When rows were measured: a day, or the first and the last."""
    days = sorted({row.date for row in rows})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def means_table(means: Sequence[Mean]) -> list[str]:
    """A line per suite, regime, mode and variant, a column per provider; nothing to compare is said in words."""
    if not means:
        return ["Nothing beside the baseline was measured."]
    names = sorted({mean.name for mean in means}, key=name_key)
    lines: dict[tuple[str, ...], dict[str, Mean]] = {}
    for mean in means:
        lines.setdefault(mean.group, {})[mean.name] = mean
    cells = [[*key, *(mean_cell(found.get(name)) for name in names)] for key, found in lines.items()]
    note = "In brackets the rows that a mean is of; *n of m*: of m rows n have a ratio, the others are named"
    return [
        table([*GROUP_HEADS, *names], cells, right=range(len(GROUP_HEADS), len(GROUP_HEADS) + len(names))),
        f"{note} in the report. A mean is of the rows that its provider computes, not always of the same.",
    ]


def mean_cell(mean: Mean | None) -> str:
    """A mean and the number of its rows; "" where there is none."""
    if mean is None:
        return ""
    if mean.ratio is None:
        return f"none of {mean.total}"
    return f"{number(mean.ratio)} ({mean.count if mean.count == mean.total else f'{mean.count} of {mean.total}'})"
