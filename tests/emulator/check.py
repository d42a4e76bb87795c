"""The library's launchers on the PTX that Triton makes of its kernels, executed on the CPU by `emulator`. No GPU.

A launch of a kernel is compiled by Triton's JIT for a GPU that is not there, so with the specialization that it would
have on one, on the plan that is ranked first for an H100 (capability 80: an A100), and runs in the emulator. What comes
out, every result and every gradient, is compared with `lstm_triton.reference` in float64. BOUND is the relative
Frobenius error allowed; with fewer than 8 units it is at least twice the error of PyTorch's own operators. The emulator
and the comparison are independent of the library; the reference, the plans and the inputs are its own.

Run it from the root of the repository:

    export PYTHONPATH=.:kernels
    check="python -m tests.emulator.check"
    $check                                 # all groups but `suite`; a thread block in lockstep, strong memory
    $check --group together many --weak --gang warp --seed 7    # every warp at its own pace, weak memory
    $check --group suite --every 8 --weak --stats               # also the bank conflicts of every kernel
    $check --group stepwise --match fp16 --first 1 --every 3    # every third of the group from its second on
    $check --list                          # the cases, without running them
    $check --faults                        # planted faults: is each seen?
    $check --barriers                      # every bar.sync taken out in turn; some are needed by no two warps
    $check --anchor                        # B=16, H=768, bfloat16: what a step executes, by kind of instruction

Another release of Triton: `pip install --no-deps --target FOLDER triton==3.6.0`, then FOLDER first on PYTHONPATH.
Triton 3.6 leaves out the fence.proxy.async of the gate matmul for sm_90 where a block has 64 rows: with it, such cases
of `stepwise` end with findings of racecheck, and faults planted in that kernel tell nothing.

A case takes 1 to 150 s. Groups:

- alone: few units, one program has them all (where the plan is several programs after all, that)
- together: programs that wait for each other, by the data and by the counter
- many: several row blocks, two directions
- asked: which gradients are given, recompute, inference, T = 1, other tiles
- stepwise: two launches a step, all variants
- sm80: some of each for an A100
- suite: the plans of the GPU suites (benchmarks/suites.py) for an H100, one of each tile, on few units and rows

For each case a line says `ok` or `FAIL`, the seconds, the case, and the largest error; the lines below it what the
emulator's checks found: the PTX instruction and its source line. The last line counts, and the exit status is 1 if a
case failed or a planted fault was not seen (of `--barriers` it is 0).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from lstm_triton_kernels import cell, gates, sequence_persistent, sequence_stepwise, settle, watch
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.plan import PersistentPlan, Preference, ranked_plans
from lstm_triton_kernels.sizes import Layer
from torch import Tensor

from benchmarks import suites
from benchmarks.micro import float32_matmuls
from lstm_triton import VARIANTS, LSTMSpec, eager, layer, persistent, routing
from lstm_triton.directions import OneByOne
from tests.emulator import emulator
from tests.support.persistent import SERVED, Inputs, LayerCase, errors, expected, inputs_of, plan_of

KERNELS = {
    sequence_persistent: ["persistent_forward_kernel", "persistent_backward_kernel"],
    gates: ["gate_preactivations_kernel", "output_peephole_kernel"],
    cell: ["cell_forward_kernel", "cell_backward_kernel"],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
BOUND = {"bf16": 1.2e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}
"""Relative Frobenius error."""

Plans = tuple[PersistentPlan, PersistentPlan]
"""Of the forward and of the backward pass."""

Change = Callable[[str, str], str]
"""A planted fault: (kernel, PTX) -> PTX."""


@dataclass
class Oracle:
    """How launches are emulated, and what was found."""

    capability: int = 90
    gang: str = "cta"
    weak: bool = False
    seed: int = 0
    stats: bool = False
    change: Change | None = None
    findings: list[emulator.Finding] = field(default_factory=list)
    launches: Counter[str] = field(default_factory=Counter)
    statistics: list[tuple[str, dict[int, Counter[str]]]] = field(default_factory=list)

    def launch(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        compiled = kernel.run(grid=grid, warmup=True, **arguments)
        ptx = compiled.asm["ptx"]
        if self.change is not None:
            ptx = self.change(kernel.__name__, ptx)
        given = [arguments[name] for name, kind in compiled.src.signature.items() if kind != "constexpr"]
        self.seed += 1
        machine = emulator.Machine(
            ptx, grid, given, compiled.metadata.shared, gang=self.gang, weak=self.weak, seed=self.seed, stats=self.stats
        )
        try:
            machine.run()
        finally:
            self.findings += machine.findings.values()
        self.launches[kernel.__name__] += 1
        if self.stats:
            self.statistics.append((kernel.__name__, machine.statistics()))


class StandIn:
    """In place of a jitted kernel."""

    def __init__(self, kernel: Any, oracle: Oracle) -> None:
        self.kernel, self.oracle = kernel, oracle

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.oracle.launch(self.kernel, grid, arguments)


def garbage(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, a function like torch.empty, with memory that the emulator knows as never written."""

    def made(*args: Any, **options: Any) -> Tensor:
        tensor = make(*args, **options)
        if tensor.numel() and tensor.element_size() >= 2 and tensor.is_contiguous():
            tensor.view(torch.int16).fill_(emulator.GARBAGE - 0x10000)
        return tensor

    return made


