"""What the rows say together: means, the slowest, what has no time; in which order they are shown.

A row without a time is counted, never dropped.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lstm_triton_kernels.limit import Constants
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from benchmarks.rows import BASELINE, Row
from benchmarks.suites import CPU, MODES, REGIMES, STORAGE, SUITES

OURS = "lstm_triton auto"
"""What a user of the library gets who chooses nothing."""


GROUP_HEADS = ("suite", "regime", "mode", "variant", "baseline")

NO_GPU = "No GPU result yet: no figure of speed against cuDNN is claimed."


@dataclass(frozen=True)
class Mean:
    """The ratio of one provider's rows of one suite, regime, mode and variant to one baseline on one machine.

    - ratio: geometric mean of the rows that have one, None if none has; count: how many have
    - slower: how many are below 1 and not noise
    - worst: the row of the least ratio
    - unpaired: rows with a time, but without one of the baseline to compare with; untimed: rows without a time
    """

    gpu: str
    suite: str
    regime: str
    mode: str
    variant: str
    baseline: str
    name: str
    ratio: float | None
    count: int
    slower: int
    worst: Row | None
    unpaired: tuple[Row, ...]
    untimed: tuple[Row, ...]

    @property
    def group(self) -> tuple[str, str, str, str, str]:
        """What is compared in one line of a table, as GROUP_HEADS names it."""
        return (self.suite, self.regime, self.mode, self.variant, self.baseline)

    @property
    def total(self) -> int:
        """All rows."""
        return self.count + len(self.unpaired) + len(self.untimed)


def geometric_means(rows: Iterable[Row]) -> list[Mean]:
    """A Mean for all rows that differ in type and sizes alone; GPUs first, suites as they are listed."""
    groups: dict[tuple[str, str, str, str, str, str, str], list[Row]] = {}
    for row in in_order(rows):
        key = (row.gpu, row.suite, row.regime, row.mode, row.variant, row.baseline, row.name)
        groups.setdefault(key, []).append(row)
    places = {key[:-1]: place for place, key in enumerate(groups)}
    ordered = sorted(groups, key=lambda key: (places[key[:-1]], name_key(key[-1])))
    return [_mean(*key, groups[key]) for key in ordered]


def _mean(
    gpu: str, suite: str, regime: str, mode: str, variant: str, baseline: str, name: str, rows: list[Row]
) -> Mean:
    paired = [(value, row) for row in rows if (value := ratio_of(row)) is not None]
    return Mean(
        gpu, suite, regime, mode, variant, baseline, name,
        ratio=math.exp(statistics.fmean(math.log(value) for value, _ in paired)) if paired else None,
        count=len(paired),
        slower=sum(value < 1 and not row.noise for value, row in paired),
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


def compared(rows: Iterable[Row]) -> list[Row]:
    """The rows but for the baselines' own."""
    return [row for row in rows if not row.is_baseline]


