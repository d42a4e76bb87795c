"""One LSTM step in the Triton kernels, on a CPU: every intermediate value beside the PyTorch formula.

Triton's interpreter executes a kernel's operations one by one with NumPy, on CPU tensors. That is slow, and it needs no
GPU; the source code of the kernels is the same.

    python examples/kernel_on_a_laptop.py
"""

import importlib.util
import os
import sys

if importlib.util.find_spec("triton") is None:
    sys.exit("This example runs Triton's interpreter, and triton is not installed (its packages are for Linux).")

# Triton reads this variable where a kernel is decorated with @triton.jit: it must be set before the kernels' import.
os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
from lstm_triton_kernels.cell import cell_forward
from lstm_triton_kernels.gates import gate_preactivations
from lstm_triton_kernels.spec import STANDARD, LSTMWeights

import lstm_triton

T, B, I, H = 5, 2, 3, 4  # time steps, batch rows, input features, hidden units  # noqa: E741
GATES = STANDARD.gates  # the gate blocks of the weights, i, f, g, o


def beside(name, kernel, formula):
    """Print a result of a kernel and the same by the formula in PyTorch, row by row; they must agree."""
    difference = (kernel - formula).abs().max().item()
    print(f"\n  {name}  {'kernel':36}PyTorch{' ' * 29}largest difference {difference:.0e}")
    for rows in zip(kernel.tolist(), formula.tolist(), strict=True):
        print("    " + "".join("".join(f"{value:9.5f}" for value in row) for row in rows))
    assert difference < 1e-6


torch.manual_seed(0)
lstm = lstm_triton.LSTM(I, H, strategy="stepwise")
w = LSTMWeights(*(weight.detach() for weight in lstm.all_weights[0]))
x, h, c = torch.randn(T, B, I), torch.randn(B, H), torch.randn(B, H)  # h and c are the states before the first step

shapes = f"W_ih {tuple(w.weight_ih.shape)} and W_hh {tuple(w.weight_hh.shape)}"
print(f"The first step of {T}: {B} batch rows, {I} input features, {H} hidden units.")
print(f"{shapes} hold the blocks of the gates {', '.join(GATES)}; below, a line is a batch row.")

print("\nLaunch 1, the fused gate matmul: a = W_ih x + b_ih + W_hh h + b_hh, one program for each gate.")
preact = torch.empty(B, len(GATES) * H)
cells = torch.stack([c, torch.empty_like(c)])  # slot 0 is the cell state before the step, slot 1 that after it
gate_preactivations(
    preact, x=x[0], gate_input=None, h=h[None], cells=cells, weights=w, spec=STANDARD, t=0, h_index=0, c_slot=0
)
a = STANDARD.split_gates(x[0] @ w.weight_ih.T + w.bias_ih + h @ w.weight_hh.T + w.bias_hh)
for name, kernel in STANDARD.split_gates(preact).items():
    beside(f"a_{name}", kernel, a[name])

print("\nLaunch 2, the elementwise cell update: i, f, o = s(a), g = tanh(a), c' = f c + i g, h' = o tanh(c').")
gates, hidden = torch.empty(1, B, len(GATES) * H), torch.empty(1, B, H)
cell_forward(preact, cells, hidden, gates, None, STANDARD, t=0, hidden_index=0, previous=0, current=1)
i, f, g, o = a["i"].sigmoid(), a["f"].sigmoid(), a["g"].tanh(), a["o"].sigmoid()
c_next = f * c + i * g
formulas = dict(i=i, f=f, g=g, o=o)
for name, kernel in STANDARD.split_gates(gates[0]).items():
    beside(f"{name}  ", kernel, formulas[name])
beside("c' ", cells[1], c_next)
beside("h' ", hidden[0], o * c_next.tanh())

print(f"\nThe whole sequence of {T} steps, forward and backward, beside PyTorch's own operators:")


def run(backend, strategy):
    """Return output, c_n and the gradients of all parameters."""
    lstm.strategy = strategy
    lstm.zero_grad()
    with lstm_triton.backend(backend):
        output, (_, c_n) = lstm(x, (h[None], c[None]))
        (output.square().sum() + c_n.sum()).backward()
    return [output.detach(), c_n.detach(), *(weight.grad.clone() for weight in lstm.parameters())]


strategies = {"stepwise": "two launches a step", "persistent": "all steps of a pass in one launch, by one program"}
if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
    del strategies["persistent"]
    print("  persistent: left out, since the interpreter of Triton 3.9 refuses masks that begin with a scalar")
expected = run("torch", "auto")
for strategy, launches in strategies.items():
    pairs = zip(run("triton", strategy), expected, strict=True)
    difference = max((kernel - formula).abs().max().item() for kernel, formula in pairs)
    print(f"  {strategy}, {launches}: largest difference of output, c_n and gradients {difference:.0e}")
    assert difference < 1e-5
