"""The results in words and tables: from rows to text, for the report, the README and the end of a run.

Every number in these texts is a row's, or a mean or count of rows. A row without a time is counted and named.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from lstm_triton_kernels.limit import Constants

from benchmarks.rows import BASELINE, Row
from benchmarks.suites import CPU, MODES, REGIMES, STORAGE, SUITES

if TYPE_CHECKING:
    from rich.table import Table

OURS = "lstm_triton auto"
"""What a user of the library gets who chooses nothing."""

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
NO_GPU = "No GPU result yet: no figure of speed against cuDNN is claimed."

HOW = f"""\
Every provider solves the same problem with the same numbers, the input's matmul included, and is timed only after its
outputs and gradients were found right: *error* is the largest distance from a float64 reference, relative to its norm.
It then takes turns with `{BASELINE}`, call by call after a warm-up; on a GPU device events stand around each call and
nothing waits for it on the host, on a CPU the host's clock stands there. *ms* is the median over the calls, *us/step*
that of one time step of one layer and direction, *cpu us* the time until an idle device's call returns to Python, and
*MiB* the most memory that a call allocates. *ratio* is the time of `{BASELINE}` over the time of the row, the median
over the turns: **above 1 is faster than `{BASELINE}`**. Beside a variant that it lacks, `{BASELINE}` computes the
standard cell of the same sizes. *limit* is a bound from below on us/step, from the machine's constants (see
`lstm_triton_kernels.limit`); *times* is us/step over it. The regime is the algorithm that PyTorch asks cuDNN for at the
shape, or the CPU."""


@dataclass(frozen=True)
class Mean:
    """The ratio of one provider's rows of one suite, regime and mode on one machine.

    - ratio: geometric mean of the rows that have one, None if none has; count: how many have; slower: how many below 1
    - worst: the row of the least ratio
    - unpaired: rows with a time, but without one of the baseline to compare with; untimed: rows without a time
    """

    gpu: str
    suite: str
    regime: str
    mode: str
    name: str
    ratio: float | None
    count: int
    slower: int
    worst: Row | None
    unpaired: tuple[Row, ...]
    untimed: tuple[Row, ...]

    @property
    def total(self) -> int:
        """All rows."""
        return self.count + len(self.unpaired) + len(self.untimed)


def geometric_means(rows: Iterable[Row]) -> list[Mean]:
    """A Mean per machine, suite, regime, mode and name of the rows; GPUs first, suites as they are listed."""
    groups: dict[tuple[str, str, str, str, str], list[Row]] = {}
    for row in in_order(rows):
        groups.setdefault((row.gpu, row.suite, row.regime, row.mode, row.name), []).append(row)
    places = {key[:4]: place for place, key in enumerate(groups)}
    ordered = sorted(groups, key=lambda key: (places[key[:4]], name_key(key[4])))
    return [_mean(*key, groups[key]) for key in ordered]


def _mean(gpu: str, suite: str, regime: str, mode: str, name: str, rows: list[Row]) -> Mean:
    paired = [(value, row) for row in rows if (value := ratio_of(row)) is not None]
    return Mean(
        gpu, suite, regime, mode, name,
        ratio=math.exp(statistics.fmean(math.log(value) for value, _ in paired)) if paired else None,
        count=len(paired),
        slower=sum(value < 1 for value, _ in paired),
        worst=min(paired, key=lambda pair: pair[0])[1] if paired else None,
        unpaired=tuple(row for row in rows if row.timed and ratio_of(row) is None),
        untimed=tuple(row for row in rows if not row.timed),
    )  # fmt: skip


def ratio_of(row: Row) -> float | None:
    """The row's ratio to the baseline if it was timed and the ratio is a positive number."""
    value = row.baseline_ratio
    return value if row.timed and value is not None and 0 < value < math.inf else None


