"""Regularised steps on the `torch` backend, against the float64 reference with the same masks."""

import pytest

from lstm_triton import VARIANTS
from tests.support.parity import assert_parity, regularized_cases

CASES = [case for spec in VARIANTS for case in regularized_cases(spec)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_backend_matches_the_reference(case):
    assert_parity(case, "torch")
