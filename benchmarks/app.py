"""The commands and their options."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from lstm_triton_kernels.limit import Constants
from lstm_triton_kernels.spec import NORMALIZED, VARIANTS
from rich.console import Console
from rich.progress import track

from benchmarks import ROOT, micro, regressions, results_folder, rows, run, second, steps, suites, warm
from benchmarks.console import console, constants_table, line_of, means_table, providers_table, suites_table
from benchmarks.environment import environment, machine
from benchmarks.providers import BASELINES, PROVIDERS, Provider
from benchmarks.worker import Worker
from lstm_triton.dtypes import dtype_name

GROUPS = {"gpu": suites.GPU_SUITES}
MICRO_SECONDS = 120.0

app = typer.Typer(help="Measure lstm_triton beside what a user would pick instead.", pretty_exceptions_enable=False)


def parse_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is the GPU if there is one. Raises BadParameter for an unknown one."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise typer.BadParameter(f"unknown device {name!r}: there are auto, cpu, cuda and cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"cannot run on {name!r}, only on cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"there is no {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices")
    return device


def parse_dtype(text: str) -> str:
    """Return the name of a type in results files from any spelling. Raises BadParameter for one not measured."""
    try:
        name = dtype_name(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if name not in suites.STORAGE:
        raise typer.BadParameter(f"{name} is not measured: there are {', '.join(suites.STORAGE)}")
    return name


def parse_shape(text: str) -> tuple[int, int]:
    """Return rows and units. Raises BadParameter for another text than `16x768`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"--shape: {text!r} is not rows x units, as 16x768")
    return int(match[1]), int(match[2])


def parse_own_shape(text: str) -> suites.Case:
    """Return the case of a shape of one's own. Raises BadParameter with the reason for another text."""
    try:
        return suites.parse_shape(text)
    except ValueError as error:
        raise typer.BadParameter(f"--shape: {error}") from error


FOLDER = "benchmarks in lstm_triton in $XDG_DATA_HOME, else in ~/.local/share"
Results = Annotated[Path | None, typer.Option(help="Folder of the results files.", show_default=FOLDER)]
Read = Annotated[
    Path | None,
    typer.Option(exists=True, file_okay=False, help="Folder of the results files.", show_default=FOLDER),
]
DEVICE = typer.Option(parser=parse_device, metavar="NAME", help="auto, cpu, cuda or cuda:N; auto is the GPU if any.")
Device = Annotated[torch.device, DEVICE]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Repeat for several: {', '.join(suites.SUITES)}; gpu is {', '.join(suites.GPU_SUITES)}.",
        show_default="gpu, or cpu without a GPU; none with --shape",
    ),
]
Dtype = Annotated[str, typer.Option(parser=parse_dtype, metavar="NAME", help="As bf16 or bfloat16.")]
Projection = Annotated[
    int | None, typer.Option(min=1, help="Size of a hidden state after projection.", show_default="no projection")
]
Processes = Annotated[int | None, typer.Option(min=1, help="Processes that compile.", show_default="one a core")]


