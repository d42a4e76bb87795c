"""LSTMSpec, the order of the steps, and the launch plans: pure functions."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lstm_triton_kernels.blocks import elementwise_blocks, matmul_blocks
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.sizes import SUPPORTED_DTYPES, accumulator_dtype

from lstm_triton import VARIANTS, LSTMSpec


def test_there_are_ten_variants_with_ten_names():
    assert len(VARIANTS) == len(set(VARIANTS)) == len({spec.name for spec in VARIANTS}) == 10
    assert [LSTMSpec.parse(spec.name) for spec in VARIANTS] == list(VARIANTS)
    assert [spec.standard for spec in VARIANTS].count(True) == 1


@pytest.mark.parametrize(
    "spec, gates, peepholes, previous",
    [
        (LSTMSpec(), "ifgo", "", ""),
        (LSTMSpec(True), "fgo", "", ""),
        (LSTMSpec(False, "diagonal"), "ifgo", "ifo", "ifo"),
        (LSTMSpec(False, "full", "current"), "ifgo", "ifo", "if"),
        (LSTMSpec(True, "full"), "fgo", "fo", "fo"),
        (LSTMSpec(True, "diagonal", "current"), "fgo", "fo", "f"),
    ],
    ids=str,
)
def test_blocks(spec, gates, peepholes, previous):
    assert "".join(spec.gates) == gates
    assert "".join(spec.peephole_gates) == peepholes and "".join(spec.previous_gates) == previous
    shapes = spec.parameter_shapes(3, 5, proj_size=2)
    assert shapes["weight_ih"] == (len(gates) * 5, 3) and shapes["weight_hh"] == (len(gates) * 5, 2)
    assert shapes["weight_hr"] == (2, 5)
    if peepholes:
        assert shapes["weight_ch"] == ((len(peepholes) * 5, 5) if spec.full else (len(peepholes) * 5,))
    else:
        assert "weight_ch" not in shapes


@given(st.integers(1, 20), st.booleans(), st.booleans())
def test_each_step_reads_what_the_step_before_it_wrote(T, reverse, saved):
    order = Order(T, reverse=reverse)
    steps = list(order.steps(saved))
    assert [step.t for step in steps] == (list(range(T))[::-1] if reverse else list(range(T)))
    assert steps[0].h_index is None and steps[0].previous == order.initial_slot(saved)
    for before, after in pairwise(steps):
        assert after.h_index == before.t and after.previous == before.current
    assert steps[-1].current == order.final_slot(saved)
    slots = {steps[0].previous, *(step.current for step in steps)}
    assert slots == (set(range(T + 1)) if saved else {0})


@pytest.mark.parametrize("fenced", [True, False])
def test_products_by_wgmma_are_unpipelined_where_triton_does_not_fence_their_copies(fenced, monkeypatch):
    gates = pytest.importorskip("lstm_triton_kernels.gates")
    monkeypatch.setattr(gates, "FENCES_COPIES", fenced)
    for dtype in SUPPORTED_DTYPES:
        for B in (16, 64, 300):
            stages = 1 if dtype.itemsize == 2 and B >= 64 and not fenced else matmul_blocks(B, 512, dtype).num_stages
            assert gates.product_blocks(B, 512, dtype) == replace(matmul_blocks(B, 512, dtype), num_stages=stages)


@given(st.integers(0, 100_000), st.integers(1, 100_000), st.sampled_from(SUPPORTED_DTYPES))
def test_block_sizes_are_legal(B, H, dtype):
    blocks = matmul_blocks(B, H, dtype)
    assert all(size >= 16 and size & (size - 1) == 0 for size in (blocks.block_b, blocks.block_u, blocks.block_k))
    assert blocks.num_stages * blocks.block_k * (blocks.block_b + blocks.block_u) * dtype.itemsize < 99 * 1024
    elementwise = elementwise_blocks(H)
    assert elementwise.block_b * elementwise.block_u == 512
    assert accumulator_dtype(dtype) == (torch.float64 if dtype == torch.float64 else torch.float32)
