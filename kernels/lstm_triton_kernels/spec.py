"""LSTM variants: their gate blocks, their parameters, shapes and names.

The only place that knows what a combination of `coupled`, `peephole`, `output_peephole` and `layer_norm`, and of the
ablations, means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Peephole = Literal["diagonal", "full"]
OutputPeephole = Literal["previous", "current"]
Activation = Literal["tanh", "identity"]

PEEPHOLES: tuple[Peephole | None, ...] = (None, *get_args(Peephole))
OUTPUT_PEEPHOLES: tuple[OutputPeephole, ...] = get_args(OutputPeephole)
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

OPEN = 40.0
"""A bias with which a gate that reads nothing is open: its logistic function is exactly 1, and its derivative 0, in
every type, since e^-40 is less than half of float64's precision."""


class LSTMWeights(NamedTuple):
    """The parameters of one direction of one layer; what the variant has none of is None.

    - weight_ih: (G·H, I), input to gates
    - weight_hh: (G·H, P), previous hidden state to gates
    - bias_ih, bias_hh: (G·H,) each
    - weight_hr: (P, H), projection of the hidden state
    - weight_ch: peephole, cell state to gates; diagonal (Q·H,), full (Q·H, H)
    - weight_ln_ih, weight_ln_hh: (G·H,), gains of the normalised products
    - weight_ln_c, bias_ln_c: (H,), gain and shift of the normalised cell state
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    weight_hr: Tensor | None = None
    weight_ch: Tensor | None = None
    weight_ln_ih: Tensor | None = None
    weight_ln_hh: Tensor | None = None
    weight_ln_c: Tensor | None = None
    bias_ln_c: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """Name to tensor of the parameters there are, in the order of a state dict."""
        return {name: weight for name, weight in self._asdict().items() if weight is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LSTMWeights:
        """Return the same parameters, each as `function` makes it."""
        return LSTMWeights(*(None if weight is None else function(weight) for weight in self))  # type: ignore[arg-type]


GATE_OPTIONS = ("input_gate", "forget_gate", "output_gate")
FLAGS = ("coupled", "layer_norm", *GATE_OPTIONS)
OPTIONS = (
    "coupled", "peephole", "output_peephole", "layer_norm", *GATE_OPTIONS, "input_activation", "output_activation"
)  # fmt: skip
"""The options of a variant, in the order of `LSTMSpec`'s fields."""


