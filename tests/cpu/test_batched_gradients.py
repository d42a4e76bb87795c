"""Gradients in a batch: `vectorize=True` of torch.autograd.functional, and `is_grads_batched=True`."""

import pytest

from lstm_triton import VARIANTS
from tests.support.batched import cell, check_batches, layer, packed_layer
from tests.support.composes import EVERYTHING

every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)


@every_variant
@pytest.mark.parametrize("options", [dict(), dict(num_layers=2, bidirectional=True, proj_size=2)], ids=str)
def test_a_batch_of_gradients_of_a_layer_is_a_loop(spec, options):
    check_batches(*layer(spec, **options))


@every_variant
def test_a_batch_of_gradients_with_lengths_resets_and_cell_states_is_a_loop(spec):
    check_batches(*layer(spec, EVERYTHING))


@every_variant
def test_a_batch_of_gradients_of_a_packed_batch_is_a_loop(spec):
    check_batches(*packed_layer(spec))


@every_variant
def test_a_batch_of_gradients_of_a_cell_is_a_loop(spec):
    check_batches(*cell(spec))
