"""Look inside of an LSTM that remembers: its gates and cell states at every step, and what it can do without.

A sequence shows a random value at each step, and marks one of them; from there on the network must name the marked
value. So something must let that value into a cell state and no other, and keep it there. `return_gates` and
`return_cell_states` show which unit does, and how. Then each ablation of Greff et al. 2017, "LSTM: A Search Space
Odyssey", trains on the same task: a gate that is the constant 1, or an identity in place of a tanh. All on the CPU.

    python examples/look_inside.py
    python examples/look_inside.py --plot gates.png
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import lstm_triton

T, B, H = 16, 64, 8  # steps, sequences of a batch, hidden units
TRAINING_STEPS = 200

ABLATIONS = {
    "the LSTM": dict(),
    "NIG, no input gate": dict(input_gate=False),
    "NFG, no forget gate": dict(forget_gate=False),
    "NOG, no output gate": dict(output_gate=False),
    "NIAF, g = a_g": dict(input_activation="identity"),
    "NOAF, h = o c": dict(output_activation="identity"),
    "CIFG, i = 1 - f": dict(coupled=True),
    "peepholes": dict(peephole="diagonal", output_peephole="current"),
}


def sequences():
    """Return the input (T, B, 2), a value and a mark, the step of each mark (B,), and the marked values (B,)."""
    values, marked = torch.rand(T, B) * 2 - 1, torch.randint(0, T - 4, (B,))
    marks = (torch.arange(T)[:, None] == marked).float()
    return torch.stack([values, marks], -1), marked, (values * marks).sum(0)


def error_of(model, x, marked, wanted):
    """Return the mean squared error of what the model names from the mark on: the variance of the values is 0.33."""
    named = model["head"](model["lstm"](x)[0]).squeeze(-1)
    asked = torch.arange(T)[:, None] >= marked
    return ((named - wanted) ** 2)[asked].mean()


def trained(**options):
    """Return a model trained on new sequences at every step, and its mean error on 10 batches of others."""
    torch.manual_seed(0)
    bias = dict(forget_bias=1.0) if options.get("forget_gate", True) else {}
    model = nn.ModuleDict(dict(lstm=lstm_triton.LSTM(2, H, **bias, **options), head=nn.Linear(H, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(TRAINING_STEPS):
        loss = error_of(model, *sequences())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return model, sum(error_of(model, *sequences()).item() for _ in range(10)) / 10


def plot(path, x, marked, wanted, cells, gates, unit):
    """Draw the first sequence: the input, the gates and the cell state of the unit, and all cell states."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    shown, own, every = figure.subplots(3, 1, sharex=True)
    steps = range(T)
    shown.bar(steps, x[:, 0, 0], color="lightgrey", label="values")
    shown.bar([int(marked[0])], [float(wanted[0])], color="black", label="the marked one")
    for name, gate in gates._asdict().items():
        own.plot(steps, gate[:, 0, unit], marker=".", label=name)
    own.plot(steps, cells[:, 0, unit], "k--", label="c")
    own.set_title(f"gates, candidate and cell state of unit {unit}")
    image = every.imshow(cells[:, 0].T, aspect="auto", cmap="coolwarm", vmin=-1.5, vmax=1.5)
    every.set(title="cell states", xlabel="step", ylabel="unit")
    figure.colorbar(image, ax=every)
    for axes in (shown, own):
        axes.axvline(int(marked[0]), color="grey", linewidth=0.8)
        axes.legend(loc="lower right", ncols=5)
    figure.savefig(path, dpi=120)


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--plot", type=Path, metavar="FILE", help="draw gates and cell states into this file (matplotlib)")
arguments = parser.parse_args()
if arguments.plot is not None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit('matplotlib is not installed: pip install "lstm-triton[examples]"') from None

model, error = trained()
print(f"1. {TRAINING_STEPS} steps of training: mean squared error {error:.4f}; of naming 0 it would be 0.33\n")
assert error < 0.05

x, marked, wanted = sequences()
with torch.no_grad():
    output, _, cells, gates = model["lstm"](x, return_cell_states=True, return_gates=True)
i, f, g, o = gates
previous = torch.cat([torch.zeros(1, B, H), cells[:-1]])
largest = (f * previous + i * g - cells).abs().max().item(), (o * cells.tanh() - output).abs().max().item()
print("2. The gates make the cell states and the output: c_t = f c_{t-1} + i g, h_t = o tanh(c_t)")
print(f"   largest difference {max(largest):.1e}\n")
assert max(largest) < 1e-5

at_mark = torch.arange(T)[:, None] == marked
after = torch.arange(T)[:, None] > marked
held = wanted.expand(T, B)[after]
alike = [torch.corrcoef(torch.stack([cells[..., unit][after], held]))[0, 1].abs().item() for unit in range(H)]
unit = max(range(H), key=alike.__getitem__)
entering = (i * g)[..., unit].abs()
print(f"3. Unit {unit} remembers: its cell states after the mark and the value have a correlation of {alike[unit]:.2f}")
print(f"   what enters it, |i g|:  {entering[at_mark].mean():.2f} at the mark, {entering[after].mean():.2f} after it")
print(f"   what it keeps, f:       {f[..., unit][after].mean():.2f} after the mark\n")
assert alike[unit] > 0.8 and entering[at_mark].mean() > 2 * entering[after].mean() and f[..., unit][after].mean() > 0.6

if arguments.plot is not None:
    plot(arguments.plot, x, marked, wanted, cells, gates, unit)
    print(f"   drawn: {arguments.plot}\n")

print("4. The same training without a gate or an activation, once each: parameters, and mean squared error")
errors = {}
for name, options in ABLATIONS.items():
    ablated, errors[name] = trained(**options)
    parameters = sum(p.numel() for p in ablated["lstm"].parameters())
    print(f"   {name:20} {ablated['lstm'].spec.name:18} {parameters:4d}   {errors[name]:.4f}")
assert errors["the LSTM"] == error
