"""What a persistent launch is given, and what is refused before it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels import sequence_persistent
from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.order import Order
from lstm_triton_kernels.plan import ANY, Preference
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.regularize import NONE, KernelRules, Rules
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.spec import STANDARD, LSTMSpec

H100 = GPUS["h100"]
LAYER = Layer(STANDARD, 1024, 16, 768, 1, torch.bfloat16)
EXACT = LAYER._replace(dtype=torch.float32)
"""By the kernels in plain Triton; the other by those in Gluon."""
PLAN, EXACT_PLAN = (ranked_plans(layer, False, H100)[0] for layer in (LAYER, EXACT))


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
    alone = ranked_plans(EXACT._replace(H=32, B=8192), False, H100)[0]
    assert alone.alone and alone.programs > 132
    assert sequence_persistent.grid(alone, torch.device("cuda"))[1] == alone.programs


@pytest.mark.parametrize("together", [1, 2])
def test_as_many_programs_are_resident_as_share_the_multiprocessors(together, monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    plan = replace(PLAN, together=together, unit_programs=132, row_programs=together, directions=1)
    assert sequence_persistent.grid(plan, torch.device("cuda")) == (132, together, 1)
    with pytest.raises(RuntimeError, match=f"{133 * together} programs that wait for each other do not fit the 132"):
        sequence_persistent.grid(replace(plan, unit_programs=133), torch.device("cuda"))


def test_a_launch_on_a_lane_has_a_share_of_the_multiprocessors(monkeypatch):
    """It is planned for that, and refused beyond it."""
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    launch = sequence_persistent.launch_without_data(LAYER._replace(training=True), False)
    monkeypatch.setattr(sequence_persistent, "settled", lambda key, plans, *_: plans[0])
    for lanes in (0, 1, 2, 3):
        found = sequence_persistent.plan_of(launch._replace(lanes=lanes))
        assert found == ranked_plans(LAYER, False, replace(H100, multiprocessors=132 // max(lanes, 1)))[0]
        assert sequence_persistent.grid(found, torch.device("cuda"), lanes) == found.grid
    with pytest.raises(RuntimeError, match=r"96 programs .* do not fit the 66 multiprocessors of cuda that each of 2"):
        sequence_persistent.grid(PLAN, torch.device("cuda"), 2)


def test_results_are_written_where_they_are_given():
    """The others get new buffers."""
    layer = LAYER._replace(T=2, training=True)
    launch = sequence_persistent.launch_without_data(layer, False)
    given = {name: torch.empty(1) for name in ("output_ptr", "h_n_ptr", "c_n_ptr", "cells_ptr")}
    assert sequence_persistent.forward_results(launch._replace(results=given), PLAN).items() >= given.items()
    some = sequence_persistent.forward_results(launch._replace(results={"h_n_ptr": given["h_n_ptr"]}), PLAN)
    assert some["h_n_ptr"] is given["h_n_ptr"] and some["output_ptr"].shape == (2, 16, 1, 768)
    backward = sequence_persistent.launch_without_data(layer, True)
    given = {name: torch.empty(1) for name in ("d_gates_ptr", "dc_ptr")}
    assert sequence_persistent.backward_results(backward._replace(results=given), PLAN).items() >= given.items()


def test_a_preference_holds_inside_its_block():
    wanted = Preference(wait="counter")
    with sequence_persistent.prefer(wanted):
        assert sequence_persistent.preference() == wanted
        with pytest.raises(ZeroDivisionError), sequence_persistent.prefer(Preference(block_u=16)):
            assert sequence_persistent.preference().block_u == 16
            raise ZeroDivisionError
        assert sequence_persistent.preference() == wanted
    assert sequence_persistent.preference() == ANY


def launch_of(layer, backward, T=2):
    """A launch on the CPU, of zeros; forward it keeps every c_t."""
    layer = layer._replace(T=T)
    D, B, H, G = layer.D, layer.B, layer.H, layer.gates
    gates, w_hh = torch.zeros(D, T, B, G * H, dtype=layer.dtype), torch.zeros(D, G * H, H, dtype=layer.dtype)
    state = torch.zeros(D, B, H, dtype=layer.dtype)
    w_ch = torch.zeros(D, layer.matrices * H, H, dtype=layer.dtype) if layer.spec.full else None
    if not backward:
        return sequence_persistent.forward_launch(
            layer, gates, state, state, w_hh, None, w_ch, Order(T), save=True, save_gates=True
        )
    cells = torch.zeros(D, T + 1, B, H)
    given = (None, None, state, state, gates, cells)
    return sequence_persistent.backward_launch(layer, *given, w_hh, None, w_ch, Order(T))


def test_launches_with_other_rules_or_other_masks_are_others():
    """Which kernel is compiled depends on what there is of the rules."""
    rates = [Rules(*(0.25 * (n == one) for n in range(6))) for one in range(5)]
    asked = [(NONE, True), *itertools.product(rates, (True, False))]
    flags = [sequence_persistent.launch_without_data(LAYER, True, *one).flags for one in asked]
    evaluated = [(rule, draws) for rule, draws in asked if rule.evaluated() == NONE and not draws]
    assert len(evaluated) == 2  # without dropout steps are plain
    clips = 1  # nothing is drawn for it
    assert len(set(flags)) == len(asked) - len(evaluated) - clips
    projected = LAYER._replace(P=100)
    forward, backward = (
        sequence_persistent.launch_without_data(projected, side, Rules(proj_clip=0.5)).inputs["rules"]
        for side in (False, True)
    )
    assert forward.clipped is None and backward.clipped.shape == (1, 2, 16, 100) and backward.proj_clip == 0.5


@pytest.mark.parametrize("changed", [dict(), dict(P=100), dict(dtype=torch.float32)], ids=str)
def test_zoneout_of_h_has_a_gradient_of_h_0_of_its_own(changed):
    layer, rules = LAYER._replace(**changed), Rules(zoneout_h=0.5)
    plan = ranked_plans(layer, True, H100)[0]
    launches = [sequence_persistent.launch_without_data(layer, True, some) for some in (NONE, rules)]
    plain, zoned = (sequence_persistent.backward_results(launch, plan)["d_h_0_ptr"] for launch in launches)
    assert plain is None and zoned.shape == (1, 16, layer.hidden) and zoned.dtype == torch.float32


def test_what_zoneout_adds_up_is_zero_before_where_programs_have_several_row_blocks():
    plan = replace(PLAN, row_blocks=2 * PLAN.row_programs)
    launch = launch_of(LAYER, True)._replace(
        inputs=launch_of(LAYER, True).inputs | dict(rules=KernelRules(zoneout_h=0.5))
    )
    assert plan.blocks_per_program > 1 and not sequence_persistent.backward_results(launch, plan)["d_h_0_ptr"].any()


@pytest.mark.parametrize("wait, counters", [("counter", 2 * 3 * 32), ("data", 1)])
def test_every_row_block_and_direction_has_a_counter_on_a_line_of_its_own(wait, counters):
    plan = replace(EXACT_PLAN, wait=wait, directions=2, row_blocks=3)
    arguments = launch_of(EXACT, False).arguments(plan)
    assert arguments["counters_ptr"].numel() == counters
    assert wait == "data" or not arguments["counters_ptr"].any()
    assert arguments["launch_cooperative_grid"] and arguments["error_ptr"].data_ptr() % 16 == 0


EXCHANGED = [
    (dict(), False), (dict(), True), (dict(H=501, D=2, B=40), False), (dict(H=501, D=2, B=40), True),
    (dict(H=130, spec=LSTMSpec(peephole="full")), False), (dict(H=130, spec=LSTMSpec(coupled=True)), True),
    (dict(H=501, dtype=torch.float32, precision="tf32"), False), (dict(H=16, B=8192), False),
    (dict(H=1, B=1), False), (dict(H=1, B=1), True),
]  # fmt: skip


def published_columns(layer, backward):
    """The columns of a row that programs publish, written out: gates backward; h, and with a full peephole c."""
    return (layer.gates if backward else 2 if layer.spec.full else 1) * (layer.H + -layer.H % 8)


@pytest.mark.parametrize("changed, backward", EXCHANGED, ids=str)
def test_what_a_kernel_in_gluon_is_given_of_a_plan(changed, backward):
    layer = LAYER._replace(**changed)
    for plan in ranked_plans(layer, backward, H100)[:4]:
        arguments = launch_of(layer, backward, T=3).arguments(plan)
        exchange = arguments["exchange_ptr"]  # a slot for every step, and one for the initial state
        rows = plan.block_b if plan.tiled else plan.rows
        assert exchange.shape == (layer.D, 4, plan.row_blocks, rows * plan.columns)
        assert exchange.dtype == layer.dtype
        assert arguments["PIECES"] * plan.group == arguments["CHUNKS"] == plan.chunks
        assert (arguments["KEPT"], arguments["ROWS"], arguments["UNITS"]) == (plan.kept, plan.block_b, plan.block_u)
        assert arguments["WARPS"] == arguments["num_warps"] == plan.num_warps and arguments["TILED"] == plan.tiled
        assert arguments["PARTS"] == plan.parts and arguments["PRECISION"] == layer.precision
        assert (arguments["rows"], arguments["row_blocks"], arguments["pause"]) == (
            plan.rows,
            plan.row_blocks,
            plan.pause,
        )
        assert arguments["launch_cooperative_grid"] and arguments["error_ptr"].data_ptr() % 16 == 0
        assert 32 * plan.num_warps * plan.together * arguments["maxnreg"] <= 65_536
        assert "counters_ptr" not in arguments


@pytest.mark.parametrize("tiled", [True, False])
@pytest.mark.parametrize("changed, backward", EXCHANGED, ids=str)
def test_what_no_program_publishes_is_zero_and_all_else_missing(changed, backward, tiled):
    """So that products with it are zero, and a reader waits for all others."""
    layer = LAYER._replace(**changed)
    for plan in ranked_plans(layer, backward, H100)[:4]:
        plan = replace(plan, tiled=tiled)
        exchange = launch_of(layer, backward).arguments(plan)["exchange_ptr"]
        V = 16 // layer.element_bytes
        rows = plan.block_b if tiled else plan.rows
        row, column = torch.arange(rows)[:, None], torch.arange(plan.columns)[None, :]
        if tiled:  # as polling.py says
            place = row // 8 * (8 * plan.columns) + column // V * (8 * V) + row % 8 * V + column % V
        else:
            place = row * plan.columns + column
        assert sorted(place.flatten().tolist()) == list(range(rows * plan.columns))
        bits = exchange.view(torch.int16 if layer.element_bytes == 2 else torch.int32)[..., place]
        published = (column < published_columns(layer, backward)).expand(rows, -1)
        assert torch.equal(bits == -1, published.expand_as(bits)) and set(bits.unique().tolist()) <= {-1, 0}, plan


@pytest.mark.parametrize("layer", [LAYER, EXACT], ids=lambda layer: layer.rate)
@pytest.mark.parametrize("backward", [False, True])
def test_a_launch_runs_on_the_plan_that_is_settled_by_compiling_it(layer, backward, monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    compiled = []

    def usage_on_device(kernel, grid, arguments):
        compiled.append((kernel, grid, arguments.get("BLOCK_U", arguments.get("UNITS"))))

    def settled(key, plans, usage_of, device):
        for plan in plans[:2]:
            usage_of(plan)
        return plans[1]

    monkeypatch.setattr(sequence_persistent, "usage_on_device", usage_on_device)
    monkeypatch.setattr(sequence_persistent, "settled", settled)
    launch = sequence_persistent.launch_without_data(layer, backward)
    plans = ranked_plans(layer, backward, H100)
    assert sequence_persistent.plan_of(launch) == plans[1]
    kernels = {
        (True, False): sequence_persistent.persistent_forward_kernel,
        (True, True): sequence_persistent.persistent_backward_kernel,
        (False, False): sequence_persistent.exchanged_forward_kernel,
        (False, True): sequence_persistent.exchanged_backward_kernel,
    }
    assert compiled == [(kernels[layer.exact, backward], plan.grid, plan.block_u) for plan in plans[:2]]


def test_a_launch_without_a_plan_is_refused(monkeypatch):
    monkeypatch.setattr(sequence_persistent, "gpu_of", lambda device: H100)
    launch = sequence_persistent.launch_without_data(LAYER._replace(H=5000), False)
    with pytest.raises(RuntimeError, match="strategy 'persistent' cannot run here: "):
        sequence_persistent.plan_of(launch)
