"""Blocks as operands of a product: in the operands' type, float32 rounded to TF32 where the product is taken in it."""

import triton
import triton.language as tl


@triton.jit
def as_operand(block, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """The block in type DOT; with PRECISION "tf32" its values rounded to the nearest TF32 value.

    Tensor cores ignore the low 13 bits of a float32 operand. Cut off instead of rounded, every operand would be nearer
    to zero than it is, by up to a unit in the last place instead of half a one, and the errors would not cancel.
    """
    block = block.to(DOT)
    if PRECISION == "tf32":
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [block], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return block
