"""A stack by `lstm_triton.stack`, in the order of its schedule or in any other that its lanes and waits allow."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lstm_triton_kernels.schedule import Schedule, Task
from lstm_triton_kernels.spec import STANDARD
from torch import Tensor

import lstm_triton
from lstm_triton import LSTMSpec, stack
from lstm_triton.functional import States
from lstm_triton.overlap import Overlap


@dataclass(frozen=True)
class StackCase:
    """A stack, and how it is overlapped; gradients: of which results (output, h_n, c_n), None: in inference."""

    lanes: int
    chunk: int
    spec: LSTMSpec = STANDARD
    L: int = 3
    T: int = 7
    B: int = 3
    H: int = 6
    I: int = 5  # noqa: E741
    bias: bool = True
    resets: bool = False
    dropout: float = 0.0
    gradients: tuple[bool, bool, bool] | None = (True, True, True)
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        flags = [f"{self.lanes}-lanes-of-{self.chunk}", self.spec.name, f"L{self.L}-T{self.T}-B{self.B}-H{self.H}"]
        flags += [name for name in ("resets", "dropout") if getattr(self, name)] + ["no-bias"] * (not self.bias)
        if self.gradients is None:
            flags.append("inference")
        elif not all(self.gradients):
            flags.append("gradients-" + "".join(str(int(given)) for given in self.gradients))
        return "-".join(flags)

    @property
    def options(self) -> dict[str, Any]:
        """Of `lstm_triton.functional.lstm`."""
        return dict(
            num_layers=self.L, bias=self.bias, dropout=self.dropout, training=True, coupled=self.spec.coupled,
            peephole=self.spec.peephole, output_peephole=self.spec.output_peephole or "previous",
        )  # fmt: skip


@dataclass
class Inputs:
    """Of a stack: (T, B, I), (L, B, H), (L, B, H), the flat weights, (T, B) or None; and gradients of the results."""

    x: Tensor
    h_0: Tensor
    c_0: Tensor
    weights: list[Tensor]
    resets: Tensor | None
    gradients: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.x, self.h_0, self.c_0, *self.weights]


def inputs_of(case: StackCase, seed: int = 0) -> Inputs:
    """Random tensors in the case's type."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return drawn.to(case.device, case.dtype).requires_grad_(case.gradients is not None)

    L, T, B, H = case.L, case.T, case.B, case.H
    shapes = [s for n in range(L) for s in case.spec.parameter_shapes(H if n else case.I, H, case.bias).values()]
    weights = [normal(*shape, scale=H**-0.5) for shape in shapes]
    resets = (torch.rand(T, B, generator=generator) < 0.3).to(case.device) if case.resets else None
    gradients = [normal(*size).detach() for size in ((T, B, H), (L, B, H), (L, B, H))]
    return Inputs(normal(T, B, case.I), normal(L, B, H), normal(L, B, H), weights, resets, gradients)


def names(case: StackCase) -> list[str]:
    """Of all results and gradients, in order."""
    results = ["output", "h_n", "c_n"]
    if case.gradients is None:
        return results
    parameters = [f"{name}_l{n}" for n in range(case.L) for name in case.spec.parameter_names(case.bias)]
    return [*results, *(f"grad {name}" for name in ("x", "h_0", "c_0", *parameters))]


def both_passes(case: StackCase, inputs: Inputs, function: Callable[..., tuple[Tensor, States]]) -> dict[str, Tensor]:
    """All results and gradients of function(x, hx, weights, resets) by name."""
    output, (h_n, c_n) = function(inputs.x, (inputs.h_0, inputs.c_0), inputs.weights, inputs.resets)
    results = [output, h_n, c_n]
    found = [result.detach() for result in results]
    if case.gradients is not None:
        given = [n for n, wanted in enumerate(case.gradients) if wanted]
        of_results, grads = [results[n] for n in given], [inputs.gradients[n] for n in given]
        found += torch.autograd.grad(of_results, inputs.leaves(), grads, materialize_grads=True, allow_unused=True)
    return dict(zip(names(case), found, strict=True))


