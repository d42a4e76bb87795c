"""How a persistent launch is cut into programs: pure functions from sizes and a GPU's limits to a frozen plan.

A plan is chosen among all that fit, by an estimate of the time of a step. The estimate is a model, of which only
differences between plans matter; a GPU decides whether it orders them rightly (`make gpu` measures the candidates).
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK, WAIT_US
from lstm_triton_kernels.plan import ceil_div, next_power_of_2
from lstm_triton_kernels.spills import SPILLS

PERSISTENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_ALONE = 128
"""Units that one program holds at most: beyond, the accumulators of a step do not fit its registers."""

MOST_CHUNKS = 4
"""Tiles of a block at most: every one is unrolled in the kernel, and compiling takes as long as they are many."""

MOST_PROGRAMS_OF_ROWS = 65_535
"""What CUDA allows on the second axis of a grid."""

REGISTER_BYTES = 144
"""Of accumulators and gate inputs in a thread at most; beyond, some release of Triton spills (tests/compile)."""

FEW_PROGRAMS = 32
"""Programs that read each other's data, up to which waiting by the data is faster (H200, benchmarks/NOTES.md)."""

SHARED_BYTES_PER_CLOCK = 128
FORWARD_US = 0.14
"""Sums over the warps, activations and stores, forward: of an output of a thread, times the warps, as every warp
computes all outputs. This and the next two are of an H200 at the shapes of the suites (benchmarks/NOTES.md)."""
BACKWARD_US = 3.3
"""What a row block of 16 rows takes backward beside waiting, reading and products."""
ALONE_US = 1.9
"""What a step takes beside the products where a program holds all units."""
CHECK_US = 0.06
"""Looking whether a chunk has arrived whole, where the data is its own flag. An assumption."""
GROUP_US = {"counter": 0.05, "data": 0.3}
"""Reading what others wrote in one group more: with the counter the loads overlap, else each is a round trip."""


