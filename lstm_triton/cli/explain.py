"""Texts of `lstm-triton info --hidden N`: which engine computes a layer, on which plans, and why.

Functions from sizes and a GPU to rows (name, text): `routing` decides and the planner ranks, here it is put into words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lstm_triton_kernels.float32_plan import ALONE_REGISTER_BYTES, REGISTER_BYTES
from lstm_triton_kernels.gpus import GPU, GPUS, gpu_of, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.plan import PersistentPlan, Preference
from lstm_triton_kernels.planner import MOST_TRIES, ranked_plans
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import VARIANTS, LSTMSpec
from lstm_triton_kernels.tensor_core_plan import fits, thread_registers

from lstm_triton import estimates, routing
from lstm_triton.cli.errors import UserError
from lstm_triton.routing import Choice, Facts

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

ENGINE_WORDS = {
    "persistent": "one launch computes all steps of a pass; the recurrent weights stay on the multiprocessors",
    "stepwise": "every step has its own launches, which read the recurrent weights again",
    "operator": "the operator of torch.nn.LSTM, on a GPU by cuDNN",
    "eager": "every step in PyTorch's own operators; no kernel of this library runs",
    "reference": "a single step in PyTorch's own operators; no kernel of this library runs",
    "none": "what was asked for cannot run",
}

NOT_MEASURED = "from data sheet and assumptions, nothing measured"

Rows = list[tuple[str, str]]


class Section(NamedTuple):
    """A table: its title, and rows of a name and a text."""

    title: str
    rows: Rows


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
) -> Layer:
    """Return the layer that the options describe; inputs None: as many as hidden units.

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
    I = hidden if inputs is None else inputs  # noqa: E741
    sizes = (steps, batch, hidden, directions)
    return Layer(spec, *sizes, storage, precision, I, proj, training=not inference, ragged=ragged)


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


def sections(layer: Layer, chosen: Sequence[Target], compiling: bool = False) -> list[Section]:
    """Return everything there is to say: the layer; for each GPU what runs and why, and each pass.

    compiling: compile the ranked plans for the GPU, which need not be here, and say what the compiler made of them.
    """
    found = [Section("the layer", layer_facts(layer))]
    for target in chosen:
        name = target.gpu.name
        found.append(Section(f"{name}: what runs", engine_facts(layer, target)))
        for pass_name, backward in estimates.passes(layer).items():
            rows = pass_facts(layer, target, backward)
            if compiling:
                rows += compiled_facts(layer, target.gpu, backward)
            found.append(Section(f"{name}: {pass_name} pass", rows))
    return found


def layer_facts(layer: Layer) -> Rows:
    """Describe the layer."""
    rows = [
        ("variant", layer.spec.name),
        ("sizes", f"{plural(layer.H, 'hidden unit')}, {plural(layer.I, 'input')}"),
        ("sequence", sequence_words(layer)),
        ("directions", "two" if layer.D == 2 else "one"),
        ("dtype", dtype_words(layer)),
        ("for", "training: forward and backward pass" if layer.training else "inference: forward pass alone"),
    ]
    if layer.P:
        rows.insert(2, ("projection", f"to {layer.P}"))
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


def choice(layer: Layer, target: Target) -> Choice:
    """Return what `strategy="auto"` takes, and why; "none" where what was asked for cannot run.

    A GPU of the table is taken to have cuDNN and to run the kernels.
    """
    if target.device is None:
        no_operator = routing.why_not_operator(torch.device("cuda"), layer, ())
        return routing.decide(Facts(layer, target.gpu, no_operator=no_operator))
    try:
        return routing.decide(routing.facts_of(layer, target.device))
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))


def engine_facts(layer: Layer, target: Target) -> Rows:
    """Describe the GPU, the engine that `auto` takes on it, and the reason."""
    gpu = target.gpu
    chosen = choice(layer, target)
    shared = size(gpu.shared_bytes)
    return [
        ("GPU", f"{gpu.multiprocessors} multiprocessors, up to {shared} of shared memory for a program"),
        ("auto takes", f"{chosen.name}: {ENGINE_WORDS[chosen.name]}"),
        ("why", chosen.reason),
    ]


def pass_facts(layer: Layer, target: Target, backward: bool) -> Rows:
    """Describe the persistent plan of a pass, or why there is none and what runs instead; and the least time."""
    gpu = target.gpu
    chosen = choice(layer, target)
    plans = ranked_plans(layer, backward, gpu)
    if isinstance(plans, str):
        rows = [
            ("plan", "there is no persistent plan"),
            ("why", plans),
            ("instead", f"{chosen.name}: {ENGINE_WORDS[chosen.name]}"),
        ]
    else:
        rows = [
            ("runs", runs(layer, gpu, chosen)),
            *plan_facts(layer, backward, plans[0], gpu),
            ("then", ranked_words(plans)),
        ]
    return [*rows, ("limit", limit_words(layer, gpu, backward))]


