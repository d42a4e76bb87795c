"""Train a character-level language model with torch.nn.LSTM and with this library's LSTMs, side by side.

    python examples/train_text.py --steps 200 --plot curves.png
    python examples/train_text.py --variant zoneout --variant recurrent_dropout --variant layer_norm
    torchrun --nproc-per-node 2 examples/train_text.py --parallel fsdp --checkpoint run
    python examples/train_text.py --checkpoint run --resume --steps 2000

The first line trains on the GPU if there is one; the second trains regularised LSTMs, beside torch.nn.LSTM without; the
third in two processes, each with its share of the batch; the last continues that run in any number of processes. A
checkpoint is unpickled: it must come from a source you trust.
All models start from the same weights, see the same batches and take turns step by step, so that they can be compared.

Shapes: B streams of text, T characters in a window, V characters in the vocabulary, L layers, H hidden units.
"""

import json
import math
import os
import shutil
import time
import warnings
import zlib
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from lstm_triton import LSTM, VARIANTS
from lstm_triton.dtypes import DTYPES, dtype_name

try:
    from matplotlib.figure import Figure
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    raise SystemExit(f'{error.name} is not installed: pip install "lstm-triton[examples]"') from None

BASELINE = "torch.nn.LSTM"
OPTIONS = ("coupled", "peephole", "output_peephole")
MODELS = {spec.name: {option: getattr(spec, option) for option in OPTIONS} for spec in VARIANTS} | {
    "recurrent_dropout": dict(recurrent_dropout=0.25),
    "candidate_dropout": dict(recurrent_dropout=0.25, recurrent_dropout_on="candidate"),
    "zoneout": dict(zoneout=(0.1, 0.1)),
    "weight_dropout": dict(weight_dropout=0.25),
    "layer_norm": dict(layer_norm=True),
}
"""Name to the options of `LSTM`: the variants, and the standard one regularised."""
MAIN_VARIANTS = ["standard", "coupled", "diagonal", "full"]
NUMBERS = {
    "embedding": "size of the character embedding",
    "hidden": "hidden units",
    "layers": "LSTM layers",
    "batch": "streams of text, of all processes together",
    "window": "characters of each stream in a step",
    "learning_rate": "of AdamW",
    "steps": "training steps, those before --resume included",
    "sample_length": "characters to write at the end",
    "temperature": "of what is written: lower is safer",
}
MAX_GRADIENT_NORM = 1.0
WARM_UP_STEPS = 5  # the first steps of a process compile, tune and allocate; they are no part of its speed
RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them


