"""Recurrent policies of torchrl with this library's LSTM: in torchrl's LSTMModule, and with resets in place of padding.

LSTMModule takes the LSTM as it is. Where an episode begins inside of a window it cuts the window into episodes, pads
them and gives an LSTM that is not torch.nn.LSTM a mask: `mask_to_lengths` makes lengths of it, for any variant.
`LSTMWithResets` neither cuts nor pads: `is_init` goes to the LSTM as resets, and a window is one call.

    pip install torchrl gymnasium
    python examples/neighbours/with_torchrl.py
"""

import importlib.util
import sys
import time

if not all(map(importlib.util.find_spec, ("torchrl", "gymnasium"))):
    sys.exit("This example needs torchrl and gymnasium, which are not both installed: pip install torchrl gymnasium")

import torch
import torch.nn.functional as F
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import Compose, GymEnv, InitTracker, SerialEnv, TensorDictPrimer, TransformedEnv
from torchrl.modules import LSTMModule, recurrent_mode, set_recurrent_mode

import lstm_triton

ENVIRONMENTS, STEPS, HIDDEN, LAYERS = 3, 60, 32, 2
KEYS = dict(
    in_keys=["observation", "state_h", "state_c"], out_keys=["features", ("next", "state_h"), ("next", "state_c")]
)


def mask_to_lengths(lstm, args, kwargs):
    """Forward hook of an LSTM: the mask of LSTMModule, (B, T), true at the steps that a row has, becomes lengths."""
    mask = kwargs.pop("mask", None)
    return args, kwargs if mask is None else kwargs | dict(lengths=mask.sum(1))


class LSTMWithResets(nn.Module):
    """An LSTM with batch_first, for a TensorDictModule: a step, or in recurrent mode a window of steps, in one call.

    - x: observations (*batch, I), in recurrent mode (*batch, T, I); h, c: states before each step, (..., L, H)
    - is_init: (..., 1) bool, whether an episode begins at a step, which then finds zero states
    - returns the output (..., H), and both states after the window at its last step, as LSTMModule does
    """

    def __init__(self, lstm):
        super().__init__()
        self.lstm = lstm

    def forward(self, x, h, c, is_init):
        steps = x.shape[-2] if recurrent_mode() else 1
        first = (state.reshape(-1, steps, *state.shape[-2:])[:, 0].transpose(0, 1) for state in (h, c))
        rows = x.reshape(-1, steps, x.shape[-1])
        output, last = self.lstm(rows, tuple(first), resets=is_init.reshape(-1, steps))
        after = (F.pad(state.transpose(0, 1)[:, None], (0, 0, 0, 0, steps - 1, 0)) for state in last)
        return output.reshape(*x.shape[:-1], -1), *(state.reshape(h.shape) for state in after)


def policy_of(memory):
    """Return a policy: observation and states -> features, states, and an action."""
    head = TensorDictModule(nn.Linear(HIDDEN, 2), in_keys=["features"], out_keys=["logits"])
    act = TensorDictModule(lambda logits: F.one_hot(logits.argmax(-1), 2), in_keys=["logits"], out_keys=["action"])
    return TensorDictSequential(memory, head, act)


def rollout(policy):
    """Play ENVIRONMENTS x STEPS steps of CartPole, step by step; episodes begin anew where they end."""
    shape = Unbounded(shape=(LAYERS, HIDDEN))
    env = TransformedEnv(
        SerialEnv(ENVIRONMENTS, lambda: GymEnv("CartPole-v1")),
        Compose(InitTracker(), TensorDictPrimer(dict(state_h=shape, state_c=shape.clone()), expand_specs=True)),
    )
    env.set_seed(0)
    with torch.no_grad():
        return env.rollout(STEPS, policy, break_when_any_done=False)


def window(memory, played):
    """Return what is computed of all steps in recurrent mode, and the least milliseconds with a backward pass."""
    times = []
    for _ in range(6):
        memory.zero_grad()
        begin = time.perf_counter()
        with set_recurrent_mode(True):
            found = memory(played.select(*KEYS["in_keys"], "is_init"))
        found["features"].square().sum().backward()
        times.append(1e3 * (time.perf_counter() - begin))
    return found, min(times)


def main():
    """Play with each memory and compute the windows again; compare gradients and times."""
    torch.manual_seed(0)
    lstm = lstm_triton.LSTM(4, HIDDEN, LAYERS, batch_first=True, peephole="diagonal")
    lstm.register_forward_pre_hook(mask_to_lengths, with_kwargs=True)
    in_keys = [*KEYS["in_keys"], "is_init"]
    memories = {
        "LSTMModule": LSTMModule(lstm=lstm, **KEYS),
        "LSTMWithResets": TensorDictModule(LSTMWithResets(lstm), in_keys=in_keys, out_keys=KEYS["out_keys"]),
    }
    for number, (name, memory) in enumerate(memories.items(), start=1):
        played = rollout(policy_of(memory))
        episodes = int(played["is_init"].sum())
        found, took = window(memory, played)
        largest = (found["features"] - played["features"]).abs().max().item()
        states = found["next", "state_h"]
        ends = states.flatten(-2).any(-1)  # the steps with states: at all others there are zeros
        states_off = (states[ends][:, -1] - played["features"][ends]).abs().max().item()
        print(f"{number}. {name}: {episodes} episodes in {ENVIRONMENTS} environments and {STEPS} steps")
        print(f"   features of the window: largest difference from those of the steps as played {largest:.1e}")
        print(f"   forward and backward pass of the window {took:.1f} ms")
        print(f"   states after the ends of {ends.sum()} episodes: largest difference {states_off:.1e}")
        assert max(largest, states_off) < 1e-5 and episodes > ENVIRONMENTS

    gradients = []
    for memory in memories.values():
        window(memory, played)
        gradients.append([p.grad.clone() for p in lstm.parameters()])
    largest = max(((a - b).norm() / a.norm()).item() for a, b in zip(*gradients, strict=True))
    print(f"3. Gradients by both, of one window: largest relative difference {largest:.1e}")
    assert largest < 1e-5


if __name__ == "__main__":
    main()
