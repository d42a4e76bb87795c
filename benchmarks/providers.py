"""Who computes: this library and what a user would pick instead, each behind the same few lines.

A provider builds a model of a problem: weights and all layout changes made once, then calls that take x and return the
results, the input's matmul included. Gradients come back under the names of `torch.nn.LSTM`'s parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from lstm_triton_kernels import gpus
from lstm_triton_kernels.plan import ANY, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.spec import LSTMWeights
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton
from benchmarks.problem import Problem, layers_of
from benchmarks.rows import BASELINE
from benchmarks.suites import STORAGE, TRAINING, Case
from lstm_triton import estimates, reference, routing

Results = tuple[Tensor, ...]
"""(output, h_n, c_n) as `torch.nn.LSTM` returns them, of a cell (h, c)."""


class Model(ABC):
    """A provider's model of one problem."""

    @abstractmethod
    def run(self, x: Tensor) -> Results:
        """The forward pass on x, (T, B, I) or for a cell (B, I)."""

    def settings(self) -> AbstractContextManager[None]:
        """What must hold while it runs, forward and backward."""
        return nullcontext()

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The leaves that collect gradients."""

    def gradients(self) -> dict[str, Tensor | None]:
        """The collected gradients, by state-dict name, in the shapes of `Problem.weights`."""
        return {name: parameter.grad for name, parameter in self.parameters().items()}


class Provider(ABC):
    """One way to compute an LSTM.

    - name, strategy: as in the columns of a results file
    - leaves_out: what it does not do that `torch.nn.LSTM` does; "" if nothing
    - detour: added to the rank of a case: how much later than the library and the baseline it is taken
    - first_seconds: how long its first row may take, compilation included
    """

    name: str
    strategy: str
    leaves_out: str = ""
    detour: int = 0
    first_seconds: float = 10.0

    @property
    def key(self) -> str:
        """`name:strategy`."""
        return f"{self.name}:{self.strategy}"

    def rank(self, case: Case) -> int:
        """How much its row of the case tells, 0 the most."""
        return case.rank + self.detour

    def missing(self) -> str | None:
        """Why it cannot be imported; None if it can."""
        return None

    def plan(self, case: Case, device_type: str) -> str:
        """What computes the case, where that is not the same for all cases; as in the column of a results file."""
        return ""

    @abstractmethod
    def refuses(self, case: Case, device_type: str) -> str | None:
        """Why it has no row of the case; None if it computes it."""

    @abstractmethod
    def build(self, problem: Problem) -> Model:
        """The model of a problem."""


def leaves(problem: Problem) -> dict[str, Tensor]:
    """The problem's weights as leaves that collect gradients."""
    return {name: weight.clone().requires_grad_() for name, weight in problem.weights.items()}


class ModuleModel(Model):
    """A module with `torch.nn.LSTM`'s (or LSTMCell's) interface and parameter names."""

    def __init__(self, module: nn.Module, problem: Problem) -> None:
        self.module = module.to(problem.device, STORAGE[problem.case.dtype])
        self.module.load_state_dict(problem.weights)
        self.module.train(problem.case.mode == TRAINING)
        self.lengths = problem.lengths
        self.cell = problem.case.cell

    def run(self, x: Tensor) -> Results:
        if self.cell:
            return self.module(x)
        if self.lengths is None:
            output, (h_n, c_n) = self.module(x)
            return output, h_n, c_n
        packed, (h_n, c_n) = self.module(pack_padded_sequence(x, self.lengths, enforce_sorted=False))
        return pad_packed_sequence(packed)[0], h_n, c_n

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


class TorchLSTM(Provider):
    """`torch.nn.LSTM` and `LSTMCell`, the baseline: cuDNN on a GPU, ATen's own or oneDNN on a CPU."""

    name = BASELINE
    leaves_out = "coupled gates and peepholes: beside those it computes the standard cell of the same sizes"

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def refuses(self, case: Case, device_type: str) -> str | None:
        if self.strategy != ("cudnn" if device_type == "cuda" else "aten"):
            return f"computes on another kind of device than {device_type}"
        return None if case.variant == "standard" else "has the standard variant alone"

    def build(self, problem: Problem) -> Model:
        case = problem.case
        if case.cell:
            return ModuleModel(nn.LSTMCell(case.I, case.H), problem)
        return ModuleModel(nn.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2), problem)