@dataclass(frozen=True)
class Recurrence:
    """What is to be computed: one pass over one layer.

    - B, H, D: rows, units, directions; gates: G; matrices: of a full peephole, Q or 0
    - dtype: of the storage; precision: of float32 products, "tf32" or "ieee"
    - ragged: with lengths or resets, which take registers
    """

    B: int
    H: int
    D: int
    gates: int
    matrices: int
    dtype: torch.dtype
    precision: str
    backward: bool
    ragged: bool = False

    @classmethod
    def of(
        cls, spec: Any, B: int, H: int, D: int, dtype: torch.dtype, precision: str, backward: bool, ragged: bool = False
    ) -> Recurrence:
        """Of a variant."""
        matrices = len(spec.peephole_gates) if spec.full else 0
        return cls(B, H, D, len(spec.gates), matrices, dtype, precision, backward, ragged)

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of the storage type."""
        return self.dtype.itemsize

    @property
    def rate(self) -> str:
        """The name of the matmul rate, as in `limit.Constants`."""
        name = str(self.dtype).removeprefix("torch.")
        return "tf32" if name == "float32" and self.precision == "tf32" else name

    @property
    def rate_class(self) -> str:
        """The same, both half types alike: their kernels differ in the name of an instruction."""
        return "half" if self.element_bytes == 2 else self.rate

    @property
    def exchanged_bytes(self) -> int:
        """Bytes of one batch row that every program reads in a step."""
        if self.backward:
            return self.gates * self.H * self.element_bytes
        return self.H * (self.element_bytes + (4 if self.matrices else 0))


@dataclass(frozen=True)
class PersistentPlan:
    """One persistent launch.

    - block_u units and block_b rows in a program's tile, of which `rows` are used; block_k columns in a warp's part of
      a chunk, `split` parts, `chunks` chunks (see resident.py), of which `group` are read at once
    - unit_programs, row_programs, directions: the grid; row_blocks: blocks of rows there are, at least row_programs
    - wait: how programs wait for each other (sync.py), None where each holds all units
    - exact: float32 products without tensor cores
    - shared_bytes: shared memory of a program at most; estimate_us: of one step
    """

    block_u: int
    block_b: int
    block_k: int
    split: int
    chunks: int
    group: int
    rows: int
    unit_programs: int
    row_programs: int
    directions: int
    row_blocks: int
    num_warps: int
    wait: str | None
    exact: bool
    shared_bytes: int
    estimate_us: float

    @property
    def alone(self) -> bool:
        """Whether a program holds all units, and waits for nobody."""
        return self.wait is None

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.unit_programs * self.row_programs * self.directions

    @property
    def blocks_per_program(self) -> int:
        """Row blocks that the busiest program works through in a step."""
        return ceil_div(self.row_blocks, self.row_programs)

    @property
    def key(self) -> tuple[int | str | None, ...]:
        """What decides which kernel is compiled."""
        one_block = self.blocks_per_program == 1
        tile = (self.block_u, self.block_b, self.block_k, self.split, self.chunks, self.group)
        return (*tile, self.num_warps, self.wait, self.exact, one_block)


@dataclass(frozen=True)
class Preference:
    """What a user or a benchmark wants of a plan; None: whatever is estimated to be fastest."""

    wait: str | None = None
    block_u: int | None = None
    block_b: int | None = None

    def admits(self, plan: PersistentPlan) -> bool:
        """Whether the plan is as wanted."""
        wanted = ((self.wait, plan.wait), (self.block_u, plan.block_u), (self.block_b, plan.block_b))
        return all(want is None or want == has for want, has in wanted)


ANY = Preference()


@functools.lru_cache(maxsize=4096)
def persistent_plan(
    work: Recurrence, gpu: GPU, preference: Preference = ANY, release: str | None = None
) -> PersistentPlan | str:
    """The fastest plan by estimate; where there is none, a sentence why.

    What spills registers under the release of Triton (spills.py; None: under any that was looked at) is not offered.
    """
    obstacle = why_not(work)
    if obstacle is not None:
        return obstacle
    fitting = [plan for plan in candidates(work, gpu) if preference.admits(plan)]
    spilling = spilling_keys(release, gpu.capability, work)
    plans = [plan for plan in fitting if plan.key not in spilling]
    if not plans:
        return why_none(work, gpu, preference, fitting, release)
    usual = [plan for plan in plans if plan.wait in (None, usual_wait(work, plan))]
    return min(usual or plans, key=lambda plan: (plan.estimate_us, plan.programs, plan.key[:6]))


def why_none(
    work: Recurrence, gpu: GPU, preference: Preference, fitting: list[PersistentPlan], release: str | None
) -> str:
    """The sentence why no plan is offered."""
    if fitting:
        return f"every plan that fits spills registers under Triton {release or 'of some release'}"
    if preference != ANY:
        return f"no plan is {preference}"
    weights = work.H * work.H * (work.gates + work.matrices) * work.element_bytes * work.D
    chip = gpu.multiprocessors * gpu.shared_bytes
    return (
        f"no tiles of the recurrent weights, {weights / 2**20:.1f} MiB, fit {gpu.multiprocessors} programs with room "
        f"to work, of {chip / 2**20:.1f} MiB shared memory in all and {MOST_CHUNKS} chunks of columns at most"
    )


def usual_wait(work: Recurrence, plan: PersistentPlan) -> str:
    """How to wait: by the counter, but in the forward pass of few programs with one row block each.

    Measured on an H200 (benchmarks/NOTES.md): a poll of the data reads all of it, and where many programs poll, these
    reads take longer than the wait. With 96 programs and more the counter is faster, with 32 the data is.
    """
    few = plan.unit_programs <= FEW_PROGRAMS
    return "data" if few and not work.backward and plan.blocks_per_program == 1 else "counter"


def spilling_keys(release: str | None, capability: int, work: Recurrence) -> frozenset[tuple[Any, ...]]:
    """Keys of the plans that spill for such work under a release ("3.8"), or under any that was looked at."""
    releases = [release] if release in SPILLS else list(SPILLS)
    kind = (capability, work.rate_class, work.gates, work.matrices, work.backward, work.ragged)
    return frozenset().union(*(SPILLS[known].get(kind, ()) for known in releases))


@functools.cache
def installed_release() -> str | None:
    """The release of Triton that is installed, as "3.8"; None where there is none."""
    try:
        return ".".join(importlib.metadata.version("triton").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not(work: Recurrence) -> str | None:
    """What rules out a persistent plan on any GPU; None if nothing does."""
    if work.dtype not in PERSISTENT_DTYPES:
        return f"{str(work.dtype).removeprefix('torch.')} has no persistent kernel: its products would spill"
    if work.B < 1:
        return "there are no rows"
    if work.H < 1:
        return "there are no units"
    if work.B * work.H * max(work.gates, work.D) >= 2**31:
        return f"a step of {work.B} rows and {work.H} units has more elements than 32-bit offsets reach"
    return None


def candidates(work: Recurrence, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan that fits the GPU: all programs resident, shared memory and registers within their limits."""
    if work.H <= LARGEST_ALONE:
        yield from _alone(work, gpu)
    for block_u in (8, 16, 32):
        for block_b in (16, 32):
            yield from _together(work, gpu, block_u, block_b, num_warps=8 if work.H > 256 else 4)


