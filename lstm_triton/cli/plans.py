"""What `lstm-triton info --hidden N` says of one layer: which strategy runs, how its launches are cut, and why.

Pure functions from sizes and a GPU to rows (name, text); the planner and `selection` decide, here it is put into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lstm_triton_kernels.gpus import GPU, GPUS, gpu_of, nominal_constants
from lstm_triton_kernels.limit import Work, least_us_per_step
from lstm_triton_kernels.persistent_plan import (
    FEW_PROGRAMS,
    REGISTER_BYTES,
    PersistentPlan,
    Recurrence,
    usual_wait,
)

from lstm_triton import VARIANTS, LSTMSpec, dispatch, selection
from lstm_triton.cli import info
from lstm_triton.cli.errors import UserError
from lstm_triton.selection import Choice, Layer

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "bf16": (torch.bfloat16, "ieee"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp32": (torch.float32, "ieee"),
    "float32": (torch.float32, "ieee"),
    "fp64": (torch.float64, "ieee"),
    "float64": (torch.float64, "ieee"),
}
"""What a user calls a type: the type of the storage, and the precision of float32 products."""

DEFAULT_BATCH = 16
DEFAULT_STEPS = 512
DEFAULT_DTYPE = "float32"
ASSUMED_GPU = "h100"

LARGEST_SIZE = 2**31 - 1
"""Of every size: no tensor of a layer beyond it fits a GPU."""

STRATEGY_WORDS = {
    "persistent": "one launch computes all steps of a pass; the recurrent weights stay on the chip",
    "stepwise": "every step has its own launches, which read the recurrent weights again",
    "cudnn": "the operator of torch.nn.LSTM, by cuDNN",
    "torch": "PyTorch's own operators; no kernel of this library runs",
    "none": "no backend can run",
}

NOT_MEASURED = "from data sheet and assumptions, nothing measured"

Rows = list[tuple[str, str]]


class Section(NamedTuple):
    """A table: its title, and rows of a name and a text."""

    title: str
    rows: Rows


class Question(NamedTuple):
    """The layer that is asked about; inputs: I; proj: P, the size of the projection, 0 without."""

    layer: Layer
    inputs: int
    proj: int


class Target(NamedTuple):
    """A GPU to plan for; device: where it is in this machine, None for one of the table."""

    gpu: GPU
    device: torch.device | None = None


def question(
    hidden: int,
    batch: int = DEFAULT_BATCH,
    inputs: int | None = None,
    steps: int = DEFAULT_STEPS,
    bidirectional: bool = False,
    dtype: str = DEFAULT_DTYPE,
    variant: str = "standard",
    proj: int = 0,
    inference: bool = False,
    ragged: bool = False,
) -> Question:
    """The layer that the options describe; inputs None: as many as hidden units.

    Raises UserError for an unknown type or variant, and for a projection that is not smaller than the layer.
    """
    if dtype not in DTYPES:
        raise UserError(f"unknown dtype {dtype!r}: there are {', '.join(DTYPES)}")
    names = [spec.name for spec in VARIANTS]
    if variant not in names:
        raise UserError(f"unknown variant {variant!r}: there are {', '.join(names)}")
    if proj >= hidden:
        raise UserError(f"--proj must be smaller than --hidden {hidden}, got {proj}")
    spec = LSTMSpec.parse(variant)
    storage, precision = DTYPES[dtype]
    directions = 2 if bidirectional else 1
    sizes = (steps, batch, hidden, directions)
    layer = Layer(spec, *sizes, proj > 0, storage, precision, training=not inference, ragged=ragged)
    return Question(layer, hidden if inputs is None else inputs, proj)


def targets(names: Sequence[str]) -> tuple[list[Target], str | None]:
    """The GPUs of these names, each once; "all" stands for all of the table. And a line to say first, or None.

    Without a name: the current CUDA device; where there is none, an assumed GPU and a line that says so.
    Raises UserError for an unknown name.
    """
    if not names:
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            return [Target(gpu_of(device), device)], None
        gpu = GPUS[ASSUMED_GPU]
        return [Target(gpu)], f"There is no CUDA device here. The plan is for {ASSUMED_GPU}; --gpu chooses another GPU."
    chosen: dict[str, None] = {}
    for name in names:
        if name not in (*GPUS, "all"):
            raise UserError(f"unknown GPU {name!r}: there are {', '.join(GPUS)}, and all")
        chosen |= dict.fromkeys(GPUS if name == "all" else (name,))
    return [Target(GPUS[name]) for name in chosen], None


def sections(asked: Question, chosen: Sequence[Target]) -> list[Section]:
    """Everything there is to say: the layer; for each GPU what runs and why, and each pass."""
    found = [Section("the layer", layer_facts(asked))]
    for target in chosen:
        name = target.gpu.name
        found.append(Section(f"{name}: what runs", strategy_facts(asked, target)))
        for backward in (False, True)[: 1 + asked.layer.training]:
            found.append(Section(f"{name}: {pass_name(backward)} pass", pass_facts(asked, target, backward)))
    return found


def layer_facts(asked: Question) -> Rows:
    """The layer in words."""
    layer = asked.layer
    rows = [
        ("variant", layer.spec.name),
        ("sizes", f"{plural(layer.H, 'hidden unit')}, {plural(asked.inputs, 'input')}"),
        ("sequence", sequence_words(layer)),
        ("directions", "two" if layer.D == 2 else "one"),
        ("dtype", dtype_words(layer)),
        ("for", "training: forward and backward pass" if layer.training else "inference: forward pass alone"),
    ]
    if asked.proj:
        rows.insert(2, ("projection", f"to {asked.proj}"))
    return rows


def sequence_words(layer: Layer) -> str:
    """How many rows and steps, and whether the rows differ."""
    if layer.ragged:
        return f"{plural(layer.B, 'batch row')} of up to {plural(layer.T, 'step')}, with lengths or resets"
    return f"{plural(layer.B, 'batch row')} of {plural(layer.T, 'step')}"


def dtype_words(layer: Layer) -> str:
    """The type, and for float32 how it is multiplied."""
    name = str(layer.dtype).removeprefix("torch.")
    if layer.dtype != torch.float32:
        return name
    if layer.precision == "tf32":
        return f"{name}, multiplied as tf32 (torch.backends.cuda.matmul.fp32_precision = 'tf32')"
    return f"{name}, multiplied in full precision (PyTorch's default); --dtype tf32 is faster"


def choice(asked: Question, target: Target) -> Choice:
    """What `strategy="auto"` takes, and why; "torch" or "none" where no kernel will run on the device.

    A GPU of the table is taken to have cuDNN and to run the kernels.
    """
    may = True
    if target.device is not None:
        name, reason = info.backend(target.device, asked.layer.dtype)
        if name != "triton":
            return Choice(name, reason)
        may = dispatch.requested() != "triton" and selection.why_not_cudnn(target.device, asked.layer.spec) is None
    return selection.strategy_of("auto", asked.layer, target.gpu, cudnn_may=may)


def strategy_facts(asked: Question, target: Target) -> Rows:
    """What the GPU is, which strategy `auto` takes on it, and the reason."""
    gpu = target.gpu
    chosen = choice(asked, target)
    shared = size(gpu.shared_bytes)
    return [
        ("GPU", f"{gpu.multiprocessors} multiprocessors, up to {shared} of shared memory for a program"),
        ("auto takes", f"{chosen.name}: {strategy_words(chosen.name)}"),
        ("why", chosen.reason),
    ]


def strategy_words(name: str) -> str:
    """What a strategy or backend is."""
    return STRATEGY_WORDS.get(name, "a strategy of this library")


def pass_name(backward: bool) -> str:
    """As `selection.plans` calls the pass."""
    return "backward" if backward else "forward"


def pass_facts(asked: Question, target: Target, backward: bool) -> Rows:
    """The persistent plan of a pass in words, or why there is none and what runs instead; and the least time."""
    layer, gpu = asked.layer, target.gpu
    chosen = choice(asked, target)
    plan = selection.plans(layer, gpu)[pass_name(backward)]
    obstacle = why_no_plan(layer, gpu, backward)
    if obstacle is not None or isinstance(plan, str):
        rows = [
            ("plan", "there is no persistent plan"),
            ("why", obstacle or str(plan)),
            ("instead", f"{chosen.name}: {strategy_words(chosen.name)}"),
        ]
    else:
        rows = [("runs", runs(layer, gpu, chosen)), *plan_facts(selection.recurrence(layer, backward), plan, gpu)]
    return [*rows, ("limit", limit_words(asked, gpu, backward))]


def why_no_plan(layer: Layer, gpu: GPU, backward: bool) -> str | None:
    """Why the pass has no persistent plan; None if it has one, even if the other pass has none.

    What the layer has no kernel for comes first: the planner does not know it, and may have a plan all the same.
    """
    found = selection.plans(layer, gpu)
    sentences = {name: plan for name, plan in found.items() if isinstance(plan, str)}
    obstacle = selection.why_not_persistent(layer, gpu)
    if obstacle is not None and not any(sentence in obstacle for sentence in sentences.values()):
        return obstacle
    return sentences.get(pass_name(backward))


def runs(layer: Layer, gpu: GPU, chosen: Choice) -> str:
    """Whether a plan that there is will run, and if not what would have to change."""
    if chosen.name == "persistent":
        return "yes"
    if chosen.name in ("torch", "none"):
        return f"no: no kernel of this library runs here ({chosen.reason})"
    obstacle = selection.why_not_persistent(layer, gpu)
    if obstacle is not None:
        return f"no: both passes of a layer have one strategy, and the other pass has no plan; {chosen.name} runs"
    return f"not with auto, which takes {chosen.name} (the reason is above); with strategy='persistent' it does"


def plan_facts(work: Recurrence, plan: PersistentPlan, gpu: GPU) -> Rows:
    """A persistent plan in words."""
    return [
        ("programs", programs_words(plan, gpu)),
        ("tile", f"{plural(plan.block_u, 'unit')} x {plural(plan.block_b, 'batch row')} for a program, every step"),
        ("units", units_words(work, plan)),
        ("rows", rows_words(work, plan)),
        ("product", product_words(work, plan)),
        ("warps", f"{plural(plan.num_warps, 'warp')} in a program, {32 * plan.num_warps} threads"),
        ("wait", wait_words(work, plan)),
        ("shared memory", shared_words(plan, gpu)),
        ("weights", weights_words(work, plan)),
        ("registers", registers_words(work, plan)),
        ("estimate", estimate_words(plan)),
        ("stepwise", f"{time(selection.stepwise_estimate_us(work, gpu))} a step by estimate, for comparison"),
    ]


def programs_words(plan: PersistentPlan, gpu: GPU) -> str:
    """The grid, and how it meets the multiprocessors."""
    grid = f"{plan.unit_programs} for units x {plan.row_programs} for rows x {plan.directions} for directions"
    text = f"{plan.programs} = {grid}; the GPU has {gpu.multiprocessors} multiprocessors"
    if plan.programs > gpu.multiprocessors:
        return f"{text}, so some share one or run after others"
    return f"{text}, so all run at once"


def units_words(work: Recurrence, plan: PersistentPlan) -> str:
    """How the units are shared out among programs."""
    if plan.unit_programs == 1:
        padding = f", padded to {plan.block_u}" if plan.block_u > work.H else ""
        return f"every program holds all {work.H}{padding}"
    last = work.H - (plan.unit_programs - 1) * plan.block_u
    rest = f", the last of {last}" if last < plan.block_u else ""
    return f"{work.H} in {plan.unit_programs} parts of {plan.block_u}{rest}"


def rows_words(work: Recurrence, plan: PersistentPlan) -> str:
    """How the batch is cut into blocks of rows, and who works on them."""
    used = min(plan.rows, work.B)
    text = f"{work.B} in {plural(plan.row_blocks, 'block')}; {used} of a tile's {plan.block_b} rows are used"
    last = work.B - (plan.row_blocks - 1) * plan.rows
    if plan.row_blocks > 1 and last < plan.rows:
        text += f", {last} in the last block"
    if plan.blocks_per_program > 1:
        text += f"; a program works through up to {plan.blocks_per_program} blocks in every step"
    return text


def product_words(work: Recurrence, plan: PersistentPlan) -> str:
    """How the columns of the recurrent product are cut, and what multiplies."""
    columns = plan.chunks * plan.split * plan.block_k
    each = " for each gate" if work.backward else ""
    how = "in float32, without tensor cores" if plan.exact else "on tensor cores"
    if plan.split == 1:
        cut = f"{columns} columns at once (H = {work.H}){each}, the warps share the units"
    else:
        chunks = plural(plan.chunks, "chunk")
        cut = f"{chunks} x {plan.split} warps x {plan.block_k} = {columns} columns (H = {work.H}){each}"
        if plan.chunks > 1:
            cut += ", all chunks read at once" if plan.group == plan.chunks else f", {plan.group} read at a time"
    return f"{cut}; {how}"


def wait_words(work: Recurrence, plan: PersistentPlan) -> str:
    """How programs wait for each other, and why so."""
    if plan.wait is None:
        return "none: one program holds all units"
    if plan.wait == "data":
        values = "gradients" if work.backward else "h and c" if work.matrices else "h"
        how = f"data: a program reads {values} until nothing is missing, one round trip through L2"
    else:
        how = f"{plan.wait}: a program counts up when it has stored its part, two round trips through L2"
    if plan.wait != usual_wait(work, plan):
        reason = "the usual way to wait has no plan here"
    elif plan.wait == "data":
        reason = "they are few, and each has one block of rows, so nothing could hide a longer wait"
    elif work.backward:
        reason = "gradients are read gate by gate, and without a count each of these reads would be a round trip"
    elif plan.blocks_per_program > 1:
        reason = "it works on other blocks of rows meanwhile, which hides the longer wait"
    else:
        reason = f"where more than {FEW_PROGRAMS} programs poll the data itself, these reads take longer than the wait"
    return f"{how}; {reason}"


def shared_words(plan: PersistentPlan, gpu: GPU) -> str:
    """Shared memory of a program against the limit."""
    share = 100 * plan.shared_bytes / gpu.shared_bytes
    return f"{size(plan.shared_bytes)} of {size(gpu.shared_bytes)} for a program ({share:.0f} %)"


def resident_bytes(work: Recurrence, plan: PersistentPlan) -> int:
    """Bytes of the weights that one program keeps, padding included."""
    columns = plan.chunks * plan.split * plan.block_k
    return columns * plan.block_u * (work.gates + work.matrices) * work.element_bytes


def weights_words(work: Recurrence, plan: PersistentPlan) -> str:
    """The resident weights: of a program, and of the layer."""
    matrices = f"{work.gates} gates" + (f" and {work.matrices} peephole matrices" if work.matrices else "")
    layer = work.H * work.H * (work.gates + work.matrices) * work.element_bytes * work.D
    return f"{size(resident_bytes(work, plan))} stay in a program: its units of {matrices}; {size(layer)} in the layer"


def accumulator_bytes(work: Recurrence, plan: PersistentPlan) -> int:
    """Bytes of accumulators and gate inputs in a thread, as the planner counts them."""
    if plan.alone:
        blocks = 2 * work.gates + work.matrices
    else:
        accumulators = 2 + (work.matrices > 0) if work.backward else work.gates
        blocks = accumulators * plan.split + work.gates
    return blocks * plan.block_b * plan.block_u * 4 // (32 * plan.num_warps)


def register_limit(plan: PersistentPlan) -> int:
    """The planner's limit of `accumulator_bytes`: twice as much where a program holds all units."""
    return REGISTER_BYTES * (2 if plan.alone else 1)


