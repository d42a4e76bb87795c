"""Weights of other libraries: each reader against the equations of its source in NumPy, and what was recorded of it.

ONNX's is compared with onnxruntime. What Keras and TensorFlow computed is recorded in tests/data.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import lstm_triton
from lstm_triton import foreign

T, B, I, H, P = 7, 3, 5, 6, 4  # noqa: E741
RANDOM = np.random.default_rng(3)


def draw(*shape, dtype=np.float64):
    return (0.7 * RANDOM.standard_normal(shape)).astype(dtype)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def compute(module, x):
    """output and c_n of a module for x (T, B, I), whatever its layout."""
    x = torch.from_numpy(x)
    with torch.no_grad():
        output, (_, c_n) = module(x.transpose(0, 1) if module.batch_first else x)
    return (output.transpose(0, 1) if module.batch_first else output).numpy(), c_n.numpy()


def close(actual, expected, bound=1e-13):
    assert actual.shape == expected.shape
    assert np.linalg.norm(actual - expected) <= bound * np.linalg.norm(expected)


def recurrence(x, step, h):
    """Apply `step` (x_t, h, c) -> (h, c) to all steps: the hidden states (T, B, P or H), and the last cell state."""
    c, outputs = np.zeros((x.shape[1], H)), []
    for x_t in x:
        h, c = step(x_t, h, c)
        outputs.append(h)
    return np.stack(outputs), c


# Keras


def keras_layer(x, kernel, recurrent_kernel, bias=0.0):
    """The equations of keras.layers.LSTMCell.call: z = x kernel + h recurrent_kernel + bias, in four blocks."""

    def step(x_t, h, c):
        z0, z1, z2, z3 = np.split(x_t @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(z1) * c + sigmoid(z0) * np.tanh(z2)
        return sigmoid(z3) * np.tanh(c), c

    return recurrence(x, step, np.zeros((x.shape[1], H)))


def keras_weights(inputs=I, bias=True):
    return [draw(inputs, 4 * H), draw(H, 4 * H), *([draw(4 * H)] if bias else [])]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_layer_of_keras(bias):
    weights, x = keras_weights(bias=bias), draw(T, B, I)
    read = foreign.from_keras(weights)
    lstm = read.module()
    output, c_n = compute(lstm, x)
    expected, last = keras_layer(x, *weights)
    close(output, expected)
    close(c_n[0], last)
    assert lstm.batch_first and lstm.bias is bias and lstm.spec.standard and lstm.weight_ih_l0.dtype == torch.float64


def test_layers_of_keras_of_both_directions():
    layers, x = [keras_weights() + keras_weights(), keras_weights(2 * H) + keras_weights(2 * H)], draw(T, B, I)
    output, _ = compute(
        foreign.stack([foreign.from_keras(weights) for weights in layers]).module(dropout=0.5).eval(), x
    )
    expected = x
    for weights in layers:
        backward, _ = keras_layer(expected[::-1], *weights[3:])
        expected = np.concatenate([keras_layer(expected, *weights[:3])[0], backward[::-1]], axis=-1)
    close(output, expected)


# TensorFlow


def tensorflow_layer(x, kernel, bias, diagonals=None, projection=None, forget_bias=1.0, cell_clip=None, proj_clip=None):
    """The equations of tf.nn.rnn_cell.LSTMCell.call: [x, h] kernel + bias = i, j, f, o."""
    w_i, w_f, w_o = diagonals if diagonals is not None else (0.0, 0.0, 0.0)

    def step(x_t, h, c):
        i, j, f, o = np.split(np.concatenate([x_t, h], 1) @ kernel + bias, 4, axis=1)
        c = sigmoid(f + forget_bias + w_f * c) * c + sigmoid(i + w_i * c) * np.tanh(j)
        c = c if cell_clip is None else np.clip(c, -cell_clip, cell_clip)
        h = sigmoid(o + w_o * c) * np.tanh(c)
        if projection is not None:
            h = h @ projection
            h = h if proj_clip is None else np.clip(h, -proj_clip, proj_clip)
        return h, c

    return recurrence(x, step, np.zeros((x.shape[1], H if projection is None else P)))


def diagonals_of(diagonals):
    return {} if diagonals is None else dict(zip(("w_i_diag", "w_f_diag", "w_o_diag"), diagonals, strict=True))


@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "peephole"])
@pytest.mark.parametrize(
    "options",
    [dict(), dict(forget_bias=0.0, cell_clip=0.375), dict(project=True), dict(project=True, proj_clip=0.25)],
    ids=str,
)
def test_a_cell_of_tensorflow(options, peephole):
    options = dict(options)
    projection = draw(H, P) if options.pop("project", False) else None
    rows = I + (H if projection is None else P)
    kernel, bias, x = draw(rows, 4 * H), draw(4 * H), draw(T, B, I)
    diagonals = [draw(H) for _ in range(3)] if peephole else None
    read = foreign.from_tensorflow(kernel, bias, **diagonals_of(diagonals), projection=projection, **options)
    expected, last = tensorflow_layer(x, kernel, bias, diagonals, projection, **options)
    output, c_n = compute(read.module(), x)
    close(output, expected)
    close(c_n[0], last)
    assert read.spec.name == ("diagonal+current" if peephole else "standard")
    limit = options.get("cell_clip", options.get("proj_clip"))
    if limit is not None:
        assert (np.abs(c_n if "cell_clip" in options else output) == limit).any()


def test_the_second_operator_of_tensorflow_has_another_order():
    kernel, bias, x = draw(I + H, 4 * H), draw(4 * H), draw(T, B, I)
    i, c, f, o = np.split(np.arange(4 * H), 4)
    order = np.concatenate([i, f, c, o])
    read = foreign.from_tensorflow(kernel[:, order], bias[order], forget_bias=0.0, cell_clip=0.0, gates="ifco")
    close(compute(read.module(), x)[0], tensorflow_layer(x, kernel, bias, forget_bias=0.0)[0])
    read = foreign.from_tensorflow(kernel, bias, cell_clip=-1, proj_clip=1.0)
    close(compute(read.module(), x)[0], tensorflow_layer(x, kernel, bias)[0])


def test_two_cells_of_tensorflow_are_the_two_directions():
    cells, x = [(draw(I + H, 4 * H), draw(4 * H)) for _ in range(2)], draw(T, B, I)
    both = foreign.bidirectional(*(foreign.from_tensorflow(*cell) for cell in cells))
    expected = tensorflow_layer(x, *cells[0])[0], tensorflow_layer(x[::-1], *cells[1])[0][::-1]
    close(compute(both.module(), x)[0], np.concatenate(expected, -1))


# Haste


def haste_layer(x, kernel, recurrent_kernel, bias, gamma=None, gamma_h=None, beta_h=None, zoneout=0.0):
    """The equations of Haste's LSTM and LayerNormLSTM in evaluation: i, g, f, o; 1e-5 is added to variances."""

    def normal(a):
        return (a - a.mean(1, keepdims=True)) / np.sqrt(a.var(1, keepdims=True) + 1e-5)

    def step(x_t, h, c):
        Wx, Rh = x_t @ kernel, h @ recurrent_kernel
        if gamma is not None:
            Wx, Rh = gamma[0] * normal(Wx), gamma[1] * normal(Rh)
        i, g, f, o = np.split(Wx + Rh + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        out = c if gamma_h is None else gamma_h * normal(c) + beta_h
        return zoneout * h + (1 - zoneout) * sigmoid(o) * np.tanh(out), c

    return recurrence(x, step, np.zeros((x.shape[1], H)))


@pytest.mark.parametrize("zoneout", [0.0, 0.25])
@pytest.mark.parametrize("norm", [False, True], ids=["LSTM", "LayerNormLSTM"])
def test_a_layer_of_haste(norm, zoneout):
    weights, x = keras_weights(), draw(T, B, I)
    gains = dict(gamma=draw(2, 4 * H), gamma_h=draw(H), beta_h=draw(H)) if norm else {}
    lstm = foreign.from_haste(*weights, **gains, zoneout=zoneout, dropout=0.3).module()
    assert lstm.layer_norm is norm and lstm.weight_dropout == 0.3 and lstm.zoneout == (zoneout, 0.0)
    expected, last = haste_layer(x, *weights, **gains, zoneout=zoneout)
    output, c_n = compute(lstm.eval(), x)
    close(output, expected)
    close(c_n[0], last)


# ONNX


def onnx_model(arrays, **attributes):
    """The bytes of a model of one LSTM node: x (T, B, I) -> Y (T, D, B, H), Y_h, Y_c (D, B, H)."""
    names = ["x", "W", "R", "B" if "B" in arrays else "", "", "", "", "P" if "P" in arrays else ""]
    node = helper.make_node("LSTM", names, ["Y", "Y_h", "Y_c"], hidden_size=H, **attributes)
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "B", I])
    shapes = {
        "Y": ["T", len(arrays["W"]), "B", H],
        "Y_h": [len(arrays["W"]), "B", H],
        "Y_c": [len(arrays["W"]), "B", H],
    }
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    weights = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "lstm", [given], results, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


