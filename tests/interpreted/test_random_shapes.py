"""Generated shapes, strides and variants through the interpreted kernels."""

from hypothesis import given, settings

from tests.cpu.test_parity import cases
from tests.support.parity import assert_parity


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_layout_and_variant(case):
    assert_parity(case, "triton")
