"""Initial values for the parameters of `LSTM` and `LSTMCell`, in place, as functions of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from lstm_triton.modules import VariantModule

    Module = TypeVar("Module", bound=VariantModule)


def forget_bias_(module: Module, value: float = 1.0) -> Module:
    """Set the biases of the forget gate to `value` in sum (Jozefowicz et al. 2015): b_ih to it, b_hh to zero."""
    spec = module.spec
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("bias_ih", "bias_hh")):
                spec.split_gates(parameter)["f"].fill_(value if name.startswith("bias_ih") else 0.0)
    return module
