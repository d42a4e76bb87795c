"""What computes a layer, and why: the engine that is chosen, the estimates it rests on, and the persistent plans.

`explain` is a function from a layer and devices to an `Explanation`, which is data (`to_dict`) and text (`str`).
`routing` decides and the planner ranks; nothing is decided here, nothing runs and nothing is measured. A GPU need not
be present.
"""

from __future__ import annotations

import math
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from lstm_triton_kernels.gpus import GPU, GPUS, gpu_key, gpu_of, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.planner import MOST_SPILLED, MOST_TRIES, ranked_plans
from lstm_triton_kernels.sizes import Layer, matmul_precision
from lstm_triton_kernels.tensor_core_plan import fits

from lstm_triton import estimates, overlap, plan_words, routing
from lstm_triton.plan_words import plural, size, time
from lstm_triton.routing import Choice, Facts

ASSUMED_GPU = "h100"

ENGINES = {
    "persistent": "one launch a pass computes all time steps, the recurrent weights stay on the chip",
    "stepwise": "every time step has its own launches, which read the recurrent weights again",
    "cudnn": "PyTorch's own LSTM operator, by cuDNN",
    "operator": "PyTorch's own LSTM operator",
    "eager": "every time step in PyTorch's own operators, no kernel of this library runs",
    "reference": "the reference equations in PyTorch's own operators, no kernel of this library runs",
    "none": "what was asked for cannot run",
}

COLUMNS = {"persistent": "persistent", "stepwise": "stepwise", "cudnn": "cuDNN", "limit": "least possible"}
"""The columns of the table of estimates: key in `Report.step_us`, and title."""

PLAIN_WIDTH = 110
"""Columns of text that goes to a file or a pipe."""


class Target(NamedTuple):
    """A device to explain for: a GPU of the table, or a device of this machine, or both (a GPU that is here)."""

    gpu: GPU | None
    device: torch.device | None = None


class Compiled(NamedTuple):
    """What the compiler made of a plan; used: whether it is the one that would run."""

    plan: str
    registers: int
    spilled: int
    shared_bytes: int
    used: bool


@dataclass(frozen=True)
class PassPlan:
    """The persistent plan of one pass, those that are tried next, and what compiling gave; or why there is none.

    Exactly one of `plan` and `why_none` is not None. `obstacle`: why the plan is not the one that runs, None if it is.
    """

    plan: PersistentPlan | None
    why_none: str | None
    obstacle: str | None
    others: tuple[PersistentPlan, ...] = ()
    compiled: tuple[Compiled, ...] = ()


@dataclass(frozen=True)
class Report:
    """What computes the layer on one device.

    - device: the name of the GPU, or "cpu"; gpu: its limits, None on a CPU
    - choice: what computes the call and the reason in words: on a GPU a strategy, elsewhere and in rare cases another
      key of ENGINES
    - step_us: microseconds of a time step by pass ("forward", "backward", "both") and by key of COLUMNS, None where
      there is no such engine; a step of all directions of one layer; estimates
    - call_us: microseconds of the whole layer with the time that the host needs, "persistent" and "cudnn"; estimates
    - cudnn: the algorithm that PyTorch asks cuDNN for, by pass; empty where cuDNN cannot compute the call: no_cudnn
      says why
    - plans: the persistent plans by pass
    - layers: whether layers are computed at the same time, in words; None of a single layer, and of other kernels
    """

    device: str
    gpu: GPU | None
    choice: Choice
    step_us: Mapping[str, Mapping[str, float | None]]
    call_us: Mapping[str, float | None]
    cudnn: Mapping[str, str]
    no_cudnn: str | None
    plans: Mapping[str, PassPlan]
    layers: str | None = None


