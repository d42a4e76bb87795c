"""One configuration, computed by a backend and by the float64 reference: outputs, states and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from lstm_triton_kernels.regularize import NONE, Regularized, Rules, drawn
from lstm_triton_kernels.spec import state_dict_name
from torch import Tensor

import lstm_triton
from lstm_triton import LSTMSpec, functional, parameters, reference, regularization

BOUND = {torch.float16: 3e-3, torch.float32: 1e-5, torch.float64: 1e-12}
"""||actual - expected|| / ||expected|| allowed on the CPU, T up to 64 (the numerics contract)."""

MASKS = 5
"""The seed of PyTorch's generator before a call, from which masks are drawn."""


@dataclass(frozen=True)
class Case:
    """A layer stack (or, with `cell`, one step) and its input; the fields as in `functional.lstm`."""

    spec: LSTMSpec
    T: int = 2
    B: int = 3
    I: int = 5  # noqa: E741
    H: int = 7
    L: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    dtype: torch.dtype = torch.float64
    device: str = "cpu"
    cell: bool = False
    strategy: str = "auto"
    lengths: bool = False
    resets: bool = False
    states: bool = False
    """whether rows have lengths, whether they are reset, and whether every c_t is wanted"""
    rules: Rules = NONE
    training: bool = True
    """the rules of regularised steps (one dropout at most), and whether masks are drawn"""
    layout: str = "contiguous"
    """how the input is laid out: "contiguous", "transposed" (columns far apart), "expanded" (all rows one)"""

    def __str__(self) -> str:
        flags = [self.spec.name, str(self.dtype).removeprefix("torch."), f"T{self.T}-B{self.B}-I{self.I}-H{self.H}"]
        flags += [f"L{self.L}"] * (self.L > 1) + ["both-directions"] * self.bidirectional + ["cell"] * self.cell
        flags += [name for name in ("lengths", "resets", "states") if getattr(self, name)]
        flags += [f"{name}{value:.1g}" for name, value in self.rules._asdict().items() if value]
        flags += ["evaluated"] * (not self.training)
        flags += ["no-bias"] * (not self.bias) + [f"P{self.proj_size}"] * (self.proj_size > 0)
        flags += [self.layout] * (self.layout != "contiguous") + [self.strategy] * (self.strategy != "auto")
        return "-".join(flags)

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def P(self) -> int:
        return self.proj_size or self.H

    @property
    def variant(self) -> dict:
        return self.spec.options

    @property
    def regularization(self) -> dict:
        """The rules as options of `functional.lstm`."""
        rules = self.rules
        on = "candidate" if rules.candidate_dropout else "hidden"
        return dict(
            recurrent_dropout=rules.hidden_dropout or rules.candidate_dropout, recurrent_dropout_on=on,
            zoneout=(rules.zoneout_h, rules.zoneout_c), cell_clip=rules.cell_clip or None,
            proj_clip=rules.proj_clip or None, training=self.training,
        )  # fmt: skip

    def drawn(self, n: int) -> list[Regularized]:
        """What the steps of the first n layers are regularised with, drawn as the library draws: after MASKS."""
        if self.rules.random:
            torch.manual_seed(MASKS)
        device, T = torch.device(self.device), 1 if self.cell else self.T
        seeds = [regularization.seed_for(self.rules, self.training, device) for _ in range(n)]
        return [drawn(self.rules, seed, self.D, T, self.B, self.H, self.P, torch.float64) for seed in seeds]

    def parameter_names(self) -> list[str]:
        if self.cell:
            return list(self.spec.parameter_names(self.bias))
        return parameters.state_dict_names(self.spec, self.L, self.bidirectional, self.bias, self.proj_size)