def runs(layer: Layer, gpu: GPU, chosen: Choice) -> str:
    """Say whether a plan that there is will run, and if not what would have to change."""
    if chosen.name == "persistent":
        return "yes"
    if chosen.name in ("eager", "reference", "none"):
        return f"no: no kernel of this library runs here ({chosen.reason})"
    if routing.why_not_persistent(layer, gpu) is not None:
        return f"no: both passes of a layer have one engine, and the other pass has no plan; {chosen.name} runs"
    return f"not with auto, which takes {chosen.name} (the reason is above); with strategy='persistent' it does"


def ranked_words(plans: Sequence[PersistentPlan]) -> str:
    """List the plans that are tried after the first."""
    shown = [f"{plan.describe()} ({time(plan.estimate_us)})" for plan in plans[1:MOST_TRIES]]
    rule = "on a GPU the first that compiles without spilling registers is used"
    return f"{rule}; next: {'; '.join(shown)}" if shown else f"none; {rule}"


def compiled_facts(layer: Layer, gpu: GPU, backward: bool) -> Rows:
    """Compile the plans of a pass that would be tried, and describe what the compiler made of each.

    Raises UserError where Triton, or a tool of its, is not there.
    """
    plans = ranked_plans(layer, backward, gpu)
    if isinstance(plans, str):
        return []
    if not routing.TRITON_INSTALLED:
        raise UserError("--compile needs triton (pip install triton)")
    from lstm_triton_kernels import sequence_persistent, settle

    tried = plans[:MOST_TRIES]
    try:
        usages = dict(zip(tried, sequence_persistent.usages(layer, backward, gpu, tried), strict=True))
    except RuntimeError as error:
        raise UserError(str(error)) from error
    used = settle.first_clean(
        tried, lambda plan: usages[plan] if fits(plan.together, usages[plan].shared, gpu) else None
    )
    rows = []
    for plan, usage in usages.items():
        text = f"{usage.registers} registers, {usage.spilled} spilled, {size(usage.shared)} of shared memory"
        rows.append(("compiled", f"{plan.describe()}: {text}{'; this one is used' if plan is used else ''}"))
    return rows


def plan_facts(layer: Layer, backward: bool, plan: PersistentPlan, gpu: GPU) -> Rows:
    """Describe a persistent plan."""
    return [
        ("programs", programs_words(plan, gpu)),
        ("tile", f"{plural(plan.block_u, 'unit')} x {plural(plan.block_b, 'batch row')} for a program, every step"),
        ("units", units_words(layer, plan)),
        ("rows", rows_words(layer, plan)),
        ("product", product_words(layer, backward, plan)),
        ("warps", f"{plural(plan.num_warps, 'warp')} in a program, {32 * plan.num_warps} threads"),
        ("wait", wait_words(layer, backward, plan, gpu)),
        ("shared memory", shared_words(plan, gpu)),
        ("weights", weights_words(layer, plan)),
        ("registers", registers_words(plan)),
        ("estimate", estimate_words(plan)),
        ("stepwise", f"{time(stepwise_us(layer, backward, gpu))} a step by estimate, for comparison"),
    ]


def programs_words(plan: PersistentPlan, gpu: GPU) -> str:
    """Describe the grid, and how it meets the multiprocessors."""
    grid = f"{plan.unit_programs} for units x {plan.row_programs} for rows x {plan.directions} for directions"
    text = f"{plan.programs} = {grid}; the GPU has {gpu.multiprocessors} multiprocessors"
    if plan.together > 1:
        return f"{text}, each with room for {plan.together} programs, so all run at once"
    if plan.programs > gpu.multiprocessors:
        return f"{text}, so some share one or run after others"
    return f"{text}, so all run at once"


def units_words(layer: Layer, plan: PersistentPlan) -> str:
    """How the units are shared out among programs."""
    if plan.unit_programs == 1:
        padding = f", padded to {plan.block_u}" if plan.block_u > layer.H else ""
        return f"every program holds all {layer.H}{padding}"
    last = layer.H - (plan.unit_programs - 1) * plan.block_u
    rest = f", the last of {last}" if last < plan.block_u else ""
    return f"{layer.H} in {plan.unit_programs} parts of {plan.block_u}{rest}"