def is_gpu(row: Row) -> bool:
    """Whether a GPU computed the row."""
    return row.regime != CPU


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorted as they are shown: by machine (GPUs first), suite, regime, mode, type, sizes, provider."""
    rows = list(rows)
    with_gpu = {row.gpu for row in rows if is_gpu(row)}

    def key(row: Row) -> tuple[object, ...]:
        sizes = (row.L, row.D, row.T, row.B, row.I, row.H)
        named = (_place(row.suite, SUITES), _place(row.regime, REGIMES), _place(row.mode, MODES))
        case = (_place(row.dtype, tuple(STORAGE)), row.variant != "standard", row.variant, *sizes)
        return (row.gpu not in with_gpu, row.gpu, *named, *case, name_key(row.name), row.date)

    return sorted(rows, key=key)


def name_key(name: str) -> tuple[object, ...]:
    """Sorts names of providers: the baseline, the library as it is used, its single strategies, the others."""
    provider = name.split(" ")[0]
    return (provider != BASELINE, name != OURS, provider != OURS.split(" ")[0], name)


def _place(value: str, known: Sequence[str]) -> tuple[int, str]:
    """Sorts by the place in a list, what is not in it behind."""
    return (known.index(value) if value in known else len(known), value)


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
    parts = ["# Benchmarks", HOW]
    if not rows:
        parts.append("No row has been measured yet.")
    elif not any(map(is_gpu, rows)):
        parts.append(NO_GPU)
    if damaged:
        lines = [f"- {_words(_without_folder(str(error)))}" for error in damaged]
        parts += ["## Damaged files, left out", "\n".join(lines)]
    if plots:
        parts += ["## Plots", "\n".join(f"- [{_words(title)}]({_target(path)})" for title, path in plots)]
    present = [name for name in (leaves_out or {}) if any(row.name == name for row in rows)]
    if leaves_out and present:
        cells = [(name, leaves_out[name] or "nothing") for name in present]
        parts += ["## What each leaves out", table(("provider", "leaves out"), cells)]
    for gpu in machines(rows, constants):
        own = [row for row in rows if row.gpu == gpu]
        parts += [f"## {_words(gpu)}", *_machine(own, constants.get(gpu))]
    return "\n\n".join(parts) + "\n"


def machines(rows: Iterable[Row], constants: Mapping[str, Constants] | None = None) -> list[str]:
    """The machines' names, GPUs first."""
    known = constants or {}
    cpu = {row.gpu: not is_gpu(row) for row in sorted(rows, key=is_gpu)}
    cpu = {gpu: found.multiprocessors is None for gpu, found in known.items()} | cpu
    return sorted(cpu, key=lambda gpu: (cpu[gpu], gpu))


