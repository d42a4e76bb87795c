"""On a GPU: gates that are left out, identities in place of tanh, and gates returned, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from lstm_triton_kernels.spec import ABLATIONS

import lstm_triton
from lstm_triton import LSTMSpec
from tests.gpu.test_normalized import assert_near
from tests.support.gpu import NEEDS_GPU, TYPES
from tests.support.parity import RULES, Case

pytestmark = NEEDS_GPU

BOTH = dict(input_activation="identity", output_activation="identity")
SPECS = [
    *ABLATIONS,
    LSTMSpec(True, "diagonal", "current", output_gate=True, **BOTH),
    LSTMSpec(False, "full", "current", forget_gate=False, **BOTH),
]
SHAPES = {
    "stepwise": dict(T=9, B=12, I=40, H=130, strategy="stepwise"),
    "persistent": dict(T=9, B=12, I=40, H=136, bidirectional=True, strategy="persistent"),
    "lengths, resets": dict(T=9, B=5, I=33, H=72, lengths=True, resets=True, states=True, strategy="persistent"),
    "all rules": dict(T=9, B=17, I=33, H=72, rules=RULES[3], strategy="persistent"),
    "cell": dict(B=17, I=63, H=65, cell=True),
    "auto": dict(T=9, B=17, I=31, H=63, L=2, bias=False),
}


@pytest.mark.parametrize("precision", list(TYPES), indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_as_near_as_pytorchs_operators(spec, shape, precision):
    options, dtype = SHAPES[shape], TYPES[precision]
    if dtype == torch.float64 and options.get("strategy") == "persistent":
        pytest.skip("the persistent kernels have no float64")
    assert_near(Case(spec, dtype=dtype, device="cuda", **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_a_gate_that_is_left_out_is_exactly_one(strategy, dtype):
    """With g = a_g, no gate at all and W_hh = 0 the cell state after a step of a_g = 1 more is exactly one more."""
    spec = LSTMSpec(False, None, "previous", False, False, False, False, "identity", "identity")
    lstm = lstm_triton.LSTM(1, 24, strategy=strategy, device="cuda", dtype=dtype, **spec.options)
    for parameter in lstm.parameters():
        torch.nn.init.zeros_(parameter)
    torch.nn.init.ones_(lstm.bias_ih_l0)
    with torch.no_grad():
        output, _ = lstm(torch.zeros(9, 3, 1, device="cuda", dtype=dtype))
    assert torch.equal(output[:, 0, 0].cpu(), torch.arange(1, 10).to(dtype))


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_gates_are_returned_behind_the_kernels(strategy):
    torch.manual_seed(0)
    lstm = lstm_triton.PeepholeLSTM(40, 72, 2, bidirectional=True, strategy=strategy, device="cuda").eval()
    x = torch.randn(9, 5, 40, device="cuda")
    output, _, cells, gates = lstm(x, return_cell_states=True, return_gates=True)
    with lstm_triton.backend("torch"):
        lstm.strategy = "auto"
        *_, expected = lstm(x, return_gates=True)
    torch.testing.assert_close(list(gates), list(expected), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output, gates.o * cells.tanh(), rtol=1e-3, atol=1e-3)