@contextmanager
def emulated(oracle: Oracle, max_polls: int | None = None) -> Iterator[None]:
    """Inside, launches of the library's kernels run in the emulator, and new memory holds garbage."""
    with ExitStack() as stack:
        stack.enter_context(settle.absent_gpu(oracle.capability))
        for module, names in KERNELS.items():
            for name in names:
                stack.enter_context(mock.patch.object(module, name, StandIn(getattr(module, name), oracle)))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, garbage(getattr(owner, name))))
        if max_polls is not None:
            stack.enter_context(mock.patch.object(sequence_persistent, "POLLS", max_polls))
        yield


@dataclass(frozen=True)
class Case:
    """A layer; wait, block_u, block_b: what is wanted of its plans; gradients: of output, cells, h_n, c_n."""

    variant: str
    dtype: str
    T: int
    B: int
    H: int
    D: int = 1
    wait: str | None = None
    block_u: int | None = None
    block_b: int | None = None
    lengths: bool = False
    resets: bool = False
    recompute: bool = False
    gradients: tuple[bool, bool, bool, bool] = (True, True, True, True)
    stepwise: bool = False
    infer: bool = False
    capability: int = 90
    I: int = 3  # noqa: E741

    def __str__(self) -> str:
        plain = Case(self.variant, self.dtype, self.T, self.B, self.H)
        extra = [
            name if value is True else f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(plain, name)
        ]
        return f"{self.variant} {self.dtype} T{self.T} B{self.B} H{self.H} {' '.join(extra)}".strip()

    @property
    def spec(self) -> LSTMSpec:
        return LSTMSpec.parse(self.variant)

    @property
    def precision(self) -> str:
        return "tf32" if self.dtype == "tf32" else "ieee"

    def plan(self, backward: bool) -> PersistentPlan:
        """The first of the ranked plans. Raises LookupError with the sentence why there is none."""
        ragged = self.lengths or self.resets
        sizes = (self.T, self.B, self.H, self.D)
        whole = Layer(self.spec, *sizes, DTYPES[self.dtype], self.precision, training=not self.infer, ragged=ragged)
        gpu = GPUS["h100"] if self.capability == 90 else GPUS["a100"]
        found = ranked_plans(whole, backward, gpu, Preference(self.wait, self.block_u, self.block_b))
        if isinstance(found, str):
            raise LookupError(found)
        return found[0]

    def plans(self) -> Plans | None:
        """The plans of both passes; None step by step."""
        if self.stepwise:
            return None
        return self.plan(False), self.plan(not self.infer)

    def layer_case(self) -> LayerCase:
        """The case as tests/support/persistent.py has it, where only the directions of the plan matter."""
        return LayerCase(
            self.spec,
            plan_of(self.B, self.H, self.D, wait=None),
            self.T,
            self.B,
            self.H,
            self.I,
            self.lengths,
            self.resets,
            recompute=self.recompute,
            gradients=self.gradients,
            dtype=DTYPES[self.dtype],
            seed=1,
        )


