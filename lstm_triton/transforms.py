"""Whether a transform of torch.func, or forward-mode differentiation, is at work: not every path is made for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether the call is inside of torch.func.grad, vjp, jvp, vmap or the like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether the call is inside of torch.func.jvp, jacfwd, hessian, or of `forward_ad.dual_level`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def differentiated_again(tensors: Iterable[Tensor | None]) -> bool:
    """Whether what a backward pass computes from these tensors may itself be differentiated.

    torch.func always asks for that; it is meant where another transform that differentiates is around, or a tensor at
    the bottom of the transforms requires a gradient.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if active():
        levels = [level.key() for level in _functorch.get_interpreter_stack()]
        if levels.count(_functorch.TransformType.Grad) > 1:
            return True
    return any(t is not None and innermost(t).requires_grad for t in tensors)


def innermost(tensor: Tensor) -> Tensor:
    """The tensor below all wrappers of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
