"""How numbers, ratios and tables are written, on the console and in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from benchmarks.rows import Row, is_noise, ratio_of


def number(value: float | None) -> str:
    """Write a number with three significant digits, or as many as stand before the point; "" for none."""
    if value is None or math.isnan(value):
        return ""
    if isinstance(value, int) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.3g}"


def ratio(row: Row) -> str:
    """Write a row's ratio with its 20th and 80th percentile, and whether that makes it noise; "" for none."""
    found = number(ratio_of(row))
    if not found or row["ratio_p20"] is None or row["ratio_p80"] is None:
        return found
    return f"{found} ({number(row['ratio_p20'])} to {number(row['ratio_p80'])}{', noise' * is_noise(row)})"


def table(heads: Sequence[str], lines: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """Write a Markdown table; the columns `right` are aligned to the right."""
    aligned = set(right)
    rules = ["---:" if column in aligned else "---" for column in range(len(heads))]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in (heads, rules, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def escaped(words: str) -> str:
    """Return words of others as Markdown that shows them as they are; `table` takes care of bars."""
    return re.sub(r"([\\`*_\[\]<>#~&$])", r"\\\1", words)
