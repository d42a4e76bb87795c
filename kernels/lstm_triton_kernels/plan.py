"""Plans of a persistent launch, how it is cut into thread blocks: candidates for a GPU, ranked by an estimate.

Pure functions from sizes and a GPU's limits to frozen plans. The estimate is a model of the time of a step, of which
only differences between plans matter. Which of the ranked plans runs is settled by compiling them (settle.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK, WAIT_US
from lstm_triton_kernels.sizes import Layer, ceil_div, next_power_of_2

PERSISTENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_ALONE = 128
"""Units that one program holds at most: beyond, the accumulators of a step do not fit its registers."""

MOST_CHUNKS = 4
"""Tiles of a block at most: every one is unrolled in the kernel, and compiling takes as long as they are many."""

MOST_TRIES = 4
"""Plans that are compiled at most until one does not spill (settle.py)."""

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
class PersistentPlan:
    """One persistent launch.

    - block_u units and block_b rows in a program's tile, of which `rows` are used; block_k columns in a warp's part of
      a chunk, `split` parts, `chunks` chunks (see resident.py), of which `group` are read at once
    - unit_programs, row_programs, directions: the grid; row_blocks: blocks of rows there are, at least row_programs
    - wait: how programs wait for each other (sync.py), None where each holds all units
    - exact: float32 products without tensor cores
    - accumulator_bytes: of accumulators and gate inputs in a thread; shared_bytes: of a program, both as estimated
    - estimate_us: of one step
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
    accumulator_bytes: int
    shared_bytes: int
    estimate_us: float

    @property
    def alone(self) -> bool:
        """Whether a program holds all units, and waits for nobody."""
        return self.wait is None

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs: parts of the units, groups of row blocks, directions."""
        return self.unit_programs, self.row_programs, self.directions

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return self.unit_programs * self.row_programs * self.directions

    @property
    def blocks_per_program(self) -> int:
        """Row blocks that the busiest program works through in a step."""
        return ceil_div(self.row_blocks, self.row_programs)

    def describe(self) -> str:
        """Return the plan in a few words: `U8 R16/16 K32x8x3 96x1x1 data`.

        Units of a program, rows used of its tile's, columns of a warp's part x parts x chunks (`by` so many where not
        all are read at once), the grid (`of` so many row blocks where a program has several), and the wait, or `alone`.
        """
        columns = f"K{self.block_k}x{self.split}x{self.chunks}"
        columns += f" by {self.group}" if self.group < self.chunks else ""
        grid = f"{self.unit_programs}x{self.row_programs}x{self.directions}"
        grid += f" of {self.row_blocks}" if self.blocks_per_program > 1 else ""
        return f"U{self.block_u} R{self.rows}/{self.block_b} {columns} {grid} {self.wait or 'alone'}"


@dataclass(frozen=True)
class Preference:
    """Wishes of a user or a benchmark for a plan; None: whatever is estimated to be fastest."""

    wait: str | None = None
    block_u: int | None = None
    block_b: int | None = None

    def admits(self, plan: PersistentPlan) -> bool:
        """Return whether the plan is as wanted."""
        wanted = ((self.wait, plan.wait), (self.block_u, plan.block_u), (self.block_b, plan.block_b))
        return all(want is None or want == has for want, has in wanted)


ANY = Preference()


def ranked_plans(
    layer: Layer, backward: bool, gpu: GPU, preference: Preference = ANY
) -> tuple[PersistentPlan, ...] | str:
    """Return every plan of a pass that fits the GPU, the fastest by estimate first; a sentence why if there is none.

    Plans that wait in the usual way come before the others.
    """
    return _ranked_plans(layer._replace(T=0, I=0, training=False), backward, gpu, preference)


@functools.lru_cache(maxsize=4096)
def _ranked_plans(layer: Layer, backward: bool, gpu: GPU, preference: Preference) -> tuple[PersistentPlan, ...] | str:
    obstacle = why_not(layer)
    if obstacle is not None:
        return obstacle
    plans = [plan for plan in candidates(layer, backward, gpu) if preference.admits(plan)]
    if not plans:
        return why_none(layer, gpu, preference)

    def rank(plan: PersistentPlan) -> tuple[object, ...]:
        usual = plan.wait in (None, usual_wait(plan, backward))
        tile = (plan.block_u, plan.block_b, plan.block_k, plan.split, plan.chunks, plan.group)
        return (not usual, plan.estimate_us, plan.programs, tile)

    return tuple(sorted(plans, key=rank))


def why_not(layer: Layer) -> str | None:
    """Return what rules out a persistent plan on any GPU; None if nothing does."""
    if layer.P:
        return "a projection needs a product between two steps, which no persistent kernel has"
    if layer.spec.full and layer.spec.output_current:
        return "a full peephole on c_t needs a product within the step, which no persistent kernel has"
    if layer.dtype not in PERSISTENT_DTYPES:
        return f"{str(layer.dtype).removeprefix('torch.')} has no persistent kernel: its products would spill"
    if layer.B < 1:
        return "there are no rows"
    if layer.H < 1:
        return "there are no units"
    if layer.B * layer.H * max(layer.gates, layer.D) >= 2**31:
        return f"a step of {layer.B} rows and {layer.H} units has more elements than 32-bit offsets reach"
    return None


def why_none(layer: Layer, gpu: GPU, preference: Preference) -> str:
    """Return the sentence why no plan fits."""
    if preference != ANY:
        return f"no plan is {preference}"
    chip = gpu.multiprocessors * gpu.shared_bytes
    return (
        f"no tiles of the recurrent weights, {layer.recurrent_bytes * layer.D / 2**20:.1f} MiB, fit "
        f"{gpu.multiprocessors} programs with room to work, of {chip / 2**20:.1f} MiB shared memory in all and "
        f"{MOST_CHUNKS} chunks of columns at most"
    )


def usual_wait(plan: PersistentPlan, backward: bool) -> str:
    """Return how to wait: by the counter, but in the forward pass of few programs with one row block each.

    Measured on an H200 (benchmarks/NOTES.md): a poll of the data reads all of it, and where many programs poll, these
    reads take longer than the wait. With 96 programs and more the counter is faster, with 32 the data is.
    """
    few = plan.unit_programs <= FEW_PROGRAMS
    return "data" if few and not backward and plan.blocks_per_program == 1 else "counter"


def candidates(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan that fits the GPU: all programs resident, shared memory and registers within their limits."""
    if layer.H <= LARGEST_ALONE:
        yield from _alone(layer, gpu)
    for block_u in (8, 16, 32):
        for block_b in (16, 32):
            yield from _together(layer, backward, gpu, block_u, block_b, num_warps=8 if layer.H > 256 else 4)


