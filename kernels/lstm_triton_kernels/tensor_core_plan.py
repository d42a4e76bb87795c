"""Plans of the kernels in Gluon, for products on tensor cores: candidates, with an estimate.

The estimate was fitted to a study on an H100 (benchmarks/NOTES.md, "The study in Gluon"), to 16 plans of one row block
with a pause: all are within 10 % of it.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from functools import cache

from lstm_triton_kernels.gpus import GPU
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.sizes import Layer, ceil_div

UNITS, ROWS, WARPS, TOGETHER = (8, 16, 32), (8, 16), (1, 2, 4, 8), (1, 2)
"""Of a program; the last: programs that share a multiprocessor."""

REGISTERS = 65_536
"""Of a multiprocessor; a thread has MOST_REGISTERS at most."""
MOST_REGISTERS = 255
WORKING_REGISTERS = 84
"""Of a thread in the time loop, beside weights, operands and accumulators."""
LOADING_REGISTERS, LOADING_ELEMENT = 60, 3
"""Of a thread while it loads weights by columns, and for each element of a chunk then: two for its address, one for
itself."""
MOST_OPERANDS = 72
"""Registers of a thread for what it has read of others, at most."""
RESERVED_BYTES = 1024
"""Of the shared memory of a multiprocessor, for each program, by the driver."""

CHUNK_BYTES = 64
"""Of a row in a chunk, see polling.py."""

STEP_US, US_PER_KIB = 0.73, 0.02
"""A step beside the products and sums, and for what a multiprocessor reads of L2 in it: fitted."""
PRODUCT_CLOCKS = 8
"""Of a quarter of a multiprocessor, for a product of 16 x 8 x 16 elements of 16 bits, or half as many of 32 bits."""
POLL_CLOCKS = 10
"""Likewise, for the poll of a chunk of 8 rows: an assumption."""
SHARED_BYTES_PER_CLOCK = 128
"""For weights and sums in shared memory."""

PAUSE, PAUSE_PER_KIB, MOST_PAUSE = 300, 25, 700
"""Clocks from a program's last store to its first poll, by what a multiprocessor reads in a step: the best of those
tried were 300 for 4 KiB, 500 for 12, 700 for more. With several row blocks a program has other work meanwhile."""

ROW_MAJOR_ROWS, ROW_MAJOR_KIB = 16, 48
"""Backward, for batches of so many rows, and as long as a multiprocessor reads no more, an exchange buffer by rows was
faster than tiles, by 7 to 15 %."""


@cache
def no_gluon() -> str | None:
    """Return what Triton lacks for these kernels; None if nothing, or if it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        importlib.import_module("lstm_triton_kernels.exchanged_backward")
    except (ImportError, AttributeError) as error:
        import triton

        return f"Gluon of Triton {triton.__version__} lacks what the kernels need: {error}"
    return None


def why_not(gpu: GPU) -> str | None:
    """Return what keeps a GPU from running these kernels; None if nothing does."""
    if gpu.interpreted:
        return "Triton's interpreter does not run the kernels in Gluon, which compute on tensor cores"
    return no_gluon()


def exchanged_columns(layer: Layer, backward: bool) -> int:
    """Return the columns of a row that programs publish: units are filled up to whole tiles (polling.py)."""
    blocks = layer.gates if backward else 1 + (layer.matrices > 0)
    return blocks * 8 * ceil_div(layer.H, 8)