LOOPS: dict[str, layer.Loop] = {
    "persistent": persistent, "stepwise": OneByOne(sequence_stepwise), "eager": OneByOne(eager),
}  # fmt: skip


def computed(case: Case, inputs: Inputs, engine: str, plans: Plans | None) -> list[Tensor]:
    """All results and gradients, in the order of tests/support/persistent.py; in inference the results."""
    spec, loop = case.spec, LOOPS[engine]
    keep = not case.infer
    call = layer.Call(spec.name, True, False, engine, save=keep, recompute=case.recompute, states=keep)
    order = Order(case.T, inputs.lengths, inputs.resets)
    needs = layer.Needs(True, True, True, [list(spec.parameter_names())] * case.D)
    grad_output, grad_cells, grad_h_n, grad_c_n = inputs.gradients
    grads = layer.Gradients(grad_output, grad_h_n, grad_c_n, grad_cells)
    arguments = (inputs.x, inputs.h_0, inputs.c_0, inputs.weights)
    planned = mock.patch.object(sequence_persistent, "plan_of", lambda launch: plans[launch.backward])
    with torch.no_grad(), planned:
        result = layer.forward(*arguments, order, call, loop)
        results = [result.output, result.states, result.h_n, result.c_n]
        if case.infer:
            return results
        saved = (result.output, result.gates, result.cells)
        found = layer.backward(grads, *arguments, *saved, order, call, needs, loop)
    by_name = [side[name] for side in found.weights for name in spec.parameter_names()]
    return [*results, found.x, found.h_0, found.c_0, *by_name]


@dataclass
class Outcome:
    case: str
    plans: list[str]
    worst: tuple[str, float]
    ok: bool
    why: str
    seconds: float
    findings: list[str]


def run(case: Case, oracle: Oracle, max_polls: int | None = None, plans: Plans | None = None) -> Outcome:
    """One case: results and gradients against the float64 reference, and what the checks say.

    Raises LookupError where the case has no plan.
    """
    start = time.time()
    plans = plans or case.plans()
    layer_case = case.layer_case()
    inputs = inputs_of(layer_case)
    oracle.capability = case.capability
    why, bound = "", BOUND[case.dtype]
    found: dict[str, float] = {}
    with float32_matmuls(case.precision):
        try:
            with emulated(oracle, max_polls):
                results = computed(case, inputs, "stepwise" if case.stepwise else "persistent", plans)
            watch.check_launches()
            wanted = expected(layer_case, inputs)
            if case.infer:
                pairs = zip(("output", "h_n", "c_n"), (0, 2, 3), strict=True)
                found = {n: float((results[k].double() - wanted[k]).norm() / wanted[k].norm()) for n, k in pairs}
            else:
                found = errors(layer_case, results, wanted)
            if case.H < 8:  # a few numbers, of which a sum may cancel
                own = computed(case, inputs, "eager", None)
                bound = max(bound, 2 * max(errors(layer_case, own, wanted).values()))
        except (emulator.Fault, RuntimeError) as error:
            why = f"{type(error).__name__}: {error}"
            for words in watch._error_words.values():
                words.seen[:] = 0
    found = {name: error if error == error else float("inf") for name, error in found.items()}
    worst = max(found.items(), key=lambda item: item[1], default=("-", float("inf")))
    if not why and not oracle.launches:
        why = "no kernel was launched"
    if not why and not worst[1] <= bound:
        wrong = {name: f"{error:.1e}" for name, error in found.items() if not error <= bound}
        why = f"beyond {bound:.0e}: {wrong}"
    findings = [f"{f.check}: {f.message} (x{f.times}) at {f.where}" for f in oracle.findings]
    oracle.findings = []
    described = [plan.describe() for plan in plans or ()]
    return Outcome(str(case), described, worst, not why and not findings, why, time.time() - start, findings)