def _alone(layer: Layer, gpu: GPU) -> Iterator[PersistentPlan]:
    """One program holds all units; the rows are shared out, in as many programs as it takes."""
    units = max(16, next_power_of_2(layer.H))
    tiles = units * units * (layer.gates + layer.matrices) * layer.element_bytes
    for block_b in (16, 32):
        num_warps = 4 if units <= 64 else 8
        staging = block_b * units * (layer.element_bytes + 4) * 2
        accumulated = (2 * layer.gates + layer.matrices) * block_b * units * 4 // (32 * num_warps)
        if tiles + staging > gpu.shared_bytes or accumulated > REGISTER_BYTES * 2:
            continue
        row_blocks = ceil_div(layer.B, block_b)
        if row_blocks > MOST_PROGRAMS_OF_ROWS:
            continue
        rounds = ceil_div(row_blocks * layer.D, gpu.multiprocessors)
        step = _product_us(layer, gpu, tiles, block_b, units) + ALONE_US
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
            directions=layer.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=None,
            exact=layer.rate == "float32",
            accumulator_bytes=accumulated,
            shared_bytes=tiles + staging,
            estimate_us=step * rounds,
        )


def _together(
    layer: Layer, backward: bool, gpu: GPU, block_u: int, block_b: int, num_warps: int
) -> Iterator[PersistentPlan]:
    """Every program holds block_u units, and waits for those that hold the others."""
    unit_programs = ceil_div(layer.H, block_u)
    row_room = gpu.multiprocessors // (unit_programs * layer.D)
    split = num_warps
    block_k = _block_k(layer, split, block_b)
    chunks = ceil_div(layer.H, split * block_k)
    accumulators = 2 + (layer.matrices > 0) if backward else layer.gates
    accumulated = (accumulators * split + layer.gates) * block_b * block_u * 4 // (32 * num_warps)
    tiles = chunks * split * block_k * block_u * (layer.gates + layer.matrices) * layer.element_bytes
    if unit_programs == 1 or row_room < 1 or chunks > MOST_CHUNKS or accumulated > REGISTER_BYTES:
        return
    rows = min(block_b, ceil_div(layer.B, row_room))
    row_blocks = ceil_div(layer.B, rows)
    row_programs = min(row_room, row_blocks)
    blocks = ceil_div(row_blocks, row_programs)
    read = unit_programs * layer.D * layer.B * exchanged_bytes(layer, backward)
    read_us = read / (gpu.multiprocessors * L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    rest_us = BACKWARD_US * block_b / 16 if backward else FORWARD_US * num_warps * block_u * block_b / 32
    block_us = _product_us(layer, gpu, tiles, block_b, block_u) + rest_us
    for wait, by_programs in WAIT_US.items():
        wait_us = by_programs[max(by_programs)]
        group = chunks
        if tiles + _staging(layer, backward, group, split * block_k, block_b, split * block_u) > gpu.shared_bytes:
            group = 1
        shared_bytes = tiles + _staging(layer, backward, group, split * block_k, block_b, split * block_u)
        if shared_bytes > gpu.shared_bytes:
            continue
        groups = ceil_div(chunks, group) * (layer.gates if backward else 2 if layer.matrices else 1)
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
            directions=layer.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=wait,
            exact=layer.rate == "float32",
            accumulator_bytes=accumulated,
            shared_bytes=shared_bytes,
            # The programs of a row block wait once a step; other blocks are worked on meanwhile.
            estimate_us=max(wait_us + reading_us + block_us, blocks * (reading_us + block_us)) + read_us,
        )


