"""Kernels with the identity in place of tanh, as compiled: executed on the emulator, against the float64 reference."""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from tests.compiled import layers
from tests.compiled.layers import Case
from tests.support.parity import RULES

CASES = [
    # step by step
    Case("identity-input", "bf16", 2, 5, 24, 2, stepwise=True, resets=True),
    Case("coupled+diagonal+current+identity-output", "fp32", 2, 17, 40, stepwise=True, rules=RULES[4]),
    Case("full+current+identity-input+identity-output", "tf32", 2, 5, 24, stepwise=True),
    Case("identity-input+identity-output+norm", "fp32", 2, 3, 24, stepwise=True),
    # the persistent kernels in Gluon
    Case("identity-input", "bf16", 2, 5, 136, wait="data", lengths=True),
    Case("identity-output", "fp16", 2, 5, 40, 2, wait="data", resets=True),
    Case("coupled+identity-input+identity-output", "tf32", 2, 5, 40, wait="data", P=24, rules=RULES[1]),
    Case("full+current+identity-output", "bf16", 2, 5, 72, wait="data", recompute=True),
    Case("identity-input+identity-output+norm", "fp16", 2, 5, 40, wait="data"),
    # those in plain Triton
    Case("diagonal+identity-input+identity-output", "fp32", 2, 5, 8, block_u=16, rules=RULES[4]),
    Case("identity-output", "fp32", 2, 5, 136, wait="data"),
    Case("coupled+identity-input", "fp32", 2, 5, 72, wait="counter", P=20, lengths=True),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_compiled_kernel_computes_what_the_reference_does(case):
    assert not layers.run(case).wrong
