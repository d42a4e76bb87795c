"""What the tests on a GPU share: why they cannot run here, the types, how near is near enough, one pass made ready."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.sizes import Layer, ceil_div, matmul_precision
from torch import Tensor

import lstm_triton
from lstm_triton import LSTMSpec, routing
from tests.support.parity import Case, call_reference, expected_results, laid_out, random_inputs, results
from tests.support.rounding import rounded_results


def why_no_gpu() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return routing.why_not_triton(torch.device("cuda"), torch.float32)


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=f"needs a GPU: {why_no_gpu()}")]

TYPES = {"float32 tf32": torch.float32, "float32 ieee": torch.float32, "float16": torch.float16,
         "bfloat16": torch.bfloat16, "float64": torch.float64}  # fmt: skip
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float64: 1e-12}
"""No bound is below this: where the others happen to be exact (a single step, say), one rounding of ours is allowed."""

TIMES_CUDNN = 1.5
"""An output or gradient may be so many times as far from the reference as cuDNN's own, or another's: see `bounds`."""

ENOUGH, MOST_SEEDS = 512, 64
"""Elements whose errors are compared, and of how many inputs at most: the ratio of two errors of a few is chance."""

LIKE = {"weight_ch": "weight_hh", "states": "c_n"}
"""What cuDNN does not have, and what it has that is computed alike. Stands in for it in half types only: see `bounds`.

The gradients of both weights are sums of the same gradients of the gates. In half types these, and the gates, have been
stored in the type, which rounding the operands alone does not know of.
"""


def cudnn(case: Case, x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`torch.nn.LSTM` (for a cell: one step of it) on the case's tensors."""
    x = laid_out(case, x)
    if case.cell:
        x, h_0, c_0 = x[None], h_0[None], c_0[None]
    output, h_n, c_n = torch._VF.lstm(
        x, (h_0, c_0), list(weights), case.bias, case.L, 0.0, True, case.bidirectional, False
    )
    return (h_n[0], c_n[0]) if case.cell else (output, h_n, c_n)


def bounds(case: Case) -> dict[str, float]:
    """What each output and gradient may err by: TIMES_CUDNN times the largest error of those who compute it otherwise.

    These are, at the case's type and sizes:

    - cuDNN's `torch.nn.LSTM`, the standard variant without lengths and resets; what it does not have has the other
      two, but in half types, where PyTorch's operators are no measure, the error of what it has LIKE it
    - rounding alone (`rounding.rounded_results`), of the case's own variant with its lengths and resets; of gradients
      in half types also with the gates rounded, which are stored in the type between the passes
    - for variants that cuDNN does not have, in float32, PyTorch's own operators: the reference on the case's device
      with PyTorch's switches as they are

    Rounding alone does not loosen the tolerance, for it knows nothing of our kernels: whoever rounds operands as the
    type demands, and errs in nothing else, errs by so much. It matters where cuDNN's error says nothing: cuDNN leaves
    TF32 alone where sizes are not multiples of 4, though the switch asks for it, and the products of full peepholes
    round c as well. In float32 "ieee" and in float64 it allows next to nothing.
    """
    case = replace(case, strategy="auto")
    precision, seeds = matmul_precision(), seeds_of(case)
    standard = replace(case, spec=LSTMSpec(), lengths=False, resets=False, states=False)
    others = [_errors_of_rounding(case, precision, seeds), _errors_of_cudnn(standard, precision, seeds)]
    if case.dtype == torch.float32 and not case.spec.standard:
        others.append(_errors_of_operators(case, precision, seeds))
    assert all(math.isfinite(error) for errors in others for error in errors.values()), f"{case}: {others}"
    if case.dtype in (torch.float16, torch.bfloat16):
        stored = _errors_of_rounding(case, precision, seeds, stored_gates=True)
        others.append({name: error for name, error in stored.items() if name.startswith("grad")})
        others.append({name: others[1].get(_like(name), 0.0) for name in others[0]})
    largest = {name: max(errors.get(name, 0.0) for errors in others) for name in others[0]}
    return {name: max(TIMES_CUDNN * error, floor(case, name)) for name, error in largest.items()}


def floor(case: Case, name: str) -> float:
    """What is allowed in any case; of the gradient of a parameter in float32 what a sum of T·B terms in a row rounds.

    We take the sum over all steps and rows in one product, cuDNN and autograd step by step: each rounds less often.
    """
    if case.dtype == torch.float32 and name.startswith(("grad weight", "grad bias")):
        return max(FLOOR[case.dtype], 2.0**-24 * math.sqrt(case.T * case.B))
    return FLOOR[case.dtype]


def _like(name: str) -> str:
    """Of an output or gradient, whether or not cuDNN has it, the one most like it that it has."""
    for ours, of_cudnn in LIKE.items():
        name = name.replace(ours, of_cudnn)
    return name


@functools.cache
def _errors_of_cudnn(case: Case, precision: str, seeds: int) -> dict[str, float]:
    """By name; precision: of float32 products, as PyTorch's switches are set."""
    return pooled_errors(case, lambda case, inputs: results(case, inputs, cudnn), seeds)