@app.command(name="run")
def run_command(
    suite: Suites = None,
    shape: Annotated[
        list[suites.Case] | None,
        typer.Option(
            parser=parse_own_shape,
            metavar="SIZES",
            help="A shape of your own, as T=512,B=32,H=320; repeat for several. T, B and H are needed; also I, L, D, "
            "P=160 (a projection), variant=coupled, lengths (rows of different lengths), resets=0.03 (rows begin "
            "anew), name=WORDS.",
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat for several: {', '.join(PROVIDERS)}; or a name for all its strategies."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            parser=parse_dtype,
            metavar="NAME",
            help=f"Repeat for several: {', '.join(suites.STORAGE)}.",
            show_default="those of the suites; of a shape of your own bfloat16, on a CPU float32",
        ),
    ] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Repeat for both: {', '.join(suites.MODES)}.")] = None,
    budget: Annotated[float | None, typer.Option(min=1.0, help="Seconds in all; by priority of the rows.")] = None,
    row_seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for the timing of a row.")] = 0.5,
    floors: Annotated[
        bool, typer.Option(help="End with status 1 if this library is slower than the floors of this GPU.")
    ] = True,
    only_list: Annotated[
        bool, typer.Option("--list", help="List suites and providers, with --suite the cases; measure nothing.")
    ] = False,
    device: Device = "auto",  # type: ignore[assignment]
    results: Results = None,
) -> None:
    """Time providers over suites or shapes; every row goes to a new file in the results folder when it is done.

    Example: python -m benchmarks run --shape T=512,B=32,I=80,H=320 --dtype bf16
    """
    out, until = console(), time.monotonic() + (budget or math.inf)
    asked = tuple(suite or (() if shape else default_suites(device)))
    dtypes, modes = tuple(dtype or ()), known("--mode", mode or suites.MODES, suites.MODES)
    own_dtypes = dtypes or ("bfloat16" if device.type == "cuda" else "float32",)
    own = suites.own_cases(shape or (), own_dtypes, modes)
    cases = [*own, *suites.cases(suites_of(asked), dtypes, modes)]
    if only_list:
        if suite or shape:
            out.print(*map(str, cases), sep="\n", markup=False, soft_wrap=True)
        else:
            out.print(suites_table(suites.cases(suites.SUITES, dtypes, modes)))
        out.print(providers_table(PROVIDERS.values()))
        return
    chosen = choose_providers(provider or [])
    todo = run.tasks(cases, chosen, device.type)
    if not todo:
        keys = ", ".join(provider.key for provider in chosen)
        raise typer.BadParameter(f"nothing to measure: none of {keys} computes these cases on {device}")
    target, here = folder(results), environment(device)
    limits = constants_of(out, target, device, here["gpu"])
    what = "_".join(dict.fromkeys([*(case.suite for case in own), *asked]))
    path = rows.new_file(target, machine(device), here["date"], what)
    done: list[rows.Row] = []
    interrupted = False
    with closing(Worker(str(device), BASELINES, row_seconds, path.with_suffix(".log"))) as worker:
        measured: Iterator[rows.Row | None] = run.measure(
            todo, worker, until, lambda task, found: run.row(task, found, here, limits, device.type), path
        )
        try:
            for row in track(measured, "rows", len(todo), console=out, disable=not out.is_terminal):
                if row is not None:
                    done.append(row)
                    out.print(line_of(row), markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            interrupted = True
    if done:
        out.print(means_table(done))
        out.print(str(path), soft_wrap=True)
    if interrupted:
        out.print("interrupted: the rows that were done are in the file")
        raise typer.Exit(130)
    if len(done) < len(todo):
        left = f"{len(todo) - len(done)} of {len(todo)} rows"
        out.print(f"no time for {left}, those of the lowest priority: a larger --budget takes them")
    slower = regressions.slower_rows(done, regressions.load(here["gpu"])) if floors else []
    if slower:
        out.print(f"slower than before, by more than the factor {regressions.SLOWER} (--no-floors does not compare):")
        out.print(*map(str, slower), sep="\n", markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command(name="micro")
def micro_command(device: Device = "auto", results: Results = None) -> None:  # type: ignore[assignment]
    """Measure the constants of the limit on this machine: bandwidths, matmul rates, waits.

    Example: python -m benchmarks micro
    """
    out, target, here = console(), folder(results), environment(device)
    found = micro.measure(device)
    path = rows.new_file(target, machine(device), here["date"], "micro", "json")
    rows.save_constants(path, found, here)
    out.print(constants_table(found))
    out.print(str(path), soft_wrap=True)


@app.command(name="steps")
def steps_command(
    shape: Annotated[
        list[str] | None, typer.Option(help="Rows x units, as 16x768; repeat.", show_default="a list of its own")
    ] = None,
    dtype: Dtype = "bfloat16",
    variant: Annotated[str, typer.Option(help="The cell, of the given shapes.")] = "standard",
    proj: Projection = None,
    wait: Annotated[
        list[str] | None,
        typer.Option(
            help="How programs wait: planned, counter or data; repeat.", show_default="planned; in float32 all three"
        ),
    ] = None,
    processes: Processes = None,
    device: Device = "auto",  # type: ignore[assignment]
    results: Results = None,
) -> None:
    """Time a step of the persistent kernels by itself: one launch a pass, compared with the reference first.

    Example: python -m benchmarks steps --shape 16x768 --dtype bf16
    """
    out = console()
    if device.type != "cuda":
        raise typer.BadParameter("times persistent kernels: needs a GPU")
    known("--variant", [variant], [spec.name for spec in (*VARIANTS, *NORMALIZED)])
    waits = known("--wait", wait or [], steps.WAITS)
    sizes = [parse_shape(text) for text in shape or []]
    if proj and not sizes:
        raise typer.BadParameter("--proj is for --shape")
    P = projection(proj, min((H for _, H in sizes), default=0))
    cases = steps.cases([(B, H, dtype, variant) for B, H in sizes] if sizes else steps.SHAPES, P)
    asked = [(case, name) for case in cases for name in steps.waits(case, waits)]
    here = environment(device)
    path = rows.new_file(folder(results), machine(device), here["date"], "steps", "jsonl")
    steps.compile_all(asked, str(device), processes or os.cpu_count() or 1)
    path.write_text(json.dumps(here) + "\n")
    for row in steps.run(asked, device, path):
        out.print(str(row), markup=False, soft_wrap=True)
    out.print(str(path), soft_wrap=True)


@app.command(name="second")
def second_command(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="One layer, as T=128,B=16,H=768,variant=coupled; repeat.", show_default="a list of its own"),
    ] = None,
    dtype: Dtype = "bfloat16",
    row_seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for the timing of a row.")] = 2.0,
    device: Device = "auto",  # type: ignore[assignment]
    results: Results = None,
) -> None:
    """Time a gradient penalty: the gradient of a gradient, beside PyTorch without cuDNN and the reference equations.

    Example: python -m benchmarks second --shape T=128,B=16,H=768 --dtype bf16
    """
    out, here = console(), environment(device)
    shapes = [parse_own_shape(text) for text in shape or ()]
    own = [replace(one, suite="second", dtype=dtype, mode=suites.TRAINING) for one in shapes]
    cases = own or [second.case_of(*sizes) for sizes in second.SHAPES]
    path = rows.new_file(folder(results), machine(device), here["date"], "second", "jsonl")
    path.write_text(json.dumps(here) + "\n")
    for row in second.run(cases, device, row_seconds, path):
        out.print(str(row), markup=False, soft_wrap=True)
    out.print(str(path), soft_wrap=True)


