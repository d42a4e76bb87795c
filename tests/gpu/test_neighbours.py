"""On a GPU, the recipes of docs/neighbours.md, where their libraries are installed: against the same on a CPU."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

from lstm_triton import routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

import lstm_triton
from lstm_triton import LSTMSpec
from tests.support.composes import variant
from tests.support.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

DEVICE = "cuda"
SPECS = [LSTMSpec(), LSTMSpec(coupled=True, peephole="diagonal"), LSTMSpec(peephole="full", output_peephole="current")]
T, B, I, H = 37, 12, 40, 130  # noqa: E741
NEAR = dict(rtol=1e-4, atol=1e-4)

every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
ieee = pytest.mark.parametrize("precision", ["float32 ieee"], indirect=True)


def example(name, *modules):
    for module in modules:
        pytest.importorskip(module)
    return runpy.run_path(str(Path(__file__).parents[2] / "examples" / "neighbours" / f"with_{name}.py"))


@every_spec
@ieee
def test_gradients_of_rows_all_at_once(spec, precision):
    functions = example("opacus", "opacus")
    x, d_output = torch.randn(B, T, I), torch.randn(B, T, 2 * H)
    layer = functions["OutputLSTM"](I, H, 2, batch_first=True, bidirectional=True, **variant(spec))
    on_gpu = copy.deepcopy(layer).to(DEVICE)
    expected = functions["gradients_of_rows"](layer, [x], d_output)
    found = functions["gradients_of_rows"](on_gpu, [x.to(DEVICE)], d_output.to(DEVICE))
    for parameter, other in zip(on_gpu.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(found[parameter].cpu(), expected[other], **NEAR)


@every_spec
@ieee
def test_windows_of_torchrl_with_episodes_that_begin_inside(spec, precision):
    functions = example("torchrl", "torchrl", "gymnasium")
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule
    from torchrl.modules import LSTMModule, set_recurrent_mode

    keys = dict(in_keys=["x", "h", "c"], out_keys=["features", ("next", "h"), ("next", "c")])
    is_init = torch.rand(B, T, 1) < 0.1
    states = {name: torch.randn(B, T, 2, H) * ~is_init[..., None] for name in ("h", "c")}
    window = TensorDict(dict(x=torch.randn(B, T, I), is_init=is_init, **states), (B, T))
    lstm = lstm_triton.LSTM(I, H, 2, batch_first=True, **variant(spec))
    lstm.register_forward_pre_hook(functions["mask_to_lengths"], with_kwargs=True)
    on_gpu = copy.deepcopy(lstm).to(DEVICE)
    resetting = functions["LSTMWithResets"](on_gpu)
    modules = [
        LSTMModule(lstm=on_gpu, **keys),
        TensorDictModule(resetting, in_keys=[*keys["in_keys"], "is_init"], out_keys=keys["out_keys"]),
    ]
    with set_recurrent_mode(True):
        expected = LSTMModule(lstm=lstm, **keys)(window.clone())
        found = [module(window.to(DEVICE)) for module in modules]
    for result in found:
        torch.testing.assert_close(result["features"].cpu(), expected["features"], **NEAR)
        torch.testing.assert_close(result["next", "c"][:, -1].cpu(), expected["next", "c"][:, -1], **NEAR)


@every_spec
@ieee
def test_sequences_of_recurrent_ppo_with_resets(spec, precision):
    functions = example("sb3", "sb3_contrib")
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

    lstm = lstm_triton.LSTM(I, H, 2, **variant(spec)).to(DEVICE)
    features, starts = torch.randn(B * T, I, device=DEVICE), (torch.rand(B * T, device=DEVICE) < 0.1).float()
    states = tuple(torch.randn(2, B, H, device=DEVICE) for _ in "hc")
    expected = RecurrentActorCriticPolicy._process_sequence(features, states, starts, lstm)
    torch.testing.assert_close(
        functions["ResetsPolicy"]._process_sequence(features, states, starts, lstm), expected, **NEAR
    )
