"""What instructions do across the lanes of a warp: shfl, redux, vote."""

from __future__ import annotations

import numpy as np

from tests.emulator import Fault
from tests.emulator.gangs import Gang
from tests.emulator.tensor_cores import WARP
from tests.emulator.values import Array, i4, u4, u8

REDUCTIONS = {
    "max": np.maximum, "min": np.minimum, "add": np.add, "or": np.bitwise_or, "and": np.bitwise_and,
    "xor": np.bitwise_xor,
}  # fmt: skip


def whole_warps(gang: Gang, mask: Array | None, index: int) -> None:
    """Report an instruction of whole warps that a part of a warp executes."""
    if mask is not None:
        lanes = mask.reshape(-1, WARP)
        if (lanes.any(1) != lanes.all(1)).any():
            gang.report("synccheck", index, "a part of a warp executes it")


def shuffle(mode: str, a: Array, b: Array, c: int) -> list[Array]:
    """shfl.sync: the value of another lane, its own where that is outside of its segment, and whether it is inside."""
    lane = np.arange(len(a)) % WARP
    b, clamp, segment = (b & u4(31)).astype(int), c & 31, c >> 8 & 31
    most, least = (lane & segment) | (clamp & ~segment), lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment)}[mode]
    fits = source >= most if mode == "up" else source <= most
    source = np.where(fits, source, lane) + np.arange(len(a)) // WARP * WARP
    return [a[source], fits]


def reduce(operation: str, kind: str, a: Array, members: Array) -> list[Array]:
    """redux.sync of whole warps."""
    if (members != u4(0xFFFFFFFF)).any():
        raise Fault("redux of some lanes of a warp")
    lanes = a.view(i4 if kind == "s32" else u4).reshape(-1, WARP)
    result = REDUCTIONS[operation].reduce(lanes, 1).astype(lanes.dtype)
    return [np.repeat(result, WARP).view(u4)]


def vote(mode: str, a: Array) -> list[Array]:
    """vote.sync of whole warps: any, all, ballot."""
    lanes = a.reshape(-1, WARP)
    if mode == "ballot":
        return [np.repeat((lanes.astype(u8) << np.arange(WARP, dtype=u8)).sum(1).astype(u4), WARP)]
    return [np.repeat({"any": lanes.any(1), "all": lanes.all(1)}[mode], WARP)]
