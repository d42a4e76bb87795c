"""Without a GPU: the cases that the tests beside this are given are what they are said to be on an H100."""

from __future__ import annotations

import itertools

import pytest
from lstm_triton_kernels.gpus import GPUS, KIB
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer

from lstm_triton import VARIANTS, LSTMSpec, routing
from tests.gpu import test_parity as parity
from tests.support.gpu import TYPES, Pass
from tests.support.parity import call, random_inputs

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from dataclasses import replace

from tests.gpu import test_persistent as persistent
from tests.support import small_launches

STANDARD = LSTMSpec()


def test_parity_has_every_variant_shape_and_type_and_the_persistent_kernels_of_those_that_have_them():
    cases = [parameters.values for parameters in parity.cases()]
    stepwise = [(precision, case) for precision, case in cases if case.strategy == "stepwise"]
    assert len(stepwise) == len(set(stepwise)) == len(VARIANTS) * len(parity.SHAPES) * len(TYPES)
    auto = {(case.spec, case.H, case.cell, case.proj_size > 0) for _, case in cases if case.strategy == "auto"}
    shapes = [s for s in parity.SHAPES.values() if not s.get("cell") and s["T"] > 1]
    assert auto == {(spec, shape["H"], False, shape.get("proj_size", 0) > 0) for spec in VARIANTS for shape in shapes}


def test_each_shape_has_the_plan_that_it_is_for():
    """By one wait at least; but in exact float32 for the full peephole of 64 units, which does not fit the registers of
    one program, for those of 900 units, which do not fit the shared memory of all, for those of 768 units that read
    c_t, and for all of 2,600 units; and in TF32 for V_o of 2,600 units.
    """
    found = {(case.spec, case.H, case.B, case.T, precision)
             for precision, case, _ in (parameters.values for parameters in persistent.cases())}  # fmt: skip
    shapes = {**persistent.TOGETHER, **persistent.ALONE}.values()
    every = {(spec, shape["H"], shape["B"], shape["T"], precision)
             for spec in VARIANTS for shape in shapes for precision in persistent.SERVED_TYPES}  # fmt: skip
    alone = [shape for shape in persistent.ALONE.values() if shape["H"] == 64]
    current = LSTMSpec(peephole="full", output_peephole="current")
    without = [(spec, shape) for spec in (LSTMSpec(peephole="full"), current) for shape in alone]
    without.append((current, persistent.TOGETHER["anchor"]))
    without += [(spec, persistent.TOGETHER["many units"]) for spec in VARIANTS if spec.full]
    without += [(spec, persistent.TOGETHER["weights beyond the chip"]) for spec in VARIANTS]
    beyond = persistent.TOGETHER["weights beyond the chip"]
    lacking = [(*of_shape, persistent.EXACT) for of_shape in without]
    lacking += [(spec, beyond, "float32 tf32") for spec in (current, replace(current, coupled=True))]
    assert every - found == {(spec, s["H"], s["B"], s["T"], precision) for spec, s, precision in lacking}
    for parameters in persistent.cases():
        precision, case, wanted = parameters.values
        for plans in persistent.plans(case, precision, wanted, GPUS["h100"]):
            assert not isinstance(plans, str), f"{parameters.id}: {plans}"
            assert all((plan.unit_programs == 1) == (wanted.wait is None) for plan in plans)
            assert all(plan.exact == (precision == persistent.EXACT) for plan in plans)
            assert wanted.block_b is None or all(plan.blocks_per_program > 1 for plan in plans)


def test_the_kernels_in_gluon_have_plans_of_all_kinds():
    found = {False: [], True: []}
    for parameters in persistent.cases():
        precision, case, wanted = parameters.values
        plans = persistent.plans(case, precision, wanted, GPUS["h100"])
        for backward, ranked in enumerate(plans if precision != persistent.EXACT else ()):
            found[bool(backward)].append(ranked[0])
    for plans in found.values():
        assert {plan.together for plan in plans} == {1, 2}
        assert {plan.block_b for plan in plans if plan.parts == plan.num_warps} == {8, 16}
        assert {8, 16, 32} <= {plan.block_u for plan in plans} <= {8, 16, 32, 64} and {
            plan.num_warps for plan in plans
        } >= {2, 4, 8}
        assert {(plan.kept > 0, plan.kept == plan.chunks) for plan in plans} >= {(False, False), (True, False)}
        assert {plan.blocks_per_program > 1 for plan in plans} == {False, True}
        assert {plan.unit_programs > 1 for plan in plans} == {False, True}
    assert {plan.group < plan.chunks for plan in found[True]} == {False, True}
    assert {plan.tiled for plan in found[True]} == {False, True}
    for plans in found.values():
        assert any(plan.parts < plan.num_warps for plan in plans)
        assert {plan.streamed > 0 for plan in plans} == {False, True}


