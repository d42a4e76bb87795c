"""Activations that are safe over the whole range and exact near zero."""

import triton
import triton.language as tl

from lstm_triton_kernels.inline_ptx import exp2_approx, log2_approx, reciprocal_approx


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x): e^-x overflows to infinity for very negative x, which gives the right 0."""
    if x.dtype == tl.float64:
        return 1.0 / (1.0 + tl.exp(-x))
    else:
        return reciprocal_approx(1.0 + exp2_approx(x * -1.4426950408889634))


@triton.jit
def tanh(x):
    """2 s(2x) - 1, and the Taylor series where that cancels (|x| < 1/8).

    The series is cut where its next term is below the type's precision at 1/8: x^9 for float32, x^15 for float64.
    """
    y = x * x
    if x.dtype == tl.float64:
        tail = -1382.0 / 155925.0 + y * (21844.0 / 6081075.0 + y * (-929569.0 / 638512875.0))
        series = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0 + y * (62.0 / 2835.0 + y * tail))))
    else:
        series = 1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 + y * (-17.0 / 315.0)))
    return tl.where(y < 1.0 / 64.0, x * series, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def log_sigmoid(x):
    """log s(x) = min(x, 0) - log(1 + e^-|x|): nothing overflows, and for very negative x, where s(x) is 0, it is x.

    In float32 to an absolute error of 3e-7, or a unit in the last place where that is more.
    """
    if x.dtype == tl.float64:
        return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))
    else:
        log2 = log2_approx(1.0 + exp2_approx(tl.abs(x) * -1.4426950408889634))
        return tl.minimum(x, 0.0) - 0.6931471805599453 * log2
