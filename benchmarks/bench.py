"""One row: build, check against the reference, then time beside the baseline. Runs inside the worker process."""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import lstm_triton
from benchmarks import timing
from benchmarks.check import Oracle, allowed
from benchmarks.problem import Problem, make_problem
from benchmarks.providers import Model, Provider, baseline_of
from benchmarks.suites import TRAINING, Case

LONGEST_WORDS = 300


@dataclass(frozen=True)
class Measurement:
    """What one row measured; `failure` in words instead of times where there are none.

    - times: of the call and of its baseline; cpu_us, peak_mib, error: as in `rows.Row`
    - rows: rows of the batch that a step computes on average (fewer than B where rows end early)
    - kernels: names of the kernels that the baseline launched
    - plan: as in `rows.Row`
    - lost_device: the device answers no more in this process; stopped: it was not done in time
    """

    failure: str | None = None
    times: timing.Times | None = None
    cpu_us: float | None = None
    peak_mib: float | None = None
    error: float | None = None
    rows: float | None = None
    kernels: tuple[str, ...] = ()
    plan: str = ""
    lost_device: bool = False
    stopped: bool = False


class Bench:
    """Measures providers on one device; keeps the last case's problem and baseline for the next row."""

    def __init__(self, device: torch.device, baselines: Sequence[Provider], seconds: float) -> None:
        self.device, self.baselines, self.seconds = device, baselines, seconds
        self.stands: dict[Case, Stand] = {}
        """Of the case that is measured, and of the baseline's case, which is another for a variant."""

    def measure(self, provider: Provider, case: Case) -> Measurement:
        """One row. Whatever goes wrong becomes a Measurement that says so."""
        found = self._measure(provider, case)
        return replace(found, plan=provider.plan(case, self.device.type))

    def _measure(self, provider: Provider, case: Case) -> Measurement:
        other, theirs = baseline_of(case, self.device.type, self.baselines)
        for old in self.stands.keys() - {case, theirs}:
            del self.stands[old]
        try:
            own = self._stand(case)
            baseline = self._stand(theirs).baseline(other)
            if provider.name == other.name:
                return baseline.measurement(self.seconds)
            found = own.measure(provider, baseline, self.seconds)
            timed_out = _timed_out(self.device)
            return found if timed_out is None else Measurement(failure=timed_out)
        except Exception as error:  # what a provider raises is a result
            failure = _words(error)
        self.stands.clear()
        _free(self.device)
        if _lost(self.device):
            return Measurement(failure=failure, lost_device=True)
        _timed_out(self.device)  # the next row begins with nothing to complain of
        return Measurement(failure=failure)

    def _stand(self, case: Case) -> Stand:
        if case not in self.stands:
            _free(self.device)
            self.stands[case] = Stand(case, self.device)
        return self.stands[case]


class Baseline:
    """The baseline's model of a case, or why it has none."""

    def __init__(self, provider: Provider, stand: Stand) -> None:
        self.stand = stand
        self.error: float | None = None
        self.timed: timing.Timed | None = None
        self.failure: str | None = None
        try:
            self.short_model, model = provider.build(stand.oracle.problem), provider.build(stand.problem)
            self.error, self.failure = stand.verdict(self.short_model, model, None)
            if self.failure is None:
                self.timed = timed_call(model, stand.problem)
        except Exception as error:
            if _lost(stand.device):
                raise
            self.failure = _words(error)  # and the others are measured without a ratio

    def measurement(self, seconds: float) -> Measurement:
        """The baseline's own row."""
        if self.timed is None:
            return Measurement(failure=self.failure)
        (own,) = timing.in_turns([self.timed], self.stand.device, seconds)
        short_call = timed_call(self.short_model, self.stand.oracle.problem)
        kernels = timing.kernel_names(short_call.call, self.stand.device)
        alone = timing.times(own)
        times = replace(alone, baseline_ms=alone.ms[1])
        return replace(self.stand.figures(self.timed, own, times, self.error), kernels=tuple(kernels))


