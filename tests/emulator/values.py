"""Integer and float arithmetic of PTX on numpy arrays of registers.

A register of 16, 32 or 64 bits is an array of unsigned integers, one element a thread; a predicate is an array of bool.
Floats are their bits. What numpy's own operators do is not here: `translate` writes those where it needs them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

u1, u2, u4, u8 = np.uint8, np.uint16, np.uint32, np.uint64
i1, i2, i4, i8 = np.int8, np.int16, np.int32, np.int64
f2, f4, f8 = np.float16, np.float32, np.float64

Array = npt.NDArray[Any]

UNSIGNED: dict[int, Any] = {1: np.bool_, 8: u1, 16: u2, 32: u4, 64: u8}
"""The type of a register, by its bits."""

ATOMICS: dict[str, Any] = {
    "add": operator.add, "or": operator.or_, "and": operator.and_, "xor": operator.xor, "max": max, "min": min,
    "exch": lambda a, b: b,
}  # fmt: skip
"""(old, operand) -> new, of Python's integers."""

COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
"""Python's operator for each of setp's."""


# integers


def shift_left(a: Array, b: Array) -> Array:
    """shl: shifts by the width or more give 0."""
    w = a.itemsize * 8
    return np.where(b >= w, a.dtype.type(0), a << (b & (w - 1)).astype(a.dtype))


def shift_right(a: Array, b: Array) -> Array:
    """shr: shifts by the width or more give 0, or the sign."""
    w = a.itemsize * 8
    if a.dtype.kind == "i":
        return a >> np.minimum(b, w - 1).astype(a.dtype)
    return np.where(b >= w, a.dtype.type(0), a >> (b & (w - 1)).astype(a.dtype))


def divide(a: Array, b: Array) -> Array:
    """div of integers, truncated towards zero."""
    if a.dtype.kind == "u":
        return a // np.maximum(b, 1)
    unsigned = f"u{a.itemsize}"  # in which the least number has a magnitude
    q = (np.abs(a).view(unsigned) // np.maximum(np.abs(b).view(unsigned), 1)).view(a.dtype)
    return np.where((a < 0) != (b < 0), -q, q)


def remainder(a: Array, b: Array) -> Array:
    """rem: of the sign of a."""
    return a - divide(a, b) * b


def bit_field(a: Array, position: int, length: int, signed: bool) -> Array:
    """bfe: `length` bits from `position` on."""
    wide = a.astype(u8) >> u8(position) & u8((1 << length) - 1)
    if signed:
        sign = u8(1 << (length - 1))
        wide = (wide ^ sign) - sign
    return wide.astype(a.dtype)


def byte_permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of the eight of b and a; of a selector with its high bit the byte's sign."""
    pool = (b.astype(u8) << u8(32)) | a
    out = np.zeros_like(a)
    for n in range(4):
        nibble = (selector >> u4(4 * n)) & u4(15)
        byte = (pool >> ((nibble & u4(7)).astype(u8) * u8(8))).astype(u4) & u4(0xFF)
        byte = np.where(nibble & u4(8), np.where(byte & u4(0x80), u4(0xFF), u4(0)), byte)
        out = out | (byte << u4(8 * n))
    return out


def lop3(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: any function of three bits, by its truth table."""
    out = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            out = out | ((a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c))
    return out


def funnel(a: Array, b: Array, s: Array, left: bool) -> Array:
    """shf.wrap: the 64 bits of b and a shifted; the upper half (left) or the lower."""
    wide = (b.astype(u8) << u8(32)) | a
    s = (s & u4(31)).astype(u8)
    return ((wide << s) >> u8(32)).astype(u4) if left else (wide >> s).astype(u4)


def pack(parts: list[Array], width: int) -> Array:
    """Join registers into one of that width, the first lowest."""
    out = np.zeros(len(parts[0]), UNSIGNED[width])
    step = width // len(parts)
    for n, part in enumerate(parts):
        out |= part.astype(out.dtype) << out.dtype.type(n * step)
    return out


def unpack(x: Array, n: int, width: int) -> Array:
    """Return the n-th part of that width."""
    return (x >> x.dtype.type(n * width)).astype(UNSIGNED[width])


# floats


def fma(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32: the product is exact in float64, whose sum with c is rounded twice (seldom another last bit)."""
    return (a.view(f4).astype(f8) * b.view(f4) + c.view(f4)).astype(f4).view(u4)


def flushed(x: Array) -> Array:
    """Replace denormals by the zero of their sign."""
    return np.where(x & u4(0x7F800000), x, x & u4(0x80000000))


def function_f32(name: str, x: Array, flush: bool = False) -> Array:
    """ex2, lg2, rcp, sqrt, rsqrt, tanh: exact, then rounded; flush: denormals become zero before and after."""
    x = (flushed(x) if flush else x).view(f4).astype(f8)
    result = {
        "ex2": lambda: np.exp2(x), "lg2": lambda: np.log2(x), "rcp": lambda: 1 / x, "sqrt": lambda: np.sqrt(x),
        "rsqrt": lambda: 1 / np.sqrt(x), "tanh": lambda: np.tanh(x),
    }[name]().astype(f4).view(u4)  # fmt: skip
    return flushed(result) if flush else result


def div_f32(a: Array, b: Array) -> Array:
    """div.f32: exact, then rounded."""
    return (a.view(f4).astype(f8) / b.view(f4)).astype(f4).view(u4)


def to_bf16(x: Array) -> Array:
    """Round float32 to bfloat16, to nearest even; NaN becomes the canonical one."""
    bits = x.view(u4)
    rounded = ((bits.astype(u8) + u8(0x7FFF) + ((bits >> u4(16)) & u4(1))) >> u8(16)).astype(u2)
    return np.where(np.isnan(x.view(f4)), u2(0x7FFF), rounded)


def from_bf16(x: Array) -> Array:
    """Widen bfloat16 to float32."""
    return x.astype(u4) << u4(16)


def to_f16(x: Array) -> Array:
    """Round float32 to float16, to nearest even; NaN becomes the canonical one."""
    x = x.view(f4)
    return np.where(np.isnan(x), u2(0x7FFF), x.astype(f2).view(u2))


def fma_16(kind: str, a: Array, b: Array, c: Array | None = None) -> Array:
    """mul and fma.rn of f16 and bf16, a b + c: a product is exact in float32, a sum rounded more than once."""
    x, y, *z = (
        (from_bf16(v).view(f4) if kind == "bf16" else v.view(f2)).astype(f8)
        for v in (a, b, c) if v is not None
    )  # fmt: skip
    found = (x * y + z[0] if z else x * y).astype(f4).view(u4)
    return to_bf16(found) if kind == "bf16" else to_f16(found)


def to_tf32(x: Array) -> Array:
    """Round float32 to tf32, to nearest, ties away from zero (cvt.rna); NaN becomes the canonical one."""
    bits = x.view(u4)
    return np.where(np.isnan(x.view(f4)), u4(0x7FFFFFFF), (bits + u4(0x1000)) & u4(0xFFFFE000))


def extreme_of_sizes(function: Callable[[Array, Array], Array], a: Array, b: Array) -> Array:
    """Return `min` or `max` of the absolute values of a and b with the sign of their product (.xorsign.abs)."""
    sizes = function(np.abs(a), np.abs(b))
    return np.where(np.signbit(a) != np.signbit(b), -sizes, sizes)
