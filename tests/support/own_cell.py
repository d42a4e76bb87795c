"""The cells of examples/own_cell, by their kernels and by their equations: outputs and every gradient, by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from lstm_triton_kernels.sizes import accumulator_dtype
from torch import Tensor

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "own_cell"


def loaded(name: str) -> ModuleType:
    """The module of the example, which is in no package."""
    spec = importlib.util.spec_from_file_location(f"own_cell_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gru, slstm = loaded("gru"), loaded("slstm")

Function = Callable[..., tuple[Tensor, ...]]
"""Of tensors by name to outputs, in the order of `Cell.outputs`."""


class Cell(NamedTuple):
    """A cell: its two functions, the names of their outputs, how many gate blocks it has, and its biases."""

    kernels: Function
    reference: Function
    outputs: tuple[str, ...]
    blocks: int
    biases: tuple[str, ...]


def with_state(function: Callable[..., tuple[Tensor, tuple[Tensor, ...]]], **options: bool) -> Function:
    """The same function of (x, h_0, c_0, n_0, m_0, weights ...), that returns output, c_n and n_n."""

    def flat(x: Tensor, h_0: Tensor, c_0: Tensor, n_0: Tensor, m_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        output, (c_n, n_n, _) = function(x, h_0, (c_0, n_0, m_0), *weights, **options)
        return output, c_n, n_n

    return flat


CELLS = {
    "gru": Cell(
        lambda *given: (gru.gru(*given),),
        lambda *given: (gru.reference(*given),),
        ("output",),
        3,
        ("bias_ih", "bias_hh"),
    ),
    **{
        name: Cell(
            with_state(slstm.slstm, exp_forget=exp_forget),
            with_state(slstm.reference, exp_forget=exp_forget),
            ("output", "c_n", "n_n"),
            4,
            ("bias",),
        )
        for name, exp_forget in (("slstm", False), ("slstm, exponential forget gate", True))
    },
}


def random_inputs(name: str, T: int, B: int, I: int, H: int, seed: int = 0) -> dict[str, Tensor]:  # noqa: E741
    """Every argument of the cell's functions, and a gradient of every output, in float64.

    Of an sLSTM with a state that steps before may have left.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, bound: float = 1.0) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound

    cell = CELLS[name]
    rows = cell.blocks * H
    inputs = dict(x=random(T, B, I), h_0=random(B, H))
    if "c_n" in cell.outputs:
        inputs |= dict(c_0=random(B, H), n_0=1.5 + random(B, H, bound=0.5), m_0=random(B, H))
    inputs |= dict(weight_ih=random(rows, I), weight_hh=random(rows, H, bound=1.7 / H**0.5))
    inputs |= {bias: random(rows) for bias in cell.biases}
    return inputs | {f"of {output}": random(T, B, H) if output == "output" else random(B, H) for output in cell.outputs}


IN_ACCUMULATOR = ("c_0", "n_0", "m_0", "of c_n", "of n_n")
"""What has the accumulator's type, whatever the others have."""


def rounded(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inputs in a type, and what belongs to the state in its accumulator type."""
    return {
        key: value.to(accumulator_dtype(dtype) if key in IN_ACCUMULATOR else dtype) for key, value in inputs.items()
    }


def results(name: str, function: Function, inputs: dict[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """Outputs and gradients by name; m_0 has no gradient."""
    inputs = {key: value.detach().to(device) for key, value in inputs.items()}
    along = [inputs.pop(f"of {output}") for output in CELLS[name].outputs]
    wanted = {key: value.requires_grad_() for key, value in inputs.items() if key != "m_0"}
    outputs = function(*inputs.values())
    gradients = torch.autograd.grad(outputs, list(wanted.values()), along)
    found = dict(zip(CELLS[name].outputs, (t.detach() for t in outputs), strict=True))
    return found | {f"gradient of {key}": g for key, g in zip(wanted, gradients, strict=True)}


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, float]:
    """||found - wanted|| / ||wanted|| of each, by name."""
    assert found.keys() == wanted.keys()
    return {key: float((found[key].cpu().double() - t).norm() / t.norm()) for key, t in wanted.items()}


def errors_of_kernels(
    name: str, T: int, B: int, I: int, H: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0  # noqa: E741
) -> dict[str, float]:  # fmt: skip
    """The errors of the kernels against the equations in float64, on the same inputs."""
    inputs = rounded(random_inputs(name, T, B, I, H, seed), dtype)
    exact = {key: value.double() for key, value in inputs.items()}
    return errors(results(name, CELLS[name].kernels, inputs, device), results(name, CELLS[name].reference, exact))