@dataclass(frozen=True)
class LSTMSpec:
    """One of the ten LSTM variants, of the same ten with layer normalisation, or of the ablations of either.

    - coupled: the input gate is 1 - f (CIFG: Greff et al. 2017), three gate blocks instead of four
    - peephole: None, "diagonal" (elementwise: Gers & Schmidhuber 2000) or "full" (a matrix)
    - output_peephole: which cell state the output gate reads: "previous", the default, is a simplified form in which it
      reads c_{t-1}; textbook peepholes (Gers & Schmidhuber 2000; TensorFlow, ONNX) are "current", and read c_t
    - layer_norm: whether both products and the cell state are normalised (Ba et al. 2016)
    - input_gate, forget_gate, output_gate: whether there is this gate; one that there is not is the constant 1, and has
      no weights, biases and peepholes (NIG, NFG, NOG of Greff et al. 2017)
    - input_activation: "tanh", or "identity": g = a_g (NIAF); output_activation: "tanh", or "identity": h_t = o c_t
      (NOAF)

    What follows from them, settled once since every step of a layer asks for it:

    - name: "standard", "coupled", "diagonal", "coupled+full+current", "norm", "coupled+norm", ..., of ablations
      "no-forget-gate", "diagonal+no-output-gate+identity-input", ...
    - gates: the gate blocks in the order in which they are stacked in the weights
    - peephole_gates: those that read the cell state, in the order of `weight_ch`
    - previous_gates: those that read c_{t-1}
    - missing: the gates that are the constant 1: of i, f and o

    Raises ValueError for an unknown value, and with the reason for options that contradict each other; TypeError for a
    flag that is no bool.
    """

    coupled: bool = False
    peephole: Peephole | None = None
    output_peephole: OutputPeephole = "previous"
    layer_norm: bool = False
    input_gate: bool = True
    forget_gate: bool = True
    output_gate: bool = True
    input_activation: Activation = "tanh"
    output_activation: Activation = "tanh"
    name: str = field(init=False, repr=False, compare=False)
    gates: tuple[str, ...] = field(init=False, repr=False, compare=False)
    peephole_gates: tuple[str, ...] = field(init=False, repr=False, compare=False)
    previous_gates: tuple[str, ...] = field(init=False, repr=False, compare=False)
    missing: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for flag in FLAGS:
            given = getattr(self, flag)
            if not isinstance(given, bool):
                raise TypeError(f"{flag} should be of type bool, got: {type(given).__name__}")
        if self.peephole not in PEEPHOLES:
            raise ValueError(f"peephole must be None, 'diagonal' or 'full', got {self.peephole!r}")
        if self.output_peephole not in OUTPUT_PEEPHOLES:
            raise ValueError(f"output_peephole must be 'previous' or 'current', got {self.output_peephole!r}")
        for name in ("input_activation", "output_activation"):
            if getattr(self, name) not in ACTIVATIONS:
                raise ValueError(f"{name} must be 'tanh' or 'identity', got {getattr(self, name)!r}")
        missing = tuple(name[0] for name in GATE_OPTIONS if not getattr(self, name))
        contradiction = self._contradiction(missing)
        if contradiction is not None:
            raise ValueError(contradiction)
        gates = tuple(
            gate for gate in ("i", "f", "g", "o") if gate not in missing and not (self.coupled and gate == "i")
        )
        reading = tuple(gate for gate in gates if gate != "g") if self.peephole else ()
        previous = tuple(gate for gate in reading if not (gate == "o" and self.output_current))
        parts = ["coupled"] * self.coupled + [self.peephole or ""] + ["current"] * self.output_current
        parts += [f"no-{name.replace('_', '-')}" for name in GATE_OPTIONS if not getattr(self, name)]
        parts += ["identity-input"] * (self.input_activation == "identity")
        parts += ["identity-output"] * (self.output_activation == "identity")
        parts += ["norm"] * self.layer_norm
        name = "+".join(part for part in parts if part) or "standard"
        settled = dict(name=name, gates=gates, peephole_gates=reading, previous_gates=previous, missing=missing)
        for attribute, value in settled.items():
            object.__setattr__(self, attribute, value)

    def _contradiction(self, missing: tuple[str, ...]) -> str | None:
        """Return why these options, each a known one, are no variant; None if they are."""
        if self.output_current and self.peephole is None:
            return "output_peephole='current' needs a peephole: choose peephole='diagonal' or 'full', got peephole=None"
        if self.coupled and "i" in missing:
            return "coupled=True makes the input gate 1 - f: with input_gate=False it would be 1"
        if self.coupled and "f" in missing:
            return "coupled=True makes the input gate 1 - f: with forget_gate=False it would be 0, and no input be read"
        if self.output_current and "o" in missing:
            return "output_peephole='current' is of the output gate, which output_gate=False leaves out"
        if self.peephole is not None and len(missing) == 3:
            return f"peephole={self.peephole!r} needs a gate that reads the cell state: all three are left out"
        if self.layer_norm and missing:
            return "layer_norm=True normalises the products over the blocks of all gates: none can be left out"
        return None

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, as `lstm_triton.LSTM` takes them."""
        return {name: getattr(self, name) for name in OPTIONS}

    @property
    def computed(self) -> LSTMSpec:
        """The variant that is computed in place of this one: that with all gates, on `widened` weights."""
        return self if not self.missing else LSTMSpec.of(**self.options | dict.fromkeys(GATE_OPTIONS, True))

    @property
    def identity_input(self) -> bool:
        """Whether g is its pre-activation."""
        return self.input_activation == "identity"

    @property
    def identity_output(self) -> bool:
        """Whether h_t is o c_t."""
        return self.output_activation == "identity"

    @property
    def activated(self) -> bool:
        """Whether both activations are tanh."""
        return not (self.identity_input or self.identity_output)

    @property
    def full(self) -> bool:
        """Whether the peephole is a matrix."""
        return self.peephole == "full"

    @property
    def diagonal(self) -> bool:
        """Whether the peephole is elementwise."""
        return self.peephole == "diagonal"

    @property
    def output_current(self) -> bool:
        """Whether the output gate reads c_t."""
        return self.output_peephole == "current"

    @property
    def standard(self) -> bool:
        """Whether this is `torch.nn.LSTM`'s variant."""
        return self.name == "standard"

    @classmethod
    def of(
        cls, coupled: bool = False, peephole: Peephole | None = None, output_peephole: OutputPeephole = "previous",
        layer_norm: bool = False, input_gate: bool = True, forget_gate: bool = True, output_gate: bool = True,
        input_activation: Activation = "tanh", output_activation: Activation = "tanh",
    ) -> LSTMSpec:  # fmt: skip
        """Return the variant with these options, without building it again. Raises as the class does."""
        options = (
            coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
            output_activation,
        )  # fmt: skip
        try:
            found = BY_OPTIONS.get(options)
        except TypeError:  # an option cannot be hashed: none that there is
            found = None
        # True and 1 are the same key. (One by one: every step of a cell asks.)
        if (
            found is not None
            and coupled is found.coupled
            and layer_norm is found.layer_norm
            and input_gate is found.input_gate
            and forget_gate is found.forget_gate
            and output_gate is found.output_gate
        ):
            return found
        return cls(*options)

    @classmethod
    def parse(cls, name: str) -> LSTMSpec:
        """Return the variant of that `name`. Raises ValueError listing the names."""
        if name in BY_NAME:
            return BY_NAME[name]
        raise ValueError(f"variant must be one of {NAMES_IN_WORDS}, got {name!r}")

    def parameter_names(self, bias: bool = True, projection: bool = False) -> tuple[str, ...]:
        """Return the fields of LSTMWeights that the variant has, in `torch.nn.LSTM`'s order, those of its own last."""
        names: tuple[str, ...] = ("weight_ih", "weight_hh")
        names += ("bias_ih", "bias_hh") if bias else ()
        names += ("weight_hr",) if projection else ()
        names += ("weight_ch",) if self.peephole else ()
        names += ("weight_ln_ih", "weight_ln_hh", "weight_ln_c") if self.layer_norm else ()
        return names + (("bias_ln_c",) if self.layer_norm and bias else ())

    def parameter_shapes(
        self, input_size: int, hidden_size: int, bias: bool = True, proj_size: int = 0
    ) -> dict[str, tuple[int, ...]]:
        """Name to shape of the parameters of one direction of one layer, in the order of `parameter_names`."""
        gate_rows = len(self.gates) * hidden_size
        peephole_rows = len(self.peephole_gates) * hidden_size
        shapes = {
            "weight_ih": (gate_rows, input_size),
            "weight_hh": (gate_rows, proj_size or hidden_size),
            "bias_ih": (gate_rows,),
            "bias_hh": (gate_rows,),
            "weight_hr": (proj_size, hidden_size),
            "weight_ch": (peephole_rows, hidden_size) if self.full else (peephole_rows,),
            "weight_ln_ih": (gate_rows,),
            "weight_ln_hh": (gate_rows,),
            "weight_ln_c": (hidden_size,),
            "bias_ln_c": (hidden_size,),
        }
        return {name: shapes[name] for name in self.parameter_names(bias, proj_size > 0)}

    def split_gates(self, stacked: Tensor, dim: int = -1) -> dict[str, Tensor]:
        """Views of the gate blocks of a tensor whose dimension `dim` holds G·H rows."""
        return dict(zip(self.gates, stacked.chunk(len(self.gates), dim), strict=True))

    def split_peephole(self, weight_ch: Tensor) -> dict[str, Tensor]:
        """Views of the blocks of `weight_ch`."""
        return dict(zip(self.peephole_gates, weight_ch.chunk(len(self.peephole_gates), 0), strict=True))

    def previous_peephole(self, weight_ch: Tensor) -> Tensor:
        """A full peephole on c_{t-1} as gate blocks, (G·H, H): zero for the gates that do not read c_{t-1}."""
        blocks = self.split_peephole(weight_ch)
        zero = torch.zeros_like(next(iter(blocks.values())))
        return torch.cat([blocks[gate] if gate in self.previous_gates else zero for gate in self.gates])


