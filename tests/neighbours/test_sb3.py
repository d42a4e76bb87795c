"""sb3-contrib: RecurrentPPO with converted LSTMs, and with the example's policy, whose episode starts are resets."""

import runpy
from pathlib import Path

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, convert

pytest.importorskip("sb3_contrib")

from sb3_contrib import RecurrentPPO
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from sb3_contrib.common.recurrent.type_aliases import RNNStates

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "neighbours" / "with_sb3.py"))
ResetsPolicy, FirstCue = EXAMPLE["ResetsPolicy"], EXAMPLE["FirstCue"]

every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
T, B, H = 6, 3, 5


def model_of(policy, seed=0, **options):
    kwargs = dict(lstm_hidden_size=H, net_arch=[], **options)
    settings = dict(n_steps=32, batch_size=32, n_epochs=2, seed=seed, device="cpu", policy_kwargs=kwargs)
    return RecurrentPPO(policy, FirstCue(), **settings)


def evaluate(policy):
    """Evaluate actions of B sequences, of which some have an episode that begins inside, and the gradients."""
    torch.manual_seed(1)
    layers = policy.lstm_actor.num_layers
    observations, actions = torch.rand(B * T, 3), torch.randint(2, (B * T,))
    starts = torch.zeros(B, T)
    starts[0, 3] = starts[1, 0] = starts[2, 5] = 1
    pi, vf = (tuple(torch.randn(layers, B, H) for _ in "hc") for _ in range(2))
    results = policy.evaluate_actions(observations, actions, RNNStates(pi, vf), starts.flatten())
    gradients = torch.autograd.grad(sum(r.sin().sum() for r in results), list(policy.parameters()), allow_unused=True)
    return results, gradients


OPTIONS = {
    "two LSTMs": {},
    "two layers": dict(n_lstm_layers=2),
    "one LSTM for both": dict(shared_lstm=True, enable_critic_lstm=False),
    "none for the critic": dict(enable_critic_lstm=False),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_both_ways_compute_what_the_policy_computes(options):
    theirs, ours = model_of("MlpLstmPolicy", **options).policy, model_of("MlpLstmPolicy", **options).policy
    convert.from_torch(ours)
    resets = model_of(ResetsPolicy, **options).policy
    expected = evaluate(theirs)
    for policy in (ours, resets):
        assert type(policy.lstm_actor) is lstm_triton.LSTM
        policy.load_state_dict(theirs.state_dict())
        torch.testing.assert_close(evaluate(policy), expected)


@every_variant
def test_resets_are_the_loop_of_the_policy_for_every_variant(spec):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    policy = model_of(ResetsPolicy, variant=variant).policy
    assert policy.lstm_actor.spec == policy.lstm_critic.spec == spec
    found = evaluate(policy)
    policy._process_sequence = RecurrentActorCriticPolicy._process_sequence
    torch.testing.assert_close(found, evaluate(policy))


def parameters(model):
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach()


@pytest.mark.parametrize("policy", ["MlpLstmPolicy", ResetsPolicy], ids=["converted", "resets"])
def test_training_is_that_with_torchs_lstm(policy):
    theirs = model_of("MlpLstmPolicy").learn(96)  # each model sets the seed of all random numbers
    ours = model_of(policy)
    convert.from_torch(ours.policy)
    before = parameters(ours)
    ours.learn(96)
    torch.testing.assert_close(parameters(ours), parameters(theirs))
    assert (parameters(ours) - before).abs().max() > 1e-3


def test_a_variant_is_trained_saved_and_loaded(tmp_path):
    model = model_of(ResetsPolicy, variant=dict(peephole="diagonal"))
    before = model.policy.lstm_critic.weight_ch_l0.detach().clone()
    model.learn(64)
    assert (model.policy.lstm_critic.weight_ch_l0 - before).abs().max() > 1e-4
    model.save(tmp_path / "model.zip")
    loaded = RecurrentPPO.load(tmp_path / "model.zip", device="cpu")
    assert loaded.policy.lstm_actor.spec.name == "diagonal"
    torch.testing.assert_close(parameters(loaded), parameters(model), rtol=0, atol=0)
    torch.testing.assert_close(evaluate(loaded.policy), evaluate(model.policy))


def test_a_converted_model_is_loaded_with_torchs_lstm_and_converted_again(tmp_path):
    model = model_of("MlpLstmPolicy")
    convert.from_torch(model.policy)
    model.learn(32).save(tmp_path / "model.zip")
    loaded = RecurrentPPO.load(tmp_path / "model.zip", device="cpu")
    assert type(loaded.policy.lstm_actor) is torch.nn.LSTM
    convert.from_torch(loaded.policy)
    torch.testing.assert_close(evaluate(loaded.policy), evaluate(model.policy), rtol=0, atol=0)
