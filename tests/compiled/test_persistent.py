"""The persistent kernels on the plans that are ranked first for the suites' shapes and the GPUs of the table, compiled.

Hundreds of kernels take longer to compile than a test run may: of each pass and tile one is compiled, in the long tests
of each way to cut the columns, too; those of a kind take turns over GPU, variant and type. Which release of Triton
compiles is the Makefile's variable.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import NamedTuple

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

import torch
from lstm_triton_kernels import sequence_persistent, settle
from lstm_triton_kernels.gpus import GPU, GPUS
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.planner import MOST_SPILLED, MOST_TRIES, ranked_plans
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.sizes import Layer

from benchmarks.simulator.sass import basic_blocks, disassemble, time_loop
from benchmarks.simulator.step import function_at
from benchmarks.suites import GPU_SUITES, cases
from lstm_triton import VARIANTS, LSTMSpec, estimates

PARTS = 6

MOST_ACCESSES = 16
"""Of spilled registers in a step, by a thread of a kernel in Gluon."""


class Kernel(NamedTuple):
    """A pass of a layer on a plan of a GPU."""

    layer: Layer
    backward: bool
    gpu: GPU
    plan: PersistentPlan

    def __str__(self) -> str:
        name = "backward" if self.backward else "forward"
        return (
            f"{self.gpu.name} {name} {self.layer.spec.name} {self.layer.rate} H={self.layer.H} {self.plan.describe()}"
        )


def kind(kernel: Kernel, cuts: bool) -> tuple:
    plan = kernel.plan
    tile = (plan.block_u, plan.block_b, plan.block_k, plan.kept > 0, plan.group < plan.chunks, plan.streamed > 0)
    if plan.streamed and not cuts:
        tile = ("streamed", plan.block_b)
    cut = (plan.parts, plan.chunks, plan.kept, plan.group, plan.num_warps, plan.together, plan.tiled) if cuts else ()
    return (kernel.backward, *tile, *cut, plan.wait, plan.exact, plan.blocks_per_program == 1)


def chosen(cuts: bool = False) -> list[Kernel]:
    """One kernel of each kind; cuts: kernels whose columns are cut in another way are another kind."""
    found: dict[tuple, list[Kernel]] = {}
    suites = [case for case in cases(GPU_SUITES) if not case.cell]
    for gpu, case, ragged in itertools.product(GPUS.values(), suites, (False, True)):
        layer = case.layer._replace(ragged=ragged)
        for backward in estimates.passes(layer).values():
            plans = ranked_plans(layer, backward, gpu)
            if not isinstance(plans, str):
                kernel = Kernel(layer, backward, gpu, plans[0])
                found.setdefault(kind(kernel, cuts), []).append(kernel)
    return [kin[number * 7 % len(kin)] for number, kin in enumerate(found.values())]


def compiled(kernel: Kernel):
    """The kernel as Triton compiles it for the GPU, by the library's own launcher."""
    launch = sequence_persistent.launch_without_data(kernel.layer, kernel.backward)
    grid = kernel.plan.grid
    with settle.absent_gpu(kernel.gpu.capability):
        kernel_function = sequence_persistent.kernel_of(launch, kernel.plan)
        return kernel_function.run(grid=grid, warmup=True, **launch.arguments(kernel.plan))


def tensor_core(ptx: str) -> bool:
    return re.search(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.", ptx) is not None


def side_of_weights(plan: PersistentPlan) -> int:
    """Which operand of the products the weights are: where a program holds all units the right one, else the left."""
    return 1 if plan.alone else 0


def loaded_in_a_step(ttgir: str, side: int) -> int:
    """How many products in the time loop have an operand, 0 the left and 1 the right, that was not loaded before it.

    Into shared memory, which the loop reads (local_load, of one of several chunks: memdesc_index), or into registers.
    """
    lines = ttgir.splitlines()
    defined = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"\s*(%\S+?)(?::\d+)? = ", line))}
    loop = max(n for n, line in enumerate(lines) if "scf.for" in line and any("tt.dot" in x for x in lines[n:]))
    products = [line for line in lines if "tt.dot " in line]
    assert products
    found = 0
    for line in products:
        operand = line.split("tt.dot ")[1].split(",")[side].strip()
        if operand in defined and defined[operand] < loop:
            continue
        if operand not in defined:
            found += 1
            continue
        source = re.search(r"ttg\.(?:local_load|convert_layout) (%[\w#.]+)", lines[defined[operand]])
        if source and (chunk := re.search(r"ttg\.memdesc_index (%[\w#.]+)\[", lines[defined[source[1]]])):
            source = chunk
        found += source is None or not defined[source[1]] < loop
    return found


def spills_of_a_step(cubin: bytes) -> int:
    """How many instructions in the time loop load or store local memory."""
    blocks = basic_blocks(disassemble(cubin))
    _, loop = time_loop(blocks)
    return sum(one.name in ("LDL", "STL") for n in loop for one in blocks[n].instructions)


