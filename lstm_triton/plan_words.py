"""A persistent plan in words: each of its fields, and what it means. Numbers and units for people."""

from __future__ import annotations

from collections.abc import Mapping

from lstm_triton_kernels.float32_plan import ALONE_REGISTER_BYTES, REGISTER_BYTES
from lstm_triton_kernels.gpus import GPU
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.tensor_core_plan import thread_registers

from lstm_triton.overlap import Overlap


def rows(layer: Layer, backward: bool, plan: PersistentPlan, gpu: GPU) -> list[tuple[str, str]]:
    """Return the fields of a plan as pairs of a name and an explanation."""
    return [
        ("grid", grid(plan, gpu)),
        ("tile", tile(layer, plan)),
        ("batch rows", batch_rows(layer, plan)),
        ("product", product(layer, backward, plan)),
        *within_the_step(backward, plan),
        ("weights", weights(layer, plan)),
        *([("stream", stream(layer, backward, plan, gpu))] if plan.streamed else []),
        ("wait", wait(layer, backward, plan)),
        ("threads", f"{plural(plan.num_warps, 'warp')}, {32 * plan.num_warps} threads in a thread block"),
        ("shared memory", shared_memory(plan, gpu)),
        ("registers", registers(plan)),
        ("estimate", f"{time(plan.estimate_us)} a step"),
    ]


def grid(plan: PersistentPlan, gpu: GPU) -> str:
    """Describe the thread blocks of the launch, and whether all of them are resident."""
    parts = f"{plan.unit_programs} for units x {plan.row_programs} for batch rows x {plan.directions} for directions"
    text = f"{plural(plan.programs, 'thread block')} = {parts}, on {gpu.multiprocessors} multiprocessors"
    if plan.together > 1:
        return f"{text} with room for {plan.together} each: all run at once"
    if plan.programs > gpu.multiprocessors:
        return f"{text}: some share one or run after others, and none waits for another"
    return f"{text}: all run at once"


def tile(layer: Layer, plan: PersistentPlan) -> str:
    """Describe what a thread block computes in a step, and how the units are split."""
    text = f"{plural(plan.block_u, 'unit')} x {plural(plan.block_b, 'batch row')}; "
    if plan.unit_programs == 1:
        padding = f", padded to {plan.block_u}" if plan.block_u > layer.H else ""
        return f"{text}every thread block holds all {layer.H} units{padding}"
    last = layer.H - (plan.unit_programs - 1) * plan.block_u
    rest = f", the last of {last}" if last < plan.block_u else ""
    return f"{text}{layer.H} units in {plan.unit_programs} parts of {plan.block_u}{rest}"


def batch_rows(layer: Layer, plan: PersistentPlan) -> str:
    """Describe how the batch is split into blocks of rows."""
    used = min(plan.rows, layer.B)
    text = f"{layer.B} in {plural(plan.row_blocks, 'block')}, {used} of the {plan.block_b} rows of a tile are used"
    last = layer.B - (plan.row_blocks - 1) * plan.rows
    if plan.row_blocks > 1 and last < plan.rows:
        text += f", {last} in the last block"
    if plan.blocks_per_program > 1:
        text += f"; a thread block computes up to {plan.blocks_per_program} blocks of rows in each step"
    return text


def product(layer: Layer, backward: bool, plan: PersistentPlan) -> str:
    """Describe how the columns of the recurrent product are split, and what multiplies."""
    how = "in float32 without tensor cores" if plan.exact else "on tensor cores"
    of_h = f"P = {layer.P}" if layer.P else f"H = {layer.H}"
    if plan.alone:
        each = " for each gate" if backward else ""
        of = f"H = {layer.H}" if backward else of_h
        return f"{plan.columns} columns at once ({of}){each}; the warps share the units; {how}"
    summed = f"{layer.gates} gates of H = {layer.H}" if backward else of_h
    if layer.matrices and not (backward or plan.exact):
        summed += f" of h and H = {layer.H} of c" if layer.P else " of h and of c"
    return f"{columns(plan, plan.chunks, plan.group, summed)}; {how}"


def columns(plan: PersistentPlan, chunks: int, group: int, of: str = "") -> str:
    """Describe how the columns of a product are split; of: what they are."""
    text = f"{plural(chunks, 'chunk')} x {plural(plan.parts, 'part')} x {plan.block_k} = "
    text += f"{chunks * plan.parts * plan.block_k} columns" + (f" ({of})" if of else "")
    if chunks > 1:
        text += ", all chunks loaded at once" if group == chunks else f", {group} loaded at a time"
    return text


def within_the_step(backward: bool, plan: PersistentPlan) -> list[tuple[str, str]]:
    """Describe the products within a step, if there are any, each with a name."""
    found = []
    for name, second, what in (
        ("and with V_o", plan.peephole, "the gradients of the output gates" if backward else "c_t"),
        ("and with W_hr", plan.projection, "the gradient of h_t" if backward else "o tanh(c_t)"),
    ):
        if second is not None:
            cut = columns(plan, second.chunks, second.group)
            found.append((name, f"{what} of the same step: {cut}; weights in shared memory"))
    return found


