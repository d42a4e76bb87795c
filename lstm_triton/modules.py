"""The modules: `torch.nn.LSTM` and `torch.nn.LSTMCell` with coupled gates and peepholes.

The sizes in the docstrings, T, B, I, H, P, L, D, G and Q, are explained in `lstm_triton.functional`.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Callable
from itertools import repeat
from operator import is_
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import torch
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.spec import OPTIONS, Activation, LSTMSpec, OutputPeephole, Peephole, state_dict_name
from torch import Tensor, nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError
from torch.nn.utils.rnn import PackedSequence

from lstm_triton import checks, functional, init, regularization, routing, transforms
from lstm_triton.captured import Captured
from lstm_triton.explain import Explanation, explanation
from lstm_triton.functional import Lengths, States, TensorOrPacked
from lstm_triton.gate_values import Gates
from lstm_triton.regularization import DroppedOn, Zoneout
from lstm_triton.routing import Strategy
from lstm_triton.session import Session

LIBRARY = "lstm_triton"
"""What ends the representation of a module: `LSTM(5, 8, lstm_triton)`."""

if TYPE_CHECKING:
    Signature = TypeVar("Signature", bound=Callable[..., Any])

    def typed_as(function: Signature) -> Callable[[Callable[..., Any]], Signature]:
        """Declare a method with the signature of `function`: `__call__`, untyped in `nn.Module`, with forward's."""


PRESENT = (True, "tanh")
"""Values of the options of ablations that are the defaults."""


class VariantModule(nn.Module):
    """Base of `LSTM` and `LSTMCell`: the options of the variant, initial values, the reply to `torch.jit.script`."""

    input_size: int
    hidden_size: int
    coupled: bool = False
    peephole: Peephole | None = None
    output_peephole: OutputPeephole = "previous"
    layer_norm: bool = False
    input_gate: bool = True
    forget_gate: bool = True
    output_gate: bool = True
    input_activation: Activation = "tanh"
    output_activation: Activation = "tanh"
    zoneout: Zoneout = (0.0, 0.0)
    cell_clip: float | None = None
    forget_bias: float | None = None

    def _set_variant(self, spec: LSTMSpec) -> None:
        for name, value in spec.options.items():
            setattr(self, name, value)

    @property
    def spec(self) -> LSTMSpec:
        """The variant of this module, as one value."""
        return LSTMSpec.of(
            self.coupled, self.peephole, self.output_peephole, self.layer_norm, self.input_gate, self.forget_gate,
            self.output_gate, self.input_activation, self.output_activation,
        )  # fmt: skip

    @property
    def regularization(self) -> dict[str, Any]:
        """The options of regularised steps and weights that are not their defaults, by name."""
        names = ("recurrent_dropout", "recurrent_dropout_on", "zoneout", "weight_dropout", "cell_clip", "proj_clip")
        given = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return {name: value for name, value in given.items() if value != getattr(type(self), name)}

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which calls this. Raises RuntimeError that names what to use instead."""
        way = (
            "lstm_triton.convert.to_torch(model) makes it one that can be"
            if self.spec.standard
            else ("use torch.export, or torch.compile")
        )
        raise RuntimeError(
            f"torch.jit.script does not take {type(self).__name__} of lstm_triton ({self.spec.name}): {way}"
        )

    def reset_parameters(self, bound: float | None = None) -> None:
        """Draw every parameter from the uniform distribution on [-bound, bound], but those of layer normalisation.

        The default bound is 1 / sqrt(hidden_size), as in `torch.nn.LSTM`. Gains are one and shifts zero. With a
        forget_bias the biases of the forget gate are set as `init.forget_bias_` does.
        """
        if bound is None:
            bound = 1.0 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, parameter in self.named_parameters():
            if "_ln_" in name:
                nn.init.constant_(parameter, float(name.startswith("weight")))
            else:
                nn.init.uniform_(parameter, -bound, bound)
        if self.forget_bias is not None:
            init.forget_bias_(self, self.forget_bias)

    def _variant_repr(self) -> str:
        """Return the variant's options as they would be written, where they are not the defaults."""
        text = ", coupled=True" if self.coupled else ""
        text += f", peephole={self.peephole!r}" if self.peephole else ""
        text += f", output_peephole={self.output_peephole!r}" if self.output_peephole != "previous" else ""
        text += ", layer_norm=True" if self.layer_norm else ""
        text += "".join(
            f", {name}={getattr(self, name)!r}" for name in OPTIONS[4:] if getattr(self, name) not in PRESENT
        )
        text += "".join(f", {name}={value!r}" for name, value in self.regularization.items())
        return text + (f", forget_bias={self.forget_bias!r}" if self.forget_bias is not None else "")


