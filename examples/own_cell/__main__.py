"""Two cells that are not an LSTM, in Triton kernels of their own: against PyTorch and the formula, and in training.

gru.py and slstm.py hold the cells, docs/own-cell.md explains them. Without a GPU Triton's interpreter executes the
kernels on CPU tensors.

    python examples/own_cell
"""

import importlib.util
import os
import sys

if importlib.util.find_spec("triton") is None:
    sys.exit("This example runs Triton kernels, and triton is not installed (its packages are for Linux).")

import torch

# Triton reads this variable where a kernel is decorated with @triton.jit: it must be set before the kernels' import.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import gru
import slstm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, B, I, H = 5, 3, 4, 7  # time steps, batch rows, input features, hidden units  # noqa: E741


def parameters(*shapes):
    """Return random parameters, uniform within 1 / sqrt(H)."""
    return [((torch.rand(shape, dtype=torch.float64) * 2 - 1) / H**0.5).to(DEVICE) for shape in shapes]


def results(function, x, h_0, weights, grad_output):
    """Return the output of function(x, h_0, *weights) and the gradients of its arguments, in float64."""
    given = [tensor.detach().requires_grad_() for tensor in (x, h_0, *weights)]
    output = function(*given)
    gradients = torch.autograd.grad(output, given, grad_output.to(output.dtype))
    return [output.detach().double(), *(gradient.double() for gradient in gradients)]


def compare(kernels, expected, names, given):
    """Print how far the kernels are from `expected`, in float64 and float32: ||found - expected|| / ||expected||."""
    wanted = results(expected, *given)
    errors = []
    for dtype in (torch.float64, torch.float32):
        x, h_0, weights, grad_output = given
        found = results(kernels, x.to(dtype), h_0.to(dtype), [w.to(dtype) for w in weights], grad_output)
        errors.append([((f - w).norm() / w.norm()).item() for f, w in zip(found, wanted, strict=True)])
    print(f"  {'':24}{'float64':>9}{'float32':>9}")
    for name, *row in zip(("output", *(f"gradient of {name}" for name in names)), *errors, strict=True):
        print(f"  {name:24}" + "".join(f"{error:9.0e}" for error in row))
    assert max(errors[0]) < 1e-12 and max(errors[1]) < 1e-5


def train(name, cell, weights, steps=20):
    """Train a cell, and a linear layer on it, to say at each step but the first what the input was one step before."""
    readout = torch.zeros(1, H, dtype=torch.float64, device=DEVICE)
    weights = [weight.float().requires_grad_() for weight in (*weights, readout)]
    optimizer = torch.optim.Adam(weights, lr=0.1)
    signs = torch.randint(0, 2, (T, 32, 1), device=DEVICE) * 2.0 - 1.0
    h_0 = signs.new_zeros(32, H)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = cell(signs, h_0, *weights[:-1])
        loss = torch.nn.functional.mse_loss(output[1:] @ weights[-1].t(), signs[:-1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"  {name:6}" + " ".join(f"{loss:.2f}" for loss in losses))
    assert losses[-1] < 0.5 * losses[0]


torch.manual_seed(0)
where = torch.cuda.get_device_name() if DEVICE == "cuda" else "the CPU, in Triton's interpreter"
print(f"Kernels on {where}. T={T}, B={B}, I={I}, H={H}.")
x, h_0, grad_output = (
    torch.randn(*shape, dtype=torch.float64, device=DEVICE) for shape in ((T, B, I), (B, H), (T, B, H))
)

print("\nGRU, reset after the product: relative error against torch.nn.GRU in float64")
names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
weights = parameters((3 * H, I), (3 * H, H), (3 * H,), (3 * H,))
module = torch.nn.GRU(I, H, dtype=torch.float64, device=DEVICE)


def torch_gru(x, h_0, *weights):
    """Return the output of torch.nn.GRU with these weights."""
    named = dict(zip((f"{name}_l0" for name in names), weights, strict=True))
    return torch.func.functional_call(module, named, (x, h_0[None]))[0]


compare(gru.gru, torch_gru, ("x", "h_0", *names), (x, h_0, weights, grad_output))

names = ("weight_ih", "weight_hh", "bias")
weights = parameters((4 * H, I), (4 * H, H), (4 * H,))
for exp_forget, forget in ((False, "f = s(a_f)"), (True, "f = exp(a_f)")):
    print(f"\nsLSTM, {forget}: relative error against the formula without stabiliser in float64")

    def cell(x, h_0, *weights, exp_forget=exp_forget):
        """Return h_t of all steps, from an empty state."""
        state = slstm.initial_state(x.shape[1], H, x.dtype, DEVICE)
        return slstm.slstm(x, h_0, state, *weights, exp_forget)[0]

    def formula(*given, exp_forget=exp_forget):
        """Return the same by the formula without stabiliser."""
        return slstm.unstabilized(*given, exp_forget)

    compare(cell, formula, ("x", "h_0", *names), (x, h_0, weights, grad_output))

    # e^k in front of every i cancels in c / n: h must stay as it was.
    *matrices, bias = weights
    larger = torch.cat([bias[:H] + 1000.0, bias[H:]])
    stable, overflown = cell(x, h_0, *matrices, larger), formula(x, h_0, *matrices, larger)
    change = (stable - cell(x, h_0, *matrices, bias)).abs().max().item()
    print(
        f"  with 1000 added to a_i: the kernels' h changes by {change:.0e} at most, and is finite; without stabiliser"
    )
    print(f"  {overflown.isfinite().sum()} of {overflown.numel()} are finite")
    assert change < 1e-11 and not overflown.isfinite().any()

print("\nTraining: what was the input one step before? Mean squared error at each of 20 steps of Adam")
train("GRU", gru.gru, parameters((3 * H, 1), (3 * H, H), (3 * H,), (3 * H,)))
train("sLSTM", cell, parameters((4 * H, 1), (4 * H, H), (4 * H,)))
