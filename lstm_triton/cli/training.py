"""Training of several models side by side: the same batches, one step of each in turn, each of them timed.

Shapes: B streams, T characters in a window.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from time import perf_counter

import torch
import torch.nn.functional as F
from lstm_triton_kernels.spec import LSTMSpec
from torch import Tensor, nn

from lstm_triton.cli.errors import UserError
from lstm_triton.cli.model import CharacterModel, State, build_baseline, build_variant
from lstm_triton.cli.parallel import World
from lstm_triton.cli.text import Corpus

BASELINE = "torch.nn.LSTM"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

WARM_UP_STEPS = 5
"""The first steps of a process compile, tune and allocate; they are no part of characters per second."""

RECENT_STEPS = 20
MAX_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Settings:
    """What decides the curves; a checkpoint is only continued with the settings it was made with.

    The batch is that of all processes together: how many they are is no setting.
    """

    variants: tuple[str, ...]
    embedding: int
    hidden: int
    layers: int
    batch: int
    window: int
    learning_rate: float
    dtype: str
    seed: int


@dataclass
class Learner:
    """A model in training, with its curves.

    - model: the model itself; wrapped: what a training step calls, so that the processes average their gradients
    - state: of this process's streams, carried from window to window; None at the beginning of the text
    - losses: training loss of each step over the whole batch, bits per character
    - validation: step to validation loss, bits per character
    - seconds: duration of each step of this process
    """

    name: str
    model: CharacterModel
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    state: State | None = None
    losses: list[float] = field(default_factory=list)
    validation: dict[int, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def recent_loss(self) -> float:
        """Mean loss of the last steps, bits per character."""
        return fmean(self.losses[-RECENT_STEPS:])

    def seconds_per_step(self) -> float:
        """Median over the steps of this process after the warm-up (over all of them if there are no more)."""
        return median(self.seconds[WARM_UP_STEPS:] or self.seconds)

    def recent_seconds_per_step(self) -> float:
        """Median over the last steps."""
        return median(self.seconds[-RECENT_STEPS:])

    def largest_difference(self, other: Learner) -> float:
        """Between the two training curves at any step, bits per character."""
        return max(abs(mine - theirs) for mine, theirs in zip(self.losses, other.losses, strict=True))


def bits_per_character(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy in bits: logits (B, T, V), targets (B, T) -> (); at least in float32."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / math.log(2)


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor, state: State | None
) -> tuple[Tensor, State]:
    """One step of truncated backpropagation through time, in place.

    inputs, targets (B, T) -> the loss before the step in bits per character, (), and the next state; both detached.
    """
    model.train()
    optimizer.zero_grad()
    logits, (h, c) = model(inputs, state)
    loss = bits_per_character(logits, targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimizer.step()
    return loss.detach(), (h.detach(), c.detach())


@torch.no_grad()
def evaluate(model: CharacterModel, streams: Tensor, window: int) -> float:
    """Bits per character over streams (B, characters), the state carried from window to window."""
    model.eval()
    state: State | None = None
    bits = 0.0
    targets = streams[:, 1:]
    for inputs, expected in zip(streams[:, :-1].split(window, dim=1), targets.split(window, dim=1), strict=True):
        logits, state = model(inputs, state)
        bits += bits_per_character(logits, expected).item() * expected.numel()
    return bits / targets.numel()


class Run:
    """`torch.nn.LSTM` and the chosen variants, trained from the same weights on the same batches.

    `learners` holds the baseline first, then a learner per variant; `step` counts the steps made. `corpus` is the whole
    corpus, `share` the streams of this process on its device; all losses are of the whole corpus.
    Raises UserError if models of these sizes cannot be built.
    """

    def __init__(self, settings: Settings, corpus: Corpus, world: World) -> None:
        self.settings = settings
        self.corpus = corpus
        self.share = corpus.share(world)
        self.world = world
        self.step = 0
        try:
            baseline = build_baseline(
                len(corpus.vocabulary), settings.embedding, settings.hidden, settings.layers, settings.seed
            )
            models = {BASELINE: baseline}
            for name in settings.variants:
                models[name] = build_variant(baseline, LSTMSpec.parse(name), settings.seed)
            self.learners = [self._learner(name, model) for name, model in models.items()]
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"cannot build the models: {error}") from error

    def _learner(self, name: str, model: CharacterModel) -> Learner:
        model.to(self.world.device, DTYPES[self.settings.dtype])
        wrapped = self.world.wrap(model)
        # The usual beta of 0.999 is 1 in bfloat16.
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.99))
        return Learner(name, model, wrapped, optimizer)

    @property
    def baseline(self) -> Learner:
        """The learner with `torch.nn.LSTM`."""
        return self.learners[0]

    @property
    def variants(self) -> Sequence[Learner]:
        """The learners with this library's LSTM."""
        return self.learners[1:]

    @property
    def characters_per_step(self) -> int:
        """B·T, what each learner reads in a step, in all processes together."""
        return self.settings.batch * self.settings.window

    def zero_state(self) -> State:
        """A state of zeros for the streams of this process."""
        shape = (self.settings.layers, len(self.share.training), self.settings.hidden)
        h, c = torch.zeros(2, *shape, dtype=DTYPES[self.settings.dtype], device=self.world.device)
        return h, c

    def steps(self, last: int, evaluate_every: int) -> Iterator[int]:
        """Train up to step `last`; yield the number of each step once all learners have made it.

        The learners are evaluated every `evaluate_every` steps and after the last.
        Raises UserError if a loss is not finite.
        """
        while self.step < last:
            self._advance()
            if self.step % evaluate_every == 0 or self.step == last:
                for learner in self.learners:
                    loss = evaluate(learner.model, self.share.validation, self.share.window)
                    learner.validation[self.step] = self.world.mean(loss)
            yield self.step

    def _advance(self) -> None:
        inputs, targets, fresh = self.share.training_window(self.step)
        # No learner always runs right after the same other one, whose data would be in the caches.
        first = self.step % len(self.learners)
        for learner in self.learners[first:] + self.learners[:first]:
            self._synchronize()
            start = perf_counter()
            loss, learner.state = training_step(
                learner.wrapped, learner.optimizer, inputs, targets, None if fresh else learner.state
            )
            self._synchronize()
            learner.seconds.append(perf_counter() - start)
            learner.losses.append(self.world.mean(loss.item()))
            if not math.isfinite(learner.losses[-1]):
                raise UserError(
                    f"the loss of {learner.name} is {learner.losses[-1]} at step {self.step + 1}: "
                    "try a smaller --learning-rate"
                )
        self.step += 1

    def _synchronize(self) -> None:
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)
