"""The parameters of a call on explicit tensors: their names, their sizes, and which belong together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights, state_dict_name, widened
from torch import Tensor

from lstm_triton import checks
from lstm_triton.layer import Call


def group_layers(
    weights: Sequence[Tensor], spec: LSTMSpec, D: int, bias: bool, proj_size: int
) -> list[list[LSTMWeights]]:
    """Return the flat list of parameters of `functional.lstm` by layer and direction."""
    groups = Call(spec.name, bias, proj_size > 0, "").group(weights)
    return [groups[n : n + D] for n in range(0, len(groups), D)]


def state_dict_names(spec: LSTMSpec, num_layers: int, bidirectional: bool, bias: bool, proj_size: int) -> list[str]:
    """Return the names of the parameters that `functional.lstm` takes, in its order."""
    return [
        state_dict_name(name, layer, direction)
        for layer in range(num_layers)
        for direction in range(2 if bidirectional else 1)
        for name in spec.parameter_names(bias, proj_size > 0)
    ]


def widened_stack(
    weights: Sequence[Tensor], spec: LSTMSpec, bias: bool, projection: bool
) -> tuple[list[Tensor], LSTMSpec, bool]:
    """Return the flat list of parameters of a stack that has all gates, its variant, and that there are biases.

    It computes the same: see `widened`.
    """
    groups = Call(spec.name, bias, projection, "").group(weights)
    return [w for own in groups for w in widened(own, spec) if w is not None], spec.computed, True


def stack_sizes(
    spec: LSTMSpec, L: int, D: int, bias: bool, proj_size: int, shapes: tuple[torch.Size, ...]
) -> tuple[int, int, int]:
    """Return I, H and P of a stack from the shapes of its parameters, in the order of `functional.lstm`.

    Raises ValueError for a wrong number of them, RuntimeError naming the first whose shape does not fit the others.
    """
    check = _stack_sizes if torch.compiler.is_compiling() else _known_stack_sizes
    return check(spec, L, D, bias, proj_size, shapes)


def cell_sizes(spec: LSTMSpec, shapes: tuple[torch.Size | None, ...]) -> tuple[int, int]:
    """Return I and H of a cell from the shapes of the fields of its LSTMWeights.

    Raises ValueError for parameters that the variant does not take or lacks, RuntimeError naming the first whose shape
    does not fit the others.
    """
    check = _cell_sizes if torch.compiler.is_compiling() else _known_cell_sizes
    return check(spec, shapes)


def _stack_sizes(
    spec: LSTMSpec, L: int, D: int, bias: bool, proj_size: int, shapes: tuple[torch.Size, ...]
) -> tuple[int, int, int]:
    names = spec.parameter_names(bias, proj_size > 0)
    if len(shapes) != L * D * len(names):
        raise ValueError(
            f"Expected {L * D * len(names)} weights ({', '.join(names)} for each of {L} layers and {D} directions), "
            f"got {len(shapes)}"
        )
    I, H, P = _sizes(spec, shapes[0], shapes[1])  # noqa: E741
    for n in range(L * D):
        expected = spec.parameter_shapes(I if n < D else D * P, H, bias, proj_size)
        given = dict(zip(names, shapes[n * len(names) : (n + 1) * len(names)], strict=True))
        checks.weight_shapes(given, expected)
    return I, H, P


def _cell_sizes(spec: LSTMSpec, shapes: tuple[torch.Size | None, ...]) -> tuple[int, int]:
    given = {name: shape for name, shape in zip(LSTMWeights._fields, shapes, strict=True) if shape is not None}
    I, _, H = _sizes(spec, given["weight_ih"], given["weight_hh"])  # noqa: E741
    expected = spec.parameter_shapes(I, H, "bias_ih" in given)
    if set(given) != set(expected):
        raise ValueError(f"the variant {spec.name!r} takes {', '.join(expected)}; given: {', '.join(given)}")
    checks.weight_shapes(given, expected)
    return I, H


def _sizes(spec: LSTMSpec, weight_ih: torch.Size, weight_hh: torch.Size) -> tuple[int, int, int]:
    """Return I, H and P as the shapes of the first weights say."""
    return weight_ih[-1], weight_hh[0] // len(spec.gates), weight_hh[-1]


_known_stack_sizes = lru_cache(maxsize=1024)(_stack_sizes)
_known_cell_sizes = lru_cache(maxsize=1024)(_cell_sizes)
