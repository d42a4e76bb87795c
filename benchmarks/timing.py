"""How long a call takes: in turns with another, after a warm-up, many times over.

On a GPU device events stand around the call on the stream, and nothing waits for it on the host, so what is measured
is what the GPU does, or what the host needs to start it where that is longer. On a CPU the host's clock stands there.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
"""Rounds that do not count; one is enough where a round takes longer than the time there is."""

LEAST_ROUNDS, MOST_ROUNDS = 5, 1000
HOST_CALLS = 7


@dataclass
class Timed:
    """Something to time: `before` runs before every call, outside the clock (fresh inputs, gradients to None)."""

    before: Callable[[], None]
    call: Callable[[], object]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(timed: Sequence[Timed], device: torch.device, seconds: float) -> list[list[float]]:
    """Milliseconds of every call in every round, [call][round].

    A round calls each once, every round starting with another; as many rounds as fit `seconds`, at least LEAST_ROUNDS
    and at most MOST_ROUNDS, after a warm-up.
    """
    clock = _device_round if device.type == "cuda" else _host_round
    round_seconds = 0.0
    for _ in range(WARM_UP):
        start = time.perf_counter()
        _finish(clock(timed, 0), device)
        round_seconds = time.perf_counter() - start
        if round_seconds > seconds:
            break
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))
    counted = [clock(timed, n) for n in range(rounds)]
    synchronize(device)
    return [list(column) for column in zip(*(_finish(one, device) for one in counted), strict=True)]


def one_round(timed: Sequence[Timed], device: torch.device) -> list[float]:
    """Milliseconds of each, called once, when the device is done."""
    clock = _device_round if device.type == "cuda" else _host_round
    return _finish(clock(timed, 0), device)


def _device_round(timed: Sequence[Timed], first: int) -> list[tuple[torch.cuda.Event, torch.cuda.Event]]:
    events: dict[int, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
    for n in _order(len(timed), first):
        timed[n].before()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        timed[n].call()
        end.record()
        events[n] = (start, end)
    return [events[n] for n in range(len(timed))]


def _host_round(timed: Sequence[Timed], first: int) -> list[float]:
    milliseconds: dict[int, float] = {}
    for n in _order(len(timed), first):
        timed[n].before()
        start = time.perf_counter()
        timed[n].call()
        milliseconds[n] = 1e3 * (time.perf_counter() - start)
    return [milliseconds[n] for n in range(len(timed))]


def _order(count: int, first: int) -> list[int]:
    return [(first + n) % count for n in range(count)]


def _finish(one: Sequence, device: torch.device) -> list[float]:
    if device.type != "cuda":
        return list(one)
    synchronize(device)
    return [start.elapsed_time(end) for start, end in one]


def host_us(timed: Timed, device: torch.device, milliseconds: Sequence[float]) -> float:
    """Microseconds until the call returns to Python, median; the device is idle when it begins.

    On a CPU that is what `milliseconds` says already.
    """
    if device.type == "cpu":
        return 1e3 * statistics.median(milliseconds)
    found = []
    for _ in range(HOST_CALLS):
        timed.before()
        synchronize(device)
        start = time.perf_counter()
        timed.call()
        found.append(1e6 * (time.perf_counter() - start))
    synchronize(device)
    return statistics.median(found)


def peak_mib(timed: Timed, device: torch.device) -> float:
    """Most memory that one call has allocated at a time, above what was there before it, in MiB."""
    timed.before()
    if device.type == "cuda":
        synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        timed.call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        timed.call()
    allocated = most = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            most = max(most, allocated)
    return most / 2**20


@dataclass(frozen=True)
class Times:
    """What the turns say of a call and its baseline: every figure of speed of a row is one of these.

    - ms: 20th, 50th and 80th percentile of its calls, milliseconds
    - baseline_ms: the median of the baseline's calls in the same turns; of the baseline itself its own
    - spread: 20th and 80th percentile of the quotients baseline / own, turn by turn
    """

    ms: tuple[float, float, float]
    baseline_ms: float | None = None
    spread: tuple[float, float] | None = None

    @property
    def ratio(self) -> float | None:
        """The baseline's time over its own, the quotient of the two medians; above 1 is faster."""
        return None if self.baseline_ms is None else self.baseline_ms / self.ms[1]


def times(own: Sequence[float], theirs: Sequence[float] | None = None) -> Times:
    """The figures of a call from its milliseconds and, where it took turns with a baseline, from those of that."""
    if theirs is None:
        return Times(quantiles(own))
    p20, _, p80 = quantiles([b / a for a, b in zip(own, theirs, strict=True)])
    return Times(quantiles(own), statistics.median(theirs), (p20, p80))


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    found = torch.tensor(values, dtype=torch.float64)
    p20, median, p80 = torch.quantile(found, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, median, p80


def kernel_names(call: Callable[[], object], device: torch.device) -> list[str]:
    """The names of the kernels that a call launches on a GPU, each once, sorted; none on a CPU."""
    if device.type != "cuda":
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        synchronize(device)
    return sorted({event.key for event in recorded.key_averages() if event.device_type.name == "CUDA"})
