"""Who computes: this library and what a user would pick instead, each behind the same few lines.

A provider builds a model of a problem: weights and all layout changes made once, then calls that take x and return the
results, the input's matmul included. Gradients come back under the names of `torch.nn.LSTM`'s parameters.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels import gpus
from lstm_triton_kernels.plan import ANY
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from benchmarks.problem import Problem
from benchmarks.rows import BASELINE
from benchmarks.suites import OWN, STORAGE, TRAINING, VARIANTS, Case
from lstm_triton import estimates, overlap, plan_words, reference, regularization, routing
from lstm_triton.dtypes import DTYPES

Results = tuple[Tensor, ...]
"""(output, h_n, c_n) as `torch.nn.LSTM` returns them, of a cell (h, c)."""


class Model(ABC):
    """A provider's model of one problem."""

    @abstractmethod
    def run(self, x: Tensor) -> Results:
        """Compute the forward pass on x, (T, B, I) or for a cell (B, I)."""

    def settings(self) -> AbstractContextManager[None]:
        """Return what must hold while it runs, forward and backward."""
        return nullcontext()

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """Return the leaves that collect gradients, by state-dict name."""

    def gradients(self) -> dict[str, Tensor | None]:
        """Return the collected gradients, by state-dict name."""
        return {name: parameter.grad for name, parameter in self.parameters().items()}


class StepModel(Model):
    """A step in PyTorch, called over and over where there are several: one layer in one direction.

    - step: x (B, I), h and c (B, H) and the weights, in the problem's order -> h, c
    """

    def __init__(self, problem: Problem, step: Callable[..., Results]) -> None:
        self.case, self.step, self.weights = problem.case, step, leaves(problem)
        self.goes_on = (~problem.resets)[..., None] if problem.resets is not None else None
        self.flat = tuple(self.weights.values())

    def run(self, x: Tensor) -> Results:
        h = c = x.new_zeros(x.shape[-2], self.case.H)
        if self.case.cell:
            return self.step(x, h, c, *self.flat)
        hidden = []
        for t, x_t in enumerate(x):
            if self.goes_on is not None:
                h, c = h * self.goes_on[t], c * self.goes_on[t]
            h, c = self.step(x_t, h, c, *self.flat)
            hidden.append(h)
        return torch.stack(hidden), h[None], c[None]

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


def leaves(problem: Problem) -> dict[str, Tensor]:
    """Return the problem's weights as leaves that collect gradients."""
    return {name: weight.clone().requires_grad_() for name, weight in problem.weights.items()}


class ModuleModel(Model):
    """A module with `torch.nn.LSTM`'s (or LSTMCell's) interface and parameter names."""

    def __init__(self, module: nn.Module, problem: Problem) -> None:
        self.module = module.to(problem.device, STORAGE[problem.case.dtype])
        self.module.load_state_dict(problem.weights)
        self.module.train(problem.case.mode == TRAINING)
        self.call: Callable[..., Any] = self.module
        self.lengths, self.cell, self.stream = problem.lengths, problem.case.cell, problem.case.stream
        self.states: tuple[Tensor, Tensor] | None = None
        self.asked = {} if problem.resets is None else {"resets": problem.resets}

    def run(self, x: Tensor) -> Results:
        if self.cell:
            return self.call(x)
        if self.lengths is None:
            output, (h_n, c_n) = self.call(x, self.states, **self.asked)
            if self.stream:
                self.states = h_n, c_n
            return output, h_n, c_n
        packed, (h_n, c_n) = self.call(pack_padded_sequence(x, self.lengths, enforce_sorted=False), **self.asked)
        return pad_packed_sequence(packed)[0], h_n, c_n

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


class Provider(ABC):
    """One way to compute an LSTM.

    - name, strategy: as in the columns of a results file
    - leaves_out: what it does not do that `torch.nn.LSTM` does; "" if nothing
    - detour: added to the rank of a case: how much later than the library and the baseline it is taken
    - package: what it needs beside PyTorch, as it is imported and as pip installs it; "" if nothing
    """

    name: str
    strategy: str
    leaves_out: str = ""
    detour: int = 0
    package: str = ""

    @property
    def key(self) -> str:
        """Return `name:strategy`."""
        return f"{self.name}:{self.strategy}"

    def rank(self, case: Case) -> int:
        """Return the priority of its row of the case, 0 the highest."""
        return case.rank + self.detour

    def missing(self) -> str | None:
        """Return how to install what it needs; None if that is there."""
        if not self.package or find_spec(self.package) is not None:
            return None
        return f"{self.package} is not installed: pip install {self.package}"

    def plan(self, case: Case, device_type: str) -> str:
        """Return what computes the case, where that is not the same for all cases; as in the column `plan`."""
        return ""

    @abstractmethod
    def refuses(self, case: Case, device_type: str) -> str | None:
        """Return why it has no row of the case; None if it computes it."""

    @abstractmethod
    def build(self, problem: Problem) -> Model:
        """Return the model of a problem."""


