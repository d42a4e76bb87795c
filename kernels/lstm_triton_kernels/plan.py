"""Plans of a persistent launch, how it is cut into thread blocks: candidates for a GPU, ranked by an estimate.

Pure functions from sizes and a GPU's limits to frozen plans. The estimate is a model of the time of a step, of which
only differences between plans matter. Which of the ranked plans runs is settled by compiling them (settle.py).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK
from lstm_triton_kernels.sizes import Layer, ceil_div, next_power_of_2

PERSISTENT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_ALONE = 128
"""Units that one program holds at most: beyond, the accumulators of a step do not fit its registers."""

MOST_CHUNKS = 8
"""Chunks at most: every one is unrolled in the kernel, and compiling takes as long as they are many."""

MOST_TRIES = 4
"""Plans that are compiled at most until one does not spill (settle.py)."""

MOST_PROGRAMS_OF_ROWS = 65_535
"""What CUDA allows on the second axis of a grid."""

REGISTER_BYTES = {False: 160, True: 80}
"""Of accumulators and gate inputs in a thread, at most; beyond, some release of Triton spills. True: of float32
products without tensor cores."""
ALONE_REGISTER_BYTES = 320
"""The same where a program holds all units."""
CHUNK_BYTES = 128
"""Of one right operand in a thread, at most."""
READ_BYTES = {False: 512, True: 128}
"""Of all right operands that a thread reads at once, at most; keys as above."""

CHUNK_COLUMNS = 128
"""A chunk more costs about as much as so many columns of padding, by simulation: two barriers, and latencies."""

# Constants of the estimate: fitted to 254 steps measured on an H100 with Triton 3.6, of up to 13 plans a pass
# (benchmarks/results/h100-80gb-hbm3-2026-11-26-trial-plans*.txt and -steps-2.jsonl).
SHARED_BYTES_PER_CLOCK = 128
PRODUCT_RATE = {True: 0.2, False: 0.5}
"""The part of the GPU's rate that the products reach: without tensor cores (True, by simulation), with them."""
REST_US = 0.63
"""What a row block takes beside waiting, reading and the traffic of its product with shared memory."""
OUTPUT_US = {False: 0.3, True: 0.14}
"""And for every output of a thread, activations and stores; forward, and backward (True)."""
TRAFFIC = {False: 1.0, True: 1.4}
"""How many times its bytes what a product moves through shared memory counts, likewise."""
COUNTER_US, READS = {False: 0.69, True: 0.62}, {False: 1.36, True: 0.6}
"""Waiting by the counter, from the last store of a step to the first load of the next, whatever the programs are; and
how many times the rate of L2 what they read takes, likewise."""
POLL_US, POLL_US_PER_KIB, POLL_US_PER_KIB_2 = 0.4, {False: 0.012, True: 0.017}, {False: 0.0004, True: 0.0}
"""Waiting by the data, its last read included: for each 1,024 bytes that a program reads in a step, likewise; and for
the square of those, where a program has one row block and so nothing to do while it waits."""
NARROW_US_PER_KIB = 0.5
"""The same where rows do not begin on 16 bytes, so that every load is narrow."""
PAUSE, PAUSE_PER_KIB, MOST_PAUSE = 300, 25, 800
"""Clocks from a program's last store to its first poll of the data: the best of 0, 400, 600 and 800 on an H100, for 2
to 64 KiB. With several row blocks a program has other work meanwhile, and none is best."""
GROUP_US = 0.3
"""Reading what others wrote in one group more."""
ALONE_US = {False: (1.1, 2.8), True: (1.25, 4.0)}
"""Where a program holds all units: what a step takes, and how many times its product; forward, and backward (True)."""

WAITING_MARGIN = 1.2
"""How much longer a plan without waiting may take by estimate, and still be preferred: it leaves the rest of the GPU to
others, and cannot time out."""