def thread_registers(warps: int, together: int) -> int:
    """Return the registers of a thread, where so many programs of so many warps share a multiprocessor."""
    return min(MOST_REGISTERS, REGISTERS // (32 * warps * together) // 8 * 8)


def candidates(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan that fits the GPU: all programs resident, weights in registers and shared memory."""
    if why_not(gpu) is None:
        for units, rows, warps, together in itertools.product(UNITS, ROWS, WARPS, TOGETHER):
            yield from _plan(layer, backward, gpu, units, rows, warps, together)


def _plan(
    layer: Layer, backward: bool, gpu: GPU, units: int, tile_rows: int, warps: int, together: int
) -> Iterator[PersistentPlan]:
    """The plan of these sizes, if there is one."""
    left_rows = units * (1 + (layer.matrices > 0) if backward else 4)
    block_k = CHUNK_BYTES // layer.element_bytes
    columns = exchanged_columns(layer, backward)
    unit_programs = ceil_div(layer.H, units)
    row_room = together * gpu.multiprocessors // (unit_programs * layer.D)
    if row_room < 1 or left_rows % 16 or (warps - 1) * block_k >= columns:
        return
    rows = min(tile_rows, ceil_div(layer.B, row_room))
    row_blocks = ceil_div(layer.B, rows)
    row_programs = min(row_room, row_blocks)
    if (tile_rows > ROWS[0] and rows <= ROWS[0]) or (
        together > 1 and unit_programs * row_programs * layer.D <= gpu.multiprocessors
    ):
        return  # fewer rows, or programs, do as well
    blocks = ceil_div(row_blocks, row_programs)
    chunks = ceil_div(columns, block_k * warps)
    registers = thread_registers(warps, together)
    cut = _cut(chunks, left_rows, tile_rows, registers, left_rows * 2 // layer.element_bytes if backward else 0)
    if cut is None:
        return
    kept, group, used = cut
    kept_bytes = kept * warps * left_rows * CHUNK_BYTES
    shared_bytes = kept_bytes + warps * left_rows * tile_rows * 4
    if together * (shared_bytes + RESERVED_BYTES) > gpu.shared_bytes + RESERVED_BYTES:
        return
    read_kib = together * rows * chunks * warps * CHUNK_BYTES / 1024
    of_chunk = PRODUCT_CLOCKS * 2 * left_rows // 16 + POLL_CLOCKS
    of_warps = of_chunk * chunks * tile_rows // 8 * max(1, warps / 4)
    part_bytes = warps * left_rows * tile_rows * 4
    readers = max(1, 32 * warps // (units * tile_rows))  # threads that have the same output
    shared_traffic = kept_bytes + (1 + readers) * part_bytes
    clocks = together * (of_warps + shared_traffic / SHARED_BYTES_PER_CLOCK)
    yield PersistentPlan(
        block_u=units,
        block_b=tile_rows,
        block_k=block_k,
        parts=warps,
        chunks=chunks,
        group=group,
        rows=rows,
        unit_programs=unit_programs,
        row_programs=row_programs,
        directions=layer.D,
        row_blocks=row_blocks,
        num_warps=warps,
        wait="data",
        pause=min(MOST_PAUSE, round(PAUSE + PAUSE_PER_KIB * read_kib)) if blocks == 1 else 0,
        exact=False,
        tile_bytes=chunks * warps * left_rows * CHUNK_BYTES,
        register_bytes=4 * used,
        shared_bytes=shared_bytes,
        estimate_us=blocks * (STEP_US + US_PER_KIB * read_kib + clocks / gpu.clock_ghz / 1e3),
        kept=kept,
        together=together,
        tiled=not (backward and layer.B <= ROW_MAJOR_ROWS and read_kib <= ROW_MAJOR_KIB),
    )


def _cut(chunks: int, left_rows: int, tile_rows: int, registers: int, loaded: int) -> tuple[int, int, int] | None:
    """Return how many chunks of weights are kept in shared memory, and how many are read at once; and the registers of
    weights, operands and accumulators in a thread. None where they do not fit.

    registers: of a thread; loaded: elements of a chunk that a thread loads one by one.
    """
    accumulators = left_rows * tile_rows // 32 * (2 if left_rows * tile_rows <= 128 else 1)
    for group in (chunks // n for n in range(1, chunks + 1) if chunks % n == 0):
        operands = group * tile_rows // 2
        working = max(WORKING_REGISTERS + accumulators + operands, LOADING_REGISTERS + LOADING_ELEMENT * loaded)
        held = min(chunks, (registers - working) // (left_rows // 2))
        if operands <= MOST_OPERANDS and held >= 0:
            return chunks - held, group, held * left_rows // 2 + accumulators + operands
    return None
