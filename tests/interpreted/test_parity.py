"""The interpreted kernels against the float64 reference: outputs, states and every gradient, every variant."""

import pytest
import torch

from lstm_triton import VARIANTS
from tests.support import parity
from tests.support.parity import Case, assert_parity, odd_cases

CASES = [case for spec in VARIANTS for case in odd_cases(spec)]


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
