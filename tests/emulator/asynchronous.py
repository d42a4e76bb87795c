"""What instructions do later: cp.async, which copies when it is waited for, and wgmma, which reads shared memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tests.emulator import Fault, shared
from tests.emulator.gangs import Gang
from tests.emulator.global_accesses import ld_global
from tests.emulator.tensor_cores import WARP, gather, operand_addresses, scatter, widen
from tests.emulator.values import Array, f4, u1, u2


class Copy(NamedTuple):
    """A cp.async under way: `given` bytes a lane of `size` come from `source`, the others are 0."""

    to: Array
    source: Array
    size: int
    given: Array
    lanes: Array | None
    instruction: int


def copy(gang: Gang, to: Array, source: Array, size: int, given: Array, mask: Array | None, index: int) -> None:
    """cp.async: to shared memory from global memory."""
    if size < 4:
        raise Fault("cp.async of less than 4 bytes")
    off, lanes = gang.place(to, size, mask, index, "shared")
    gang.copies[-1].append(Copy(to, source, size, given, lanes, index))
    if gang.shared.checked and len(off):
        gang.shared.begin_copy(off, size, gang.warps(lanes), index)


def commit_copies(gang: Gang) -> None:
    """cp.async.commit_group."""
    gang.copies.append([])


def wait_copies(gang: Gang, keep: int) -> None:
    """Copy all groups but the last `keep` (-1: also what was not committed)."""
    done = gang.copies[: max(0, len(gang.copies) - 1 - keep)] if keep >= 0 else gang.copies
    gang.copies = gang.copies[len(done) :] or [[]]
    for group in done:
        for one in group:
            arrive(gang, one)


def arrive(gang: Gang, one: Copy) -> None:
    """Carry out a copy."""
    off, lanes = gang.place(one.to, one.size, one.lanes, one.instruction, "shared")
    if not len(off):
        return
    read = one.given > 0 if lanes is None else (one.given > 0) & lanes
    loaded = ld_global(gang, one.source, 4, one.size // 4, read, "weak", False, one.instruction)
    raw = np.stack(loaded, -1).view(u1)
    raw[np.arange(one.size)[None, :] >= one.given[:, None]] = 0
    data = raw.view(u2) if lanes is None else raw.view(u2)[lanes]
    if gang.shared.checked:
        gang.shared.end_copy(off, one.size)
    gang.shared.store(off, 2, data, gang.warps(lanes), one.instruction)


def fence_proxy(gang: Gang) -> None:
    """fence.proxy.async: wgmma may read what was stored so far."""
    gang.shared.fenced = gang.shared.writes


def operand(gang: Gang, descriptor: int, rows: Array, columns: int, form: str, index: int) -> Array:
    """Return elements (rows, columns) of a K-major operand in shared memory, as float64."""
    size = 4 if form == "tf32" else 2
    off = operand_addresses(descriptor, rows, columns, size) - shared.BASE
    if (off < 0).any() or (off + size > gang.shared.size).any():
        gang.report("memcheck", index, "wgmma reads outside of shared memory")
        off = np.clip(off, 0, gang.shared.size - size) // size * size
    if gang.shared.checked:
        spots = np.unique(np.concatenate([off.ravel() >> 1, (off.ravel() + size - 1) >> 1]))
        gang.shared.begin_product(spots, int(gang.warp[0]), gang.n > WARP, index)
        gang.products[-1].append(spots)
    return widen(gang.shared.view(size, 1)[off // size, 0], form)


def wgmma(
    gang: Gang, form: str, n: int, k: int, acc: list[Array], left: Array | list[Array], right: Array, scale: Array,
    index: int,
) -> list[Array]:  # fmt: skip
    """wgmma.mma_async m64: each warp makes its 16 of a warp group's 64 rows, of n columns.

    left: registers or descriptors; right: descriptors; scale: whether the accumulators are added.
    """
    out = [x.copy() for x in acc]
    for w in range(gang.n // WARP):
        lanes = slice(w * WARP, (w + 1) * WARP)
        quarter = int(gang.warp[w * WARP]) % 4
        if isinstance(left, list):
            a = widen(gather([x[lanes] for x in left], "a", form), form)[0]
        else:
            a = operand(gang, int(left[w * WARP]), quarter * 16 + np.arange(16), k, form, index)
        b = operand(gang, int(right[w * WARP]), np.arange(n), k, form, index)
        product = a @ b.T
        for tile in range(n // 8):
            c = gather([acc[4 * tile + r][lanes] for r in range(4)], "c", form).view(f4)[0]
            c = c if scale[w * WARP] else np.zeros_like(c)
            for r, value in enumerate(scatter((product[:, 8 * tile : 8 * tile + 8] + c)[None])):
                out[4 * tile + r][lanes] = value
    return out


def commit_products(gang: Gang) -> None:
    """wgmma.commit_group."""
    gang.products.append([])


def wait_products(gang: Gang, keep: int) -> None:
    """wgmma.wait_group: all groups but the last `keep` have read their operands."""
    done = gang.products[: max(0, len(gang.products) - 1 - keep)]
    gang.products = gang.products[len(done) :] or [[]]
    for group in done:
        for spots in group:
            gang.shared.end_product(spots)
