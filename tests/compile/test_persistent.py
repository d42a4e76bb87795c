"""Every plan that the planner emits at the suites' shapes for the GPUs of the table: compiled, and what came out.

Hundreds of kernels take longer to compile than a test run may: `make plans` compiles all of them and writes down what
each needs (tests/data/plans-<release>.json); here the record is held against the planner, and a part of it is compiled
again and must come out as recorded: every tile once, every other one under the oldest release of Triton and the others
under the newer. Under a release without a record the same must fit and keep their weights; which of them spill is not
known beforehand.
"""

from __future__ import annotations

import pytest
import triton
from lstm_triton_kernels.gates import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from lstm_triton_kernels.persistent_plan import installed_release

from tests.support import plans
from tests.support.compiling import SHARED_MEMORY_LIMIT, compile_launch

RELEASES = ("3.6", "3.8")
"""The oldest that is supported, and the one that CI pins."""

PARTS = 8


def chosen() -> list[plans.Emitted]:
    """Of every other pass and tile one kernel, those of its kind taking turns over capability, variant and type."""
    found: dict[tuple, list[plans.Emitted]] = {}
    for one, _ in plans.emitted(installed_release()).values():
        found.setdefault((one.backward, one.plan.key), []).append(one)
    chosen = [kin[number % len(kin)] for number, kin in enumerate(found.values())]
    turn = RELEASES.index(installed_release()) if installed_release() in RELEASES else 0
    return chosen[turn :: len(RELEASES)]


def test_the_installed_release_is_known_and_the_supported_ones_are_recorded():
    assert installed_release() == ".".join(triton.__version__.split(".")[:2])
    assert set(plans.releases()) >= set(RELEASES)


def check(one, plan, result):
    """A kernel fits, keeps its weights on the chip, and uses the tensor cores where there are some."""
    name = str(one)
    assert result["shared"] <= plan.shared_bytes <= SHARED_MEMORY_LIMIT[one.capability], name
    assert result["registers"] * 32 * plan.num_warps <= 65536, name
    assert result["resident"], name
    assert bool(result["tensor_core"]) != (one.rate == "float32"), name


@pytest.mark.parametrize("release", RELEASES)
def test_every_plan_fits_hardly_spills_and_keeps_its_weights(release):
    record = plans.read_record(release)
    assert record, f"{plans.record_path(release).name} is of other kernels: run `make plans`"
    for name, (one, plan) in plans.emitted(release).items():
        assert record[name]["stack"] <= plans.MOST_STACK, name
        check(one, plan, record[name])


@pytest.mark.parametrize("part", range(PARTS))
def test_a_part_comes_out_as_recorded(part):
    record = plans.read_record(installed_release()) if installed_release() in RELEASES else None
    some = chosen()[part::PARTS]
    assert some
    for one in some:
        if record is None:
            check(one, one.plan, plans.compiled(one))
        else:
            assert plans.compiled(one) == record[str(one)], str(one)


def test_programs_that_wait_are_launched_together():
    waiting = {one.plan.wait: one for one in chosen()}
    assert set(waiting) == {None, "counter", "data"}
    for wait, one in waiting.items():
        launch = plans.launch_of(one)
        compiled = compile_launch(plans.KERNELS[launch.kernel], launch, one.capability)
        assert compiled.cooperative == (wait is not None)


def test_weights_that_are_loaded_in_the_loop_are_seen():
    """A test of the test: the operands of the products swapped."""
    one = next(one for one in chosen() if one.plan.wait == "data" and one.rate == "bfloat16")
    launch = plans.launch_of(one)
    ttgir = compile_launch(plans.KERNELS[launch.kernel], launch, one.capability).ttgir
    assert plans.weights_stay(ttgir)
    swapped = ttgir.replace("tt.dot ", "tt.dot %none, ")
    assert not plans.weights_stay(swapped)
