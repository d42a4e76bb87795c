"""Weights of LSTMs of other libraries: Keras, TensorFlow, Haste and ONNX, as functions of arrays.

Each function takes the arrays of one layer, as the other library names and lays them out, and returns a `ForeignLSTM`:
the options of `LSTM`, and its state dict. `module()` builds the LSTM. `bidirectional` joins two directions, `stack`
joins layers. None of those libraries is needed: an array is whatever `torch.tensor` takes, such as one of NumPy.

Sizes as in `lstm_triton.functional`: I input features, H hidden units, P hidden size after projection, D directions.
Sources that concatenate gates along columns have (I, 4H) where this library has (4H, I). Gate blocks are named i, f, g
and o; g is the candidate, which others call c, j or z.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lstm_triton_kernels.spec import LSTMSpec, LSTMWeights, state_dict_name
from torch import Tensor

from lstm_triton.modules import LSTM

KERAS_GATES = "ifgo"
HASTE_GATES = "igfo"
ONNX_GATES = "iofg"


@dataclass(frozen=True)
class ForeignLSTM:
    """An LSTM that was read from another library's arrays.

    - spec: its variant
    - layers: the parameters by layer and direction
    - more: options of `LSTM` beyond sizes and variant, as cell_clip
    """

    spec: LSTMSpec
    layers: tuple[tuple[LSTMWeights, ...], ...]
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `LSTM` that this one is built with."""
        first = self.layers[0][0]
        return dict(
            input_size=first.weight_ih.shape[1],
            hidden_size=first.weight_ih.shape[0] // len(self.spec.gates),
            num_layers=len(self.layers),
            bias=first.bias_ih is not None,
            bidirectional=len(self.layers[0]) == 2,
            proj_size=0 if first.weight_hr is None else first.weight_hr.shape[0],
            device=first.weight_ih.device,
            dtype=first.weight_ih.dtype,
            **self.spec.options,
            **self.more,
        )

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """Return the state dict of that `LSTM`, with the prefix before each name: "encoder." for a layer of a model."""
        return {
            prefix + state_dict_name(name, layer, direction): weight
            for layer, directions in enumerate(self.layers)
            for direction, weights in enumerate(directions)
            for name, weight in weights.present().items()
        }

    def module(self, **options: Any) -> LSTM:
        """Return the `LSTM` with these weights, on the device of the arrays.

        - options: further arguments of `LSTM`, or others than read: device, dtype, batch_first, dropout, strategy

        Raises as `LSTM` does, and RuntimeError if the weights do not fit the options.
        """
        lstm = LSTM(**(self.options | options))
        lstm.load_state_dict(self.state_dict())
        return lstm


def from_keras(
    weights: Sequence[Any], *, activation: str = "tanh", recurrent_activation: str = "sigmoid"
) -> ForeignLSTM:
    """Read a `keras.layers.LSTM`, or a `keras.layers.Bidirectional` of one (Keras 2 and 3, `tf.keras`).

    - weights: what `layer.get_weights()` returns: kernel (I, 4H), recurrent_kernel (H, 4H) and, with use_bias, bias
      (4H,), in the gate order i, f, c, o; of a bidirectional layer these of the forward layer, then of the backward one
    - activation, recurrent_activation: as in `layer.get_config()`

    The one bias becomes `bias_ih`, and `bias_hh` is zero. unit_forget_bias is an initial value, which the bias has
    already. The options have batch_first=True, as Keras has. A bidirectional layer is one of merge_mode="concat".
    go_backwards has no counterpart: flip the input in time.

    Layout: keras-team/keras, keras/src/layers/rnn/lstm.py and bidirectional.py.

    Raises ValueError for other activations, as hard_sigmoid, the default in `tf.keras` of TensorFlow 1, for another
    number of arrays, and naming an array whose shape or type does not fit.
    """
    for name, given, known in (
        ("activation", activation, "tanh"),
        ("recurrent_activation", recurrent_activation, "sigmoid"),
    ):
        if given != known:
            raise ValueError(f"{name} should be {known!r}, which is what this library computes, got {given!r}")
    if len(weights) not in (2, 3, 4, 6):
        raise ValueError(
            "weights should be kernel, recurrent_kernel and bias (without use_bias two arrays), of a bidirectional "
            f"layer twice these, got {len(weights)} arrays"
        )
    if len(weights) > 3:
        half = len(weights) // 2
        return bidirectional(from_keras(weights[:half]), from_keras(weights[half:]))
    arrays = read(dict(zip(("kernel", "recurrent_kernel", "bias"), weights, strict=False)))
    return by_columns(arrays, KERAS_GATES, dict(batch_first=True))


