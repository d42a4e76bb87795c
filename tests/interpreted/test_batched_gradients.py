"""Gradients in a batch of what the kernels computed: `vectorize=True`, and `is_grads_batched=True`."""

import pytest

import lstm_triton
from lstm_triton import LSTMSpec
from tests.support.batched import cell, check_batches, layer

SPECS = [LSTMSpec(), LSTMSpec(peephole="diagonal"), LSTMSpec(coupled=True, peephole="full", output_peephole="current")]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_batch_of_gradients_of_a_layer_is_a_loop(spec):
    with lstm_triton.backend("triton"):
        check_batches(*layer(spec, ("lengths",) if spec.peephole else ()))


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_a_batch_of_gradients_of_a_cell_is_a_loop(spec):
    with lstm_triton.backend("triton"):
        check_batches(*cell(spec))