@pytest.mark.parametrize("input_forget", [0, 1], ids=["standard", "input_forget"])
@pytest.mark.parametrize("peephole", [False, True], ids=["plain", "P"])
@pytest.mark.parametrize("direction, bias", [("forward", False), ("forward", True), ("bidirectional", True)])
def test_a_node_of_onnx_computes_what_onnxruntime_does(direction, bias, peephole, input_forget):
    D = 2 if direction == "bidirectional" else 1
    shapes = dict(W=(D, 4 * H, I), R=(D, 4 * H, H), B=(D, 8 * H), P=(D, 3 * H))
    arrays = {name: draw(*shape, dtype=np.float32) for name, shape in shapes.items()}
    arrays = {n: a for n, a in arrays.items() if (n != "B" or bias) and (n != "P" or peephole)}
    attributes = dict(direction=direction, input_forget=input_forget)
    read = foreign.from_onnx(**arrays, **attributes)
    assert read.spec.coupled is bool(input_forget) and read.spec.diagonal is read.spec.output_current is peephole
    x = draw(T, B, I, dtype=np.float32)
    Y, _, Y_c = onnxruntime.InferenceSession(onnx_model(arrays, **attributes)).run(None, {"x": x})
    output, c_n = compute(read.module(), x)
    close(output, Y.transpose(0, 2, 1, 3).reshape(T, B, D * H), 1e-6)
    close(c_n, Y_c, 1e-6)


