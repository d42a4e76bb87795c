"""Several layers of a stack at the same time: which layer computes which chunk of time steps where, and for how long.

Layer l computes chunk k of the time steps when it has computed chunk k - 1, and layer l - 1 chunk k. So pairs (l, k)
of the same l + k are independent. They are taken in the order of l + k and dealt out to lanes in turn; a lane is a CUDA
stream that has a share of the multiprocessors. The backward pass is the same with layers and chunks counted from the
last. Pure functions; times are in microseconds.

No launch can starve another. The programs of a persistent launch wait for each other, so that two launches which each
hold a part of what the other needs would wait for ever. It cannot happen here:

1. A lane computes one thing after the other, so that no more launches run at a time than there are lanes.
2. All of them run the same plan, which was made for 1 / lanes of the multiprocessors, rounded down. Where `together`
   programs of that plan share a multiprocessor, a launch has at most together · (multiprocessors // lanes) programs.
3. So a program that has no place yet finds at most together · multiprocessors - 1 others of its kind in place. Some
   multiprocessor then holds fewer than `together` of them, and has room for it.
4. What else is on the multiprocessors, such as the matrix products between the layers, waits for nobody and ends.
5. Launches of other calls do not run meanwhile: the whole schedule, or the replay of a CUDA graph that holds it, takes
   the place of one launch in `watch.one_at_a_time`.

A launch waits for other lanes before it begins, by events, and never while it holds a multiprocessor. The launches are
cooperative as well, as all are whose programs wait for each other; if a driver runs such launches one after another,
this costs the time that is gained here, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


class Task(NamedTuple):
    """A chunk of the time steps in a layer, both counted in the order in which they are computed; and its lane."""

    layer: int
    chunk: int
    lane: int


class Times(NamedTuple):
    """How long a task takes.

    - product: the matrix product before it, which needs only the layer before; of the first layer, and of the others
    - start: of the launch; step: of a time step
    - host: what the host needs to launch a task, 0 in a CUDA graph
    """

    first_product: float
    product: float
    start: float
    step: float
    host: float = 0.0


class Interval(NamedTuple):
    """When a task runs: its product from `begin`, its steps from `steps_begin`, until `end`."""

    task: Task
    begin: float
    steps_begin: float
    end: float


@dataclass(frozen=True)
class Schedule:
    """Layers and time steps to compute, in chunks of so many steps (the last may be shorter), on so many lanes."""

    layers: int
    steps: int
    chunk: int
    lanes: int

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-self.steps // self.chunk)

    def span(self, chunk: int, backward: bool = False) -> slice:
        """Return the time steps of a chunk; backward, the first chunk has the last steps."""
        n = self.chunks - 1 - chunk if backward else chunk
        return slice(n * self.chunk, min((n + 1) * self.chunk, self.steps))

    def tasks(self) -> Iterator[Task]:
        """Yield all tasks in the order in which they are launched: each after those that it needs."""
        number = 0
        for wave in range(self.layers + self.chunks - 1):
            for layer in range(max(0, wave - self.chunks + 1), min(self.layers, wave + 1)):
                yield Task(layer, wave - layer, number % self.lanes)
                number += 1


def simulate(schedule: Schedule, times: Times) -> list[Interval]:
    """Return when each task runs, in the order of `Schedule.tasks`: a discrete simulation of the lanes.

    A task begins when the host has launched it, its lane is free and its layer's input is there; its steps begin when
    the product is there and the layer has computed the chunk before. That of a shorter chunk takes a part of the time.
    """
    free = [0.0] * schedule.lanes
    done: dict[tuple[int, int], float] = {}
    intervals = []
    for number, task in enumerate(schedule.tasks()):
        layer, chunk, lane = task
        span = schedule.span(chunk)
        part = (span.stop - span.start) / schedule.chunk
        product = (times.product if layer else times.first_product) * part
        begin = max(free[lane], done.get((layer - 1, chunk), 0.0), (number + 1) * times.host)
        steps_begin = max(begin + product, done.get((layer, chunk - 1), 0.0))
        end = steps_begin + times.start + (span.stop - span.start) * times.step
        free[lane] = done[layer, chunk] = end
        intervals.append(Interval(task, begin, steps_begin, end))
    return intervals


def makespan(schedule: Schedule, times: Times) -> float:
    """Return when the last task of the simulation ends."""
    return max(interval.end for interval in simulate(schedule, times))
