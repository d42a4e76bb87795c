"""torchrl: LSTMModule with this library's LSTM, and the module of the example that passes is_init on as resets."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

import lstm_triton
from lstm_triton import VARIANTS

pytest.importorskip("torchrl")
pytest.importorskip("gymnasium")

from tensordict import TensorDict, from_module
from tensordict.nn import TensorDictModule
from torchrl.modules import LSTMModule, set_recurrent_mode

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "neighbours" / "with_torchrl.py"))
mask_to_lengths, LSTMWithResets = EXAMPLE["mask_to_lengths"], EXAMPLE["LSTMWithResets"]

every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
layers = pytest.mark.parametrize("L", [1, 2])
B, T, I, H = 3, 7, 4, 5  # noqa: E741
NEXT = ("next", "h"), ("next", "c")
KEYS = dict(in_keys=["x", "h", "c"], out_keys=["features", *NEXT])


def lstm_of(L=1, hook=True, **options):
    lstm = lstm_triton.LSTM(I, H, L, batch_first=True, **options)
    if hook:
        lstm.register_forward_pre_hook(mask_to_lengths, with_kwargs=True)
    return lstm


def resetting(lstm):
    return TensorDictModule(LSTMWithResets(lstm), in_keys=[*KEYS["in_keys"], "is_init"], out_keys=KEYS["out_keys"])


def played(*shape, begins=(), L=1):
    """A tensordict of that shape, with zero states where an episode begins, as torchrl's environments have them."""
    is_init = torch.zeros(*shape, 1, dtype=torch.bool)
    for step in begins:
        is_init[step] = True
    states = {name: torch.randn(*shape, L, H) * ~is_init[..., None] for name in ("h", "c")}
    return TensorDict(dict(x=torch.randn(*shape, I), is_init=is_init, **states), shape)


BEGINS = [(0, 3), (1, 0), (1, 5), (2, 2), (2, 3)]


def compare(found, expected, *keys):
    for key in keys or KEYS["out_keys"]:
        torch.testing.assert_close(found[key], expected[key])


@layers
def test_as_it_is_it_computes_steps_and_windows_of_one_episode(L):
    lstm, theirs = lstm_of(L, hook=False), nn.LSTM(I, H, L, batch_first=True)
    theirs.load_state_dict(lstm.state_dict())
    ours, expected = LSTMModule(lstm=lstm, **KEYS), LSTMModule(lstm=theirs, **KEYS)
    step, window = played(B, begins=[1], L=L), played(B, T, L=L)
    compare(ours(step.clone()), expected(step.clone()))
    with set_recurrent_mode(True):
        compare(ours(window.clone()), expected(window.clone()))


def test_without_the_hook_an_episode_that_begins_inside_of_a_window_is_an_error():
    module = LSTMModule(lstm=lstm_of(hook=False), **KEYS)
    with set_recurrent_mode(True), pytest.raises(TypeError, match="unexpected keyword argument 'mask'"):
        module(played(B, T, begins=BEGINS))


@layers
def test_with_the_hook_it_is_what_torchs_lstm_is(L):
    lstm, theirs = lstm_of(L), nn.LSTM(I, H, L, batch_first=True)
    theirs.load_state_dict(lstm.state_dict())
    window = played(B, T, begins=BEGINS, L=L)
    with set_recurrent_mode(True):
        found, expected = (LSTMModule(lstm=layer, **KEYS)(window.clone()) for layer in (lstm, theirs))
    compare(found, expected)
    for result in (found, expected):
        sum(result[key].sin().square().sum() for key in KEYS["out_keys"]).backward()
    for parameter, other in zip(lstm.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)


@every_variant
def test_both_modules_compute_in_a_window_what_they_compute_step_by_step(spec):
    variant = dict(coupled=spec.coupled, peephole=spec.peephole, output_peephole=spec.output_peephole)
    lstm = lstm_of(2, **variant)
    window = played(B, T, begins=BEGINS, L=2)
    for module in (LSTMModule(lstm=lstm, **KEYS), resetting(lstm)):
        h, c = window["h"][:, 0], window["c"][:, 0]
        features = []
        for t in range(T):
            step = module(window[:, t].select("x", "is_init").update(dict(h=h, c=c)))
            h, c = step[NEXT[0]], step[NEXT[1]]
            features.append(step["features"])
        with set_recurrent_mode(True):
            found = module(window.clone())
        torch.testing.assert_close(found["features"], torch.stack(features, 1))
        torch.testing.assert_close((found[NEXT[0]][:, -1], found[NEXT[1]][:, -1]), (h, c))


def test_rows_may_have_several_dimensions():
    lstm = lstm_of(2)
    window = played(2, B, T, begins=[(0, 1, 3), (1, 2, 4)], L=2)
    with set_recurrent_mode(True):
        expected = LSTMModule(lstm=lstm, **KEYS)(window.clone())
        found = resetting(lstm)(window.clone())
    torch.testing.assert_close(found["features"], expected["features"])
    for key in NEXT:
        torch.testing.assert_close(found[key][:, :, -1], expected[key][:, :, -1])
        assert not found[key][:, :, :-1].any()
    step = window[..., 0]
    compare(resetting(lstm)(step.clone()), LSTMModule(lstm=lstm, **KEYS)(step.clone()))


@pytest.mark.parametrize("module", [lambda lstm: LSTMModule(lstm=lstm, **KEYS), resetting], ids=["module", "resets"])
def test_parameters_held_outside_of_the_module_are_those_that_count(module):
    """torchrl's losses hold the parameters themselves and put them into the module for a call; ensembles use vmap."""
    window = played(B, T, begins=BEGINS)
    first, second = module(lstm_of(peephole="diagonal")), module(lstm_of(peephole="diagonal"))
    with set_recurrent_mode(True):
        expected = second(window.clone())["features"]
        held = from_module(second).apply(lambda p: p.detach().clone().requires_grad_())
        with held.to_module(first):
            found = first(window.clone())["features"]
        torch.testing.assert_close(found, expected)
        found.square().sum().backward()
        expected.square().sum().backward()
        assert all(p.grad is None for p in first.parameters())
        gradients = held.apply(lambda p: p.grad).flatten_keys(".")
        for name, parameter in second.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)

        def call(parameters, given):
            with parameters.to_module(first):
                return first(given)["features"]

        both = torch.stack([from_module(first).data, held.data])
        of_both = torch.vmap(call, (0, None))(both, window)
        torch.testing.assert_close(of_both, torch.stack([first(window.clone())["features"], expected]))
