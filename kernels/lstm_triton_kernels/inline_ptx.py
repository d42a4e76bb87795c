"""Instructions of NVIDIA GPUs that Triton has no function for, as inline PTX; in the interpreter, plain operations.

For blocks of float32, but for `pause`. The interpreter executes no PTX.
"""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


@triton.jit
def exp2_approx(x):
    """Return 2^x, to 2 units in the last place; results below 2^-126 are 0.

    tl.exp2 is the same instruction within a range check and two multiplications for the subnormal results.
    """
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def log2_approx(x):
    """Return the binary logarithm of x > 0: to an absolute error of 2^-22 from 1/2 to 2, elsewhere to a relative one.

    tl.log2 is a polynomial of many instructions.
    """
    if INTERPRETED:
        return tl.log2(x)
    else:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal_approx(x):
    """Return 1 / x, to 1 unit in the last place; results below 2^-126 are 0, and 1 / 0 is infinity."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def round_to_tf32(x):
    """Return x rounded to the nearest TF32 value; the interpreter has no TF32 and leaves x as it is."""
    if INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def pause(clocks):
    """Let so many clocks of the multiprocessor pass (int32); the interpreter has none."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            """{
            .reg .u32 %start, %passed;
            .reg .pred %early;
            mov.u32 %start, %clock;
            PAUSE:
            mov.u32 %passed, %clock;
            sub.u32 %passed, %passed, %start;
            setp.lt.u32 %early, %passed, $1;
            @%early bra PAUSE;
            mov.u32 $0, %passed;
            }""",
            "=r,r",
            [clocks],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


INTERPRETED = tl.constexpr(isinstance(pause, InterpretedFunction))
"""Whether the kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
