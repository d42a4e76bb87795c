"""The kernels as compiled for sm_90, and some for sm_80, executed: every result and gradient against the reference.

The checks of the emulator see each access to memory: none outside of a tensor, none to what nobody wrote, no race.
"""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from dataclasses import replace

import torch
from lstm_triton_kernels import tensor_core_plan, watch
from lstm_triton_kernels.regularize import NONE, Rules

from benchmarks.micro import float32_matmuls
from lstm_triton import VARIANTS
from tests.compiled import cases, layers
from tests.emulator.launches import emulated

QUICK = list(cases.quick())


def long_cases():
    for group, members in cases.GROUPS.items():
        for case in members() if group != "large" else ():
            yield pytest.param(case, id=f"{group}: {case}", marks=pytest.mark.long)


@pytest.mark.parametrize("case", [*(pytest.param(case, id=str(case)) for case in QUICK), *long_cases()])
def test_a_compiled_kernel_computes_what_the_reference_does(case):
    assert not layers.run(case).wrong


def test_the_quick_selection_has_a_case_of_everything():
    """What the long list varies, the quick one varies too."""
    together = [case for case in QUICK if case.wait and not case.own_plans]
    exact = [case for case in together if case.dtype == "fp32"]
    gluon = [case for case in together if case.dtype != "fp32"]
    stepwise = [case for case in QUICK if case.stepwise]
    for spec in VARIANTS:
        assert {case.wait for case in exact if case.variant == spec.name} == {"data", "counter"}
        assert len({case.dtype for case in gluon if case.variant == spec.name}) > 1
        one = [case for case in QUICK if case.variant == spec.name and not (case.wait or case.stepwise)]
        assert any(case.plan(False).unit_programs == case.plan(True).unit_programs == 1 for case in one)
    assert {case.variant for case in stepwise} == {spec.name for spec in VARIANTS}
    assert {case.dtype for case in gluon} == set(cases.TENSOR_CORES)
    for some in (stepwise, [case for case in QUICK if case.capability == 80]):
        assert {case.dtype for case in some} == set(layers.DTYPES)
    engines = {(case.dtype == "fp32", case.wait) for case in together}
    assert engines == {(True, "data"), (True, "counter"), (False, "data")}
    for flag in ("lengths", "resets"):
        assert {(case.dtype == "fp32", case.wait) for case in QUICK if getattr(case, flag) and case.wait} == engines
    assert {(*engine, D) for engine in engines for D in (1, 2)} == {
        (case.dtype == "fp32", case.wait, case.D) for case in together
    }
    assert {(case.dtype == "fp32", case.wait) for case in QUICK if case.weak} == engines
    shared = [case for case in QUICK if case.own_plans]
    assert {(case.dtype == "fp32", case.wait, case.own_plans.forward.blocks_per_program > 1) for case in shared} == {
        (*engine, several) for engine in engines for several in (False, True)
    }
    assert all(case.plan(side).unit_programs > 1 for case in together for side in (False, True))
    assert (False, True, False, False) in {case.gradients for case in QUICK}


def test_the_quick_selection_has_a_plan_of_every_kind():
    """Of the kernels in Gluon: all tiles of rows, both layouts, chunks in shared memory, columns in several pieces."""
    plans = [case.plans() for case in QUICK if case.dtype != "fp32" and not case.stepwise]
    for side in ("forward", "backward"):
        some = [getattr(both, side) for both in plans]
        shared = [plan for plan in some if plan.parts < plan.num_warps]
        assert {plan.block_b // plan.num_warps for plan in shared} == {8, 16}
        assert {plan.blocks_per_program > 1 for plan in shared} == {False, True}
        assert {plan.kept > 0 for plan in shared} == {plan.group < plan.chunks for plan in shared} == {False, True}
        some = [plan for plan in some if plan.parts == plan.num_warps]
        assert {plan.block_b for plan in some} == {8, 16}
        assert {plan.tiled for plan in some} == {False, True}
        assert {plan.kept > 0 for plan in some} == {False, True}
        assert {plan.group < plan.chunks for plan in some} == {False, True}
        assert {8, 16, 32} <= {plan.block_u for plan in some}
        assert {2, 4} <= {plan.num_warps for plan in some}
        streams = [plan for plan in some if plan.streamed]
        assert {plan.beyond_l2 < plan.streamed for plan in streams} == {False, True}
        assert {plan.streamed % flying_of(plan) for plan in streams} >= {0, 1} and any(
            plan.streamed > flying_of(plan) for plan in streams
        )
    assert 8 in {both.backward.num_warps for both in plans}


def test_the_quick_selection_has_every_rule():
    """Of the kernels in Gluon: each alone, drawn and in evaluation, with each option and each way to load."""
    some = [case for case in QUICK if case.dtype != "fp32" and not case.stepwise and case.rules != NONE]
    alone = [case.rules for case in some if sum(value > 0 for value in case.rules) == 1]
    assert {name for rules in alone for name, value in rules._asdict().items() if value} == set(Rules._fields)
    together = [case for case in some if sum(value > 0 for value in case.rules) > 3]
    for name in ("lengths", "resets", "weak", "infer", "recompute", "training", "P"):
        assert {bool(getattr(case, name)) for case in together} == {False, True}, name
    for name in ("diagonal", "full", "coupled", "output_current"):
        assert {getattr(case.spec, name) for case in together} == {False, True}, name
    plans = [case.plan(side) for case in together for side in (False, True)] + [
        plan for case in together for plan in case.own_plans or ()
    ]
    assert {plan.blocks_per_program > 1 for plan in plans} == {plan.streamed > 0 for plan in plans} == {False, True}
    assert {plan.parts == 1 for plan in plans} == {False, True}


def flying_of(plan):
    """How many chunks of streamed weights are under way."""
    return tensor_core_plan.chunks_in_flight(plan.tile_bytes // (plan.chunks * plan.parts * 64))


WAITING = layers.Case("standard", "bf16", 3, 5, 72, wait="data", multiprocessors=9)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32", "fp32"])
def test_a_nan_with_the_bits_of_what_is_unpublished_is_not_waited_for(dtype):
    """It is published as another NaN, in its own row and in no other."""
    case = replace(WAITING, dtype=dtype)
    inputs = layers.inputs_of(case.layer_case())
    row, unit = 2, case.H - 1
    bits = torch.int32 if inputs.h_0.element_size() == 4 else torch.int16
    inputs.h_0.view(bits)[0, row, unit] = -1
    assert inputs.h_0[0, row].isnan().sum() == 1
    with float32_matmuls(case.precision), emulated(case.emulation()):
        output, _, h_n, _, *gradients = layers.computed(case, inputs, "persistent", case.plans())
    watch.check_launches()
    others = [n for n in range(case.B) if n != row]
    assert output[:, row].isnan().all() and h_n[:, row].isnan().all()
    assert output[:, others].isfinite().all() and gradients[0][:, others].isfinite().all()


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "tf32", "fp32"])
def test_a_launch_that_lacks_a_program_ends_and_says_so(dtype, backward):
    """The others stop waiting after so many polls."""
    outcome = layers.run_without_a_program(replace(WAITING, dtype=dtype), backward)
    assert "timed out" in outcome.why and f"the {'backward' if backward else 'forward'} pass of 72 units" in outcome.why


def test_a_result_beyond_the_bound_is_seen(monkeypatch):
    """A test of the test: no error is small enough."""
    monkeypatch.setitem(layers.BOUND, "bf16", 1e-6)
    case = layers.Case("standard", "bf16", 1, 1, 16, stepwise=True)
    assert "beyond 1e-06: {'output'" in layers.run(case).wrong
