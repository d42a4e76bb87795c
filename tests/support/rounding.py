"""What rounding alone errs by: the float64 reference, with the operands of every matrix product rounded to a type.

Half types are multiplied as they are, and float32 operands as TF32 where PyTorch's switch says so. Whatever computes
so has rounded x, the hidden state, the gradients of the gates and, with full peepholes, the cell state, however
exactly it does the rest. Here the rest is exact: sums, gates and states are float64. Diagonal peepholes are products
of elements, not matrix products, and are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.parity import Case, expected_results

aten = torch.ops.aten
OPERANDS = {
    aten.mm: (0, 1),
    aten.bmm: (0, 1),
    aten.mv: (0, 1),
    aten.dot: (0, 1),
    aten.matmul: (0, 1),
    aten.linear: (0, 1),
    aten.addmm: (1, 2),
    aten.baddbmm: (1, 2),
    aten.addmv: (1, 2),
}
"""The products, and which of their arguments are multiplied with each other; what is added to them is not rounded."""

GATES = (aten.sigmoid, aten.tanh, aten.sigmoid_backward, aten.tanh_backward)
"""What gives gates and the gradients of their pre-activations."""

CUT = 13
"""The explicit mantissa bits that float32 has and TF32 has not."""


def to_tf32(x: Tensor) -> Tensor:
    """The nearest TF32 values in the type of x, ties away from zero as cvt.rna rounds; NaN and infinity are kept.

    A value of float64 is rounded to float32 before.
    """
    single = x.to(torch.float32)
    nearest = (single.view(torch.int32) + (1 << CUT - 1)) & -(1 << CUT)
    return torch.where(single.isfinite(), nearest.view(torch.float32), single).to(x.dtype)


def operand_rounding(dtype: torch.dtype, precision: str) -> Callable[[Tensor], Tensor]:
    """What becomes of an operand of a product in this type; precision: of float32 products, "tf32" or "ieee"."""
    if dtype == torch.float32 and precision == "tf32":
        return to_tf32
    return lambda x: x.to(dtype).to(x.dtype)


class RoundedOperands(TorchDispatchMode):
    """Inside, every matrix product rounds its operands, in the backward pass too, and then computes in their type.

    With stored_gates, gates and the gradients of their pre-activations are rounded as well.
    """

    def __init__(self, rounding: Callable[[Tensor], Tensor], stored_gates: bool = False) -> None:
        super().__init__()
        self.rounding = rounding
        self.stored = GATES if stored_gates else ()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        multiplied = OPERANDS.get(func.overloadpacket, ())
        self.products += bool(multiplied)
        rounded = (self.rounding(arg) if n in multiplied else arg for n, arg in enumerate(args))
        result = func(*rounded, **(kwargs or {}))
        return self.rounding(result) if func.overloadpacket in self.stored else result


def rounded_results(
    case: Case, inputs: dict[str, Tensor], precision: str, stored_gates: bool = False
) -> dict[str, Tensor]:
    """`expected_results` with rounded operands, and each result rounded to the case's type, in which it is stored."""
    with RoundedOperands(operand_rounding(case.dtype, precision), stored_gates):
        found = expected_results(case, inputs)
    return {name: result.detach().to(case.dtype) for name, result in found.items()}
