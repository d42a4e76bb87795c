"""What a persistent launch is given, and what is refused before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.plan import ANY, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import STANDARD

H100 = GPUS["h100"]
LAYER = Layer(STANDARD, 1024, 16, 768, 1, torch.bfloat16)
PLAN = ranked_plans(LAYER, False, H100)[0]


def test_the_grid_is_units_rows_and_directions(monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    both = ranked_plans(LAYER._replace(D=2, B=40), False, H100)[0]
    assert sequence_persistent.grid(PLAN, torch.device("cuda")) == (48, 2, 1)
    assert sequence_persistent.grid(both, torch.device("cuda")) == (both.unit_programs, both.row_programs, 2)


def test_programs_that_could_not_all_be_resident_are_refused_before_the_launch(monkeypatch):
    """A plan of another GPU, say."""
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: GPUS["l4"])
    with pytest.raises(RuntimeError, match="96 programs that wait for each other do not fit the 58 multiprocessors"):
        sequence_persistent.grid(PLAN, torch.device("cuda"))
    alone = ranked_plans(LAYER._replace(H=64, B=2000), False, H100)[0]
    assert alone.alone and alone.programs > 58
    assert sequence_persistent.grid(alone, torch.device("cuda"))[1] == alone.programs


def test_a_preference_holds_inside_its_block():
    wanted = Preference(wait="counter")
    with sequence_persistent.prefer(wanted):
        assert sequence_persistent.preference() == wanted
        with pytest.raises(ZeroDivisionError), sequence_persistent.prefer(Preference(block_u=16)):
            assert sequence_persistent.preference().block_u == 16
            raise ZeroDivisionError
        assert sequence_persistent.preference() == wanted
    assert sequence_persistent.preference() == ANY


@pytest.mark.parametrize("wait, counters", [("counter", 2 * 3 * 32), ("data", 1)])
def test_every_row_block_and_direction_has_a_counter_on_a_line_of_its_own(wait, counters):
    plan = replace(PLAN, wait=wait, directions=2, row_blocks=3)
    arguments = sequence_persistent.common_arguments(LAYER, plan, Order(5), torch.device("cpu"), "a pass")
    assert arguments["counters_ptr"].numel() == counters
    assert wait == "data" or not arguments["counters_ptr"].any()
    assert arguments["launch_cooperative_grid"] and arguments["error_ptr"].data_ptr() % 16 == 0


def test_a_launch_runs_on_the_plan_that_is_settled_by_compiling_it(monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    compiled = []

    def usage_on_device(kernel, grid, arguments):
        compiled.append((kernel, grid, arguments["BLOCK_U"]))

    def settled(key, plans, usage_of, device):
        for plan in plans[:2]:
            usage_of(plan)
        return plans[1]

    monkeypatch.setattr(sequence_persistent, "usage_on_device", usage_on_device)
    monkeypatch.setattr(sequence_persistent, "settled", settled)
    launch = sequence_persistent.launch_without_data(LAYER, False)
    monkeypatch.setattr(sequence_persistent, "common_arguments", lambda layer, plan, *_: dict(BLOCK_U=plan.block_u))
    plans = ranked_plans(LAYER, False, H100)
    assert sequence_persistent.plan_of(launch) == plans[1]
    assert compiled == [(launch.kernel, plan.grid, plan.block_u) for plan in plans[:2]]


def test_a_launch_without_a_plan_is_refused(monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    launch = sequence_persistent.launch_without_data(LAYER._replace(H=5000), False)
    with pytest.raises(RuntimeError, match="strategy 'persistent' cannot run here: "):
        sequence_persistent.plan_of(launch)
