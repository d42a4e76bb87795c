"""The commands and their options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from lstm_triton_kernels.limit import Constants
from lstm_triton_kernels.spec import VARIANTS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import RESULTS, ROOT, constants, micro, plots, report, rows, run, steps, suites, warm
from benchmarks import readme as brief
from benchmarks.environment import environment, machine
from benchmarks.providers import BASELINES, PROVIDERS, Provider
from benchmarks.summary import ratio_in_words, short_table
from benchmarks.worker import Worker
from lstm_triton.cli.devices import parse_device
from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import write_whole

GROUPS = {"gpu": suites.GPU_SUITES}
ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""Of types, for `simulate`."""

MICRO_SECONDS = 120.0
PLAIN_WIDTH = 140
REPORT = "report.md"

app = typer.Typer(help="Measure lstm_triton beside what a user would pick instead.", pretty_exceptions_enable=False)

Results = Annotated[Path, typer.Option(help="Folder of the results files.", show_default="benchmarks/results")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is the GPU if there is one.")]


def console() -> Console:
    """Where everything is printed; wide where nobody looks."""
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False)


@app.command(name="run")
def run_command(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Repeat for several: {', '.join(suites.SUITES)}; gpu is {', '.join(suites.GPU_SUITES)}.",
            show_default="gpu, or cpu without a GPU",
        ),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeat for several: {', '.join(PROVIDERS)}; or a name for all its strategies."),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Repeat for several: {', '.join(suites.STORAGE)}.")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"Repeat for both: {', '.join(suites.MODES)}.")] = None,
    budget: Annotated[float | None, typer.Option(min=1.0, help="Seconds in all; the most telling rows first.")] = None,
    row_seconds: Annotated[float, typer.Option(min=0.01, help="Seconds for the timing of a row.")] = 0.5,
    constants_file: Annotated[
        Path | None,
        typer.Option("--constants", help="File that `micro` wrote.", show_default="this machine's newest, or measured"),
    ] = None,
    device: Device = "auto",
    results: Results = RESULTS,
) -> None:
    """Time providers over suites; every row goes to a new file in the results folder when it is done."""
    out = console()
    pace = run.Pace(budget)
    where = _device(device)
    asked = suite or ["gpu" if where.type == "cuda" else "cpu"]
    names = choose("--suite", expand(asked), suites.SUITES, tuple(GROUPS))
    dtypes = choose("--dtype", dtype or [], tuple(suites.STORAGE))
    modes = choose("--mode", mode or list(suites.MODES), suites.MODES)
    chosen = choose_providers(provider or [])
    cases = suites.cases(names, dtypes, modes)
    todo = run.tasks(cases, chosen, where.type)
    if not todo:
        keys = ", ".join(provider.key for provider in chosen)
        raise typer.BadParameter(f"nothing to measure: none of {keys} computes these cases on {where}")
    results = _folder(results)
    this = environment(where)
    known = load_constants(out, constants_file, results, where, this.gpu)
    path = rows.new_file(results, machine(where), this.date, "_".join(dict.fromkeys(asked)))
    seen: dict[str, dict[str, object]] = {}
    left_out = 0
    bar = Progress(
        MofNCompleteColumn(),
        BarColumn(bar_width=30),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} {task.description}", markup=False),
        console=out,
        disable=not out.is_terminal,
    )
    interrupted = False
    with closing(Worker(str(where), BASELINES, row_seconds, path.with_suffix(".log"))) as worker, bar:
        shown = bar.add_task("", total=len(todo), left="")
        try:
            measured = run.measure(
                todo, worker, pace, lambda task, found: run.row(task, found, this, known, where.type), path
            )
            for task, row, found in measured:
                left = f"{max(0.0, budget - pace.elapsed):.0f} s left;" if budget is not None else ""
                bar.update(shown, advance=1, description=f"last: {task}", left=left)
                if row is None or found is None:
                    left_out += 1
                    continue
                out.print(line_of(row), markup=False, soft_wrap=True)
                if found.kernels:
                    seen[str(task.case)] = dict(
                        asked=row.regime, shown=run.shown_algorithm(found.kernels), kernels=found.kernels
                    )
                    run.save_kernels(path.with_name(f"{path.stem}-kernels.json"), seen)
        except KeyboardInterrupt:
            interrupted = True
    if path.exists():
        out.print(short_table(rows.read(path)))
        out.print(f"{path}", soft_wrap=True)
    if left_out:
        out.print(f"no time for {left_out} of {len(todo)} rows, the least telling: a larger --budget takes them")
    if interrupted:
        out.print("interrupted: the rows that were done are in the file")
        raise typer.Exit(130)


