"""One row: build, check against the reference, then time beside the baseline. Runs inside the worker process."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

import lstm_triton
from benchmarks import timing
from benchmarks.check import Oracle, allowed
from benchmarks.problem import Problem, make_problem
from benchmarks.providers import Model, Provider, baseline_of
from benchmarks.suites import TRAINING, Case
from lstm_triton.dtypes import DTYPES

LONGEST_WORDS = 300


@dataclass
class Measurement:
    """What one row measured.

    - columns: of a results file (see `rows`): times and error, or an error in words
    - mean_rows: rows of the batch that a step computes on average (fewer than B where rows end early)
    - lost_device: the device answers no more in this process; stopped: it was not done in time
    """

    columns: dict[str, float | str | None] = field(default_factory=dict)
    mean_rows: float | None = None
    lost_device: bool = False
    stopped: bool = False

    @property
    def failure(self) -> str | None:
        """Return why nothing was timed; None if it was."""
        error = self.columns.get("error")
        return error if isinstance(error, str) else None


def failed(words: str, **flags: bool) -> Measurement:
    """Return the measurement of a row that has no time."""
    return Measurement({"error": words}, **flags)


class Bench:
    """Measures providers on one device; keeps the last case's problem and baseline for the next row."""

    def __init__(self, device: torch.device, baselines: Sequence[Provider], seconds: float) -> None:
        self.device, self.baselines, self.seconds = device, baselines, seconds
        self.prepared: dict[Case, Prepared] = {}
        """Of the case that is measured, and of the baseline's case, which is another for a variant."""

    def measure(self, provider: Provider, case: Case) -> Measurement:
        """Return one row. Whatever goes wrong becomes a row that says so."""
        found = self._measure(provider, case)
        found.columns["plan"] = provider.plan(case, self.device.type)
        return found

    def _measure(self, provider: Provider, case: Case) -> Measurement:
        other, theirs = baseline_of(case, self.device.type, self.baselines)
        for old in self.prepared.keys() - {case, theirs}:
            del self.prepared[old]
        try:
            own, baseline = self._prepare(case), self._prepare(theirs).baseline(other)
            if provider.name == other.name:
                found = own.timed_alone(baseline, self.seconds)
            else:
                call, error = own.checked(provider, baseline.error)
                found = own.timed(call, baseline.call, error, self.seconds)
            late = timed_out(self.device)
            return found if late is None else failed(late)
        except WrongResult as wrong:
            return failed(str(wrong))
        except Exception as error:  # what a provider raises is a result
            words = in_words(error)
        self.prepared.clear()
        free(self.device)
        if lost(self.device):
            return failed(words, lost_device=True)
        timed_out(self.device)  # the next row begins with nothing to complain of
        return failed(words)

    def _prepare(self, case: Case) -> Prepared:
        if case not in self.prepared:
            free(self.device)
            self.prepared[case] = Prepared(case, self.device)
        return self.prepared[case]


class WrongResult(Exception):
    """A provider does not compute the same function as the reference; the message says how far it is off."""


class Baseline(NamedTuple):
    """The baseline's call of a case and its error; or why it has none, and then others are timed without a ratio."""

    call: timing.Timed | None
    error: float | None
    failure: str = ""


class Prepared:
    """One case: the problem, what the reference says of it, and the baseline that others take turns with."""

    def __init__(self, case: Case, device: torch.device) -> None:
        set_precision(case.dtype)
        self.case, self.device = case, device
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.problem = make_problem(case, device, cache)
        self.oracle = Oracle(self.problem)
        self._baseline: Baseline | None = None

    def baseline(self, provider: Provider) -> Baseline:
        """Return the baseline of this case, built once."""
        if self._baseline is None:
            try:
                self._baseline = Baseline(*self.checked(provider, None))
            except Exception as error:
                if lost(self.device):
                    raise
                self._baseline = Baseline(None, None, in_words(error))
        return self._baseline

    def checked(self, provider: Provider, baseline_error: float | None) -> tuple[timing.Timed, float]:
        """Return a provider's call and its largest error. Raises WrongResult if that is not the same function."""
        short_model, model = provider.build(self.oracle.problem), provider.build(self.problem)
        errors = self.oracle.errors(short_model, model)
        worst = max(errors, key=lambda name: errors[name])
        bound = allowed(self.case.dtype, baseline_error)
        if not errors[worst] <= bound:
            raise WrongResult(f"wrong: error {errors[worst]:.1e} of {worst}, allowed {bound:.1e}")
        return timed_call(model, self.problem), errors[worst]

    def timed(
        self, own: timing.Timed, baseline: timing.Timed | None, error: float | None, seconds: float
    ) -> Measurement:
        """Return the row of a call, timed in turns with the baseline if there is one."""
        times = timing.in_turns([own] if baseline is None else [own, baseline], self.device, seconds)
        columns: dict[str, float | str | None] = {**timing.columns(*times), "error": error}
        columns["cpu_us_per_call"] = timing.host_us(own, self.device, times[0])
        columns["peak_mib"] = timing.peak_mib(own, self.device)
        columns["ms_p99"] = timing.p99(times[0]) if own.waited_for else None
        lengths = self.problem.lengths
        return Measurement(columns, float(lengths.sum()) / self.case.T if lengths is not None else float(self.case.B))

    def timed_alone(self, baseline: Baseline, seconds: float) -> Measurement:
        """Return the baseline's own row."""
        if baseline.call is None:
            return failed(baseline.failure)
        found = self.timed(baseline.call, None, baseline.error, seconds)
        found.columns |= dict(baseline_ms=found.columns["ms_median"], baseline_ratio=1.0)
        return found


def timed_call(model: Model, problem: Problem) -> timing.Timed:
    """Return the call that is timed: forward without gradients, or forward and backward from the output's gradient.

    Every call takes the next set of inputs, of a stream the next chunk, which is waited for; gradients are None when it
    starts.
    """
    inputs = itertools.cycle(problem.inputs)
    leaves = list(model.parameters().values())
    x: Tensor = problem.inputs[0]

    def before() -> None:
        nonlocal x
        x = next(inputs)
        for leaf in (x, *leaves):
            leaf.grad = None

    def forward() -> None:
        with torch.inference_mode(), model.settings():
            model.run(x)

    def training() -> None:
        with model.settings():
            torch.autograd.backward(model.run(x)[0], problem.grad_output)

    return timing.Timed(before, training if problem.case.mode == TRAINING else forward, problem.case.stream)


def set_precision(dtype: str) -> None:
    """Set PyTorch's switches for float32 matmuls and cuDNN's RNNs: TF32 for "tf32", else IEEE."""
    precision = DTYPES[dtype][1]
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


def in_words(error: Exception) -> str:
    """Return what went wrong, on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = text if len(text) <= LONGEST_WORDS else text[: LONGEST_WORDS - 1] + "…"
    if isinstance(error, WrongResult):
        return text
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"failed: {type(error).__name__}"
    return f"{kind}: {text}"


def timed_out(device: torch.device) -> str | None:
    """Wait for the device; return words if a persistent launch timed out since this was last asked.

    What such a launch computed, and how fast, is void.
    """
    timing.synchronize(device)
    try:
        lstm_triton.check_launches()
    except RuntimeError as error:
        return in_words(error)
    return None


def free(device: torch.device) -> None:
    """Give back the memory of what is no longer referenced."""
    gc.collect()
    if device.type == "cuda" and not lost(device):
        torch.cuda.empty_cache()


def lost(device: torch.device) -> bool:
    """Return whether the device answers no more in this process (after an illegal access, say)."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return True
    return False