VARIANTS: tuple[LSTMSpec, ...] = tuple(
    LSTMSpec(coupled, peephole, output_peephole)
    for coupled in (False, True)
    for peephole in PEEPHOLES
    for output_peephole in (OUTPUT_PEEPHOLES if peephole else ("previous",))
)
"""The ten variants without layer normalisation."""

NORMALIZED: tuple[LSTMSpec, ...] = tuple(
    LSTMSpec(spec.coupled, spec.peephole, spec.output_peephole, layer_norm=True) for spec in VARIANTS
)
"""The same ten with it."""

STANDARD = VARIANTS[0]
"""`torch.nn.LSTM`'s variant."""


def _ablations() -> list[LSTMSpec]:
    """Return all variants that lack a gate or an activation."""
    found = []
    for spec, gates in product((*VARIANTS, *NORMALIZED), product((True, False), repeat=3)):
        own = spec.options | dict(zip(GATE_OPTIONS, gates, strict=True))
        try:
            found += [
                LSTMSpec(**own | dict(input_activation=of_input, output_activation=of_output))
                for of_input, of_output in product(ACTIVATIONS, ACTIVATIONS)
            ]
        except ValueError:  # the options contradict each other
            continue
    return [spec for spec in found if spec.missing or not spec.activated]


ABLATIONS: tuple[LSTMSpec, ...] = (
    LSTMSpec(input_gate=False),
    LSTMSpec(forget_gate=False),
    LSTMSpec(output_gate=False),
    LSTMSpec(input_activation="identity"),
    LSTMSpec(output_activation="identity"),
)
"""NIG, NFG, NOG, NIAF and NOAF of Greff et al. 2017, without peepholes. All others that combine have names, too."""