@app.command(name="micro")
def micro_command(device: Device = "auto", results: Results = RESULTS) -> None:
    """Measure the constants of the limit on this machine: bandwidths, matmul rates, waits."""
    out = console()
    where = _device(device)
    results = _folder(results)
    this = environment(where)
    found = micro.measure(where)
    path = rows.new_file(results, machine(where), this.date, "micro", "json")
    constants.save(path, found, asdict(this))
    out.print(constants_table(found))
    out.print(f"{path}", soft_wrap=True)


@app.command(name="steps")
def steps_command(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Rows x units, as 16x768; repeat for several.", show_default="a list of its own"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the shapes: as for `run`.")] = "bfloat16",
    variant: Annotated[str, typer.Option(help="Of the shapes' cell.")] = "standard",
    wait: Annotated[
        list[str] | None,
        typer.Option(
            help="How programs wait: planned, counter or data; repeat for several.",
            show_default="planned; in exact float32 all three",
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="That compile at once.", show_default="one a core")
    ] = None,
    device: Device = "auto",
    results: Results = RESULTS,
) -> None:
    """Time a step of the persistent kernels by itself: one launch a pass, compared with the reference first."""
    out = console()
    where = _device(device)
    if where.type != "cuda":
        raise typer.BadParameter("times persistent kernels: needs a GPU")
    choose("--dtype", [dtype], tuple(suites.STORAGE))
    choose("--variant", [variant], tuple(spec.name for spec in VARIANTS))
    choose("--wait", wait or [], steps.WAITS)
    cases = steps.cases([(*parse_shape(text), dtype, variant) for text in shape] if shape else steps.SHAPES)
    asked = [(case, name) for case in cases for name in steps.waits(case, wait)]
    path = rows.new_file(_folder(results), machine(where), environment(where).date, "steps", "jsonl")
    steps.compile_all(asked, str(where), processes or os.cpu_count() or 1)
    path.write_text(json.dumps(asdict(environment(where))) + "\n")
    for row in steps.run(asked, where, path):
        out.print(str(row), markup=False, soft_wrap=True)
    out.print(f"{path}", soft_wrap=True)


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and units. Raises BadParameter for another text than `16x768`."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"--shape: {text!r} is not rows x units, as 16x768")
    return int(match[1]), int(match[2])


@app.command(name="warm")
def warm_command(
    suite: Annotated[
        list[str] | None, typer.Option(help="As for `run`.", show_default="gpu, or cpu without a GPU")
    ] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="After so many, no other row is begun.")] = 60.0,
    processes: Annotated[int | None, typer.Option(min=1, help="At once.", show_default="one a core")] = None,
    device: Device = "auto",
) -> None:
    """Compile the kernels of suites, in many processes, so that a run with a budget need not; measures nothing."""
    where = _device(device)
    asked = suite or ["gpu" if where.type == "cuda" else "cpu"]
    names = choose("--suite", expand(asked), suites.SUITES, tuple(GROUPS))
    done, total = warm.compile_all(suites.cases(names), str(where), processes or os.cpu_count() or 1, seconds)
    console().print(f"{done} of {total} rows computed once, the most telling first")


@app.command(name="report")
def report_command(
    results: Results = RESULTS,
    readme: Annotated[
        Path | None,
        typer.Option(help="File whose marked block is rewritten from them; none is if this is not given."),
    ] = None,
) -> None:
    """Make tables and plots of all results files; where asked, rewrite the marked block of a README from them."""
    out = console()
    if not results.is_dir():
        raise typer.BadParameter(f"there is no folder {results}")
    if readme is not None and not readme.is_file():
        raise typer.BadParameter(f"--readme: there is no file {readme}")
    for path in write_report(results, readme, out):
        out.print(f"{path}", soft_wrap=True)


@app.command(name="gpu")
def gpu_command(
    budget: Annotated[float, typer.Option(min=60.0, help="Seconds in all.")] = 540.0, results: Results = RESULTS
) -> None:
    """Everything a GPU has to say: parity tests, then the constants, then the suites; ends with the short table."""
    from benchmarks import gpu

    if not torch.cuda.is_available():
        raise typer.BadParameter("there is no GPU: PyTorch finds no CUDA device")
    raise typer.Exit(gpu.run_all(budget, _folder(results), console()))