def from_tensorflow(
    kernel: Any,
    bias: Any,
    *,
    w_i_diag: Any = None,
    w_f_diag: Any = None,
    w_o_diag: Any = None,
    projection: Any = None,
    forget_bias: float = 1.0,
    cell_clip: float | None = None,
    proj_clip: float | None = None,
    gates: Literal["icfo", "ifco"] = "icfo",
) -> ForeignLSTM:
    """Read a cell of TensorFlow 1 (`tf.compat.v1.nn.rnn_cell`, `tf.contrib.rnn`), one direction of one layer.

    It is a BasicLSTMCell, LSTMCell (of the activation tanh), LSTMBlockCell or LSTMBlockFusedCell, or the raw operator
    BlockLSTM. Their variables have the same layout:

    - kernel: (I + P, 4H), the rows of the input first; bias: (4H,); in the gate order i, c, f, o (c is called j, too)
    - w_i_diag, w_f_diag, w_o_diag: (H,) each, the peepholes (wci, wcf, wco of the block operators): all or none. The
      output gate reads c_t, which is output_peephole="current"
    - projection: (H, P), the variable projection/kernel of LSTMCell with num_proj
    - forget_bias: what the cell adds to the bias of its forget gate in every call. It is an argument of the cell, not
      part of the checkpoint, and 1 by default. Of the Cudnn-compatible cells, and of BlockLSTMV2, it is 0
    - cell_clip, proj_clip: arguments of the cell. A cell_clip that is not positive clips nothing, as in the block
      operators, nor does a proj_clip without a projection. The raw operator BlockLSTM has cell_clip=3 by default
    - gates: "ifco" for the raw operator BlockLSTMV2

    The bias becomes `bias_ih`; `bias_hh` is zero but for the forget gate, where it is forget_bias.

    Layout: tensorflow/tensorflow, tensorflow/python/ops/rnn_cell_impl.py (release 1.14) and
    tensorflow/contrib/rnn/python/ops/lstm_ops.py; of BlockLSTMV2 tensorflow/python/ops/rnn_grad_test.py.

    Raises ValueError for an unknown order of gates, for some of the peepholes without the others, and naming an array
    whose shape or type does not fit.
    """
    if gates not in ("icfo", "ifco"):
        raise ValueError(f"gates should be 'icfo' or 'ifco', got {gates!r}")
    order = gates.replace("c", "g")
    given = dict(kernel=kernel, bias=bias, w_i_diag=w_i_diag, w_f_diag=w_f_diag, w_o_diag=w_o_diag)
    arrays = read({**given, "projection": projection})
    diagonals = [name for name in ("w_i_diag", "w_f_diag", "w_o_diag") if name in arrays]
    if len(diagonals) not in (0, 3):
        raise ValueError(f"peepholes are w_i_diag, w_f_diag and w_o_diag together, got {', '.join(diagonals)} alone")
    check_shape(arrays, "bias", (None,))
    H = hidden_size_of("bias", arrays["bias"].shape[0])
    check_shape(arrays, "projection", (H, None))
    P = arrays["projection"].shape[1] if "projection" in arrays else H
    check_shape(arrays, "kernel", (None, 4 * H))
    if arrays["kernel"].shape[0] <= P:
        raise ValueError(f"kernel should have I + {P} rows, got {tuple(arrays['kernel'].shape)}")
    for name in diagonals:
        check_shape(arrays, name, (H,))
    spec = LSTMSpec(peephole="diagonal", output_peephole="current") if diagonals else LSTMSpec()
    bias_ih = reordered(arrays["bias"], order, spec)
    bias_hh = torch.zeros_like(bias_ih)
    spec.split_gates(bias_hh)["f"].fill_(forget_bias)
    weights = LSTMWeights(
        weight_ih=reordered(arrays["kernel"][:-P].t(), order, spec),
        weight_hh=reordered(arrays["kernel"][-P:].t(), order, spec),
        bias_ih=bias_ih,
        bias_hh=bias_hh,
        weight_hr=arrays["projection"].t().contiguous() if "projection" in arrays else None,
        weight_ch=torch.cat([arrays[name] for name in diagonals]) if diagonals else None,
    )
    more = dict(cell_clip=cell_clip) if cell_clip is not None and cell_clip > 0 else {}
    if proj_clip is not None and projection is not None:
        more["proj_clip"] = proj_clip
    return ForeignLSTM(spec, ((weights,),), more)


