"""The whole report: from rows to Markdown tables.

Every number is a row's, or a mean or count of rows. A row without a time is counted and named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath

from lstm_triton_kernels.limit import Constants

from benchmarks.markdown import counted, dates, escaped, link_target, means_table, table
from benchmarks.rows import BASELINE, Row
from benchmarks.suites import STORAGE
from benchmarks.summary import (
    GROUP_HEADS,
    NO_GPU,
    compared,
    geometric_means,
    in_order,
    in_words,
    is_gpu,
    kind,
    machines,
    number,
    older_note,
    place,
    ratio_in_words,
    ratio_of,
)

HOW = f"""\
Every provider solves the same problem with the same numbers, the input's matmul included, and is timed only after its
outputs and gradients were found right: *error* is the largest distance from a float64 reference, relative to its norm.
It then takes turns with its baseline, call by call after a warm-up; on a GPU device events stand around each call and
nothing waits for it on the host, on a CPU the host's clock stands there. *ms* is the median over the calls, *baseline
ms* that of the baseline over the same turns, and *ratio* the second over the first: **above 1 is faster than the
baseline**. In brackets stand the 20th and 80th percentile of the quotients turn by turn; where they or the ratio do not
all lie on one side of 1, the ratio is *noise*. A baseline's own row is timed alone, at another moment: no ratio is made
of it. *us/step* is the time of one time step of one layer and direction, *cpu us* the time until an idle device's call
returns to Python, and *MiB* the most memory that a call allocates. The baseline is `{BASELINE}`; beside a variant that
it lacks it computes the standard cell of the same sizes, but where a call computes next to nothing the baseline of
those is their step in a few lines of PyTorch, `by-hand`. *limit* is a bound from below on us/step, from the machine's
constants (see `lstm_triton_kernels.limit`); *times* is us/step over it. The regime is the algorithm that PyTorch asks
cuDNN for at the shape, or the CPU."""


def markdown(
    rows: Sequence[Row],
    constants: Mapping[str, Constants],
    damaged: Sequence[Exception],
    plots: Sequence[tuple[str, str]] = (),
    leaves_out: Mapping[str, str] | None = None,
) -> str:
    """The whole report: what was measured where and how, means, slowest rows, all rows, what failed.

    - constants: by machine; damaged: what could not be read; plots: titles and paths, relative to the report
    - leaves_out: by provider and strategy (`Row.name`), what it does not do that `torch.nn.LSTM` does
    """
    rows = in_order(rows)
    parts = ["# Benchmarks", HOW, *older_note(rows)]
    if not rows:
        parts.append("No row has been measured yet.")
    elif not any(map(is_gpu, rows)):
        parts.append(NO_GPU)
    if damaged:
        lines = [f"- {escaped(without_folder(str(error)))}" for error in damaged]
        parts += ["## Damaged files, left out", "\n".join(lines)]
    if plots:
        parts += ["## Plots", "\n".join(f"- [{escaped(title)}]({link_target(path)})" for title, path in plots)]
    present = [name for name in (leaves_out or {}) if any(row.name == name for row in rows)]
    if leaves_out and present:
        cells = [(name, leaves_out[name] or "nothing") for name in present]
        parts += ["## What each leaves out", table(("provider", "leaves out"), cells)]
    for gpu in machines(rows, constants):
        own = [row for row in rows if row.gpu == gpu]
        parts += [f"## {escaped(gpu)}", *_machine(own, constants.get(gpu))]
    return "\n\n".join(parts) + "\n"


def _machine(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    if not rows:
        return ["No row has been measured here yet.", *_constants_part(constants)]
    means = geometric_means(compared(rows))
    parts = [_where(rows), "### Geometric means of the ratio to the baseline", *means_table(means)]
    slowest = [
        [*mean.group, mean.name, ratio_in_words(mean.worst), mean.worst.dtype, mean.worst.shape,
         f"{mean.slower} of {mean.count}"]
        for mean in means if mean.worst is not None
    ]  # fmt: skip
    if slowest:
        heads = [*GROUP_HEADS, "provider", "ratio", "dtype", "shape", "slower rows, without noise"]
        parts += ["### The slowest row of each mean", table(heads, slowest, right=(len(GROUP_HEADS) + 1,))]
    parts += ["### Rows without a time or a ratio", _missing(rows)]
    parts += _constants_part(constants)
    parts.append("### All rows")
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        summary = f"<summary>{escaped(suite)}, {counted(len(own), 'row')}</summary>"
        parts += [f"<details>\n{summary}", _all_rows(own), "</details>"]
    return parts


def _where(rows: Sequence[Row]) -> str:
    """The versions that rows were measured with, one line for each combination."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.driver, row.torch, row.triton, row.cudnn, row.commit), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: min(row.date for row in item[1]))
    lines = [[*key, dates(group), len(group)] for key, group in ordered]
    text = table(["driver", "PyTorch", "Triton", "cuDNN", "commit", "measured", "rows"], lines, right=(6,))
    if any(row.commit.endswith("+") for row in rows):
        text += "\n\nA `+` behind a commit: the code that was measured differed from it."
    return text


