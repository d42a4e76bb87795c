"""What instructions do with shared memory: ld, st, ldmatrix, stmatrix of a gang."""

from __future__ import annotations

import numpy as np

from tests.emulator import Fault
from tests.emulator.counts import count_phases, count_shared
from tests.emulator.gangs import Gang
from tests.emulator.tensor_cores import WARP
from tests.emulator.values import Array, u2, u4


def ld_shared(gang: Gang, address: Array, size: int, n: int, mask: Array | None, index: int) -> list[Array]:
    """Load n elements of `size` bytes a lane."""
    off, mask = gang.place(address, size * n, mask, index, "shared")
    if gang.shared.checked:
        gang.shared.read(off, size * n, gang.warps(mask), index)
        count_shared(gang, "ld.shared", off, size * n, mask, index)
    return gang.spread(gang.shared.view(size, n)[off // (size * n)], mask)


def st_shared(gang: Gang, address: Array, size: int, values: list[Array], mask: Array | None, index: int) -> None:
    """Store the values, elements of `size` bytes, of every lane."""
    n = len(values)
    off, mask = gang.place(address, size * n, mask, index, "shared")
    data = gang.columns(values, mask, 8 * size)
    gang.shared.store(off, size, data, gang.warps(mask), index)
    count_shared(gang, "st.shared", off, size * n, mask, index)


def matrix_rows(gang: Gang, address: Array, n: int, mask: Array | None, index: int) -> tuple[Array, Array | None]:
    """Return the offsets of the rows of n matrices, 8 a matrix, and the lanes that gave them."""
    lanes = np.tile(np.arange(WARP) < 8 * n, gang.n // WARP)
    if mask is not None:
        lanes &= mask
    off, kept = gang.place(address, 16, lanes, index, "shared")
    if len(off) != lanes.sum():
        raise Fault(f"matrix outside: {gang.launch.kernel.instructions[index]}")
    return off, kept


def ldmatrix(gang: Gang, address: Array, n: int, transposed: bool, mask: Array | None, index: int) -> list[Array]:
    """Load n matrices of 8 rows of 16 bytes a warp; transposed as elements of 2 bytes."""
    off, lanes = matrix_rows(gang, address, n, mask, index)
    if gang.shared.checked:
        gang.shared.read(off, 16, gang.warps(lanes), index)
    if gang.cta.counting:
        count_phases(gang.cta, "ldmatrix", off.reshape(-1, 8), 16, index)
    data = gang.shared.view(2, 8)[off >> 4].reshape(-1, n, 8, 8)
    if transposed:
        data = data.transpose(0, 1, 3, 2)
    data = np.ascontiguousarray(data).view(u4).reshape(-1, n, WARP)
    if mask is not None:  # warps that are here
        whole = np.zeros((gang.n // WARP, n, WARP), u4)
        whole[mask.reshape(-1, WARP).all(1)] = data
        data = whole
    return list(data.transpose(1, 0, 2).reshape(n, -1))


def stmatrix(gang: Gang, address: Array, values: list[Array], transposed: bool, mask: Array | None, index: int) -> None:
    """Store one matrix of 8 rows of 16 bytes a warp for each value."""
    n = len(values)
    off, lanes = matrix_rows(gang, address, n, mask, index)
    data = np.stack(values, 0).reshape(n, -1, WARP).transpose(1, 0, 2)
    data = np.ascontiguousarray(data).view(u2).reshape(-1, n, 8, 8)
    if transposed:
        data = data.transpose(0, 1, 3, 2)
    if mask is not None:
        data = data[mask.reshape(-1, WARP).all(1)]
    gang.shared.store(off, 2, np.ascontiguousarray(data).reshape(-1, 8), gang.warps(lanes), index)
    if gang.cta.counting:
        count_phases(gang.cta, "stmatrix", off.reshape(-1, 8), 16, index)
