"""Compile what the suites will launch, in many processes at once, before anything is timed.

A run compiles its kernels row by row, in the one process that measures. Triton keeps what it has compiled on the disk:
where all cores have compiled before, a run with a budget measures more rows.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks import bench, run
from benchmarks.problem import make_problem
from benchmarks.providers import PROVIDERS, LstmTriton
from benchmarks.suites import Case

STEPS = 16
"""Of a sequence: the kernels are the same for every T but 1."""


def compile_all(cases: Sequence[Case], device: str, processes: int, seconds: float) -> tuple[int, int]:
    """Compute this library's rows of the cases once, over STEPS steps: how many were, and how many there are.

    The most telling first, as a run takes them, until so many seconds are over.
    """
    todo = tasks(cases, device)
    until = time.monotonic() + seconds  # the same clock in all processes of a machine
    parts = [(todo[part::processes], device, until) for part in range(processes)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.starmap(compute_once, parts, chunksize=1)
    return sum(done), len(todo)


def tasks(cases: Sequence[Case], device: str) -> list[run.Task]:
    """The rows of this library's own kernels."""
    own = [p for p in PROVIDERS.values() if isinstance(p, LstmTriton) and p.how.strategy != "cudnn"]
    own = [p for p in own if p.how.backend != "torch" and p.how.compiler is None]
    return run.tasks(cases, own, torch.device(device).type)


def compute_once(todo: Sequence[run.Task], device: str, until: float) -> int:
    """Compute the rows until the time of `time.monotonic()`; how many were. What fails will fail again in the run."""
    done = 0
    for task in todo:
        if time.monotonic() >= until:
            break
        case = replace(task.case, T=min(task.case.T, STEPS))
        try:
            bench.set_precision(case.dtype)
            problem = make_problem(case, torch.device(device))
            timed = bench.timed_call(task.provider.build(problem), problem)
            timed.before()
            timed.call()
            bench.timing.synchronize(torch.device(device))
            done += 1
        except Exception:
            continue
    return done
