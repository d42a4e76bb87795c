"""Initial values for the parameters of `LSTM` and `LSTMCell`, in place: functions of a module, as in `torch.nn.init`.

Each returns the module. Shapes: H hidden units, P hidden size after projection (else H).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lstm_triton.modules import VariantModule

    Module = TypeVar("Module", bound=VariantModule)


@torch.no_grad()
def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Set what is added to the pre-activation of every forget gate to `value`, in all layers and directions.

    A positive one lets the cell state pass at first (Gers et al. 2000; Jozefowicz et al. 2015 advise 1). Of the two
    biases b_ih gets the value and b_hh zero. Raises ValueError for a module without biases or forget gate.
    """
    for b_ih, b_hh in biases(module, "f"):
        b_ih.fill_(value)
        b_hh.zero_()
    return module


@torch.no_grad()
def chrono_(module: Module, longest: int) -> Module:
    """Draw the biases of the forget and input gates for dependencies of up to `longest` steps (Tallec & Ollivier 2018).

        b_f = log(u), u uniform on [1, longest - 1];  b_i = -b_f

    Of the two biases b_ih gets these and b_hh zero. Without an input gate of its own there is b_f alone: coupled,
    i = 1 - f is both. Raises ValueError for a module without biases or forget gate, and unless longest is at least 3.
    """
    if longest < 3:
        raise ValueError(f"longest must be at least 3 steps, got {longest}")
    drawn = []
    for b_ih, b_hh in biases(module, "f"):
        b_ih.uniform_(1, longest - 1).log_()
        b_hh.zero_()
        drawn.append(b_ih)
    if "i" in module.spec.gates:
        for b_f, (b_ih, b_hh) in zip(drawn, biases(module, "i"), strict=True):
            b_ih.copy_(-b_f)
            b_hh.zero_()
    return module


@torch.no_grad()
def orthogonal_(module: Module, gain: float = 1.0) -> Module:
    """Make the block (H, P) of W_hh of each gate orthogonal, times the gain (Saxe et al. 2014), in every layer.

    Projected, its columns are orthogonal. float16 and bfloat16 are rounded from float32.
    """
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh"):
            for block in module.spec.split_gates(weight, 0).values():
                wide = block.to(torch.promote_types(block.dtype, torch.float32))
                block.copy_(nn.init.orthogonal_(wide.clone(), gain))
    return module


def biases(module: Module, gate: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parts (H,) of b_ih and b_hh of a gate, of every layer and direction. Raises ValueError without any."""
    if not module.bias:
        raise ValueError(f"{type(module).__name__} has no biases: build it with bias=True")
    if gate not in module.spec.gates:
        raise ValueError(f"{type(module).__name__} has no gate {gate}: it is of the variant {module.spec.name!r}")
    named = dict(module.named_parameters())
    for name, b_ih in named.items():
        if name.startswith("bias_ih"):
            b_hh = named[name.replace("bias_ih", "bias_hh")]
            split = module.spec.split_gates
            yield split(b_ih)[gate], split(b_hh)[gate]