@app.command(name="warm")
def warm_command(
    suite: Suites = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="After so many, no other row is begun.")] = 60.0,
    processes: Processes = None,
    device: Device = "auto",  # type: ignore[assignment]
) -> None:
    """Compile the kernels of suites, in many processes, so that a run with a budget need not; measures nothing.

    Example: python -m benchmarks warm --suite core --seconds 120
    """
    cases = suites.cases(suites_of(suite or default_suites(device)))
    done, total = warm.compile_all(cases, str(device), processes or os.cpu_count() or 1, seconds)
    console().print(f"{done} of {total} rows computed once, by priority")


@app.command(name="report")
def report_command(
    results: Read = None,
    readme: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="File whose marked block is rewritten.")
    ] = None,
) -> None:
    """Write tables and plots of all results files; where asked, rewrite the marked block of a README from them.

    Example: python -m benchmarks report --results benchmarks/results --readme README.md
    """
    try:
        from benchmarks import report
    except ImportError as error:
        raise typer.BadParameter(f"a report needs pandas and matplotlib: {error}") from error
    try:
        print_written(*report.write(folder_of_results(results), readme))
    except report.WrongMarkers as error:
        raise typer.BadParameter(f"--readme: {readme}: {error}") from error


@app.command(name="floors")
def floors_command(
    results: Read = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the files, one a GPU.", show_default="benchmarks/floors")
    ] = regressions.FLOORS,
) -> None:
    """Write the floors of each GPU, with which `run` compares: the newest times of this library in results files.

    Example: python -m benchmarks floors --results benchmarks/results
    """
    print_written(*regressions.write(folder_of_results(results), folder(out, "--out")))


