"""Differentially private training (DP-SGD) with opacus, which needs the gradient of each row by itself.

opacus hooks what a module returns. It does not see the states in an LSTM's result, and its own way to gradients of rows
takes a single tensor. So the LSTM here returns its output alone; then opacus trains any variant, one row after another.
`gradients_of_rows`, registered with opacus, computes the gradients of all rows at once.

    pip install opacus
    python examples/neighbours/with_opacus.py
"""

import importlib.util
import sys
import time
import warnings

if importlib.util.find_spec("opacus") is None:
    sys.exit("This example needs opacus, which is not installed: pip install opacus")

import torch
import torch.nn.functional as F
from opacus import GradSampleModule, PrivacyEngine
from opacus.grad_sample import register_grad_sampler
from opacus.validators import ModuleValidator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lstm_triton

CLASSES, T, I, H = 3, 12, 6, 24  # classes, time steps, input features, hidden units  # noqa: E741


class OutputLSTM(lstm_triton.LSTM):
    """An LSTM that takes no states and returns its output alone, (B, T, D·H) with batch_first."""

    def forward(self, x):
        return super().forward(x)[0]


def gradients_of_rows(lstm, activations, backprops):
    """Return parameter -> the gradients of all rows, (B, *shape), from one forward and one backward pass.

    The gradient of a weight is a sum over steps of products with the gradient of the gates, which is that of the gate
    inputs: of the input to an LSTM whose W_ih is the identity. Here the sum is taken for each row. (With TF32 that
    product rounds the gate inputs once more.)

    - activations: [x], x (B, T, I); backprops: the gradient of the output, (B, T, D·H)

    Raises NotImplementedError for projections, layer normalisation, dropout and regularised steps.
    """
    if lstm.proj_size or lstm.layer_norm or lstm.dropout or lstm.regularization:
        raise NotImplementedError(f"only plain layers have their gradients computed for all rows at once: {lstm}")
    spec, D = lstm.spec, 2 if lstm.bidirectional else 1
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    identity = torch.eye(len(spec.gates) * lstm.hidden_size, device=backprops.device, dtype=backprops.dtype)
    x, calls = activations[0].to(backprops.dtype).transpose(0, 1), []
    with torch.enable_grad():
        for layer in range(lstm.num_layers):
            outputs = []
            for direction in range(D):
                suffix = f"_l{layer}" + "_reverse" * direction
                weights = {name.removesuffix(suffix): p for name, p in lstm.named_parameters() if name.endswith(suffix)}
                read = x.flip(0) if direction else x
                bias = weights["bias_ih"] + weights["bias_hh"] if lstm.bias else None
                gate_inputs = F.linear(read, weights["weight_ih"], bias)
                rest = [weight for name, weight in weights.items() if name in ("weight_hh", "weight_ch")]
                states = dict(return_cell_states=spec.peephole is not None)
                h, _, *c = lstm_triton.functional.lstm(
                    gate_inputs, None, [identity, *rest], bias=False, strategy=lstm.strategy, **variant, **states
                )
                calls.append((weights, gate_inputs, read, h, *c))
                outputs.append(h.flip(0) if direction else h)
            x = torch.cat(outputs, -1)
        d_gates = torch.autograd.grad(x, [gate_inputs for _, gate_inputs, *_ in calls], backprops.transpose(0, 1))

    gradients = {}
    for d, (weights, _, read, h, *c) in zip(d_gates, calls, strict=True):
        found = {
            "weight_ih": torch.einsum("tbg,tbi->bgi", d, read),
            "weight_hh": torch.einsum("tbg,tbh->bgh", d[1:], h[:-1]),
            "bias_ih": d.sum(0),
            "bias_hh": d.sum(0),
        }
        if c:
            blocks, of_gate = [], spec.split_gates(d)
            for gate in spec.peephole_gates:
                previous = gate in spec.previous_gates
                of, cells = (of_gate[gate][1:], c[0][:-1]) if previous else (of_gate[gate], c[0])
                blocks.append(torch.einsum("tbh,tbk->bhk" if spec.full else "tbh,tbh->bh", of, cells))
            found["weight_ch"] = torch.cat(blocks, 1)
        gradients |= {p: found[name].detach() for name, p in weights.items() if p.requires_grad}
    return gradients


