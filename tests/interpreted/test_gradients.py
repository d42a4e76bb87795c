"""gradcheck and gradgradcheck in float64 through the interpreted kernels.

An interpreted launch takes milliseconds: the cell's gradient is checked entry by entry where there are four gates, all
else along random directions (`fast_mode`).
"""

import pytest

import lstm_triton
from lstm_triton import VARIANTS
from tests.support.gradcheck import CHECKED_CASES, first_order, second_order


@pytest.mark.parametrize("shape", CHECKED_CASES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_gradients_match_finite_differences(spec, shape):
    with lstm_triton.backend("triton"):
        first_order(spec, shape, fast=shape == "layer" or spec.coupled)


@pytest.mark.parametrize("shape", CHECKED_CASES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_second_gradients_match_finite_differences(spec, shape):
    with lstm_triton.backend("triton"):
        second_order(spec, shape, fast=True)
