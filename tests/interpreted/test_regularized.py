"""Regularised steps by the interpreted kernels, against the float64 reference with the same masks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lstm_triton import VARIANTS
from tests.support.parity import assert_parity, regularized_cases

STEPWISE = [replace(case, strategy="stepwise") for spec in VARIANTS for case in regularized_cases(spec)]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_step_by_step(case):
    assert_parity(case, "triton")