@dataclass(frozen=True)
class PersistentPlan:
    """One persistent launch.

    - block_u units and block_b rows in a program's tile, of which `rows` are used; block_k columns in a part of a
      chunk, `parts` parts, `chunks` chunks (see resident.py), of which `group` are read at once
    - unit_programs, row_programs, directions: the grid; row_blocks: blocks of rows there are, at least row_programs
    - wait: how programs wait for each other (sync.py), None where each holds all units; pause: clocks before the first
      poll of the data
    - exact: float32 products without tensor cores
    - tile_bytes: of the resident weights of a program, padding included
    - accumulator_bytes: of accumulators and gate inputs in a thread; shared_bytes: of a program, both as estimated
    - estimate_us: of one step
    """

    block_u: int
    block_b: int
    block_k: int
    parts: int
    chunks: int
    group: int
    rows: int
    unit_programs: int
    row_programs: int
    directions: int
    row_blocks: int
    num_warps: int
    wait: str | None
    pause: int
    exact: bool
    tile_bytes: int
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

        Units of a program, rows used of its tile's, columns of a part x parts x chunks (`by` so many where not all are
        read at once), the grid (`of` so many row blocks where a program has several), and the wait, or `alone`.
        """
        columns = f"K{self.block_k}x{self.parts}x{self.chunks}"
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

    A plan without waiting may take a little longer, and still comes first.
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
        tile = (plan.block_u, plan.block_b, plan.block_k, plan.parts, plan.chunks, plan.group)
        return (plan.estimate_us * (1.0 if plan.alone else WAITING_MARGIN), plan.programs, tile)

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


def candidates(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan that fits the GPU: all programs resident, shared memory and registers within their limits."""
    if layer.H <= LARGEST_ALONE:
        yield from _alone(layer, backward, gpu)
    for block_u in (8, 16, 32):  # backward, 8 units fill half of the rows that tensor cores take at once
        for block_b in (8, 16, 32):
            yield from _together(layer, backward, gpu, block_u, block_b)


