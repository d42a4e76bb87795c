"""What one run on a GPU should bring: a step by itself, the parity tests, the constants, the suites."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import ROOT, rows
from benchmarks.console import means_table
from benchmarks.environment import environment, machine

PARITY_SHARE = 0.4
"""Of the budget, for the parity tests at most; the last of them, many of one kind, are those that can be missed."""

STEPS_SECONDS = MICRO_SECONDS = WARM_SECONDS = 40.0
END_SECONDS = 15.0
"""Kept for the end: the last row's process, the table."""

MOST_PROCESSES = 16
"""Compiling is most of what the tests do: a process a core, as far as the GPU has memory for all of them."""

GRACE_SECONDS = 15.0
"""From the interrupt to the end of what is stopped: pytest says what has failed so far, a run shows its table."""


def run_all(budget: float, results: Path, out: Console) -> int:
    """Run the parts, each in a process that is stopped in time; return 0 if all of them ended well.

    Red parity tests do not end it: every row is checked against the reference before it is timed.
    """
    start = time.monotonic()
    where = torch.device("cuda")
    before = set(results.glob("*.csv"))
    outcomes: dict[str, str | None] = {}
    tool, folder = [sys.executable, "-m", "benchmarks"], ["--results", str(results)]
    processes = str(min(MOST_PROCESSES, os.cpu_count() or 1))

    outcomes["steps"] = stopped_after(STEPS_SECONDS, [*tool, "steps", "--shape", "16x768", *folder])
    parity = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu"]
    parity += ["-n", processes] if find_spec("xdist") is not None else []
    log = rows.new_file(results, machine(where), environment(where)["date"], "parity", "txt")
    outcomes["parity"] = stopped_after(PARITY_SHARE * budget, parity, log)
    out.print(f"parity tests, {log.name}: {last_line(log)}", markup=False, soft_wrap=True)

    outcomes["micro"] = stopped_after(MICRO_SECONDS, [*tool, "micro", *folder])
    warm = ["warm", "--suite", "gpu", "--processes", processes, "--seconds", f"{WARM_SECONDS:.0f}"]
    outcomes["compiling"] = stopped_after(2 * WARM_SECONDS, [*tool, *warm])
    left = budget - (time.monotonic() - start) - END_SECONDS
    suites = ["run", "--suite", "gpu", *folder, "--budget", f"{max(1.0, left):.0f}"]
    outcomes["suites"] = stopped_after(left + END_SECONDS, [*tool, *suites])

    out.print(means_table([row for path in sorted(set(results.glob("*.csv")) - before) for row in rows.read(path)]))
    if find_spec("pandas") is not None and find_spec("matplotlib") is not None:
        outcomes["report"] = stopped_after(120.0, [*tool, "report", *folder])
    else:
        out.print("`python -m benchmarks report` makes the report, where pandas and matplotlib are installed")
    for name, words in outcomes.items():
        out.print(f"{name}: {words or 'done'}", markup=False)
    out.print(f"{time.monotonic() - start:.0f} s in all")
    return 1 if any(outcomes.values()) else 0


def stopped_after(seconds: float, command: list[str], log: Path | None = None) -> str | None:
    """Run a command in the checkout, interrupted after so many seconds; return words if it did not end well.

    It gets GRACE_SECONDS to say what it has found; then it is killed, with all that it started.
    What it prints goes to the log, else to where this process prints.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    with ExitStack() as stack:
        file = stack.enter_context(log.open("wb")) if log is not None else None
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=file,
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
    return None if code == 0 else f"ended with code {code}"


def last_line(path: Path) -> str:
    """Return the last line of a file that has something on it."""
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "nothing printed"