class TorchLSTM(Provider):
    """`torch.nn.LSTM` and `LSTMCell`, the baseline: cuDNN on a GPU, ATen's own or oneDNN on a CPU."""

    name = BASELINE
    leaves_out = "coupled gates, peepholes, resets: beside those it computes the standard cell of the same sizes"

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def refuses(self, case: Case, device_type: str) -> str | None:
        if self.strategy != ("cudnn" if device_type == "cuda" else "aten"):
            return f"computes on another kind of device than {device_type}"
        if case.resets:
            return "takes no resets"
        return None if case.variant == "standard" else "has the standard variant alone"

    def build(self, problem: Problem) -> Model:
        case = problem.case
        if case.cell:
            return ModuleModel(nn.LSTMCell(case.I, case.H), problem)
        return ModuleModel(nn.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2, proj_size=case.P), problem)


class How(NamedTuple):
    """What a user would say to have it computed so.

    - lengths: rows that differ are given by their lengths, not packed as for `torch.nn.LSTM`
    - compiler: the backend of `torch.compile` for the module; None: it is called as it is
    - graphs: the CUDA graphs that calls are replayed from, those of a session or of a captured stack; "" for none
    - overlap: in these, layers are computed at the same time
    """

    strategy: str = "auto"
    backend: Literal["auto", "triton", "torch"] = "auto"
    lengths: bool = False
    compiler: str | None = None
    graphs: Literal["", "session", "captured"] = ""
    overlap: bool = False


class LstmTritonModel(ModuleModel):
    """This library's module, computed as it is told."""

    def __init__(self, module: nn.Module, problem: Problem, how: How) -> None:
        super().__init__(module, problem)
        self.how = how
        if how.compiler is not None:
            unlimited_compilation()
            self.module.compile(fullgraph=True, backend=how.compiler)

    def settings(self) -> AbstractContextManager[None]:
        # Entered within the time of a call: nothing where nothing is asked, as for the others.
        return nullcontext() if self.how.backend == "auto" else lstm_triton.backend(self.how.backend)

    def run(self, x: Tensor) -> Results:
        if not self.how.lengths:
            return super().run(x)
        output, (h_n, c_n) = self.call(x, lengths=self.lengths, **self.asked)
        return output, h_n, c_n


class SessionModel(LstmTritonModel):
    """This library's module in a session, which holds the states: the result of a call is the output alone."""

    def __init__(self, module: lstm_triton.LSTM, problem: Problem, how: How) -> None:
        super().__init__(module, problem, how)
        no_capture_is_an_error()
        self.session = module.session(problem.case.B)

    def run(self, x: Tensor) -> Results:
        return (self.session(x),)


class CapturedModel(LstmTritonModel):
    """This library's module, called by CUDA graphs of the whole stack."""

    def __init__(self, module: lstm_triton.LSTM, problem: Problem, how: How) -> None:
        super().__init__(module, problem, how)
        no_capture_is_an_error()
        self.call = module.captured(overlap=how.overlap)


def no_capture_is_an_error() -> None:
    """Turn the warning of a capture that failed into an error: without its graphs it is no row of theirs."""
    warnings.filterwarnings("error", message=".* without CUDA graphs")