@dataclass(frozen=True, repr=False)
class Explanation:
    """A layer, and a report for each device. `print` it, or take `to_dict()` for a program."""

    layer: Layer
    reports: tuple[Report, ...]
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return everything as values that JSON has; times in microseconds, None where there is none."""
        layer = self.layer
        described = {
            "variant": layer.spec.name, "steps": layer.T, "batch": layer.B, "inputs": layer.I, "hidden": layer.H,
            "layers": layer.L, "directions": layer.D, "projection": layer.P, "dtype": layer.rate,
            "training": layer.training, "ragged": layer.ragged,
        }  # fmt: skip
        return {"layer": described, "devices": [as_dict(report) for report in self.reports]}

    def text(self, width: int = PLAIN_WIDTH) -> str:
        """Return the explanation as text of so many columns."""
        parts = [self.note] if self.note else []
        computed = with_all_gates(self.layer)
        parts += [layer_words(self.layer), *(report_text(computed, report, width) for report in self.reports)]
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH)

    __repr__ = __str__


def targets(names: Sequence[str]) -> tuple[list[Target], str | None]:
    """Return the GPUs of these names, each once ("all": every one of the table), and a note to print first, or None.

    Without a name: the current CUDA device; where there is none, ASSUMED_GPU, and the note says so. Raises ValueError
    for an unknown name.
    """
    if not names:
        if torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
            return [Target(gpu_of(device), device)], None
        note = f"There is no CUDA device here. The plan is for {GPUS[ASSUMED_GPU].name}; --gpu chooses another GPU."
        return [Target(GPUS[ASSUMED_GPU])], note
    keys = [key for name in names for key in (GPUS if name.lower() == "all" else [gpu_key(name)])]
    return [Target(GPUS[key]) for key in dict.fromkeys(keys)], None


def explanation(
    layer: Layer, device: torch.device, strategy: str, asked: tuple[str, ...], packed: bool, gpu: str | None,
    recompute: bool = False,
) -> Explanation:  # fmt: skip
    """Return what computes a call: the arguments of `routing.route`, on its device or on the GPU of that name.

    recompute: as of `lstm`. Raises ValueError for an unknown GPU.
    """
    if gpu is None:
        found = [Target(gpu_of(device) if device.type == "cuda" else None, device)]
    else:
        found, _ = targets([gpu])
    precise = layer._replace(precision=matmul_precision())
    return explain(precise, found, strategy=strategy, asked=asked, packed=packed, recompute=recompute)


def explain(
    layer: Layer,
    devices: Iterable[Target],
    *,
    strategy: str = "auto",
    asked: tuple[str, ...] = (),
    packed: bool = False,
    recompute: bool = False,
    compiling: bool = False,
    note: str | None = None,
) -> Explanation:
    """Return what computes a layer on each of the devices.

    - strategy, asked, packed: as in `routing.route`; recompute: as of `lstm`
    - compiling: compile the ranked plans for the GPU, which need not be here; takes some seconds

    Raises RuntimeError where `compiling` is asked for and Triton, or a tool of it, is missing.
    """
    computed = with_all_gates(layer)
    reports = [_report(computed, target, strategy, asked, packed, recompute, compiling) for target in devices]
    return Explanation(layer, tuple(reports), note)


def with_all_gates(layer: Layer) -> Layer:
    """Return the layer that is computed: of the variant with all gates."""
    return layer._replace(spec=layer.spec.computed)


def _report(
    layer: Layer, target: Target, strategy: str, asked: tuple[str, ...], packed: bool, recompute: bool, compiling: bool
) -> Report:
    gpu = target.gpu
    choice = _choice(layer, target, strategy, asked, packed)
    if gpu is None:
        return Report(str(target.device), None, choice, {}, {}, {}, None, {})
    if routing.why_not_dtype(layer.dtype) is not None:  # of such a type there is neither a plan nor an estimate
        return Report(gpu.name, gpu, choice, {}, {}, {}, None, {})
    no_cudnn = routing.why_not_operator(torch.device("cuda"), layer, asked)
    cudnn = {} if no_cudnn else _algorithms(layer)
    call_us = {
        "persistent": _finite(estimates.call_us("persistent", layer, gpu)),
        "cudnn": estimates.call_us("operator", layer, gpu) if cudnn else None,
    }
    plans = {
        name: _pass_plan(layer, backward, gpu, choice, compiling) for name, backward in estimates.passes(layer).items()
    }
    layers = None
    if layer.L > 1 and choice.name == "persistent":
        layers = _layers(layer, gpu, ("lengths",) * packed + asked, recompute)
    return Report(gpu.name, gpu, choice, _step_us(layer, gpu, bool(cudnn)), call_us, cudnn, no_cudnn, plans, layers)


def _layers(layer: Layer, gpu: GPU, asked: tuple[str, ...], recompute: bool) -> str:
    """Return in words whether the layers of a stack are computed at the same time."""
    obstacle = overlap.why_not(layer, asked, recompute)
    if obstacle is not None:
        return f"one after another: {obstacle}"
    passes = estimates.passes(layer).items()
    return plan_words.layers({name: overlap.overlap_of(layer, backward, gpu) for name, backward in passes})


def _choice(layer: Layer, target: Target, strategy: str, asked: tuple[str, ...], packed: bool) -> Choice:
    """Return the engine and why. A GPU of the table is taken to have cuDNN and to run the kernels."""
    try:
        if target.device is not None:
            found = routing.route(layer, target.device, strategy, asked, packed)
        else:
            no_operator = routing.why_not_operator(torch.device("cuda"), layer, asked)
            no_kernels = routing.why_not_dtype(layer.dtype)
            found = routing.decide(Facts(layer, target.gpu, strategy, "auto", no_kernels, no_operator))
    except (RuntimeError, ValueError) as error:
        return Choice("none", str(error))
    by_cudnn = found.name == "operator" and target.gpu is not None and routing.why_not_dtype(layer.dtype) is None
    return found._replace(name="cudnn") if by_cudnn else found


def _algorithms(layer: Layer) -> dict[str, str]:
    return {
        name: "persistent" if estimates.cudnn_is_persistent(layer, backward) else "standard"
        for name, backward in estimates.passes(layer).items()
    }


def _step_us(layer: Layer, gpu: GPU, cudnn: bool) -> dict[str, dict[str, float | None]]:
    engines = {"persistent": "persistent", "stepwise": "stepwise", **({"cudnn": "operator"} if cudnn else {})}
    found: dict[str, dict[str, float | None]] = {}
    for name, backward in estimates.passes(layer).items():
        found[name] = {key: _finite(estimates.pass_us(engine, layer, backward, gpu)) for key, engine in engines.items()}
    if layer.training:
        found["both"] = {
            key: None if None in (pair := [found[name][key] for name in found]) else math.fsum(pair)  # type: ignore[arg-type]
            for key in engines
        }
    for name, training in (("forward", False), ("both", True)):
        if name in found:
            one = layer._replace(training=training)
            found[name]["limit"] = least_us_per_step(one, nominal_constants(gpu)) * layer.D
    return found


def _finite(us: float) -> float | None:
    return us if math.isfinite(us) else None


def _pass_plan(layer: Layer, backward: bool, gpu: GPU, choice: Choice, compiling: bool) -> PassPlan:
    plans = ranked_plans(layer, backward, gpu)
    if isinstance(plans, str):
        return PassPlan(None, plans, plans)
    obstacle = None
    if choice.name != "persistent":
        other_pass = routing.why_not_persistent(layer, gpu)
        obstacle = other_pass or f"{choice.name} is chosen; strategy='persistent' takes this plan"
        if choice.name in ("eager", "reference", "none"):
            obstacle = choice.reason
    compiled = _compiled(layer, backward, gpu, plans[:MOST_TRIES]) if compiling else ()
    return PassPlan(plans[0], None, obstacle, tuple(plans[1:MOST_TRIES]), compiled)


def _compiled(layer: Layer, backward: bool, gpu: GPU, plans: Sequence[PersistentPlan]) -> tuple[Compiled, ...]:
    if not routing.TRITON_INSTALLED:
        raise RuntimeError("compiling needs triton (pip install triton)")
    from lstm_triton_kernels import sequence_persistent, settle

    usages = dict(zip(plans, sequence_persistent.usages(layer, backward, gpu, plans), strict=True))
    used = settle.first_clean(
        plans, lambda plan: usages[plan] if fits(plan.together, usages[plan].shared, gpu) else None
    )
    return tuple(
        Compiled(plan.describe(), usage.registers, usage.spilled, usage.shared, plan is used)
        for plan, usage in usages.items()
    )


# As data and as text.


def as_dict(report: Report) -> dict[str, Any]:
    """Return a report as values that JSON has."""
    plans = {}
    for name, found in report.plans.items():
        plans[name] = {
            "plan": None if found.plan is None else {"summary": found.plan.describe(), **asdict(found.plan)},
            "why_none": found.why_none,
            "runs": found.obstacle is None,
            "obstacle": found.obstacle,
            "next": [plan.describe() for plan in found.others],
            "compiled": [row._asdict() for row in found.compiled],
        }
    gpu = report.gpu
    return {
        "device": report.device,
        "capability": gpu and gpu.capability / 10,
        "multiprocessors": gpu and gpu.multiprocessors,
        "shared_bytes": gpu and gpu.shared_bytes,
        "engine": report.choice.name,
        "reason": report.choice.reason,
        "step_us": report.step_us,
        "call_us": report.call_us,
        "cudnn_algorithm": report.cudnn,
        "no_cudnn": report.no_cudnn,
        "plans": plans,
        "layers": report.layers,
    }


def layer_words(layer: Layer) -> str:
    """Describe the layer in a sentence or two."""
    name = f"{layer.rate} (float32 tensors, products in TF32)" if layer.rate == "tf32" else layer.rate
    text = f"{layer.spec.name} LSTM, {plural(layer.I, 'input')}, {plural(layer.H, 'hidden unit')}"
    text += f" projected to {layer.P}" if layer.P else ""
    text += f", {plural(layer.L, 'layer')}" if layer.L > 1 else ""
    text += ", both directions" if layer.D == 2 else ""
    text += f"; {plural(layer.T, 'time step')} of {plural(layer.B, 'batch row')}"
    text += " that end at different steps" if layer.ragged else ""
    text += f"; {name}; {'training' if layer.training else 'inference'}"
    if layer.spec.missing:
        text += f"; computed as the variant {layer.spec.computed.name}, by weights with which what is left out is 1"
    return text


def report_text(layer: Layer, report: Report, width: int) -> str:
    """Return a report as text: what is chosen and why, the estimates, and the plan of each pass."""
    gpu = report.gpu
    title = report.device
    if gpu is not None:
        title += f" (compute capability {gpu.capability / 10}, {gpu.multiprocessors} multiprocessors, "
        title += f"{size(gpu.shared_bytes)} of shared memory for a thread block)"
    rows = [("chosen", f"{report.choice.name}: {ENGINES[report.choice.name]}"), ("why", report.choice.reason)]
    if gpu is None:
        rows.append(("on a GPU", f"explain(..., gpu={ASSUMED_GPU!r}) says how a GPU would compute it"))
    if report.layers is not None:
        rows.append(("layers", report.layers))
    parts = [facts_text(title, rows, width)]
    if report.step_us:
        parts.append(estimates_text(layer, report))
    parts += [facts_text(f"{name} pass", pass_rows(layer, name, found, report), width)
              for name, found in report.plans.items()]  # fmt: skip
    return "\n\n".join(parts)


def pass_rows(layer: Layer, name: str, found: PassPlan, report: Report) -> list[tuple[str, str]]:
    """Return the plan of a pass as rows of a field and its explanation."""
    if found.plan is None:
        return [("plan", "none"), ("why", found.why_none or "")]
    assert report.gpu is not None
    rows = [
        ("plan", found.plan.describe()),
        ("used", f"no: {found.obstacle}" if found.obstacle else f"yes, if it spills at most {MOST_SPILLED} registers"),
    ]
    rows += plan_words.rows(layer, name == "backward", found.plan, report.gpu)
    if found.others:
        others = "; ".join(f"{plan.describe()} ({time(plan.estimate_us)})" for plan in found.others)
        rows.append(("fallbacks", f"in this order, where a plan spills more: {others}"))
    for row in found.compiled:
        text = (
            f"{row.plan}: {row.registers} registers, {row.spilled} spilled, {size(row.shared_bytes)} of shared memory"
        )
        rows.append(("compiled", text + ("; this one is used" if row.used else "")))
    return rows


def facts_text(title: str, rows: Iterable[tuple[str, str]], width: int) -> str:
    """Return a title and below it rows of a name and a text, which is wrapped to the width."""
    lines = [title]
    for name, text in rows:
        indent = " " * 17
        start = f"  {name}".ljust(len(indent))
        lines += textwrap.wrap(text, max(width, 40), initial_indent=start, subsequent_indent=indent) or [start]
    return "\n".join(lines)


def estimates_text(layer: Layer, report: Report) -> str:
    """Return the table of estimates: a step of each pass, all steps, and a whole call, by engine."""
    table = [["estimates", *COLUMNS.values()]]
    for name, by_engine in report.step_us.items():
        table.append([f"{name}, a step", *(time(by_engine.get(key)) for key in COLUMNS)])
    every = report.step_us["both" if layer.training else "forward"]
    name = f"{'both' if layer.training else 'forward'}, {plural(layer.T, 'step')}"
    table.append([name, *(time(us and us * layer.T) for us in (every.get(key) for key in COLUMNS))])
    table.append(["a call, with host", *(time(report.call_us.get(key)) for key in COLUMNS)])
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for name, *cells in table:
        lines.append("  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(cells, others, strict=True))]))
    asked = ", ".join(f"{algorithm} {name}" for name, algorithm in report.cudnn.items())
    notes = [
        f"cuDNN's algorithm: {asked}." if asked else f"cuDNN cannot compute this call: {report.no_cudnn}.",
        "Estimates of the recurrence alone, fitted to an H100 and scaled by data sheets; nothing was measured here.",
        "Least possible: a lower bound from the data sheet, which includes the product with the inputs.",
        "A call: the longer of the times of host and device; by cuDNN's standard algorithm their sum. The time of the",
        "host is that of a machine with an H100.",
    ]
    return "\n".join([*lines, *notes])
