"""The kernels as compiled for sm_90, and some for sm_80, executed: every result and gradient against the reference.

The checks of the emulator see each access to memory: none outside of a tensor, none to what nobody wrote, no race.
"""

import pytest
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from lstm_triton import VARIANTS
from tests.compiled import cases, layers
from tests.support.persistent import SERVED

QUICK = list(cases.quick())


def long_cases():
    for group, members in cases.GROUPS.items():
        for case in members():
            yield pytest.param(case, id=f"{group}: {case}", marks=pytest.mark.long)


@pytest.mark.parametrize("case", [*(pytest.param(case, id=str(case)) for case in QUICK), *long_cases()])
def test_a_compiled_kernel_computes_what_the_reference_does(case):
    assert not layers.run(case).wrong


def test_the_quick_selection_has_a_case_of_everything():
    """What the long list varies, the quick one varies too."""
    together = [case for case in QUICK if case.wait and not case.own_plans]
    stepwise = [case for case in QUICK if case.stepwise]
    for spec in SERVED:
        assert {case.wait for case in together if case.variant == spec.name} == {"data", "counter"}
        alone = [case for case in QUICK if case.variant == spec.name and not (case.wait or case.stepwise)]
        assert any(case.plan(False).alone and case.plan(True).alone for case in alone)
    assert {case.variant for case in stepwise} == {spec.name for spec in VARIANTS}
    for some in (together, stepwise, [case for case in QUICK if case.capability == 80]):
        assert {case.dtype for case in some} == set(layers.DTYPES)
    for flag in ("lengths", "resets"):
        for wait in ("data", "counter"):
            assert any(getattr(case, flag) and case.wait == wait for case in QUICK)
    assert {(case.wait, case.D) for case in together} == {("data", 1), ("data", 2), ("counter", 1), ("counter", 2)}
    assert {case.wait for case in QUICK if case.weak} == {"data", "counter"}
    shared = [case for case in QUICK if case.own_plans]
    assert {(case.wait, case.own_plans.forward.blocks_per_program > 1) for case in shared} == {
        (wait, several) for wait in ("data", "counter") for several in (False, True)
    }
    assert all(case.plan(side).unit_programs > 1 for case in together for side in (False, True))
    assert (False, True, False, False) in {case.gradients for case in QUICK}


def test_a_result_beyond_the_bound_is_seen(monkeypatch):
    """A test of the test: no error is small enough."""
    monkeypatch.setitem(layers.BOUND, "bf16", 1e-6)
    case = layers.Case("standard", "bf16", 1, 1, 16, stepwise=True)
    assert "beyond 1e-06: {'output'" in layers.run(case).wrong
