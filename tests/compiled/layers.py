"""One layer by the compiled kernels, launched by the library and executed in the emulator, against the reference.

The plan is the one that is ranked first for an H100 (capability 80: an A100). Every result and every gradient is
compared with `lstm_triton.reference` in float64. The emulator and the comparison are independent of the library; the
reference, the plans and the inputs are its own.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple
from unittest import mock

import torch
from lstm_triton_kernels import sequence_persistent, sequence_replayed, tensor_core_plan, watch
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.plan import PersistentPlan, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.regularize import NONE, Rules
from lstm_triton_kernels.sizes import Layer, ceil_div
from torch import Tensor

from benchmarks.micro import float32_matmuls
from lstm_triton import LSTMSpec, eager, layer, normalized, persistent, reference
from lstm_triton.directions import OneByOne
from tests.emulator import Fault
from tests.emulator.launches import Emulation, emulated
from tests.support.clipped import clear_of_limits
from tests.support.persistent import Inputs, LayerCase, errors, expected, inputs_of, plan_of

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
BOUND = {"bf16": 1.2e-2, "fp16": 2e-3, "tf32": 2e-3, "fp32": 1e-5}
"""The relative Frobenius error allowed; with fewer than 8 units it is at least twice that of PyTorch's operators."""

GRADIENTS = ("output", "c_t", "h_n", "c_n")
"""Of what a gradient may be given."""


class Plans(NamedTuple):
    """Of the two passes."""

    forward: PersistentPlan
    backward: PersistentPlan