NO_STRATEGY = "is no strategy of one step (LSTMCell)"


class How(NamedTuple):
    """What a user would say to have it computed so: a strategy, a backend; and what is wanted of persistent plans.

    - lengths: rows that differ are given by their lengths, not packed as for `torch.nn.LSTM`
    - compiler: the backend of `torch.compile` for the module; None: it is called as it is
    """

    strategy: str = "auto"
    backend: str = "auto"
    preference: Preference = ANY
    lengths: bool = False
    compiler: str | None = None


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
        if self.how.backend == "auto" and self.how.preference == ANY:
            return nullcontext()
        return self._settings()

    @contextmanager
    def _settings(self) -> Iterator[None]:
        with lstm_triton.backend(self.how.backend), wanted(self.how.preference):
            yield

    def run(self, x: Tensor) -> Results:
        if not self.how.lengths:
            return super().run(x)
        output, (h_n, c_n) = self.module(x, lengths=self.lengths)
        return output, h_n, c_n


def wanted(preference: Preference) -> AbstractContextManager[None]:
    """Inside, persistent plans are as the preference wants them."""
    if preference == ANY:
        return nullcontext()
    from lstm_triton_kernels import sequence_persistent  # needs triton

    return sequence_persistent.prefer(preference)


def unlimited_compilation() -> None:
    """Every case compiles the same function anew; beyond its limit, Dynamo would quietly stop compiling."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000


class LstmTriton(Provider):
    """This library: what it picks itself (`auto`; inside of `torch.compile`), one strategy forced, or another plan.

    The other plans are candidates for what `persistent` should take: measured in few suites, first of all in `anchor`.
    """

    name = "lstm_triton"
    leaves_out = ""
    HOW: ClassVar = {
        "auto": How(),
        "lengths": How(lengths=True),
        "persistent": How("persistent"),
        "persistent-counter": How("persistent", preference=Preference(wait="counter")),
        "persistent-data": How("persistent", preference=Preference(wait="data")),
        "persistent-u8": How("persistent", preference=Preference(block_u=8)),
        "persistent-u16": How("persistent", preference=Preference(block_u=16)),
        "persistent-u32": How("persistent", preference=Preference(block_u=32)),
        "stepwise": How("stepwise", backend="triton"),
        "cudnn": How("cudnn"),
        "torch": How(backend="torch"),
        "torch.compile": How(compiler="inductor"),
    }
    CANDIDATE_SUITES = ("anchor", "odd", "variants")

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy
        self.how = self.HOW[strategy]
        self.detour = 0 if strategy in ("auto", "lengths", "torch.compile") else 2
        if self.how.compiler is not None:
            self.first_seconds = CompiledReference.first_seconds

    def rank(self, case: Case) -> int:
        if case.suite == "anchor" and self.how.strategy == "persistent":
            return case.rank
        if case.variant == "coupled" and self.how.strategy == "cudnn":  # what else a user of that cell could have
            return case.rank
        return super().rank(case)

    def refuses(self, case: Case, device_type: str) -> str | None:
        device = torch.device(device_type)
        if self.strategy == "torch" and device_type == "cpu":
            return "is what `auto` takes on a CPU"
        if self.how.lengths and not case.ragged:
            return "is `auto` where all rows are of one length"
        if self.how.compiler is not None and case.suite != "compile":
            return "is measured in smaller suites"
        if self.how.strategy == "auto":
            return None
        if self.how.strategy == "cudnn":
            return NO_STRATEGY if case.cell else routing.why_not_cudnn(device, case.spec)
        obstacle = routing.why_not_triton(device, STORAGE[case.dtype])
        if obstacle is not None or self.how.strategy == "stepwise":
            return obstacle
        return NO_STRATEGY if case.cell else self._why_not_persistent(case, gpus.gpu_of(device))

    def _why_not_persistent(self, case: Case, gpu: gpus.GPU) -> str | None:
        obstacle = routing.why_not_persistent(case.layer, gpu)
        if obstacle is not None or self.how.preference == ANY:
            return obstacle
        if case.suite not in self.CANDIDATE_SUITES:
            return "is measured in smaller suites"
        passes = estimates.passes(case.layer).values()
        found = [ranked_plans(case.layer, backward, gpu, self.how.preference) for backward in passes]
        missing = next((plans for plans in found if isinstance(plans, str)), None)
        usual = [ranked_plans(case.layer, backward, gpu)[0] for backward in passes]
        return missing or ("is what `persistent` takes" if usual == [plans[0] for plans in found] else None)

    def plan(self, case: Case, device_type: str) -> str:
        device = torch.device(device_type)
        if device_type != "cuda" or case.cell or routing.why_not_triton(device, STORAGE[case.dtype]) is not None:
            return ""
        if self.how.strategy == "auto" and self.how.backend == "auto":
            asked = ("lengths",) if self.how.lengths else ()
            engine = routing.decide(routing.facts_of(case.layer, device, "auto", asked)).name
            if engine != "persistent":
                return "cudnn" if engine == "operator" else engine
        elif self.how.strategy != "persistent":
            return ""
        return "; ".join(self._plan(case, name, backward) for name, backward in estimates.passes(case.layer).items())

    def _plan(self, case: Case, name: str, backward: bool) -> str:
        """The plan of a pass: the one that ran in this process, else the first that would be tried."""
        from lstm_triton_kernels import sequence_persistent  # needs triton

        ran = sequence_persistent.plan_that_ran(case.layer, backward, self.how.preference)
        if ran is not None:
            return f"{name} {ran.describe()}"
        plans = ranked_plans(case.layer, backward, gpus.gpu_of(torch.device("cuda")), self.how.preference)
        return f"{name} {plans if isinstance(plans, str) else plans[0].describe()}"

    def build(self, problem: Problem) -> Model:
        case, spec = problem.case, problem.case.spec
        variant: dict[str, Any] = dict(
            coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole
        )
        if case.cell:
            module: nn.Module = lstm_triton.LSTMCell(case.I, case.H, **variant)
        else:
            variant |= dict(bidirectional=case.D == 2, strategy=self.how.strategy)
            module = lstm_triton.LSTM(case.I, case.H, case.L, **variant)
        return LstmTritonModel(module, problem, self.how)


class CompiledReferenceModel(Model):
    """The reference's step, compiled, in a Python loop over time; the loops over layers and directions as they are."""

    def __init__(self, problem: Problem, compile_step: Callable[[Callable], Callable]) -> None:
        case, self.spec = problem.case, problem.case.spec
        self.cell = case.cell
        self.weights = leaves(problem)
        self.layers = layers_of(case, self.weights)
        spec = self.spec

        def step(x: Tensor, h: Tensor, c: Tensor, weights: LSTMWeights) -> tuple[Tensor, Tensor]:
            return reference.cell(x, h, c, weights, spec)

        self.step = compile_step(step)

    def run(self, x: Tensor) -> Results:
        if self.cell:
            zeros = x.new_zeros(x.shape[0], self.layers[0][0].weight_hh.shape[1])
            return self.step(x, zeros, zeros, self.layers[0][0])
        last_h, last_c = [], []
        for weights in self.layers:
            columns = []
            for direction, direction_weights in enumerate(weights):
                h = c = x.new_zeros(x.shape[1], direction_weights.weight_hh.shape[1])
                hidden = []
                steps = x.unbind(0)
                for x_t in reversed(steps) if direction else steps:
                    h, c = self.step(x_t, h, c, direction_weights)
                    hidden.append(h)
                columns.append(torch.stack(hidden[::-1] if direction else hidden))
                last_h.append(h)
                last_c.append(c)
            x = torch.cat(columns, -1)
        return x, torch.stack(last_h), torch.stack(last_c)

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


