"""Counts of what the thread blocks of a launch execute: instructions by kind, wavefronts, sectors.

A wavefront is a turn of the banks of shared memory: an access of a warp takes as many as the most words that one bank
has of it. A phase is what one wavefront can serve: 32, 16 or 8 lanes of 4, 8 or 16 bytes.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from tests.emulator.gangs import CTA, Gang
from tests.emulator.memory import SECTOR
from tests.emulator.parse import Kernel
from tests.emulator.tensor_cores import WARP
from tests.emulator.values import Array, i8

BANKS = 32


def count_phases(cta: CTA, kind: str, offsets: Array, total: int, index: int) -> None:
    """Count the wavefronts of phases (phases, lanes) of accesses of `total` bytes; offset -1: no access."""
    for phase in offsets:
        phase = phase[phase >= 0]
        if len(phase):
            words = np.unique((phase[:, None] >> 2) + np.arange(total // 4))
            ways = int(np.bincount(words % BANKS).max())
            cta.stats[f"{kind} wavefronts"] += ways
            cta.stats[f"{kind} phases"] += 1
            cta.ways[index, ways] += 1


def of_lanes(gang: Gang, values: Array, mask: Array | None) -> Array:
    """Return values of the lanes that are here for all lanes, -1 for the others."""
    full = np.full(gang.n, -1, i8)
    full[slice(None) if mask is None else mask] = values
    return full


def count_shared(gang: Gang, kind: str, offsets: Array, total: int, mask: Array | None, index: int) -> None:
    """Count the wavefronts of a load or store of `total` bytes a lane."""
    if gang.cta.counting:
        lanes = WARP if total <= 4 else WARP * 4 // total
        count_phases(gang.cta, kind, of_lanes(gang, offsets, mask).reshape(-1, lanes), max(total, 4), index)


def count_sectors(gang: Gang, kind: str, offsets: Array, mask: Array | None) -> None:
    """Count the warps that ask global memory for anything, and the sectors of 32 bytes that they ask for."""
    if gang.cta.counting:
        for warp in of_lanes(gang, offsets // SECTOR, mask).reshape(-1, WARP):
            if sectors := len(np.unique(warp[warp >= 0])):
                gang.cta.stats[f"{kind} sectors"] += sectors
                gang.cta.stats[f"{kind} requests"] += 1


def statistics(cta: CTA, kernel: Kernel) -> Counter[str]:
    """Return what a CTA executed: instructions of warps by kind, sectors, wavefronts; loops that wait apart."""
    total: Counter[str] = Counter()
    for name, times in cta.stats.items():
        if not name.startswith("segment "):
            total[name] += times
            continue
        number = int(name[8:])
        for kind, n in kernel.segments[number].kinds.items():
            total["(instructions of retries)" if number in kernel.retry else kind] += n * times
    return total
