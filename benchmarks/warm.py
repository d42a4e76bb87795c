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

from benchmarks import bench, run, timing
from benchmarks.problem import make_problem
from benchmarks.providers import PROVIDERS, LstmTriton
from benchmarks.suites import Case

STEPS = 16
"""Of a sequence: the kernels are the same for every T but 1."""


def compile_all(cases: Sequence[Case], device: str, processes: int, seconds: float) -> tuple[int, int]:
    """Compute this library's rows of the cases once, over STEPS steps; return how many were, and how many there are.

    By their priority, until so many seconds are over.
    """
    own = [one for one in PROVIDERS.values() if isinstance(one, LstmTriton) and one.how.compiler is None]
    own = [one for one in own if one.how.strategy != "cudnn" and one.how.backend != "torch" and not one.how.graphs]
    todo = run.tasks(cases, own, torch.device(device).type)
    until = time.monotonic() + seconds  # the same clock in all processes of a machine
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = pool.starmap(compute_once, [(task, device, until) for task in todo], chunksize=1)
    return sum(done), len(todo)


def compute_once(task: run.Task, device: str, until: float) -> bool:
    """Compute a row unless it is too late; return whether it was. What fails will fail again in the run."""
    if time.monotonic() >= until:
        return False
    try:
        case = replace(task.case, T=min(task.case.T, STEPS))
        bench.set_precision(case.dtype)
        problem = make_problem(case, torch.device(device))
        timing.one_round([bench.timed_call(task.provider.build(problem), problem)], torch.device(device))
    except Exception:
        return False
    return True