def _alone(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """One program holds all units; the rows are shared out, in as many programs as it takes."""
    units = max(16, next_power_of_2(layer.H))
    tiles = units * units * (layer.gates + layer.matrices) * layer.element_bytes
    for block_b in (16, 32):
        num_warps = 4 if units <= 64 else 8
        staging = block_b * units * (layer.element_bytes + 4) * 2
        accumulated = (2 * layer.gates + layer.matrices) * block_b * units * 4 // (32 * num_warps)
        if tiles + staging > gpu.shared_bytes or accumulated > ALONE_REGISTER_BYTES:
            continue
        row_blocks = ceil_div(layer.B, block_b)
        if row_blocks > MOST_PROGRAMS_OF_ROWS:
            continue
        rounds = ceil_div(row_blocks * layer.D, gpu.multiprocessors)
        rest_us, products = ALONE_US[backward]
        step_us = rest_us + products * _product_us(layer, gpu, tiles, block_b, units)
        yield PersistentPlan(
            block_u=units,
            block_b=block_b,
            block_k=units,
            parts=1,
            chunks=1,
            group=1,
            rows=block_b,
            unit_programs=1,
            row_programs=row_blocks,
            directions=layer.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=None,
            pause=0,
            exact=layer.exact,
            tile_bytes=tiles,
            accumulator_bytes=accumulated,
            shared_bytes=tiles + staging,
            estimate_us=step_us * rounds,
        )


def _together(layer: Layer, backward: bool, gpu: GPU, block_u: int, block_b: int) -> Iterator[PersistentPlan]:
    """Every program holds block_u units, and waits for those that hold the others."""
    unit_programs = ceil_div(layer.H, block_u)
    row_room = gpu.multiprocessors // (unit_programs * layer.D)
    if unit_programs == 1 or row_room < 1:
        return
    num_warps = _warps(layer, backward)
    threads = 32 * num_warps
    cut = _cut(layer, backward, block_u, block_b, num_warps)
    if cut is None:
        return
    block_k, parts, chunks = cut
    width = block_u if backward else 4 * block_u
    tiles = chunks * parts * block_k * width * layer.element_bytes * (1 + (layer.matrices > 0))
    rows = min(block_b, ceil_div(layer.B, row_room))
    row_blocks = ceil_div(layer.B, rows)
    row_programs = min(row_room, row_blocks)
    blocks = ceil_div(row_blocks, row_programs)
    row_bytes = exchanged_bytes(layer, backward)
    outputs = block_u * block_b / threads
    traffic = TRAFFIC[backward] * (tiles + 2 * row_bytes * block_b)
    block_us = REST_US + OUTPUT_US[backward] * outputs + _product_us(layer, gpu, traffic, block_b, block_u)
    reads = unit_programs * layer.D * layer.B * row_bytes / blocks  # of all programs, in one of their row blocks
    reads_us = reads / (gpu.multiprocessors * L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    narrow = backward and row_bytes % 16 > 0
    per_kib = NARROW_US_PER_KIB if narrow else POLL_US_PER_KIB[backward]
    kib = rows * row_bytes / 1024
    squared = POLL_US_PER_KIB_2[backward] if blocks == 1 else 0.0
    wait_us = {
        "counter": COUNTER_US[backward] + READS[backward] * reads_us,
        "data": POLL_US + (per_kib + squared * kib) * kib,
    }
    operand = block_b * parts * block_k * _read_bytes(layer, backward)
    shared_bytes = tiles + max(operand, num_warps * width * block_b * 4) + 1024
    if shared_bytes > gpu.shared_bytes:
        return
    most = max(n for n in range(1, chunks + 1) if chunks % n == 0 and n * operand <= READ_BYTES[layer.exact] * threads)
    for wait, group in itertools.product(wait_us, sorted({most, 1})):
        groups = chunks // group * (2 if layer.matrices and not backward else 1)
        yield PersistentPlan(
            block_u=block_u,
            block_b=block_b,
            block_k=block_k,
            parts=parts,
            chunks=chunks,
            group=group,
            rows=rows,
            unit_programs=unit_programs,
            row_programs=row_programs,
            directions=layer.D,
            row_blocks=row_blocks,
            num_warps=num_warps,
            wait=wait,
            pause=pause_clocks(rows * row_bytes) if wait == "data" and blocks == 1 else 0,
            exact=layer.exact,
            tile_bytes=tiles,
            accumulator_bytes=_accumulator_bytes(layer, backward, block_u, block_b, parts, num_warps),
            shared_bytes=shared_bytes,
            estimate_us=blocks * (wait_us[wait] + GROUP_US * (groups - 1) + block_us),
        )


def _warps(layer: Layer, backward: bool) -> int:
    """Return the warps of a program that waits for others: few, as long as the chunks of columns are few."""
    few = 256 if backward or layer.element_bytes == 4 else 1024
    return 4 if few >= layer.H else 8


def _cut(layer: Layer, backward: bool, block_u: int, block_b: int, num_warps: int) -> tuple[int, int, int] | None:
    """Return block_k, parts and chunks of the columns of the recurrent product; None if they are too many.

    With the least padding, a chunk counted as some padding; of several such cuts the one with the fewest parts.
    """
    K = layer.H * layer.gates if backward else layer.H
    widest = 32 if layer.element_bytes == 4 or block_b > 16 else 64
    found = []
    for parts, block_k in itertools.product((num_warps, 2 * num_warps, 4 * num_warps), (16, 32, 64)):
        chunks = ceil_div(K, parts * block_k)
        accumulators = _accumulator_bytes(layer, backward, block_u, block_b, parts, num_warps)
        operand = block_b * parts * block_k * _read_bytes(layer, backward)
        small = accumulators <= REGISTER_BYTES[layer.exact] and operand <= CHUNK_BYTES * 32 * num_warps
        if block_k <= widest and chunks <= MOST_CHUNKS and small:
            found.append((chunks * (parts * block_k + CHUNK_COLUMNS), parts, block_k, chunks))
    if not found:
        return None
    _, parts, block_k, chunks = min(found)
    return block_k, parts, chunks


def _accumulator_bytes(layer: Layer, backward: bool, block_u: int, block_b: int, parts: int, num_warps: int) -> int:
    """Return the bytes of accumulators and gate inputs in a thread."""
    of_products = (1 + (layer.matrices > 0)) * parts if backward else 4 * parts
    return (of_products + layer.gates) * block_b * block_u * 4 // (32 * num_warps)


def exchanged_bytes(layer: Layer, backward: bool) -> int:
    """Return bytes of one batch row that every program reads in a step."""
    if backward:
        return layer.gates * layer.H * layer.element_bytes
    return layer.H * (layer.element_bytes + (4 if layer.matrices else 0))


def pause_clocks(read: int) -> int:
    """Return the clocks to wait before the first poll of the data, for the bytes that a program reads in a step."""
    return min(MOST_PAUSE, PAUSE + PAUSE_PER_KIB * read // 1024)


def _read_bytes(layer: Layer, backward: bool) -> int:
    """Return the bytes of the widest elements that a program reads of others: c of a full peephole is float32."""
    return 4 if layer.matrices and not backward else layer.element_bytes


def _product_us(layer: Layer, gpu: GPU, traffic: float, block_b: int, units: int) -> float:
    """The product of a row block: its bytes through shared memory, or multiplying, whichever takes longer."""
    read = traffic / (SHARED_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    operations = 2 * block_b * units * max(16, layer.H) * (layer.gates + layer.matrices)
    rate = PRODUCT_RATE[layer.exact] * gpu.tflop_per_s[layer.rate] / gpu.multiprocessors
    return max(read, operations / (rate * 1e6))