class CharacterModel(nn.Module):
    """Embedding, LSTM, linear decoder: from characters to the logits of the next ones."""

    def __init__(self, vocabulary_size: int, lstm: nn.LSTM | LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, lstm.input_size)
        self.lstm = lstm
        self.decoder = nn.Linear(lstm.hidden_size, vocabulary_size)

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (B, T), state (2, L, B, H), which is h and c -> logits (B, T, V), the next state."""
        output, state = self.lstm(self.embedding(tokens), tuple(state))
        return self.decoder(output), torch.stack(state)


def build_models(args: Namespace, vocabulary_size: int) -> dict[str, CharacterModel]:
    """Return the baseline, and for each variant a model with all of the baseline's weights that the variant has."""
    sizes = (args.embedding, args.hidden, args.layers)
    torch.manual_seed(args.seed)
    models = {BASELINE: CharacterModel(vocabulary_size, nn.LSTM(*sizes, batch_first=True))}
    for name in args.variant:
        torch.manual_seed(args.seed)  # for the peephole weights
        options = MODELS[name]
        model = models[name] = CharacterModel(vocabulary_size, LSTM(*sizes, batch_first=True, **options))
        shared = models[BASELINE].state_dict()
        if options.get("coupled"):  # of the gate blocks i, f, g, o it has no i
            shared = {key: w[len(w) // 4 :] if key.startswith("lstm.") else w for key, w in shared.items()}
        model.load_state_dict(model.state_dict() | shared)
    return models


def bits_per_character(model: nn.Module, characters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Predict each of characters (B, T + 1) but the first -> mean cross entropy in bits, (), and the next state."""
    logits, state = model(characters[:, :-1], state)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(logits.flatten(0, 1), characters[:, 1:].flatten()) / math.log(2), state


def mean_over_processes(loss: float) -> float:
    """Return the mean of a loss that each process has for its streams; ends the program if it is not finite."""
    total = torch.tensor(loss, dtype=torch.float64)
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    if not total.isfinite():
        fail("a loss is not finite: try a smaller --learning-rate")
    return total.item() / WORLD_SIZE


class Learner:
    """A model in training, its curves in bits per character, and the state (2, L, B, H) of this process's streams."""

    def __init__(self, name: str, model: CharacterModel, args: Namespace) -> None:
        self.name, dtype = name, DTYPES[args.dtype][0]
        self.losses, self.validation, self.seconds = [], [], []
        self.model = self.wrapped = model.to(args.device, dtype)
        if WORLD_SIZE > 1 and args.parallel == "ddp":
            self.wrapped = nn.parallel.DistributedDataParallel(model)
        elif WORLD_SIZE > 1:
            fully_shard(model, mesh=dist.init_device_mesh(args.device, (WORLD_SIZE,)), reshard_after_forward=True)
        # Made after fully_shard, which replaces the parameters. In bfloat16 the usual beta of 0.999 would be 1.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
        self.state = torch.zeros(2, args.layers, args.batch // WORLD_SIZE, args.hidden, dtype=dtype, device=args.device)

    def training_step(self, characters: Tensor) -> None:
        """One step of truncated backpropagation through time, timed: characters (B, T + 1)."""
        start = time.perf_counter()
        self.wrapped.train()
        self.optimizer.zero_grad()
        loss, state = bits_per_character(self.wrapped, characters, self.state)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.state, number = state.detach(), loss.item()  # item() waits until the device has done the step
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(mean_over_processes(number))

    @torch.no_grad()
    def evaluate(self, streams: Tensor, window: int) -> float:
        """Return the loss over streams (B, characters), the state carried from window to window."""
        self.model.eval()
        state, bits = torch.zeros_like(self.state), 0.0
        for begin in range(0, streams.shape[1] - 1, window):
            characters = streams[:, begin : begin + window + 1]
            loss, state = bits_per_character(self.model, characters, state)
            bits += loss.item() * (characters.shape[1] - 1)
        return mean_over_processes(bits / (streams.shape[1] - 1))

    @torch.no_grad()
    def sample(self, vocabulary: str, prompt: Tensor, args: Namespace) -> str:
        """Return text that the model writes after the prompt (1, T), drawn from softmax(logits / temperature)."""
        generator = torch.Generator().manual_seed(args.seed)  # on the CPU, so that every device draws the same
        tokens, state, written = prompt, self.state.new_zeros(2, args.layers, 1, args.hidden), ""
        for _ in range(args.sample_length):
            logits, state = self.model.eval()(tokens, state)
            probabilities = torch.softmax(logits[0, -1].double().cpu() / args.temperature, dim=0)
            tokens = torch.multinomial(probabilities, 1, generator=generator)[None].to(prompt.device)
            written += vocabulary[int(tokens)]
        return "".join(c if c.isprintable() or c == "\n" else "�" for c in written)

    def state_dict(self) -> dict:
        """Return all to continue from, in as many processes or others: each stream has a state under its own number."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        states = {str(RANK * self.state.shape[2] + n): state for n, state in enumerate(self.state.unbind(2))}
        curves = json.dumps((self.losses, self.validation))
        return {"model": model, "optimizer": optimizer, "states": states, "curves": curves}

    def load_state_dict(self, saved: dict) -> None:
        """Continue from what `state_dict` returned."""
        set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        self.state = torch.stack(tuple(saved["states"].values()), dim=2)
        self.losses, self.validation = json.loads(saved["curves"])


def train(learners: list[Learner], args: Namespace, streams: list[Tensor], console: Console) -> None:
    """Train to the last step on streams[0] (B, characters); after each tenth validate on streams[1], print, save."""
    steps = range(args.record["step"] + 1, args.steps + 1)
    for step in track(steps, "training", console=console, disable=not console.is_terminal):
        torch.manual_seed(step * WORLD_SIZE + RANK)  # of dropout and zoneout: a resumed run draws what this one does
        begin = (step - 1) % ((streams[0].shape[1] - 1) // args.window) * args.window
        for learner in learners[step % len(learners) :] + learners[: step % len(learners)]:  # in turns
            learner.state *= begin > 0  # zeros where the text begins, else carried from the window before
            learner.training_step(streams[0][:, begin : begin + args.window + 1])
        if step % math.ceil(args.steps / 10) == 0 or step == args.steps:
            for learner in learners:
                learner.validation.append((step, learner.evaluate(streams[1], args.window)))
            losses = ", ".join(f"{learner.name} {learner.validation[-1][1]:.3f}" for learner in learners)
            console.print(f"step {step}/{args.steps}: {losses} bits/char", soft_wrap=True)
            if args.checkpoint is not None:
                save_checkpoint(learners, args, step)


def save_checkpoint(learners: list[Learner], args: Namespace, step: int) -> None:
    """Write the tensors to a new folder, then the record that names it, and only then remove the former folder."""
    folder, record = args.checkpoint / f"step-{step}", args.checkpoint / "latest.json"
    dcp.save({learner.name: learner for learner in learners}, checkpoint_id=folder)
    if RANK == 0:
        record.with_suffix(".tmp").write_text(json.dumps(dict(step=step, folder=folder.name, settings=args.settings)))
        record.with_suffix(".tmp").replace(record)  # at once, so it is always the record of a whole checkpoint
        for former in set(args.checkpoint.glob("step-*")) - {folder}:
            shutil.rmtree(former)


def report(learners: list[Learner], args: Namespace, console: Console) -> None:
    """Print sizes, final losses, speeds and distances to the baseline; plot losses above, distances below."""
    characters, baseline, width = args.batch * args.window, learners[0], math.ceil(args.steps / 20) | 1
    title = f"after {args.steps:,} steps of {characters:,} characters"
    table = Table("variant", title=title, caption_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.caption = f"chars/s: median after the first {WARM_UP_STEPS} steps; difference: of training losses, bits/char"
    for heading in ("parameters", "validation\nbits/char", "chars/s", f"ratio to\n{BASELINE}", "largest\ndifference"):
        table.add_column(heading, justify="right")
    figure = Figure(figsize=(10, 7.5), layout="constrained")
    curves, distances = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    middles = range(width // 2 + 1, args.steps - width // 2 + 1)  # of the windows over which the curves are smoothed
    for number, learner in enumerate(learners):
        size, validation = sum(p.numel() for p in learner.model.parameters()), f"{learner.validation[-1][1]:.3f}"
        own, base = (torch.tensor(one.seconds[WARM_UP_STEPS:] or one.seconds).median() for one in (learner, baseline))
        losses, others = torch.tensor([learner.losses, baseline.losses], dtype=torch.float64)
        largest = f"{(losses - others).abs().max():.1e}" if number else "-"
        table.add_row(learner.name, f"{size:,}", validation, f"{characters / own:,.0f}", f"{base / own:.2f}x", largest)
        # The baseline is drawn dashed and on top, so that a curve equal to it shows through.
        line = dict(color=f"C{number - 1}") if number else dict(color="black", linestyle="--", zorder=3)
        curves.plot(range(1, args.steps + 1), losses, color=line["color"], linewidth=0.6, alpha=0.25)
        curves.plot(middles, losses.unfold(0, width, 1).mean(1), label=f"{learner.name}, {validation}", **line)
        curves.plot(*zip(*learner.validation, strict=True), "o", color=line["color"], markersize=4)
        distances.plot(middles, (losses - others).unfold(0, width, 1).mean(1), **line)
    console.print(table)
    if args.plot is not None and RANK == 0:
        curves.legend(title="model, final validation loss")
        curves.set(title="lines: training (smoothed), dots: validation", ylabel="loss in bits per character")
        distances.set(ylabel=f"minus {BASELINE}", xlabel=f"step ({characters:,} characters each)")
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.plot, dpi=120)


def fail(message: str) -> None:
    """End the program with a line on stderr; of several processes the first says it, and torchrun ends the others."""
    time.sleep(30 if RANK else 0)
    raise SystemExit(f"error: {message}")


def parse_arguments(arguments: list[str] | None) -> Namespace:
    """Return the options, checked: `text` is the text itself, `settings` decide the curves, `record` is continued."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.error, devices = fail, ["cuda"] * torch.cuda.is_available() + ["cpu"]
    curves = dict(embedding=64, hidden=192, layers=1, batch=32, window=64, learning_rate=4e-3)
    numbers = curves | dict(steps=1000, sample_length=400, temperature=0.7)
    parser.add_argument("--text", type=Path, help="UTF-8 text to learn (default: Python's language reference)")
    parser.add_argument(
        "--variant", action="append", choices=MODELS, help=f"repeat (default: {', '.join(MAIN_VARIANTS)})"
    )
    for name, value in numbers.items():
        words = f"{NUMBERS[name]} (default: {value})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=words)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the sample (default: 0)")
    parser.add_argument("--device", choices=devices, default=devices[0], help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help=f"one of {', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--checkpoint", type=Path, help="directory to save to after every tenth of the run")
    parser.add_argument("--resume", action="store_true", help="continue the run that is saved in --checkpoint")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="with torchrun: how processes share")
    parser.add_argument("--plot", type=Path, help="file to draw the curves into; its suffix is the format")
    args = parser.parse_args(arguments)
    try:
        args.dtype = dtype_name(args.dtype)
    except ValueError as error:
        fail(str(error))
    args.variant = list(dict.fromkeys(args.variant or MAIN_VARIANTS))
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    latest, formats = (args.checkpoint or Path()) / "latest.json", Figure().canvas.get_supported_filetypes()
    saved = args.checkpoint is not None and latest.exists()
    if args.text and not args.text.is_file():
        fail(f"there is no text {args.text}")
    args.text = args.text.read_text("utf-8", "replace") if args.text else "\n\n".join(topics.values())
    args.settings = {name: vars(args)[name] for name in ("variant", *curves, "seed", "dtype")}
    args.settings["checksum of the text"] = zlib.crc32(args.text.encode())
    args.record = json.loads(latest.read_text()) if saved else {"step": 0, "settings": args.settings}
    for wrong, message in (
        *((not 0 < vars(args)[name] < math.inf, f"{name} must be positive and finite") for name in numbers),
        (args.batch % WORLD_SIZE, f"--batch {args.batch} cannot be shared by {WORLD_SIZE} processes"),
        (len(args.text) < args.batch * max(1.2 * args.window + 2, 20), "--text is too short for --batch and --window"),
        (args.plot and args.plot.suffix[1:].lower() not in formats, f"--plot must end in one of {', '.join(formats)}"),
        (args.resume and args.checkpoint is None, "--resume needs --checkpoint DIRECTORY"),
        (args.resume != saved, f"{args.checkpoint} holds {'a run: add' if saved else 'no run: omit'} --resume"),
        (args.settings != args.record["settings"], f"{args.checkpoint} has other settings: {args.record['settings']}"),
        (args.record["step"] >= args.steps, f"{args.checkpoint} has {args.record['step']} steps: give more --steps"),
    ):
        if wrong:
            fail(message)
    return args


def main(arguments: list[str] | None = None) -> list[Learner]:
    """Train all models, show what came of it, and return them."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled|Detected an existing checkpoint")
    args = parse_arguments(arguments)
    vocabulary = "".join(sorted(set(args.text)))
    tokens = torch.tensor([vocabulary.index(character) for character in args.text], device=args.device)
    parts = tokens.split([len(tokens) - len(tokens) // 10, len(tokens) // 10])  # to learn and to validate
    streams = [part[: len(part) - len(part) % args.batch].view(args.batch, -1) for part in parts]
    streams = [part.chunk(WORLD_SIZE)[RANK] for part in streams]  # of which each process takes its share
    if WORLD_SIZE > 1:
        dist.init_process_group()
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = DTYPES[args.dtype][1]
    learners = [Learner(name, model, args) for name, model in build_models(args, len(vocabulary)).items()]
    if args.resume:
        dcp.load({learner.name: learner for learner in learners}, checkpoint_id=args.checkpoint / args.record["folder"])
    console = Console(quiet=RANK > 0, highlight=False, markup=False)
    console.print(f"{len(tokens):,} tokens, {len(vocabulary)} different; {args.dtype} on {WORLD_SIZE} x {args.device}")
    train(learners, args, streams, console)
    report(learners, args, console)
    best = min(learners[1:], key=lambda learner: learner.validation[-1][1])
    written = best.sample(vocabulary, streams[1][:1, : args.window], args)
    console.print(f"\nwritten by {best.name}, temperature {args.temperature:g}:\n{written}", soft_wrap=True)
    if WORLD_SIZE > 1:
        dist.destroy_process_group()
    return learners


if __name__ == "__main__":
    main()
