"""A gradient penalty, which differentiates a gradient: forward, backward with `create_graph=True`, backward again.

It is no suite: cuDNN has no second derivative, so that the baseline of the suites has no time. In its place stand what
a user would do without this library: `torch.nn.LSTM` with cuDNN switched off, where PyTorch differentiates its own
steps; and the reference equations, which are differentiated by autograd.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from lstm_triton_kernels.sizes import accumulator_dtype
from torch import Tensor, nn

from benchmarks import bench, timing
from benchmarks.check import ALLOWED, Reference, distances, double
from benchmarks.problem import Problem, make_problem
from benchmarks.providers import PROVIDERS, Model, ModuleModel
from benchmarks.suites import TRAINING, Case

CHECKED = 16
"""Steps over which the second gradients are compared with the reference in float64."""

SHAPES = (
    (128, 64, 128, "tf32", "standard"), (128, 16, 768, "bfloat16", "standard"), (128, 16, 768, "bfloat16", "coupled"),
    (64, 32, 256, "tf32", "coupled"),
)  # fmt: skip
"""T, B, H, dtype, variant."""


@dataclass(frozen=True)
class Row:
    """One way of a case; ms: of a call, median; speed: the reference's ms / its own; error: the largest, or words."""

    case: str
    way: str
    ms: float | None = None
    speed: float | None = None
    error: float | str = ""

    def __str__(self) -> str:
        shape = f"{self.case}: {self.way:27}"
        if self.ms is None:
            return f"{shape} {self.error}"
        speed = "" if self.speed is None else f"{self.speed:6.2f} times as fast as the reference, "
        return f"{shape} {self.ms:10.2f} ms, {speed}error {self.error:.1e}"


class WithoutCudnn(ModuleModel):
    """PyTorch's LSTM by its own steps."""

    @contextmanager
    def settings(self) -> Iterator[None]:
        before = torch.backends.cudnn.enabled
        torch.backends.cudnn.enabled = False
        try:
            yield
        finally:
            torch.backends.cudnn.enabled = before


def by_pytorch(problem: Problem) -> Model:
    """`torch.nn.LSTM`, the standard variant, without cuDNN."""
    case = problem.case
    if not case.spec.standard:
        raise NotImplementedError("has the standard variant alone")
    return WithoutCudnn(nn.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2), problem)


WAYS: dict[str, Callable[[Problem], Model]] = {
    "reference": Reference, "torch.nn.LSTM without cuDNN": by_pytorch,
    "lstm_triton": PROVIDERS["lstm_triton:auto"].build,
}  # fmt: skip
"""By name; the reference, with which the others are compared, comes first."""


def case_of(T: int, B: int, H: int, dtype: str, variant: str) -> Case:
    """Return one layer in training."""
    return Case("second", T, B, H, H, dtype, mode=TRAINING, variant=variant)


def penalty(model: Model, problem: Problem) -> dict[str, Tensor]:
    """Return the gradients of every weight of (||gradient by x|| - 1)^2, averaged over the rows."""
    x = problem.inputs[0]
    parameters = model.parameters()
    with model.settings():
        output = model.run(x)[0]
        (gradient,) = torch.autograd.grad(output, x, problem.grad_output, create_graph=True)
        wide = gradient.to(accumulator_dtype(gradient.dtype))
        value = (wide.square().sum((0, 2)).sqrt() - 1).square().mean()
        found = torch.autograd.grad(value, list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def error_of(build: Callable[[Problem], Model], case: Case, device: torch.device) -> float:
    """Return the largest error of the weights' second gradients over CHECKED steps.

    Raises RuntimeError where it is more than rounding.
    """
    problem = make_problem(replace(case, T=min(case.T, CHECKED)), device)
    exact = double(problem)
    errors = distances(penalty(build(problem), problem), penalty(Reference(exact), exact))
    name, error = max(errors.items(), key=lambda item: item[1])
    if not error <= ALLOWED[case.dtype]:
        raise RuntimeError(f"wrong: {name} is off by {error:.1e}")
    return error


def measure(case: Case, device: torch.device, seconds: float) -> Iterator[Row]:
    """Every way of a case, each after a comparison. Whatever goes wrong becomes a row that says so."""
    bench.set_precision(case.dtype)
    reference_ms = None
    for way, build in WAYS.items():
        row = Row(str(case), way)
        try:
            error = error_of(build, case, device)
            problem = make_problem(case, device)
            model = build(problem)
            timed = timing.Timed(lambda: None, partial(penalty, model, problem))
            ms = statistics.median(timing.in_turns([timed], device, seconds)[0])
            late = bench.timed_out(device)
            if late is not None:
                raise RuntimeError(late)
        except Exception as failure:
            yield replace(row, error=bench.in_words(failure))
            continue
        reference_ms = ms if way == "reference" else reference_ms
        yield replace(row, ms=ms, speed=None if reference_ms is None else reference_ms / ms, error=error)


def run(cases: Iterable[Case], device: torch.device, seconds: float, path: Path) -> Iterator[Row]:
    """Measure the cases, each row a line of JSON in the file when it is done."""
    for case in cases:
        for row in measure(case, device, seconds):
            with path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            yield row