def _machine(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    if not rows:
        return ["No row has been measured here yet.", *_constants_part(constants)]
    means = [mean for mean in geometric_means(rows) if not _is_baseline(mean.name)]
    parts = [_where(rows), f"### Geometric means of the ratio to {BASELINE}", *_means_table(means)]
    slowest = [
        [mean.suite, mean.regime, mean.mode, mean.name, number(ratio_of(mean.worst)), mean.worst.dtype,
         mean.worst.shape, f"{mean.slower} of {mean.count}"]
        for mean in means if mean.worst is not None
    ]  # fmt: skip
    if slowest:
        heads = ["suite", "regime", "mode", "provider", "ratio", "dtype", "shape", "rows below 1"]
        parts += ["### The slowest row of each mean", table(heads, slowest, right=(4,))]
    parts += ["### Rows without a time or a ratio", _missing(rows)]
    parts += _constants_part(constants)
    parts.append("### All rows")
    for suite in dict.fromkeys(row.suite for row in rows):
        own = [row for row in rows if row.suite == suite]
        summary = f"<summary>{_words(suite)}, {_count(len(own), 'row')}</summary>"
        parts += [f"<details>\n{summary}", _all_rows(own), "</details>"]
    return parts


def _where(rows: Sequence[Row]) -> str:
    """The versions that rows were measured with, one line for each combination."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.driver, row.torch, row.triton, row.cudnn, row.commit), []).append(row)
    ordered = sorted(groups.items(), key=lambda item: min(row.date for row in item[1]))
    lines = [[*key, _dates(group), len(group)] for key, group in ordered]
    text = table(["driver", "PyTorch", "Triton", "cuDNN", "commit", "measured", "rows"], lines, right=(6,))
    if any(row.commit.endswith("+") for row in rows):
        text += "\n\nA `+` behind a commit: the code that was measured differed from it."
    return text


def _dates(rows: Iterable[Row]) -> str:
    dates = sorted({row.date for row in rows})
    return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def _means_table(means: Sequence[Mean]) -> list[str]:
    """A line per suite, regime and mode, a column per provider; nothing to compare is said in words."""
    if not means:
        return [f"Nothing beside {BASELINE} was measured."]
    names = sorted({mean.name for mean in means}, key=name_key)
    lines: dict[tuple[str, str, str], dict[str, Mean]] = {}
    for mean in means:
        lines.setdefault((mean.suite, mean.regime, mean.mode), {})[mean.name] = mean
    cells = [[*key, *(mean_cell(found.get(name)) for name in names)] for key, found in lines.items()]
    note = "In brackets the rows that a mean is of; *n of m*: of m rows n have a ratio, the others are named"
    return [
        table(["suite", "regime", "mode", *names], cells, right=range(3, 3 + len(names))),
        f"{note} in the report. A mean is of the rows that its provider computes, not always of the same.",
    ]


def mean_cell(mean: Mean | None) -> str:
    """A mean and the number of its rows; "" where there is none."""
    if mean is None:
        return ""
    if mean.ratio is None:
        return f"none of {mean.total}"
    return f"{number(mean.ratio)} ({mean.count if mean.count == mean.total else f'{mean.count} of {mean.total}'})"


def _missing(rows: Iterable[Row]) -> str:
    missing = [row for row in rows if ratio_of(row) is None]
    if not missing:
        return "None."
    kinds = Counter(kind(row) for row in missing)
    cells = [
        [row.suite, row.mode, row.name, row.dtype, row.shape, _words(missing_words(row))] for row in missing
    ]  # fmt: skip
    return f"{_kinds(kinds)}.\n\n{table(['suite', 'mode', 'provider', 'dtype', 'shape', 'why'], cells)}"


def kind(row: Row) -> str:
    """What became of a row, in a word or two."""
    if row.timed:
        return "with a ratio" if ratio_of(row) is not None else "timed alone"
    words = str(row.error)
    return next((kind for kind in ("out of memory", "wrong") if words.startswith(kind)), "failed")


def missing_words(row: Row) -> str:
    """Why there is no ratio."""
    if row.timed:
        return f"{number(row.ms_median)} ms, but no time of {BASELINE} to compare with"
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
    return ["### Constants of the limit", table(["constant", "value"], _constants(constants), right=(1,))]


def _constants(found: Constants) -> list[list[str]]:
    lines = [[name, number(value)] for name, of in _CONSTANTS if (value := of(found)) is not None]
    rates = sorted(found.matmul_tflop_per_s.items(), key=lambda item: _place(item[0], tuple(STORAGE)))
    lines += [[f"matmul, {dtype}, TFLOP/s", number(rate)] for dtype, rate in rates]
    for method, by_programs in (found.wait_us or {}).items():
        for programs, us in sorted(by_programs.items()):
            lines.append([f"wait by {method}, {_count(programs, 'program')}, us", number(us)])
    return lines


def _all_rows(rows: Iterable[Row]) -> str:
    heads = ["provider", "mode", "dtype", "shape", "ms", "us/step", "cpu us", "MiB", "ratio", "limit", "times", "error"]
    cells = []
    for row in rows:
        figures = (
            row.ms_median, row.us_per_step, row.cpu_us_per_call, row.peak_mib, row.baseline_ratio,
            row.limit_us_per_step, row.limit_ratio,
        )  # fmt: skip
        words = f"{row.error:.1e}" if isinstance(row.error, float) and math.isfinite(row.error) else kind(row)
        if row.timed and row.error is None:
            words = ""
        cells.append([row.name, row.mode, row.dtype, row.shape, *map(number, figures), words])
    return table(heads, cells, right=range(4, 12))


def readme_block(
    rows: Sequence[Row],
    constants: Mapping[str, Constants],
    report_link: str,
    plots: Sequence[tuple[str, str]] = (),
) -> str:
    """The short form for the README: means and slowest rows of every GPU, then the CPU; or plainly that there is none.

    - plots: titles and paths, relative to the README; with GPU results the first is shown and the others are linked
    """
    rows = in_order(rows)
    on_gpu, on_cpu = [row for row in rows if is_gpu(row)], [row for row in rows if not is_gpu(row)]
    parts: list[str] = []
    if not on_gpu:
        parts.append(f"**{NO_GPU}**")
    for gpu in machines(on_gpu):
        parts += _gpu_in_brief([row for row in on_gpu if row.gpu == gpu], constants.get(gpu))
    for cpu in machines(on_cpu):
        parts += _cpu_in_brief([row for row in on_cpu if row.gpu == cpu], bool(on_gpu))
    if not on_cpu:
        parts.append("No CPU result yet.")
    links = [f"[{_words(title)}]({_target(path)})" for title, path in plots]
    if on_gpu and links:
        links[0] = f"!{links[0]}"
        parts.append(links.pop(0))
    report = f"All rows, how they were measured, and what failed: [{_words(PurePath(report_link).name)}]"
    parts.append(f"{report}({_target(report_link)}).")
    if links:
        parts.append("Plots: " + ", ".join(links) + ".")
    return "\n\n".join(parts)


def _gpu_in_brief(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    versions = _versions(rows, ("driver", "PyTorch", "Triton", "cuDNN"), ("driver", "torch", "triton", "cudnn"))
    parts = [
        f"**{_words(rows[0].gpu)}**, {versions}, {_dates(rows)}. Geometric means of the time of `{BASELINE}` over the "
        "time of each, **above 1 is faster**:"
    ]
    means = [mean for mean in geometric_means(rows) if not _is_baseline(mean.name)]
    parts += _means_table(means)
    parts += _slower_in_brief(means)
    parts += _missing_in_brief(rows)
    parts += _limit_in_brief(rows, constants)
    return parts


def _slower_in_brief(means: Sequence[Mean]) -> list[str]:
    """How many rows are slower than the baseline, and the slowest: of the library per suite, of others in all."""
    groups: dict[tuple[str, str], list[Mean]] = {}
    for mean in means:
        if mean.worst is not None:
            groups.setdefault((mean.name, mean.suite if mean.name == OURS else "all"), []).append(mean)
    lines = []
    for (name, suite), group in sorted(groups.items(), key=lambda item: name_key(item[0][0])):
        worst = min((mean.worst for mean in group if mean.worst is not None), key=lambda row: ratio_of(row) or 0.0)
        slower = f"{sum(mean.slower for mean in group)} of {sum(mean.count for mean in group)}"
        which = f"{worst.suite}, " * (suite == "all") + f"{worst.mode}, {worst.dtype}, {worst.shape}"
        lines.append([name, suite, slower, number(ratio_of(worst)), which])
    heads = ["provider", "suite", "slower rows", "slowest", "which"]
    text = f"Rows that are slower than `{BASELINE}`, and the slowest of all:"
    return [text, table(heads, lines, right=(2, 3))] if lines else []


def _missing_in_brief(rows: Sequence[Row]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if ratio_of(row) is None:
            counts.setdefault(row.name, Counter())[kind(row)] += 1
    if not counts:
        return []
    total = sum(kinds.total() for kinds in counts.values())
    words = "; ".join(f"`{name}` {_kinds(counts[name])}" for name in sorted(counts, key=name_key))
    return [f"Of {_count(len(rows), 'row')} {total:,} have no ratio: {words}. The report names each."]


def _kinds(kinds: Counter[str]) -> str:
    return ", ".join(f"{count:,} {words}" for words, count in sorted(kinds.items()))


def _limit_in_brief(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    """How far the library and the baseline are from the least time, and the constants that it is made of."""
    sentences = []
    for mode in dict.fromkeys(row.mode for row in rows):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row.mode == mode and row.limit_ratio is not None and (row.name == OURS or _is_baseline(row.name)):
                found.setdefault(row.name, []).append(row.limit_ratio)
        if found:
            medians = [
                f"`{name}` {number(statistics.median(found[name]))} times" for name in sorted(found, key=name_key)
            ]
            sentences.append(f"{mode}: {', '.join(medians)}")
    parts = []
    if sentences:
        parts.append(f"Median of the time over the least time that the machine allows: {'; '.join(sentences)}.")
    if constants is not None:
        rate = max(constants.matmul_tflop_per_s.items(), key=lambda item: item[1], default=None)
        words = [f"{number(constants.copy_gb_per_s)} GB/s copied"]
        words += [f"{number(rate[1])} TFLOP/s in {rate[0]}"] if rate is not None else []
        waits = [(max(found), found[max(found)]) for found in (constants.wait_us or {}).values() if found]
        if waits:
            most = max(programs for programs, _ in waits)
            least = min(us for programs, us in waits if programs == most)
            words.append(f"{number(least)} us for one wait of {_count(most, 'program')}")
        parts.append(f"Measured on the machine: {', '.join(words)}.")
    return parts


def _cpu_in_brief(rows: Sequence[Row], short: bool) -> list[str]:
    """The CPU's rows in words and a table, and the means over all of them.

    - short: only the shape with the most variants (there are GPU results, which say more); else all with several
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_sizes(row), []).append(row)
    variants = {sizes: len({row.variant for row in group}) for sizes, group in groups.items()}
    shown = [sizes for sizes in groups if variants[sizes] > 1] or list(groups)
    if short:
        shown = [max(groups, key=lambda sizes: (variants[sizes], len(groups[sizes]), _volume(groups[sizes][0])))]
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    heads = ["layer", "shape", "dtype", *(head for mode in modes for head in (f"{mode}, ms", "ratio"))]
    lines = [line for sizes in shown for line in _layers(sizes, groups[sizes], modes)]
    parts = [
        f"**CPU** ({_words(rows[0].gpu)}), {_versions(rows, ('PyTorch',), ('torch',))}, {_dates(rows)}. *ratio*: the "
        f"time of `{BASELINE}` (the standard cell of the same sizes) over the time of the row, above 1 is faster:",
        table(heads, lines, right=range(3, len(heads))),
    ]
    means = [mean for mean in geometric_means(rows) if not _is_baseline(mean.name)]
    if means:
        which = {mean: "" if mean.suite == CPU else f"{mean.suite}, " for mean in means}
        of_all = "; ".join(f"`{mean.name}` {which[mean]}{mean.mode} {mean_cell(mean)}" for mean in means)
        parts.append(f"Geometric means of the ratios, in brackets the rows, of all shapes: {of_all}.")
    if len(shown) < len(groups):
        left = len(groups) - len(shown)
        parts.append(f"{_count(left, 'more shape')} {'is' if left == 1 else 'are'} in the report.")
    return parts + _missing_in_brief(rows)


