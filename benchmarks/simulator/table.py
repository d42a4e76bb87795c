"""The file of simulated steps of all suites' shapes, `simulated-triton-<release>-kernels-<commit>.md`.

A Markdown table with a line a pass; no measured time is ever in it. It grows line by line, by priority of the shapes,
and what it has is not simulated again.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import triton
from lstm_triton_kernels.gpus import nominal_constants
from lstm_triton_kernels.limit import least_pass_us

from benchmarks import RESULTS, suites
from benchmarks.simulator.kernels import H100 as GPU
from benchmarks.simulator.kernels import SOURCES, Case
from benchmarks.simulator.machine import Machine
from benchmarks.simulator.passes import Pass, has_plan, passes, simulate_pass
from benchmarks.text import table

FIRST = ((16, 768), (64, 512), (16, 1024), (128, 256), (1, 256), (64, 64), (64, 128))
"""(B, H) of the standard variant of the highest priority; the others come in the order of the suites' ranks."""

HEADS = (
    "variant", "B", "H", "D", "P", "pass", "workload", "plan", "cycles", "us", "limit", "times", "barriers",
    "wavefronts", "needed", "registers", "spilled", "early polls",
)  # fmt: skip
KEYS = 6
"""Columns that name a pass."""

HALF_TYPES = {"bfloat16", "float16"}


class OtherTable(Exception):
    """A file is there and is not a table of the same kernels, release, type and machine; the message names it."""


def shapes(dtype: str) -> list[Case]:
    """Return the distinct shapes of all suites in a type that have a persistent plan, by priority."""
    found = [Case(B, H, dtype=dtype) for B, H in FIRST]
    found += [
        Case(one.B, one.H, variant=one.variant, dtype=dtype, D=one.D, P=one.P)
        for one in suites.cases(suites.SUITES, (dtype,))
        if not one.cell
    ]
    return [case for case in dict.fromkeys(found) if has_plan(case)]


def names_of(case: Case) -> str:
    """Return the names of the workloads that have a layer of that shape, in whatever type."""
    alike = (case.B, case.H, case.D, case.P, case.variant)
    found = [one.name for one in suites.cases(suites.SUITES) if (one.B, one.H, one.D, one.P, one.variant) == alike]
    return ", ".join(dict.fromkeys(name for name in found if name))


def default_path(dtype: str) -> Path:
    """Return the file of these kernels, this release of Triton and this type in the folder of results."""
    release = ".".join(triton.__version__.split(".")[:2])
    kind = "" if dtype in HALF_TYPES else f"-{dtype}"
    return RESULTS / f"simulated-triton-{release}-kernels-{kernels_commit()}{kind}.md"


def kernels_commit() -> str:
    """Return the last commit of the kernels that are simulated, with `+` where they differ from it; else "unknown"."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(SOURCES), *arguments, "--", "."]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    commit = git("log", "-1", "--format=%h")
    return commit + "+" * bool(git("status", "--porcelain")) if commit else "unknown"


def header(dtype: str, machine: Machine) -> str:
    """Return what stands above the lines of a table."""
    heads, rules = table(HEADS, [], right=(*range(1, 5), *range(8, len(HEADS)))).splitlines()
    skew = f"{machine.skew} cycles later" if machine.skew else "at the same time"
    options = f"--suites --dtype {dtype}" + f" --skew {machine.skew}" * (machine.skew > 0)
    alike = ""
    if dtype in HALF_TYPES:
        (other,) = HALF_TYPES - {dtype}
        alike = f"\n- Of {dtype} alone: {other} has the same candidates, and products and accesses of the same sizes."
    return f"""\
# Simulated time steps, Triton {triton.__version__}

Simulated, not measured: what `python -m benchmarks simulate {options}` wrote on a machine without a GPU,
from the machine code that Triton makes of the kernels of commit {kernels_commit()} for sm_90.

- Model: one thread block on an {GPU.name} at {machine.clock_ghz} GHz, the others publish {skew}; bank conflicts are
  counted; instruction fetch, and the slowdown when many programs read the same lines, are not modelled
  (`benchmarks/simulator/__init__.py`, `benchmarks/NOTES.md`).
- A line is a pass of one layer with the usual gradients and without lengths, on the plan that the planner and the
  compiler settle; the forward pass saves what the backward pass reads. A pass without a line has no plan, or was not
  reached.{alike}
- *cycles*, *us*: of one time step. *limit*: the least microseconds of the recurrence by
  `lstm_triton_kernels.limit.least_pass_us`, from the GPU's data sheet; *times*: *us* over it. *P*:
  elements of a hidden state with a projection, else 0. *barriers*: of a warp in a step. *wavefronts*: of all accesses
  to shared memory of a step; *needed*: without bank conflicts, as if all warps took part in each. *registers*,
  *spilled*: of a thread. *early polls*: in a step.

{heads}
{rules}
"""


def keys(name: str, case: Case) -> tuple[str, ...]:
    """Return the first cells of a pass's line, which name it."""
    return (case.variant, str(case.B), str(case.H), str(case.D), str(case.P), name)


def line(name: str, case: Case, found: Pass) -> str:
    """Return the line of a pass."""
    time, usage = found.time, found.usage
    limit = least_pass_us(case.layer, nominal_constants(GPU), name == "backward")
    cells = (
        names_of(case), found.plan.describe(), f"{time.cycles:.0f}", f"{time.us:.2f}", f"{limit:.2f}",
        f"{time.us / limit:.1f}", time.counts["BAR"], f"{time.wavefronts:.0f}", time.needed, usage.registers,
        usage.spilled, f"{time.early:.1f}",
    )  # fmt: skip
    return table([*keys(name, case), *map(str, cells)], []).splitlines()[0] + "\n"


def lines_of(path: Path, dtype: str, machine: Machine) -> set[tuple[str, ...]]:
    """Return what names the passes that a file has, which is begun if it is not there.

    A last line that is not whole is cut off. Raises OtherTable if the file has another header.
    """
    head = header(dtype, machine)
    if not path.exists():
        path.write_text(head)
        return set()
    text = path.read_text()
    if not text.startswith(head):
        raise OtherTable(f"{path} is there, and was written from other kernels, by another Triton or for another type")
    if not text.endswith("\n"):
        path.write_text(text[: text.rindex("\n") + 1])
    found = [re.split(r" *\| *", one) for one in text[len(head) :].splitlines(keepends=True) if one.endswith("\n")]
    return {tuple(cells[1 : 1 + KEYS]) for cells in found}


def write(path: Path, dtype: str, machine: Machine, first: int | None = None) -> Iterator[str]:
    """Append the passes of all shapes, or of the `first` ones, that the file lacks; yield the lines.

    Raises OtherTable as `lines_of`.
    """
    done = lines_of(path, dtype, machine)
    for case in shapes(dtype)[:first]:
        for name, one in passes(case).items():
            if keys(name, case) in done:
                continue
            try:
                found = simulate_pass(one, machine)
            except LookupError:
                continue
            added = line(name, case, found)
            with path.open("ab", buffering=0) as file:
                file.write(added.encode())
                os.fsync(file.fileno())
            yield added