class CompiledReference(Provider):
    """The equations in PyTorch, one step compiled by `torch.compile`: what a user would write for a variant."""

    name = "reference"
    strategy = "torch.compile"
    leaves_out = "lengths"
    detour = 2
    first_seconds = 60.0

    def __init__(self, **options: Any) -> None:
        self.compile_step = partial(torch.compile, dynamic=False, **options)

    def refuses(self, case: Case, device_type: str) -> str | None:
        if case.ragged:
            return "takes no lengths"
        return None if case.suite in ("anchor", "variants", "cell", "odd") else "is measured in smaller suites"

    def build(self, problem: Problem) -> Model:
        unlimited_compilation()
        return CompiledReferenceModel(problem, self.compile_step)


def by_hand_standard(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> Results:
    """One step: x (B, I), h and c (B, H) -> h, c; so are those of the variants."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def by_hand_coupled(x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Results:
    """The input gate is 1 - f."""
    f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(3, 1)
    f = f.sigmoid()
    c = f * c + (1 - f) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def by_hand_diagonal(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, w_ch: Tensor
) -> Results:
    """Each of three gates adds c times a vector of its own."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    v_i, v_f, v_o = w_ch.chunk(3)
    i, f, o = (i + v_i * c).sigmoid(), (f + v_f * c).sigmoid(), (o + v_o * c).sigmoid()
    c = f * c + i * g.tanh()
    return o * c.tanh(), c


def by_hand_full(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor, w_ch: Tensor
) -> Results:
    """Each of three gates adds a product of c with a matrix of its own."""
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    p_i, p_f, p_o = F.linear(c, w_ch).chunk(3, 1)
    i, f, o = (i + p_i).sigmoid(), (f + p_f).sigmoid(), (o + p_o).sigmoid()
    c = f * c + i * g.tanh()
    return o * c.tanh(), c


class ByHandModel(Model):
    """A step, called over and over where there are several."""

    def __init__(self, problem: Problem, step: Callable[..., Results]) -> None:
        self.cell, self.hidden, self.step = problem.case.cell, problem.case.H, step
        self.weights = leaves(problem)
        self.flat = tuple(self.weights.values())

    def run(self, x: Tensor) -> Results:
        h = c = x.new_zeros(x.shape[-2], self.hidden)
        if self.cell:
            return self.step(x, h, c, *self.flat)
        hidden = []
        for x_t in x:
            h, c = self.step(x_t, h, c, *self.flat)
            hidden.append(h)
        return torch.stack(hidden), h[None], c[None]

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


class ByHand(Provider):
    """The cell in a few lines of plain PyTorch: what a user would write who has no library."""

    name = "by-hand"
    strategy = "eager"
    leaves_out = "layers, directions, lengths, projection; c_t for the output gate"
    detour = 1
    STEPS: ClassVar[dict[str, Callable[..., Results]]] = {
        "standard": by_hand_standard, "coupled": by_hand_coupled, "diagonal": by_hand_diagonal, "full": by_hand_full,
    }  # fmt: skip

    def refuses(self, case: Case, device_type: str) -> str | None:
        if case.variant not in self.STEPS:
            return f"is written for {', '.join(self.STEPS)}"
        return None if case.suite in ("overhead", "overhead-cell") else "is measured where a call computes little"

    def build(self, problem: Problem) -> Model:
        return ByHandModel(problem, self.STEPS[problem.case.variant])


def _one_plain_layer(case: Case, device_type: str) -> str | None:
    """Why a provider that has one standard layer in one direction, on a GPU, has no row of the case."""
    if device_type != "cuda":
        return "computes on CUDA devices"
    if case.variant != "standard":
        return "has the standard variant alone"
    if case.L > 1 or case.D > 1:
        return "computes one layer and direction a call"
    return "takes no lengths" if case.ragged else "has no cell of one step" if case.cell else None


class FlashRNNModel(Model):
    """FlashRNN with one head; the input's matmul, which it leaves to the caller, is one product here."""

    def __init__(self, problem: Problem, backend: str) -> None:
        case, weights = problem.case, problem.weights
        self.hidden, self.backend = case.H, backend
        self.dtype = str(STORAGE[case.dtype]).removeprefix("torch.")
        self.w = weights["weight_ih_l0"].clone().requires_grad_()
        self.r = weights["weight_hh_l0"].view(4, 1, case.H, case.H).clone().requires_grad_()
        self.b = (weights["bias_ih_l0"] + weights["bias_hh_l0"]).view(4, 1, case.H).requires_grad_()

    def run(self, x: Tensor) -> Results:
        from flashrnn import flashrnn

        T, B, _ = x.shape
        gates = (x.flatten(0, 1) @ self.w.t()).view(T, B, 4, 1, self.hidden).transpose(0, 1)
        states, last = flashrnn(gates, self.r, self.b, function="lstm", backend=self.backend, dtype=self.dtype)
        return states[0, :, :, 0].transpose(0, 1), last[0, :, 0, 0][None], last[1, :, 0, 0][None]

    def parameters(self) -> dict[str, Tensor]:
        return {"w": self.w, "r": self.r, "b": self.b}

    def gradients(self) -> dict[str, Tensor | None]:
        r, b = self.r.grad, self.b.grad
        bias = b.flatten() if b is not None else None
        return {
            "weight_ih_l0": self.w.grad,
            "weight_hh_l0": r.reshape(4 * self.hidden, self.hidden) if r is not None else None,
            "bias_ih_l0": bias,
            "bias_hh_l0": bias,
        }


class FlashRNN(Provider):
    """FlashRNN (flashrnn on PyPI), as one head as wide as the layer."""

    name = "flashrnn"
    leaves_out = (
        "the input's matmul (added here as one product), layers, directions, lengths, projection; "
        "keeps c in the storage type; `cuda_fused` needs nvcc and builds on first use; `triton_fused` has H <= 64"
    )
    detour = 2
    first_seconds = 120.0

    def __init__(self, strategy: str) -> None:
        self.strategy = strategy

    def missing(self) -> str | None:
        return None if find_spec("flashrnn") else "flashrnn is not installed"

    def refuses(self, case: Case, device_type: str) -> str | None:
        if self.strategy == "triton_fused" and case.H > 64:
            return "has H <= 64"
        return _one_plain_layer(case, device_type)

    def build(self, problem: Problem) -> Model:
        return FlashRNNModel(problem, self.strategy)


class TorchRLModel(Model):
    """torchrl's function on explicit tensors, batch first; no step is a reset."""

    def __init__(self, problem: Problem) -> None:
        case = problem.case
        self.weights = leaves(problem)
        self.state = torch.zeros(case.B, case.T, case.H, device=problem.device, dtype=STORAGE[case.dtype])
        self.is_init = torch.zeros(case.B, case.T, dtype=torch.bool, device=problem.device)
        self.compute_dtype = STORAGE[case.dtype]
        self.precision = "ieee" if case.dtype == "float32" else "tf32"

    def run(self, x: Tensor) -> Results:
        from torchrl.modules.tensordict_module._rnn_triton import lstm_triton

        w_ih, w_hh, b_ih, b_hh = self.weights.values()
        steps, _, h, c = lstm_triton(
            x.transpose(0, 1).contiguous(), self.state, self.state, w_ih, w_hh, b_ih, b_hh, self.is_init,
            compute_dtype=self.compute_dtype, input_precision=self.precision,
        )  # fmt: skip
        return steps.transpose(0, 1), h[None], c[None]

    def parameters(self) -> dict[str, Tensor]:
        return self.weights


class TorchRL(Provider):
    """torchrl's Triton LSTM, the function that its LSTMModule(recurrent_backend="triton") calls."""

    name = "torchrl"
    strategy = "triton"
    leaves_out = (
        "layers, directions, lengths, projection in one call; copies x to batch first; takes a state and a reset flag "
        "per step"
    )
    detour = 2
    first_seconds = 90.0

    def missing(self) -> str | None:
        return None if find_spec("torchrl") else "torchrl is not installed"

    def refuses(self, case: Case, device_type: str) -> str | None:
        return _one_plain_layer(case, device_type)

    def build(self, problem: Problem) -> Model:
        return TorchRLModel(problem)


PROVIDERS: dict[str, Provider] = {
    provider.key: provider
    for provider in (
        TorchLSTM("cudnn"), TorchLSTM("aten"), *map(LstmTriton, LstmTriton.HOW), CompiledReference(),
        ByHand(), FlashRNN("cuda_fused"), FlashRNN("triton_fused"), TorchRL(),
    )
}  # fmt: skip
"""Every provider by `name:strategy`."""

BASELINES = (TorchLSTM("cudnn"), TorchLSTM("aten"), ByHand())
"""Whose times the others' are compared with, the first choice first."""


def baseline_of(case: Case, device_type: str, among: Sequence[Provider] = BASELINES) -> tuple[Provider, Case]:
    """The baseline that a row of the case takes turns with, and the case that it computes then.

    The first that computes the case; where none does, the first that computes the standard cell of the same sizes.
    """
    cases = (case, replace(case, variant="standard"))
    return next((other, one) for one in cases for other in among if other.refuses(one, device_type) is None)