class Stand:
    """One case: the problem, and what the reference says of it."""

    def __init__(self, case: Case, device: torch.device) -> None:
        set_precision(case.dtype)
        self.case, self.device = case, device
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self.problem = make_problem(case, device, cache)
        self.oracle = Oracle(self.problem)
        self._baseline: Baseline | None = None

    def baseline(self, provider: Provider) -> Baseline:
        """The baseline of this case, built once."""
        if self._baseline is None:
            self._baseline = Baseline(provider, self)
        return self._baseline

    def verdict(self, short_model: Model, model: Model, baseline_error: float | None) -> tuple[float, str | None]:
        """The largest error, and words if it is too large for the same function."""
        errors = self.oracle.errors(short_model, model)
        worst = max(errors, key=lambda name: errors[name])
        bound = allowed(self.case.dtype, baseline_error)
        wrong = f"wrong: error {errors[worst]:.1e} of {worst}, allowed {bound:.1e}"
        return errors[worst], None if errors[worst] <= bound else wrong

    def measure(self, provider: Provider, baseline: Baseline, seconds: float) -> Measurement:
        """A provider's row: checked, then timed in turns with the baseline."""
        short_model, model = provider.build(self.oracle.problem), provider.build(self.problem)
        error, wrong = self.verdict(short_model, model, baseline.error)
        if wrong is not None:
            return Measurement(failure=wrong)
        timed = timed_call(model, self.problem)
        if baseline.timed is None:
            (own,) = timing.in_turns([timed], self.device, seconds)
            return self.figures(timed, own, timing.times(own), error)
        own, theirs = timing.in_turns([timed, baseline.timed], self.device, seconds)
        return self.figures(timed, own, timing.times(own, theirs), error)

    def figures(
        self, timed: timing.Timed, milliseconds: list[float], times: timing.Times, error: float | None
    ) -> Measurement:
        """The row; milliseconds are those of every call."""
        lengths = self.problem.lengths
        return Measurement(
            times=times,
            cpu_us=timing.host_us(timed, self.device, milliseconds),
            peak_mib=timing.peak_mib(timed, self.device),
            error=error,
            rows=float(lengths.sum()) / self.case.T if lengths is not None else float(self.case.B),
        )


def timed_call(model: Model, problem: Problem) -> timing.Timed:
    """The call that is timed: forward without gradients, or forward and backward from the gradient of the output.

    Every call takes the next set of inputs; gradients are None when it starts.
    """
    inputs = itertools.cycle(problem.inputs)
    leaves = list(model.parameters().values())
    x: Tensor = problem.inputs[0]

    def before() -> None:
        nonlocal x
        x = next(inputs)
        x.grad = None
        for leaf in leaves:
            leaf.grad = None

    def forward() -> None:
        with torch.inference_mode(), model.settings():
            model.run(x)

    def training() -> None:
        with model.settings():
            torch.autograd.backward(model.run(x)[0], problem.grad_output)

    return timing.Timed(before, training if problem.case.mode == TRAINING else forward)


def set_precision(dtype: str) -> None:
    """PyTorch's switches for float32 matmuls and cuDNN's RNNs: TF32 for "tf32", else IEEE."""
    precision = "tf32" if dtype == "tf32" else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.rnn.fp32_precision = precision  # type: ignore[attr-defined]


def _words(error: Exception) -> str:
    """What went wrong, on one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = text if len(text) <= LONGEST_WORDS else text[: LONGEST_WORDS - 1] + "…"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of memory: {text}"
    return f"failed: {type(error).__name__}: {text}"


def _timed_out(device: torch.device) -> str | None:
    """Words if a persistent launch timed out since this was last asked: what it computed, and how fast, is void.

    Waits for the device.
    """
    timing.synchronize(device)
    try:
        lstm_triton.check_launches()
    except RuntimeError as error:
        return _words(error)
    return None


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda" and not _lost(device):
        torch.cuda.empty_cache()


def _lost(device: torch.device) -> bool:
    """Whether the device answers no more in this process (after an illegal access, say)."""
    try:
        timing.synchronize(device)
    except RuntimeError:
        return True
    return False