def exchanged_bytes(layer: Layer, backward: bool) -> int:
    """Return bytes of one batch row that every program reads in a step."""
    if backward:
        return layer.gates * layer.H * layer.element_bytes
    return layer.H * (layer.element_bytes + (4 if layer.matrices else 0))


def _staging(layer: Layer, backward: bool, group: int, columns: int, block_b: int, units: int) -> int:
    """Shared memory beside the tiles: the left operands that are read at once, one sum over the warps, and some more.

    Of three gates in a row the compiler keeps two operands at once (tests/compile).
    """
    widest = 4 if layer.matrices and not backward else layer.element_bytes  # c is read in float32
    operands = max(group, 2) if backward and layer.gates == 3 else group
    return (operands * columns * widest + units * 4) * block_b + 4096


def _block_k(layer: Layer, split: int, block_b: int) -> int:
    """Columns of a warp's part of a chunk: the least padding that few enough chunks allow, then the fewest chunks."""
    widest = 32 if layer.element_bytes == 4 or block_b > 16 else 64
    sizes = [size for size in (64, 32, 16) if size <= widest]
    few = [size for size in sizes if ceil_div(layer.H, split * size) <= MOST_CHUNKS] or sizes[:1]
    return min(few, key=lambda size: (ceil_div(layer.H, split * size) * size, -size))


def _product_us(layer: Layer, gpu: GPU, tiles: int, block_b: int, units: int) -> float:
    """The product of a row block with the resident tiles: reading them, or multiplying, whichever takes longer."""
    read = tiles / (SHARED_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    operations = 2 * block_b * units * max(16, layer.H) * (layer.gates + layer.matrices)
    multiply = operations / (gpu.tflop_per_s[layer.rate] / gpu.multiprocessors * 1e6)
    return max(read, 2 * multiply)  # one warp group's mma instructions reach about half of the rate