@app.command(name="simulate")
def simulate_command(
    hidden: Annotated[int | None, typer.Option(min=1, help="Units of the layer.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows.")] = None,
    dtype: Annotated[
        str, typer.Option(help=f"One of {', '.join(suites.STORAGE)}; or {', '.join(ALIASES)}.")
    ] = "bfloat16",
    variant: Annotated[str, typer.Option(help="Of the cell.")] = "standard",
    directions: Annotated[int, typer.Option(min=1, max=2, help="1, or 2 for a bidirectional layer.")] = 1,
    gpu: Annotated[str, typer.Option(help="The GPU that is simulated.")] = "h100",
    skew: Annotated[
        int, typer.Option(min=0, help="Cycles that the last of the other thread blocks publishes later.")
    ] = 0,
    wait: Annotated[
        str | None, typer.Option(help="How programs wait: counter or data.", show_default="as planned")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON.")] = False,
    all_plans: Annotated[
        bool, typer.Option("--all-plans", help="Every plan, its estimate beside a simulated step.")
    ] = False,
    code: Annotated[bool, typer.Option("--code", help="The instructions of a step, each with its phase.")] = False,
    all_suites: Annotated[bool, typer.Option("--suites", help="A file of all suites' shapes instead.")] = False,
    first: Annotated[int | None, typer.Option(min=1, help="With --suites: only so many shapes.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--out", help="With --suites: the file; what it has is kept.", show_default="named by Triton"),
    ] = None,
) -> None:
    """Simulate a time step of the persistent kernels on a GPU that need not be there; nothing is measured."""
    from benchmarks.simulator import passes, table
    from benchmarks.simulator.kernels import Case, kernels_are_interpreted
    from benchmarks.simulator.machine import MACHINES

    views = {"--json": (as_json, passes.as_json), "--all-plans": (all_plans, passes.every_plan)}
    views["--code"] = (code, passes.instructions)
    asked = [option for option, (wanted, _) in views.items() if wanted]
    (dtype,) = choose("--dtype", [ALIASES.get(dtype, dtype)], tuple(suites.STORAGE), tuple(ALIASES))
    choose("--variant", [variant], tuple(spec.name for spec in VARIANTS))
    choose("--wait", [wait] if wait else [], ("counter", "data"))
    if gpu not in MACHINES:
        raise typer.BadParameter(f"--gpu: no model of {gpu!r}: there are {', '.join(MACHINES)}")
    if len(asked) > 1 or (asked and all_suites):
        raise typer.BadParameter(f"one of {', '.join([*asked, *(['--suites'] * all_suites)])}, not several")
    if all_suites and (hidden or batch or wait or variant != "standard" or directions > 1):
        raise typer.BadParameter("--suites has shapes of its own: of the options for a layer it takes --dtype alone")
    if not all_suites and (first or file):
        raise typer.BadParameter("--first and --out are for --suites")
    if kernels_are_interpreted():
        raise typer.BadParameter("compiles kernels: needs a process without TRITON_INTERPRET in its environment")
    machine = replace(MACHINES[gpu], skew=skew)
    if all_suites:
        path = file or table.default_path()
        path = _folder(path.parent, "--out") / path.name
        try:
            for line in table.write(path, dtype, machine, first):
                typer.echo(line, nl=False)
        except table.OtherTable as error:
            raise typer.BadParameter(f"--out: {error}") from error
        typer.echo(path)
        return
    if hidden is None or batch is None:
        raise typer.BadParameter("needs --hidden and --batch, or --suites")
    case = Case(batch, hidden, wait=wait, variant=variant, dtype=dtype, D=directions)
    view = views[asked[0]][1] if asked else passes.as_text
    for line in view(case, machine):
        typer.echo(line)
    if not passes.has_plan(case):
        raise typer.Exit(1)


def write_report(results: Path, readme: Path | None, out: Console) -> list[Path]:
    """The files that were written. What is damaged is named on the console and left alone."""
    found, known, damaged = load_results(results)
    for error in damaged:
        out.print(f"left out, damaged: {error}", style="red", markup=False, soft_wrap=True)
    pictures = plots.draw_all(found, results)
    path = results / REPORT
    beside = [(title, picture.name) for title, picture in pictures]
    write_whole(path, report.markdown(found, known, damaged, beside, leaves_out()).encode())
    written = [path, *(picture for _, picture in pictures)]
    if readme is not None:
        block = readme_block(results, readme, beside)
        write_whole(readme, brief.rewrite_block(readme.read_text(), block).encode())
        written.append(readme)
    return written


def leaves_out() -> dict[str, str]:
    """By provider and strategy, as rows name them, what each leaves out."""
    return {f"{provider.name} {provider.strategy}": provider.leaves_out for provider in PROVIDERS.values()}


def load_results(results: Path) -> tuple[list[rows.Row], dict[str, Constants], list[Exception]]:
    """The newest rows of every results file in the folder, constants by machine, and what is damaged."""
    found, damaged_rows = rows.read_all(results)
    known, damaged_constants = constants.load_all(results)
    return rows.newest(found), known, [*damaged_rows, *damaged_constants]


def readme_block(results: Path, readme: Path, pictures: Sequence[tuple[str, str]]) -> str:
    """What the marked block of the README says of the results in the folder, its links as seen from the README.

    - pictures: titles and file names of the plots in the folder
    """
    found, known, _ = load_results(results)
    folder = Path(os.path.relpath(results, readme.parent))
    links = [(title, str(folder / name)) for title, name in pictures]
    return brief.readme_block(found, known, str(folder / REPORT), links)


def choose(option: str, names: Sequence[str], known: Sequence[str], more: Sequence[str] = ()) -> tuple[str, ...]:
    """The names, each once. Raises BadParameter that lists what exists for one that is unknown."""
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"{option}: unknown {name!r}: there are {', '.join([*known, *more])}")
    return tuple(dict.fromkeys(names))