@app.command(name="gpu")
def gpu_command(
    budget: Annotated[float, typer.Option(min=60.0, help="Seconds in all.")] = 540.0, results: Results = None
) -> None:
    """Measure everything on a GPU: a step by itself, parity tests, constants, suites; ends with the means.

    Example: python -m benchmarks gpu --budget 540 --results results
    """
    from benchmarks import gpu

    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: PyTorch finds no CUDA device")
    raise typer.Exit(gpu.run_all(budget, folder(results), console()))


@app.command(name="simulate")
def simulate_command(
    hidden: Annotated[int | None, typer.Option(min=1, help="Units of the layer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows.")] = None,
    dtype: Dtype = "bfloat16",
    variant: Annotated[str, typer.Option(help=f"Of the cell, or {', '.join(suites.REGULARIZED)}.")] = "standard",
    directions: Annotated[int, typer.Option(min=1, max=2, help="1, or 2 for a bidirectional layer.")] = 1,
    proj: Projection = None,
    gpu: Annotated[str, typer.Option(help="The GPU that is simulated.")] = "h100",
    skew: Annotated[int, typer.Option(min=0, help="Cycles that the last other thread block publishes later.")] = 0,
    wait: Annotated[
        str | None, typer.Option(help="How programs wait: counter or data.", show_default="as planned")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    all_plans: Annotated[
        bool, typer.Option("--all-plans", help="All plans: estimates beside simulated steps.")
    ] = False,
    code: Annotated[bool, typer.Option("--code", help="The instructions of a step, each with its phase.")] = False,
    all_suites: Annotated[bool, typer.Option("--suites", help="A file of all suites' shapes instead.")] = False,
    first: Annotated[int | None, typer.Option(min=1, help="With --suites: only so many shapes.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="With --suites: the file; what it has is kept.", show_default="named by Triton"),
    ] = None,
) -> None:
    """Simulate a time step of the persistent kernels on a GPU that need not be there; nothing is measured.

    Example: python -m benchmarks simulate --hidden 768 --batch 16
    """
    from benchmarks.simulator import passes, table
    from benchmarks.simulator.kernels import Case, kernels_are_interpreted
    from benchmarks.simulator.machine import MACHINES

    views = {"--json": (as_json, passes.as_json), "--all-plans": (all_plans, passes.every_plan)}
    views["--code"] = (code, passes.instructions)
    asked = [option for option, (wanted, _) in views.items() if wanted]
    known("--variant", [variant], [*(spec.name for spec in (*VARIANTS, *NORMALIZED)), *suites.REGULARIZED])
    known("--wait", [wait] if wait else [], ("counter", "data"))
    if gpu not in MACHINES:
        raise typer.BadParameter(f"--gpu: no model of {gpu!r}: there are {', '.join(MACHINES)}")
    if len(asked) > 1 or (asked and all_suites):
        raise typer.BadParameter(f"one of {', '.join([*asked, *(['--suites'] * all_suites)])}, not several")
    if all_suites and (hidden or batch or wait or proj or variant != "standard" or directions > 1):
        raise typer.BadParameter("--suites has shapes of its own: of the options for a layer it takes --dtype alone")
    if not all_suites and (first or file):
        raise typer.BadParameter("--first and --out are for --suites")
    if kernels_are_interpreted():
        raise typer.BadParameter("compiles kernels: needs a process without TRITON_INTERPRET in its environment")
    model = replace(MACHINES[gpu], skew=skew)
    if all_suites:
        path = file or table.default_path(dtype)
        path = folder(path.parent, "--out") / path.name
        try:
            for line in table.write(path, dtype, model, first):
                typer.echo(line, nl=False)
        except table.OtherTable as error:
            raise typer.BadParameter(f"--out: {error}") from error
        typer.echo(path)
        return
    if hidden is None or batch is None:
        raise typer.BadParameter("needs --hidden and --batch, or --suites")
    P = projection(proj, hidden)
    case = Case(batch, hidden, wait=wait, variant=variant, dtype=dtype, D=directions, P=P)
    for line in (views[asked[0]][1] if asked else passes.as_text)(case, model):
        typer.echo(line)
    if not passes.has_plan(case):
        raise typer.Exit(1)


def projection(proj: int | None, hidden: int) -> int:
    """Return the hidden size after projection, 0 without one. Raises BadParameter where it is not below the units."""
    if proj and proj >= hidden:
        raise typer.BadParameter(f"--proj: {proj} is not smaller than the {hidden} units of the layer")
    return proj or 0


def known(option: str, names: Sequence[str], there_are: Sequence[str]) -> tuple[str, ...]:
    """Return the names, each once. Raises BadParameter that lists what exists for one that is unknown."""
    for name in names:
        if name not in there_are:
            raise typer.BadParameter(f"{option}: unknown {name!r}: choose from {', '.join(there_are)}")
    return tuple(dict.fromkeys(names))


def default_suites(device: torch.device) -> list[str]:
    """Return what is measured where no suite is named."""
    return ["gpu" if device.type == "cuda" else "cpu"]


def suites_of(names: Sequence[str]) -> tuple[str, ...]:
    """Return the suites of names of suites and groups. Raises BadParameter for an unknown one."""
    known("--suite", names, (*suites.SUITES, *GROUPS))
    return tuple(dict.fromkeys(suite for name in names for suite in GROUPS.get(name, (name,))))


def choose_providers(names: Sequence[str]) -> list[Provider]:
    """Return the providers of these names, of none all that are installed.

    Raises BadParameter for an unknown one, listing all, and for one that is not installed, saying how.
    """
    every = {provider.name for provider in PROVIDERS.values()}
    known("--provider", [name for name in names if name not in every], list(PROVIDERS))
    if not names:
        return [one for one in PROVIDERS.values() if one.missing() is None]
    chosen = [one for key, one in PROVIDERS.items() if key in names or one.name in names]
    for missing in filter(None, (one.missing() for one in chosen)):
        raise typer.BadParameter(f"--provider: {missing}")
    return chosen


def folder_of_results(results: Path | None) -> Path:
    """Return the folder of results to read. Raises BadParameter where it is not there."""
    path = results or results_folder()
    if not path.is_dir():
        raise typer.BadParameter(f"--results: nothing was measured yet: {path} does not exist")
    return path


def print_written(written: Sequence[Path], damaged: Sequence[str]) -> None:
    """Print what was written, and what was left out of it because it is damaged."""
    out = console()
    for words in damaged:
        out.print(f"left out, damaged: {words}", style="red", markup=False, soft_wrap=True)
    for path in written:
        out.print(str(path), soft_wrap=True)


def constants_of(out: Console, results: Path, device: torch.device, name: str) -> Constants | None:
    """Return the constants of the limit: the newest of the machine in the folder, else measured in another process.

    None, said on the console, where that fails.
    """
    if name not in rows.all_constants(results)[0]:
        command = [sys.executable, "-m", "benchmarks", "micro", "--device", str(device), "--results", str(results)]
        try:
            subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MICRO_SECONDS, check=True)
        except subprocess.SubprocessError as error:
            words = " ".join(str(getattr(error, "stderr", None) or error).strip().splitlines()[-1:])
            out.print(f"no limit: its constants could not be measured: {words}", markup=False, soft_wrap=True)
    return rows.all_constants(results)[0].get(name)


def folder(path: Path | None, option: str = "--results") -> Path:
    """Return the folder's whole name, made if need be; of None that of results.

    Raises BadParameter if nothing can be written there.
    """
    path = (path or results_folder()).resolve()
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"{option}: cannot write to {path}: {error.strerror}") from error
    return path