def registers_words(work: Recurrence, plan: PersistentPlan) -> str:
    """The budget of registers."""
    used, limit = accumulator_bytes(work, plan), register_limit(plan)
    text = f"{used} bytes of accumulators and gate inputs in a thread; the planner's limit is {limit}"
    return f"{text} where one program holds all units" if plan.alone else text


def estimate_words(plan: PersistentPlan) -> str:
    """What the planner thinks that a step takes."""
    return f"{time(plan.estimate_us)} a step, by the planner's model of the launch alone; its constants are assumptions"


def least_us(asked: Question, gpu: GPU, training: bool) -> float | None:
    """The limit of a step of all directions in microseconds; None with a projection, which the model has not."""
    layer = asked.layer
    if asked.proj:
        return None
    work = selection.recurrence(layer, backward=False)
    model = Work(
        T=layer.T,
        B=layer.B,
        I=asked.inputs,
        H=layer.H,
        L=1,
        D=layer.D,
        dtype=work.rate,
        element_bytes=work.element_bytes,
        gates=work.gates,
        full_peephole_blocks=work.matrices,
        training=training,
    )
    return least_us_per_step(model, nominal_constants(gpu)) * layer.D


def limit_words(asked: Question, gpu: GPU, backward: bool) -> str:
    """The limit, and what it is of."""
    least = least_us(asked, gpu, training=backward)
    if least is None:
        return "none: the model of the limit has no projection"
    passes = "forward and backward together" if backward else "forward alone"
    return f"{time(least)} a step at least, {passes}, input products and launch included; {NOT_MEASURED}"


def plural(count: int, noun: str) -> str:
    """The count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def size(count: int) -> str:
    """Bytes for people."""
    if count < 1024:
        return plural(count, "byte")
    name, unit = ("KiB", 2**10) if count < 2**20 else ("MiB", 2**20) if count < 2**30 else ("GiB", 2**30)
    return f"{count / unit:.1f}".removesuffix(".0") + f" {name}"


def time(us: float) -> str:
    """Microseconds for people."""
    return f"{us:.2f} us" if us < 100 else f"{us:.0f} us" if us < 1e4 else f"{us / 1e3:,.0f} ms"
