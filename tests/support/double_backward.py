"""Second derivatives of one configuration: gradients of its gradients, by a backend and by the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import lstm_triton
from lstm_triton import LSTMSpec, second_order
from tests.support.parity import Case, call, call_reference, errors, random_inputs

GRADS = ("output", "h_n", "c_n", "states")
"""The results of a call, in whose gradients the first gradients are linear."""

BOUND = {torch.float16: 6e-3, torch.bfloat16: 5e-2, torch.float32: 1e-5, torch.float64: 1e-11}
"""Relative errors of a few steps; float16 and bfloat16 round gates, their gradients and tangents at every step."""


def cases_of(spec: LSTMSpec) -> list[Case]:
    """Cases that between them have every option of a layer, for one variant; of none is PyTorch's operator asked."""
    ragged = dict(lengths=True, resets=True, states=True)
    return [
        Case(spec, T=3, B=3, I=2, H=5, bidirectional=True, **ragged),
        Case(spec, T=4, B=2, I=3, H=7, bidirectional=True, proj_size=3, bias=False, lengths=True),
        Case(spec, T=2, B=5, I=1, H=3, L=2, resets=True, layout="transposed"),
        Case(spec, T=1, B=2, I=3, H=4, bidirectional=True, states=True, layout="expanded"),
    ]


def second_gradients(
    case: Case, inputs: dict[str, Tensor], function: Callable[..., tuple[Tensor, ...]],
    first: Sequence[str] | None = None, given: Sequence[str] = GRADS, seed: int = 3,
) -> dict[str, Tensor]:  # fmt: skip
    """Return the first gradients, and the gradients of their product with random numbers, by every input and grad.

    - first: the inputs whose first gradients are taken, None: all; given: the results that have a gradient
    """
    generator = torch.Generator().manual_seed(seed)

    def random(like: Tensor) -> Tensor:
        values = torch.randn(like.shape, generator=generator, dtype=torch.float64)
        return values.to(case.dtype).to(like.device, like.dtype)

    results = dict(zip(GRADS, function(case, *inputs.values()), strict=False))
    grads = {f"of {name}": random(result).requires_grad_() for name, result in results.items()}
    asked = [name for name in results if name in given]
    names = list(inputs) if first is None else list(first)
    gradients = torch.autograd.grad(
        [results[name] for name in asked], [inputs[name] for name in names], [grads[f"of {name}"] for name in asked],
        create_graph=True,
    )  # fmt: skip
    every = inputs | {name: grads[name] for name in (f"of {name}" for name in asked)}
    second = torch.autograd.grad(
        gradients, list(every.values()), [random(gradient) for gradient in gradients], materialize_grads=True
    )
    named = {f"first {name}": gradient for name, gradient in zip(names, gradients, strict=True)}
    return named | {f"second {name}": gradient for name, gradient in zip(every, second, strict=True)}


def expected_second_gradients(case: Case, inputs: dict[str, Tensor], **options: Sequence[str]) -> dict[str, Tensor]:
    """`second_gradients` by the reference in float64, from the same inputs, upcast."""
    double = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    return second_gradients(case, double, call_reference, **options)


@contextmanager
def nothing_in_new_memory(device: str) -> Iterator[None]:
    """Inside, memory that nobody wrote is NaN. On a CPU: CUDA's products refuse the mode that does it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or device == "cpu")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def without_reference() -> Iterator[None]:
    """Inside, the reference differentiates nothing again: what is found is an engine's work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_order, "backward", None)
        yield


def assert_right(case: Case, backend: str, bound: float, **options: Sequence[str]) -> None:
    """An engine's second gradients against those of the float64 reference: relative errors below the bound."""
    inputs = random_inputs(case)
    with lstm_triton.backend(backend), without_reference(), nothing_in_new_memory(case.device):
        found = second_gradients(case, inputs, call, **options)
    expected = expected_second_gradients(case, inputs, **options)
    assert {t.dtype for t in found.values()} == {case.dtype}
    assert any(name.startswith("second of") and t.any() for name, t in expected.items())
    wrong = {name: error for name, error in errors(found, expected).items() if not error <= bound}
    assert not wrong, f"{case}: beyond {bound:.0e}: {wrong}"
