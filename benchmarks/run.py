"""A run: which rows, in which order, for how long; a row goes to the file when it is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lstm_triton_kernels.limit import Constants, least_us_per_step

from benchmarks import rows
from benchmarks.bench import Measurement
from benchmarks.environment import Environment
from benchmarks.providers import Provider, baseline_of
from benchmarks.suites import Case, regime
from benchmarks.worker import Measures
from lstm_triton.cli.files import write_whole

LONGEST_ROW = 180.0
"""Seconds after which a row is given up."""

MOST_LONGER = 3.0
"""A row is never expected to take more times than this what the longest took: much of it is the same for all."""


@dataclass(frozen=True)
class Task:
    """One row to measure."""

    provider: Provider
    case: Case

    def __str__(self) -> str:
        return f"{self.provider.key} {self.case}"


def tasks(cases: Sequence[Case], providers: Sequence[Provider], device_type: str) -> list[Task]:
    """The rows of the cases, the most telling first; without those that a provider does not compute."""
    ranked = [
        (provider.rank(case), Task(provider, case))
        for case in cases for provider in providers
        if provider.refuses(case, device_type) is None
    ]  # fmt: skip
    return [task for _, task in sorted(ranked, key=lambda pair: pair[0])]


def row(task: Task, found: Measurement, where: Environment, constants: Constants | None, device_type: str) -> rows.Row:
    """The line of the results file for what was measured."""
    provider, case = task.provider, task.case
    times = found.times
    p20, median, p80 = times.ms if times is not None else (None, None, None)
    low, high = times.spread if times is not None and times.spread is not None else (None, None)
    us_per_step = 1e3 * median / case.steps if median is not None else None
    limit = limit_us_per_step(case, found.rows, constants) if constants is not None else None
    return rows.Row(
        provider=provider.name,
        strategy=provider.strategy,
        suite=case.suite,
        regime=regime(case, device_type),
        mode=case.mode,
        dtype=case.dtype,
        T=case.T,
        B=case.B,
        I=case.I,
        H=case.H,
        L=case.L,
        D=case.D,
        variant=case.variant,
        ms_median=median,
        ms_p20=p20,
        ms_p80=p80,
        us_per_step=us_per_step,
        cpu_us_per_call=found.cpu_us,
        peak_mib=found.peak_mib,
        error=found.failure if found.failure is not None else found.error,
        baseline_ratio=times.ratio if times is not None else None,
        limit_us_per_step=limit,
        limit_ratio=us_per_step / limit if us_per_step is not None and limit else None,
        plan=found.plan,
        baseline=baseline_of(case, device_type)[0].name,
        baseline_ms=times.baseline_ms if times is not None else None,
        ratio_p20=low,
        ratio_p80=high,
        **asdict(where),
    )


def limit_us_per_step(case: Case, mean_rows: float | None, constants: Constants) -> float | None:
    """The least time of a step; None where the machine's rate for the type was not measured.

    - mean_rows: rows that a step computes on average, where rows end early
    """
    if case.dtype not in constants.matmul_tflop_per_s:
        return None
    B = max(1, round(mean_rows)) if mean_rows is not None else case.B
    return least_us_per_step(case.layer._replace(B=B), constants, case.L)


class Pace:
    """Whether the next row still fits the time: by what the provider's longest row took, and the work of both."""

    def __init__(self, budget: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self._clock, self._start = budget, clock, clock()
        self._longest: dict[str, tuple[float, float]] = {}
        """By provider seconds and work of the longest row."""

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start

    def fits(self, task: Task) -> bool:
        """Whether a row can be expected to end in time."""
        expected = task.provider.first_seconds
        if task.provider.key in self._longest:
            seconds, work = self._longest[task.provider.key]
            expected = seconds * min(MOST_LONGER, task.case.work / work)
        return self.budget is None or self.elapsed + expected <= self.budget

    def timeout(self) -> float:
        """How long a row may take at most."""
        return LONGEST_ROW if self.budget is None else max(1.0, min(LONGEST_ROW, self.budget - self.elapsed))

    def took(self, task: Task, seconds: float) -> None:
        """Remember a row; the longest fades, since the first of a provider compiles."""
        longest, work = self._longest.get(task.provider.key, (0.0, 1.0))
        new, faded = (seconds, float(task.case.work)), (0.7 * longest, work)
        self._longest[task.provider.key] = max(new, faded)


def measure(
    todo: Sequence[Task], measures: Measures, pace: Pace, make_row: Callable[[Task, Measurement], rows.Row], path: Path,
) -> Iterator[tuple[Task, rows.Row | None, Measurement | None]]:  # fmt: skip
    """Each task in turn with its row, appended to the file; without a row where there was no time for it."""
    for task in todo:
        if not pace.fits(task):
            yield task, None, None
            continue
        start = pace.elapsed
        timeout = pace.timeout()
        found = measures.measure(task.provider, task.case, timeout)
        pace.took(task, pace.elapsed - start)
        if found.stopped and timeout < LONGEST_ROW:  # the run's time is up; that says nothing of the row
            yield task, None, None
            continue
        done = make_row(task, found)
        rows.append(path, done)
        yield task, done, found


def shown_algorithm(kernels: Sequence[str]) -> str:
    """Which algorithm of cuDNN the names of its kernels show."""
    if not kernels:
        return "none seen"
    return "persistent" if any("persist" in name.lower() for name in kernels) else "standard"


def save_kernels(path: Path, seen: dict[str, dict[str, object]]) -> None:
    """Write (anew) the file of the kernels that `torch.nn.LSTM` launched, by case: asked for, shown, names."""
    write_whole(path, (json.dumps(seen, indent=2) + "\n").encode())
