"""How long a call takes: in turns with another, after a warm-up, many times over.

On a GPU device events stand around the call on the stream, and nothing waits for it on the host, so what is measured
is what the GPU does, or what the host needs to start it where that is longer. On a CPU the host's clock stands there,
and on a GPU, too, where it counts how long one waits: from the call until the device, idle before it, is done.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

WARM_UP = 3
"""Rounds that do not count; one is enough where a round takes longer than the time there is."""

LEAST_ROUNDS, MOST_ROUNDS = 5, 1000
LEAST_FOR_P99 = 100
"""Rounds of which a 99th percentile is taken: of fewer it would be the slowest call."""

HOST_CALLS = 7


@dataclass
class Timed:
    """Something to time.

    - before: runs before every call, outside the clock (fresh inputs, gradients to None)
    - waited_for: on a GPU the time is that of the host, from the call until the device is done
    """

    before: Callable[[], object]
    call: Callable[[], object]
    waited_for: bool = False


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(timed: Sequence[Timed], device: torch.device, seconds: float) -> list[list[float]]:
    """Return the milliseconds of every call in every round, [call][round].

    A round calls each once, every round starting with another; as many rounds as fit `seconds`, at least LEAST_ROUNDS
    and at most MOST_ROUNDS, after a warm-up.
    """
    round_seconds = 0.0
    for _ in range(WARM_UP):
        start = time.perf_counter()
        one_round(timed, device)
        round_seconds = time.perf_counter() - start
        if round_seconds > seconds:
            break
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(seconds / round_seconds)))
    clocks = [_round(timed, device, n) for n in range(rounds)]
    return [list(column) for column in zip(*(_milliseconds(one, device) for one in clocks), strict=True)]


def one_round(timed: Sequence[Timed], device: torch.device) -> list[float]:
    """Return the milliseconds of each, called once, when the device is done."""
    return _milliseconds(_round(timed, device, 0), device)


def _round(timed: Sequence[Timed], device: torch.device, first: int) -> list[tuple[Any, Any]]:
    """Call each once, beginning with number `first`; return the clocks before and after, in the order of `timed`."""
    clocks: dict[int, tuple[Any, Any]] = {}
    for n in ((first + place) % len(timed) for place in range(len(timed))):
        one = timed[n]
        one.before()
        if device.type == "cuda" and not one.waited_for:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            one.call()
            end.record()
            clocks[n] = start, end
        else:
            synchronize(device)
            before = time.perf_counter()
            one.call()
            synchronize(device)
            clocks[n] = before, time.perf_counter()
    return [clocks[n] for n in range(len(timed))]


def _milliseconds(clocks: Sequence[tuple[Any, Any]], device: torch.device) -> list[float]:
    """Return the milliseconds between the clocks of each, when the device is done: events, or seconds of the host."""
    synchronize(device)
    return [1e3 * (end - start) if isinstance(end, float) else start.elapsed_time(end) for start, end in clocks]


def host_us(timed: Timed, device: torch.device, milliseconds: Sequence[float]) -> float:
    """Return the microseconds until the call returns to Python, median; the device is idle when it begins.

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
    """Return the most memory that one call has allocated at a time, above what was there before it, in MiB."""
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


def columns(own: Sequence[float], theirs: Sequence[float] | None = None) -> dict[str, float | None]:
    """Return a row's times from its milliseconds and, where it took turns with a baseline, from those of that.

    The ratio is the quotient of the two medians; its percentiles are of the quotients turn by turn.
    """
    p20, median, p80 = quantiles(own)
    found: dict[str, float | None] = dict(ms_p20=p20, ms_median=median, ms_p80=p80)
    if theirs is not None:
        low, _, high = quantiles([b / a for a, b in zip(own, theirs, strict=True)])
        baseline = statistics.median(theirs)
        found |= dict(baseline_ms=baseline, baseline_ratio=baseline / median, ratio_p20=low, ratio_p80=high)
    return found


def p99(values: Sequence[float]) -> float | None:
    """Return the 99th percentile; None of fewer values than LEAST_FOR_P99."""
    return None if len(values) < LEAST_FOR_P99 else statistics.quantiles(values, n=100, method="inclusive")[-1]


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]