@pytest.mark.parametrize(
    "options",
    [dict(num_layers=2, bidirectional=True), dict(peephole="diagonal", output_peephole="current")],
    ids=str,
)
def test_what_is_exported_to_onnx_is_read_again(options):
    lstm = lstm_triton.LSTM(I, H, **options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(lstm, (torch.randn(T, B, I),), dynamo=True)
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_model_from_string(file.getvalue())
    names, nodes = ("W", "R", "B", "P"), [node for node in model.graph.node if node.op_type == "LSTM"]
    inputs = [
        {name: node.input[n] for name, n in zip(names, (1, 2, 3, 7), strict=True) if n < len(node.input)}
        for node in nodes
    ]
    wanted = [name for given in inputs for name in given.values()]  # nodes make them from the parameters: ask for them
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    x = draw(T, B, I, dtype=np.float32)
    arrays = dict(zip(wanted, session.run(wanted, {session.get_inputs()[0].name: x}), strict=True))
    layers = []
    for node, given in zip(nodes, inputs, strict=True):
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        arguments = {name: arrays[value] for name, value in given.items()}
        layers.append(foreign.from_onnx(**arguments, direction=attributes["direction"].decode()))
    again = foreign.stack(layers).state_dict()
    assert again.keys() == lstm.state_dict().keys()
    assert all(torch.equal(value, again[name]) for name, value in lstm.state_dict().items())


def test_a_batch_first_node_is_a_batch_first_module():
    assert foreign.from_onnx(draw(1, 4 * H, I), draw(1, 4 * H, H), layout=1).module().batch_first is True


# What Keras and TensorFlow computed themselves

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "foreign-recorded.json").read_text())["cases"]


