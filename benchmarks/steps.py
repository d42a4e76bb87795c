"""How long a step of the persistent kernels takes by itself: all steps of a pass in one launch, no other products.

The suites time what a user calls; this times what a plan promises, beside the planner's estimate. Every launch is
compared with the float64 reference before it is timed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lstm_triton_kernels.normalize import Products
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.spec import LSTMWeights

from benchmarks import bench, timing
from benchmarks.check import distances
from benchmarks.suites import TRAINING, Case
from lstm_triton import normalized, reference
from lstm_triton.layer import Call, Gradients

CHECKED, TIMED = 48, 1024
"""Time steps of the launch that is compared, and of the launches that are timed."""

LAUNCHES, WARM_UP = 7, 2
QUEUED_BEHIND = 2_000_000
"""Cycles that the device is busy before a launch, about a millisecond, so that the host is done when it begins."""

ALLOWED = {"float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest relative error of a right result."""

# B, H, dtype, variant: those that the first constants of the planner were fitted to (float32_plan.py), then workloads,
# variants and odd sizes.
SHAPES = (
    (16, 768, "bfloat16", "standard"), (16, 768, "float16", "standard"), (64, 512, "bfloat16", "standard"),
    (16, 1024, "bfloat16", "standard"), (128, 256, "bfloat16", "standard"), (1, 256, "bfloat16", "standard"),
    (64, 64, "bfloat16", "standard"), (64, 128, "bfloat16", "standard"), (16, 500, "bfloat16", "standard"),
    (16, 768, "tf32", "standard"), (16, 768, "bfloat16", "diagonal"), (16, 768, "bfloat16", "coupled"),
    (16, 768, "bfloat16", "full"), (64, 1024, "bfloat16", "standard"), (16, 1536, "bfloat16", "standard"),
    (32, 320, "bfloat16", "standard"), (256, 512, "bfloat16", "standard"), (80, 1150, "bfloat16", "standard"),
    (2000, 192, "bfloat16", "standard"), (1, 1024, "bfloat16", "standard"), (16, 768, "float32", "standard"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One pass of one shape.

    - P: hidden size after projection, 0 without one
    - wait: as asked for, "" as planned; plan, estimate_us: what ran, and what the planner expects of a step
    - us, us_least, us_most: microseconds of a step, median and range of LAUNCHES launches; None where nothing was timed
    - error: the largest of the results, as `check.distances`; or the words why nothing was timed
    """

    backward: bool
    B: int
    H: int
    dtype: str
    variant: str
    wait: str
    plan: str = ""
    estimate_us: float | None = None
    us: float | None = None
    us_least: float | None = None
    us_most: float | None = None
    error: float | str | None = None
    P: int = 0

    def __str__(self) -> str:
        what = f"{'backward' if self.backward else 'forward'} B={self.B} H={self.H} {self.dtype} {self.variant}"
        what += f" P={self.P}" if self.P else ""
        start = f"{what} {self.wait or 'as planned'}:"
        if self.us is None:
            return f"{start} {self.error}"
        times = f"{self.us:.3f} us a step ({self.us_least:.3f} to {self.us_most:.3f})"
        return f"{start} {times}, estimated {self.estimate_us:.2f}; error {self.error:.1e}; {self.plan}"


WAITS = ("planned", "counter", "data")


def waits(case: Case, asked: Sequence[str] | None) -> list[str | None]:
    """Return how programs wait in the launches of a case: as asked, else as planned and, in float32, by both."""
    names = asked or (WAITS if case.layer.exact else WAITS[:1])
    return [None if name == "planned" else name for name in names]


def cases(shapes: Sequence[tuple[int, int, str, str]] = SHAPES, P: int = 0) -> list[Case]:
    """Return one layer in training for each of the shapes, all with the same hidden size after projection, 0: none."""
    return [
        Case("steps", T=TIMED, B=B, I=H, H=H, P=P, dtype=dtype, mode=TRAINING, variant=variant)
        for B, H, dtype, variant in shapes
    ]


class Passes:
    """Both passes of a layer on random tensors, each a launch; the backward pass takes what the forward pass saved."""

    def __init__(self, case: Case, device: torch.device) -> None:
        from lstm_triton import persistent

        self.case, self.engine = case, persistent
        layer, spec = case.layer, case.spec
        generator = torch.Generator(device).manual_seed(0)
        scale = case.H**-0.5

        def normal(*shape: int, times: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * times).to(layer.dtype)

        shapes = spec.parameter_shapes(case.H, case.H, False, case.P)
        # The input side of the gates is drawn, not computed.
        own = {name: shape for name, shape in shapes.items() if name not in ("weight_ih", "weight_ln_ih")}
        weights = {
            # Random gains make gradients grow from step to step, and errors with them.
            name: torch.full(shape, 0.5, dtype=layer.dtype, device=device)
            if name.startswith("weight_ln")
            else normal(*shape, times=scale)
            for name, shape in own.items()
        }
        self.weights = [LSTMWeights(weight_ih=torch.empty(0, device=device), **weights)]
        self.inputs = normal(1, case.T, case.B, layer.gates * case.H)
        self.h_0, self.c_0 = normal(1, case.B, case.hidden), normal(1, case.B, case.H)
        grads = normal(case.T, case.B, case.hidden), normal(1, case.B, case.hidden), normal(1, case.B, case.H)
        self.grads = Gradients(*grads, None)
        self.order = Order(case.T)
        self.call = Call(spec.name, False, case.P > 0, "persistent", save=True)
        self.gates = self.inputs.clone()
        self.cells: torch.Tensor | None = None
        self.products: list[Products] | None = None

    def forward(self) -> tuple[torch.Tensor, ...]:
        """Return output, h_n, c_n; the gates are overwritten, by numbers that the next launch may take as input."""
        x = self.h_0.new_empty(self.case.T, self.case.B, 0)
        output, h_n, c_n, self.cells = self.engine.forward(
            x, self.gates, self.h_0, self.c_0, self.weights, self.order, self.call
        )
        # Once: the time of these products is not that of the steps.
        if self.case.spec.layer_norm and self.cells is not None and self.products is None:
            read = self.order.hidden_read(output, self.h_0[0])
            self.products = [normalized.recurrent_products(read, self.weights[0], self.cells[0])]
        return output, h_n, c_n

    def backward(self) -> tuple[torch.Tensor, ...]:
        """Return the gradients of the pre-activations and of c_0; after `forward`."""
        assert self.cells is not None
        found = self.engine.backward(
            self.grads, self.gates, self.cells, self.weights, self.order, self.call, self.products
        )
        return found.gates, found.c_0

    def results(self) -> dict[str, torch.Tensor]:
        """Return the results of both passes, by name."""
        names = ("output", "h_n", "c_n", "d_gates", "d_c_0")
        return dict(zip(names, (*self.forward(), *self.backward()), strict=True))

    def expected(self) -> dict[str, torch.Tensor]:
        """Return the same by the reference, in float64."""
        a, h_0, c_0 = (x.detach().double() for x in (self.inputs[0], self.h_0, self.c_0))
        a.requires_grad_()
        c_0.requires_grad_()
        weights = self.weights[0].map(lambda weight: weight.double())
        weights = weights._replace(weight_ih=torch.eye(a.shape[-1], dtype=a.dtype, device=a.device))
        output, _, h_n, c_n = reference.layer_states(a, h_0, c_0, [weights], self.case.spec)
        given = [gradient.double() for gradient in self.grads if gradient is not None]
        d_a, d_c = torch.autograd.grad((output, h_n, c_n), (a, c_0), given)
        return dict(output=output.detach(), h_n=h_n.detach(), c_n=c_n.detach(), d_gates=d_a[None], d_c_0=d_c)


def measure(case: Case, wait: str | None, device: torch.device) -> Iterator[Row]:
    """Both passes of a case, its programs waiting as asked. Whatever goes wrong becomes a row that says so."""
    from lstm_triton_kernels import sequence_persistent
    from lstm_triton_kernels.gpus import gpu_of
    from lstm_triton_kernels.plan import PersistentPlan, Preference
    from lstm_triton_kernels.planner import ranked_plans
    from lstm_triton_kernels.watch import check_launches

    row = Row(False, case.B, case.H, case.dtype, case.variant, wait or "", P=case.P)
    wanted = Preference(wait=wait)
    try:
        bench.set_precision(case.dtype)
        with torch.no_grad(), sequence_persistent.prefer(wanted):
            error = error_of(case, device)
            passes = Passes(case, device)
            for backward, launch in ((False, passes.forward), (True, passes.backward)):
                row = replace(row, backward=backward)
                us = us_of_steps(launch, device, case.T)
                check_launches()
                ranked = ranked_plans(case.layer, backward, gpu_of(device), wanted)
                settled = sequence_persistent.plan_that_ran(case.layer, backward, wanted)
                plan = settled or ranked[0]  # in the interpreter none is settled
                assert isinstance(plan, PersistentPlan)
                yield replace(
                    row, plan=plan.describe(), estimate_us=plan.estimate_us, error=error,
                    us=statistics.median(us), us_least=min(us), us_most=max(us),
                )  # fmt: skip
    except Exception as error:
        yield replace(row, error=f"{type(error).__name__}: {error}")


def error_of(case: Case, device: torch.device) -> float:
    """Return the largest error of a launch over CHECKED steps. Raises RuntimeError where it is more than rounding."""
    short = Passes(replace(case, T=min(case.T, CHECKED)), device)
    found = short.results()
    with torch.enable_grad():
        errors = distances(found, short.expected())
    name, error = max(errors.items(), key=lambda item: item[1])
    if not error <= ALLOWED[case.dtype]:
        raise RuntimeError(f"wrong: {name} is off by {error:.1e}")
    return error


def us_of_steps(launch: Callable[[], Any], device: torch.device, T: int) -> list[float]:
    """Return the microseconds of a step in each of LAUNCHES launches of T steps."""
    found = []
    for _ in range(WARM_UP + LAUNCHES):
        if device.type == "cuda":
            torch.cuda._sleep(QUEUED_BEHIND)
        (ms,) = timing.one_round([timing.Timed(lambda: None, launch)], device)
        found.append(1e3 * ms / T)
    return found[WARM_UP:]


def run(asked: Sequence[tuple[Case, str | None]], device: torch.device, path: Path) -> Iterator[Row]:
    """Measure the cases with their waits, each row a line of JSON in the file when it is done."""
    for case, wait in asked:
        for row in measure(case, wait, device):
            with path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            yield row


def compile_all(asked: Sequence[tuple[Case, str | None]], device: str, processes: int) -> None:
    """Launch each once, over a few steps in many processes, so that what is timed is compiled."""
    short = [(replace(case, T=3), wait, device) for case, wait in asked]
    with multiprocessing.get_context("spawn").Pool(min(processes, len(asked))) as pool:
        pool.starmap(launch_once, short, chunksize=1)


def launch_once(case: Case, wait: str | None, device: str) -> None:
    """Launch both passes. What fails will fail again where it is measured."""
    from lstm_triton_kernels import sequence_persistent
    from lstm_triton_kernels.plan import Preference

    with suppress(Exception), torch.no_grad(), sequence_persistent.prefer(Preference(wait=wait)):
        bench.set_precision(case.dtype)
        Passes(case, torch.device(device)).results()