@functools.cache
def _errors_of_rounding(case: Case, precision: str, seeds: int, stored_gates: bool = False) -> dict[str, float]:
    return pooled_errors(case, lambda case, inputs: rounded_results(case, inputs, precision, stored_gates), seeds)


@functools.cache
def _errors_of_operators(case: Case, precision: str, seeds: int) -> dict[str, float]:
    return pooled_errors(case, lambda case, inputs: results(case, inputs, call_reference), seeds)


def seeds_of(case: Case) -> int:
    """Of how many seeds the inputs are pooled, for the smallest result to have ENOUGH elements: 1 to MOST_SEEDS."""
    sizes = [result.numel() for result in known(replace(case, strategy="auto"), 0)[1].values()]
    return min(MOST_SEEDS, ceil_div(ENOUGH, min(size for size in sizes if size)))


@functools.lru_cache(maxsize=MOST_SEEDS)
def known(case: Case, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The inputs of this seed, and what they give; kept, for several are compared with it one after the other."""
    inputs = random_inputs(case, seed)
    return inputs, {name: result.detach() for name, result in expected_results(case, inputs).items()}


def pooled_errors(
    case: Case, compute: Callable[[Case, dict[str, Tensor]], dict[str, Tensor]], seeds: int
) -> dict[str, float]:
    """The errors, by name, of what `compute` makes of the case and its inputs, `pooled` over so many seeds."""
    of_seed = (known(replace(case, strategy="auto"), seed) for seed in range(seeds))
    return pooled((compute(case, inputs), expected) for inputs, expected in of_seed)


def pooled(pairs: Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]]) -> dict[str, float]:
    """The root of sum ||actual - expected||^2 / sum ||expected||^2 over all pairs, by name; 0 for empty tensors."""
    distances: dict[str, float] = {}
    sizes: dict[str, float] = {}
    for actual, expected in pairs:
        assert actual.keys() == expected.keys()
        for name, wanted in expected.items():
            distance = (actual[name].detach().double() - wanted).norm()
            distances[name] = distances.get(name, 0.0) + float(distance) ** 2
            sizes[name] = sizes.get(name, 0.0) + float(wanted.norm()) ** 2
    return {name: math.sqrt(distances[name]) / max(math.sqrt(sizes[name]), 1e-30) for name in sizes}


def assert_as_near_as_cudnn(case: Case, function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Every output and gradient within its bound, errors pooled as those that the bounds are made of."""
    allowed = bounds(case)
    found = pooled_errors(case, lambda case, inputs: results(case, inputs, function), seeds_of(case))
    wrong = {name: (error, allowed[name]) for name, error in found.items() if not error <= allowed[name]}
    assert not wrong, f"{case}: (error, allowed) {wrong}"


def layer_of(case: Case, precision: str) -> Layer:
    """The sizes of each layer of the case, in training; precision as in TYPES."""
    float32 = "tf32" if precision.endswith("tf32") else "ieee"
    return Layer(
        case.spec, case.T, case.B, case.H, case.D, case.dtype, float32, P=case.proj_size, training=True,
        ragged=case.lengths or case.resets,
    )  # fmt: skip


def strategies(case: Case, precision: str) -> tuple[str, ...]:
    """What is worth testing of "stepwise" and "auto": both where `auto` is another thing, on an H100."""
    if case.cell:
        return ("stepwise",)
    chosen = routing.kernels("auto", layer_of(case, precision), GPUS["h100"])
    return ("stepwise", "auto") if chosen.name == "persistent" else ("stepwise",)


class Pass:
    """Forward and backward on tensors made once: nothing comes from the host when it is called.

    Called, it returns every output and gradient by name.
    """

    def __init__(self, case: Case, function: Callable[..., tuple[Tensor, ...]], seed: int = 0) -> None:
        self.case, self.function = case, function
        self.inputs = random_inputs(case, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        shapes = (
            (case.T, case.B, case.D * case.P),
            (case.D * case.L, case.B, case.P),
            (case.D * case.L, case.B, case.H),
        )
        self.gradients = [
            torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device, case.dtype) for shape in shapes
        ]

    def __call__(self) -> dict[str, Tensor]:
        outputs = self.function(self.case, *self.inputs.values())
        found = torch.autograd.grad(outputs, list(self.inputs.values()), self.gradients)
        named = dict(zip(("output", "h_n", "c_n"), (output.detach() for output in outputs), strict=True))
        return named | {f"grad {name}": grad for name, grad in zip(self.inputs, found, strict=True)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit for bit."""
    other = [name for name in expected if not torch.equal(actual[name].cpu(), expected[name].cpu())]
    assert actual.keys() == expected.keys() and not other, f"not the same: {', '.join(other)}"


def finish(device: torch.device | str = "cuda") -> None:
    """Wait for the device; raises RuntimeError if a launch on it timed out."""
    torch.cuda.synchronize(device)
    lstm_triton.check_launches()