def unpacked(recorded):
    return np.array(recorded["values"], np.float32).reshape(recorded["shape"])


@pytest.mark.parametrize("case", RECORDED, ids=[case["source"] for case in RECORDED])
def test_what_the_other_program_computed(case):
    weights = [unpacked(weight) for weight in case["weights"]]
    arrays = {name: unpacked(array) for name, array in case.get("peepholes", {}).items()}
    if "projection" in case:
        arrays["projection"] = unpacked(case["projection"])
    given = [weights] if case["function"] == "from_keras" else weights
    lstm = getattr(foreign, case["function"])(*given, **arrays, **case["options"]).module()
    with torch.no_grad():
        output, _ = lstm(torch.from_numpy(unpacked(case["x"])))
    close(output.numpy(), unpacked(case["output"]), 1e-6)


# What is made of it


def test_the_state_dict_is_that_of_the_module_and_takes_a_prefix():
    layers = [foreign.from_keras(keras_weights()), foreign.from_keras(keras_weights(H))]
    read = foreign.stack(layers)
    model = torch.nn.ModuleDict({"encoder": lstm_triton.LSTM(**read.options)})
    model.load_state_dict(read.state_dict("encoder."))
    module = read.module(dtype=torch.float32, batch_first=False, strategy="stepwise", num_layers=2)
    assert (module.weight_hh_l1.dtype, module.batch_first, module.strategy) == (torch.float32, False, "stepwise")
    for name, value in model["encoder"].state_dict().items():
        torch.testing.assert_close(module.state_dict()[name].double(), value, rtol=1e-6, atol=0)


def test_arrays_are_copied_and_may_be_of_many_kinds():
    weights = keras_weights()
    kept = [array.copy() for array in weights]
    for array in weights:
        array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm = foreign.from_keras(weights).module()
        kinds = [lambda a: a.tolist(), torch.from_numpy, np.asfortranarray]
        expected = [foreign.from_keras([kind(a) for a in kept]).module(dtype=torch.float64) for kind in kinds]
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.zero_()
    assert all(np.array_equal(a, b) for a, b in zip(weights, kept, strict=True))
    for other in expected[1:]:
        assert torch.equal(other.weight_ih_l0, expected[1].weight_ih_l0)
    torch.testing.assert_close(expected[0].weight_ih_l0, expected[1].weight_ih_l0)  # lists are float32
    half = foreign.from_keras([a.astype(np.float16) for a in kept])
    assert half.options["dtype"] == torch.float16