class LSTMCell(VariantModule, nn.RNNCellBase):
    """Compute one step of an LSTM: the interface and checkpoints of `torch.nn.LSTMCell`, with variants.

        a = W_ih x + b_ih + W_hh h + b_hh
        i = s(a_i + V_i c)          coupled: i = 1 - f
        f = s(a_f + V_f c)
        g = tanh(a_g)
        c' = f c + i g
        o = s(a_o + V_o c_*)        c_* = c, or c' with output_peephole="current"
        h' = o tanh(c')

    s is the logistic function, a_i, a_f, a_g, a_o are the gate blocks of a, products with gates are elementwise, and
    without a peephole the terms with V are absent: then this is the cell of Hochreiter & Schmidhuber 1997 with the
    forget gate of Gers et al. 2000.

    Arguments:

    - input_size, hidden_size: I and H
    - bias: whether there are bias_ih and bias_hh
    - device, dtype: of the parameters
    - coupled: whether the input gate is 1 - f, which leaves three gate blocks (CIFG, Greff et al. 2017)
    - peephole: None, "diagonal" (V is a vector and V c elementwise, Gers & Schmidhuber 2000) or "full" (V is a matrix)
    - output_peephole: which cell state the output gate reads. "previous", the default, is a simplified form in which it
      reads c, as the other gates do. Textbook peepholes (Gers & Schmidhuber 2000; TensorFlow, ONNX) are "current":
      there it reads c'
    - layer_norm, zoneout, cell_clip, forget_bias, input_gate, forget_gate, output_gate, input_activation,
      output_activation: as in `LSTM`

    Parameters, with G gate blocks in the order i, f, g, o (coupled: f, g, o) and Q peephole blocks in the order i, f, o
    (coupled: f, o), each without the gates that are left out:

    - weight_ih: W_ih, (G·H, I); weight_hh: W_hh, (G·H, H); bias_ih, bias_hh: (G·H,), or None without bias
    - weight_ch: V, diagonal (Q·H,), full (Q·H, H), or None without a peephole
    - weight_ln_ih, weight_ln_hh: (G·H,), weight_ln_c: (H,), bias_ln_c: (H,) or None without bias; with layer_norm

    Raises TypeError for a flag that is no bool, ValueError for an unknown variant, with the reason for options that
    contradict each other, and for a probability or limit that is none.
    """

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Any  # a Parameter or None
    bias_hh: Any
    weight_ch: Tensor | None
    weight_ln_ih: Tensor
    weight_ln_hh: Tensor
    weight_ln_c: Tensor
    bias_ln_c: Tensor | None

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
        layer_norm: bool = False,
        input_gate: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        input_activation: Activation = "tanh",
        output_activation: Activation = "tanh",
        zoneout: Zoneout = (0.0, 0.0),
        cell_clip: float | None = None,
        forget_bias: float | None = None,
    ) -> None:
        nn.Module.__init__(self)  # RNNCellBase would make the parameters of the standard variant
        spec = LSTMSpec.of(
            coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
            output_activation,
        )  # fmt: skip
        regularization.rules_of(0.0, "hidden", zoneout, cell_clip, None, 0, training=True)
        checks.forget_bias(forget_bias, bias, spec)
        self._set_variant(spec)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.bias = bias
        self.zoneout, self.cell_clip, self.forget_bias = (zoneout[0], zoneout[1]), cell_clip, forget_bias
        names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ch"]
        names += ["weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c"] if layer_norm else []
        for name in names:
            shape = spec.parameter_shapes(input_size, hidden_size, bias).get(name)
            parameter = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def forward(self, input: Tensor, hx: States | None = None) -> States:
        """Compute (h', c') from the input and the states hx = (h, c).

        - input: (B, I), or (I,) unbatched
        - hx: (h, c), each (B, H), or (H,) unbatched; zeros if None
        - returns (h', c'), each of the shape of h and c, and of the input's type

        Types and errors as of `functional.lstm_cell`.
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
            layer_norm=self.layer_norm,
            input_gate=self.input_gate,
            forget_gate=self.forget_gate,
            output_gate=self.output_gate,
            input_activation=self.input_activation,
            output_activation=self.output_activation,
            weight_ln_ih=self.weight_ln_ih if self.layer_norm else None,
            weight_ln_hh=self.weight_ln_hh if self.layer_norm else None,
            weight_ln_c=self.weight_ln_c if self.layer_norm else None,
            bias_ln_c=self.bias_ln_c if self.layer_norm else None,
            zoneout=self.zoneout,
            cell_clip=self.cell_clip,
            training=self.training,
        )

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Call `forward`, and the hooks."""

    def extra_repr(self) -> str:
        """Return the arguments that are not the defaults, and the library's name: PyTorch's class has the same name."""
        bias = ", bias=False" if not self.bias else ""
        return f"{self.input_size}, {self.hidden_size}{bias}{self._variant_repr()}, {LIBRARY}"


