"""Shared memory of one thread block, and its checks: races between warps, and reads of what nobody wrote."""

from __future__ import annotations

import numpy as np

from tests.emulator.findings import Findings
from tests.emulator.memory import GARBAGE
from tests.emulator.values import UNSIGNED, Array, i8, u1, u2

BASE = 0x400
SEVERAL = 63
"""In place of a warp's number: several warps. A CTA has 32 at most."""


class SharedMemory:
    """The bytes, and where they are checked, of every two who wrote and who read them last.

    epoch: how many barriers there were. writer, reader: 64 times the epoch plus the warp, -1 if nobody did. writes: how
    many stores there were; fenced: that number at the last fence.proxy.async. flight: how many copies are on their way
    to two bytes; product: how many unfinished wgmma read them; write_number: the store that wrote them.
    """

    def __init__(self, size: int, checked: bool, findings: Findings) -> None:
        self.size, self.checked, self.findings = size, checked, findings
        halves = (size + 31) // 16 * 8
        self.halves: Array = np.full(halves, GARBAGE, u2)
        self.views: dict[tuple[int, int], Array] = {}
        self.epoch = self.writes = self.fenced = self.copies = self.products = 0
        if checked:
            self.writer, self.reader = np.full(halves, -1, i8), np.full(halves, -1, i8)
            self.write_number, self.flight, self.product = (np.zeros(halves, i8) for _ in range(3))

    def view(self, size: int, n: int) -> Array:
        """Return the memory as rows of n elements of that many bytes."""
        if (size, n) not in self.views:
            total = size * n
            whole = self.halves.view(u1)
            self.views[size, n] = whole[: len(whole) // total * total].view(UNSIGNED[8 * size]).reshape(-1, n)
        return self.views[size, n]

    @staticmethod
    def rows(halves: Array, total: int) -> Array:
        """Return what is kept of every two bytes as rows for `total` bytes each."""
        return halves.reshape(-1, max(total, 2) // 2)

    def store(self, off: Array, size: int, data: Array, warps: Array, index: int) -> None:
        """Store data (lanes, n) of `size` bytes an element; warps: of each lane."""
        n = data.shape[1]
        view = self.view(size, n)
        rows = off // (size * n)
        self.writes += 1
        if self.checked:
            self.wrote(off, size * n, warps, index, data)
        view[rows] = data
        if self.checked and (view[rows] != data).any():
            self.findings.report("racecheck", index, "lanes of one store write different values to one place")

    def read(self, off: Array, total: int, warps: Array, index: int) -> None:
        """Check a load of `total` bytes a lane."""
        if not len(off):
            return
        rows, mine, now = off // max(total, 2), self.epoch * 64 + warps[:, None], self.epoch * 64
        self.check_flight(rows, total, index)
        writer = self.rows(self.writer, total)[rows]
        if writer.max() >= now:
            other = (writer >= now) & (writer != mine)
            if other.any():
                reader = int(warps[np.nonzero(other)[0][0]])
                message = f"reads what another warp wrote since the last barrier (warp {reader})"
                self.findings.report("racecheck", index, message)
        if writer.min() < 0:
            self.findings.report("initcheck", index, "reads shared memory that was never written")
        self.remember(self.rows(self.reader, total), rows, mine)

    def wrote(self, off: Array, total: int, warps: Array, index: int, data: Array) -> None:
        """Check a store of `total` bytes a lane; data: what it writes, not yet there."""
        if not len(off):
            return
        rows, mine, now = off // max(total, 2), self.epoch * 64 + warps[:, None], self.epoch * 64
        self.check_flight(rows, total, index)
        writer, reader = self.rows(self.writer, total)[rows], self.rows(self.reader, total)[rows]
        if writer.max() >= now and total >= 2:
            other = (writer >= now) & (writer != mine)
            if (other & (self.rows(self.halves, total)[rows] != np.ascontiguousarray(data).view(u2))).any():
                message = "writes another value where another warp wrote since the last barrier"
                self.findings.report("racecheck", index, message)
        if reader.max() >= now and ((reader >= now) & (reader != mine)).any():
            self.findings.report("racecheck", index, "writes what another warp read since the last barrier")
        if self.products and self.rows(self.product, total)[rows].any():
            self.findings.report("racecheck", index, "writes what a wgmma in flight reads")
        self.rows(self.write_number, total)[rows] = self.writes
        self.remember(self.rows(self.writer, total), rows, mine)

    def check_flight(self, rows: Array, total: int, index: int) -> None:
        """Report an access to what a cp.async is still copying."""
        if self.copies and self.rows(self.flight, total)[rows].any():
            self.findings.report("racecheck", index, "touches bytes of a cp.async in flight")

    def remember(self, who: Array, rows: Array, mine: Array) -> None:
        """Note who touched these; several where other warps did in this epoch, be it by this very instruction."""
        now = self.epoch * 64
        before = who[rows]
        new = np.where((before >= now) & (before != mine), now + SEVERAL, mine)
        who[rows] = new
        again = who[rows] != new
        if again.any():
            lanes, columns = np.nonzero(again)
            who[rows[lanes], columns] = now + SEVERAL

    def begin_copy(self, off: Array, size: int, warps: Array, index: int) -> None:
        """Note a cp.async to these bytes as on its way (where checked)."""
        self.wrote(off, size, warps, index, np.full((len(off), size // 2), GARBAGE, u2))
        rows = off // size
        self.rows(self.writer, size)[rows] = -1
        np.add.at(self.rows(self.flight, size), rows, 1)
        self.copies += len(off)

    def end_copy(self, off: Array, size: int) -> None:
        """Note that it arrived (where checked)."""
        np.add.at(self.rows(self.flight, size), off // size, -1)
        self.copies -= len(off)

    def begin_product(self, spots: Array, warp: int, whole: bool, index: int) -> None:
        """Check what a wgmma reads (where checked); whole: it is executed by the warps of the CTA together."""
        writer, now = self.writer[spots], self.epoch * 64
        if (writer < 0).any():
            self.findings.report("initcheck", index, "wgmma reads shared memory that was never written")
        if (self.write_number[spots] > self.fenced).any():
            self.findings.report("racecheck", index, "wgmma reads what no fence.proxy.async ordered before it")
        if not whole and ((writer >= now) & (writer != now + warp)).any():
            self.findings.report("racecheck", index, "wgmma reads what another warp wrote since the last barrier")
        if whole and (writer >= now).any():
            self.findings.report("racecheck", index, "wgmma reads what was written since the last barrier")
        self.product[spots] += 1
        self.products += 1

    def end_product(self, spots: Array) -> None:
        """Note that it has read its operands (where checked)."""
        self.product[spots] -= 1
        self.products -= 1
