"""Whether a transform of torch.func, or forward-mode differentiation, is at work: not every path is made for them."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def active() -> bool:
    """Whether the call is inside of torch.func.grad, vjp, jvp, vmap or the like."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether the call is inside of torch.func.jvp, jacfwd, hessian, or of `forward_ad.dual_level`."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0
