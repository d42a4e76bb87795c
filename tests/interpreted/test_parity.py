"""The interpreted kernels against the float64 reference: outputs, states and every gradient, every variant."""

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS
from tests.support import parity
from tests.support.parity import Case, assert_parity, odd_cases

CASES = [case for spec in VARIANTS for case in odd_cases(spec)]
# What has no float64: the persistent kernels, reached through the public function.
CASES += [
    Case(spec, T=4, B=5, I=3, H=9, bidirectional=True, dtype=torch.float32, strategy="persistent", **ragged)
    for spec in VARIANTS
    for ragged in (dict(lengths=True, states=True), dict(lengths=True, resets=True, states=True, proj_size=4))
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_match_the_reference(case):
    assert_parity(case, "triton")


@pytest.mark.parametrize("T", [1, 2])
def test_bfloat16_is_as_near_as_its_storage_allows(T):
    """2^-8 for each result stored: the interpreter cuts bfloat16 off where a GPU rounds. A short sequence has a few."""
    case = Case(VARIANTS[3], T=T, B=5, I=9, H=18, dtype=torch.bfloat16)
    inputs = parity.random_inputs(case)
    with parity.lstm_triton.backend("triton"):
        found = parity.errors(parity.results(case, inputs, parity.call), parity.expected_results(case, inputs))
    assert max(found.values()) < 3 * 2**-8, found


@pytest.mark.parametrize("strategy", ["stepwise", "persistent"])
def test_what_stands_beyond_a_length_is_not_read(strategy):
    lengths = torch.tensor([2, 4, 1])
    x = torch.randn(4, 3, 5).masked_fill((torch.arange(4)[:, None] >= lengths)[..., None], float("nan"))
    lstm = lstm_triton.LSTM(5, 7, bidirectional=True, peephole="diagonal", strategy=strategy)
    with lstm_triton.backend("triton"):
        output, (h_n, c_n), cells = lstm(x.requires_grad_(), lengths=lengths, return_cell_states=True)
        (output.sum() + h_n.sum() + c_n.sum() + cells.sum()).backward()
    for tensor in (output, h_n, c_n, cells, x.grad, *(p.grad for p in lstm.parameters())):
        assert tensor.isfinite().all()