KERNEL, RECURRENT, BIAS = keras_weights()
W, R = draw(1, 4 * H, I), draw(1, 4 * H, H)
ONE = foreign.from_keras([KERNEL, RECURRENT, BIAS])
REFUSED = {
    "hard_sigmoid": (
        lambda: foreign.from_keras([KERNEL, RECURRENT], recurrent_activation="hard_sigmoid"),
        "recurrent_activation should be 'sigmoid', which is what this library computes, got 'hard_sigmoid'",
    ),
    "relu": (lambda: foreign.from_keras([KERNEL, RECURRENT], activation="relu"), "activation should be 'tanh'"),
    "five arrays": (lambda: foreign.from_keras([KERNEL] * 5), "of a bidirectional layer twice these, got 5 arrays"),
    "cuDNN's two biases": (
        lambda: foreign.from_keras([KERNEL, RECURRENT, np.tile(BIAS, 2)]),
        "bias should have shape (24,), got (48,)",
    ),
    "a transposed kernel": (
        lambda: foreign.from_keras([KERNEL.T, RECURRENT]),
        "kernel should have shape (any, 24), got (24, 5)",
    ),
    "another recurrent kernel": (
        lambda: foreign.from_haste(KERNEL, RECURRENT[:, 1:], BIAS),
        "recurrent_kernel should have shape (6, 24), got (6, 23)",
    ),
    "integers": (
        lambda: foreign.from_keras([KERNEL.astype(int), RECURRENT]),
        "kernel should be of a floating-point type",
    ),
    "two types": (
        lambda: foreign.from_keras([KERNEL, RECURRENT.astype(np.float32)]),
        "recurrent_kernel should be of the type of kernel, torch.float64, got torch.float32",
    ),
    "no bias for TensorFlow": (lambda: foreign.from_tensorflow(KERNEL, BIAS[:-1]), "four gate blocks, got 23 elements"),
    "too few rows": (lambda: foreign.from_tensorflow(KERNEL, BIAS), "kernel should have I + 6 rows, got (5, 24)"),
    "one peephole": (
        lambda: foreign.from_tensorflow(draw(I + H, 4 * H), BIAS, w_f_diag=draw(H)),
        "peepholes are w_i_diag, w_f_diag and w_o_diag together, got w_f_diag alone",
    ),
    "an unknown order": (
        lambda: foreign.from_tensorflow(KERNEL, BIAS, gates="ifog"),
        "gates should be 'icfo' or 'ifco'",
    ),
    "a peephole of another size": (
        lambda: foreign.from_tensorflow(draw(I + H, 4 * H), BIAS, **diagonals_of([draw(H), draw(H), draw(H + 1)])),
        "w_o_diag should have shape (6,), got (7,)",
    ),
    "a gain alone": (lambda: foreign.from_haste(KERNEL, RECURRENT, BIAS, gamma=draw(2, 24)), "got gamma alone"),
    "one row of gains": (
        lambda: foreign.from_haste(KERNEL, RECURRENT, BIAS, gamma=draw(1, 24), gamma_h=draw(H), beta_h=draw(H)),
        "gamma should have shape (2, 24), got (1, 24)",
    ),
    "reverse": (lambda: foreign.from_onnx(W, R, direction="reverse"), "flip its input and output in time"),
    "an unknown direction": (lambda: foreign.from_onnx(W, R, direction="up"), "got 'up'"),
    "other activations": (
        lambda: foreign.from_onnx(W, R, activations=["HardSigmoid", "Tanh", "Tanh"]),
        "activations should be Sigmoid, Tanh, Tanh, got HardSigmoid, Tanh, Tanh",
    ),
    "a clip": (lambda: foreign.from_onnx(W, R, clip=3.0), "clip should be absent, got 3.0"),
    "one direction of two": (
        lambda: foreign.from_onnx(W, R, direction="bidirectional"),
        "R should have shape (2, any, any), got (1, 24, 6)",
    ),
    "one bias": (lambda: foreign.from_onnx(W, R, draw(1, 4 * H)), "B should have shape (1, 48), got (1, 24)"),
    "peepholes of two gates": (lambda: foreign.from_onnx(W, R, P=draw(1, 2 * H)), "P should have shape (1, 18)"),
    "no layer": (lambda: foreign.stack([]), "at least one layer"),
    "a layer of other inputs": (
        lambda: foreign.stack([ONE, ONE]),
        "layer 1 reads inputs of size 5, and the output of the layer before has 6",
    ),
    "a layer of another variant": (
        lambda: foreign.stack([foreign.from_onnx(W, R), foreign.from_onnx(draw(1, 4 * H, H), R, input_forget=1)]),
        "layers 0 and 1 should have the same coupled, got False and True: build two modules",
    ),
    "directions with other limits": (
        lambda: foreign.bidirectional(*(foreign.from_tensorflow(draw(11, 24), BIAS, cell_clip=c) for c in (None, 3.0))),
        "both directions should have the same cell_clip, got None and 3.0",
    ),
    "directions of directions": (
        lambda: foreign.bidirectional(foreign.bidirectional(ONE, ONE), ONE),
        "two layers of one direction each",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    read, words = REFUSED[name]
    with pytest.raises(ValueError) as caught:
        read()
    assert words in str(caught.value)
