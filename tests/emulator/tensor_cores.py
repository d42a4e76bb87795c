"""Register layouts and products of the tensor cores: mma.sync, and the operands of wgmma in shared memory.

Operands are exact in float64, in which products are summed, and the sum is rounded to float32 once an instruction. Of
tf32 operands the lower 13 bits are ignored: what the hardware does with raw float32 bits. `form` is "f16", "bf16" or
"tf32".
"""

from __future__ import annotations

import functools

import numpy as np

from tests.emulator.values import Array, f2, f4, f8, u2, u4

WARP = 32


@functools.cache
def fragment(which: str, form: str) -> Array:
    """Return for each element of a matrix its index into (32 lanes, registers, elements of a register).

    which: "a" (16 rows, 16 or of tf32 8 columns), "b" (16 or 8 rows, 8 columns), "c" (16, 8). PTX ISA, "Matrix
    fragments for mma.m16n8k16" and "for mma.m16n8k8".
    """
    lane = np.arange(WARP)
    group, member = lane // 4, lane % 4
    elements = 1 if form == "tf32" else 2  # of a register
    depth = 8 * elements
    if which == "a":
        out = np.zeros((16, depth), int)
        for r in range(4):
            for e in range(elements):
                out[group + 8 * (r % 2), member * elements + e + depth // 2 * (r // 2)] = (lane * 4 + r) * elements + e
    elif which == "b":
        out = np.zeros((depth, 8), int)
        for r in range(2):
            for e in range(elements):
                out[member * elements + e + depth // 2 * r, group] = (lane * 2 + r) * elements + e
    else:
        out = np.zeros((16, 8), int)
        for r in range(4):
            out[group + 8 * (r // 2), member * 2 + r % 2] = lane * 4 + r
    return out


def widen(bits: Array, form: str) -> Array:
    """Return operands as float64."""
    if form == "tf32":
        return (bits & u4(0xFFFFE000)).view(f4).astype(f8)
    if form == "bf16":
        return (bits.astype(u4) << u4(16)).view(f4).astype(f8)
    return bits.view(f2).astype(f8)


def gather(registers: list[Array], which: str, form: str) -> Array:
    """Return the matrices (warps, rows, columns) of raw elements that registers hold."""
    stacked = np.stack(registers, -1).reshape(-1, WARP * len(registers))
    if form != "tf32" and which != "c":
        stacked = stacked.view(u2)
    return stacked.take(fragment(which, form), 1)


def scatter(result: Array) -> list[Array]:
    """Return the four registers of accumulators (warps, 16, 8)."""
    flat = np.empty((len(result), WARP * 4), u4)
    flat[:, fragment("c", "f16")] = result.astype(f4).view(u4)
    return list(flat.reshape(-1, 4).T.copy())


def mma(form: str, a: list[Array], b: list[Array], c: list[Array]) -> list[Array]:
    """mma.sync m16n8k16, of tf32 m16n8k8: a @ b + c of every warp."""
    product = widen(gather(a, "a", form), form) @ widen(gather(b, "b", form), form)
    return scatter(product + gather(c, "c", form).view(f4))


def operand_addresses(descriptor: int, rows: Array, columns: int, size: int) -> Array:
    """Return the addresses (rows, columns) of a K-major operand of wgmma in shared memory, of elements of `size` bytes.

    PTX ISA, "Matrix descriptor" and "Shared memory matrix layout"; a base offset is not modelled.
    """
    start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
    leading, mode = (descriptor >> 16 & 0x3FFF) << 4, descriptor >> 62 & 3
    if descriptor >> 49 & 7:
        raise ValueError("base offset of a descriptor")
    byte = np.arange(columns)[None, :] * size
    if mode == 0:  # core matrices of 8 rows x 16 bytes
        address = start + (rows[:, None] // 8) * stride + (rows[:, None] % 8) * 16
        return address + byte // 16 * leading + byte % 16
    width = {1: 128, 2: 64, 3: 32}[mode]
    address = start + (rows[:, None] // 8) * stride + (rows[:, None] % 8) * width + byte
    return address ^ ((address >> 7 & (width // 16 - 1)) << 4)
