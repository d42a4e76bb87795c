"""What the tests of composing share: a module, rows that differ, tensors of a result, the reference beside it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lstm_triton_kernels.spec import LSTMWeights
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.checkpoint import checkpoint

import lstm_triton
from lstm_triton import LSTM, LSTMSpec, reference
from lstm_triton.parameters import group_layers

EVERYTHING = ("lengths", "resets", "states")
"""All that a call may ask for beside `torch.nn.LSTM`'s arguments."""


def variant(spec: LSTMSpec) -> dict[str, Any]:
    """The arguments of a module of that variant."""
    return dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)


def module_of(spec: LSTMSpec, **options: Any) -> LSTM:
    """3 inputs, 4 units, in float64 unless told otherwise."""
    return LSTM(3, 4, **(dict(dtype=torch.float64) | options), **variant(spec))


def arguments(asked: Sequence[str], T: int, B: int, device: str = "cpu") -> dict[str, Any]:
    """The keyword arguments of a call on T steps of B rows, those of EVERYTHING that are asked."""
    t, b = torch.arange(T, device=device)[:, None], torch.arange(B, device=device)
    every = dict(lengths=T - 7 * b % T, resets=(5 * t + 3 * b) % 4 == 1, states=True)
    names = dict(states="return_cell_states")
    return {names.get(name, name): every[name] for name in asked}


def sequence(T: int, B: int, features: int = 3, **options: Any) -> Tensor:
    """A random input (T, B, features), in float64 unless told otherwise."""
    return torch.randn(T, B, features, **(dict(dtype=torch.float64) | options))


def packed(lengths: Sequence[int], features: int = 3, **options: Any) -> PackedSequence:
    """Random rows of these lengths, packed."""
    rows = [torch.randn(length, features, **(dict(dtype=torch.float64) | options)) for length in lengths]
    return pack_sequence(rows, enforce_sorted=False)


def tensors(result: Any) -> list[Tensor]:
    """Every tensor of a result: output, h_n, c_n, and the cell states if there are any; the data of what is packed."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def loss(result: Any) -> Tensor:
    """A scalar that is linear in nothing, and in which every element has another weight."""
    return sum((t.sin() * _weights(t)).sum() for t in tensors(result))  # type: ignore[return-value]


def _weights(t: Tensor) -> Tensor:
    return torch.linspace(0.3, 1.7, t.numel(), dtype=t.dtype, device=t.device).reshape(t.shape)


def by_reference(
    module: LSTM, x: Tensor, parameters: Mapping[str, Tensor] | None = None, lengths: Tensor | None = None,
    resets: Tensor | None = None, return_cell_states: bool = False,
) -> list[Tensor]:  # fmt: skip
    """`tensors` of what the module computes from zero states, by the reference; x (T, B, I)."""
    weights = list((parameters or dict(module.named_parameters())).values())
    D = 2 if module.bidirectional else 1
    layers = group_layers(weights, module.spec, D, module.bias, module.proj_size)
    h_0 = x.new_zeros(D * module.num_layers, x.shape[1], module.proj_size or module.hidden_size)
    c_0 = x.new_zeros(D * module.num_layers, x.shape[1], module.hidden_size)
    *results, states = reference.lstm(x, h_0, c_0, layers, module.spec, lengths, resets)
    return [*results, states] if return_cell_states else results


def cell_by_reference(
    cell: lstm_triton.LSTMCell, x: Tensor, parameters: Mapping[str, Tensor] | None = None
) -> list[Tensor]:
    """h and c after one step from zero states, by the reference; x (B, I)."""
    weights = LSTMWeights(**(parameters or dict(cell.named_parameters())))
    zeros = x.new_zeros(x.shape[0], cell.hidden_size)
    return list(reference.cell(x, zeros, zeros, weights, cell.spec))


def rows_of(packed: PackedSequence) -> list[Tensor]:
    """Each row, in the order of the caller. (unpack_sequence does the same, but not under torch.func.)"""
    sizes = packed.batch_sizes.tolist()
    starts = itertools.accumulate(sizes, initial=0)
    steps = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=False)]
    order = range(sizes[0]) if packed.unsorted_indices is None else packed.unsorted_indices.tolist()
    return [packed.data[[running[n] for running in steps if n < len(running)]] for n in order]


def in_rows(result: tuple[PackedSequence, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The rows of a packed output, h_n and c_n."""
    output, states = result
    return [*rows_of(output), *states]


def packed_by_reference(module: LSTM, input: PackedSequence) -> list[Tensor]:
    """`in_rows` of what the module computes, by the reference."""
    rows = rows_of(input)
    lengths = torch.tensor([len(row) for row in rows], device=input.data.device)
    output, h_n, c_n = by_reference(module, torch.nn.utils.rnn.pad_sequence(rows), lengths=lengths)
    return [*(output[:length, b] for b, length in enumerate(lengths.tolist())), h_n, c_n]


def close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    """The same tensors in float64, but for rounding."""
    torch.testing.assert_close(list(actual), list(expected), rtol=tolerance, atol=tolerance)


def with_and_without_checkpoint(
    module: LSTM, run: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, reentrant: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of x and of every parameter, of a plain call and of one whose results are computed again."""
    found = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        module.zero_grad()
        given = x.clone().requires_grad_()
        loss(call(given)).backward()
        found.append([given.grad, *(p.grad for p in module.parameters())])
    plain, again = found
    return plain, again