def overlapped(case: StackCase, inputs: Inputs, seed: int = 5) -> dict[str, Tensor]:
    """By the persistent kernels, as the case says; seed: of the dropout."""

    def function(x: Tensor, hx: States, weights: list[Tensor], resets: Tensor | None) -> tuple[Tensor, States]:
        options = case.options | dict(strategy="persistent", resets=resets)
        with stack.overlapping(Overlap(case.lanes, case.chunk)):
            return lstm_triton.functional.lstm(x, hx, weights, **options)

    torch.manual_seed(seed)
    return both_passes(case, inputs, function)


def by_layer(case: StackCase, inputs: Inputs, seed: int = 5, **options: Any) -> dict[str, Tensor]:
    """By `lstm_triton.functional.lstm` as it is without all this."""

    def function(x: Tensor, hx: States, weights: list[Tensor], resets: Tensor | None) -> tuple[Tensor, States]:
        return lstm_triton.functional.lstm(x, hx, weights, **(case.options | options), resets=resets)

    torch.manual_seed(seed)
    return both_passes(case, inputs, function)


@contextmanager
def one_layer_after_another() -> Iterator[None]:
    """Inside, a schedule has all chunks of a layer before those of the next, on one lane."""

    def tasks(self: Schedule) -> Iterator[Task]:
        yield from (Task(layer, chunk, 0) for layer in range(self.layers) for chunk in range(self.chunks))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "tasks", tasks)
        yield


class Queues:
    """Lanes as streams are: each does what it was given in turn, and waits where it was told to; in any order else."""

    def __init__(self, rng: random.Random, waits: bool) -> None:
        self.rng, self.waits = rng, waits
        self.queues: dict[int, list[tuple[str, Any]]] = {}
        self.done: set[tuple[int, int]] = set()
        self.launched: set[tuple[int, int]] = set()
        self.lane = -1

    @contextmanager
    def on(self, lane: int) -> Iterator[None]:
        self.lane = lane
        yield
        self.lane = -1

    def put(self, work: Callable[[], None]) -> None:
        self.queues.setdefault(self.lane, []).append(("work", work))

    def wait(self, lane: int, layer: int, chunk: int) -> None:
        if (layer, chunk) in self.launched:
            self.queues.setdefault(lane, []).append(("wait", (layer, chunk)))

    def finish(self, task: Task) -> None:
        self.launched.add((task.layer, task.chunk))
        self.queues[task.lane].append(("done", (task.layer, task.chunk)))

    def join(self) -> None:
        """Do everything, the next step of a random lane that need not wait at a time."""
        while ready := [q for q in self.queues.values() if q and (q[0][0] != "wait" or q[0][1] in self.done)]:
            kind, what = self.rng.choice(ready).pop(0)
            if kind == "work":
                what()
            elif kind == "done":
                self.done.add(what)
        assert not any(self.queues.values()), "lanes wait for each other"

    def free(self) -> None:
        """Forget the waits."""
        if not self.waits:
            self.queues = {lane: [step for step in q if step[0] != "wait"] for lane, q in self.queues.items()}


@contextmanager
def in_any_order(seed: int, waits: bool = True) -> Iterator[None]:
    """Inside, tasks run in a random one of the orders in which streams may run them; without the waits, in any."""
    rng = random.Random(seed)
    follow = stack.follow

    def deferred(schedule: Schedule, device: torch.device, product: Any, steps: Any) -> None:
        queues = Queues(rng, waits)
        found: dict[Task, Any] = {}

        def join() -> None:
            queues.free()
            Queues.join(queues)

        queues.join = join  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stack, "NoLanes", lambda: queues)
            follow(
                schedule,
                device,
                lambda task: queues.put(lambda: found.__setitem__(task, product(task))),
                lambda task, _: queues.put(lambda: steps(task, found[task])),
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack, "follow", deferred)
        yield
