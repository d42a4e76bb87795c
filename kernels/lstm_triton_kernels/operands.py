"""Operands of a product: their types, TF32 rounding, and the compile-time constants that say which they are."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from lstm_triton_kernels.inline_ptx import INTERPRETED, round_to_tf32
from lstm_triton_kernels.sizes import accumulator_dtype


@triton.jit
def as_operand(block, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Return the block in type DOT; with PRECISION "tf32" its values rounded to the nearest TF32 value.

    Tensor cores ignore the low 13 bits of a float32 operand. Cut off instead of rounded, every operand would be nearer
    to zero than it is, by up to a unit in the last place instead of half a one, and the errors would not cancel.
    """
    block = block.to(DOT)
    return round_to_tf32(block) if PRECISION == "tf32" else block


@triton.jit
def multiply_add(acc, left, right, PRECISION: tl.constexpr):
    """Return acc + left right for operands of `as_operand`, in the accumulator's type."""
    return tl.dot(left, right, acc, input_precision=PRECISION, out_dtype=acc.dtype)


TRITON_TYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def product_constants(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """Return the compile-time constants of every kernel with a product, for operands of the given type.

    precision: of float32 products, "tf32" or "ieee"; the interpreter has no TF32.
    """
    # The interpreter multiplies bfloat16 wrongly (triton 3.8): there the operands are widened first.
    operand = torch.float32 if INTERPRETED and dtype == torch.bfloat16 else dtype
    precision = precision if dtype == torch.float32 and not INTERPRETED else "ieee"
    return dict(DOT=TRITON_TYPE[operand], ACC=TRITON_TYPE[accumulator_dtype(dtype)], PRECISION=precision)