class LSTM(VariantModule, nn.RNNBase):
    """Compute a stack of LSTM layers over a whole sequence: the interface of `torch.nn.LSTM`, with variants.

    Checkpoints of `torch.nn.LSTM` load into the standard variant, and back. Each step computes

        a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        i = s(a_i + V_i c_{t-1})          coupled: i = 1 - f
        f = s(a_f + V_f c_{t-1})
        g = tanh(a_g)
        c_t = f c_{t-1} + i g
        o = s(a_o + V_o c_*)              c_* = c_{t-1}, or c_t with output_peephole="current"
        h_t = o tanh(c_t)                 with proj_size: h_t = W_hr (o tanh(c_t)), Sak et al. 2014

    s is the logistic function, a_i, a_f, a_g, a_o are the gate blocks of a, products with gates are elementwise, and
    without a peephole the terms with V are absent. x_t is the input of the layer: in layers above the first the hidden
    states of the layer below.

    Arguments:

    - input_size, hidden_size, num_layers: I, H and L
    - bias: whether there are bias_ih and bias_hh
    - batch_first: whether input and output are (B, T, ...) in place of (T, B, ...); the states are not
    - dropout: probability of zeroing an element of the output of each layer but the last, in training
    - bidirectional: whether each layer has a second direction, which reads the sequence from its end (D = 2)
    - proj_size: size P of the projected hidden state; 0 for none, then P = H
    - device, dtype: of the parameters
    - coupled: whether the input gate is 1 - f, which leaves three gate blocks (CIFG, Greff et al. 2017)
    - peephole: None, "diagonal" (V is a vector and V c elementwise, Gers & Schmidhuber 2000) or "full" (V is a matrix)
    - output_peephole: which cell state the output gate reads. "previous", the default, is a simplified form in which it
      reads c_{t-1}, as the other gates do. Textbook peepholes (Gers & Schmidhuber 2000; TensorFlow, ONNX) are
      "current": there it reads c_t
    - recurrent_dropout: probability of zeroing elements within the recurrence, in training; recurrent_dropout_on:
      "hidden", the default, of h_{t-1} with one mask for all steps (Gal & Ghahramani 2016), or "candidate", of g with a
      mask for each step (Semeniuta et al. 2016)
    - zoneout: (p_h, p_c), the probabilities of an element of h_t and of c_t keeping the value of the step before
      (Krueger et al. 2017); in evaluation its expectation
    - weight_dropout: probability of zeroing an element of W_hh, in training, with one mask for a call (Merity et al.
      2018)
    - cell_clip, proj_clip: largest absolute value of an element of c_t, and of a projected h_t; what is beyond has
      gradient zero (TensorFlow's LSTMCell)
    - layer_norm: whether W_ih x_t, W_hh h_{t-1} and c_t (for h_t alone) are normalised (Ba et al. 2016)
    - input_gate, forget_gate, output_gate: whether there is this gate; one that is left out is 1 and has no parameters
      (NIG, NFG, NOG of Greff et al. 2017)
    - input_activation: "tanh", or "identity": g = a_g (NIAF); output_activation: "tanh", or "identity": h_t = o c_t
      (NOAF)
    - forget_bias: what both biases of the forget gate are initialised to, in sum (Jozefowicz et al. 2015); None: as the
      others
    - strategy: what computes the recurrence, "auto", "persistent", "stepwise" or "cudnn"; recompute: whether the
      backward pass computes the gates again to save memory. Both as in `functional.lstm`, and attributes that may be
      set at any time

    Parameters of layer k (with the suffix `_reverse` those of the second direction), with G gate blocks in the order
    i, f, g, o (coupled: f, g, o) and Q peephole blocks in the order i, f, o (coupled: f, o), each without the gates
    that are left out:

    - weight_ih_l{k}: W_ih, (G·H, I), in layers above the first (G·H, D·P)
    - weight_hh_l{k}: W_hh, (G·H, P); bias_ih_l{k}, bias_hh_l{k}: (G·H,), absent without bias
    - weight_hr_l{k}: W_hr, (P, H), with proj_size
    - weight_ch_l{k}: V, diagonal (Q·H,), full (Q·H, H), with a peephole
    - weight_ln_ih_l{k}, weight_ln_hh_l{k}: gains of the normalised products, (G·H,), weight_ln_c_l{k}, bias_ln_c_l{k}:
      gain and shift of the normalised c_t, (H,), with layer_norm (the shift only with bias)

    Equations of the regularised steps, and where their random numbers come from: docs/regularization.md.

    Raises TypeError and ValueError as `torch.nn.LSTM` does, ValueError for an unknown variant or strategy, and for a
    probability or limit that is none.
    """

    mode: str = "LSTM"
    proj_size: int = 0
    recurrent_dropout: float = 0.0
    recurrent_dropout_on: DroppedOn = "hidden"
    weight_dropout: float = 0.0
    proj_clip: float | None = None
    strategy: Strategy = "auto"
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
        layer_norm: bool = False,
        input_gate: bool = True,
        forget_gate: bool = True,
        output_gate: bool = True,
        input_activation: Activation = "tanh",
        output_activation: Activation = "tanh",
        recurrent_dropout: float = 0.0,
        recurrent_dropout_on: DroppedOn = "hidden",
        zoneout: Zoneout = (0.0, 0.0),
        weight_dropout: float = 0.0,
        cell_clip: float | None = None,
        proj_clip: float | None = None,
        forget_bias: float | None = None,
        strategy: Strategy = "auto",
        recompute: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # RNNBase would make the parameters of the standard variant
        checks.lstm_arguments(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size)
        spec = LSTMSpec.of(
            coupled, peephole, output_peephole, layer_norm, input_gate, forget_gate, output_gate, input_activation,
            output_activation,
        )  # fmt: skip
        routing.check_strategy(strategy, spec)
        checks.flag("recompute", recompute)
        limits = (cell_clip, proj_clip, proj_size)
        regularization.rules_of(recurrent_dropout, recurrent_dropout_on, zoneout, *limits, training=True)
        regularization.probability("weight_dropout", weight_dropout)
        checks.forget_bias(forget_bias, bias, spec)
        self._set_variant(spec)
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = float(dropout)
        self.bidirectional = bidirectional
        self.proj_size = proj_size
        self.recurrent_dropout, self.recurrent_dropout_on = recurrent_dropout, recurrent_dropout_on
        self.zoneout, self.weight_dropout = (zoneout[0], zoneout[1]), weight_dropout
        self.cell_clip, self.proj_clip, self.forget_bias = cell_clip, proj_clip, forget_bias
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

    @overload
    def forward(
        self,
        input: TensorOrPacked,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: Literal[False] = False,
        return_gates: Literal[False] = False,
    ) -> tuple[TensorOrPacked, States]: ...
    @overload
    def forward(
        self,
        input: TensorOrPacked,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: Literal[True],
        return_gates: Literal[False] = False,
    ) -> tuple[TensorOrPacked, States, TensorOrPacked]: ...
    @overload
    def forward(
        self,
        input: TensorOrPacked,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: Literal[False] = False,
        return_gates: Literal[True],
    ) -> tuple[TensorOrPacked, States, Gates]: ...
    @overload
    def forward(
        self,
        input: TensorOrPacked,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: Literal[True],
        return_gates: Literal[True],
    ) -> tuple[TensorOrPacked, States, TensorOrPacked, Gates]: ...
    @overload
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Any, ...]: ...
    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
    ) -> tuple[Any, ...]:
        """Return (output, (h_n, c_n)); with return_cell_states, (output, (h_n, c_n), cell_states); gates come last.

        - input: (T, B, I), with batch_first (B, T, I), unbatched (T, I), or a PackedSequence
        - hx: (h_0, c_0), of shapes (D·L, B, P) and (D·L, B, H), without B for unbatched input; zeros if None
        - lengths: (B,) integers from 1 to T, the number of steps of each row, instead of packing; beyond it the output
          is zero
        - resets: (T, B) bool, laid out as the input is: where it is true, h and c are set to zero before that step
        - return_cell_states, return_gates: whether to return the cell states and the gates of all steps
        - output: (T, B, D·P), laid out as the input is; h_n, c_n: of the shapes of h_0, c_0
        - cell_states: c_t of every step in the last layer, (T, B, D·H), laid out as the output is
        - gates: `Gates(i, f, g, o)` of every step in the last layer, each like cell_states, with gradients

        Types and errors as of `functional.lstm`, which says more about each argument.
        """
        if isinstance(input, Proxy) or (hx is not None and traced(hx)):
            asked = dict(lengths=lengths, resets=resets, return_cell_states=return_cell_states)
            return leaf(self, input, hx, **asked, return_gates=return_gates)
        return functional.lstm(
            input,
            hx,
            self._current_weights(),
            **self._options(),
            lengths=lengths,
            resets=resets,
            return_cell_states=return_cell_states,
            return_gates=return_gates,
        )

    if TYPE_CHECKING:

        @typed_as(forward)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            """Call `forward`, and the hooks."""

    def _slow_forward(self, *input: Any, **options: Any) -> Any:
        """Call `forward` while torch.jit traces, which alone calls this.

        The older exporter of ONNX gives the keywords of a module by itself by position, the bools as tensors.
        """
        keywords = ("lengths", "resets", "return_cell_states", "return_gates")
        if len(input) == 2 + len(keywords) and transforms.exporting_to_onnx():
            lengths, resets, *flags = input[2:]
            options = dict(zip(keywords, (lengths, resets, *map(bool, flags)), strict=True))
            input = input[:2]
        return super()._slow_forward(*input, **options)

    def explain(
        self,
        input: Tensor | PackedSequence,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
        return_gates: bool = False,
        gpu: str | None = None,
    ) -> Explanation:
        """Return what would compute this call, and why: print it, or take its `to_dict()`. Nothing is computed.

        - all arguments but gpu: as of `forward`
        - gpu: the name of a GPU, present or not ("h100", "RTX 4090"; `lstm-triton info --help` lists them); None: the
          device that the input is on

        Raises as `forward` does for arguments that do not fit, and ValueError for an unknown GPU.
        """
        directions = 2 if self.bidirectional else 1
        taken = functional.take(
            input, hx, self._current_weights(), self.spec, self.num_layers, directions, self.bias, self.batch_first,
            self.proj_size, self.strategy, lengths, resets, return_cell_states, self._rules(), return_gates,
        )  # fmt: skip
        layer = taken.question[0]._replace(spec=self.spec)
        return explanation(layer, *taken.question[1:], gpu=gpu, recompute=self.recompute)

    def session(self, batch_size: int, *, graphs: bool = True) -> Session:
        """Return a session for streaming: `session(x)` computes the next time steps of `batch_size` rows.

        The session holds the states, zero at first, and each call goes on where the last one ended: together the calls
        compute what one call with all steps would, in float16 and bfloat16 up to the rounding of c between calls. It
        computes as the module in eval mode, in the module's type whatever autocast says, without gradients and without
        the module's hooks, always with the parameters that the module has at the call.

        - `session(x, resets=None)`: x (T, B, I), with batch_first (B, T, I), of any T >= 1; returns their output
        - `session.reset(rows=None)`: zero states for all rows, those of a bool mask (B,), or integer indices
        - `session.state`, `session.load_state((h, c))`: the states h (L, B, P) and c (L, B, H), always copied
        - graphs: whether to replay calls from CUDA graphs on a CUDA device. The first chunk of each number of steps, up
          to 512, with or without resets, is computed, captured and replayed, which takes a while and waits for the GPU;
          the graphs of the 16 that were last used are kept. They are captured anew where parameters are other tensors
          or move (`.to`), not for new values (`load_state_dict`, an optimizer's step). Parameters that are computed, as
          by a parametrization, are used without graphs, and so is a call inside a capture of the user's

        Raises ValueError for a bidirectional module, TypeError or ValueError for another batch_size than an int of at
        least 1, TypeError if graphs is no bool.
        """
        return Session(self, batch_size, graphs=graphs)

    def captured(self, *, overlap: bool = False) -> Captured:
        """Return what is called like this module, and replays each kind of call from CUDA graphs.

        The graphs are of the whole stack, forward and backward: for training and inference on few shapes, where the
        time of the host is what counts.

        - overlap: whether several layers of one direction may be computed at the same time, in chunks of time steps on
          a share of the GPU each: where the persistent kernels compute the call, rows have their full length, and it
          gains by simulation (`explain` says). For few rows or units, which do not fill the GPU. No GPU has measured it

        The first call of each kind on a CUDA device is captured by `torch.cuda.make_graphed_callables`, which computes
        it four times and waits for the GPU. Of one kind are calls with the same shapes and types of input, states and
        resets, requirements of gradients, options, training flag and autocast type; the graphs of the 8 kinds that were
        last used are kept, each with the memory of its activations. Parameters are read where they are, with the values
        that they have at the call; if they move or are other tensors, all is captured anew.

        Other calls are computed by the module, as usual: on other devices; with a PackedSequence or lengths; inside a
        capture, torch.compile, torch.func or torch.jit.trace; with hooks of the module or of saved tensors
        (checkpointing without reentry); with computed or sharded parameters; and a call of one kind before the backward
        pass of the call before. A capture that fails warns, and calls of its kind are computed as usual.

        What differs from the module by graphs:

        - there is no double backward: create_graph=True raises a RuntimeError
        - a second backward pass (retain_graph=True) must come before the next call, else it raises a RuntimeError, as
          any backward pass does after a weight was changed in place
        - dropout draws other random numbers than the module would from the same seed
        - a persistent launch that timed out is reported at the next call or backward pass, as usual, but the launch may
          be named wrongly: all replays of a graph share one word, which later launches use, too
        - while a graph is captured no other thread may use CUDA, unless PyTorch's make_graphed_callables has
          capture_error_mode

        A copy or pickle of the result has no graphs yet, and is of the copied module.

        Raises TypeError if overlap is no bool.
        """
        checks.flag("overlap", overlap)
        return Captured(self, overlap)

    def _options(self) -> dict[str, Any]:
        """Return the arguments of `functional.lstm` that are options of this module."""
        return dict(
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
            layer_norm=self.layer_norm,
            input_gate=self.input_gate,
            forget_gate=self.forget_gate,
            output_gate=self.output_gate,
            input_activation=self.input_activation,
            output_activation=self.output_activation,
            recurrent_dropout=self.recurrent_dropout,
            recurrent_dropout_on=self.recurrent_dropout_on,
            zoneout=self.zoneout,
            weight_dropout=self.weight_dropout,
            cell_clip=self.cell_clip,
            proj_clip=self.proj_clip,
            strategy=self.strategy,
            recompute=self.recompute,
        )

    def _rules(self) -> Rules:
        """Return the rules of the steps of a call."""
        return regularization.rules_of(
            self.recurrent_dropout, self.recurrent_dropout_on, self.zoneout, self.cell_clip, self.proj_clip,
            self.proj_size, self.training,
        )  # fmt: skip

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
        """Return both states with their rows in another order; as they are if the permutation is None."""
        if permutation is None:
            return hx
        return hx[0].index_select(1, permutation), hx[1].index_select(1, permutation)

    def extra_repr(self) -> str:
        """Return the arguments that are not the defaults, and the library's name: PyTorch's class has the same name."""
        defaults = dict(proj_size=0, num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)
        options = "".join(
            f", {name}={getattr(self, name)}" for name, default in defaults.items() if getattr(self, name) != default
        )
        how = f", strategy={self.strategy!r}" if self.strategy != "auto" else ""
        how += ", recompute=True" if self.recompute else ""
        return f"{self.input_size}, {self.hidden_size}{options}{self._variant_repr()}{how}, {LIBRARY}"