def random_inputs(case: Case, seed: int = 0) -> dict[str, Tensor]:
    """x, h_0, c_0 and every parameter by name; leaves (but for the layout of x) that require gradients."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int, bound: float) -> Tensor:
        values = (torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound
        return values.to(case.dtype).to(case.device).requires_grad_()

    states = (case.B,) if case.cell else (case.D * case.L, case.B)
    steps = () if case.cell else (case.T,)
    inputs = {
        "x": {
            "contiguous": lambda: uniform(*steps, case.B, case.I, bound=1.7),
            "transposed": lambda: uniform(*steps, case.I, case.B, bound=1.7),
            "expanded": lambda: uniform(*steps, 1, case.I, bound=1.7),
        }[case.layout](),
        "h_0": uniform(*states, case.P, bound=1.0),
        "c_0": uniform(*states, case.H, bound=1.7),
    }
    for layer in range(case.L):
        size = case.I if layer == 0 else case.D * case.P
        shapes = case.spec.parameter_shapes(size, case.H, case.bias, case.proj_size)
        for direction in range(case.D):
            for name, shape in shapes.items():
                key = name if case.cell else state_dict_name(name, layer, direction)
                inputs[key] = uniform(*shape, bound=2.0 / case.H**0.5)
    return inputs


def laid_out(case: Case, x: Tensor) -> Tensor:
    """The leaf x as the input that the case is about."""
    if case.layout == "transposed":
        return x.transpose(-1, -2)
    return x.expand(*x.shape[:-2], case.B, case.I) if case.layout == "expanded" else x


def ragged(case: Case) -> dict[str, Tensor]:
    """The lengths (B,) and resets (T, B) of the case, those that it has; scattered, the first row with all T steps."""
    t, b = torch.arange(case.T, device=case.device)[:, None], torch.arange(case.B, device=case.device)
    asked = dict(lengths=case.T - 7 * b % case.T) if case.lengths else {}
    return asked | (dict(resets=(5 * t + 3 * b) % 4 == 1) if case.resets else {})


def call(case: Case, x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The public function that the case is about: (output, h_n, c_n), for a cell (h, c)."""
    x = laid_out(case, x)
    if case.cell:
        named = dict(zip(case.parameter_names(), weights, strict=True))
        own = {name: case.regularization[name] for name in ("zoneout", "cell_clip", "training")}
        return functional.lstm_cell(x, (h_0, c_0), **named, **case.variant, **own)
    output, (h_n, c_n), *states = functional.lstm(
        x, (h_0, c_0), weights, num_layers=case.L, bias=case.bias, bidirectional=case.bidirectional,
        proj_size=case.proj_size, strategy=case.strategy, **case.variant, **case.regularization, **ragged(case),
        return_cell_states=case.states,
    )  # fmt: skip
    return output, h_n, c_n, *states


