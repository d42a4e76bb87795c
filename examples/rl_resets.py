"""Reinforcement learning with memory: episodes that begin inside a window of steps, told to the LSTM by `resets`.

A batch row is an environment, which plays episodes of random length one after another: a window of T steps holds
several of them, and cuts through those at its edges. Each step shows a cue, and the last action of an episode must
name the cue of its first step; the others distract. No observation shows where an episode begins or ends, so only a
memory that begins anew with each episode can tell which cue was the first. It runs on the GPU if there is one.

    python examples/rl_resets.py
"""

import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

import lstm_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CUES, T, B, H = 3, 24, 64, 32  # different cues, steps of a window, environments, hidden units


class Environments:
    """B environments that play one episode after another, each of 3 to 8 steps."""

    def __init__(self):
        self.left = torch.zeros(B, dtype=torch.int64)  # steps that the episode still has
        self.first = torch.zeros(B, dtype=torch.int64)  # the cue of its first step

    def window(self):
        """Play T steps: observations (T, B, CUES), begins and ends (T, B) bool, the cue to be named (T, B)."""
        steps = []
        for _ in range(T):
            shown, begins = torch.randint(CUES, (B,)), self.left == 0
            self.left = torch.where(begins, torch.randint(3, 9, (B,)), self.left) - 1
            self.first = torch.where(begins, shown, self.first)
            steps.append((F.one_hot(shown, CUES).float(), begins, self.left == 0, self.first))
        return [torch.stack(parts).to(DEVICE) for parts in zip(*steps, strict=True)]


def step_by_step(cell, x, state, resets):
    """The usual way: a loop that sets the state to zero where an episode begins, before each call of the cell."""
    h, c = state
    outputs = []
    for x_t, reset in zip(x, resets, strict=True):
        kept = ~reset[:, None]
        h, c = cell(x_t, (h * kept, c * kept))
        outputs.append(h)
    return torch.stack(outputs), (h, c)


def milliseconds(function):
    """Return the median time of a call and its backward pass."""
    times = []
    for _ in range(10):
        begin = time.perf_counter()
        function()[0].sum().backward()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return median(times)


torch.manual_seed(0)
lstm = lstm_triton.LSTM(CUES, H).to(DEVICE)
environments = Environments()
observations, begins, ends, _ = environments.window()
zero_state = torch.zeros(1, B, H, device=DEVICE), torch.zeros(1, B, H, device=DEVICE)

print(f"1. Each episode by itself: {begins.sum()} episodes in a window of {T} steps and {B} environments, on {DEVICE}")
output, state = lstm(observations, zero_state, resets=begins)
largest = 0.0
for row in range(B):
    starts = begins[:, row].nonzero().flatten().tolist()
    for start, stop in zip(starts, [*starts[1:], T], strict=True):
        alone, _ = lstm(observations[start:stop, row])  # unbatched, from zero states
        largest = max(largest, (output[start:stop, row] - alone).abs().max().item())
print(f"   largest difference of the output with resets from that of the episode alone: {largest:.1e}\n")
assert largest < 1e-5

print("2. Gradients do not cross the beginning of an episode")
x = observations.clone().requires_grad_()
start, stop = begins[:, 0].nonzero().flatten().tolist()[1:3]
lstm(x, zero_state, resets=begins)[0][start:stop, 0].sum().backward()
inside = x.grad[start:stop, 0].abs().sum(-1)
x.grad[start:stop, 0] = 0
print(
    f"   gradient of the outputs of steps {start} to {stop - 1} of environment 0 by the observations: at these steps at"
)
print(f"   least {inside.min():.1e}, at all others at most {x.grad.abs().max():.1e}\n")
assert inside.min() > 0 and x.grad.abs().max() == 0

print("3. The loop over torch.nn.LSTMCell computes the same")
cell = nn.LSTMCell(CUES, H).to(DEVICE)
cell.load_state_dict({name.removesuffix("_l0"): weight for name, weight in lstm.state_dict().items()})
looped, (h, c) = step_by_step(cell, observations, (zero_state[0][0], zero_state[1][0]), begins)
largest = max((a - b).abs().max().item() for a, b in ((output, looped), (state[0][0], h), (state[1][0], c)))
loop_time = milliseconds(lambda: step_by_step(cell, observations, (zero_state[0][0], zero_state[1][0]), begins))
ours = milliseconds(lambda: lstm(observations, zero_state, resets=begins))
print(f"   largest difference {largest:.1e}; forward and backward pass on this machine's {DEVICE.type.upper()}:")
print(f"   loop {loop_time:.1f} ms, LSTM with resets {ours:.1f} ms\n")
assert largest < 1e-5


def trained(use_resets, windows=300):
    """Train by policy gradient (REINFORCE); return how often the most probable action is right in 20 new windows."""
    torch.manual_seed(1)
    environments, state = Environments(), None
    policy = nn.ModuleDict(dict(lstm=lstm_triton.LSTM(CUES, H), head=nn.Linear(H, CUES))).to(DEVICE)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    correct = []
    for n in range(windows + 20):
        observations, begins, ends, cues = environments.window()
        output, state = policy["lstm"](observations, state, resets=begins if use_resets else None)
        state = tuple(s.detach() for s in state)  # the next window goes on where this one ends
        actions = torch.distributions.Categorical(logits=policy["head"](output[ends]))
        if n >= windows:
            correct.append((actions.probs.argmax(-1) == cues[ends]).float().mean().item())
            continue
        taken = actions.sample()
        reward = (taken == cues[ends]).float()
        loss = -((reward - reward.mean()) * actions.log_prob(taken)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sum(correct) / len(correct)


print(f"4. Training by policy gradient; by chance accuracy is {1 / CUES:.3f}")
begin = time.perf_counter()
accuracy = trained(use_resets=True)
print(f"   with resets accuracy {accuracy:.3f}, after {time.perf_counter() - begin:.0f} s of training")
without = trained(use_resets=False)
print(f"   without resets accuracy {without:.3f}, after as many windows")
assert accuracy > 0.95 and without < 0.7
