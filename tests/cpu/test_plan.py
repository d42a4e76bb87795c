"""How a persistent launch is cut into programs: every plan there may be, against what the kernels assume."""

import dataclasses
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lstm_triton_kernels import gpus, planner
from lstm_triton_kernels.float32_plan import MOST_CHUNKS, exchanged_bytes
from lstm_triton_kernels.gpus import GPU, GPUS, INTERPRETER, KIB, gpu_of, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.plan import ANY, PersistentPlan, Preference
from lstm_triton_kernels.planner import PERSISTENT_DTYPES, WAITING_MARGIN, candidates, ranked_plans, why_not
from lstm_triton_kernels.sizes import Layer

from lstm_triton import VARIANTS, LSTMSpec
from tests.support.persistent import SERVED

H100 = GPUS["h100"]
STANDARD, COUPLED = LSTMSpec(), LSTMSpec(coupled=True)
ANCHOR = Layer(STANDARD, 1024, 16, 768, 1, torch.bfloat16)

layers = st.builds(
    Layer,
    spec=st.sampled_from(SERVED), T=st.integers(1, 1000),
    B=st.one_of(st.integers(1, 64), st.integers(1, 5000)),
    H=st.one_of(st.integers(1, 140), st.integers(1, 1100), st.integers(1, 5000)), D=st.sampled_from((1, 2)),
    dtype=st.sampled_from(PERSISTENT_DTYPES), precision=st.sampled_from(("ieee", "tf32")), I=st.just(0), P=st.just(0),
    training=st.booleans(), ragged=st.booleans(),
)  # fmt: skip
passes = st.booleans()
machines = st.sampled_from((*GPUS.values(), INTERPRETER))
thorough = settings(max_examples=250, deadline=None, derandomize=True)


def units_of(plan: PersistentPlan, part: int, H: int) -> list[int]:
    """The units that programs with this first index own: the kernels' `unit`, masked."""
    return [unit for n in range(plan.block_u) if (unit := part * plan.block_u + n) < H]


