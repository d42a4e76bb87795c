"""A run: which rows, in which order, for how long; a row goes to the file when it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from lstm_triton_kernels.limit import Constants, least_us_per_step

from benchmarks import rows
from benchmarks.bench import Measurement
from benchmarks.providers import Provider, baseline_of
from benchmarks.suites import Case, regime
from benchmarks.worker import Measures

LONGEST_ROW = 180.0
"""Seconds after which a row is given up."""


class Task(NamedTuple):
    """One row to measure."""

    provider: Provider
    case: Case

    def __str__(self) -> str:
        return f"{self.provider.key} {self.case}"


def tasks(cases: Sequence[Case], providers: Sequence[Provider], device_type: str) -> list[Task]:
    """Return the rows of the cases, the highest priority first; without those that a provider does not compute."""
    found = [Task(one, case) for case in cases for one in providers if one.refuses(case, device_type) is None]
    return sorted(found, key=lambda task: task.provider.rank(task.case))


def row(task: Task, found: Measurement, where: dict[str, str], known: Constants | None, device_type: str) -> rows.Row:
    """Return the row of the results file for what was measured, in `where`, on a machine with the constants `known`."""
    provider, case = task
    result: rows.Row = dict.fromkeys(rows.COLUMNS) | where | found.columns
    result |= {name: getattr(provider, value) for name, value in (("provider", "name"), ("strategy", "strategy"))}
    result |= {name: getattr(case, name) for name in ("suite", "name", "mode", "dtype", *rows.SHAPE, "variant")}
    result |= {"regime": regime(case, device_type), "baseline": baseline_of(case, device_type)[0].name}
    if known is not None:
        result["limit_us_per_step"] = limit_us_per_step(case, found.mean_rows, known)
    if result["ms_median"] is not None:
        result["us_per_step"] = 1e3 * result["ms_median"] / case.steps
        if result["limit_us_per_step"]:
            result["limit_ratio"] = result["us_per_step"] / result["limit_us_per_step"]
    return result


def limit_us_per_step(case: Case, mean_rows: float | None, known: Constants) -> float | None:
    """Return the least time of a step; None where the rate for the type was not measured.

    - mean_rows: rows that a step computes on average, where rows end early
    """
    if case.dtype not in known.matmul_tflop_per_s:
        return None
    B = max(1, round(mean_rows)) if mean_rows is not None else case.B
    return least_us_per_step(case.layer._replace(B=B), known, case.L)


def measure(
    todo: Sequence[Task], measures: Measures, until: float, make_row: Callable[[Task, Measurement], rows.Row],
    path: Path, clock: Callable[[], float] = time.monotonic,
) -> Iterator[rows.Row | None]:  # fmt: skip
    """Yield the row of each task, appended to the file; None where there was no time for it before `until`.

    A row that is still being measured then is stopped: that says nothing of the row, so it has none.
    """
    for task in todo:
        timeout = min(LONGEST_ROW, until - clock())
        found = measures.measure(task.provider, task.case, timeout) if timeout > 0 else None
        if found is None or (found.stopped and timeout < LONGEST_ROW):
            yield None
            continue
        done = make_row(task, found)
        rows.append(path, done)
        yield done