# --- cases ------------------------------------------------------------------------------------------------------------

FLAGS: list[dict[str, bool]] = [{}, {"lengths": True}, {"resets": True}, {"lengths": True, "resets": True}]


def cases() -> dict[str, list[Case]]:
    """By group. Shapes and flags take turns, so that each meets each variant and type somewhere."""
    return {
        "alone": list(alone()),
        "together": list(together()),
        "many": list(many()),
        "asked": list(asked()),
        "stepwise": list(stepwise()),
        "sm80": list(sm80()),
    }


def alone() -> Iterator[Case]:
    heights, rows = (64, 100, 128), (5, 16, 33, 1)
    for n, (spec, dtype) in enumerate(itertools.product(SERVED, DTYPES)):
        k = n + n // 4
        H, B = heights[(k + n // 4) % 3], rows[k % 4]
        yield Case(spec.name, dtype, 3, B, H, 1 + k % 2, **FLAGS[(k // 2) % 4])


def together() -> Iterator[Case]:
    heights, rows = (136, 256, 384), (5, 16, 1, 33)
    for n, (spec, dtype, wait) in enumerate(itertools.product(SERVED, DTYPES, ("data", "counter"))):
        k = n + n // 8
        H, B = heights[k % 3], rows[(k // 2) % 4]
        D = 2 if H < 384 and k % 4 == 0 else 1
        yield Case(spec.name, dtype, 3, B, H, D, wait, **FLAGS[(k // 3) % 4])


def many() -> Iterator[Case]:
    variants = ("standard", "coupled+diagonal", "diagonal+current", "full")
    for n, (variant, dtype) in enumerate(itertools.product(variants, DTYPES)):
        wait = ("counter", "data")[(n + n // 4) % 2]
        yield Case(variant, dtype, 3, 40, 264, 2, wait, **FLAGS[n % 4])


def asked() -> Iterator[Case]:
    for n, gradients in enumerate(itertools.product((True, False), repeat=4)):
        if any(gradients):
            flags = dict(lengths=n % 3 == 0, recompute=n % 4 == 1)
            yield Case("standard", "bf16", 3, 5, (64, 136)[n % 2], gradients=gradients, **flags)
    for H, wait in ((64, None), (136, "data"), (136, "counter")):
        yield Case("standard", "bf16", 4, 5, H, wait=wait, infer=True)
        yield Case("full", "bf16", 4, 5, H, wait=wait, infer=True, lengths=True)
    yield Case("standard", "bf16", 1, 5, 136, wait="data")
    yield Case("coupled", "fp16", 1, 5, 136, wait="counter")
    for dtype, wait in itertools.product(("bf16", "tf32"), ("data", "counter")):
        yield Case("standard", dtype, 6, 35, 264, wait=wait, block_u=16, lengths=True, resets=True)
    for H in (64, 136, 264):
        yield Case("standard", "bf16", 3, 33, H, block_b=32)


def stepwise() -> Iterator[Case]:
    sizes = ((17, 24), (64, 128), (300, 130), (1, 1), (33, 100), (5, 64))
    for n, (spec, dtype) in enumerate(itertools.product(VARIANTS, DTYPES)):
        B, H = sizes[(n + n // 4) % 6]
        T = (3, 1)[n % 5 == 0]
        yield Case(spec.name, dtype, T, B, H, 1 + n % 2, stepwise=True, resets=n % 3 == 0, I=7)


def sm80() -> Iterator[Case]:
    variants = ("standard", "coupled", "diagonal+current", "full")
    for n, (variant, dtype) in enumerate(itertools.product(variants, DTYPES)):
        H, wait = ((64, None), (136, "data"), (136, "counter"), (100, None))[(n + n // 4) % 4]
        yield Case(variant, dtype, 3, 5, H, wait=wait, capability=80, **FLAGS[n % 4])
        yield Case(variant, dtype, 2, 64, 40, stepwise=True, capability=80)


class Planned(NamedTuple):
    """A pass of a layer of the suites on a plan."""

    layer: Layer
    backward: bool
    plan: PersistentPlan


def planned() -> Iterator[Planned]:
    """What the GPU suites launch first on an H100, of each pass and tile one; those of a kind take turns over all."""
    found: dict[tuple[Any, ...], list[Planned]] = {}
    shapes = [case.layer for case in suites.cases(suites.GPU_SUITES) if not case.cell]
    for shape, ragged in itertools.product(shapes, (False, True)):
        whole = shape._replace(ragged=ragged)
        for backward in routing.passes(whole).values():
            plans = ranked_plans(whole, backward, GPUS["h100"])
            if isinstance(plans, str):
                continue
            plan = plans[0]
            tile = (plan.block_u, plan.block_b, plan.block_k, plan.split, plan.chunks, plan.group, plan.num_warps)
            kind = (backward, *tile, plan.wait, plan.exact, plan.blocks_per_program == 1)
            found.setdefault(kind, []).append(Planned(whole, backward, plan))
    for number, kin in enumerate(found.values()):
        yield kin[number * 7 % len(kin)]


def suite() -> Iterator[tuple[Case, Plans]]:
    """The kernels of `planned`, on a few units and rows.

    As many units as reach into the last chunk, as many rows as the plan has blocks of.
    """
    for whole, backward, plan in planned():
        several = plan.blocks_per_program > 1
        span = plan.split * plan.block_k
        H = plan.block_u if plan.alone else max((plan.chunks - 1) * span + 16, 5 * plan.block_u)
        H = min(-(-H // 16) * 16, plan.chunks * span) - 12 * (whole.H % 16 != 0)
        rows = min(plan.rows, 2 if several else 3)
        B = 2 * rows + 1 if several else rows
        row_blocks = -(-B // rows)
        dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32"}[whole.rate]
        case = Case(whole.spec.name, dtype, 3, B, H, plan.directions, lengths=whole.ragged, resets=whole.ragged)
        small = replace(
            plan,
            unit_programs=-(-H // plan.block_u),
            rows=rows,
            row_blocks=row_blocks,
            row_programs=1 if several else row_blocks,
        )
        other = case.plan(not backward)
        yield case, (other, small) if backward else (small, other)


# --- planted faults ---------------------------------------------------------------------------------------------------

FORWARD, BACKWARD, MATMUL = "persistent_forward_kernel", "persistent_backward_kernel", "gate_preactivations_kernel"
BARRIER = r"\n\s*bar\.sync\s+0;"
POLL = re.compile(r"ld\.volatile\.global|ld\.(?:global\.)?gpu\.acquire|ld\.(?:global\.)?acquire|atom\.\S*acquire")


class Planted(NamedTuple):
    """A fault, the case that is to show it, what it changes; weak: every warp at its own pace, in weak memory."""

    name: str
    case: Case
    change: Change
    plans: Plans | None = None
    weak: bool = False


def without(ptx: str, pattern: str, n: int) -> str:
    """The PTX without the n-th statement that matches; as it is where there are fewer."""
    found = list(re.finditer(pattern, ptx))
    return ptx[: found[n].start()] + ptx[found[n].end() :] if n < len(found) else ptx


def swap_operands(ptx: str) -> str:
    """Registers 1 and 2 of the left operand of the first mma."""
    at = re.search(r"mma\.sync[^{]*\{[^}]*\}, \{\s*(%r\d+), (%r\d+), (%r\d+), (%r\d+)\s*\}", ptx)
    if at is None:
        raise LookupError("no mma")
    text = at[0].replace(f"{at[2]}, {at[3]}", f"{at[3]}, {at[2]}")
    return ptx[: at.start()] + text + ptx[at.end() :]


def unguarded(ptx: str, pattern: str) -> str:
    """The last statement of a pattern without its guard."""
    at = list(re.finditer(r"@%p\d+ (" + pattern + ")", ptx))[-1]
    return ptx[: at.start()] + at[1] + ptx[at.end() :]


def no_arrive_barrier(ptx: str, n: int) -> str:
    """Without the bar.sync before the n-th release."""
    release = [m.start() for m in re.finditer(r"gpu\.release\.add", ptx)][n]
    barrier = [m for m in re.finditer(BARRIER, ptx) if m.start() < release][-1]
    return ptx[: barrier.start()] + ptx[barrier.end() :]


def no_retry(ptx: str) -> str:
    """The inner loop's backward branch taken out."""
    lines = ptx.split("\n")
    polls = [n for n, line in enumerate(lines) if POLL.search(line)]
    labels = {m[1]: n for n, line in enumerate(lines) if (m := re.match(r"(\$L__BB\w+):", line))}
    for n, line in enumerate(lines):
        m = re.match(r"\s+@!?%p\d+ bra \s*(\$L__BB\w+);", line)
        if m and (start := labels[m[1]]) < n and any(start < p < n for p in polls):
            lines[n] = ""
            return "\n".join(lines)
    raise LookupError("no loop")


def only_in(kernel: str, change: Callable[[str], str]) -> Change:
    def apply(name: str, ptx: str) -> str:
        if name != kernel:
            return ptx
        changed = change(ptx)
        if changed == ptx:
            raise LookupError("nothing changed")
        return changed

    return apply


def replaced(kernel: str, pattern: str, new: str, count: int = 0) -> Change:
    return only_in(kernel, lambda ptx: re.sub(pattern, new, ptx, count=count))


def blocks_of_11(case: Case, row_blocks: int) -> Plans:
    """The case's plans with 11 rows a block, so that several warps store what is published."""
    forward, backward = (
        replace(case.plan(side), rows=11, row_blocks=row_blocks, row_programs=row_blocks) for side in (False, True)
    )
    return forward, backward


def faults() -> Iterator[Planted]:
    data = Case("standard", "bf16", 3, 2, 136, wait="data")
    counter = replace(data, wait="counter")
    masked = replace(data, H=132, B=1)
    shuffle = r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, )2,"
    shared = r"(st\.shared::cta\.v4\.b32 \[ %r\d+ \+ )0"
    yield Planted("an mma's operand registers swapped", data, only_in(FORWARD, swap_operands))
    yield Planted("a shuffle's distance 2 made 4", data, replaced(FORWARD, shuffle, r"\g<1>4,", count=1))
    plain = replaced(FORWARD, r"ld\.volatile\.global", "ld.global")
    yield Planted("volatile loads made plain (weak memory)", data, plain, weak=True)
    yield Planted("no turn of the data wait", data, only_in(FORWARD, no_retry))
    yield Planted("no turn of the counter wait", counter, only_in(BACKWARD, no_retry))
    for kernel in (FORWARD, BACKWARD):
        for order in ("release", "acquire"):
            relaxed = replaced(kernel, rf"gpu\.{order}\b", "gpu.relaxed")
            yield Planted(f"{order} made relaxed (weak memory) in {kernel}", counter, relaxed, weak=True)
    for access in ("st", "ld"):
        change = only_in(FORWARD, lambda ptx, access=access: unguarded(ptx, rf"{access}\.global\.b16"))
        yield Planted(f"a {access}.global without its mask", masked, change)
    yield Planted("a shared store 2 bytes further", data, replaced(FORWARD, shared, r"\g<1>2", count=1))
    full = replace(counter, B=22)
    for kernel, what, n in ((FORWARD, "h_0", 0), (FORWARD, "h_t", 1), (BACKWARD, "gradients", -1)):
        change = only_in(kernel, lambda ptx, n=n: no_arrive_barrier(ptx, n))
        name = f"no barrier before the release of {what} (weak memory)"
        yield Planted(name, full, change, blocks_of_11(full, 2), weak=True)
    products = Case("standard", "bf16", 2, 64, 128, stepwise=True)
    yield Planted("no fence.proxy.async", products, replaced(MATMUL, r"fence\.proxy\.async[^;]*;", ""))
    wait = r"wgmma\.wait_group\.sync\.aligned 1;"
    change = replaced(MATMUL, wait, "wgmma.wait_group.sync.aligned 3;")
    yield Planted("wgmma waited for one group too few", products, change)
    change = replaced(MATMUL, r"cp\.async\.wait_group\s+2;", "cp.async.wait_group 4;")
    yield Planted("cp.async waited for one group too few", products, change)


def barrier_faults() -> Iterator[Planted]:
    """Every bar.sync taken out in turn."""
    jobs: list[tuple[str, Case, Plans | None]] = []
    for kernel, wait in itertools.product((FORWARD, BACKWARD), ("data", "counter")):
        case = Case("standard", "bf16", 3, 11, 136, wait=wait)
        jobs.append((kernel, case, blocks_of_11(case, 1)))
    jobs.append((MATMUL, Case("standard", "bf16", 2, 64, 128, stepwise=True), None))
    for kernel, case, plans in jobs:
        texts: list[str] = []

        def keep(name: str, ptx: str, kernel: str = kernel, texts: list[str] = texts) -> str:
            if name == kernel:
                texts.append(ptx)
            return ptx

        run(case, Oracle(change=keep), plans=plans)
        count = len(re.findall(BARRIER, texts[0]))
        for n in range(count):
            change = only_in(kernel, lambda ptx, n=n: without(ptx, BARRIER, n))
            name = f"{kernel} {case.wait or ''} bar.sync {n} of {count} taken out"
            yield Planted(name, case, change, plans, weak=True)


def plant(which: Iterable[Planted]) -> tuple[int, int]:
    """Run with each fault; how many were seen, of how many. None is where the case is wrong without it, too."""
    seen = total = 0
    controls: dict[Any, str] = {}

    def words(fault: Planted, change: Change | None) -> str:
        oracle = Oracle(gang="warp" if fault.weak else "cta", weak=fault.weak, change=change)
        outcome = run(fault.case, oracle, max_polls=1000, plans=fault.plans)
        return outcome.why or "; ".join(outcome.findings)

    for fault in which:
        control = (fault.case, fault.plans, fault.weak)
        if control not in controls:
            controls[control] = words(fault, None)
        right, found = False, f"wrong without it: {controls[control]}"
        if not controls[control]:
            try:
                found = words(fault, fault.change)
                right = bool(found)
            except LookupError as error:
                found = f"no place for it: {error}"
        print(f"{'seen    ' if right else 'NOT SEEN'}  {fault.name}: {found[:300]}", flush=True)
        seen, total = seen + right, total + 1
    print(f"{seen} of {total} seen")
    return seen, total


# --- statistics -------------------------------------------------------------------------------------------------------


def per_step(case: Case) -> bool:
    """Print the counts of a step, the difference of two lengths, of the thread blocks that are measured."""
    counts: dict[int, list[tuple[str, dict[int, Counter[str]]]]] = {}
    right = True
    for T in (3, 5):
        oracle = Oracle(stats=True)
        outcome = run(replace(case, T=T), oracle)
        print(f"T={T}: {outcome}", flush=True)
        counts[T] = oracle.statistics
        right = right and outcome.ok
    for (name, short), (_, long) in zip(counts[3], counts[5], strict=True):
        print(f"\n{name}, {case}, a CTA and step (warp instructions; retries of waits apart):")
        for number in sorted(short.keys() & long.keys()):
            rows = {key: (long[number][key] - short[number][key]) / 2 for key in sorted(long[number])}
            print(f"  CTA {number}: " + ", ".join(f"{key} {value:g}" for key, value in rows.items()))
    return right


def conflicts(kernel: str, counts: dict[int, Counter[str]]) -> str:
    """How many wavefronts accesses to shared memory take for each that they would without bank conflicts."""
    sums = sum(counts.values(), Counter())
    accesses = [name for name in ("ldmatrix", "ld.shared", "st.shared") if sums[f"{name} phases"]]
    ways = [f"{name} {sums[f'{name} wavefronts'] / sums[f'{name} phases']:.1f}" for name in accesses]
    return f"{kernel}: wavefronts for each that would do without bank conflicts: {', '.join(ways)}"


# --- command ----------------------------------------------------------------------------------------------------------


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.emulator.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--group", nargs="*", choices=[*cases(), "suite"], help="groups of cases; all but `suite`")
    parser.add_argument("--match", default="", help="only cases with this text")
    parser.add_argument("--first", type=int, default=0, help="begin with this one of a group (or fault)")
    parser.add_argument("--every", type=int, default=1, help="then every so many")
    parser.add_argument("--gang", choices=("cta", "warp"), default="cta", help="what runs in lockstep")
    parser.add_argument("--weak", action="store_true", help="memory as weak as the PTX memory model lets it be")
    parser.add_argument("--seed", type=int, default=0, help="of the scheduler and of the memory")
    parser.add_argument("--list", action="store_true", help="print the cases only")
    parser.add_argument("--stats", action="store_true", help="bank conflicts of each kernel")
    parser.add_argument("--faults", action="store_true", help="planted faults")
    parser.add_argument("--barriers", action="store_true", help="every barrier taken out in turn")
    parser.add_argument("--anchor", action="store_true", help="counts of a step")
    parser.add_argument("--out", help="file to which each case appends a line of JSON")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> Iterator[tuple[str, Case, Plans | None]]:
    """Group, case and plans, None for the case's own, as the options want them."""
    for group, members in cases().items():
        if not options.group or group in options.group:
            for case in itertools.islice(members, options.first, None, options.every):
                yield group, case, None
    if options.group and "suite" in options.group:
        for case, plans in itertools.islice(suite(), options.first, None, options.every):
            yield "suite", case, plans


def main(arguments: list[str] | None = None) -> int:
    options = options_of(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, triton {triton.__version__}", flush=True)
    if options.faults or options.barriers:
        which = barrier_faults() if options.barriers else faults()
        seen, planted = plant(itertools.islice(which, options.first, None, options.every))
        return int(seen < planted and not options.barriers)
    if options.anchor:
        return int(not per_step(Case("standard", "bf16", 3, 16, 768)))
    right = total = 0
    for group, case, plans in chosen(options):
        if options.match not in str(case):
            continue
        if options.list:
            print(group, case)
            continue
        oracle = Oracle(gang=options.gang, weak=options.weak, seed=options.seed, stats=options.stats)
        try:
            outcome = run(case, oracle, plans=plans)
        except LookupError as error:
            print(f"no plan   {group}: {case}: {error}", flush=True)
            continue
        total, right = total + 1, right + outcome.ok
        name, error = outcome.worst
        head = f"{'ok  ' if outcome.ok else 'FAIL'} {outcome.seconds:5.1f} s  {group}: {case}"
        print(f"{head}: {error:.1e} {name}  {outcome.why}".rstrip(), flush=True)
        for line in [*outcome.findings, *(conflicts(*counts) for counts in oracle.statistics)]:
            print(f"       {line}", flush=True)
        if options.out:
            how = dict(group=group, weak=options.weak, gang=options.gang, triton=triton.__version__)
            with open(options.out, "a") as file:
                file.write(json.dumps(how | asdict(outcome)) + "\n")
    if not options.list:
        print(f"{right} of {total} right")
    return int(right < total)


if __name__ == "__main__":
    sys.exit(main())
