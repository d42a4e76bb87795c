"""What instructions do with global memory, strong or weak: ld, st, atom, release and acquire of a gang."""

from __future__ import annotations

import numpy as np

from tests.emulator import Fault
from tests.emulator.counts import count_sectors
from tests.emulator.gangs import Gang
from tests.emulator.memory import SECTOR
from tests.emulator.values import ATOMICS, UNSIGNED, Array, u1, u2

READS_THE_PAST = 0.3
"""How often a weak load reads an older state where it may."""
DISAGREE = "lanes of one store write different values to one place"


def ld_global(
    gang: Gang, address: Array, size: int, n: int, mask: Array | None, order: str, cached: bool, index: int
) -> list[Array]:
    """Load n elements of `size` bytes a lane; order: "weak", "relaxed" (also volatile) or "acquire"."""
    total, memory = size * n, gang.memory
    off, mask = gang.place(address, total, mask, index, "global")
    if not len(off):
        return [np.zeros(gang.n, UNSIGNED[8 * size])] * n
    count_sectors(gang, "ld.global", off, mask)
    if gang.pending or gang.cta.pool:
        settle(gang, off, total)
    rows = off // max(total, 2)
    data = memory.rows(memory.halves, total)[rows]
    if memory.weak and order == "weak":
        data = past(gang, off, rows, data, cached, index)
    if not memory.rows(memory.initialised, total)[rows].all():
        gang.report("initcheck", index, "reads global memory that nobody wrote")
    if size == 1:
        data = (data >> ((off & 1) * 8)[:, None].astype(u2)).astype(u1)
    data = np.ascontiguousarray(data).view(UNSIGNED[8 * size])
    if order == "acquire":
        acquire(gang)
    return gang.spread(data, mask)


def past(gang: Gang, off: Array, rows: Array, data: Array, cached: bool, index: int) -> Array:
    """Return what a weak load may read instead of the data (lanes, halves) that are there now."""
    memory, cta, total = gang.memory, gang.cta, 2 * data.shape[1]
    owner = memory.rows(memory.owner, total)[rows]
    foreign = (owner >= 0) & (owner != cta.number)
    anything = foreign.any()
    if anything and (foreign & (memory.rows(memory.released, total)[rows] > gang.horizon)).any():
        message = "a weak load reads what another CTA stored, with no release and acquire between"
        gang.report("race", index, message)
    early = memory.random.random(len(off)) < READS_THE_PAST
    when = np.where(early, memory.random.integers(gang.horizon, memory.clock + 1, len(off)), memory.clock)
    if cached:
        sector = off // SECTOR
        kept = cta.l1[sector]
        cta.l1[sector] = np.where(kept >= gang.horizon, kept, when)
        when = cta.l1[sector]  # lanes of one sector read one state
    if not anything:
        return data
    late = foreign & (memory.rows(memory.stored, total)[rows] > when[:, None])
    return np.where(late, memory.rows(memory.before, total)[rows], data)


def st_global(
    gang: Gang, address: Array, size: int, values: list[Array], mask: Array | None, releases: bool, index: int
) -> None:
    """Store the values, elements of `size` bytes, of every lane."""
    memory, total = gang.memory, size * len(values)
    if releases:
        release(gang)
    off, mask = gang.place(address, total, mask, index, "global")
    if not len(off):
        return
    if size == 1 and (total > 1 or memory.weak):
        raise Fault("st.global.b8, several or in weak memory")
    count_sectors(gang, "st.global", off, mask)
    data = gang.columns(values, mask, 8 * size)
    if size == 1:
        st_byte(gang, off, data[:, 0], index)
        return
    rows = off // total
    owners = memory.rows(memory.owner, total)
    owner = owners[rows]
    if ((owner >= 0) & (owner != gang.cta.number)).any():
        gang.report("race", index, "stores where another CTA stored in this launch")
    owners[rows] = gang.cta.number
    if memory.weak:
        store_later(gang, off, size, data, index)
        return
    halves = memory.rows(memory.halves, total)
    halves[rows] = data.view(u2)
    memory.rows(memory.initialised, total)[rows] = True
    if (halves[rows] != data.view(u2)).any():
        gang.report("racecheck", index, DISAGREE)