@dataclass(frozen=True)
class Case:
    """A layer, and what is asked of it.

    wait, block_u, block_b: what is wanted of its plans, or `own_plans` themselves; multiprocessors: of the GPU that is
    planned for, None: as many as it has; few leave many rows to a program; gradients: which of GRADIENTS are given;
    weak: every warp at its own pace in weak memory, else thread blocks in lockstep in strong memory.
    """

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
    multiprocessors: int | None = None
    weak: bool = False
    own_plans: Plans | None = None
    I: int = 3  # noqa: E741
    P: int = 0
    rules: Rules = NONE
    training: bool = True

    def __str__(self) -> str:
        plans = self.own_plans
        given = [name for name, wanted in zip(GRADIENTS, self.gradients, strict=True) if wanted]
        words = {
            f"{self.variant} {self.dtype} T={self.T} B={self.B} H={self.H}": True,
            f"projected to {self.P}": self.P > 0,
            f"{self.D} directions": self.D > 1,
            "step by step": self.stepwise,
            f"waits by the {self.wait}": self.wait,
            f"{self.block_u} units a program": self.block_u,
            f"{self.block_b} rows a block": self.block_b,
            f"forward {plans.forward.describe()}, backward {plans.backward.describe()}" if plans else "": plans,
            "lengths": self.lengths,
            "resets": self.resets,
            "recomputes the gates": self.recompute,
            "inference": self.infer,
            f"gradients of {' and '.join(given)}": len(given) < len(GRADIENTS),
            f"sm_{self.capability}": self.capability != 90,
            f"{self.multiprocessors} multiprocessors": self.multiprocessors,
            "in weak memory": self.weak,
            "evaluated": not self.training,
        }
        words |= {f"{name} {value:.2g}": value > 0 for name, value in self.rules._asdict().items()}
        return ", ".join(text for text, present in words.items() if present)

    @property
    def spec(self) -> LSTMSpec:
        """The variant."""
        return LSTMSpec.parse(self.variant)

    @property
    def precision(self) -> str:
        """PyTorch's switch for float32 products."""
        return "tf32" if self.dtype == "tf32" else "ieee"

    @property
    def layer(self) -> Layer:
        """Its sizes and types."""
        ragged = self.lengths or self.resets
        sizes, types = (self.T, self.B, self.H, self.D), (DTYPES[self.dtype], self.precision)
        return Layer(self.spec, *sizes, *types, P=self.P, training=not self.infer, ragged=ragged)

    def plan(self, backward: bool) -> PersistentPlan:
        """Return the first of the ranked plans. Raises LookupError with the sentence why there is none."""
        gpu = GPUS["h100"] if self.capability == 90 else GPUS["a100"]
        gpu = replace(gpu, multiprocessors=self.multiprocessors or gpu.multiprocessors)
        found = ranked_plans(self.layer, backward, gpu, Preference(self.wait, self.block_u, self.block_b))
        if isinstance(found, str):
            raise LookupError(found)
        return found[0]

    def plans(self) -> Plans | None:
        """Return the plans of both passes; None step by step."""
        if self.stepwise:
            return None
        return self.own_plans or Plans(self.plan(False), self.plan(not self.infer))

    def with_blocks_of(self, rows: int, row_programs: int | None = None) -> Case:
        """Return the case with so many rows a block; row_programs: None, one for each block."""
        assert all(rows <= self.plan(side).block_b for side in (False, True)), "a tile has fewer rows"
        blocks = -(-self.B // rows)
        programs = row_programs or blocks
        plans = (
            replace(self.plan(side), rows=rows, row_blocks=blocks, row_programs=programs) for side in (False, True)
        )
        return replace(self, own_plans=Plans(*plans))

    def with_shared_rows(self, units: int, tile_rows: int, warps: int) -> Case:
        """Return the case with plans of such a tile, whose rows the warps share, and all rows in turn."""

        def plan(backward: bool) -> PersistentPlan:
            some = min(32, max(16, units), 2048 // tile_rows) if backward else units
            tile = tensor_core_plan.Tile(some, tile_rows, warps, 1, 1)
            one = replace(GPUS["h100"], multiprocessors=ceil_div(self.H, tile.units) * self.D)
            return list(tensor_core_plan.plans_of(self.layer, backward, one, tile))[-1]

        return replace(self, own_plans=Plans(plan(False), plan(True)))

    def with_streamed_weights(self, units: int, tile_rows: int, warps: int) -> Case:
        """Return the case with plans of such a tile which stream all chunks but one, some of them from beyond L2."""

        def plan(backward: bool) -> PersistentPlan:
            tile = tensor_core_plan.Tile(units, tile_rows, warps, warps, 1)
            gpu = replace(GPUS["h100"], multiprocessors=ceil_div(self.H, units) * self.D)
            one = next(tensor_core_plan.plans_of(self.layer, backward, gpu, tile))
            streamed = max(1, one.chunks - 1)
            return replace(one, streamed=streamed, beyond_l2=ceil_div(streamed, 2), kept=one.chunks - streamed)

        return replace(self, own_plans=Plans(plan(False), plan(True)))

    def with_fields(self, **fields: int | bool) -> Case:
        """Return the case with plans that have these fields."""
        return replace(self, own_plans=Plans(*(replace(self.plan(side), **fields) for side in (False, True))))

    def layer_case(self) -> LayerCase:
        """Return the case as `tests.support.persistent` has it, where only the directions of the plan matter."""
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
            P=self.P,
            rules=self.rules,
            training=self.training,
        )

    def emulation(self) -> Emulation:
        """Return how its launches are emulated. In weak memory elements of 16 bits become visible one by one."""
        torn = self.weak and DTYPES[self.dtype].itemsize == 2
        return Emulation(capability=self.capability, gang="warp" if self.weak else "cta", weak=self.weak, torn=torn)


LOOPS: dict[str, layer.Loop] = {
    "persistent": persistent, "stepwise": OneByOne(sequence_replayed), "eager": OneByOne(eager),
}  # fmt: skip


def computed(case: Case, inputs: Inputs, engine: str, plans: Plans | None) -> list[Tensor]:
    """Return all results and gradients, in the order of `tests.support.persistent`; in inference the results."""
    spec, loop = case.spec, LOOPS[engine]
    keep = not case.infer
    call = layer.Call(spec.name, True, case.P > 0, engine, save=keep, recompute=case.recompute, states=keep)
    order = case.layer_case().order(inputs.lengths, inputs.resets, DTYPES[case.dtype])
    needs = layer.Needs(True, True, True, [list(spec.parameter_names(projection=case.P > 0))] * case.D)
    grad_output, grad_cells, grad_h_n, grad_c_n = inputs.gradients
    grads = layer.Gradients(grad_output, grad_h_n, grad_c_n, grad_cells)
    arguments = (inputs.x, inputs.h_0, inputs.c_0, inputs.weights)
    planned = mock.patch.object(sequence_persistent, "plan_of", lambda launch: plans[launch.backward])
    of_layer = normalized if spec.layer_norm else layer
    with torch.no_grad(), planned:
        result = of_layer.forward(*arguments, order, call, loop)
        results = [result.output, result.states, result.h_n, result.c_n]
        if case.infer:
            return results
        saved = (result.output, result.gates, result.cells)
        found = of_layer.backward(grads, *arguments, *saved, order, call, needs, loop)
    by_name = [side[name] for side in found.weights for name in spec.parameter_names(projection=case.P > 0)]
    return [*results, found.x, found.h_0, found.c_0, *by_name]


def forward_by_reference(case: Case, inputs: Inputs) -> None:
    """Compute the forward pass of a case by the reference, in float64."""
    double = inputs.map(Tensor.double)
    regularized = case.layer_case().order(None, None, torch.float64).regularized
    states = (double.x, double.h_0, double.c_0, double.weights)
    with torch.no_grad():
        reference.layer_states(*states, case.spec, inputs.lengths, inputs.resets, regularized)


@dataclass
class Outcome:
    """What came of a case: errors by name and their bound, why it ended, what the emulator's checks found."""

    errors: dict[str, float]
    bound: float
    why: str
    findings: list[str]
    seconds: float

    @property
    def worst(self) -> tuple[str, float]:
        """The largest error, and of what."""
        return max(self.errors.items(), key=lambda item: item[1], default=("-", float("inf")))

    @property
    def wrong(self) -> str:
        """All that is wrong, in words; empty if nothing is."""
        beyond = {name: f"{error:.1e}" for name, error in self.errors.items() if not error <= self.bound}
        words = [self.why, f"beyond {self.bound:.0e}: {beyond}" if beyond else "", *self.findings]
        return "\n".join(filter(None, words))


def run(case: Case, emulation: Emulation | None = None) -> Outcome:
    """Execute a case; emulation: None, as it wants. Raises LookupError where it has no plan.

    Limits of clipping are some near the case's that no value comes near.
    """
    start = time.time()
    emulation = emulation or case.emulation()
    plans, inputs = case.plans(), inputs_of(case.layer_case())
    case = replace(
        case, rules=clear_of_limits(case.rules, lambda some: forward_by_reference(replace(case, rules=some), inputs))
    )
    layer_case = case.layer_case()
    wanted = expected(layer_case, inputs)
    outcome = Outcome({}, BOUND[case.dtype], "", [], 0.0)
    with float32_matmuls(case.precision):
        try:
            with emulated(emulation):
                results = computed(case, inputs, "stepwise" if case.stepwise else "persistent", plans)
            watch.check_launches()
        except (Fault, RuntimeError) as error:
            outcome.why = f"{type(error).__name__}: {error}"
            for words in watch._error_words.values():
                words.seen[:] = 0
        else:
            if case.infer:
                pairs = zip(("output", "h_n", "c_n"), (0, 2, 3), strict=True)
                found = {n: float((results[k].double() - wanted[k]).norm() / wanted[k].norm()) for n, k in pairs}
            else:
                found = errors(layer_case, results, wanted)
            outcome.errors = {name: error if error == error else float("inf") for name, error in found.items()}
            if case.H < 8:  # a few numbers, of which a sum may cancel
                own = computed(case, inputs, "eager", None)
                outcome.bound = max(outcome.bound, 2 * max(errors(layer_case, own, wanted).values()))
    if not outcome.why and not emulation.launches:
        outcome.why = "no kernel was launched"
    outcome.findings = [str(finding) for finding in emulation.findings]
    outcome.seconds = time.time() - start
    return outcome


def run_without_a_program(case: Case, backward: bool) -> Outcome:
    """Execute a case, one pass of which is launched without its last program; the others stop after three polls."""
    whole, launched = sequence_persistent.grid, []

    def grid(plan: PersistentPlan, device: torch.device, lanes: int) -> tuple[int, ...]:
        launched.append(plan)
        parts, *rest = whole(plan, device, lanes)
        return (parts - (len(launched) - 1 == backward), *rest)

    emulation = case.emulation()
    emulation.max_polls = 3
    with mock.patch.object(sequence_persistent, "grid", grid):
        return run(case, emulation)
