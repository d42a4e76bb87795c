"""The student exercise "implement an LSTM cell", solved in plain PyTorch and with this library, side by side.

    f_t = s(W_f h_{t-1} + U_f x_t + b_f)        c_t = f_t * c_{t-1} + i_t * c~_t
    i_t = s(W_i h_{t-1} + U_i x_t + b_i)        h_t = o_t * tanh(c_t)
    o_t = s(W_o h_{t-1} + U_o x_t + b_o)        c~_t = tanh(W_c h_{t-1} + U_c x_t + b_c)

Part 1 is this cell, part 2 a network of two layers, part 3 a subclass with a coupled forget and input gate, and part 4,
the bonus, peephole connections. Each part copies the weights of the plain module into this library's module and prints
the largest difference of the results and of the gradients of all parameters, in float64.

    python examples/exercise.py
"""

import textwrap

import torch
from torch import nn

from lstm_triton import LSTM, LSTMCell

B, I, H, T = 3, 5, 10, 6  # noqa: E741  # batch rows, input features, hidden units, time steps


class Cell(nn.Module):
    """Part 1: the cell of the exercise, with a W (H, H), a U (H, I) and a b (H,) for each gate; c is c~."""

    gates = "ifco"

    def __init__(self, input_size, hidden_size):
        super().__init__()
        self.W = nn.ParameterDict({gate: torch.empty(hidden_size, hidden_size) for gate in self.gates})
        self.U = nn.ParameterDict({gate: torch.empty(hidden_size, input_size) for gate in self.gates})
        self.b = nn.ParameterDict({gate: torch.empty(hidden_size) for gate in self.gates})

    def gate(self, name, x, h, c):
        return h @ self.W[name].T + x @ self.U[name].T + self.b[name]

    def input_gate(self, f, x, h, c):
        return torch.sigmoid(self.gate("i", x, h, c))

    def output_gate(self, x, h, c_previous, c):
        return torch.sigmoid(self.gate("o", x, h, c_previous))

    def forward(self, x, h, c_previous):
        f = torch.sigmoid(self.gate("f", x, h, c_previous))
        i = self.input_gate(f, x, h, c_previous)
        c = f * c_previous + i * torch.tanh(self.gate("c", x, h, c_previous))
        return self.output_gate(x, h, c_previous, c) * torch.tanh(c), c


class Layers(nn.Module):
    """Part 2: layers of cells over a sequence (T, B, I); each layer reads the hidden state of the layer below."""

    def __init__(self, input_size, hidden_size, num_layers):
        super().__init__()
        self.layers = nn.ModuleList([Cell(hidden_size if k else input_size, hidden_size) for k in range(num_layers)])

    def forward(self, x, h_0, c_0):
        h, c, outputs = list(h_0), list(c_0), []
        for x_t in x:
            for k, cell in enumerate(self.layers):
                h[k], c[k] = cell(x_t if k == 0 else h[k - 1], h[k], c[k])
            outputs.append(h[-1])
        return torch.stack(outputs), torch.stack(h), torch.stack(c)


class CoupledCell(Cell):
    """Part 3: the input gate is 1 - f, so that it has no weights of its own."""

    gates = "fco"

    def input_gate(self, f, x, h, c):
        return 1 - f


class PeepholeCell(Cell):
    """Part 4: the gates i, f and o also read the cell state, each through a matrix V (H, H)."""

    def __init__(self, input_size, hidden_size):
        super().__init__(input_size, hidden_size)
        self.V = nn.ParameterDict({gate: torch.empty(hidden_size, hidden_size) for gate in self.gates if gate != "c"})

    def gate(self, name, x, h, c):
        a = super().gate(name, x, h, c)
        return a + c @ self.V[name].T if name in self.V else a


class CoupledPeepholeCell(CoupledCell, PeepholeCell):
    """Parts 3 and 4 together."""


class TextbookPeepholeCell(PeepholeCell):
    """Peepholes as in textbooks: the output gate reads c_t, where the exercise lets it read c_{t-1}."""

    def output_gate(self, x, h, c_previous, c):
        return torch.sigmoid(self.gate("o", x, h, c))


def stacked(cell, value):
    """Return value(parameter) of all parameters under this library's names, the blocks of their gates stacked."""
    blocks = {"weight_ih": cell.U, "weight_hh": cell.W, "bias_ih": cell.b, "bias_hh": cell.b}
    blocks |= {"weight_ch": cell.V} if hasattr(cell, "V") else {}
    return {name: torch.cat([value(p[gate]) for gate in cell.gates if gate in p]) for name, p in blocks.items()}


def compare(title, plain, ours, x, h, c):
    """Copy the weights, run both modules forward and backward, and print the largest differences."""
    for parameter in plain.parameters():
        nn.init.uniform_(parameter, -1, 1)
    cells = [(f"_l{k}", cell) for k, cell in enumerate(plain.layers)] if isinstance(plain, Layers) else [("", plain)]
    for suffix, cell in cells:
        for name, value in stacked(cell, torch.Tensor.detach).items():  # its two biases add up to b
            ours.get_parameter(name + suffix).data.copy_(value / 2 if "bias" in name else value)
    expected, found = plain(x, h, c), ours(x, (h, c))
    if isinstance(plain, Layers):
        found = found[0], *found[1]  # output, h_n, c_n
    for results in (expected, found):
        sum(result.square().sum() for result in results).backward()
    of_results = max((a - b).abs().max().item() for a, b in zip(expected, found, strict=True))
    of_gradients = max(
        (ours.get_parameter(name + suffix).grad - gradient).abs().max().item()
        for suffix, cell in cells
        for name, gradient in stacked(cell, lambda parameter: parameter.grad).items()
    )
    print(f"{title}: {ours}")
    print(f"  results     {', '.join(str(tuple(result.shape)) for result in found)}")
    named = ", ".join(f"{name} {tuple(parameter.shape)}" for name, parameter in ours.named_parameters())
    print(textwrap.fill(named, 110, initial_indent="  parameters  ", subsequent_indent=" " * 14))
    print(f"  largest difference: results {of_results:.1e}, gradients of all parameters {of_gradients:.1e}\n")
    assert of_results < 1e-12 and of_gradients < 1e-12


torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
step = (torch.randn(B, I), torch.randn(B, H), torch.randn(B, H))  # x_t, h_{t-1}, c_{t-1}
sequence = (torch.randn(T, B, I), torch.randn(2, B, H), torch.randn(2, B, H))  # x, h_0, c_0

compare("Part 1, the cell", Cell(I, H), LSTMCell(I, H), *step)
compare("Part 2, two layers", Layers(I, H, num_layers=2), LSTM(I, H, num_layers=2), *sequence)
compare("Part 3, coupled gates", CoupledCell(I, H), LSTMCell(I, H, coupled=True), *step)
compare("Part 4, peepholes", PeepholeCell(I, H), LSTMCell(I, H, peephole="full"), *step)
compare("Parts 3 and 4 together", CoupledPeepholeCell(I, H), LSTMCell(I, H, coupled=True, peephole="full"), *step)

# The exercise lets the output gate read c_{t-1}: output_peephole="previous", the default. The textbook equations let
# it read c_t. Those of Gers and Schmidhuber (2000) do too, and are elementwise: peephole="diagonal".
textbook = TextbookPeepholeCell(I, H), LSTMCell(I, H, peephole="full", output_peephole="current")
compare("Textbook peepholes", *textbook, *step)
print("Every result and every gradient agrees to 1e-12.")