def test_the_other_tests_have_plans_too():
    for case in (persistent.ODD, *persistent.PAIR):
        for precision, wait in persistent.WITH_ALONE:
            on_way, wanted = persistent.of_way(case, precision, wait)
            assert on_way.dtype == TYPES[precision]
            for plans in persistent.plans(on_way, precision, wanted, GPUS["h100"]):
                assert not isinstance(plans, str), plans
                assert all((plan.unit_programs == 1) == (wait is None) for plan in plans)
                assert wait is None or {plan.wait for plan in plans} == {wait}
    for spec in VARIANTS:
        for precision, dtype in persistent.SERVED_TYPES.items():
            case = replace(persistent.ODD, spec=spec, dtype=dtype, H=130, bidirectional=True)
            for wait in persistent.WAITS[precision]:
                assert not persistent.no_plan(case, precision, persistent.preference(precision, wait, 130))
            few = replace(case, spec=STANDARD, H=persistent.FEW_UNITS[precision])
            assert not persistent.no_plan(few, precision, persistent.preference(precision, None, few.H))
        for precision, wait in persistent.WAYS:
            odd, wanted = persistent.of_way(replace(persistent.ODD, spec=spec), precision, wait)
            assert not persistent.no_plan(odd, precision, wanted)


def test_two_programs_of_a_pair_do_not_fit_one_multiprocessor():
    """Nor do all programs of both launches fit an H100 otherwise."""

    def first_plans(case, precision, wait):
        on_way, wanted = persistent.of_way(case, precision, wait)
        return [plans[0] for plans in persistent.plans(on_way, precision, wanted, GPUS["h100"])]

    def registers(plan):
        """At least."""
        return 32 * plan.num_warps * (64 + (0 if plan.exact else plan.register_bytes // 4))

    for one, other in itertools.combinations_with_replacement(persistent.WAYS, 2):
        plans = [first_plans(case, *way) for case, way in zip(persistent.PAIR, (one, other), strict=True)]
        for first, second in itertools.product(*plans):
            assert first.programs + second.programs > 132
            shared = first.shared_bytes + second.shared_bytes + 2 * KIB
            assert shared > 228 * KIB or registers(first) + registers(second) > 65_536


@pytest.mark.parametrize("way", small_launches.SIZES)
def test_every_small_launch_has_the_plan_that_it_is_for(way):
    exact = set()
    for (dtype, precision), variant in itertools.product(small_launches.TYPES[way], small_launches.VARIANTS):
        layer = Layer(
            LSTMSpec(**variant), small_launches.T, small_launches.B, small_launches.SIZES[way], 2, dtype, precision
        )
        for backward in (False, True) if way != "stepwise" else ():
            plans = ranked_plans(layer, backward, GPUS["h100"], small_launches.PREFERENCES[way])
            assert not isinstance(plans, str), plans
            assert {plan.unit_programs == 1 for plan in plans} == {way == "alone"}
            assert way == "alone" or {plan.wait for plan in plans} == {way}
            exact |= {plan.exact for plan in plans}
    assert exact == {"counter": {True}, "stepwise": set()}.get(way, {False, True})


def test_the_tensors_of_each_shape_can_be_made():
    """On the CPU; the small ones are computed there, too."""
    shapes = {**persistent.TOGETHER, **persistent.ALONE}
    for sizes in shapes.values():
        case = replace(persistent.ODD, device="cpu", strategy="auto", **sizes)
        assert all(tensor.device.type == "cpu" for tensor in random_inputs(case).values())
        if case.H <= 130 and case.B < 100:
            found = Pass(case, call)()
            assert {"output", "h_n", "c_n", "grad x", "grad weight_hh_l0"} <= set(found)