@cache
def usage(kernel: Kernel, plan: PersistentPlan) -> settle.Usage:
    """What the kernel would use on another plan."""
    return sequence_persistent.usages(*kernel[:3], [plan])[0]


def taken(kernel: Kernel) -> PersistentPlan:
    """The plan that the launcher would take on the kernel's GPU: the first, unless it spills too much."""
    plans = ranked_plans(*kernel[:3])
    return settle.first_clean(plans, lambda plan: usage(kernel, plan))


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("cuts", [False, pytest.param(True, marks=pytest.mark.long)], ids=["tiles", "tiles and cuts"])
def test_a_plan_keeps_its_weights_on_the_chip_and_waits_as_it_says(cuts, part):
    some = chosen(cuts)[part::PARTS]
    assert some
    for first in some:
        assert_as_planned(first if first.plan.exact else first._replace(plan=taken(first)))


def assert_as_planned(kernel: Kernel) -> None:
    """The weights stay on the chip; tensor cores, cooperative launch, shared memory and spills are as planned."""
    found = compiled(kernel)
    assert loaded_in_a_step(found.asm["ttgir"], side_of_weights(kernel.plan)) == kernel.plan.streamed, kernel
    assert found.metadata.shared <= kernel.gpu.shared_bytes, kernel
    assert tensor_core(found.asm["ptx"]) != (kernel.layer.rate == "float32"), kernel
    assert bool(found.metadata.launch_cooperative_grid) == (kernel.plan.wait is not None), kernel
    if not kernel.plan.exact:
        spilled = usage(kernel, kernel.plan).spilled  # ahead of the loop that costs nothing
        assert spilled == 0 or spills_of_a_step(found.asm["cubin"]) <= MOST_ACCESSES, kernel
        gains = 12 * kernel.plan.block_u * kernel.layer.spec.layer_norm  # of the units, laid out anew before the loop
        assert 0 <= found.metadata.shared - kernel.plan.shared_bytes <= 256 + gains, kernel


WITHIN_A_STEP = [
    Layer(LSTMSpec.parse(variant), 64, B, H, D, dtype, precision, P=P, training=True, ragged=ragged)
    for variant, B, H, D, dtype, precision, P, ragged in (
        ("standard", 16, 1024, 1, torch.bfloat16, "ieee", 512, False),
        ("standard", 16, 2048, 1, torch.float16, "ieee", 640, False),
        ("coupled+diagonal+current", 64, 768, 1, torch.float32, "tf32", 256, True),
        ("full+current", 16, 512, 2, torch.bfloat16, "ieee", 0, True),
        ("full+current", 256, 256, 1, torch.float32, "tf32", 100, False),
        ("full+current", 8, 256, 1, torch.float32, "ieee", 64, False),
    )
]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "layer", WITHIN_A_STEP, ids=lambda layer: f"{layer.spec.name} {layer.rate} {layer.H} {layer.P}"
)
def test_products_within_a_step_keep_their_weights_on_the_chip(layer, backward):
    first = Kernel(layer, backward, GPUS["h100"], ranked_plans(layer, backward, GPUS["h100"])[0])
    assert first.plan.peephole or first.plan.projection
    assert_as_planned(first if first.plan.exact else first._replace(plan=taken(first)))


@pytest.mark.parametrize("name", [spec.name for spec in VARIANTS if not spec.full])
def test_few_units_compile_in_float32(name):
    """Compiling some of these kernels ended the process: see `activations.sigmoid`."""
    layer = Layer(LSTMSpec.parse(name), 64, 64, 32, 1, torch.float32, training=True)
    plans = [plan for plan in ranked_plans(layer, False, GPUS["h100"]) if plan.alone]
    assert {plan.block_b for plan in plans} == {16, 32}
    for plan in plans:
        assert compiled(Kernel(layer, False, GPUS["h100"], plan)).asm["cubin"]


def test_weights_that_are_loaded_in_the_loop_are_seen():
    """A test of the test: the other operand of the products is loaded in every step."""
    kernel = next(kernel for kernel in chosen() if kernel.plan.parts > 1 and kernel.layer.rate == "bfloat16")
    ttgir = compiled(kernel).asm["ttgir"]
    side = side_of_weights(kernel.plan)
    assert loaded_in_a_step(ttgir, side) == 0
    assert loaded_in_a_step(ttgir, 1 - side) > 0


ANCHOR = Layer(LSTMSpec(), 1024, 16, 768, 1, torch.bfloat16, training=True)

