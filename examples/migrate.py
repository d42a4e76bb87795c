"""From torch.nn.LSTM to this library: checkpoints, whole models, packed rows, autocast, and then peepholes.

The model is a bidirectional LSTM of two layers and a linear layer on every step. It runs on the GPU if there is one.

    python examples/migrate.py
"""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lstm_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FEATURES, HIDDEN, CLASSES = 12, 16, 5
LENGTHS = [9, 4, 7]  # steps of each of the three rows


class Tagger(nn.Module):
    """Classify every step of every row."""

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm
        self.head = nn.Linear(2 * HIDDEN, CLASSES)

    def forward(self, packed):
        output, _ = self.lstm(packed)  # a PackedSequence, as its input is
        return self.head(output.data)  # (steps of all rows together, CLASSES)


def difference(a, b):
    """Return the largest difference of two tensors."""
    return (a.float() - b.float()).abs().max().item()


torch.manual_seed(0)
if DEVICE.type == "cuda":
    torch.backends.cudnn.rnn.fp32_precision = "ieee"  # cuDNN uses TF32 by default, this library does not
sizes = dict(input_size=FEATURES, hidden_size=HIDDEN, num_layers=2, bidirectional=True)
x = torch.randn(max(LENGTHS), len(LENGTHS), FEATURES, device=DEVICE)  # (T, B, I)
packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
old = Tagger(nn.LSTM(**sizes)).to(DEVICE)
expected = old(packed).detach()

print(f"1. A checkpoint of torch.nn.LSTM, on {DEVICE}")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model.pt"
    torch.save(old.state_dict(), path)
    checkpoint = torch.load(path, map_location=DEVICE, weights_only=True)
new = Tagger(lstm_triton.LSTM(**sizes)).to(DEVICE)
new.load_state_dict(checkpoint, strict=True)
back = Tagger(nn.LSTM(**sizes)).to(DEVICE)
back.load_state_dict(new.state_dict(), strict=True)
found = difference(new(packed), expected), difference(back(packed), expected)
print(f"   loaded into lstm_triton.LSTM: difference {found[0]:.1e}; and back into torch.nn.LSTM: {found[1]:.1e}\n")
assert max(found) < 1e-5

print("2. A whole model, in place")
parameters = dict(old.named_parameters())
lstm_triton.convert.from_torch(old)
same = all(parameter is parameters[name] for name, parameter in old.named_parameters())
print(f"   the LSTM is now {type(old.lstm).__module__}.{type(old.lstm).__name__}; same parameter objects: {same}")
print(f"   difference of the outputs {difference(old(packed), expected):.1e}\n")
assert isinstance(old.lstm, lstm_triton.LSTM) and same and difference(old(packed), expected) < 1e-5

print("3. Lengths in place of packing")
output, (h_n, c_n) = new.lstm(x, lengths=LENGTHS)  # padded in, padded out; the lengths may be a tensor
packed_output, (packed_h_n, packed_c_n) = new.lstm(packed)
padded, _ = pad_packed_sequence(packed_output)  # zero beyond the end of a row, as the output with lengths is
found = max(difference(*pair) for pair in ((output, padded), (h_n, packed_h_n), (c_n, packed_c_n)))
print(f"   largest difference of output {tuple(output.shape)}, h_n and c_n from those of packed rows: {found:.1e}\n")
assert found < 1e-5 and output[LENGTHS[1] :, 1].abs().max() == 0

print("4. Autocast to bfloat16")
with torch.no_grad(), torch.autocast(DEVICE.type, dtype=torch.bfloat16):
    ours, theirs = new.lstm(packed)[0].data, back.lstm(packed)[0].data
print(f"   output of lstm_triton.LSTM: {ours.dtype}, of torch.nn.LSTM: {theirs.dtype}")
print("   On a CPU torch.nn.LSTM leaves packed rows in float32; this library treats every layout and device alike.")
print(f"   difference from float32: {difference(ours, packed_output.data):.1e}\n")
assert ours.dtype == torch.bfloat16 and difference(ours, packed_output.data) < 0.03

print("5. The same model with peepholes")
peephole = Tagger(lstm_triton.PeepholeLSTM(**sizes)).to(DEVICE)  # LSTM(**sizes, peephole="diagonal") is the same
missing, unexpected = peephole.load_state_dict(checkpoint, strict=False)
print("   new in the state dict:", ", ".join(missing))
assert unexpected == [] and missing == [name for name in peephole.state_dict() if "weight_ch" in name]
for name in missing:
    nn.init.zeros_(peephole.get_parameter(name))
found = difference(peephole(packed), expected)
print(f"   with peepholes of zero the outputs are the old model's: difference {found:.1e}")
assert len(missing) == 4 and found < 1e-5

targets = torch.randint(CLASSES, (sum(LENGTHS),), device=DEVICE)
optimizer = torch.optim.AdamW(peephole.parameters(), lr=1e-2)
before = F.cross_entropy(peephole(packed), targets)
before.backward()
optimizer.step()
after = F.cross_entropy(peephole(packed), targets)
moved = min(peephole.get_parameter(name).abs().max().item() for name in missing)
print(f"   loss {before.item():.3f}, after a training step {after.item():.3f}; no layer's peepholes are still zero")
assert after < before and moved > 0
