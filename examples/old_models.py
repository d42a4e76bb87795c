"""Old models: peepholes for a model of torch.nn, with a report, and weights of Keras and ONNX.

The arrays of Keras and ONNX are random here, in the layouts that these libraries have; none of them is needed.

    python examples/old_models.py
"""

import copy

import numpy as np
import torch
from torch import nn

from lstm_triton import convert, foreign

FEATURES, HIDDEN = 6, 8
T, B = 9, 4


class Old(nn.Module):
    """A model of torch.nn with an LSTM, a cell, and a GRU beside them."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.LSTM(FEATURES, HIDDEN, num_layers=2)
        self.context = nn.GRU(FEATURES, HIDDEN)
        self.decoder = nn.LSTMCell(HIDDEN, HIDDEN)

    def forward(self, x):
        output, _ = self.encoder(x)
        return self.decoder(output[-1] + self.context(x)[0][-1])[0]  # (B, H)


def difference(a, b):
    """Return the largest difference of two tensors."""
    return (a - b).abs().max().item()


torch.manual_seed(0)
x = torch.randn(T, B, FEATURES)

print("1. What a conversion with peepholes would do: a report, before anything is changed\n")
old = Old()
expected = old(x).detach()
report = convert.report(old, peephole="diagonal", output_peephole="current")
print(report)

print("\n2. The conversion: convert.from_torch(old, peephole=...), or report.apply()\n")
coupled = convert.from_torch(copy.deepcopy(old), coupled=True)
new = report.apply()
print(new)
found = difference(new(x), expected)
print(f"\n   with peepholes of zero the outputs are the old model's: difference {found:.1e}")
assert new is old and found < 1e-6

optimizer = torch.optim.Adam(new.parameters(), lr=1e-2)  # after the conversion, so that it knows the peepholes
for _ in range(2):
    optimizer.zero_grad()
    loss = new(x).square().mean()
    loss.backward()
    optimizer.step()
moved = min(parameter.abs().max().item() for name, parameter in new.named_parameters() if "weight_ch" in name)
print(f"   after two steps of training every layer's peepholes have moved: {moved:.1e} at least")
found = difference(coupled(x), expected)
print(f"   coupled gates: the outputs change, by {found:.2f}; start training from there\n")
assert moved > 1e-3 and found > 1e-3

print("3. A model of Keras: layer.get_weights() of each layer\n")
draw = np.random.default_rng(0)


def array(*shape):
    """Return random numbers, as an array of weights."""
    return 0.5 * draw.standard_normal(shape)


def sigmoid(a):
    """Return the logistic function."""
    return 1 / (1 + np.exp(-a))


def keras_lstm(x, kernel, recurrent_kernel, bias):
    """Return the outputs (B, T, H) of keras.layers.LSTM for x (B, T, I), by its equations."""
    h = c = np.zeros((len(x), HIDDEN))
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ kernel + h @ recurrent_kernel + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs, axis=1)


layers = [
    [array(size, 4 * HIDDEN), array(HIDDEN, 4 * HIDDEN), array(4 * HIDDEN)] for size in (FEATURES, HIDDEN)
]  # kernel, recurrent_kernel and bias
lstm = foreign.stack([foreign.from_keras(weights) for weights in layers]).module()
x = array(B, T, FEATURES)
found = difference(lstm(torch.from_numpy(x))[0], torch.from_numpy(keras_lstm(keras_lstm(x, *layers[0]), *layers[1])))
print(f"   Keras, two layers: {lstm}\n   difference from Keras' equations: {found:.1e}\n")
assert found < 1e-12

print("4. A node of ONNX: its inputs W, R, B and P, and its attributes\n")


def onnx_lstm(x, W, R, B, P):
    """Return the outputs (T, B, H) of one direction of ONNX's LSTM node for x (T, B, I), by its equations."""
    h = c = np.zeros((x.shape[1], HIDDEN))
    Wb, Rb = np.split(B, 2)
    Pi, Po, Pf = np.split(P, 3)
    outputs = []
    for x_t in x:
        i, o, f, g = np.split(x_t @ W.T + h @ R.T + Wb + Rb, 4, axis=1)
        i, f = sigmoid(i + Pi * c), sigmoid(f + Pf * c)
        c = f * c + i * np.tanh(g)
        h = sigmoid(o + Po * c) * np.tanh(c)
        outputs.append(h)
    return np.stack(outputs)


node = dict(
    W=array(2, 4 * HIDDEN, FEATURES), R=array(2, 4 * HIDDEN, HIDDEN), B=array(2, 8 * HIDDEN), P=array(2, 3 * HIDDEN)
)  # fmt: skip
lstm = foreign.from_onnx(**node, direction="bidirectional").module()
x = array(T, B, FEATURES)
forward, backward = ({name: value[d] for name, value in node.items()} for d in range(2))
expected = np.concatenate([onnx_lstm(x, **forward), onnx_lstm(x[::-1], **backward)[::-1]], axis=-1)
found = difference(lstm(torch.from_numpy(x))[0], torch.from_numpy(expected))
print(f"   ONNX, both directions: {lstm}\n   difference from ONNX's equations: {found:.1e}")
assert found < 1e-12
