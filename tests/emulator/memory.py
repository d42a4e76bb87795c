"""Global memory of one launch: its tensors, what is known of every two bytes, and, where it is weak, its past."""

from __future__ import annotations

import bisect
import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from tests.emulator.values import UNSIGNED, Array, i2, i8, u1, u2

BASE = 0x7F00_0000_0000
GARBAGE = 0xFFA5
"""Each 16 bits of memory that nobody initialised: a NaN of every float type, and not the unpublished pattern."""
NEVER = np.iinfo(i8).max
SECTOR = 32
FAR = 1 << 40
"""From where on, counted from BASE, tensors are spread out; nothing else is so far away."""
NOWHERE = -4096
"""The offset of what does not exist."""


class Spread(NamedTuple):
    """A tensor of which a launch knows another, larger one: runs of bytes, in both of them, in ascending order.

    near, far: where a run begins, from the first byte of the tensor and from that of the larger one; length: its bytes;
    extent: bytes of the larger one.
    """

    near: Array
    far: Array
    length: Array
    extent: int


def raw_bytes(storage: torch.UntypedStorage) -> Array:
    """Return the bytes of a storage, not a copy."""
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


class GlobalMemory:
    """Tensors far apart; `address_of` each by id. Of some a launch knows a larger one, see `spread`.

    Of bytes: valid, inside of a tensor. Of every two: initialised; owner, the CTA that stored them (-1: none); whole,
    of elements of float32, which are not torn.
    Weak: before, the value before the last store that left its buffer, stored, when it left, released, when it was
    released, by `clock`, which counts what becomes visible.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], generator: random.Random, seed: int, weak: bool, torn: bool
    ) -> None:
        self.weak, self.torn = weak, torn
        self.random = np.random.default_rng(seed)
        self.address_of: dict[int, int] = {}
        place = 4096
        storages: dict[int, tuple[int, torch.UntypedStorage]] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages and storage.nbytes():
                storages[storage.data_ptr()] = (place, storage)
                place += (storage.nbytes() + 15) // 16 * 16 + 512 + 16 * generator.randrange(8)
        size = (place + 8192) // 64 * 64
        self.bytes: Array = np.full(size // 2, GARBAGE, u2).view(u1)
        self.valid: Array = np.zeros(size, bool)
        self.initialised: Array = np.zeros(size // 2, bool)
        self.owner: Array = np.full(size // 2, -1, i2)
        self.whole: Array = np.zeros(size // 2, bool)
        self.storages = list(storages.values())
        for start, storage in self.storages:
            self.bytes[start : start + storage.nbytes()] = raw_bytes(storage)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            start, _ = storages.get(storage.data_ptr(), (64, None))
            first = start + (tensor.data_ptr() - storage.data_ptr() if start != 64 else 0)
            self.address_of[id(tensor)] = BASE + first
            if tensor.numel():
                self.know(tensor, first)
        changes = np.flatnonzero(np.diff(self.valid)) + 1
        self.starts, self.ends = changes[::2].tolist(), changes[1::2].tolist()
        self.views = {n: self.bytes.view(UNSIGNED[8 * n]) for n in (1, 2, 4, 8)}
        self.halves: Array = self.views[2]
        self.clock = 0
        self.runs: tuple[Array, Array, Array] | None = None
        if weak:
            self.before: Array = self.halves.copy()
            self.stored: Array = np.zeros(size // 2, i8)
            self.released: Array = np.full(size // 2, NEVER)

    def spread(self, spreads: Mapping[int, Spread]) -> None:
        """Give tensors, by id, addresses as if they were larger: of the larger ones, only their own bytes exist."""
        place, runs = FAR, []
        for key, spread in spreads.items():
            runs.append((spread.far + place, spread.near + self.address_of[key] - BASE, spread.length))
            self.address_of[key] = BASE + place
            place += (spread.extent + 4096) // 512 * 512
        far, near, length = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        self.runs = far, near, length

    def near(self, off: Array, total: int) -> Array:
        """Return where accesses of `total` bytes, at offsets from BASE, really are, or NOWHERE."""
        if self.runs is None:
            return off
        far, near, length = self.runs
        run = np.maximum(np.searchsorted(far, off, "right") - 1, 0)
        within = off - far[run]
        there = (within >= 0) & (within + total <= length[run])
        return np.where(off < FAR // 2, off, np.where(there, near[run] + within, NOWHERE))

    def inside(self, first: int, end: int) -> bool:
        """Whether all bytes of a range are valid."""
        n = bisect.bisect_right(self.starts, first) - 1
        return n >= 0 and end <= self.ends[n]

    @staticmethod
    def rows(halves: Array, total: int) -> Array:
        """Return what is kept of every two bytes as rows for `total` bytes each."""
        return halves.reshape(-1, max(total, 2) // 2)

    def know(self, tensor: torch.Tensor, first: int) -> None:
        """Note the bytes of a tensor as valid, and those of its elements that are not all garbage as initialised."""
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        width = tensor.element_size()
        span = slice(first, first + extent * width)
        self.valid[span] = True
        if tensor.dtype == torch.float32:
            self.whole[first // 2 : (first + extent * width) // 2] = True
        if width >= 2:
            garbage = (self.bytes[span].view(u2).reshape(extent, width // 2) == GARBAGE).all(1)
            self.initialised[first // 2 : (first + extent * width) // 2] |= np.repeat(~garbage, width // 2)
        else:
            self.initialised[first // 2 : (first + extent + 1) // 2] = True

    def copy_back(self) -> None:
        """Write the tensors of the launch."""
        for start, storage in self.storages:
            raw_bytes(storage)[:] = self.bytes[start : start + storage.nbytes()]

    def leave(self, place: int, size: int, value: int) -> None:
        """Make a store visible to all (weak)."""
        spots = slice(place >> 1, (place + size) >> 1)
        self.clock += 1
        self.before[spots] = self.halves[spots]
        self.views[size][place // size] = value
        self.initialised[spots] = True
        self.stored[spots] = self.clock