def unlimited_compilation() -> None:
    """Lift the limit of compilations: every case is one of the same function, and beyond it Dynamo stops compiling."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000


class LstmTriton(Provider):
    """This library: what it picks itself (`auto`, also in CUDA graphs and `torch.compile`), or one strategy forced."""

    name = "lstm_triton"
    HOW: ClassVar = {
        "auto": How(),
        "lengths": How(lengths=True),
        "persistent": How("persistent"),
        "stepwise": How("stepwise", backend="triton"),
        "cudnn": How("cudnn"),
        "torch": How(backend="torch"),
        "torch.compile": How(compiler="inductor"),
        "session": How(graphs="session"),
        "captured": How(graphs="captured"),
        "overlapped": How("persistent", graphs="captured", overlap=True),
    }

    def __init__(self, strategy: str) -> None:
        self.strategy, self.how = strategy, self.HOW[strategy]
        self.detour = 0 if strategy in ("auto", "lengths", "torch.compile", "session") else 2
        self.leaves_out = "gradients, both directions, rows of different lengths" if strategy == "session" else ""

    def refuses(self, case: Case, device_type: str) -> str | None:
        device, how = torch.device(device_type), self.how
        if self.strategy == "torch" and device_type == "cpu":
            return "is what `auto` takes on a CPU"
        if how.lengths and not case.ragged:
            return "is `auto` where all rows are of one length"
        if how.compiler is not None and case.suite != "compile":
            return "is measured in smaller suites"
        if case.stream and self.strategy not in ("auto", "session"):
            return "is not measured on streams"
        if how.graphs == "session" and not case.stream:
            return "is for streams, where each call goes on from the last one"
        if how.overlap:
            return self.why_not_overlapped(case, device_type)
        if how.graphs == "captured":
            return self.why_not_captured(case, device_type)
        if how.strategy == "auto":
            return None
        if how.strategy == "stepwise":
            return routing.why_not_triton(device, STORAGE[case.dtype])
        if case.cell:
            return "is no strategy of one step (LSTMCell)"
        if how.strategy == "cudnn":
            return "takes no resets" if case.resets else routing.why_not_cudnn(device, case.spec)
        obstacle = routing.why_not_triton(device, STORAGE[case.dtype])
        return obstacle or routing.why_not_persistent(case.layer, gpus.gpu_of(device))

    def why_not_captured(self, case: Case, device_type: str) -> str | None:
        """Return why a captured stack has no row of the case; None if it has."""
        if device_type == "cpu":
            return "is `auto` on a CPU"
        if case.ragged:
            return "is `auto` where rows have different lengths: their values decide what is launched"
        if case.cell:
            return "has no cell of one step"
        return None if case.suite in ("deepbench", "overhead", OWN) else "is measured where a call computes little"

    def why_not_overlapped(self, case: Case, device_type: str) -> str | None:
        """Return why a stack whose layers are computed at the same time has no row of the case; None if it has."""
        if case.suite not in ("deep", "workloads", OWN):
            return "is measured where there are several layers"
        if device_type == "cpu" or case.ragged or case.cell:
            return self.why_not_captured(case, device_type)
        obstacle = overlap.why_not(case.layer) or routing.why_not_triton(torch.device(device_type), STORAGE[case.dtype])
        if obstacle is not None:
            return f"is `captured` here: {obstacle}"
        found = self.overlaps(case, torch.device(device_type))
        return plan_words.layers(found) if all(isinstance(of_pass, str) for of_pass in found.values()) else None

    def overlaps(self, case: Case, device: torch.device) -> dict[str, overlap.Overlap | str]:
        """Return by pass how the layers are computed at the same time, or why they are not."""
        gpu = gpus.gpu_of(device)
        passes = estimates.passes(case.layer).items()
        return {name: overlap.overlap_of(case.layer, backward, gpu) for name, backward in passes}

    def plan(self, case: Case, device_type: str) -> str:
        device = torch.device(device_type)
        if device_type != "cuda" or case.cell or routing.why_not_triton(device, STORAGE[case.dtype]) is not None:
            return ""
        if self.how.strategy == "auto" and self.how.backend == "auto":
            asked = ("lengths",) * self.how.lengths + ("resets",) * (case.resets > 0)
            asked += regularization.asked(case.rules)
            engine = routing.decide(routing.facts_of(case.layer, device, "auto", asked)).name
            if engine != "persistent":
                return "cudnn" if engine == "operator" else engine
        elif self.how.strategy != "persistent":
            return ""
        if self.how.overlap:
            return plan_words.layers(self.overlaps(case, device))
        from lstm_triton_kernels import sequence_persistent  # needs triton

        words = []
        for name, backward in estimates.passes(case.layer).items():  # what ran here, else the first that would be tried
            found: Any = sequence_persistent.plan_that_ran(case.layer, backward, ANY)
            if found is None:
                plans = ranked_plans(case.layer, backward, gpus.gpu_of(device))
                found = plans if isinstance(plans, str) else plans[0]
            words.append(f"{name} {found if isinstance(found, str) else found.describe()}")
        return "; ".join(words)

    def build(self, problem: Problem) -> Model:
        case, spec = problem.case, problem.case.spec
        names = ("coupled", "peephole", "output_peephole", "layer_norm")
        variant: dict[str, Any] = {name: getattr(spec, name) for name in names} | case.options
        if case.cell:
            return LstmTritonModel(lstm_triton.LSTMCell(case.I, case.H, **variant), problem, self.how)
        variant |= dict(bidirectional=case.D == 2, proj_size=case.P, strategy=self.how.strategy)
        kinds = {"": LstmTritonModel, "session": SessionModel, "captured": CapturedModel}
        return kinds[self.how.graphs](lstm_triton.LSTM(case.I, case.H, case.L, **variant), problem, self.how)


class CompiledReference(Provider):
    """The equations in PyTorch, one step compiled by `torch.compile`: what a user would write for a variant."""

    name = "reference"
    strategy = "torch.compile"
    leaves_out = "layers, directions, lengths, projection, regularised steps"
    detour = 2

    def __init__(self, **options: Any) -> None:
        self.compile_step = partial(torch.compile, dynamic=False, **options)

    def refuses(self, case: Case, device_type: str) -> str | None:
        if case.L > 1 or case.D > 1 or case.ragged or case.P or case.options:
            return "computes one layer in one direction, without lengths, projection and regularised steps"
        return (
            None
            if case.suite in ("anchor", "variants", "regularized", "cell", "odd", OWN)
            else "is measured in smaller suites"
        )

    def build(self, problem: Problem) -> Model:
        unlimited_compilation()
        spec = problem.case.spec
        names = tuple(spec.parameter_names())

        def step(x: Tensor, h: Tensor, c: Tensor, *weights: Tensor) -> Results:
            return reference.cell(x, h, c, LSTMWeights(**dict(zip(names, weights, strict=True))), spec)

        return StepModel(problem, self.compile_step(step))


def by_hand(spec: LSTMSpec) -> Callable[..., Results]:
    """Return one step of a variant in plain PyTorch: x (B, I), h and c (B, H) and the weights -> h, c."""

    def step(
        x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, *w_ch: Tensor
    ) -> Results:
        gates = F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
        if spec.coupled:  # the input gate is 1 - f
            f, g, o = gates.chunk(3, 1)
            f = f.sigmoid()
            c = f * c + (1 - f) * g.tanh()
            return o.sigmoid() * c.tanh(), c
        i, f, g, o = gates.chunk(4, 1)
        if spec.peephole == "diagonal":  # each gate adds c times a vector of its own
            v_i, v_f, v_o = w_ch[0].chunk(3)
            i, f, o = i + v_i * c, f + v_f * c, o + v_o * c
        elif spec.peephole == "full":  # each gate adds a product of c with a matrix of its own
            p_i, p_f, p_o = F.linear(c, w_ch[0]).chunk(3, 1)
            i, f, o = i + p_i, f + p_f, o + p_o
        i, f, o = i.sigmoid(), f.sigmoid(), o.sigmoid()
        c = f * c + i * g.tanh()
        return o * c.tanh(), c

    return step


class ByHand(Provider):
    """The cell in a few lines of plain PyTorch: what a user would write who has no library."""

    name = "by-hand"
    strategy = "eager"
    leaves_out = "layers, directions, lengths, projection; c_t for the output gate"
    detour = 1

    def refuses(self, case: Case, device_type: str) -> str | None:
        if case.variant not in VARIANTS:
            return f"is written for {', '.join(VARIANTS)}"
        if case.P:
            return "has no projection"
        return None if case.suite in ("overhead", "overhead-cell") else "is measured where a call computes little"

    def build(self, problem: Problem) -> Model:
        return StepModel(problem, by_hand(problem.case.spec))


def one_plain_layer(case: Case, device_type: str) -> str | None:
    """Return why a provider of one standard layer in one direction on a GPU has no row of the case; else None."""
    if device_type != "cuda":
        return "computes on CUDA devices"
    if case.variant != "standard":
        return "has the standard variant alone"
    if case.L > 1 or case.D > 1:
        return "computes one layer in one direction"
    if case.P:
        return "has no projection"
    if case.stream:
        return "is called without states"
    return "takes no lengths" if case.ragged else "has no cell of one step" if case.cell else None


class FlashRNNModel(Model):
    """FlashRNN with one head as wide as the layer; the input's product, which it leaves to the caller, is made here."""

    def __init__(self, problem: Problem, backend: str) -> None:
        case, weights = problem.case, problem.weights
        self.hidden, self.backend = case.H, backend
        self.dtype = str(STORAGE[case.dtype]).removeprefix("torch.")
        self.w = weights["weight_ih_l0"].clone().requires_grad_()
        self.r = weights["weight_hh_l0"].view(4, 1, case.H, case.H).clone().requires_grad_()
        self.b = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).view(4, 1, case.H).requires_grad_()

    def run(self, x: Tensor) -> Results:
        from flashrnn import flashrnn

        gates = F.linear(x, self.w).unflatten(-1, (4, 1, self.hidden)).transpose(0, 1)
        states, last = flashrnn(gates, self.r, self.b, function="lstm", backend=self.backend, dtype=self.dtype)
        return states[0, :, :, 0].transpose(0, 1), last[0, :, 0, 0][None], last[1, :, 0, 0][None]

    def parameters(self) -> dict[str, Tensor]:
        return {"weight_ih_l0": self.w, "weight_hh_l0": self.r, "bias": self.b}

    def gradients(self) -> dict[str, Tensor | None]:
        w, r, b = (None if leaf.grad is None else leaf.grad.flatten(0, -2) for leaf in (self.w, self.r, self.b))
        bias = None if b is None else b.flatten()
        return {"weight_ih_l0": w, "weight_hh_l0": r, "bias_ih_l0": bias, "bias_hh_l0": bias}