def gone() -> None:
    """Return None, as a weak reference to a weight that is no more does."""


def traced(hx: Any) -> bool:
    """Return whether a tracer of torch.fx gave these states."""
    return isinstance(hx, Proxy) or (isinstance(hx, (tuple, list)) and any(isinstance(state, Proxy) for state in hx))


def leaf(module: nn.Module, input: Any, hx: Any, **asked: Any) -> Any:
    """Return the call of the module as a node in the graph of the torch.fx tracer: a leaf, as PyTorch's modules are.

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


def constructor(**defaults: Any) -> Callable[..., None]:
    """Return the constructor of `LSTM` with other defaults of options that are keywords."""

    def __init__(self: LSTM, *arguments: Any, **options: Any) -> None:
        LSTM.__init__(self, *arguments, **(defaults | options))

    signature = inspect.signature(LSTM.__init__)
    parameters = [p.replace(default=defaults.get(p.name, p.default)) for p in signature.parameters.values()]
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return __init__


class CoupledLSTM(LSTM):
    """`LSTM` whose default is coupled=True: c_t = f c_{t-1} + (1 - f) g (CIFG, Greff et al. 2017).

    All arguments, and all else, are those of `LSTM`.
    """

    if not TYPE_CHECKING:
        __init__ = constructor(coupled=True)


class PeepholeLSTM(LSTM):
    """`LSTM` whose default is peephole="diagonal": each gate reads the cell state (Gers & Schmidhuber 2000).

    All arguments, and all else, are those of `LSTM`. In particular output_peephole is "previous": the output gate reads
    c_{t-1}. The peepholes of the paper, of TensorFlow and of ONNX are output_peephole="current".
    """

    if not TYPE_CHECKING:
        __init__ = constructor(peephole="diagonal")
