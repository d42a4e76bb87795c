"""Whether torch.func, forward-mode differentiation or torch.export is at work: not every path is made for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

RECORDING = (_functorch.TransformType.Grad, _functorch.TransformType.Jvp)


def active() -> bool:
    """Return whether the call is inside of torch.func.grad, vjp, jvp, vmap or the like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Return whether the call is inside of torch.func.jvp, jacfwd, hessian, or of `forward_ad.dual_level`."""
    return forward_ad._current_level >= 0


def unfit_for_operators() -> bool:
    """Return whether what is around differentiates in a way that the operators are not made for.

    That is forward mode; and under torch.compile every transform but vmap, since Dynamo does not let the Function see
    it. (In this order: Dynamo guards on the level, which a jvp inside of the compiled function changes.)
    """
    return (torch.compiler.is_compiling() and _recorded_while_compiling()) or forward_mode()


def _recorded_while_compiling() -> bool:
    """Dynamo enters the transforms that it sees while it traces, and guards on those around."""
    return any(level.key() in RECORDING for level in _functorch.get_interpreter_stack() or ())


# What torch.compiler.assume_constant_result does, which would import all of Dynamo, and triton, here.
_recorded_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def exporting() -> bool:
    """Return whether torch.export is at work."""
    return torch.compiler.is_exporting()


def exporting_to_onnx() -> bool:
    """Return whether torch.onnx.export is at work, by either of its exporters."""
    return torch.onnx.is_in_onnx_export()


# Dynamo folds both questions to constants, the first under torch 2.11 to a wrong one; so marked it asks for real.
exporting._dynamo_marked_constant = True  # type: ignore[attr-defined]
exporting_to_onnx._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced() -> bool:
    """Return whether what compiles traces a transform of torch.func, for which no operator has its autograd."""
    return bool(_functorch.get_interpreter_stack())


traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recorder() -> int | None:
    """Return the level of the innermost torch.func.grad or vjp, which records what is computed; None without one."""
    if not active():
        return None
    levels = [level.level() for level in _functorch.get_interpreter_stack() if level.key() == RECORDING[0]]
    return max(levels, default=None)


def recorded(tensors: Iterable[Tensor]) -> bool:
    """Return whether a gradient may be asked of what a transform of torch.func computes from these tensors."""
    return recorder() is not None or any(innermost(t).requires_grad for t in tensors)


def differentiated_again(tensors: Iterable[Tensor | None], result: Tensor, own: int | None) -> bool:
    """Return whether what a backward pass computes from these tensors may itself be differentiated.

    torch.func always asks for that; it is meant where a transform that differentiates is around other than the own one,
    which recorded the `result` and may have ended, or where a tensor at the bottom of the transforms requires a
    gradient.
    """
    if torch.compiler.is_compiling():
        return False
    if forward_mode():
        return True
    if not torch.is_grad_enabled():
        return False
    if active():
        levels = [level.level() for level in _functorch.get_interpreter_stack() if level.key() in RECORDING]
        if own in levels and any(_functorch.maybe_get_level(t) == own for t in wrappers(result)):
            levels.remove(own)
        if levels:
            return True
    return any(t is not None and innermost(t).requires_grad for t in tensors)


def beyond_operators(tensors: Sequence[Tensor | None], result: Tensor, own: int | None) -> bool:
    """Return whether the reference computes a backward pass from these tensors: differentiated again, or in a batch.

    The batch of `is_grads_batched=True` and of `torch.autograd.functional` with `vectorize=True` is PyTorch's older
    vmap, which asks no operator for its batching rule.
    """
    return differentiated_again(tensors, result, own) or batched(tensors)


def batched(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether any of the tensors is a batch of PyTorch's older vmap."""
    return not torch.compiler.is_compiling() and any(
        t is not None and _functorch.is_legacy_batchedtensor(t) for t in tensors
    )


def wrappers(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the wrappers of torch.func around a tensor, from the outermost; after its transform one has level -2."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        yield tensor
        tensor = _functorch.get_unwrapped(tensor)


def innermost(tensor: Tensor) -> Tensor:
    """Return the tensor below all wrappers of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