class FlashRNN(Provider):
    """FlashRNN (Pöppel et al. 2024), as one head as wide as the layer."""

    name = package = "flashrnn"
    leaves_out = (
        "the input's matmul (added as one product), layers, directions, lengths, resets, variants, projection; keeps c "
        "in the storage type; `cuda_fused` needs nvcc and compiles in its first call, `triton_fused` has H <= 64"
    )
    detour = 2

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def refuses(self, case: Case, device_type: str) -> str | None:
        if self.strategy == "triton_fused" and case.H > 64:
            return "has H <= 64"
        return "takes no resets" if case.resets else one_plain_layer(case, device_type)

    def build(self, problem: Problem) -> Model:
        return FlashRNNModel(problem, self.strategy)


class TorchRLModel(Model):
    """torchrl's function on explicit tensors, batch first; at a reset it takes the state given for that step, zero."""

    def __init__(self, problem: Problem) -> None:
        case, self.weights = problem.case, leaves(problem)
        self.state = torch.zeros(case.B, case.T, case.H, device=problem.device, dtype=STORAGE[case.dtype])
        none = torch.zeros(case.T, case.B, device=problem.device, dtype=torch.bool)
        self.begins = (none if problem.resets is None else problem.resets).t().contiguous()
        self.options = dict(compute_dtype=STORAGE[case.dtype], input_precision=DTYPES[case.dtype][1])

    def run(self, x: Tensor) -> Results:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        x = x.transpose(0, 1).contiguous()
        steps, _, h, c = lstm_triton(x, self.state, self.state, *self.weights.values(), self.begins, **self.options)
        return steps.transpose(0, 1), h[None], c[None]

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


