"""Plans of the kernels in Gluon, for products on tensor cores: candidates, with an estimate.

The estimate was fitted to 190 plans that an H100 measured, of 29 shapes, most with the best of several pauses
(benchmarks/NOTES.md, "The kernels in Gluon on an H100"): it is 0.80 to 1.22 of what was measured, and 0.79 to 1.18 of
104 plans measured afterwards, of 13 shapes.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from collections.abc import Iterator
from functools import cache
from math import log2
from typing import NamedTuple

from lstm_triton_kernels.gpus import GPU, L2_BYTES_PER_CLOCK
from lstm_triton_kernels.plan import PersistentPlan, Second
from lstm_triton_kernels.sizes import Layer, ceil_div, padded_units

UNITS, ROWS, WARPS, TOGETHER = (8, 16, 32), (8, 16), (1, 2, 4, 8), (1, 2)
"""Of a program; the last: programs that share a multiprocessor."""
UNITS_OF_MANY_ROWS, SETS, WARPS_OF_MANY_ROWS = (8, 16, 32, 64), (1, 2), 8
"""Of a program whose warps share the rows instead (tiles.py): units; sets of 8 rows of a warp; and warps, on a
multiprocessor: of 4 the latency would not be hidden, 16 have too few registers."""

REGISTERS = 65_536
"""Of a multiprocessor; a thread has MOST_REGISTERS at most."""
MOST_REGISTERS = 255
WORKING_REGISTERS, OUTPUT_REGISTERS, BLOCKS_REGISTERS = {False: 50, True: 66}, {False: 36, True: 30}, 8
"""Of a thread in the time loop, beside weights, operands and accumulators; for each of its outputs; and where a program
has several row blocks. Forward, and backward (True)."""
MANY_OUTPUTS_WORKING, MANY_OUTPUTS_REGISTERS = {False: 60, True: 84}, {False: 5, True: 11}
"""The same where a thread has so many outputs that it does not load ahead (`loads_ahead`)."""
NORM_REGISTERS, NORM_OUTPUT_REGISTERS, NORM_BLOCKS_REGISTERS = {False: 12, True: 24}, {False: 4, True: 16}, 24
"""Beside these with layer normalisation: of a thread and for each of its outputs, of which half where warps share the
rows; and backward where a program has several row blocks. By what compiled plans of six shapes spilled."""
SECOND_SET_REGISTERS = 98
"""Beside these for a second set of 8 rows, forward: with less room these kernels spill in the time loop."""
LOADING_REGISTERS, LOADING_ELEMENT = 60, 3
"""Of a thread while it loads weights by columns, and for each element of a chunk then: two for its address, one for
itself."""
MOST_OPERANDS = 72
"""Registers of a thread for what it has read of others, at most."""
MOST_PIECES = 16
"""The most pieces in which the columns are read, one after the other."""
RESERVED_BYTES = 1024
"""Of the shared memory of a multiprocessor, for each program, by the driver."""
SCRATCH_BYTES = 32
"""Of the shared memory of a program, by Triton 3.6 at least, beside what the kernel allocates."""

CHUNK_BYTES = 64
"""Of a row in a chunk, see polling.py."""

# The time of a step, fitted.

UNITS_US, LEAST_UNIT_PROGRAMS, PROGRAMS_US = 0.1, 8, 0.041
"""For each doubling of the programs that share the units, of which there are at least so many for this; and of all
programs."""
EIGHT_ROWS_US = {False: 0.038, True: 0.44}
"""For every 8 rows of the programs on a multiprocessor, forward and backward (True)."""
KIB_US, PIECE_US = 0.0125, 0.08
"""For each KiB that a multiprocessor reads of L2, and for each further piece in which it is read."""
OUTPUT_US = 0.19
"""For each output of a thread but the first."""
PRODUCTS, KEPT, SUMS = 0.77, 0.68, 3.6
"""What the clocks of a step are multiplied by: those of the products, by PRODUCT_CLOCKS; and by SHARED_BYTES_PER_CLOCK
those of reading the kept weights, and of writing the parts of the sums."""
SHARED_US = {False: (0.36, 0.0126, 0.23), True: (0.0, 0.0132, 0.79)}
"""Where warps share the rows, fitted to 54 simulated plans, 0.84 to 1.13 of all but one, and 0.92 of the one that
an H200 measured, 128 rows of 1,024 units forward: of a row block, for each KiB, and for each further piece, forward and
backward (True)."""
SHARED_CLOCKS = {False: (0.485, 1.375), True: (0.165, 0.86)}
"""Likewise, times the clocks of the products (or of reading the kept weights, if those are more), and clocks for each
output of a multiprocessor."""
STREAM_US = (1.27, 0.0139, 0.281, 0.63)
"""Where weights are streamed, fitted to 47 simulated plans, 0.78 to 1.16 of them, and 0.82 to 1.02 of the four that an
H200 measured, 1 and 8 rows of 2,048 units: of a row block, for each KiB that is
read of other programs, for each further piece, and times the time of what L2 holds of the weights at its full rate. The
time of what comes from device memory, at the rate of its data sheet, counted 0.88 there; here it is counted whole."""
NORM_US = 0.9
"""For each of the two small exchanges of statistics in a step with layer normalisation, beside its KiB: by simulated
steps of 16 rows of 768 units and of 64 of 512, times SHORT. Whole calls on an H200 ask for up to 1.2 and 1.9."""
SHORT = {False: 1.46, True: 1.38}
"""How many times a measured step is a simulated one, forward and backward (True), see benchmarks/simulator; and a tenth
more, so that of two alike the plan of a kind that was measured is taken."""
PRODUCT_CLOCKS = 8
"""Of a quarter of a multiprocessor, at least, for a product of 16 x 8 x 16 elements of 16 bits, half as many of 32."""
SHARED_BYTES_PER_CLOCK = 128
"""Of a multiprocessor."""

UNITS_STREAMED, WARPS_STREAMED = (8, 16, 32), 8
"""Of a program whose weights do not all stay on the chip (streamed.py); and of its warps."""
STREAM_REGISTERS = 64
"""Of a thread for weights under way, where a program streams some: 64 KiB of 8 warps, which is what a multiprocessor's
share of an H100's device memory delivers in 2.6 us. Little's law asks for a third, at a latency of 0.8 us; the rest
arrives while the programs exchange."""
L2_SHARE = 0.5
"""Of the capacity of L2, for streamed weights that are to stay there; an assumption. The exchange, the gates and what
the backward pass saved go through it as well, and L2 of a large GPU has two halves, which may both have a line."""

STATISTICS_LOADS = 8
"""Loads of 16 bytes that a thread has under way at most, where it reads the statistics of rows (row_statistics.py)."""

PAUSE, PAUSE_PER_KIB, MOST_PAUSE = 300, 25, 700
"""Clocks from a program's last store to its first poll, by what a multiprocessor reads in a step: the best of those
tried were 300 for 4 KiB, 500 for 12, 700 for more. With several row blocks a program has other work meanwhile."""
FEW_READERS = 32
"""Where programs have one row, and no more than so many read each other, a poll that comes too early costs less than a
pause."""

ROW_MAJOR_ROWS, ROW_MAJOR_KIB = 16, 48
"""Backward, for batches of up to so many rows, and as long as a multiprocessor reads no more, an exchange buffer by
rows was faster than tiles, by 7 to 15 %. Where a program has fewer than 8 rows, tiles would be padded."""


def loads_ahead(rows: int, units: int, parts: int, warps: int) -> bool:
    """Return whether a program loads what a step reads of its own an iteration ahead: if it has registers for it.

    Where warps share the rows and a thread has many outputs, other warps run while one waits.
    """
    return parts == warps or rows * units <= 4 * 32 * warps


def chunks_in_flight(left_rows: int) -> int:
    """Return how many chunks of streamed weights, of so many rows, a warp has under way (streamed.py)."""
    return max(1, 2 * STREAM_REGISTERS // left_rows)


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
    if backward:
        return layer.gates * padded_units(layer.H)
    return padded_units(layer.hidden) + (padded_units(layer.H) if layer.matrices else 0)


def second_columns(layer: Layer, backward: bool) -> tuple[int, int]:
    """Return the same of the exchanges within a step, for V_o and for W_hr; 0 where there is none."""
    projection = padded_units(layer.P if backward else layer.H) if layer.P else 0
    return padded_units(layer.H) if layer.output_current else 0, projection


def second_sets(units: int) -> int:
    """Return the sets of so many units in a product within a step: a tile has 16 rows at least."""
    return max(1, 16 // units)


def statistics_loads(H: int, units: int) -> int:
    """Return the loads of 16 bytes of each of 8 lanes that read two float32 of every program (row_statistics.py)."""
    return -(-H // (16 * units))


def thread_registers(warps: int, together: int) -> int:
    """Return the registers of a thread, where so many programs of so many warps share a multiprocessor."""
    return min(MOST_REGISTERS, REGISTERS // (32 * warps * together) // 8 * 8)


def fits(together: int, shared_bytes: int, gpu: GPU) -> bool:
    """Return whether so many programs of so much shared memory fit a multiprocessor."""
    return together * (shared_bytes + RESERVED_BYTES) <= gpu.shared_bytes + RESERVED_BYTES


def product_clocks(layer: Layer, gpu: GPU) -> float:
    """Return the clocks of PRODUCT_CLOCKS' product: no less than by the GPU's data sheet."""
    operations = 4096 if layer.element_bytes == 2 else 2048
    rate = gpu.tflop_per_s[layer.rate] * 1e3 / (4 * gpu.multiprocessors * gpu.clock_ghz)  # per clock
    return max(PRODUCT_CLOCKS, operations / rate)


def candidates(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan that fits the GPU: all programs resident, weights in registers and shared memory.

    Only where there is none, plans by which a part of the weights is streamed; with layer normalisation none is.
    """
    if why_not(gpu) is None:
        found = False
        for plan in resident_plans(layer, backward, gpu):
            found = True
            yield plan
        if not found and not layer.spec.layer_norm:
            for units, rows in itertools.product(UNITS_STREAMED, ROWS):
                tile = Tile(units, rows, WARPS_STREAMED, WARPS_STREAMED, 1)
                yield from plans_of(layer, backward, gpu, tile, streams=True)


