"""The kernels that draw masks, interpreted: the bits of the functions in PyTorch's own operators."""

import pytest
import torch
from lstm_triton_kernels import draw, regularize
from lstm_triton_kernels.regularize import Rules

SEEDS = [0, 17, -1, 2**63 - 5, -(2**40) + 3]
RATES = [(0.5, 0.25, 0.125), (1.0, 0.0, 2.0**-30), (0.0, 1.0 - 2.0**-24, 1.0), (0.0, 0.0, 0.5)]


@pytest.mark.parametrize("rates", RATES, ids=str)
@pytest.mark.parametrize("D, T, B, H", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 2, 3, 12), (2, 2, 67, 17)])
def test_codes(D, T, B, H, rates):
    rules = Rules(0.0, *rates)
    for seed in SEEDS[: 2 if B > 8 else None]:
        seed = torch.tensor([seed])
        assert torch.equal(draw.step_codes(rules, seed, D, T, B, H), regularize.step_codes(rules, seed, D, T, B, H))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rate", [0.5, 0.3, 1.0, 2.0**-30])
def test_factors(rate, dtype):
    (rate,) = Rules.rounded(rate)[:1]
    for seed, (D, B, P) in zip(SEEDS, [(1, 1, 1), (2, 5, 7), (2, 3, 12), (1, 200, 17), (2, 1, 33)], strict=True):
        seed = torch.tensor([seed])
        assert torch.equal(
            draw.hidden_factors(rate, seed, D, B, P, dtype), regularize.hidden_factors(rate, seed, D, B, P, dtype)
        )


def test_no_elements():
    assert draw.step_codes(Rules(0.0, 0.5), torch.tensor([1]), 1, 3, 0, 4).shape == (1, 3, 0, 4)
