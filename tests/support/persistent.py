"""One layer by the persistent kernels in plain Triton, on a plan of the test's own, and by the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.float32_plan import second_columns
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.plan import PersistentPlan, Second
from lstm_triton_kernels.regularize import NONE, Rules, drawn
from lstm_triton_kernels.spec import LSTMWeights
from torch import Tensor

from lstm_triton import LSTMSpec, layer, persistent, reference


def plan_of(
    B: int, H: int, D: int = 1, *, wait: str | None, block_u: int = 8, block_b: int = 16, block_k: int = 16,
    parts: int = 1, rows: int | None = None, row_programs: int | None = None, group: int | None = None,
) -> PersistentPlan:  # fmt: skip
    """A plan of the forward pass of the plain kernels for these sizes; without a wait, one program holds all units."""
    if wait is None:
        block_u = block_k = max(16, 1 << (H - 1).bit_length())
    chunks = -(-H // (parts * block_k))
    rows = min(rows or block_b, B)
    row_blocks = -(-B // rows)
    return PersistentPlan(
        block_u=block_u,
        block_b=block_b,
        block_k=block_k,
        parts=parts,
        chunks=chunks,
        group=group or chunks,
        rows=rows,
        unit_programs=-(-H // block_u),
        row_programs=row_programs or row_blocks,
        directions=D,
        row_blocks=row_blocks,
        num_warps=4,
        wait=wait,
        pause=0,
        exact=True,
        tile_bytes=0,
        register_bytes=0,
        shared_bytes=0,
        estimate_us=0.0,
    )


@dataclass(frozen=True)
class LayerCase:
    """A layer, its sizes, and what is asked of it; `gradients`: of which results (output, cells, h_n, c_n)."""

    spec: LSTMSpec
    plan: PersistentPlan
    T: int
    B: int
    H: int
    I: int = 3  # noqa: E741
    lengths: bool = False
    resets: bool = False
    bias: bool = True
    recompute: bool = False
    gradients: tuple[bool, bool, bool, bool] = (True, True, True, True)
    dtype: torch.dtype = torch.float64
    seed: int = 0
    P: int = 0
    rules: Rules = NONE
    training: bool = True

    def order(self, lengths: Tensor | None, resets: Tensor | None, dtype: torch.dtype) -> Order:
        """Return the order of its steps, with masks of a type where rules draw some."""
        D, B, H, P = self.plan.directions, self.B, self.H, self.P or self.H
        seed = torch.tensor([self.seed + 17]) if self.rules.random and self.training else None
        regularized = drawn(self.rules, seed, D, self.T, B, H, P, dtype)
        return Order(self.T, lengths, resets, regularized=regularized)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Of the parameters that it has."""
        return self.spec.parameter_names(self.bias, self.P > 0)

    def __str__(self) -> str:
        plan = self.plan
        grid = f"{plan.unit_programs}x{plan.row_programs}x{plan.directions}"
        flags = [self.spec.name, f"T{self.T}-B{self.B}-H{self.H}", f"{plan.wait or 'alone'}-{grid}"]
        flags += [f"P{self.P}"] * (self.P > 0)
        flags += [name for name in ("lengths", "resets", "recompute") if getattr(self, name)]
        flags += [f"{name}{value:.1g}" for name, value in self.rules._asdict().items() if value]
        flags += ["evaluated"] * (not self.training)
        return "-".join(flags + [str(self.dtype).removeprefix("torch.")] * (self.dtype != torch.float64))


@dataclass
class Inputs:
    """The tensors of a layer: leaves that require gradients, weights one LSTMWeights a direction."""

    x: Tensor
    h_0: Tensor
    c_0: Tensor
    weights: list[LSTMWeights]
    lengths: Tensor | None
    resets: Tensor | None
    gradients: list[Tensor | None]

    def leaves(self) -> list[Tensor]:
        return [self.x, self.h_0, self.c_0, *(t for w in self.weights for t in w.present().values())]

    def map(self, function: Any) -> Inputs:
        weights = [w.map(function) for w in self.weights]
        gradients = [None if g is None else function(g) for g in self.gradients]
        return replace(self, x=function(self.x), h_0=function(self.h_0), c_0=function(self.c_0), weights=weights,
                       gradients=gradients)  # fmt: skip


def inputs_of(case: LayerCase) -> Inputs:
    """Random tensors in the case's type."""
    generator = torch.Generator().manual_seed(case.seed)
    D, H, P = case.plan.directions, case.H, case.P or case.H

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(case.dtype)

    shapes = case.spec.parameter_shapes(case.I, H, case.bias, case.P)
    weights = [LSTMWeights(**{name: normal(*s, scale=H**-0.5) for name, s in shapes.items()}) for _ in range(D)]
    lengths = torch.randint(1, case.T + 1, (case.B,), generator=generator) if case.lengths else None
    resets = torch.rand(case.T, case.B, generator=generator) < 0.3 if case.resets else None
    sizes = ((case.T, case.B, D * P), (case.T, case.B, D * H), (D, case.B, P), (D, case.B, H))
    gradients = [normal(*size) if wanted else None for size, wanted in zip(sizes, case.gradients, strict=True)]
    states = normal(case.T, case.B, case.I), normal(D, case.B, P), normal(D, case.B, H)
    return Inputs(*states, weights, lengths, resets, gradients)