WIDE = {
    "4,096 units": ANCHOR._replace(H=4096),
    "4,096 units, one row": ANCHOR._replace(H=4096, B=1, dtype=torch.float16),
    "1,840 units in TF32": ANCHOR._replace(H=1840, dtype=torch.float32, precision="tf32"),
    "2,048 units in TF32, both directions": ANCHOR._replace(H=2048, D=2, dtype=torch.float32, precision="tf32"),
    "coupled": ANCHOR._replace(H=4096, B=5, spec=LSTMSpec(coupled=True)),
    "diagonal": ANCHOR._replace(H=3000, B=12, spec=LSTMSpec(peephole="diagonal")),
    "diagonal, with lengths": ANCHOR._replace(H=3000, B=12, spec=LSTMSpec(peephole="diagonal"), ragged=True),
    "full": ANCHOR._replace(H=2304, spec=LSTMSpec(peephole="full")),
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (n > 0)) for n, name in enumerate(WIDE)]
)
def test_what_does_not_fit_the_chip_is_loaded_once_a_step_and_nothing_spills(name, backward):
    """By the machine code: loads of 16 bytes a lane, in the time loop as many as the plan says, and no local memory.

    With lengths a few registers are spilled.
    """
    kernel = Kernel(WIDE[name], backward, GPUS["h100"], ranked_plans(WIDE[name], backward, GPUS["h100"])[0])
    plan, found = kernel.plan, compiled(kernel)
    assert plan.streamed and taken(kernel) == plan
    assert usage(kernel, plan).spilled == 0 or kernel.layer.ragged
    assert loaded_in_a_step(found.asm["ttgir"], 0) == plan.streamed
    blocks = basic_blocks(disassemble(found.asm["cubin"]))
    _, loop = time_loop(blocks)
    code = [one for n in loop for one in blocks[n].instructions]
    loads = [one for one in code if function_at(*one.lines[0]) == "load_streamed" and one.name == "LDG"]
    of_chunk = plan.tile_bytes // (plan.chunks * plan.parts) // (32 * 16)
    if kernel.layer.spec.coupled and not backward:
        of_chunk = of_chunk * 3 // 4  # a fourth of the rows is zero
    assert len(loads) == plan.streamed * of_chunk and {one.width for one in loads} == {16}
    assert sum(".EF" in one.opcode for one in loads) == plan.beyond_l2 * of_chunk
    assert spills_of_a_step(found.asm["cubin"]) <= MOST_ACCESSES * kernel.layer.ragged


REGULARIZED = {
    "anchor": ANCHOR,
    "64, 512": ANCHOR._replace(B=64, H=512),
    "128, 1024": ANCHOR._replace(B=128, H=1024),
    "1, 256": ANCHOR._replace(B=1, H=256),
    "anchor in TF32": ANCHOR._replace(dtype=torch.float32, precision="tf32"),
}
ALL_RULES = Rules.rounded(0.3, 0.3, 0.1, 0.1, 3.0, 0.0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (n > 0)) for n, name in enumerate(REGULARIZED)]
)
def test_regularised_steps_run_on_the_plan_of_plain_ones_and_hardly_spill(name, backward):
    layer, gpu = REGULARIZED[name], GPUS["h100"]
    first = ranked_plans(layer, backward, gpu)[0]
    (used,) = sequence_persistent.usages(layer, backward, gpu, [first], ALL_RULES)
    assert used.spilled <= MOST_SPILLED and taken(Kernel(layer, backward, gpu, first)) == first
    launch = sequence_persistent.launch_without_data(layer, backward, ALL_RULES)
    assert all(launch.inputs["rules"][n] is not None for n in (0, 1, 3, 4, 5, 6))
    with settle.absent_gpu(gpu.capability):
        kernel = sequence_persistent.kernel_of(launch, first)
        cubin = kernel.run(grid=first.grid, warmup=True, **launch.arguments(first)).asm["cubin"]
    assert spills_of_a_step(cubin) <= MOST_ACCESSES


@pytest.mark.parametrize("backward", [False, True])
def test_what_a_kernel_uses_is_told_without_a_gpu(backward):
    plans = ranked_plans(ANCHOR, backward, GPUS["h100"])[:MOST_TRIES]
    for usage, plan in zip(sequence_persistent.usages(ANCHOR, backward, GPUS["h100"], plans), plans, strict=True):
        assert 64 <= usage.registers <= 255 and usage.registers * 32 * plan.num_warps <= 65536
        assert plan.shared_bytes <= usage.shared <= plan.shared_bytes + 1024 <= GPUS["h100"].shared_bytes
        assert 0 <= usage.spilled <= MOST_SPILLED


def test_a_spill_is_told():
    """Squeezed into few registers a kernel keeps the rest in memory."""
    plan = ranked_plans(ANCHOR, False, GPUS["h100"])[0]
    launch = sequence_persistent.launch_without_data(ANCHOR, False)
    squeezed = launch.arguments(plan) | dict(maxnreg=64)
    kernel = sequence_persistent.kernel_of(launch, plan)
    usage = settle.usage_elsewhere(kernel, plan.grid, squeezed, 90)
    assert usage.registers <= 64 and usage.spilled > MOST_SPILLED
    with settle.absent_gpu(90):
        assert spills_of_a_step(kernel.run(grid=plan.grid, warmup=True, **squeezed).asm["cubin"]) > MOST_ACCESSES


def test_a_tool_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"cuobjdump of Triton .* failed: "):
        settle.run_tool("cuobjdump", "--dump-resource-usage", str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match=r"cuobj of Triton .* does not run: "):
        settle.run_tool("cuobj")