BY_OPTIONS: dict[tuple[Any, ...], LSTMSpec] = {
    tuple(spec.options.values()): spec for spec in (*VARIANTS, *NORMALIZED, *_ablations())
}
BY_NAME = {spec.name: spec for spec in BY_OPTIONS.values()}

NAMES_IN_WORDS = (
    f"{', '.join(spec.name for spec in (*VARIANTS, *NORMALIZED))}; or one of the ablations, with the parts "
    "no-input-gate, no-forget-gate, no-output-gate, identity-input, identity-output before norm: no-forget-gate, "
    "diagonal+current+identity-output, ..."
)
"""The names of the variants, for messages."""


def widened(weights: LSTMWeights, spec: LSTMSpec) -> LSTMWeights:
    """Return the weights of `spec.computed` that computes what these compute with the variant `spec`.

    A gate that there is not has weights of zero and the bias OPEN: it is exactly 1, and nothing that it would read has
    a gradient through it. So there are biases, also where there were none. Differentiable.
    """
    missing = spec.missing
    if not missing:
        return weights
    every = spec.computed
    H = weights.weight_hh.shape[0] // len(spec.gates)

    def in_all(blocks: dict[str, Tensor], gates: tuple[str, ...], filled: float = 0.0) -> Tensor:
        """Return the blocks of all those gates, (H, ...) each."""
        like = next(iter(blocks.values()))
        of_missing = {gate: torch.full_like(like, filled if gate in missing else 0.0) for gate in gates}
        return torch.cat([blocks.get(gate, of_missing[gate]) for gate in gates])

    def bias(own: Tensor | None, filled: float) -> Tensor:
        if own is None:
            own = weights.weight_hh.new_zeros(len(spec.gates) * H)
        return in_all(spec.split_gates(own), every.gates, filled)

    peephole = None
    if weights.weight_ch is not None:
        peephole = in_all(spec.split_peephole(weights.weight_ch), every.peephole_gates)
    return weights._replace(
        weight_ih=in_all(spec.split_gates(weights.weight_ih, 0), every.gates),
        weight_hh=in_all(spec.split_gates(weights.weight_hh, 0), every.gates),
        bias_ih=bias(weights.bias_ih, OPEN),
        bias_hh=bias(weights.bias_hh, 0.0),
        weight_ch=peephole,
    )


def state_dict_name(name: str, layer: int, direction: int) -> str:
    """Return the name in a state dict of one direction's parameter: `weight_ih_l0`, ..., `weight_ih_l1_reverse`."""
    return f"{name}_l{layer}{'_reverse' if direction else ''}"