def _missing(rows: Iterable[Row]) -> str:
    missing = [row for row in rows if ratio_of(row) is None]
    if not missing:
        return "None."
    kinds = Counter(kind(row) for row in missing)
    cells = [
        [row.suite, row.mode, row.name, row.dtype, row.shape, escaped(missing_words(row))] for row in missing
    ]  # fmt: skip
    return f"{in_words(kinds)}.\n\n{table(['suite', 'mode', 'provider', 'dtype', 'shape', 'why'], cells)}"


def missing_words(row: Row) -> str:
    """Why there is no ratio."""
    if row.timed:
        return f"{number(row.ms_median)} ms, but no time of {row.baseline} to compare with"
    return row.error if isinstance(row.error, str) and row.error else "not timed, and no words say why"


_CONSTANTS: tuple[tuple[str, Callable[[Constants], float | None]], ...] = (
    ("device memory, copy, GB/s", lambda found: found.copy_gb_per_s),
    ("L2 read by all multiprocessors, GB/s", lambda found: found.l2_read_gb_per_s),
    ("L2 round trip, us", lambda found: found.l2_round_trip_us),
    ("launch, us", lambda found: found.launch_us),
    ("multiprocessors", lambda found: found.multiprocessors),
    ("on-chip memory of a multiprocessor, KiB", lambda found: found.on_chip_bytes and found.on_chip_bytes / 1024),
)


def _constants_part(constants: Constants | None) -> list[str]:
    if constants is None:
        return []
    return ["### Constants of the limit", table(["constant", "value"], constants_lines(constants), right=(1,))]


def constants_lines(found: Constants) -> list[list[str]]:
    """Name and value of every constant there is."""
    lines = [[name, number(value)] for name, of in _CONSTANTS if (value := of(found)) is not None]
    rates = sorted(found.matmul_tflop_per_s.items(), key=lambda item: place(item[0], tuple(STORAGE)))
    lines += [[f"matmul, {dtype}, TFLOP/s", number(rate)] for dtype, rate in rates]
    for method, by_programs in (found.wait_us or {}).items():
        for programs, us in sorted(by_programs.items()):
            lines.append([f"wait by {method}, {counted(programs, 'program')}, us", number(us)])
    return lines


def _all_rows(rows: Iterable[Row]) -> str:
    heads = [
        "provider", "mode", "dtype", "shape", "ms", "baseline", "baseline ms", "ratio", "us/step", "cpu us", "MiB",
        "limit", "times", "error",
    ]  # fmt: skip
    cells = []
    for row in rows:
        beside = [] if row.is_baseline else [row.baseline, number(row.baseline_ms), ratio_in_words(row)]
        figures = (row.us_per_step, row.cpu_us_per_call, row.peak_mib, row.limit_us_per_step, row.limit_ratio)
        words = f"{row.error:.1e}" if isinstance(row.error, float) and math.isfinite(row.error) else kind(row)
        if row.timed and row.error is None:
            words = ""
        start = [row.name, row.mode, row.dtype, row.shape, number(row.ms_median), *(beside or [""] * 3)]
        cells.append([*start, *map(number, figures), words])
    return table(heads, cells, right=(4, *range(6, len(heads))))


def without_folder(words: str) -> str:
    """An error's words with the file's name where its path stands: a report is read on other machines."""
    path, separator, rest = words.partition(": ")
    return f"{PurePath(path).name}{separator}{rest.replace(path, PurePath(path).name)}" if separator else words