def weights(layer: Layer, plan: PersistentPlan) -> str:
    """Describe the resident weights: those of a thread block, and those of the layer."""
    matrices = f"{layer.gates} gates" + (f" and {layer.matrices} peephole matrices" if layer.matrices else "")
    resident = plan.chunks - plan.streamed
    if plan.exact or plan.kept == resident:
        where = "in shared memory"
    elif plan.kept == 0:
        where = "in registers"
    else:
        where = f"{size(plan.tile_bytes * plan.kept // plan.chunks)} of them in shared memory, the rest in registers"
    total = size(layer.recurrent_bytes * layer.D)
    if resident == 0:
        return f"none of {size(plan.tile_bytes)} stay in a thread block: its units of {matrices}; {total} in the layer"
    of_all = f" of {size(plan.tile_bytes)}" if plan.streamed else ""
    stay = size(plan.tile_bytes * resident // plan.chunks)
    return f"{stay}{of_all} stay in a thread block, {where}: its units of {matrices}; {total} in the layer"


def stream(layer: Layer, backward: bool, plan: PersistentPlan, gpu: GPU) -> str:
    """Describe the weights that do not stay on the chip."""
    read = plan.tile_bytes * plan.streamed // plan.chunks * plan.unit_programs * plan.directions
    if layer.spec.coupled and not backward:
        read = read * layer.gates // 4  # the rows of a fourth gate, which are zero, are not read
    text = f"the rest, {size(read)} of all thread blocks, streams to the registers in every step"
    if plan.blocks_per_program > 1:
        text += ", once for each block of rows"
    beyond = read * plan.beyond_l2 // plan.streamed
    l2 = f"the L2 cache of {size(gpu.l2_bytes)}"
    if plan.beyond_l2 == 0:
        return f"{text}, from {l2}"
    if plan.beyond_l2 == plan.streamed:
        return f"{text}, from device memory"
    return f"{text}, {size(beyond)} of it from device memory, the others from {l2}"


def wait(layer: Layer, backward: bool, plan: PersistentPlan) -> str:
    """Describe how thread blocks wait for each other."""
    if plan.wait is None:
        return "none: a thread block holds all units"
    if plan.wait == "counter":
        return "counter: a thread block counts up when it has stored its part, and loads when all have"
    values = "the gradients of the gates" if backward else "h and c" if layer.matrices else "h"
    text = f"data: {'a thread block' if plan.exact else 'a warp'} loads {values} until no element is missing"
    return text + (f", for the first time {plan.pause} clocks after the store of its own part" if plan.pause else "")


def shared_memory(plan: PersistentPlan, gpu: GPU) -> str:
    """Describe the shared memory of a thread block against the limit."""
    share = 100 * plan.shared_bytes / gpu.shared_bytes
    return f"{size(plan.shared_bytes)} of {size(gpu.shared_bytes)} for a thread block ({share:.0f} %), as estimated"


def registers(plan: PersistentPlan) -> str:
    """Describe the registers of a thread against the limit, as the planner estimates them."""
    if not plan.exact:
        limit = thread_registers(plan.num_warps, plan.together)
        return (
            f"{plan.register_bytes // 4} of {limit} in a thread, for weights, operands and accumulators, as estimated"
        )
    limit = ALONE_REGISTER_BYTES if plan.alone else REGISTER_BYTES
    return f"{plan.register_bytes} bytes of accumulators and gate inputs in a thread, of {limit} at most, as estimated"


def layers(passes: Mapping[str, Overlap | str]) -> str:
    """Describe how the layers of a stack are computed, by pass: how they overlap, or why they do not."""
    if all(isinstance(found, str) for found in passes.values()):
        return f"one after another: {'; '.join(f'{name}, {found}' for name, found in passes.items())}"
    words = []
    for name, found in passes.items():
        if isinstance(found, str):
            words.append(f"{name} one after another: {found}")
        else:
            gain = f"{found.us / found.apart_us:.2f} of the time of one after another, simulated"
            words.append(f"{name} {found.lanes} at a time in chunks of {plural(found.chunk, 'step')}: {gain}")
    return f"by captured(overlap=True) {'; '.join(words)}; else one after another"


def plural(count: int, noun: str) -> str:
    """Return the count with its noun."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Return a number of bytes with a unit."""
    if count < 1024:
        return plural(count, "byte")
    name, unit = ("KiB", 2**10) if count < 2**20 else ("MiB", 2**20) if count < 2**30 else ("GiB", 2**30)
    return f"{count / unit:.1f}".removesuffix(".0") + f" {name}"


def time(us: float | None) -> str:
    """Return microseconds with a unit that suits them; "-" for None."""
    if us is None:
        return "-"
    if us < 1e3:
        return f"{us:.2f} us" if us < 100 else f"{us:.0f} us"
    return f"{us / 1e3:.2f} ms" if us < 1e5 else f"{us / 1e3:,.0f} ms"
