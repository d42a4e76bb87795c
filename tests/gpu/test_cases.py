"""Without a GPU: the cases that the tests beside this are given are what they are said to be on an H100."""

from __future__ import annotations

import pytest
from lstm_triton_kernels.gpus import GPUS

from lstm_triton import VARIANTS, LSTMSpec, routing
from tests.gpu import test_parity as parity
from tests.support.gpu import SERVED, TYPES, Pass
from tests.support.parity import call, random_inputs

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from dataclasses import replace

from tests.gpu import test_persistent as persistent


def test_parity_has_every_variant_shape_and_type_and_the_persistent_kernels_of_those_that_have_them():
    cases = [parameters.values for parameters in parity.cases()]
    stepwise = [(precision, case) for precision, case in cases if case.strategy == "stepwise"]
    assert len(stepwise) == len(set(stepwise)) == len(VARIANTS) * len(parity.SHAPES) * len(TYPES)
    auto = {(case.spec, case.H, case.cell, case.proj_size > 0) for _, case in cases if case.strategy == "auto"}
    shapes = [s for s in parity.SHAPES.values() if not s.get("cell") and not s.get("proj_size") and s["T"] > 1]
    assert auto == {(spec, shape["H"], False, False) for spec in SERVED for shape in shapes}


def test_each_shape_has_the_plan_that_it_is_for():
    """By one wait at least; but for the full peephole of 64 units, which does not fit the registers of one program."""
    found = {(case.spec, case.H, case.B, case.T, precision)
             for precision, case, _ in (parameters.values for parameters in persistent.cases())}  # fmt: skip
    shapes = {**persistent.TOGETHER, **persistent.ALONE}.values()
    every = {(spec, shape["H"], shape["B"], shape["T"], precision)
             for spec in SERVED for shape in shapes for precision in persistent.SERVED_TYPES}  # fmt: skip
    alone = [shape for shape in persistent.ALONE.values() if shape["H"] == 64]
    assert every - found == {
        (LSTMSpec(peephole="full"), shape["H"], shape["B"], shape["T"], precision)
        for shape in alone for precision in persistent.SERVED_TYPES
    }  # fmt: skip
    for parameters in persistent.cases():
        precision, case, wanted = parameters.values
        for plans in persistent.plans(case, precision, wanted, GPUS["h100"]):
            assert not isinstance(plans, str), f"{parameters.id}: {plans}"
            assert all(plan.alone == (wanted.wait is None) for plan in plans)
            assert plans[0].blocks_per_program > 1 or wanted.block_b is None


def test_the_other_tests_have_plans_too():
    waiting = [(case, wait) for case in (persistent.ODD, *persistent.PAIR) for wait in persistent.WAITS]
    for case, wait in [*waiting, (replace(persistent.ODD, H=64), None)]:
        assert not persistent.no_plan(case, "bfloat16", persistent.preference(wait, case.H))
    for spec in SERVED:
        for precision, dtype in persistent.SERVED_TYPES.items():
            case = replace(persistent.ODD, spec=spec, dtype=dtype, H=130, bidirectional=True)
            for wait in persistent.WAITS:
                assert not persistent.no_plan(case, precision, persistent.preference(wait, 130))
            assert dtype != persistent.ODD.dtype or not persistent.no_plan(
                replace(case, H=500), precision, persistent.preference("data", 500)
            )


def test_the_tensors_of_each_shape_can_be_made():
    """On the CPU; the small ones are computed there, too."""
    shapes = {**persistent.TOGETHER, **persistent.ALONE}
    for sizes in shapes.values():
        case = replace(persistent.ODD, device="cpu", strategy="auto", **sizes)
        assert all(tensor.device.type == "cpu" for tensor in random_inputs(case).values())
        if case.H <= 130 and case.B < 100:
            found = Pass(case, call)()
            assert {"output", "h_n", "c_n", "grad x", "grad weight_hh_l0"} <= set(found)
