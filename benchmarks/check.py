"""Is a provider's result right? Its distance from the reference in float64, on the same numbers.

Two looks, because the reference needs a launch for every operation of every step: all rows over the first steps, with
every gradient; and, where T is longer, the output of a few rows over all of it. A stream is computed chunk by chunk,
and compared with one call of the reference over all of them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from lstm_triton_kernels.regularize import drawn
from torch import Tensor

from benchmarks.problem import Problem, layers_of, make_problem
from benchmarks.providers import Model, leaves
from benchmarks.suites import FORWARD, TRAINING
from lstm_triton import reference, regularization

STEPS = 64
"""Steps over which all rows and gradients are compared."""

ROWS = 2
"""Rows of which the output is compared over all steps."""

ALLOWED = {"float32": 1e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}
"""Largest error of the baseline. Only a wrong function is further off; every row names its error."""

MASKS = 0
"""The seed of the masks of regularised steps."""

TIMES_BASELINE = 4.0
FLOOR = {"float32": 1e-5, "tf32": 2e-3, "float16": 3e-3, "bfloat16": 2e-2}
"""A provider may err by TIMES_BASELINE times what the baseline errs by, or by the FLOOR where that is more."""


def results(model: Model, problem: Problem) -> dict[str, Tensor]:
    """Return by name the outputs on the first input and, in training, the gradients of x and every weight.

    Of a stream the output on all inputs, one after the other, from the zero states of a new model. Masks are drawn as
    the reference draws them.
    """
    torch.manual_seed(MASKS)
    if problem.case.stream:
        with torch.inference_mode(), model.settings():
            return {"output": torch.cat([model.run(chunk)[0] for chunk in problem.inputs])}
    x = problem.inputs[0]
    names = ("h", "c") if problem.case.cell else ("output", "h_n", "c_n")
    if problem.case.mode != TRAINING:
        with torch.inference_mode(), model.settings():
            return dict(zip(names, model.run(x), strict=True))
    for leaf in (x, *model.parameters().values()):
        leaf.grad = None
    with model.settings():
        outputs = model.run(x)
        torch.autograd.backward(outputs[0], problem.grad_output)
    found = dict(zip(names, (output.detach() for output in outputs), strict=True))
    for name, gradient in {"x": x.grad, **model.gradients()}.items():
        if gradient is None:
            raise RuntimeError(f"no gradient of {name}")
        found[f"grad {name}"] = gradient
    return found


def double(problem: Problem) -> Problem:
    """Return the problem with the same numbers in float64, its first set of inputs alone, of a stream all as one."""
    x = torch.cat(problem.inputs) if problem.case.stream else problem.inputs[0]
    x = x.detach().double().requires_grad_(x.requires_grad)
    weights = {name: weight.double() for name, weight in problem.weights.items()}
    return replace(problem, weights=weights, inputs=[x], grad_output=problem.grad_output.double())


class Reference(Model):
    """The library's reference on a problem in float64, with its lengths, resets and masks if there are any."""

    def __init__(self, problem: Problem) -> None:
        self.case, self.lengths, self.resets = problem.case, problem.lengths, problem.resets
        self.weights = leaves(problem)
        self.layers = layers_of(self.case, self.weights)

    def run(self, x: Tensor) -> tuple[Tensor, ...]:
        case = self.case
        h_0, c_0 = (x.new_zeros(case.L * case.D, x.shape[-2], size) for size in (case.hidden, case.H))
        if case.cell:
            return reference.cell(x, h_0[0], c_0[0], self.layers[0][0], case.spec)
        lengths = self.lengths.to(x.device) if self.lengths is not None else None
        rules, T, B = case.rules, x.shape[0], x.shape[1]
        seeds = [regularization.seed_for(rules, case.mode == TRAINING, x.device) for _ in range(case.L)]
        masks = [drawn(rules, seed, case.D, T, B, case.H, case.hidden, x.dtype) for seed in seeds]
        *found, _ = reference.lstm(x, h_0, c_0, self.layers, case.spec, lengths, self.resets, masks)
        return tuple(found)

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


class Oracle:
    """What the reference says of a problem, kept for all the providers that are compared on it."""

    def __init__(self, whole: Problem) -> None:
        case = whole.case
        self.whole = whole
        self.problem = make_problem(replace(case, T=min(case.T, STEPS)), whole.device)
        doubled = double(self.problem)
        self.expected = results(Reference(doubled), doubled)
        self.output: Tensor | None = None
        if case.T > STEPS:
            x = whole.inputs[0].detach()[:, :ROWS]
            lengths = whole.lengths[:ROWS] if whole.lengths is not None else None
            resets = whole.resets[:, :ROWS] if whole.resets is not None else None
            alike = replace(case, B=x.shape[1], mode=case.mode if case.options else FORWARD)
            rows = replace(whole, case=alike, inputs=[x], lengths=lengths, resets=resets)
            with torch.inference_mode():
                rows = double(rows)
                torch.manual_seed(MASKS)
                self.output = Reference(rows).run(rows.inputs[0])[0]

    def errors(self, short_model: Model, whole_model: Model) -> dict[str, float]:
        """Return ||result - reference|| / ||reference|| by name, of models of `self.problem` and of `self.whole`.

        Infinite where a result is not finite.
        """
        found = distances(results(short_model, self.problem), self.expected)
        if self.output is not None:
            name = f"output of {ROWS} rows over all steps"
            torch.manual_seed(MASKS)
            with torch.inference_mode(), whole_model.settings():
                output = whole_model.run(self.whole.inputs[0])[0][:, :ROWS]
            found |= distances({name: output}, {name: self.output})
        return found


def distances(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """Return the relative distance in float64 by name. Raises RuntimeError where a shape or a name is another."""
    if actual.keys() != wanted.keys():
        raise RuntimeError(f"returns {', '.join(actual)} instead of {', '.join(wanted)}")
    found = {}
    for name, value in wanted.items():
        if actual[name].shape != value.shape:
            raise RuntimeError(f"{name} has shape {tuple(actual[name].shape)} instead of {tuple(value.shape)}")
        error = float((actual[name].detach().double() - value).norm() / value.norm().clamp_min(1e-30))
        found[name] = error if math.isfinite(error) else math.inf
    return found


def allowed(dtype: str, baseline_error: float | None) -> float:
    """Return the error up to which a result is the same function; `baseline_error` None: of the baseline itself."""
    if baseline_error is None:
        return ALLOWED[dtype]
    return max(TIMES_BASELINE * baseline_error, FLOOR[dtype])
