"""The modules: `torch.nn.LSTM` and `torch.nn.LSTMCell` with coupled gates and peepholes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import is_
from typing import Any

import torch
from lstm_triton_kernels.spec import LSTMSpec, OutputPeephole, Peephole, state_dict_name
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import checks, functional, routing


class VariantModule(nn.Module):
    """Base of cell and layer: the variant, and what code around them does with a module of PyTorch's."""

    input_size: int
    hidden_size: int
    coupled: bool = False
    peephole: Peephole | None = None
    output_peephole: OutputPeephole = "previous"

    def _set_variant(self, spec: LSTMSpec) -> None:
        self.coupled, self.peephole, self.output_peephole = spec.coupled, spec.peephole, spec.output_peephole

    @property
    def spec(self) -> LSTMSpec:
        """The variant as one value."""
        return LSTMSpec.of(self.coupled, self.peephole, self.output_peephole)

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script asks for this. Raises RuntimeError: TorchScript has no operator of this library."""
        way = (
            "lstm_triton.convert.to_torch(model) makes it one that can be"
            if self.spec.standard
            else ("use torch.export, or torch.compile")
        )
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__} of lstm_triton ({self.spec.name}): {way}"
        )

    def reset_parameters(self, bound: float | None = None) -> None:
        """Draw every parameter from U(-bound, bound); by default bound = 1 / sqrt(hidden_size), as `torch.nn.LSTM`."""
        if bound is None:
            bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def _variant_repr(self) -> str:
        """Return the variant's options as they would be written, where they are not the defaults."""
        text = ", coupled=True" if self.coupled else ""
        text += f", peephole={self.peephole!r}" if self.peephole else ""
        return text + (f", output_peephole={self.output_peephole!r}" if self.output_peephole != "previous" else "")


class LSTMCell(VariantModule, nn.RNNCellBase):
    """One step of an LSTM: the interface of `torch.nn.LSTMCell`, with variants.

        a = W_ih x + b_ih + W_hh h + b_hh
        i = s(a_i + V_i c)          coupled: i = 1 - f
        f = s(a_f + V_f c)
        g = tanh(a_g)
        c' = f c + i g
        o = s(a_o + V_o c_*)        c_* = c, or c' with output_peephole="current"
        h' = o tanh(c')

    Arguments:

    - input_size, hidden_size: I and H
    - bias: whether there are bias_ih and bias_hh
    - coupled: the input gate is 1 - f (CIFG, Greff et al. 2017)
    - peephole: None, "diagonal" (V elementwise, Gers & Schmidhuber 2000) or "full" (V a matrix)
    - output_peephole: the output gate reads the "previous" or the "current" cell state

    Parameters, G gate blocks in the order i, f, g, o (coupled: f, g, o), Q peephole blocks i, f, o (coupled: f, o):

    - weight_ih: (G·H, I); weight_hh: (G·H, H); bias_ih, bias_hh: (G·H,) or None
    - weight_ch: diagonal (Q·H,), full (Q·H, H), or None

    Raises ValueError for an unknown variant.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Any  # a Parameter or None
    bias_hh: Any
    weight_ch: Tensor | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        coupled: bool = False,
        peephole: Peephole | None = None,
        output_peephole: OutputPeephole = "previous",
    ) -> None:
        nn.Module.__init__(self)  # RNNCellBase would make the parameters of the standard variant
        spec = LSTMSpec.of(coupled, peephole, output_peephole)
        self._set_variant(spec)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch"):
            shape = spec.parameter_shapes(input_size, hidden_size, bias).get(name)
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input (B, I) or (I,), hx = (h, c) each (B, H) or (H,), zeros if None -> (h', c').

        Raises TypeError, ValueError or RuntimeError as `torch.nn.LSTMCell` does.
        """
        if isinstance(input, Proxy) or (hx is not None and traced(hx)):
            return leaf(self, input, hx)
        return functional.lstm_cell(
            input,
            hx,
            self.weight_ih,
            self.weight_hh,
            self.bias_ih,
            self.bias_hh,
            self.weight_ch,
            coupled=self.coupled,
            peephole=self.peephole,
            output_peephole=self.output_peephole,
        )

    def extra_repr(self) -> str:
        """Return the arguments that are not the defaults."""
        bias = ", bias=False" if not self.bias else ""
        return f"{self.input_size}, {self.hidden_size}{bias}{self._variant_repr()}"