def expand(names: Sequence[str]) -> list[str]:
    """Groups of suites replaced by their suites."""
    return [suite for name in names for suite in GROUPS.get(name, (name,))]


def choose_providers(names: Sequence[str]) -> list[Provider]:
    """The providers of these names; of none, all that can be imported, the baseline first.

    Raises BadParameter for an unknown one, listing all, and for one that was asked for and cannot be imported.
    """
    if not names:
        return [provider for provider in PROVIDERS.values() if provider.missing() is None]
    for name in names:
        if not any(name in (key, provider.name) for key, provider in PROVIDERS.items()):
            raise typer.BadParameter(f"--provider: unknown {name!r}: there are {', '.join(PROVIDERS)}")
    found = [provider for key, provider in PROVIDERS.items() if key in names or provider.name in names]
    for provider in found:
        words = provider.missing()
        if words is not None:
            raise typer.BadParameter(f"--provider: {provider.key}: {words}")
    return found


def load_constants(out: Console, file: Path | None, results: Path, where: torch.device, name: str) -> Constants | None:
    """The constants of the limit: from the file, else the newest of the machine `name` in the folder, else measured.

    They are measured in a process of their own; None, said on the console, where that fails.
    """
    if file is not None:
        try:
            return constants.load(file)[0]
        except rows.DamagedResults as error:
            raise typer.BadParameter(f"--constants: {error}") from error
    known = constants.load_all(results)[0]
    if name not in known:
        command = [sys.executable, "-m", "benchmarks", "micro", "--device", str(where), "--results", str(results)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=MICRO_SECONDS)
            words = done.stderr.strip().splitlines()[-1:] if done.returncode else []
        except subprocess.TimeoutExpired:
            words = [f"not done after {MICRO_SECONDS:.0f} s"]
        known = constants.load_all(results)[0]
        if name not in known:
            out.print(f"no limit: its constants could not be measured: {' '.join(words)}", markup=False, soft_wrap=True)
    return known.get(name)


def line_of(row: rows.Row) -> str:
    """A row in one line, for the console."""
    start = f"{row.name:<24} {row.suite:<8} {row.mode:<16} {row.dtype:<8} {row.shape}:"
    if not row.timed:
        return f"{start} {row.error}"
    beside = "" if row.is_baseline or not row.baseline_ms else f", {row.baseline} {row.baseline_ms:.4g} ms"
    ratio = f", ratio {ratio_in_words(row)}" if beside else ""
    return f"{start} {row.ms_median:.4g} ms, {row.us_per_step:.3g} us a step{beside}{ratio}"


def constants_table(found: Constants) -> Table:
    """Name and value of every constant there is."""
    table = Table(title="constants of the limit", show_header=False)
    for line in report.constants_lines(found):
        table.add_row(*line)
    return table


def _device(name: str) -> torch.device:
    try:
        return parse_device(name)
    except UserError as error:
        raise typer.BadParameter(f"--device: {error}") from error


def _folder(path: Path, option: str = "--results") -> Path:
    """The folder's whole name, made if need be; finds out now if nothing can be written there."""
    path = path.resolve()
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise typer.BadParameter(f"{option}: cannot write to {path}: {error.strerror}") from error
    return path