def st_byte(gang: Gang, off: Array, data: Array, index: int) -> None:
    """Store a byte of every lane that is here, in strong memory. What stored it is not kept: two may share 16 bits."""
    memory = gang.memory
    memory.bytes[off] = data
    memory.initialised[off >> 1] = True
    if (memory.bytes[off] != data).any():
        gang.report("racecheck", index, DISAGREE)


def store_later(gang: Gang, off: Array, size: int, data: Array, index: int) -> None:
    """Put data (lanes, n) into the gang's buffer, from which they leave one by one."""
    total = size * data.shape[1]
    if gang.pending or gang.cta.pool:
        settle(gang, off, total)
    gang.unreleased.append((off[:, None] // 2 + np.arange(total // 2)).ravel())
    if gang.memory.torn and size > 2 and not gang.memory.whole[off // 2].all():
        size, data = 2, data.view(u2)
    for lane, start in enumerate(off.tolist()):
        for k, value in enumerate(data[lane].tolist()):
            place = start + k * size
            if gang.pending.get(place, (size, value)) != (size, value):
                gang.report("racecheck", index, DISAGREE)
            gang.pending[place] = (size, value)


def settle(gang: Gang, off: Array, total: int) -> None:
    """Let the stores to these places that the gang must see leave now."""
    places = (off[:, None] + np.arange(-6, total, 2)).ravel().tolist()
    for buffer in (gang.cta.pool, gang.pending):
        if buffer:
            for place in places:
                if place in buffer:
                    gang.memory.leave(place, *buffer.pop(place))


def release(gang: Gang) -> None:
    """Make visible the stores of the gang, and those that a barrier of its CTA ordered before this."""
    memory, cta = gang.memory, gang.cta
    if not memory.weak:
        return
    for buffer in (cta.pool, gang.pending):
        for place, (size, value) in buffer.items():
            memory.leave(place, size, value)
        buffer.clear()
    memory.clock += 1
    for spots in cta.unreleased + gang.unreleased:
        memory.released[spots] = memory.clock
    cta.unreleased, gang.unreleased = [], []


def acquire(gang: Gang) -> None:
    """Let later weak loads of the gang read nothing older than now."""
    gang.horizon = gang.memory.clock


def fence(gang: Gang) -> None:
    """fence.acq_rel, fence.sc, membar."""
    release(gang)
    acquire(gang)


def atomic(
    gang: Gang, address: Array, operation: str, kind: str, values: list[Array], mask: Array | None, order: str,
    index: int,
) -> list[Array]:  # fmt: skip
    """atom and red: lane after lane, on the L2; order: "relaxed", "acquire", "release" or "acq_rel"."""
    memory, bits = gang.memory, int(kind[1:])
    size = bits // 8
    off, mask = gang.place(address, size, mask, index, "global")
    out = np.zeros(gang.n, UNSIGNED[bits])
    if not len(off):
        return [out]
    if order in ("release", "acq_rel"):
        release(gang)
    if gang.pending or gang.cta.pool:
        settle(gang, off, size)
    view = memory.views[size]
    typed = f"{'i' if kind[0] == 's' else 'u'}{size}"
    lanes = np.arange(gang.n) if mask is None else np.nonzero(mask)[0]
    for place, lane in zip(off.tolist(), lanes.tolist(), strict=True):
        old, given = view[place // size], [value[lane] for value in values]
        if operation == "cas":
            new = int(given[1] if old == given[0] else old)
        else:
            new = ATOMICS[operation](int(old.view(typed)), int(given[0].view(typed)))
        if not memory.initialised[place >> 1]:
            gang.report("initcheck", index, "an atomic on memory that nobody wrote")
        out[lane] = old
        view[place // size] = np.array(new & ((1 << bits) - 1), UNSIGNED[bits])
        memory.initialised[place >> 1 : (place + size) >> 1] = True
    memory.clock += 1
    count_sectors(gang, "atom", off, mask)
    if order in ("acquire", "acq_rel"):
        acquire(gang)
    return [out]
