"""Layers at the same time by the kernels in Gluon, as compiled for an H100 and executed in the emulator."""

from __future__ import annotations

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from dataclasses import replace
from unittest import mock

import torch
from lstm_triton_kernels import sequence_persistent, watch
from lstm_triton_kernels.gpus import GPUS, share_of
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.spec import STANDARD, LSTMSpec

import lstm_triton
from lstm_triton import stack
from lstm_triton.layer import Call
from lstm_triton.overlap import Overlap
from tests.emulator.launches import Emulation, emulated
from tests.support.overlap import Inputs, StackCase, both_passes, by_layer, inputs_of, one_layer_after_another

BOUND = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
"""As of single layers, see layers.py."""

CASES = [
    StackCase(2, 2, T=5, B=9, H=24, dtype=torch.float16),
    StackCase(3, 2, LSTMSpec(True, "diagonal"), T=4, B=3, H=17, resets=True, dtype=torch.bfloat16),
    StackCase(2, 4, STANDARD, L=2, T=9, B=20, H=40, dtype=torch.float16, bias=False, gradients=(True, False, False)),
]


def computed(case: StackCase, inputs: Inputs) -> tuple[dict[str, torch.Tensor], Emulation]:
    """By the kernels, on the plans for a share of a GPU of few multiprocessors."""
    small = replace(GPUS["h100"], multiprocessors=4 * case.lanes)
    overlap = Overlap(case.lanes, case.chunk)
    call = Call(case.spec.name, case.bias, False, "persistent", save=case.gradients is not None)

    def plan_of(launch):
        assert launch.lanes == case.lanes
        return ranked_plans(launch.layer, launch.backward, share_of(small, launch.lanes))[0]

    def function(x, hx, weights, resets):
        layers = [[w] for w in call.group(weights)]
        return stack_of(stack.lstm(x, *hx, layers, Order(case.T, None, resets), stack.How(call, overlap, overlap, 0.0)))

    emulation = Emulation(capability=90, gang="cta", weak=False, torn=False)
    with mock.patch.object(sequence_persistent, "plan_of", plan_of), emulated(emulation):
        found = both_passes(case, inputs, function)
    watch.check_launches()
    return found, emulation


def stack_of(results):
    """As `both_passes` takes them."""
    output, h_n, c_n = results
    return output, (h_n, c_n)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_half_types_bit_for_bit_as_one_after_another_and_near_float64(case):
    inputs = inputs_of(case)
    found, emulation = computed(case, inputs)
    assert emulation.launches and not emulation.findings
    with one_layer_after_another():
        again, _ = computed(case, inputs)
    assert not [name for name in found if not torch.equal(found[name], again[name])]
    wide = inputs_of(case)
    tensors = [t.detach().double().requires_grad_() for t in inputs.leaves()]
    wide.x, wide.h_0, wide.c_0, *wide.weights = tensors
    wide.resets, wide.gradients = inputs.resets, [g.double() for g in inputs.gradients]
    with lstm_triton.backend("torch"):
        wanted = by_layer(case, wide)
    wrong = {
        name: error
        for name, w in wanted.items()
        if not (error := float((found[name].double() - w).norm() / max(float(w.norm()), 1e-30))) <= BOUND[case.dtype]
    }
    assert not wrong


def test_chunks_add_no_rounding_forward():
    """h and c pass from chunk to chunk as they do from step to step: the results are those of one launch a layer."""
    case = StackCase(2, 2, T=5, B=3, H=24, dtype=torch.float16, gradients=None)
    inputs = inputs_of(case)
    found, whole = (computed(replace(case, chunk=chunk), inputs)[0] for chunk in (2, 5))
    assert found.keys() == {"output", "h_n", "c_n"} and all(found[name].equal(whole[name]) for name in found)