RESULTS = ("output", "cells", "h_n", "c_n")


def names(case: LayerCase) -> list[str]:
    """Of all results and gradients, in order."""
    sides = [f"{name}[{d}]" for d in range(case.plan.directions) for name in case.parameter_names]
    return [*RESULTS, *(f"grad {name}" for name in ("x", "h_0", "c_0", *sides))]


def expected(case: LayerCase, inputs: Inputs) -> list[Tensor]:
    """By the reference, in float64."""
    double = inputs.map(lambda t: t.detach().double().requires_grad_())
    results = reference.layer_states(
        double.x, double.h_0, double.c_0, double.weights, case.spec, inputs.lengths, inputs.resets,
        case.order(None, None, torch.float64).regularized,
    )  # fmt: skip
    given = [(r, g.detach()) for r, g in zip(results, double.gradients, strict=True) if g is not None]
    gradients = torch.autograd.grad(
        [r for r, _ in given], double.leaves(), [g for _, g in given], materialize_grads=True, allow_unused=True
    )
    return [*(r.detach() for r in results), *gradients]


def computed(case: LayerCase, inputs: Inputs, launching: Any = None) -> list[Tensor]:
    """By the persistent kernels on the case's plan; `launching`: a context manager around the launches."""
    with planned(case.plan), launching or nullcontext():
        return both_passes(case, inputs)


def both_passes(case: LayerCase, inputs: Inputs) -> list[Tensor]:
    """All results and gradients, in the order of `names`, by the persistent kernels."""
    needs = layer.Needs(True, True, True, [list(case.parameter_names)] * case.plan.directions)
    grad_output, grad_cells, grad_h_n, grad_c_n = inputs.gradients
    grads = layer.Gradients(grad_output, grad_h_n, grad_c_n, grad_cells)
    arguments = (inputs.x, inputs.h_0, inputs.c_0, inputs.weights)
    order = case.order(inputs.lengths, inputs.resets, case.dtype)
    call = layer.Call(case.spec.name, case.bias, case.P > 0, "persistent", True, case.recompute, states=True)
    with torch.no_grad():
        result = layer.forward(*arguments, order, call, persistent)
        saved = (result.output, result.gates, result.cells)
        gradients = layer.backward(grads, *arguments, *saved, order, call, needs, persistent)
    by_name = [side[name] for side in gradients.weights for name in case.parameter_names]
    return [result.output, result.states, result.h_n, result.c_n, gradients.x, gradients.h_0, gradients.c_0, *by_name]


@contextmanager
def planned(plan: PersistentPlan) -> Iterator[None]:
    """Both passes on this plan; backward the columns of the product are those of all gates, in as many more chunks.

    Products within a step are cut in the same way.
    """

    def chunks_of(columns: int) -> tuple[int, int]:
        chunks = -(-columns // (plan.parts * plan.block_k))
        return chunks, chunks if plan.group == plan.chunks else 1

    def plan_of_pass(launch: sequence_persistent.Launch) -> PersistentPlan:
        seconds = [Second(*chunks_of(n)) if n else None for n in second_columns(launch.layer, launch.backward)]
        own = replace(plan, peephole=seconds[0], projection=seconds[1])
        if plan.alone or not launch.backward:
            return own
        chunks, group = chunks_of(launch.layer.gates * launch.layer.H)
        return replace(own, chunks=chunks, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequence_persistent, "plan_of", plan_of_pass)
        yield


def errors(case: LayerCase, actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> dict[str, float]:
    """||actual - wanted|| / ||wanted|| by name, infinite where not finite; where nothing is wanted, ||actual||."""
    found = {}
    for name, a, w in zip(names(case), actual, wanted, strict=True):
        assert a.shape == w.shape, f"{name}: {tuple(a.shape)} instead of {tuple(w.shape)}"
        distance = (a.double() - w).norm()
        error = float(distance / w.norm()) if w.any() else float(distance)
        found[name] = error if error == error else float("inf")
    return found


def concurrently(**options: Any) -> Any:
    """A context manager in which all programs of a persistent launch run at once."""
    from tests.support.concurrent import concurrent_programs

    kernels = ["persistent_forward_kernel", "persistent_backward_kernel"]
    return concurrent_programs({sequence_persistent: kernels}, **options)


BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}


def assert_right(case: LayerCase, launching: Any = None) -> None:
    """Every result and gradient within the type's bound of the reference."""
    inputs = inputs_of(case)
    found = errors(case, computed(case, inputs, launching), expected(case, inputs))
    wrong = {name: error for name, error in found.items() if not error <= BOUND[case.dtype]}
    assert not wrong, f"{case}: beyond {BOUND[case.dtype]:.0e}: {wrong}"