def from_haste(
    kernel: Any,
    recurrent_kernel: Any,
    bias: Any,
    *,
    gamma: Any = None,
    gamma_h: Any = None,
    beta_h: Any = None,
    dropout: float = 0.0,
    zoneout: float = 0.0,
) -> ForeignLSTM:
    """Read an `LSTM` or a `LayerNormLSTM` of Haste (lmnt-com/haste), for PyTorch or TensorFlow, in one direction.

    - kernel: (I, 4H), recurrent_kernel: (H, 4H), bias: (4H,), in the gate order i, g, f, o
    - gamma: (2, 4H), the gains of the input's and of the recurrent product; gamma_h, beta_h: (H,), gain and shift of
      the normalised cell state: the three of a LayerNormLSTM, which is layer_norm=True
    - dropout, zoneout: arguments of Haste's class, here weight_dropout and the first of zoneout

    The bias becomes `bias_ih`, and `bias_hh` is zero. Haste's forget_bias is an initial value, which the bias has
    already. Haste adds 1e-5 to variances, as this library does, and normalises the cell state for h_t alone.

    Layout: lmnt-com/haste, frameworks/pytorch/lstm.py and layer_norm_lstm.py, lib/layer_norm_lstm_forward_gpu.cu.cc.

    Raises ValueError for some of gamma, gamma_h and beta_h without the others, and naming an array whose shape or type
    does not fit.
    """
    norm = dict(gamma=gamma, gamma_h=gamma_h, beta_h=beta_h)
    arrays = read({**dict(kernel=kernel, recurrent_kernel=recurrent_kernel, bias=bias), **norm})
    given = [name for name in norm if name in arrays]
    if len(given) not in (0, 3):
        raise ValueError(f"a LayerNormLSTM has gamma, gamma_h and beta_h together, got {', '.join(given)} alone")
    more: dict[str, Any] = dict(weight_dropout=dropout) if dropout else {}
    more |= dict(zoneout=(zoneout, 0.0)) if zoneout else {}
    plain = by_columns({name: array for name, array in arrays.items() if name not in norm}, HASTE_GATES, more)
    if not given:
        return plain
    H = arrays["recurrent_kernel"].shape[0]
    for name, shape in (("gamma", (2, 4 * H)), ("gamma_h", (H,)), ("beta_h", (H,))):
        check_shape(arrays, name, shape)
    spec = LSTMSpec(layer_norm=True)
    weights = plain.layers[0][0]._replace(
        weight_ln_ih=reordered(arrays["gamma"][0], HASTE_GATES, spec),
        weight_ln_hh=reordered(arrays["gamma"][1], HASTE_GATES, spec),
        weight_ln_c=arrays["gamma_h"],
        bias_ln_c=arrays["beta_h"],
    )
    return ForeignLSTM(spec, ((weights,),), more)