def call_reference(case: Case, x: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The same by the reference."""
    x = laid_out(case, x)
    layers = parameters.group_layers(weights, case.spec, case.D, case.bias, case.proj_size)
    if case.cell:
        return reference.cell(x, h_0, c_0, layers[0][0], case.spec, case.drawn(1)[0].direction(0).at(0))
    *results, states = reference.lstm(x, h_0, c_0, layers, case.spec, **ragged(case), regularized=case.drawn(case.L))
    return (*results, states) if case.states else tuple(results)


def results(
    case: Case, inputs: dict[str, Tensor], function: Callable[..., tuple[Tensor, ...]], seed: int = 1
) -> dict[str, Tensor]:
    """Outputs by name, and the gradient of every input for random gradients of every output."""
    torch.manual_seed(MASKS)
    outputs = function(case, *inputs.values())
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device, case.dtype) for t in outputs]
    gradients = torch.autograd.grad(
        outputs, list(inputs.values()), [w.to(t.dtype) for w, t in zip(weights, outputs, strict=True)]
    )
    names = ("h", "c") if case.cell else ("output", "h_n", "c_n", "states")
    named = dict(zip(names, outputs, strict=False))
    return named | {f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}


def expected_results(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """`results` by the reference in float64, from the same inputs, upcast."""
    double = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    return results(case, double, call_reference)


def errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """||actual - expected|| / ||expected|| of every output and gradient, in float64."""
    assert actual.keys() == expected.keys()
    return {
        name: float((actual[name].detach().double() - e).norm() / e.norm().clamp_min(1e-30))
        for name, e in ((name, e.detach()) for name, e in expected.items())
    }


def assert_parity(case: Case, backend: str) -> None:
    """The backend against the float64 reference, within the type's bound."""
    inputs = random_inputs(case)
    with lstm_triton.backend(backend):
        actual = results(case, inputs, call)
    for name, value in actual.items():
        assert value.dtype == case.dtype, f"{name} is {value.dtype}"
    found = errors(actual, expected_results(case, inputs))
    wrong = {name: error for name, error in found.items() if not error <= BOUND[case.dtype]}
    assert not wrong, f"{case}: beyond {BOUND[case.dtype]:.0e}: {wrong}"


RULES = [
    Rules.rounded(0.4, 0.0, 0.0, 0.0, 0.0, 0.0),
    Rules.rounded(0.0, 0.3, 0.0, 0.0, 0.0, 0.0),
    Rules.rounded(0.0, 0.0, 0.3, 0.2, 0.0, 0.0),
    Rules.rounded(0.4, 0.0, 0.3, 0.2, 0.6, 0.0),
    Rules.rounded(0.0, 0.3, 0.3, 0.2, 0.6, 0.0),
]
"""Rules that between them have every one, alone and together, but proj_clip."""


def regularized_cases(spec: LSTMSpec) -> list[Case]:
    """Cases that between them have all rules with every option, for one variant."""
    both = dict(bidirectional=True, states=True)
    return [
        *(Case(spec, T=5, B=3, I=4, H=7, rules=rules, **both) for rules in RULES),
        *(Case(spec, T=5, B=3, I=4, H=7, rules=rules, training=False, **both) for rules in RULES[2:4]),
        Case(spec, T=6, B=5, I=3, H=9, rules=RULES[3], lengths=True, **both),
        Case(spec, T=6, B=5, I=3, H=9, rules=RULES[4], resets=True, **both),
        Case(spec, T=6, B=5, I=3, H=9, rules=RULES[4], lengths=True, resets=True, proj_size=4, **both),
        Case(spec, T=4, B=3, I=5, H=10, L=2, proj_size=6, bias=False, rules=RULES[3]._replace(proj_clip=0.25)),
        Case(spec, T=4, B=3, I=5, H=10, proj_size=6, rules=RULES[3]._replace(proj_clip=0.25), training=False),
        Case(spec, T=1, B=4, I=3, H=6, rules=RULES[4]),
    ]


def odd_cases(spec: LSTMSpec) -> list[Case]:
    """Cases that between them have every odd shape, option and layout, for one variant."""
    return [
        Case(spec, cell=True, B=1, I=3, H=5),
        Case(spec, cell=True, B=17, I=1, H=19, bias=False, layout="transposed"),
        Case(spec, cell=True, B=3, I=33, H=1, layout="expanded"),
        Case(spec, T=1, B=3, I=7, H=9, layout="transposed"),
        Case(spec, T=7, B=1, I=3, H=5, bias=False),
        Case(spec, T=2, B=17, I=5, H=35, layout="expanded"),
        Case(spec, T=2, B=3, I=5, H=6, L=2, bidirectional=True),
        Case(spec, T=2, B=2, I=4, H=7, L=2, bidirectional=True, proj_size=3, bias=False, layout="transposed"),
        Case(spec, T=2, B=3, I=5, H=130, dtype=torch.float32),
        Case(spec, T=7, B=3, I=6, H=11, dtype=torch.float16, proj_size=5),
        Case(spec, T=4, B=5, I=3, H=7, bidirectional=True, lengths=True, states=True),
        Case(spec, T=4, B=3, I=5, H=9, L=2, bidirectional=True, resets=True, states=True, bias=False),
        Case(spec, T=5, B=4, I=3, H=6, bidirectional=True, proj_size=2, lengths=True, resets=True, states=True),
        Case(spec, T=1, B=3, I=4, H=5, lengths=True, resets=True, states=True),
    ]