class Classifier(nn.Module):
    """Name the class of each row from the output at its last step."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(lstm.hidden_size, CLASSES)

    def forward(self, x):
        output = self.lstm(x)
        output = output[0] if isinstance(output, tuple) else output
        return self.head(output[:, -1])


def loss_of(model, x, y):
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(x), y)


def row_gradients(model, x, y, by_opacus):
    """Return name -> gradients of the rows, (B, *shape), and the least milliseconds of a forward and backward pass."""
    hooked, times = GradSampleModule(model, force_functorch=by_opacus), []
    for _ in range(6):
        hooked.zero_grad()
        begin = time.perf_counter()
        loss_of(hooked, x, y).backward()
        times.append(1e3 * (time.perf_counter() - begin))
    found = {name: p.grad_sample for name, p in model.named_parameters()}
    hooked.remove_hooks()
    return found, min(times)


def data(rows):
    """Return rows (rows, T, I) and the class of each: which of three features is larger than chance."""
    y = torch.randint(CLASSES, (rows,))
    return torch.randn(rows, T, I) + 0.7 * F.one_hot(y, I)[:, None], y


def main():
    """Compare gradients, then train."""
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Full backward hook is firing|Secure RNG turned off")
    x, y = data(16)

    print("1. Gradients of 16 rows, of an LSTM with peepholes")
    model = Classifier(OutputLSTM(I, H, batch_first=True, peephole="diagonal"))
    names, weights = zip(*model.named_parameters(), strict=True)
    alone = [torch.autograd.grad(loss_of(model, x[n : n + 1], y[n : n + 1]), weights) for n in range(16)]
    expected = dict(zip(names, map(torch.stack, zip(*alone, strict=True)), strict=True))
    for way, by_opacus in (("row after row, by opacus", True), ("all at once, by gradients_of_rows", False)):
        if not by_opacus:
            register_grad_sampler(OutputLSTM)(gradients_of_rows)
        found, took = row_gradients(model, x, y, by_opacus)
        largest = max((found[name] - expected[name]).abs().max().item() for name in expected)
        print(f"   {way}: {took:.1f} ms; largest difference from a backward pass for each row {largest:.1e}")
        assert largest < 1e-5

    print("\n2. Of the standard LSTM: opacus replaces torch.nn.LSTM by its own")
    plain = Classifier(lstm_triton.LSTM(I, H, batch_first=True))
    ours = Classifier(OutputLSTM(I, H, batch_first=True))
    ours.load_state_dict(plain.state_dict())
    theirs = ModuleValidator.fix(lstm_triton.convert.to_torch(plain))
    norms = []
    for way, model in ((f"opacus' {type(theirs.lstm).__name__}", theirs), ("gradients_of_rows", ours)):
        found, took = row_gradients(model, x, y, False)
        norms.append(sum(gradient.flatten(1).square().sum(1) for gradient in found.values()).sqrt())
        print(f"   {way}: {took:.1f} ms")
    largest = (norms[0] - norms[1]).abs().max().item()
    print(f"   largest difference of the norms of the rows' gradients {largest:.1e}")
    assert largest < 1e-5

    print("\n3. Training with PrivacyEngine")
    model = Classifier(OutputLSTM(I, H, batch_first=True, peephole="diagonal"))
    engine, (x, y) = PrivacyEngine(), data(1024)
    private, optimizer, loader = engine.make_private(
        module=model, optimizer=torch.optim.Adam(model.parameters(), lr=2e-2), noise_multiplier=0.8, max_grad_norm=1.0,
        data_loader=DataLoader(TensorDataset(x, y), batch_size=64),
    )  # fmt: skip
    for _ in range(6):
        for rows, classes in loader:
            optimizer.zero_grad()
            loss_of(private, rows, classes).backward()
            optimizer.step()
    x, y = data(512)
    accuracy = (model(x).argmax(-1) == y).float().mean().item()
    epsilon = engine.get_epsilon(delta=1e-4)
    print(f"   accuracy {accuracy:.3f} on new rows, by chance {1 / CLASSES:.3f}; epsilon {epsilon:.2f}")
    assert accuracy > 0.75


if __name__ == "__main__":
    main()