def _layers(sizes: str, rows: Sequence[Row], modes: Sequence[str]) -> list[list[str]]:
    """A line per provider, variant and type, a time and a ratio per mode; words where there is no time."""
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        variant = "" if _is_baseline(row.name) else f" {row.variant}"
        lines.setdefault((row.name + variant, sizes, row.dtype), {})[row.mode] = row
    cells = []
    for key in sorted(lines, key=lambda key: key[0].split(" ")[0] != BASELINE):
        found = [lines[key].get(mode) for mode in modes]
        cells.append([*key, *(cell for row in found for cell in _time_and_ratio(row))])
    return cells


def _time_and_ratio(row: Row | None) -> tuple[str, str]:
    if row is None:
        return "", ""
    return (number(row.ms_median), number(ratio_of(row))) if row.timed else (kind(row), "")


def _volume(row: Row) -> int:
    return row.T * row.B * row.H * row.H * row.L * row.D


def _sizes(row: Row) -> str:
    sizes = row.shape.removeprefix(f"{row.variant} ")
    return sizes if row.suite == CPU else f"{row.suite}: {sizes}"


def _versions(rows: Iterable[Row], titles: Sequence[str], columns: Sequence[str]) -> str:
    """The versions by their titles; all of them where rows differ."""
    rows = list(rows)
    words = []
    for title, column in zip(titles, columns, strict=True):
        found = sorted({getattr(row, column) for row in rows} - {""})
        if found:
            words.append(f"{title} {' and '.join(found)}")
    return ", ".join(words)


