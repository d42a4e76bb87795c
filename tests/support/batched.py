"""Gradients in a batch, as PyTorch's older vmap asks for them, beside one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian

from lstm_triton import LSTMCell, LSTMSpec
from tests.support.composes import arguments, close, loss, module_of, packed, tensors, variant

ROWS, STEPS = 2, 3


Problem = tuple[Callable[..., list[Tensor]], list[Tensor]]
"""A function of x and the parameters, and where to differentiate it."""


def layer(spec: LSTMSpec, asked: Sequence[str] = (), **options: Any) -> Problem:
    """A module on a padded input."""
    module = module_of(spec, **options)
    x, names = torch.randn(STEPS, ROWS, 3, dtype=torch.float64), list(dict(module.named_parameters()))
    given = arguments(asked, STEPS, ROWS)

    def call(x: Tensor, *weights: Tensor) -> list[Tensor]:
        named = dict(zip(names, weights, strict=True))
        return tensors(torch.func.functional_call(module, named, (x,), given))

    return call, [x, *(p.detach() for p in module.parameters())]


def cell(spec: LSTMSpec) -> Problem:
    """One step."""
    module = LSTMCell(3, 4, dtype=torch.float64, **variant(spec))
    names = list(dict(module.named_parameters()))

    def call(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return list(torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,)))

    return call, [torch.randn(ROWS, 3, dtype=torch.float64), *(p.detach() for p in module.parameters())]


def packed_layer(spec: LSTMSpec) -> Problem:
    """A packed batch, differentiated by its data."""
    module, input = module_of(spec, bidirectional=True), packed((2, 3, 1))
    return lambda data: tensors(module(input._replace(data=data))), [input.data]


def check_batches(call: Callable[..., list[Tensor]], at: Sequence[Tensor]) -> None:
    """Jacobian, Hessian and `is_grads_batched=True` are what a loop gives."""

    def scalar(*inputs: Tensor) -> Tensor:
        return loss(call(*inputs))

    def jacobians(**options: bool) -> list[Tensor]:
        return flat(jacobian(lambda *inputs: tuple(call(*inputs)), tuple(at), **options))

    def hessians(**options: bool) -> list[Tensor]:
        few = (at[0], *at[2:3])  # x and the recurrent weights
        return flat(hessian(lambda x, *w: scalar(x, *at[1:2], *w, *at[3:]), few, **options))

    close(jacobians(vectorize=True), jacobians())
    close(hessians(vectorize=True), hessians())
    inputs = [t.clone().requires_grad_() for t in at]
    results = call(*inputs)
    cotangents = [torch.randn(5, *t.shape, dtype=t.dtype) for t in results]
    batch = torch.autograd.grad(results, inputs, cotangents, is_grads_batched=True, retain_graph=True)
    loop = [torch.autograd.grad(results, inputs, [c[n] for c in cotangents], retain_graph=True) for n in range(5)]
    close(batch, [torch.stack(parts) for parts in zip(*loop, strict=True)])
    batch = torch.autograd.grad(results, inputs, cotangents, is_grads_batched=True, create_graph=True)
    loop = [torch.autograd.grad(results, inputs, [c[n] for c in cotangents], create_graph=True) for n in range(5)]
    stacked = [torch.stack(parts) for parts in zip(*loop, strict=True)]
    found = torch.autograd.grad(loss(batch), inputs, retain_graph=True)
    close(found, torch.autograd.grad(loss(stacked), inputs))


def flat(nested: Any) -> list[Tensor]:
    """The tensors of nested tuples."""
    return [nested] if isinstance(nested, Tensor) else [t for part in nested for t in flat(part)]