def _alone(work: Recurrence, gpu: GPU) -> Iterator[PersistentPlan]:
    """One program holds all units; the rows are shared out, in as many programs as it takes."""
    units = max(16, next_power_of_2(work.H))
    tiles = units * units * (work.gates + work.matrices) * work.element_bytes
    for block_b in (16, 32):
        num_warps = 4 if units <= 64 else 8
        staging = block_b * units * (work.element_bytes + 4) * 2
        accumulated = (2 * work.gates + work.matrices) * block_b * units * 4 // (32 * num_warps)
        if tiles + staging > gpu.shared_bytes or accumulated > REGISTER_BYTES * 2:
            continue
        row_blocks = ceil_div(work.B, block_b)
        if row_blocks > MOST_PROGRAMS_OF_ROWS:
            continue
        turns = ceil_div(row_blocks * work.D, gpu.multiprocessors)
        step = _product_us(work, gpu, tiles, block_b, units) + ALONE_US
        yield PersistentPlan(
            block_u=units,
            block_b=block_b,
            block_k=units,
            split=1,
            chunks=1,
            group=1,
            rows=block_b,
            unit_programs=1,
            row_programs=row_blocks,
            directions=work.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=None,
            exact=work.rate == "float32",
            shared_bytes=tiles + staging,
            estimate_us=step * turns,
        )


def _together(work: Recurrence, gpu: GPU, block_u: int, block_b: int, num_warps: int) -> Iterator[PersistentPlan]:
    """Every program holds block_u units, and waits for those that hold the others."""
    unit_programs = ceil_div(work.H, block_u)
    row_room = gpu.multiprocessors // (unit_programs * work.D)
    split = num_warps
    block_k = _block_k(work, split, block_b)
    chunks = ceil_div(work.H, split * block_k)
    accumulators = 2 + (work.matrices > 0) if work.backward else work.gates
    accumulated = (accumulators * split + work.gates) * block_b * block_u * 4 // (32 * num_warps)
    tiles = chunks * split * block_k * block_u * (work.gates + work.matrices) * work.element_bytes
    if unit_programs == 1 or row_room < 1 or chunks > MOST_CHUNKS or accumulated > REGISTER_BYTES:
        return
    rows = min(block_b, ceil_div(work.B, row_room))
    row_blocks = ceil_div(work.B, rows)
    row_programs = min(row_room, row_blocks)
    turns = ceil_div(row_blocks, row_programs)
    read = unit_programs * work.D * work.B * work.exchanged_bytes
    read_us = read / (gpu.multiprocessors * L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    rest_us = BACKWARD_US * block_b / 16 if work.backward else FORWARD_US * num_warps * block_u * block_b / 32
    block_us = _product_us(work, gpu, tiles, block_b, block_u) + rest_us
    for wait, by_programs in WAIT_US.items():
        wait_us = by_programs[max(by_programs)]
        group = chunks
        if tiles + _staging(work, group, split * block_k, block_b, split * block_u) > gpu.shared_bytes:
            group = 1
        shared_bytes = tiles + _staging(work, group, split * block_k, block_b, split * block_u)
        if shared_bytes > gpu.shared_bytes:
            continue
        groups = ceil_div(chunks, group) * (work.gates if work.backward else 2 if work.matrices else 1)
        reading_us = GROUP_US[wait] * (groups - 1) + (CHECK_US * groups if wait == "data" else 0.0)
        yield PersistentPlan(
            block_u=block_u,
            block_b=block_b,
            block_k=block_k,
            split=split,
            chunks=chunks,
            group=group,
            rows=rows,
            unit_programs=unit_programs,
            row_programs=row_programs,
            directions=work.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=wait,
            exact=work.rate == "float32",
            shared_bytes=shared_bytes,
            # The programs of a row block wait once a step; other blocks are worked on meanwhile.
            estimate_us=max(wait_us + reading_us + block_us, turns * (reading_us + block_us)) + read_us,
        )


def _staging(work: Recurrence, group: int, columns: int, block_b: int, units: int) -> int:
    """Shared memory beside the tiles: the left operands that are read at once, one sum over the warps, and some more.

    Of three gates in a row the compiler keeps two operands at once (tests/compile).
    """
    widest = 4 if work.matrices and not work.backward else work.element_bytes  # c is read in float32
    operands = max(group, 2) if work.backward and work.gates == 3 else group
    return (operands * columns * widest + units * 4) * block_b + 4096


def _block_k(work: Recurrence, split: int, block_b: int) -> int:
    """Columns of a warp's part of a chunk: the least padding that few enough chunks allow, then the fewest chunks."""
    widest = 32 if work.element_bytes == 4 or block_b > 16 else 64
    sizes = [size for size in (64, 32, 16) if size <= widest]
    few = [size for size in sizes if ceil_div(work.H, split * size) <= MOST_CHUNKS] or sizes[:1]
    return min(few, key=lambda size: (ceil_div(work.H, split * size) * size, -size))


def _product_us(work: Recurrence, gpu: GPU, tiles: int, block_b: int, units: int) -> float:
    """The product of a row block with the resident tiles: reading them, or multiplying, whichever takes longer."""
    read = tiles / (SHARED_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    operations = 2 * block_b * units * max(16, work.H) * (work.gates + work.matrices)
    multiply = operations / (gpu.tflop_per_s[work.rate] / gpu.multiprocessors * 1e6)
    return max(read, 2 * multiply)  # one warp group's mma instructions reach about half of the rate