class LSTM(VariantModule, nn.RNNBase):
    """A stack of LSTM layers over a whole sequence: the interface and checkpoints of `torch.nn.LSTM`, with variants.

    Each step computes what `LSTMCell` does; with a projection, h' = W_hr (o tanh(c')) (Sak et al. 2014).

    Arguments: as `torch.nn.LSTM`, and

    - coupled: the input gate is 1 - f (CIFG, Greff et al. 2017)
    - peephole: None, "diagonal" (V elementwise, Gers & Schmidhuber 2000) or "full" (V a matrix)
    - output_peephole: the output gate reads the "previous" or the "current" cell state
    - strategy, recompute: how it is computed, as in `functional.lstm`; attributes that may be set at any time

    Parameters of layer k (suffix `_reverse` for the second direction), G gate blocks in the order i, f, g, o (coupled:
    f, g, o), Q peephole blocks i, f, o (coupled: f, o), P = proj_size or else H, D directions:

    - weight_ih_l{k}: (G·H, I), in layers above the first (G·H, D·P)
    - weight_hh_l{k}: (G·H, P); bias_ih_l{k}, bias_hh_l{k}: (G·H,)
    - weight_hr_l{k}: (P, H), with proj_size
    - weight_ch_l{k}: diagonal (Q·H,), full (Q·H, H)

    Raises TypeError and ValueError as `torch.nn.LSTM` does, ValueError for an unknown variant or strategy.
    """

    mode: str = "LSTM"
    proj_size: int = 0
    strategy: str = "auto"
    recompute: bool = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        coupled: bool = False,
        peephole: Peephole | None = None,
        output_peephole: OutputPeephole = "previous",
        strategy: str = "auto",
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # RNNBase would make the parameters of the standard variant
        checks.lstm_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        spec = LSTMSpec.of(coupled, peephole, output_peephole)
        routing.check_strategy(strategy, spec)
        checks.flag("recompute", recompute)
        self._set_variant(spec)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.strategy = strategy
        self.recompute = recompute
        directions = 2 if bidirectional else 1
        self._all_weights: list[list[str]] = []
        for layer in range(num_layers):
            size = input_size if layer == 0 else directions * (proj_size or hidden_size)
            shapes = spec.parameter_shapes(size, hidden_size, bias, proj_size)
            for direction in range(directions):
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                    self.register_parameter(state_dict_name(name, layer, direction), parameter)
                self._all_weights.append([state_dict_name(name, layer, direction) for name in shapes])
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Any, ...]:
        """output, (h_n, c_n), and with return_cell_states cell_states.

        - input: (T, B, I), (B, T, I) with batch_first, (T, I) unbatched, or a PackedSequence
        - hx: (h_0, c_0), (D·L, B, P) and (D·L, B, H), without B for unbatched input; zeros if None
        - lengths: (B,) integers, steps of each row, instead of packing; output is zero beyond
        - resets: (T, B) bool, laid out as the input is: the state is zero before that step
        - output: (T, B, D·P), laid out as the input is; h_n, c_n as h_0, c_0
        - cell_states: every c_t of the last layer, (T, B, D·H), laid out as output

        Raises as `functional.lstm` does.
        """
        if isinstance(input, Proxy) or (hx is not None and traced(hx)):
            asked = dict(lengths=lengths, resets=resets, return_cell_states=return_cell_states)
            return leaf(self, input, hx, **asked)
        return functional.lstm(
            input,
            hx,
            self._current_weights(),
            num_layers=self.num_layers,
            bias=self.bias,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            batch_first=self.batch_first,
            proj_size=self.proj_size,
            coupled=self.coupled,
            peephole=self.peephole,
            output_peephole=self.output_peephole,
            strategy=self.strategy,
            recompute=self.recompute,
            lengths=lengths,
            resets=resets,
            return_cell_states=return_cell_states,
        )

    def _current_weights(self) -> list[Tensor]:
        """Return the weights of this call in the order of `functional.lstm`: PyTorch's private list `_flat_weights`.

        As in `torch.nn.LSTM` an entry that code put there itself is used until an attribute is another tensor than
        before (functional_call, a computed weight, a new parameter): then the list is that of the attributes. Each of
        them is asked once, since asking may compute it; and a computed one is not kept, so that copies can be made.
        """
        names, refs = self._flat_weights_names, self._flat_weight_refs
        if torch.compiler.is_compiling():
            return [getattr(self, name) for name in names]
        before = [names if ref is None else ref() for ref in refs]  # None for a weight that is no more
        if all(map(is_, map(self._parameters.get, names, repeat(self)), before)):
            return self._flat_weights  # type: ignore[return-value]
        current = self._flat_weights
        weights = [getattr(self, name, None) for name in names]
        pairs = zip(weights, before, strict=True)
        if any(new is not None and new is not old and old is not names for new, old in pairs):
            current = weights
            if all(weight is None or weight.is_leaf for weight in weights):
                self._flat_weights = weights
                self._flat_weight_refs = [None if weight is None else weakref.ref(weight) for weight in weights]
            else:
                self._flat_weight_refs = [gone] * len(names)  # type: ignore[list-item]
        # What is missing is asked for once more: an AttributeError that names it.
        return [getattr(self, n) if weight is None else weight for n, weight in zip(names, current, strict=True)]

    def flatten_parameters(self) -> None:
        """Move the parameters into one block of memory where that is what cuDNN wants: the standard variant on CUDA."""
        if self.spec.standard:
            super().flatten_parameters()

    def get_expected_cell_size(self, input: Tensor, batch_sizes: Tensor | None) -> tuple[int, int, int]:
        """Return the size of c_0 for this input, (D·L, B, H)."""
        B = int(batch_sizes[0]) if batch_sizes is not None else input.size(0 if self.batch_first else 1)
        return self.num_layers * (2 if self.bidirectional else 1), B, self.hidden_size

    def check_forward_args(  # type: ignore[override]
        self, input: Tensor, hidden: tuple[Tensor, Tensor], batch_sizes: Tensor | None
    ) -> None:
        """Raise RuntimeError or ValueError unless the input and both states fit. `forward` checks this, and more."""
        self.check_input(input, batch_sizes)
        expected = (self.get_expected_hidden_size(input, batch_sizes), self.get_expected_cell_size(input, batch_sizes))
        for n, (state, size) in enumerate(zip(hidden, expected, strict=True)):
            self.check_hidden_size(state, size, f"Expected hidden[{n}] size {{}}, got {{}}")

    def permute_hidden(  # type: ignore[override]
        self, hx: tuple[Tensor, Tensor], permutation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Both states with their rows in another order; as they are without one."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        """Return the arguments that are not the defaults."""
        defaults = dict(proj_size=0, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)
        options = "".join(
            f", {name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default
        )
        how = f", strategy={self.strategy!r}" if self.strategy != "auto" else ""
        how += ", recompute=True" if self.recompute else ""
        return f"{self.input_size}, {self.hidden_size}{options}{self._variant_repr()}{how}"


def gone() -> None:
    """A reference to a weight that is no more, in place of a weak one."""


def traced(hx: Any) -> bool:
    """Return whether a tracer of torch.fx gave these states."""
    return isinstance(hx, Proxy) or (isinstance(hx, (tuple, list)) and any(isinstance(state, Proxy) for state in hx))


def leaf(module: nn.Module, input: Any, hx: Any, **asked: Any) -> Any:
    """A call of the module in the graph of the torch.fx tracer that called it: a leaf, as PyTorch's modules are.

    Raises TraceError where the module itself is what is traced.
    """
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    tracer = next(value.tracer for value in (input, *states) if isinstance(value, Proxy))
    path = tracer.path_of_module(module)  # type: ignore[attr-defined]
    if not path:
        name = type(module).__name__
        raise TraceError(f"torch.fx does not look into {name}, it calls it: trace a module that holds the {name}")
    arguments = (input,) if hx is None else (input, hx)
    asked = {name: value for name, value in asked.items() if value is not None and value is not False}
    return tracer.create_proxy("call_module", path, arguments, asked)


class CoupledLSTM(LSTM):
    """`LSTM` with coupled forget and input gate: c_t = f c_{t-1} + (1 - f) g. Nothing but the default is changed."""

    def __init__(self, *args: Any, coupled: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, coupled=coupled, **kwargs)


class PeepholeLSTM(LSTM):
    """`LSTM` with peephole connections, diagonal unless told otherwise. Nothing but the default is changed."""

    def __init__(self, *args: Any, peephole: Peephole | None = "diagonal", **kwargs: Any) -> None:
        super().__init__(*args, peephole=peephole, **kwargs)
