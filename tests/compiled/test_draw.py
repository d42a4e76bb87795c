"""The kernels that draw masks, compiled and executed: the bits of the functions in PyTorch's own operators."""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

import torch
from lstm_triton_kernels import draw, regularize
from lstm_triton_kernels.regularize import Rules

from tests.emulator.launches import Emulation, emulated

RULES = [Rules(0.0, 0.25, 2.0**-30, 0.625), Rules(0.0, 1.0, 0.0, 0.5)]


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("rules, seed", [(RULES[0], -(2**40) + 3), (RULES[1], 17)])
def test_codes(rules, seed, capability):
    D, T, B, H = 2, 3, 37, 35
    emulation, seed = Emulation(capability=capability), torch.tensor([seed])
    with emulated(emulation):
        codes = draw.step_codes(rules, seed, D, T, B, H)
    assert emulation.launches == {"draw_codes_kernel": 1} and not list(emulation.findings)
    assert torch.equal(codes, regularize.step_codes(rules, seed, D, T, B, H))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype, rate", [(torch.bfloat16, 0.3), (torch.float16, 0.3), (torch.float32, 1.0)])
def test_factors(dtype, rate, capability):
    D, B, P = 2, 33, 35
    (rate,) = Rules.rounded(rate)[:1]
    emulation, seed = Emulation(capability=capability), torch.tensor([2**62 + 11])
    with emulated(emulation):
        factors = draw.hidden_factors(rate, seed, D, B, P, dtype)
    assert emulation.launches == {"draw_factors_kernel": 1} and not list(emulation.findings)
    assert torch.equal(factors, regularize.hidden_factors(rate, seed, D, B, P, dtype))
