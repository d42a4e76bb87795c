"""What the commands print: a row in a line, and the means of a run. Needs no pandas."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict

from lstm_triton_kernels.limit import Constants
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from benchmarks.providers import Provider
from benchmarks.rows import Row, outcome_of, provider_of, ratio_of, shape_of
from benchmarks.suites import WORDS, Case
from benchmarks.text import number, ratio

PLAIN_WIDTH = 140
GROUP = ("suite", "regime", "mode", "variant", "baseline")
"""What the rows of a mean have in common, beside the provider; they differ in type and sizes."""


def console() -> Console:
    """Return where everything is printed; wide where it is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


def line_of(row: Row) -> str:
    """Return a row in one line."""
    start = f"{provider_of(row):<24} {row['suite']:<8} {row['mode']:<16} {row['dtype']:<8} {shape_of(row)}:"
    if row["ms_median"] is None:
        return f"{start} {row['error']}"
    beside = f", {row['baseline']} {row['baseline_ms']:.4g} ms, ratio {ratio(row)}" if ratio_of(row) else ""
    slowest = f", p99 {row['ms_p99']:.4g} ms" if row["ms_p99"] is not None else ""
    return f"{start} {row['ms_median']:.4g} ms{slowest}, {row['us_per_step']:.3g} us a step{beside}"


def means_table(rows: Iterable[Row]) -> Table:
    """Return the table at the end of a run: a geometric mean per provider and group of rows."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["provider"] != row["baseline"]:
            groups.setdefault((*(row[name] for name in GROUP), provider_of(row)), []).append(row)
    title = "time of the baseline / time: geometric means, above 1 is faster"
    result = Table(title=title, caption=None if groups else "no rows", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for head in (*GROUP, "provider", "mean", "least", "rows", "without a ratio"):
        result.add_column(head, justify="right" if head in ("mean", "least", "rows") else "left")
    for key, group in groups.items():
        found = [value for row in group if (value := ratio_of(row))]
        mean = math.exp(sum(map(math.log, found)) / len(found)) if found else None
        without = Counter(outcome_of(row) for row in group if not ratio_of(row))
        words = ", ".join(f"{count} {kind}" for kind, count in sorted(without.items()))
        cells = (*key, number(mean), number(min(found, default=None)), str(len(found)), words)
        result.add_row(*map(Text, cells))
    return result


def suites_table(cases: Iterable[Case]) -> Table:
    """Return the table of all suites: how many of the cases each has, and what it measures."""
    counts = Counter(case.suite for case in cases)
    result = Table("suite", Column("cases", justify="right"), "what", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for suite, words in WORDS.items():
        result.add_row(suite, str(counts[suite]), Text(words))
    return result


def providers_table(providers: Iterable[Provider]) -> Table:
    """Return the table of the providers: what each leaves out, and how to install one that is missing."""
    result = Table("provider", "leaves out", "missing", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for one in providers:
        result.add_row(*map(Text, (one.key, one.leaves_out or "nothing", one.missing() or "")))
    return result


def constants_lines(found: Constants) -> list[tuple[str, str]]:
    """Return name and value of every constant there is, in the units of `Constants`."""
    lines: list[tuple[str, str]] = []

    def add(name: str, value: object) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                add(f"{name}, {key}", one)
        elif isinstance(value, (int, float)):
            lines.append((name, number(value)))

    for name, value in asdict(found).items():
        add(name, value)
    return lines


def constants_table(found: Constants) -> Table:
    """Return the table of the constants."""
    result = Table(title="constants of the limit", show_header=False)
    for line in constants_lines(found):
        result.add_row(*line)
    return result
