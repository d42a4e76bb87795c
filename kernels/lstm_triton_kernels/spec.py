"""LSTM variants: their gate blocks, their parameters, shapes and names.

The only place that knows what a combination of `coupled`, `peephole`, `output_peephole` and `layer_norm` means.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Peephole = Literal["diagonal", "full"]
OutputPeephole = Literal["previous", "current"]

PEEPHOLES: tuple[Peephole | None, ...] = (None, *get_args(Peephole))
OUTPUT_PEEPHOLES: tuple[OutputPeephole, ...] = get_args(OutputPeephole)


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


@dataclass(frozen=True)
class LSTMSpec:
    """One of the ten LSTM variants, or of the same ten with layer normalisation.

    - coupled: the input gate is 1 - f (CIFG: Greff et al. 2017), three gate blocks instead of four
    - peephole: None, "diagonal" (elementwise: Gers & Schmidhuber 2000) or "full" (a matrix)
    - output_peephole: which cell state the output gate reads: "previous", the default, is a simplified form in which it
      reads c_{t-1}; textbook peepholes (Gers & Schmidhuber 2000; TensorFlow, ONNX) are "current", and read c_t
    - layer_norm: whether both products and the cell state are normalised (Ba et al. 2016)

    What follows from them, settled once since every step of a layer asks for it:

    - name: "standard", "coupled", "diagonal", "coupled+full+current", "norm", "coupled+norm", ...
    - gates: the gate blocks in the order in which they are stacked in the weights
    - peephole_gates: those that read the cell state, in the order of `weight_ch`
    - previous_gates: those that read c_{t-1}

    Raises ValueError for an unknown value, and for "current" without a peephole, TypeError for a flag that is no bool.
    """

    coupled: bool = False
    peephole: Peephole | None = None
    output_peephole: OutputPeephole = "previous"
    layer_norm: bool = False
    name: str = field(init=False, repr=False, compare=False)
    gates: tuple[str, ...] = field(init=False, repr=False, compare=False)
    peephole_gates: tuple[str, ...] = field(init=False, repr=False, compare=False)
    previous_gates: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for flag, given in (("coupled", self.coupled), ("layer_norm", self.layer_norm)):
            if not isinstance(given, bool):
                raise TypeError(f"{flag} should be of type bool, got: {type(given).__name__}")
        if self.peephole not in PEEPHOLES:
            raise ValueError(f"peephole must be None, 'diagonal' or 'full', got {self.peephole!r}")
        if self.output_peephole not in OUTPUT_PEEPHOLES:
            raise ValueError(f"output_peephole must be 'previous' or 'current', got {self.output_peephole!r}")
        if self.output_current and self.peephole is None:
            raise ValueError(
                "output_peephole='current' needs a peephole: choose peephole='diagonal' or 'full', got peephole=None"
            )
        gates = ("f", "g", "o") if self.coupled else ("i", "f", "g", "o")
        reading = tuple(gate for gate in gates if gate != "g") if self.peephole else ()
        previous = tuple(gate for gate in reading if not (gate == "o" and self.output_current))
        parts = ["coupled"] * self.coupled + [self.peephole or ""] + ["current"] * self.output_current
        parts += ["norm"] * self.layer_norm
        name = "+".join(part for part in parts if part) or "standard"
        settled = dict(name=name, gates=gates, peephole_gates=reading, previous_gates=previous)
        for attribute, value in settled.items():
            object.__setattr__(self, attribute, value)

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
        return not self.coupled and self.peephole is None and not self.layer_norm

    @classmethod
    def of(
        cls, coupled: bool, peephole: Peephole | None, output_peephole: OutputPeephole, layer_norm: bool = False
    ) -> LSTMSpec:
        """Return the variant with these options, without building it again. Raises as the class does."""
        names = isinstance(peephole, (str, type(None))) and isinstance(output_peephole, str)
        if isinstance(coupled, bool) and isinstance(layer_norm, bool) and names:
            known = BY_OPTIONS.get((coupled, peephole, output_peephole, layer_norm))
            if known is not None:
                return known
        return cls(coupled, peephole, output_peephole, layer_norm)

    @classmethod
    def parse(cls, name: str) -> LSTMSpec:
        """Return the variant of that `name`. Raises ValueError listing all names."""
        if name in BY_NAME:
            return BY_NAME[name]
        raise ValueError(f"variant must be one of {', '.join(BY_NAME)}, got {name!r}")

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
        zero = torch.zeros_like(blocks["f"])
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

BY_NAME = {spec.name: spec for spec in (*VARIANTS, *NORMALIZED)}
BY_OPTIONS = {(spec.coupled, spec.peephole, spec.output_peephole, spec.layer_norm): spec for spec in BY_NAME.values()}


def state_dict_name(name: str, layer: int, direction: int) -> str:
    """Return the name in a state dict of one direction's parameter: `weight_ih_l0`, ..., `weight_ih_l1_reverse`."""
    return f"{name}_l{layer}{'_reverse' if direction else ''}"