def _is_baseline(name: str) -> bool:
    return name.split(" ")[0] == BASELINE


def rewrite_block(text: str, block: str) -> str:
    """The text with `block` between the lines BEGIN and END; everything else is the same byte for byte.

    Raises ValueError where one of the two lines is missing, there twice, or they are in the wrong order.
    """
    lines = text.split("\n")
    places = {}
    for marker in (BEGIN, END):
        if marker in block:
            raise ValueError(f"the new text itself contains {marker}")
        found = [number for number, line in enumerate(lines) if line.rstrip() == marker]
        if len(found) != 1:
            raise ValueError(f"the line {marker} is {'missing' if not found else f'there {len(found)} times'}")
        places[marker] = found[0]
    if places[BEGIN] > places[END]:
        raise ValueError(f"the line {END} stands before {BEGIN}")
    between = ["", *block.strip("\n").split("\n"), ""] if block.strip("\n") else [""]
    return "\n".join([*lines[: places[BEGIN] + 1], *between, *lines[places[END] :]])


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: who reads it meets the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def short_table(rows: Iterable[Row]) -> Table:
    """The table at the end of a run: a line per mean, the baseline's own rows included."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    means = geometric_means(rows)
    result = Table(
        title=f"time of {BASELINE} / time: geometric means, above 1 is faster",
        caption=None if means else "no rows",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    several = len({mean.gpu for mean in means}) > 1
    for heading in (["machine"] if several else []) + ["suite", "regime", "mode", "provider"]:
        result.add_column(heading)
    for heading in ("mean", "least", "rows", "without a ratio"):
        result.add_column(heading, justify="right")
    result.add_column("of these")
    for mean in means:
        kinds = Counter(map(kind, (*mean.untimed, *mean.unpaired)))
        cells = ([mean.gpu] if several else []) + [mean.suite, mean.regime, mean.mode, mean.name]
        least = number(ratio_of(mean.worst)) if mean.worst is not None else ""
        cells += [number(mean.ratio), least, str(mean.count), str(mean.total - mean.count)]
        cells.append(_kinds(kinds))
        result.add_row(*map(Text, cells))
    return result


def number(value: float | None) -> str:
    """Three significant digits, all of them before the point; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.3g}"


def table(heads: Sequence[str], lines: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """A Markdown table; the columns `right` are aligned to the right."""
    aligned = set(right)
    rules = ["---:" if column in aligned else "---" for column in range(len(heads))]
    cells: list[Sequence[object]] = [heads, rules, *lines]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in cells)


def _cell(content: object) -> str:
    """On one line, with no bar that Markdown would take for the cell's end."""
    return " ".join(str(content).split()).replace("|", "\\|")


def _words(text: str) -> str:
    """Words of others as Markdown that shows them as they are (but for bars, which matter in a table alone)."""
    return re.sub(r"([\\`*_\[\]<>#~&$])", r"\\\1", " ".join(text.split()))


def _target(path: str) -> str:
    """A path as the target of a link."""
    return re.sub(r"[^\w./~-]", lambda found: "".join(f"%{byte:02X}" for byte in found[0].encode()), str(path))


def _without_folder(words: str) -> str:
    """An error's words with the file's name where its path stands: a report is read on other machines."""
    path, separator, rest = words.partition(": ")
    return f"{PurePath(path).name}{separator}{rest.replace(path, PurePath(path).name)}" if separator else words


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
