"""What the tests on a GPU share: why they cannot run here, the types, how near is near enough, one pass made ready."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.plan import matmul_precision
from torch import Tensor

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, dispatch, selection
from tests.support.parity import Case, errors, expected_results, laid_out, random_inputs, results


def why_no_gpu() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return dispatch.why_not_triton(torch.device("cuda"), torch.float32)


NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=f"needs a GPU: {why_no_gpu()}")]

TYPES = {"float32 tf32": torch.float32, "float32 ieee": torch.float32, "float16": torch.float16,
         "bfloat16": torch.bfloat16, "float64": torch.float64}  # fmt: skip
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float64: 1e-12}
"""No bound is below this: where cuDNN happens to be exact (a single step, say), one rounding of ours is allowed."""

TIMES_CUDNN = 1.5
"""An output or gradient may be so many times as far from the reference as cuDNN's own."""

SERVED = [spec for spec in VARIANTS if not (spec.full and spec.output_current)]
"""The variants that have persistent kernels."""


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
    """TIMES_CUDNN times cuDNN's own error, by output and gradient, of the standard variant at this type and shape."""
    found = _errors_of_cudnn(
        replace(case, spec=LSTMSpec(), strategy="auto", lengths=False, resets=False, states=False), matmul_precision()
    )
    return {name: max(TIMES_CUDNN * error, FLOOR[case.dtype]) for name, error in found.items()}


@functools.cache
def _errors_of_cudnn(case: Case, precision: str) -> dict[str, float]:
    """By name; precision: of float32 products, as PyTorch's switches are set."""
    inputs = random_inputs(case)
    return errors(results(case, inputs, cudnn), expected_results(case, inputs))


def assert_as_near_as_cudnn(case: Case, function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Every output and gradient within the bounds; what the standard variant lacks, within the largest of them."""
    allowed = bounds(case)
    largest = max(allowed.values())
    inputs = random_inputs(case)
    found = errors(results(case, inputs, function), expected_results(case, inputs))
    wrong = {name: (error, allowed.get(name, largest)) for name, error in found.items()
             if not error <= allowed.get(name, largest)}  # fmt: skip
    assert not wrong, f"{case}: (error, allowed) {wrong}"


def layer_of(case: Case, precision: str) -> selection.Layer:
    """The sizes of each layer of the case, in training; precision as in TYPES."""
    float32 = "tf32" if precision.endswith("tf32") else "ieee"
    return selection.Layer(
        case.spec, case.T, case.B, case.H, case.D, case.proj_size > 0, case.dtype, float32, training=True,
        ragged=case.lengths or case.resets,
    )  # fmt: skip


def strategies(case: Case, precision: str) -> tuple[str, ...]:
    """What is worth testing of "stepwise" and "auto": both where `auto` is another thing, on an H100."""
    if case.cell:
        return ("stepwise",)
    chosen = selection.kernels("auto", layer_of(case, precision), GPUS["h100"])
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
    """Wait for the device; raises RuntimeError if a launch on it gave up waiting."""
    torch.cuda.synchronize(device)
    lstm_triton.check_launches()