def row_blocks_of(plan: PersistentPlan, group: int) -> list[int]:
    """The row blocks that programs with this second index work through, by the time loop's arithmetic."""
    blocks = 1 if plan.blocks_per_program == 1 else -(-(plan.row_blocks - group) // plan.row_programs)
    return [group + n * plan.row_programs for n in range(blocks)]


def rows_of(plan: PersistentPlan, block: int, B: int) -> list[int]:
    """The batch rows of a row block, as in `rows_of_block`."""
    return [row for n in range(plan.block_b) if n < plan.rows and (row := block * plan.rows + n) < B]


def broken_rules(plan: PersistentPlan, layer: Layer, backward: bool, gpu: GPU) -> list[str]:
    """What the kernels and the GPU demand, and the plan does not keep."""
    sizes = (plan.block_u, plan.block_b, plan.block_k, plan.parts, plan.num_warps)
    chunk = plan.parts * plan.block_k
    columns = plan.chunks * chunk
    needed = layer.H * layer.gates if backward and not plan.alone else layer.H
    weights = plan.block_u * layer.H * (layer.gates + layer.matrices) * layer.element_bytes
    rules = {
        "powers of two": all(size == 2 ** round(math.log2(size)) for size in sizes),
        "large enough for a product": plan.block_k >= 16 and min(plan.block_b, plan.block_u) >= 8,
        "columns": needed <= columns < needed + chunk,
        "group": 1 <= plan.group <= plan.chunks <= MOST_CHUNKS and plan.chunks % plan.group == 0,
        "warps": 1 <= plan.num_warps <= 8
        and plan.parts in ((1,) if plan.alone else [n * plan.num_warps for n in (1, 2, 4)]),
        "shared memory": weights <= plan.tile_bytes < plan.shared_bytes <= gpu.shared_bytes,
        "resident": plan.alone or plan.programs <= gpu.multiprocessors,
        "directions": plan.directions == layer.D,
        "waits": plan.wait in ("counter", "data") if plan.unit_programs > 1 else plan.wait is None,
        "no idle program": plan.row_programs <= plan.row_blocks and (plan.unit_programs - 1) * plan.block_u < layer.H,
        # Fewer elements than threads are loaded by several, see `sync.any_missing`; words have two elements.
        "elements for all threads": plan.alone or plan.block_b * chunk // 2 >= 32 * plan.num_warps,
        "pause": (plan.pause > 0) == (plan.wait == "data" and plan.blocks_per_program == 1),
        "exact": plan.exact == (layer.dtype == torch.float32 and layer.precision == "ieee"),
        "estimate": 0 < plan.estimate_us < math.inf,
    }
    return [rule for rule, kept in rules.items() if not kept]


@thorough
@given(layers, passes, machines)
def test_every_unit_and_every_row_has_exactly_one_program(layer, backward, gpu):
    for plan in candidates(layer, backward, gpu):
        units = [unit for part in range(plan.unit_programs) for unit in units_of(plan, part, layer.H)]
        assert sorted(units) == list(range(layer.H)), plan
        blocks = [block for group in range(plan.row_programs) for block in row_blocks_of(plan, group)]
        assert sorted(blocks) == list(range(plan.row_blocks)), plan
        rows = [row for block in blocks for row in rows_of(plan, block, layer.B)]
        assert sorted(rows) == list(range(layer.B)), plan
        assert all(rows_of(plan, block, layer.B) for block in blocks), f"an empty block of rows: {plan}"


@thorough
@given(layers, passes, machines)
def test_the_loops_over_row_blocks_agree(layer, backward, gpu):
    """The initial states are published by a `range` with a step; the time loop counts iterations."""
    for plan in candidates(layer, backward, gpu):
        by_group = [list(range(group, plan.row_blocks, plan.row_programs)) for group in range(plan.row_programs)]
        assert by_group == [row_blocks_of(plan, group) for group in range(plan.row_programs)]
        assert plan.blocks_per_program == max(map(len, by_group))


@thorough
@given(layers, passes, machines)
def test_every_candidate_keeps_within_the_limits(layer, backward, gpu):
    for plan in candidates(layer, backward, gpu):
        assert not broken_rules(plan, layer, backward, gpu), plan


def test_a_broken_rule_is_seen():
    """Test of the test: a plan that is wrong in one field breaks a rule."""
    plan = ranked_plans(ANCHOR, False, H100, Preference("data", block_u=8, block_b=16))[0]
    assert not broken_rules(plan, ANCHOR, False, H100)
    wrong = [
        dict(block_u=12), dict(block_k=8), dict(chunks=2), dict(chunks=4), dict(group=2), dict(num_warps=16),
        dict(shared_bytes=48 * KIB), dict(shared_bytes=228 * KIB), dict(row_programs=2), dict(directions=2),
        dict(unit_programs=133), dict(wait=None), dict(exact=True), dict(estimate_us=math.inf), dict(pause=0),
        dict(wait="counter"), dict(block_b=8, parts=1, block_k=16),
    ]  # fmt: skip
    for fields in wrong:
        assert broken_rules(replace(plan, **fields), ANCHOR, False, H100), fields


@thorough
@given(layers, passes, machines)
def test_all_candidates_are_ranked_by_their_estimate_each_time(layer, backward, gpu):
    plans, every = ranked_plans(layer, backward, gpu), list(candidates(layer, backward, gpu))
    if isinstance(plans, str):
        assert not every and "MiB" in plans
    else:
        assert sorted(plans, key=repr) == sorted(every, key=repr)
        estimates = [plan.estimate_us * (1 if plan.alone else WAITING_MARGIN) for plan in plans]
        assert estimates == sorted(estimates)
    planner._ranked_plans.cache_clear()
    assert ranked_plans(layer._replace(T=7, I=3, training=True), backward, gpu) == plans


@thorough
@given(layers, passes, machines)
def test_a_larger_gpu_never_loses_a_plan(layer, backward, gpu):
    assume(any(candidates(layer, backward, gpu)))
    for more in (dict(multiprocessors=2 * gpu.multiprocessors), dict(shared_bytes=gpu.shared_bytes + 64 * KIB)):
        assert any(candidates(layer, backward, replace(gpu, **more))), more


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", PERSISTENT_DTYPES, ids=str)
def test_no_size_below_one_that_fits_is_left_out(dtype, backward):
    """An H100 has room for 1024 units in every type; so it has for fewer."""
    layer = ANCHOR._replace(dtype=dtype, precision="tf32")
    without = [H for H in range(1, 1025) if not any(candidates(layer._replace(H=H), backward, H100))]
    assert not without, f"{len(without)} sizes from {without[0]} to {without[-1]}"


preferences = st.builds(
    Preference,
    wait=st.sampled_from((None, "counter", "data")),
    block_u=st.sampled_from((None, 8, 16, 32, 64)),
    block_b=st.sampled_from((None, 16, 32)),
)


@thorough
@given(layers, passes, machines, preferences)
def test_a_preference_is_honoured_or_refused(layer, backward, gpu, preference):
    plans = ranked_plans(layer, backward, gpu, preference)
    wanted = {name: value for name, value in dataclasses.asdict(preference).items() if value is not None}
    as_wanted = [
        p for p in candidates(layer, backward, gpu) if all(getattr(p, name) == value for name, value in wanted.items())
    ]
    if isinstance(plans, str):
        assert not as_wanted
        assert preference == ANY or repr(preference) in plans
    else:
        assert sorted(plans, key=repr) == sorted(as_wanted, key=repr)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("wait", ["counter", "data"])
def test_either_wait_can_be_had(wait, backward):
    assert {plan.wait for plan in ranked_plans(ANCHOR, backward, H100, Preference(wait=wait))} == {wait}


REFUSED = [
    (dict(dtype=torch.float64), "float64 has no persistent kernel"),
    (dict(B=0), "there are no rows"),
    (dict(P=3), "a projection needs a product between two steps"),
    (dict(spec=LSTMSpec(False, "full", "current")), "a full peephole on c_t needs a product within the step"),
]


@pytest.mark.parametrize("fields, reason", REFUSED, ids=str)
@given(layers, passes, machines)
def test_what_no_gpu_can_is_refused_with_a_reason(fields, reason, layer, backward, gpu):
    assert why_not(layer) is None
    assert ranked_plans(layer._replace(**fields), backward, gpu).startswith(reason)


@pytest.mark.parametrize("gpu", [H100, INTERPRETER], ids=lambda gpu: gpu.name)
def test_no_units_are_refused_with_a_reason(gpu):
    """`LSTMCell(3, 0)` is allowed, and asks for a plan."""
    assert isinstance(ranked_plans(ANCHOR._replace(H=0), False, gpu), str)


@pytest.mark.parametrize("H, B", [(16, 2_200_000), (32, 3_000_000), (128, 2_100_000)])
def test_a_launch_has_no_more_programs_than_its_axis_takes(H, B):
    """CUDA allows 65,535 on all axes of a grid but the first."""
    for dtype in (torch.float16, torch.float32):
        plans = ranked_plans(ANCHOR._replace(H=H, B=B, dtype=dtype), False, H100)
        assert isinstance(plans, str) or max(max(p.row_programs, p.directions) for p in plans) <= 65_535


@pytest.mark.parametrize("H, B", [(128, 5_000_000), (768, 800_000), (1024, 600_000)])
def test_offsets_within_a_step_fit_32_bits(H, B):
    """A persistent kernel computes row · G · H in 32 bits."""
    plans = ranked_plans(ANCHOR._replace(H=H, B=B), False, H100)
    assert isinstance(plans, str) or B * ANCHOR.gates * H <= 2**31


def test_a_plan_is_a_value():
    first = ranked_plans(ANCHOR, False, H100)[0]
    planner._ranked_plans.cache_clear()
    again = ranked_plans(ANCHOR, False, H100)[0]
    assert first is not again and first == again and len({first, again}) == 1
    for value, field in ((first, "rows"), (ANY, "wait"), (H100, "shared_bytes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)
    assert len({H100, replace(H100), INTERPRETER}) == 2


KNOWN = [
    # work, GPU, then what is expected: the programs (units, groups of row blocks, directions), units of one, and more
    (
        "h100",
        dict(),
        (48, 2, 1),
        dict(block_u=16, rows=8, row_blocks=2, parts=4, block_k=64, chunks=3, wait="data", pause=600),
    ),
    ("a100", dict(), (48, 2, 1), dict(block_u=16, rows=8, row_blocks=2, wait="data")),
    ("h100", dict(B=1), (96, 1, 1), dict(block_u=8, block_b=8, rows=1, row_blocks=1, wait="data")),
    ("h100", dict(backward=True), (48, 2, 1), dict(block_u=16, block_b=8, parts=16, chunks=3, group=3, wait="counter")),
    ("h100", dict(H=256), (32, 4, 1), dict(block_u=8, rows=4, row_blocks=4, wait="data")),
    ("h100", dict(D=2), (24, 2, 2), dict(block_u=32, rows=8, row_blocks=2, wait="data")),
    ("h100", dict(H=1024), (64, 2, 1), dict(block_u=16, chunks=2, block_k=64, num_warps=4, wait="data")),
    ("h100", dict(H=1024, dtype=torch.float32), (128, 1, 1), dict(block_u=8, chunks=4, group=2, block_k=32)),
    ("h100", dict(H=1024, dtype=torch.float32, precision="tf32"), (128, 1, 1), dict(exact=False, num_warps=8)),
    ("h100", dict(H=128, B=64), (16, 8, 1), dict(block_u=8, rows=8, wait="data", num_warps=4)),
    ("h100", dict(H=128, B=512), (1, 32, 1), dict(block_u=128, block_b=16, row_blocks=32, wait=None, num_warps=8)),
    ("h100", dict(H=64, B=64, D=2), (8, 8, 2), dict(block_u=8, block_k=16, parts=4, wait="data", num_warps=4)),
    ("h100", dict(H=1, B=1), (1, 1, 1), dict(block_u=16, block_k=16, wait=None)),
    ("h100", dict(H=1536), (96, 1, 1), dict(block_u=16, chunks=3, num_warps=8)),
    ("l4", dict(H=512), (32, 1, 1), dict(block_u=16, row_blocks=1)),
]


@pytest.mark.parametrize("name, changed, grid, fields", KNOWN, ids=str)
def test_known_plans(name, changed, grid, fields):
    backward = "backward" in changed
    layer = ANCHOR._replace(**{k: v for k, v in changed.items() if k != "backward"})
    plan = ranked_plans(layer, backward, GPUS[name])[0]
    assert (plan.unit_programs, plan.row_programs, plan.directions) == grid
    assert {field: getattr(plan, field) for field in fields} == fields


def test_many_rows_are_worked_through_in_turns():
    plan = ranked_plans(ANCHOR._replace(B=4096), False, H100)[0]
    assert plan.programs <= 132 and plan.rows == plan.block_b and plan.blocks_per_program > 1
    assert plan.wait == "data" and plan.pause == 0  # there is other work meanwhile


@pytest.mark.parametrize(
    "name, changed, said",
    [
        ("h100", dict(H=2048), r"the recurrent weights, 32\.0 MiB, .* 132 programs.* 29\.3 MiB"),
        ("h100", dict(H=2048, spec=COUPLED), r"24\.0 MiB"),
        ("h100", dict(H=5000), r"190\.7 MiB"),
        ("l4", dict(H=1024), r"8\.0 MiB, .* 58 programs.* 5\.6 MiB"),
    ],
)
def test_weights_that_fit_nowhere_are_told_in_numbers(name, changed, said):
    reason = ranked_plans(ANCHOR._replace(**changed), False, GPUS[name])
    assert isinstance(reason, str) and re.search(said, reason), reason


def test_the_estimate_of_the_anchor_by_hand():
    plan = ranked_plans(ANCHOR, False, H100, Preference(wait="counter", block_u=8, block_b=16))[0]
    tile, operand = 768 * 8 * 4 * 2, 768 * 16 * 2
    traffic = (tile + 2 * operand) / (128 * 1.83e3)  # of shared memory: tiles are read, right operands written and read
    multiplying = 2 * (2 * 16 * 8 * 768 * 4) / (989e6 / 132)  # at half of the rate
    states = 96 * operand / (132 * 40 * 1.83e3)  # all h through L2
    outputs = 8 * 16 / 128  # of a thread
    assert multiplying < traffic
    rest = 0.63 + 0.3 * outputs + traffic
    assert plan.estimate_us == pytest.approx(0.69 + 1.36 * states + rest, rel=1e-12) and plan.pause == 0
    assert plan.tile_bytes == tile and plan.shared_bytes == tile + max(operand // 3, 4 * 32 * 16 * 4) + 1024
    data = ranked_plans(ANCHOR, False, H100, Preference(wait="data", block_u=8, block_b=16))[0]
    kib = operand / 1024
    assert data.estimate_us == pytest.approx(0.4 + 0.012 * kib + 0.0004 * kib**2 + rest, rel=1e-12)
    assert data.pause == min(800, 300 + 25 * kib) == 800


def test_the_estimate_of_a_backward_step_by_hand():
    plan = ranked_plans(ANCHOR, True, H100, Preference("counter", block_u=16, block_b=8))[0]
    tile, operand = 16 * 4 * 768 * 2, 8 * 4 * 768 * 2
    traffic = 1.4 * (tile + 2 * operand) / (128 * 1.83e3)
    read = 48 * 2 * operand / (132 * 40 * 1.83e3)
    rest = 0.63 + 0.14 * 16 * 8 / 256 + traffic
    assert plan.estimate_us == pytest.approx(0.62 + 0.6 * read + rest, rel=1e-12)
    data = ranked_plans(ANCHOR, True, H100, Preference("data", block_u=16, block_b=8))[0]
    assert data.estimate_us == pytest.approx(0.4 + 0.017 * operand / 1024 + rest, rel=1e-12)


@pytest.mark.parametrize("H", [500, 501, 504, 519])
def test_rows_that_do_not_begin_on_16_bytes_are_rather_not_polled(H):
    """Backward, three gates of bfloat16: unless 8 divides H. Forward, every row is filled up."""
    layer = ANCHOR._replace(H=H, spec=COUPLED)
    counter, data = (ranked_plans(layer, True, H100, Preference(wait))[0].estimate_us for wait in ("counter", "data"))
    assert (data > counter + 1) == (H % 8 > 0)
    data = ranked_plans(layer, False, H100, Preference("data"))[0].estimate_us
    assert data < ranked_plans(layer._replace(H=H + 16 - H % 16), False, H100, Preference("data"))[0].estimate_us + 0.1


def test_a_program_with_several_row_blocks_takes_as_many_times_as_long():
    one, two = (ranked_plans(ANCHOR._replace(B=B), False, H100, Preference("counter", 8, 16))[0] for B in (16, 32))
    assert (one.blocks_per_program, two.blocks_per_program) == (1, 2) and one.wait == two.wait
    assert two.estimate_us == pytest.approx(2 * one.estimate_us, rel=1e-12)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_what_follows_from_the_sizes(spec):
    layer = Layer(spec, 9, 3, 5, 2, torch.float32, "tf32", P=2)
    assert layer.gates == (3 if spec.coupled else 4)
    assert layer.matrices == (0 if spec.peephole != "full" else 2 if spec.coupled else 3)
    assert exchanged_bytes(layer, True) == layer.gates * 5 * 4
    assert exchanged_bytes(layer, False) == 5 * (8 if spec.full else 4)
    elements = layer.gates * 5 * 2 + layer.matrices * 5 * 5
    assert layer.recurrent_bytes == 4 * elements and layer.recurrent_operations == 2 * 3 * elements
    assert layer._replace(P=0).recurrent_elements == (layer.gates + layer.matrices) * 25


def test_rates_are_named_as_in_the_limit():
    def rates(dtype):
        return [ANCHOR._replace(dtype=dtype, precision=precision).rate for precision in ("ieee", "tf32")]

    assert rates(torch.float32) == ["float32", "tf32"]
    assert rates(torch.bfloat16) == ["bfloat16"] * 2 and rates(torch.float16) == ["float16"] * 2


def test_a_cpu_is_the_interpreter():
    assert gpu_of(torch.device("cpu")) is INTERPRETER
    assert INTERPRETER.multiprocessors == 1


@thorough
@given(layers, passes, preferences)
def test_the_interpreter_never_gets_a_plan_that_waits(layer, backward, preference):
    plans = ranked_plans(layer, backward, INTERPRETER, preference)
    assert isinstance(plans, str) or all(plan.alone and plan.unit_programs == 1 for plan in plans)
    assert all(plan.alone for plan in candidates(layer, backward, INTERPRETER))


def test_small_layers_run_in_the_interpreter():
    for spec in (LSTMSpec(), LSTMSpec(coupled=True, peephole="full")):
        for H, backward in ((1, False), (16, True), (33, True), (64, True)):
            assert ranked_plans(Layer(spec, 5, 100, H, 2, torch.float32), backward, INTERPRETER)[0].alone


@pytest.mark.parametrize(
    "name, capability, multiprocessors, shared_bytes, alike",
    [
        ("NVIDIA H200", (9, 0), 132, 232_448, "h100"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 166_912, "a100"),
        ("NVIDIA A10", (8, 6), 72, 101_376, "l4"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376, "b200"),
    ],
)
def test_a_device_has_the_drivers_limits_and_the_rates_of_its_kind(
    name, capability, multiprocessors, shared_bytes, alike, monkeypatch
):
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared_bytes,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu_of.cache_clear()
    try:
        gpu = gpu_of(torch.device("cuda", 0))
    finally:
        gpu_of.cache_clear()
    assert (gpu.name, gpu.capability) == (name, 10 * capability[0] + capability[1])
    assert (gpu.multiprocessors, gpu.shared_bytes) == (multiprocessors, shared_bytes)
    assert (gpu.tflop_per_s, gpu.clock_ghz) == (GPUS[alike].tflop_per_s, GPUS[alike].clock_ghz)


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_nominal_constants_are_those_of_the_gpu(gpu):
    constants = nominal_constants(gpu)
    assert constants.multiprocessors == gpu.multiprocessors and constants.on_chip_bytes == gpu.shared_bytes
    assert constants.copy_gb_per_s == gpu.memory_gb_per_s
    assert constants.l2_read_gb_per_s > gpu.memory_gb_per_s
    assert constants.wait_us == gpus.WAIT_US
    every = {ANCHOR._replace(dtype=d, precision=p).rate for d in PERSISTENT_DTYPES for p in ("ieee", "tf32")}
    assert every | {"float64"} == constants.matmul_tflop_per_s.keys()
    assert gpu.tflop_per_s["float16"] >= gpu.tflop_per_s["tf32"] >= gpu.tflop_per_s["float32"]


@pytest.mark.parametrize("H", [256, 512, 768, 1024])
@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_no_estimate_is_below_the_limit_from_the_same_constants(gpu, H):
    layer = ANCHOR._replace(T=10**9, I=1, H=H)
    plans = ranked_plans(layer, False, gpu)
    if not isinstance(plans, str):
        assert 0 < least_us_per_step(layer, nominal_constants(gpu)) <= plans[0].estimate_us


def test_a_plan_in_few_words():
    plan = ranked_plans(ANCHOR._replace(B=12), False, H100)[0]
    assert plan.describe() == "U16 R6/8 K64x4x3 48x2x1 data"
    assert replace(plan, group=1, row_blocks=4).describe() == "U16 R6/8 K64x4x3 by 1 48x2x1 of 4 data"
    assert replace(plan, wait=None, unit_programs=1).describe() == "U16 R6/8 K64x4x3 1x2x1 alone"