def from_onnx(
    W: Any,
    R: Any,
    B: Any = None,
    P: Any = None,
    *,
    direction: str = "forward",
    input_forget: int = 0,
    activations: Sequence[str] | None = None,
    clip: float | None = None,
    layout: int = 0,
) -> ForeignLSTM:
    """Read the inputs and attributes of ONNX's LSTM node.

    - W: (D, 4H, I), R: (D, 4H, H), B: (D, 8H), the biases of W and of R, P: (D, 3H), peepholes: the node's inputs of
      these names; gates are in the order i, o, f, c, peepholes in the order i, o, f
    - direction: "forward" or "bidirectional"; input_forget: 1 for coupled gates; layout: 1 for batch_first: the node's
      attributes of these names
    - activations, clip: the node's attributes, which this library does not have: other activations than Sigmoid, Tanh
      and Tanh for each direction, and any clip, are refused

    With P the output gate reads c_t, which is output_peephole="current". The node's initial_h and initial_c are
    arguments of a call, and so is sequence_lens, as lengths.

    ONNX does not say which gate input_forget=1 computes from the other. In onnxruntime it is f = 1 - i, from the
    weights of the input gate, and those of the forget gate are not used. This library computes i = 1 - f; since
    1 - s(a) = s(-a), the weights of its forget gate are those of the input gate, negated.

    Layout: onnx/onnx, docs/Operators.md, "LSTM"; microsoft/onnxruntime, core/providers/cpu/rnn/uni_directional_lstm.cc.

    Raises ValueError for attributes that this library does not have, direction="reverse" among them, and naming an
    array whose shape or type does not fit.
    """
    if direction == "reverse":
        raise ValueError(
            "direction should be 'forward' or 'bidirectional', got 'reverse': read the node as 'forward', and flip its "
            "input and output in time"
        )
    if direction not in ("forward", "bidirectional"):
        raise ValueError(f"direction should be 'forward' or 'bidirectional', got {direction!r}")
    D = 2 if direction == "bidirectional" else 1
    expected = ["Sigmoid", "Tanh", "Tanh"] * D
    if activations is not None and [str(name).lower() for name in activations] != [name.lower() for name in expected]:
        raise ValueError(f"activations should be {', '.join(expected)}, got {', '.join(map(str, activations))}")
    if clip is not None:
        raise ValueError(
            f"clip should be absent, got {clip}: the node limits the arguments of its activations, and cell_clip of "
            "this library limits the cell state"
        )
    arrays = read(dict(W=W, R=R, B=B, P=P))
    check_shape(arrays, "R", (D, None, None))
    H = arrays["R"].shape[2]
    shapes = {"W": (D, 4 * H, None), "R": (D, 4 * H, H), "B": (D, 8 * H), "P": (D, 3 * H)}
    for name, shape in shapes.items():
        check_shape(arrays, name, shape)
    variant: dict[str, Any] = dict(peephole="diagonal", output_peephole="current") if "P" in arrays else {}
    spec = LSTMSpec(coupled=bool(input_forget), **variant)
    directions = []
    for d in range(D):
        biases = arrays["B"][d].chunk(2) if "B" in arrays else (None, None)
        directions.append(
            LSTMWeights(
                weight_ih=reordered(arrays["W"][d], ONNX_GATES, spec),
                weight_hh=reordered(arrays["R"][d], ONNX_GATES, spec),
                bias_ih=None if biases[0] is None else reordered(biases[0], ONNX_GATES, spec),
                bias_hh=None if biases[1] is None else reordered(biases[1], ONNX_GATES, spec),
                weight_ch=reordered(arrays["P"][d], "iof", spec) if "P" in arrays else None,
            )
        )
    return ForeignLSTM(spec, (tuple(directions),), dict(batch_first=True) if layout else {})


# Layers of layers.


def bidirectional(forward: ForeignLSTM, backward: ForeignLSTM) -> ForeignLSTM:
    """Return the bidirectional layer of two layers of one direction each; `backward` reads from the end.

    Raises ValueError if one of them has several layers or directions, or if they differ in sizes or options.
    """
    for one in (forward, backward):
        if len(one.layers) != 1 or len(one.layers[0]) != 1:
            raise ValueError("a bidirectional layer is of two layers of one direction each: join them before stack")
    check_equal("both directions", forward.options, backward.options)
    return ForeignLSTM(forward.spec, (forward.layers[0] + backward.layers[0],), forward.more)