def in_turns_with_ours(rows: Iterable[Row]) -> list[Row]:
    """The rows, each baseline's own with the time that it took in turns with what a user of the library gets (OURS).

    So that of two times that are drawn beside each other the quotient is the ratio that the tables show. A baseline
    beside which that was not timed keeps its own.
    """
    rows = list(rows)
    ours = {row.case: row for row in rows if row.name == OURS and row.timed and row.baseline_ms}
    found = []
    for row in rows:
        beside = ours.get(row.case)
        if row.is_baseline and row.ms_median and beside is not None and beside.baseline_ms is not None:
            times = beside.baseline_ms / row.ms_median
            row = replace(
                row,
                ms_median=beside.baseline_ms,
                ms_p20=None,
                ms_p80=None,
                us_per_step=row.us_per_step and row.us_per_step * times,
                limit_ratio=row.limit_ratio and row.limit_ratio * times,
            )
        found.append(row)
    return found


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorted as they are shown: by machine (GPUs first), suite, regime, mode, type, sizes, provider."""
    rows = list(rows)
    with_gpu = {row.gpu for row in rows if is_gpu(row)}

    def key(row: Row) -> tuple[object, ...]:
        sizes = (row.L, row.D, row.T, row.B, row.I, row.H)
        named = (place(row.suite, SUITES), place(row.regime, REGIMES), place(row.mode, MODES))
        case = (place(row.dtype, tuple(STORAGE)), row.variant != "standard", row.variant, *sizes)
        return (row.gpu not in with_gpu, row.gpu, *named, *case, name_key(row.name), row.date)

    return sorted(rows, key=key)


def name_key(name: str) -> tuple[object, ...]:
    """Sorts names of providers: the baseline, the library as it is used, its single strategies, the others."""
    provider = name.split(" ")[0]
    return (provider != BASELINE, name != OURS, provider != OURS.split(" ")[0], name)


def place(value: str, known: Sequence[str]) -> tuple[int, str]:
    """Sorts by the place in a list, what is not in it behind."""
    return (known.index(value) if value in known else len(known), value)


def machines(rows: Iterable[Row], constants: Mapping[str, Constants] | None = None) -> list[str]:
    """The machines' names, GPUs first."""
    known = constants or {}
    cpu = {row.gpu: not is_gpu(row) for row in sorted(rows, key=is_gpu)}
    cpu = {gpu: found.multiprocessors is None for gpu, found in known.items()} | cpu
    return sorted(cpu, key=lambda gpu: (cpu[gpu], gpu))


def kind(row: Row) -> str:
    """What became of a row, in a word or two."""
    if row.timed:
        return "with a ratio" if ratio_of(row) is not None else "timed alone"
    words = str(row.error)
    return next((kind for kind in ("out of memory", "wrong") if words.startswith(kind)), "failed")


def in_words(kinds: Counter[str]) -> str:
    """How many there are of each kind."""
    return ", ".join(f"{count:,} {words}" for words, count in sorted(kinds.items()))


def number(value: float | None) -> str:
    """Three significant digits, all of them before the point; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:#.3g}"


def older_note(rows: Iterable[Row]) -> list[str]:
    """What is to be said where rows have a ratio and no time of the baseline; nothing where none has."""
    if all(row.baseline_ms is not None for row in compared(rows) if ratio_of(row) is not None):
        return []
    return ["A ratio without a time of the baseline is of an older file: the median of the quotients of all turns."]


def duration(milliseconds: float | None) -> str:
    """A time with its unit, below a millisecond in microseconds; "" for None."""
    if milliseconds is None:
        return ""
    return f"{number(1e3 * milliseconds)} us" if milliseconds < 1 else f"{number(milliseconds)} ms"


def ratio_in_words(row: Row) -> str:
    """The ratio with its spread, and whether that makes it noise; "" where there is no ratio."""
    ratio = number(ratio_of(row))
    if not ratio or row.ratio_p20 is None or row.ratio_p80 is None:
        return ratio
    return f"{ratio} ({number(row.ratio_p20)} to {number(row.ratio_p80)}{', noise' * row.noise})"


def short_table(rows: Iterable[Row]) -> Table:
    """The table at the end of a run: a line per mean, the baseline's own rows included."""
    rows = list(rows)
    means = geometric_means(rows)
    result = Table(
        title="time of the baseline / time: geometric means, above 1 is faster",
        caption=None if means else "no rows",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    several = len({mean.gpu for mean in means}) > 1
    for heading in (["machine"] if several else []) + [*GROUP_HEADS, "provider"]:
        result.add_column(heading)
    for heading in ("mean", "least", "rows", "without a ratio"):
        result.add_column(heading, justify="right")
    result.add_column("of these")
    for mean in means:
        kinds = Counter(map(kind, (*mean.untimed, *mean.unpaired)))
        cells = ([mean.gpu] if several else []) + [*mean.group, mean.name]
        least = number(ratio_of(mean.worst)) if mean.worst is not None else ""
        cells += [number(mean.ratio), least, str(mean.count), str(mean.total - mean.count)]
        cells.append(in_words(kinds))
        result.add_row(*map(Text, cells))
    return result
