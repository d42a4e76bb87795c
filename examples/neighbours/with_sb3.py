"""RecurrentPPO of sb3-contrib with this library's LSTM: converted in one line, with resets, and with another variant.

The policy of RecurrentPPO builds torch.nn.LSTM itself. `convert.from_torch(model.policy)` swaps its LSTMs; where an
episode begins inside of a sequence the policy still calls them once for each step, in a Python loop. `ResetsPolicy`
computes a sequence in one call, and may have LSTMs of any variant.

    pip install sb3-contrib
    python examples/neighbours/with_sb3.py
"""

import importlib.util
import sys
import time

if importlib.util.find_spec("sb3_contrib") is None:
    sys.exit("This example needs sb3-contrib, which is not installed: pip install sb3-contrib")

import gymnasium as gym
import numpy as np
import torch
from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

import lstm_triton


class ResetsPolicy(RecurrentActorCriticPolicy):
    """The recurrent policy with this library's LSTMs, and one call for a sequence with episodes that begin inside.

    - variant: options of `lstm_triton.LSTM` as a dict, such as dict(peephole="diagonal"); None for the standard variant

    All other arguments are those of RecurrentActorCriticPolicy.
    """

    def __init__(self, observation_space, action_space, lr_schedule, *args, variant=None, **kwargs):
        super().__init__(observation_space, action_space, lr_schedule, *args, **kwargs)
        if not variant:
            lstm_triton.convert.from_torch(self)
            return
        for name in ("lstm_actor", "lstm_critic"):
            old = getattr(self, name)
            if old is not None:
                sizes = (old.input_size, old.hidden_size, old.num_layers)
                setattr(self, name, lstm_triton.LSTM(*sizes, **self.lstm_kwargs, **variant))
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)

    @staticmethod
    def _process_sequence(features, lstm_states, episode_starts, lstm):
        rows = lstm_states[0].shape[1]
        x = features.reshape(rows, -1, lstm.input_size).transpose(0, 1)  # (T, B, I)
        resets = episode_starts.reshape(rows, -1).transpose(0, 1) != 0
        output, lstm_states = lstm(x, lstm_states, resets=resets)
        return output.transpose(0, 1).flatten(0, 1), lstm_states


class FirstCue(gym.Env):
    """An episode of 3 to 8 steps. Its first observation shows a cue, and each action that names the cue is rewarded."""

    observation_space = gym.spaces.Box(0, 1, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left, self.cue = int(self.np_random.integers(3, 9)), int(self.np_random.integers(2))
        return np.array([self.cue == 0, self.cue == 1, 1], np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.array([0, 0, 1], np.float32), float(action == self.cue), self.left == 0, False, {}


def model_of(policy, **options):
    """Return RecurrentPPO on a CPU, with the same seed for all."""
    settings = dict(n_steps=128, batch_size=128, n_epochs=4, learning_rate=1e-2, seed=0, device="cpu")
    kwargs = dict(lstm_hidden_size=16, net_arch=[], **options)
    return RecurrentPPO(policy, FirstCue(), policy_kwargs=kwargs, **settings)


def parameters(model):
    """Return all parameters of the policy as one vector."""
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


def evaluated(policy, batch):
    """Return the log-probabilities of a batch of the rollout, their gradient, and the least milliseconds of both."""
    times = []
    for _ in range(6):
        policy.zero_grad()
        begin = time.perf_counter()
        actions = batch.actions.long().flatten()
        _, logs, _ = policy.evaluate_actions(batch.observations, actions, batch.lstm_states, batch.episode_starts)
        logs[batch.mask > 1e-8].sum().backward()  # the rest is padding
        times.append(1e3 * (time.perf_counter() - begin))
    return logs.detach(), policy.lstm_actor.weight_hh_l0.grad.clone(), min(times)


def reward_of(model, episodes=50):
    """Return the reward of a step, the mean of new episodes."""
    env, rewards = FirstCue(), []
    for episode in range(episodes):
        observation, state, done = env.reset(seed=episode)[0], None, False
        start = np.ones(1, bool)
        while not done:
            action, state = model.predict(observation[None], state, start, deterministic=True)
            observation, reward, done, _, _ = env.step(action[0])
            rewards.append(reward)
            start = np.zeros(1, bool)
    return np.mean(rewards)


def main():
    """Train with each policy."""
    print("1. The policy of sb3-contrib, its LSTMs converted")
    theirs = model_of("MlpLstmPolicy").learn(512)
    ours = model_of("MlpLstmPolicy")
    lstm_triton.convert.from_torch(ours.policy)  # the one line, after the model is built or loaded
    ours.learn(512)
    largest = (parameters(ours) - parameters(theirs)).abs().max().item()
    print(f"   after 512 steps of training: largest difference of a parameter from torch.nn.LSTM's {largest:.1e}")
    assert type(ours.policy.lstm_actor) is lstm_triton.LSTM and largest < 1e-4

    print("2. ResetsPolicy: one call for a sequence, in place of a loop over its steps")
    resets = model_of(ResetsPolicy)
    resets.policy.load_state_dict(ours.policy.state_dict())
    batch = next(ours.rollout_buffer.get(128))
    expected = evaluated(ours.policy, batch)
    found = evaluated(resets.policy, batch)
    largest = [(a - b).abs().max().item() / a.abs().max().item() for a, b in zip(expected[:2], found[:2], strict=True)]
    print(f"   {len(batch.mask)} steps: largest relative difference of the log-probabilities {largest[0]:.1e},")
    print(f"   of their gradient {largest[1]:.1e}; the loop {expected[2]:.1f} ms, one call {found[2]:.1f} ms")
    assert max(largest) < 1e-4

    print("3. With peepholes: the cue must be remembered to the end of the episode")
    model = model_of(ResetsPolicy, variant=dict(peephole="diagonal"))
    before = reward_of(model)
    reward = reward_of(model.learn(2048))
    print(f"   reward of a step {before:.2f} before and {reward:.2f} after 2048 steps of training; the most is 1")
    assert reward > 0.9


if __name__ == "__main__":
    main()
