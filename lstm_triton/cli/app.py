"""The commands and their options."""

from __future__ import annotations

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lstm_triton import VARIANTS, LSTMSpec, routing
from lstm_triton.cli import INTERRUPTED, checkpoints, explain, info, output, parallel, report, say
from lstm_triton.cli.devices import parse_device
from lstm_triton.cli.errors import UserError
from lstm_triton.cli.files import check_writable, real, reason, write_whole
from lstm_triton.cli.model import sample
from lstm_triton.cli.progress import display_for
from lstm_triton.cli.text import build_corpus, read_text
from lstm_triton.cli.training import DTYPES, Run, Settings

VARIANT_NAMES = tuple(spec.name for spec in VARIANTS)

EVALUATIONS = 10
"""The validation loss is taken after each such part of a run."""

PLAIN_WIDTH = 110
"""Columns of what goes to a file or a pipe."""

CURVES = "the curves"

Ending = Literal["finished", "interrupted", "unheard"]
"""How a training ended; unheard: before its last step, because stdout failed."""

app = typer.Typer(help="A fast LSTM for PyTorch, in Triton.", add_completion=False, pretty_exceptions_enable=False)


def run(arguments: Sequence[str]) -> int:
    """Run a command and return the exit code; what the user did wrong becomes one line on stderr.

    Of several processes one prints; of those that fail the first says why, an unforeseen error included.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if sys.stdout is None:
        return _fail("standard output is closed", 1)
    with output.remembering() as stdout:
        code = _run(arguments)
    failure = output.failure(stdout)
    if failure is not None and code == 0:
        return _fail_to_print(output.OutputError(failure))
    return code


def _run(arguments: Sequence[str]) -> int:
    """The exit code of a command whose output arrives."""
    try:
        with parallel.leader_prints():
            return app(list(arguments) or ["--help"], prog_name="lstm-triton", standalone_mode=False) or 0
    except output.OutputError as error:
        return _fail_to_print(error)
    except UserError as error:
        return _fail(str(error), 1)
    except OSError as error:
        # Whatever it was that could not be read or written, the system's reason says more than where in the code.
        return _fail(f"{reason(error)}: {error.filename}" if error.filename else reason(error), 1)
    except torch.OutOfMemoryError as error:
        return _fail(f"out of memory, try a smaller --hidden, --batch or --window: {error}", 1)
    except typer.TyperException as error:
        return _fail(error.format_message(), 2)
    except Exception:
        if parallel.speaks_first():
            raise
        return 1


def _fail(message: str, code: int) -> int:
    if parallel.speaks_first():
        say(f"error: {' '.join(message.split())}")
    return code


def _fail_to_print(error: output.OutputError) -> int:
    if not error.closed:
        return _fail(str(error), 1)
    parallel.speaks_first()  # the others fail for want of this process, and have nothing to say either
    return output.CLOSED


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


@app.command(name="info")
def info_command(
    hidden: Annotated[
        int | None, typer.Option(min=1, max=explain.LARGEST_SIZE, help="Hidden units of the layer to explain.")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(min=1, max=explain.LARGEST_SIZE, help="Batch rows.", show_default=str(explain.DEFAULT_BATCH)),
    ] = None,
    inputs: Annotated[
        int | None,
        typer.Option("--input", min=1, max=explain.LARGEST_SIZE, help="Input features.", show_default="as --hidden"),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=explain.LARGEST_SIZE, help="Time steps.", show_default=str(explain.DEFAULT_STEPS)),
    ] = None,
    bidirectional: Annotated[bool, typer.Option("--bidirectional", help="Both directions.")] = False,
    dtype: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(explain.DTYPES)}.", show_default=explain.DEFAULT_DTYPE)
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(VARIANT_NAMES)}.", show_default="standard")
    ] = None,
    proj: Annotated[
        int | None, typer.Option(min=0, max=explain.LARGEST_SIZE, help="Size of a projection.", show_default="0, none")
    ] = None,
    inference: Annotated[bool, typer.Option("--inference", help="No backward pass will follow.")] = False,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Rows have lengths of their own (a PackedSequence, lengths=), or resets.")
    ] = False,
    gpu: Annotated[
        list[str] | None,
        typer.Option(
            help=f"GPU to plan for; repeat for several. One of: {', '.join(explain.GPUS)}; or all.",
            show_default=f"the one that is here, else {explain.ASSUMED_GPU}",
        ),
    ] = None,
    compiling: Annotated[
        bool, typer.Option("--compile", help="Compile the ranked plans for the GPU: registers, spills, shared memory.")
    ] = False,
) -> None:
    """Print versions, devices, and which backend runs on each device and why.

    With --hidden instead: how one LSTM layer is computed on a GPU, and why. The GPU need not be here.
    Nothing runs, nothing is measured; all other options describe the layer.
    """
    console = _console()
    if hidden is None:
        given = {
            "--batch": batch,
            "--input": inputs,
            "--steps": steps,
            "--bidirectional": bidirectional,
            "--dtype": dtype,
            "--variant": variant,
            "--proj": proj,
            "--inference": inference,
            "--ragged": ragged,
            "--gpu": gpu,
            "--compile": compiling,
        }
        alone = [option for option, value in given.items() if value]
        if alone:
            raise UserError(f"{', '.join(alone)}: add --hidden N, the size of the layer to explain")
        console.print(info.versions_table())
        console.print(info.devices_table())
        return
    asked = explain.question(
        hidden,
        batch or explain.DEFAULT_BATCH,
        inputs,
        steps or explain.DEFAULT_STEPS,
        bidirectional,
        explain.DEFAULT_DTYPE if dtype is None else dtype,
        "standard" if variant is None else variant,
        proj or 0,
        inference,
        ragged,
    )
    chosen, note = explain.targets(gpu or ())
    if note is not None:
        console.print(note, highlight=False, markup=False)
    for section in explain.sections(asked, chosen, compiling):
        console.print(info.facts_table(section.title, section.rows))


@app.command()
def train(
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text to learn.", show_default="the language reference in pydoc_data")
    ] = None,
    variant: Annotated[
        list[str],
        typer.Option(help=f"LSTM to train; repeat for several. One of: {', '.join(VARIANT_NAMES)}; or all."),
    ] = ["standard"],  # noqa: B006
    output_peephole: Annotated[
        Literal["previous", "current"],
        typer.Option(help="current: the output gate of every chosen peephole variant reads c_t, as with +current."),
    ] = "previous",
    embedding: Annotated[int, typer.Option(min=1, help="Size of the character embedding.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Hidden units of each layer.")] = 192,
    layers: Annotated[int, typer.Option(min=1, help="LSTM layers.")] = 1,
    batch: Annotated[
        int, typer.Option(min=1, help="Streams of text that are read in parallel, by all processes together.")
    ] = 32,
    window: Annotated[int, typer.Option(min=1, help="Characters of each stream in a step.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Steps in all, those before --resume included.")] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 4e-3,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the weights and of the sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is the GPU if there is one.")] = "auto",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float64"],
        typer.Option(help="Of everything: weights, activations, optimizer. Only the loss is at least float32."),
    ] = "float32",
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Directory to save to: regularly, at the end and on Ctrl-C. All processes must see it, so on several "
            "machines it lies on a file system that they share.",
            show_default="none",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run that is saved in --checkpoint.")] = False,
    parallel_mode: Annotated[
        Literal["ddp", "fsdp"],
        typer.Option(
            "--parallel",
            help="What several processes share: the gradients (DistributedDataParallel), or the parameters and the "
            "optimizer's state too (fully_shard). One process has nothing to share.",
        ),
    ] = "ddp",
    save_every: Annotated[int, typer.Option(min=1, help="Steps from one regular save to the next.")] = 100,
    plot: Annotated[
        Path,
        typer.Option(
            help=f"File to draw the curves into. Its suffix is the format: {', '.join(report.PLOT_SUFFIXES)}."
        ),
    ] = Path("lstm-triton-curves.png"),
    sample_length: Annotated[int, typer.Option(min=1, help="Characters to generate at the end.")] = 400,
    temperature: Annotated[float, typer.Option(help="Of the sample: lower is safer, higher is wilder.")] = 0.7,
) -> None:
    """Train a character-level language model with this library's LSTM and with torch.nn.LSTM, side by side.

    All models start from the same weights and see the same batches.
    Ctrl-C stops after the step in progress and saves; a second one stops at once.

    On several GPUs, or CPU processes, start it with torchrun, on each machine if there are many:

        torchrun --nproc-per-node 4 -m lstm_triton.cli train ...

    The processes share the batch and train as one would; a run may be continued by another number of them.
    """
    for name, value in (("--learning-rate", learning_rate), ("--temperature", temperature)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} must be positive and finite, got {value}")
    settings = Settings(
        variants=parse_variants(variant, output_peephole == "current"),
        embedding=embedding,
        hidden=hidden,
        layers=layers,
        batch=batch,
        window=window,
        learning_rate=learning_rate,
        dtype=dtype,
        seed=seed,
    )
    for option, path in (("--text", text), ("--checkpoint", checkpoint)):
        if path is not None and real(path) == real(plot):
            raise UserError(f"--plot and {option} are the same file: {plot}")
    if checkpoint is None and resume:
        raise UserError("--resume needs --checkpoint DIRECTORY, the one to continue from")
    place = parallel.place_in(os.environ)
    parallel.check_shares(batch, place.size)
    chosen_device = parse_device(parallel.device_name(device, place))
    backend = choose_backend(chosen_device, DTYPES[dtype])

    with parallel.joined(place, chosen_device, parallel_mode) as world:
        console = _console()
        if world.leads:
            check_writable(plot, CURVES)
            report.check_plot(plot)
            if checkpoint is not None:
                checkpoints.check_savable(checkpoint, resume)
        training = Run(settings, build_corpus(read_text(text), batch, window), world)
        if checkpoint is not None and resume:
            checkpoints.resume(checkpoint, training)
            if training.step >= steps:
                raise UserError(f"{checkpoint} has {training.step} steps already: --steps must be larger, got {steps}")

        console.print(
            f"{len(training.corpus.vocabulary)} different characters, {training.corpus.training.numel():,} to learn, "
            f"{training.corpus.validation.numel():,} to validate; {dtype} on {world.description}, "
            f"backend {backend.name}: {backend.reason}",
            highlight=False,
            markup=False,
        )
        if (failure := output.failure(console.file)) is not None:
            raise output.OutputError(failure)
        ending = train_until(training, steps, save_every, checkpoint, console)
        if ending == "finished":
            conclude(training, plot, sample_length, temperature, console)
            outcome = f"checkpoint: {checkpoint}" if checkpoint else None
        else:
            outcome = f"stopped after step {training.step} of {steps}; " + (
                f"saved to {checkpoint}, continue with --resume" if checkpoint else "nothing was saved: no --checkpoint"
            )
        if outcome is not None:
            console.print(outcome, highlight=False, markup=False, soft_wrap=True)
    if ending == "unheard" and (failure := output.failure(console.file)) is not None:
        raise output.OutputError(failure, outcome or "")
    if ending != "finished":
        raise typer.Exit(INTERRUPTED)


def conclude(training: Run, plot: Path, sample_length: int, temperature: float, console: Console) -> None:
    """Print the results and a text that the best variant writes, and draw the curves, whatever becomes of the text.

    All processes write the text, since with `fsdp` each has a part of the model.
    """
    console.print(report.results_table(training))
    best = min(training.variants, key=lambda learner: learner.validation[training.step])
    prompt = training.corpus.validation[0, : training.settings.window].to(training.world.device)
    seed = training.settings.seed
    try:
        written = sample(best.model, training.corpus.vocabulary, prompt, sample_length, temperature, seed)
        console.print(Panel(Text(printable(written)), title=f"sample of {best.name}, temperature {temperature:g}"))
    finally:
        if training.world.leads:
            write_whole(plot, report.plot_curves(training, plot), CURVES)
    console.print(f"curves: {plot}", highlight=False, markup=False, soft_wrap=True)


def train_until(training: Run, last: int, save_every: int, path: Path | None, console: Console) -> Ending:
    """Train to step `last` with a display, saving to `path` on the way.

    It stops before, and saves, after the step in which Ctrl-C came in any process, or stdout failed.
    """
    ending: Ending = "finished"
    with interruptible() as interrupted, display_for(console, training, last) as display:
        for step in training.steps(last, evaluate_every=math.ceil(last / EVALUATIONS)):
            display.update()
            unheard = output.failure(console.file) is not None
            stopping = training.world.any(interrupted() or unheard)
            if path is not None and (stopping or step == last or step % save_every == 0):
                checkpoints.save(path, training)
            if stopping and step != last:
                ending = "interrupted" if interrupted() or not unheard else "unheard"
                break
    return ending


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the yielded function return True; a second one is a KeyboardInterrupt."""
    seen = False

    def remember(signal_number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    former = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, former)


def parse_variants(names: Sequence[str], output_current: bool) -> tuple[str, ...]:
    """The names of the chosen variants, each once; "all" stands for all of them.

    With `output_current` those with a peephole become their `+current` form.
    Raises UserError for an unknown name, and if `output_current` concerns none of them.
    """
    chosen: dict[LSTMSpec, None] = {}
    for name in names:
        if name not in (*VARIANT_NAMES, "all"):
            raise UserError(f"unknown variant {name!r}: there are {', '.join(VARIANT_NAMES)}, and all")
        for spec in VARIANTS if name == "all" else (LSTMSpec.parse(name),):
            if output_current and spec.peephole:
                spec = replace(spec, output_peephole="current")
            chosen[spec] = None
    found = tuple(spec.name for spec in chosen)
    if output_current and not any(spec.peephole for spec in chosen):
        raise UserError(f"--output-peephole current needs a variant with a peephole, got {', '.join(found)}")
    return found


def choose_backend(device: torch.device, dtype: torch.dtype) -> routing.Choice:
    """The backend that will run. Raises UserError if the one asked for cannot."""
    try:
        return routing.choose_backend(device, dtype)
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error


def printable(text: str) -> str:
    """The text without characters that could steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)