def resident_plans(layer: Layer, backward: bool, gpu: GPU) -> Iterator[PersistentPlan]:
    """Every plan by which all weights stay on the chip."""
    for units, rows, warps, together in itertools.product(UNITS, ROWS, WARPS, TOGETHER):
        yield from plans_of(layer, backward, gpu, Tile(units, rows, warps, warps, together))
    for units, sets, together in itertools.product(UNITS_OF_MANY_ROWS, SETS, TOGETHER):
        warps = WARPS_OF_MANY_ROWS // together
        yield from plans_of(layer, backward, gpu, Tile(units, 8 * sets * warps, warps, 1, together))


class Tile(NamedTuple):
    """A program, and how many of it share a multiprocessor.

    - units, rows, warps: of a program; parts: of the columns, as many as warps, or 1 where these share the rows
    """

    units: int
    rows: int
    warps: int
    parts: int
    together: int

    @property
    def sets(self) -> int:
        """Sets of 8 rows of a warp."""
        return self.rows * self.parts // (8 * self.warps)

    @property
    def outputs(self) -> int:
        """Of a thread."""
        return ceil_div(self.units * self.rows, 32 * self.warps)


def plans_of(layer: Layer, backward: bool, gpu: GPU, tile: Tile, streams: bool = False) -> Iterator[PersistentPlan]:
    """The plans of a tile, which differ in how the columns are cut; streams: of those that stream some weights."""
    units, tile_rows, warps, parts, together = tile
    outputs = tile.outputs
    shared = parts < warps
    left_rows = units * (1 + (layer.matrices > 0) if backward else 4)
    block_k = CHUNK_BYTES // layer.element_bytes
    columns, inside = exchanged_columns(layer, backward), second_columns(layer, backward)
    unit_programs = ceil_div(layer.H, units)
    row_room = together * gpu.multiprocessors // (unit_programs * layer.D)
    if row_room < 1 or left_rows % 16 or (parts > 4 and (parts - 1) * block_k >= columns):
        return  # (up to four warps, also those that have no columns share the equations)
    of_program = ceil_div(layer.B, row_room)
    rows = ceil_div(of_program, ceil_div(of_program, tile_rows))
    row_blocks = ceil_div(layer.B, rows)
    row_programs = min(row_room, row_blocks)
    if (tile_rows > ROWS[0] and rows <= tile_rows // 2) or (
        together > 1 and unit_programs * row_programs * layer.D <= gpu.multiprocessors
    ):
        return  # fewer rows, or programs, do as well
    blocks = ceil_div(row_blocks, row_programs)
    at_once = blocks > 1 or (rows == 1 and unit_programs <= FEW_READERS)
    registers = thread_registers(warps, together)
    loading = LOADING_REGISTERS + LOADING_ELEMENT * left_rows * 2 // layer.element_bytes if backward else 0
    needed = ceil_div(columns, block_k * parts)
    if loads_ahead(tile_rows, units, parts, warps) and not streams:
        working = WORKING_REGISTERS[backward] + OUTPUT_REGISTERS[backward] * outputs
    else:
        working = MANY_OUTPUTS_WORKING[backward] + MANY_OUTPUTS_REGISTERS[backward] * outputs
        working += SECOND_SET_REGISTERS if tile.sets > 1 and not (backward or streams) else 0
    if layer.spec.layer_norm:
        working += NORM_REGISTERS[backward] + NORM_OUTPUT_REGISTERS[backward] * outputs // (2 if shared else 1)
        working += NORM_BLOCKS_REGISTERS if backward and blocks > 1 and not shared else 0
    working += BLOCKS_REGISTERS if blocks > 1 and not shared else 0
    grid_us = UNITS_US * log2(max(LEAST_UNIT_PROGRAMS, unit_programs))
    grid_us += PROGRAMS_US * log2(unit_programs * row_programs * layer.D)
    grid_us += EIGHT_ROWS_US[backward] * together * rows / 8 + OUTPUT_US * (outputs - 1)
    sums_bytes = parts * left_rows * tile_rows * 4 if parts > 1 else 0
    chunk_bytes = parts * left_rows * CHUNK_BYTES
    second_rows = second_sets(units) * units
    second_sums = parts * second_rows * tile_rows * 4 if parts > 1 else 0
    if streams:
        least = sum(parts * second_rows * CHUNK_BYTES * ceil_div(n, block_k * parts) + second_sums for n in inside if n)
        most_kept = max(0, gpu.shared_bytes - sums_bytes - least - SCRATCH_BYTES) // chunk_bytes
        cuts = _streamed_cuts(needed, left_rows, tile.sets, registers - working, registers - loading, most_kept)
    else:
        cuts = _cuts(needed, left_rows, tile.sets, registers - working, registers - loading)
    for cut in cuts:
        kept_bytes = cut.kept * chunk_bytes
        under_way = chunks_in_flight(left_rows) if streams else 0
        room = registers - working - (cut.held + under_way) * left_rows // 2
        seconds = [_second(n, tile, block_k, room) for n in inside]
        if any(second is not None and second.group < 1 for second in seconds):
            continue
        second_bytes = sum(
            parts * second_rows * second.chunks * CHUNK_BYTES + second_sums for second in seconds if second is not None
        )
        if not fits(together, kept_bytes + sums_bytes + second_bytes + SCRATCH_BYTES, gpu):
            continue
        read_kib = together * rows * cut.chunks * parts * CHUNK_BYTES / 1024
        products = 2 * left_rows // 16 * cut.chunks * tile.sets * max(1, warps / 4)
        of_products = together * products * product_clocks(layer, gpu)
        of_weights = together * kept_bytes * (warps // parts) / SHARED_BYTES_PER_CLOCK
        of_sums = together * sums_bytes / SHARED_BYTES_PER_CLOCK
        pieces = cut.chunks // cut.group
        if shared:
            block_us, kib_us, piece_us = SHARED_US[backward]
            of_most, of_outputs = SHARED_CLOCKS[backward]
            step_us = SHORT[backward] * (block_us + kib_us * read_kib + piece_us * (pieces - 1))
            clocks = of_most * max(0.9 * of_products, of_weights) + of_outputs * together * tile_rows * units
            clocks *= SHORT[backward]
        else:
            step_us = grid_us + KIB_US * read_kib + PIECE_US * (pieces - 1)
            clocks = PRODUCTS * of_products + KEPT * of_weights + SUMS * of_sums
        beyond_l2 = 0
        if streams:
            one_bytes = chunk_bytes if backward else chunk_bytes * layer.gates // 4  # without rows that are zero
            of_all = one_bytes * unit_programs * layer.D
            beyond_l2 = max(0, cut.streamed - int(L2_SHARE * gpu.l2_bytes / of_all))
            of_l2 = (cut.streamed - beyond_l2) * one_bytes / (L2_BYTES_PER_CLOCK * gpu.clock_ghz * 1e3)
            fixed_us, kib_us, piece_us, l2_times = STREAM_US
            step_us = fixed_us + kib_us * read_kib + piece_us * (pieces - 1) + l2_times * of_l2
            step_us = SHORT[backward] * step_us + beyond_l2 * of_all / (gpu.memory_gb_per_s * 1e3)
            clocks = 0.0
        if layer.spec.layer_norm:
            across = max(1, min(units // 8, warps)) if parts > 1 else 1
            readers = across * max(1, 4 * (warps // across) // tile_rows)  # warps that read the same
            line_kib = statistics_loads(layer.H, units) * 128 / 1024
            step_us += 2 * (NORM_US + KIB_US * together * rows * readers * line_kib)
        for second in seconds:
            if second is not None:
                step_us += grid_us + KIB_US * together * rows * second.chunks * parts * CHUNK_BYTES / 1024
                step_us += PIECE_US * (second.chunks // second.group - 1)
                clocks += PRODUCTS * of_products / cut.chunks * second.chunks * second_rows / left_rows
                clocks += KEPT * together * second_bytes * (warps // parts) / SHARED_BYTES_PER_CLOCK
        yield PersistentPlan(
            block_u=units,
            block_b=tile_rows,
            block_k=block_k,
            parts=parts,
            chunks=cut.chunks,
            group=cut.group,
            rows=rows,
            unit_programs=unit_programs,
            row_programs=row_programs,
            directions=layer.D,
            row_blocks=row_blocks,
            num_warps=warps,
            wait="data",
            pause=0 if at_once else min(MOST_PAUSE, round(PAUSE + PAUSE_PER_KIB * read_kib)),
            exact=False,
            tile_bytes=cut.chunks * chunk_bytes,
            register_bytes=4 * cut.registers,
            shared_bytes=kept_bytes + sums_bytes + second_bytes,
            estimate_us=blocks * (step_us + clocks / gpu.clock_ghz / 1e3),
            kept=cut.kept,
            together=together,
            tiled=rows >= 8 and not (backward and layer.B <= ROW_MAJOR_ROWS and read_kib <= ROW_MAJOR_KIB),
            peephole=seconds[0],
            projection=seconds[1],
            streamed=cut.streamed,
            beyond_l2=beyond_l2,
        )


def _second(columns: int, tile: Tile, block_k: int, room: int) -> Second | None:
    """Return how a product within a step is cut; None if there is none. A group of 0: it does not fit.

    room: registers of a thread for operands and accumulators.
    """
    if columns == 0:
        return None
    needed = ceil_div(columns, block_k * tile.parts)
    rows = second_sets(tile.units) * tile.units * tile.sets
    accumulators = rows // 4 * (2 if rows <= 16 else 1)
    most = min(MOST_OPERANDS, room - accumulators) // (4 * tile.sets)
    if most < 1:
        return Second(needed, 0)
    group = ceil_div(needed, ceil_div(needed, most))
    return Second(group * ceil_div(needed, group), group)


class Cut(NamedTuple):
    """How the columns of a product are cut.

    - chunks of a warp; kept: in shared memory, the others in registers; group: read at once
    - registers: of weights, operands and accumulators in a thread
    - streamed: loaded in every step
    """

    chunks: int
    kept: int
    group: int
    registers: int
    streamed: int = 0

    @property
    def held(self) -> int:
        """Chunks in registers."""
        return self.chunks - self.kept - self.streamed


def _cuts(needed: int, left_rows: int, sets: int, room: int, loading_room: int) -> Iterator[Cut]:
    """The cuts that fit; in more pieces than another only if that leaves registers for more weights.

    needed: chunks, of which there may be more so that all pieces are alike; sets: of 8 rows of a warp; room: registers
    for weights, operands and accumulators; loading_room: for weights while they are loaded.
    """
    accumulators = left_rows * sets // 4 * (2 if left_rows * sets <= 16 else 1)
    least_kept = needed + MOST_PIECES  # more than all chunks, filled up
    for pieces in range(1, min(needed, MOST_PIECES) + 1):
        group = ceil_div(needed, pieces)
        operands = group * sets * 4
        held = min(pieces * group, min(room - accumulators - operands, loading_room) // (left_rows // 2))
        kept = pieces * group - held
        if operands <= MOST_OPERANDS and held >= 0 and kept < least_kept:
            least_kept = kept
            yield Cut(pieces * group, kept, group, held * left_rows // 2 + accumulators + operands)


def _streamed_cuts(
    needed: int, left_rows: int, sets: int, room: int, loading_room: int, most_kept: int
) -> Iterator[Cut]:
    """The cuts that stream some chunks; in more pieces than another only if that leaves room for more weights.

    most_kept: chunks that fit shared memory; the others as of `_cuts`. What is streamed is a multiple of the chunks in
    flight: so each of these has the same registers in every step.
    """
    accumulators = left_rows * sets // 4 * (2 if left_rows * sets <= 16 else 1)
    flying = chunks_in_flight(left_rows)
    least_streamed = needed + MOST_PIECES
    for pieces in range(1, min(needed, MOST_PIECES) + 1):
        group = ceil_div(needed, pieces)
        operands = group * sets * 4
        of_stream = flying * left_rows // 2
        held = min(room - accumulators - operands - of_stream, loading_room) // (left_rows // 2)
        chunks = pieces * group
        if held < 0 or operands > MOST_OPERANDS:
            continue
        streamed = flying * ceil_div(max(1, chunks - held - most_kept), flying)
        kept = min(most_kept, max(0, chunks - streamed))
        held = chunks - streamed - kept
        if flying < streamed < least_streamed and held >= 0:
            least_streamed = streamed
            yield Cut(chunks, kept, group, held * left_rows // 2 + of_stream + accumulators + operands, streamed)
