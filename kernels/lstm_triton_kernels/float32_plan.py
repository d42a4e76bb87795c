"""Plans of the kernels in plain Triton, for float32 products without tensor cores: candidates, with an estimate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK
from lstm_triton_kernels.plan import PersistentPlan, Second
from lstm_triton_kernels.sizes import Layer, ceil_div, next_power_of_2

LARGEST_ALONE = 128
"""Units that one program holds at most: beyond, the accumulators of a step do not fit its registers."""

MOST_CHUNKS = 8
"""Chunks at most: every one is unrolled in the kernel, and compiling takes as long as they are many."""

MOST_PROGRAMS_OF_ROWS = 65_535
"""What CUDA allows on the second axis of a grid."""

REGISTER_BYTES = 80
"""Of accumulators and gate inputs in a thread, at most; beyond, some release of Triton spills."""
ALONE_REGISTER_BYTES = 320
"""The same where a program holds all units."""
CHUNK_BYTES, READ_BYTES = 128, 128
"""Of one right operand in a thread, and of all that it reads at once, at most."""

CHUNK_COLUMNS = 128
"""A chunk more costs about as much as so many columns of padding, by simulation: two barriers, and latencies."""

# Constants of the estimate: fitted to 254 steps measured on an H100 with Triton 3.6, of up to 13 plans a pass, most of
# them of 16-bit types (benchmarks/results/h100-80gb-hbm3-2026-11-26-trial-plans*.txt and -steps-2.jsonl).
SHARED_BYTES_PER_CLOCK = 128
PRODUCT_RATE = 0.2
"""The part of the GPU's rate that the products reach, by simulation."""
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
    tiles = units * units * (layer.gates + layer.matrices + (layer.P > 0)) * layer.element_bytes
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
            exact=True,
            tile_bytes=tiles,
            register_bytes=accumulated,
            shared_bytes=tiles + staging,
            estimate_us=step_us * rounds,
        )


def _together(layer: Layer, backward: bool, gpu: GPU, block_u: int, block_b: int) -> Iterator[PersistentPlan]:
    """Every program holds block_u units, and waits for those that hold the others."""
    unit_programs = ceil_div(layer.H, block_u)
    row_room = gpu.multiprocessors // (unit_programs * layer.D)
    if unit_programs == 1 or row_room < 1:
        return
    num_warps = 4 if layer.H <= 256 else 8
    threads = 32 * num_warps
    cut = _cut(layer, backward, block_u, block_b, num_warps)
    if cut is None:
        return
    block_k, parts, chunks = cut
    width = block_u if backward else 4 * block_u
    tiles = chunks * parts * block_k * width * layer.element_bytes * (1 + (layer.matrices > 0))
    seconds = [_second(columns, block_k, parts) for columns in second_columns(layer, backward)]
    if any(second is not None and second.chunks > MOST_CHUNKS for second in seconds):
        return
    of_seconds = sum(second.chunks * parts * block_k * block_u * layer.element_bytes for second in seconds if second)
    rows = min(block_b, ceil_div(layer.B, row_room))
    row_blocks = ceil_div(layer.B, rows)
    row_programs = min(row_room, row_blocks)
    blocks = ceil_div(row_blocks, row_programs)
    row_bytes = exchanged_bytes(layer, backward)
    outputs = block_u * block_b / threads
    traffic = TRAFFIC[backward] * (tiles + of_seconds + 2 * row_bytes * block_b)
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
    operand = block_b * parts * block_k * layer.element_bytes
    shared_bytes = tiles + of_seconds + max(operand, num_warps * width * block_b * 4) + 1024
    if shared_bytes > gpu.shared_bytes:
        return
    most = max(n for n in range(1, chunks + 1) if chunks % n == 0 and n * operand <= READ_BYTES * threads)
    for wait, group in itertools.product(wait_us, sorted({most, 1})):
        groups = chunks // group * (2 if layer.matrices and not backward else 1)
        products = 1 + sum(second is not None for second in seconds)
        waits_us = wait_us[wait] * products + REST_US * (products - 1)
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
            exact=True,
            tile_bytes=tiles,
            register_bytes=_accumulator_bytes(layer, backward, block_u, block_b, parts, num_warps),
            shared_bytes=shared_bytes,
            estimate_us=blocks * (waits_us + GROUP_US * (groups - 1) + block_us),
            peephole=seconds[0],
            projection=seconds[1],
        )


def _cut(layer: Layer, backward: bool, block_u: int, block_b: int, num_warps: int) -> tuple[int, int, int] | None:
    """Return block_k, parts and chunks of the columns of the recurrent product; None if they are too many.

    With the least padding, a chunk counted as some padding; of several such cuts the one with the fewest parts.
    """
    K = layer.H * layer.gates if backward else layer.H if layer.matrices else layer.hidden
    found = []
    for parts, block_k in itertools.product((num_warps, 2 * num_warps, 4 * num_warps), (16, 32)):
        chunks = ceil_div(K, parts * block_k)
        accumulators = _accumulator_bytes(layer, backward, block_u, block_b, parts, num_warps)
        operand = block_b * parts * block_k * layer.element_bytes
        small = accumulators <= REGISTER_BYTES and operand <= CHUNK_BYTES * 32 * num_warps
        if chunks <= MOST_CHUNKS and small:
            found.append((chunks * (parts * block_k + CHUNK_COLUMNS), parts, block_k, chunks))
    if not found:
        return None
    _, parts, block_k, chunks = min(found)
    return block_k, parts, chunks


def _accumulator_bytes(layer: Layer, backward: bool, block_u: int, block_b: int, parts: int, num_warps: int) -> int:
    """Return the bytes of accumulators and gate inputs in a thread."""
    of_products = (1 + (layer.matrices > 0)) * parts if backward else 4 * parts
    return (of_products + layer.gates) * block_b * block_u * 4 // (32 * num_warps)


def second_columns(layer: Layer, backward: bool) -> tuple[int, int]:
    """Return the columns of the products within a step, with V_o and with W_hr; 0 where there is none."""
    return layer.H if layer.output_current else 0, (layer.P if backward else layer.H) if layer.P else 0


def _second(columns: int, block_k: int, parts: int) -> Second | None:
    """Return how a product within a step is cut; None where there is none. Its chunks are read one by one."""
    return Second(ceil_div(columns, parts * block_k), 1) if columns else None


def exchanged_bytes(layer: Layer, backward: bool) -> int:
    """Return bytes of one batch row that every program reads in a step."""
    if backward:
        return layer.gates * layer.H * layer.element_bytes
    return (layer.hidden + (layer.H if layer.matrices else 0)) * layer.element_bytes


def pause_clocks(read: int) -> int:
    """Return the clocks to wait before the first poll of the data, for the bytes that a program reads in a step."""
    return min(MOST_PAUSE, PAUSE + PAUSE_PER_KIB * read // 1024)


def _product_us(layer: Layer, gpu: GPU, traffic: float, block_b: int, units: int) -> float:
    """The product of a row block: its bytes through shared memory, or multiplying, whichever takes longer."""
    read = traffic / (SHARED_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
    operations = 2 * block_b * units * max(16, layer.H) * (layer.gates + layer.matrices)
    rate = PRODUCT_RATE * gpu.tflop_per_s[layer.rate] / gpu.multiprocessors
    return max(read, operations / (rate * 1e6))