def rows_words(layer: Layer, plan: PersistentPlan) -> str:
    """How the batch is cut into blocks of rows, and who works on them."""
    used = min(plan.rows, layer.B)
    text = f"{layer.B} in {plural(plan.row_blocks, 'block')}; {used} of a tile's {plan.block_b} rows are used"
    last = layer.B - (plan.row_blocks - 1) * plan.rows
    if plan.row_blocks > 1 and last < plan.rows:
        text += f", {last} in the last block"
    if plan.blocks_per_program > 1:
        text += f"; a program works through up to {plan.blocks_per_program} blocks in every step"
    return text


def product_words(layer: Layer, backward: bool, plan: PersistentPlan) -> str:
    """How the columns of the recurrent product are cut, and what multiplies."""
    columns = plan.chunks * plan.parts * plan.block_k
    how = "in float32, without tensor cores" if plan.exact else "on tensor cores"
    if plan.alone:
        each = " for each gate" if backward else ""
        cut = f"{columns} columns at once (H = {layer.H}){each}, the warps share the units"
    else:
        real = f"{layer.gates} gates of H = {layer.H}" if backward else f"H = {layer.H}"
        if layer.matrices and not (backward or plan.exact):
            real += " of h and of c"
        parts = f"{plural(plan.chunks, 'chunk')} x {plural(plan.parts, 'part')} x {plan.block_k}"
        cut = f"{parts} = {columns} columns ({real})"
        if plan.chunks > 1:
            cut += ", all chunks read at once" if plan.group == plan.chunks else f", {plan.group} read at a time"
    return f"{cut}; {how}"


def wait_words(layer: Layer, backward: bool, plan: PersistentPlan, gpu: GPU) -> str:
    """How programs wait for each other, and what the best plan with the other way to wait would take."""
    if plan.wait is None:
        return "none: one program holds all units"
    if plan.wait == "data":
        values = "gradients" if backward else "h and c" if layer.matrices else "h"
        how = f"data: a {'program' if plan.exact else 'warp'} reads {values} until nothing is missing"
        how += f", for the first time {plan.pause} clocks after its program has stored" if plan.pause else ""
        if not plan.exact:
            return how
    else:
        how = "counter: a program counts up when it has stored its part, and reads when all have"
    other = "counter" if plan.wait == "data" else "data"
    plans = ranked_plans(layer, backward, gpu, Preference(wait=other))
    if isinstance(plans, str):
        return f"{how}; no plan with {other} fits"
    return f"{how}; by estimate a step with {other} takes {time(plans[0].estimate_us)}"


def shared_words(plan: PersistentPlan, gpu: GPU) -> str:
    """Shared memory of a program against the limit."""
    share = 100 * plan.shared_bytes / gpu.shared_bytes
    return f"{size(plan.shared_bytes)} of {size(gpu.shared_bytes)} for a program ({share:.0f} %)"


def weights_words(layer: Layer, plan: PersistentPlan) -> str:
    """The resident weights: of a program, and of the layer."""
    matrices = f"{layer.gates} gates" + (f" and {layer.matrices} peephole matrices" if layer.matrices else "")
    total = size(layer.recurrent_bytes * layer.D)
    if plan.exact or plan.kept == plan.chunks:
        where = "in its shared memory"
    elif plan.kept == 0:
        where = "in its registers"
    else:
        kept = size(plan.tile_bytes * plan.kept // plan.chunks)
        where = f"{kept} of them in its shared memory, the rest in its registers"
    return f"{size(plan.tile_bytes)} stay in a program, {where}: its units of {matrices}; {total} in the layer"


def registers_words(plan: PersistentPlan) -> str:
    """Describe the budget of registers."""
    if not plan.exact:
        limit = thread_registers(plan.num_warps, plan.together)
        return f"{plan.register_bytes // 4} of {limit} in a thread, for weights, operands and accumulators"
    limit = ALONE_REGISTER_BYTES if plan.alone else REGISTER_BYTES
    text = f"{plan.register_bytes} bytes of accumulators and gate inputs in a thread; the planner's limit is {limit}"
    return f"{text} where one program holds all units" if plan.alone else text


def estimate_words(plan: PersistentPlan) -> str:
    """What the planner thinks that a step takes."""
    return f"{time(plan.estimate_us)} a step, by the planner's model of the launch alone, with constants of an H100"


def stepwise_us(layer: Layer, backward: bool, gpu: GPU) -> float:
    """Return the estimate of a step of one pass in launches of its own."""
    both, forward = (estimates.estimate_us("stepwise", layer._replace(training=t), gpu) for t in (True, False))
    return both - forward if backward else forward


def limit_words(layer: Layer, gpu: GPU, backward: bool) -> str:
    """Describe the least time of a step of all directions, which the model does not know of a projection."""
    if layer.P:
        return "none: the model of the limit has no projection"
    least = least_us_per_step(layer._replace(training=backward), nominal_constants(gpu)) * layer.D
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
