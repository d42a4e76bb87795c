"""Initial values: what each function sets, and what it leaves."""

import math

import pytest
import torch

from lstm_triton import LSTM, CoupledLSTM, LSTMCell, init


def gate_bias(lstm, gate, suffix="_l0"):
    """The sum of both biases of a gate."""
    split = lstm.spec.split_gates
    return sum(split(lstm.get_parameter(f"bias_{side}{suffix}"))[gate] for side in ("ih", "hh"))


@pytest.mark.parametrize("kind", [LSTM, CoupledLSTM])
def test_the_forget_bias_is_set_in_every_layer_and_direction(kind):
    torch.manual_seed(0)
    lstm = kind(5, 8, num_layers=2, bidirectional=True, forget_bias=1.5)
    torch.manual_seed(0)
    plain = kind(5, 8, num_layers=2, bidirectional=True)
    for suffix in ("_l0", "_l1", "_l0_reverse", "_l1_reverse"):
        assert (gate_bias(lstm, "f", suffix) == 1.5).all()
        for gate in set(lstm.spec.gates) - {"f"}:
            assert torch.equal(gate_bias(lstm, gate, suffix), gate_bias(plain, gate, suffix))
    assert torch.equal(lstm.weight_hh_l1, plain.weight_hh_l1)
    lstm.reset_parameters()
    assert (gate_bias(lstm, "f") == 1.5).all()
    cell = LSTMCell(5, 8, forget_bias=-1.0)
    assert (gate_bias(cell, "f", "") == -1).all() and (gate_bias(cell, "o", "") != -1).any()


def test_chrono_biases_are_logarithms_of_uniform_numbers():
    torch.manual_seed(0)
    lstm = init.chrono_(LSTM(5, 4000), longest=100)
    lengths = gate_bias(lstm, "f").exp()
    assert (lengths >= 1).all() and (lengths <= 99.01).all()
    assert lengths.mean().item() == pytest.approx(50, abs=4 * 98 / math.sqrt(12 * 4000))
    assert torch.equal(gate_bias(lstm, "i"), -gate_bias(lstm, "f"))
    coupled = init.chrono_(CoupledLSTM(5, 40), longest=100)
    assert (gate_bias(coupled, "f") >= 0).all()
    with pytest.raises(ValueError, match="longest must be at least 3 steps, got 2"):
        init.chrono_(lstm, 2)


@pytest.mark.parametrize("P", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_recurrent_weights_are_orthogonal(P, dtype):
    lstm = init.orthogonal_(LSTM(5, 8, num_layers=2, proj_size=P, dtype=dtype), gain=2.0)
    for weight in (lstm.weight_hh_l0, lstm.weight_hh_l1):
        for block in lstm.spec.split_gates(weight.detach().double(), 0).values():
            error = block.t() @ block - 4 * torch.eye(P or 8, dtype=torch.float64)
            assert error.abs().max() < (1e-12 if dtype == torch.float64 else 0.05)


def test_functions_need_biases():
    for function in (init.forget_bias_, lambda module: init.chrono_(module, 9)):
        with pytest.raises(ValueError, match="LSTM has no biases: build it with bias=True"):
            function(LSTM(5, 8, bias=False))
    assert init.orthogonal_(LSTM(5, 8, bias=False)).bias is False