def stack(layers: Sequence[ForeignLSTM]) -> ForeignLSTM:
    """Return the LSTM of these layers, the first one first: each reads the output of the one before.

    Raises ValueError if there is none, if they differ in hidden size, directions, projection or options, or if the
    input of a layer is of another size than the output of the layer before.
    """
    if not layers:
        raise ValueError("stack takes at least one layer, got none")
    first = layers[0].options
    for n, layer in enumerate(layers):
        check_equal(f"layers 0 and {n}", first, layer.options, apart_from=("input_size", "num_layers"))
        size, output = layer.options["input_size"], (first["proj_size"] or first["hidden_size"])
        output *= 2 if first["bidirectional"] else 1
        if n > 0 and size != output:
            raise ValueError(f"layer {n} reads inputs of size {size}, and the output of the layer before has {output}")
    return ForeignLSTM(layers[0].spec, tuple(one for layer in layers for one in layer.layers), layers[0].more)


def check_equal(names: str, a: dict[str, Any], b: dict[str, Any], apart_from: tuple[str, ...] = ()) -> None:
    """Raise ValueError naming the first option in which two LSTMs differ that have to be one module."""
    for option in (*a, *(option for option in b if option not in a)):
        if option not in apart_from and a.get(option) != b.get(option):
            raise ValueError(
                f"{names} should have the same {option}, got {a.get(option)} and {b.get(option)}: build two modules"
            )


# Arrays: reading, checking, and the order of gates.


def read(arrays: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return copies of the arrays as tensors by name, without those that are None.

    Raises ValueError naming an array that is of no floating-point type, or of another type than the first.
    """
    tensors: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        tensor = array.detach().clone() if isinstance(array, Tensor) else torch.tensor(array)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} should be of a floating-point type, got {tensor.dtype}")
        for first, other in tensors.items():
            if other.dtype != tensor.dtype:
                raise ValueError(f"{name} should be of the type of {first}, {other.dtype}, got {tensor.dtype}")
        tensors[name] = tensor
    return tensors


def check_shape(arrays: Mapping[str, Tensor], name: str, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError if that array, where there is one, has another shape; None stands for any size."""
    if name not in arrays:
        return
    shape = tuple(arrays[name].shape)
    fits = len(shape) == len(expected) and all(e is None or e == s for s, e in zip(shape, expected, strict=True))
    if not fits:
        text = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} should have shape ({text}{',' if len(expected) == 1 else ''}), got {shape}")


def hidden_size_of(name: str, rows: int) -> int:
    """Return H from the size 4H of an array. Raises ValueError if 4 does not divide it."""
    if rows % 4 or rows == 0:
        raise ValueError(f"{name} should have four gate blocks, got {rows} elements")
    return rows // 4


def reordered(stacked: Tensor, order: str, spec: LSTMSpec) -> Tensor:
    """Return rows in gate blocks of that order, as "ifgo", with the blocks that the variant has, in its order.

    A coupled variant gets a forget gate that is 1 - i.
    """
    blocks = dict(zip(order, stacked.chunk(len(order), 0), strict=True))
    if spec.coupled:
        blocks["f"] = -blocks["i"]
    return torch.cat([blocks[gate] for gate in spec.gates if gate in blocks])


def by_columns(arrays: Mapping[str, Tensor], order: str, more: Mapping[str, Any]) -> ForeignLSTM:
    """Return the standard layer of a kernel (I, 4H), a recurrent_kernel (H, 4H) and, or not, a bias (4H,).

    Raises ValueError naming an array whose shape does not fit.
    """
    check_shape(arrays, "recurrent_kernel", (None, None))
    H = arrays["recurrent_kernel"].shape[0]
    for name, shape in (("recurrent_kernel", (H, 4 * H)), ("kernel", (None, 4 * H)), ("bias", (4 * H,))):
        check_shape(arrays, name, shape)
    spec = LSTMSpec()
    bias = reordered(arrays["bias"], order, spec) if "bias" in arrays else None
    weights = LSTMWeights(
        weight_ih=reordered(arrays["kernel"].t(), order, spec),
        weight_hh=reordered(arrays["recurrent_kernel"].t(), order, spec),
        bias_ih=bias,
        bias_hh=None if bias is None else torch.zeros_like(bias),
    )
    return ForeignLSTM(spec, ((weights,),), more)
