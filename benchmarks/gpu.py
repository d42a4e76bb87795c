"""All that one visit to a GPU should bring home: a step by itself, parity, the constants, the suites."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import ROOT, rows
from benchmarks.environment import environment, machine
from benchmarks.summary import short_table

PARITY_SHARE = 0.4
"""Of the budget, for the parity tests at most; the last of them, many of one kind, are those that can be missed."""

STEPS_SECONDS = 40.0
"""For a step of the anchor by itself, whatever the rest comes to."""

MICRO_SECONDS = 40.0
WARM_SECONDS = 40.0
"""For compiling, in as many processes as there are cores, what the suites launch; no row is begun after it."""

END_SECONDS = 15.0
"""Kept for the end: the last row's process, the table."""

MOST_TEST_PROCESSES = 16
"""Compiling is most of what the tests do: a process a core, as far as the GPU has memory for all of them."""

GRACE_SECONDS = 15.0
"""From the interrupt to the end of what is stopped: pytest says what has failed so far, a run shows its table."""


def run_all(budget: float, results: Path, out: Console) -> int:
    """Run the parts, each in a process that is stopped in time; 0 if all of them ended well.

    Red parity tests do not end it: every row is checked against the reference before it is timed.
    """
    start = time.monotonic()
    where = torch.device("cuda")
    this = environment(where)
    before = set(results.glob("*.csv"))
    outcomes: dict[str, str | None] = {}
    tool = [sys.executable, "-m", "benchmarks"]

    anchor = ["--shape", "16x768", "--wait", "counter", "--wait", "data"]
    outcomes["steps"] = stopped_after(STEPS_SECONDS, [*tool, "steps", *anchor, "--results", str(results)])
    parity = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    if find_spec("xdist") is not None:
        parity += ["-n", str(min(MOST_TEST_PROCESSES, os.cpu_count() or 1))]
    log = rows.new_file(results, machine(where), this.date, "parity", "txt")
    outcomes["parity"] = stopped_after(PARITY_SHARE * budget, parity, log)
    out.print(f"parity tests, {log.name}: {last_line(log)}", markup=False, soft_wrap=True)

    outcomes["micro"] = stopped_after(MICRO_SECONDS, [*tool, "micro", "--results", str(results)])
    warm = [*tool, "warm", "--suite", "gpu", "--processes", str(min(MOST_TEST_PROCESSES, os.cpu_count() or 1))]
    outcomes["compiling"] = stopped_after(2 * WARM_SECONDS, [*warm, "--seconds", f"{WARM_SECONDS:.0f}"])
    left = budget - (time.monotonic() - start) - END_SECONDS
    suites = [*tool, "run", "--suite", "gpu", "--results", str(results), "--budget", f"{max(1.0, left):.0f}"]
    outcomes["suites"] = stopped_after(left + END_SECONDS, suites)

    found = [row for path in sorted(set(results.glob("*.csv")) - before) for row in rows.read(path)]
    out.print(short_table(found))
    for name, words in outcomes.items():
        out.print(f"{name}: {words or 'done'}", markup=False)
    out.print(f"{time.monotonic() - start:.0f} s in all; `python -m benchmarks report` makes tables and plots of them")
    return 0 if not any(outcomes.values()) else 1


def stopped_after(seconds: float, command: list[str], log: Path | None = None) -> str | None:
    """Run a command in the checkout, interrupted after so many seconds; words if it did not end well.

    It gets GRACE_SECONDS to say what it has found; then it is killed, with all that it started.
    What it prints goes to the log, else to where this process prints.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    file = log.open("wb") if log is not None else None
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=file,
            stderr=subprocess.STDOUT if file is not None else None, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=GRACE_SECONDS)
            return f"not done after {seconds:.0f} s, stopped"
        finally:
            with suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    finally:
        if file is not None:
            file.close()
    return None if code == 0 else f"ended with code {code}"


def last_line(path: Path) -> str:
    """The last line of a file that has something on it."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"