class TorchRL(Provider):
    """torchrl's Triton LSTM, which its `LSTMModule(recurrent_backend="triton")` calls."""

    name = package = "torchrl"
    strategy = "triton"
    leaves_out = (
        "layers and directions in one call, lengths, variants, projection, float16; copies x to batch first; takes a "
        "state and a reset for each step"
    )
    detour = 2

    def refuses(self, case: Case, device_type: str) -> str | None:
        return "has no float16" if case.dtype == "float16" else one_plain_layer(case, device_type)

    def build(self, problem: Problem) -> Model:
        return TorchRLModel(problem)


BASELINES = (TorchLSTM("cudnn"), TorchLSTM("aten"), ByHand())
"""Whose times the others' are compared with, the first choice first."""

PROVIDERS: dict[str, Provider] = {
    one.key: one
    for one in (
        *BASELINES[:2], *map(LstmTriton, LstmTriton.HOW), CompiledReference(), BASELINES[2],
        FlashRNN("cuda_fused"), FlashRNN("triton_fused"), TorchRL(),
    )
}  # fmt: skip
"""Every provider by `name:strategy`."""


def baseline_of(case: Case, device_type: str, among: Sequence[Provider] = BASELINES) -> tuple[Provider, Case]:
    """Return the baseline that a row of the case takes turns with, and the case that it computes then.

    The first that computes the case; where none does, the first that computes the standard cell of the same sizes,
    without resets.
    """
    cases = (case, replace(case, variant="standard", resets=0.0))
    return next((other, one) for one in cases for other in among if other.refuses(one, device_type) is None)
