"""Batching rule of this library's operators for `torch.func.vmap`: a call for each member of the batch in turn.

A member of an ensemble has weights of its own, so its recurrence is a launch of its own in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def one_by_one(operator: Callable[..., Any]) -> Callable[..., Any]:
    """Return the batching rule of an operator with tensors, or lists of them, as arguments and results."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = [operator(*member(arguments, in_dims, n)) for n in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        kind = type(calls[0])
        return kind(map(torch.stack, zip(*calls, strict=True))), kind([0] * len(calls[0]))

    return rule


def member(argument: Any, dim: Any, n: int) -> Any:
    """The n-th member's share of an argument that is batched along `dim`; None where all members have the same."""
    if isinstance(argument, (list, tuple)):
        dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(argument)
        return [member(a, d, n) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, n)
