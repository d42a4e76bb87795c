"""How a persistent launch is cut into programs: every plan there may be, against what the kernels assume."""

import dataclasses
import importlib
import importlib.util
import itertools
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lstm_triton_kernels import float32_plan, gpus, planner, tensor_core_plan
from lstm_triton_kernels.float32_plan import MOST_CHUNKS, exchanged_bytes
from lstm_triton_kernels.gpus import GPU, GPUS, INTERPRETER, KIB, gpu_of, nominal_constants
from lstm_triton_kernels.limit import least_us_per_step
from lstm_triton_kernels.plan import ANY, PersistentPlan, Preference, Second
from lstm_triton_kernels.planner import PERSISTENT_DTYPES, WAITING_MARGIN, candidates, ranked_plans, why_not
from lstm_triton_kernels.sizes import Layer
from lstm_triton_kernels.tensor_core_plan import exchanged_columns, no_gluon, thread_registers

from lstm_triton import VARIANTS, LSTMSpec, routing

H100 = GPUS["h100"]
STANDARD, COUPLED = LSTMSpec(), LSTMSpec(coupled=True)
ANCHOR = Layer(STANDARD, 1024, 16, 768, 1, torch.bfloat16)
"""On tensor cores, by the kernels in Gluon; the others by those in plain Triton, which alone have both waits."""
EXACT = ANCHOR._replace(dtype=torch.float32)
TF32 = EXACT._replace(precision="tf32")

layers = st.builds(
    Layer,
    spec=st.sampled_from(VARIANTS), T=st.integers(1, 1000),
    B=st.one_of(st.integers(1, 64), st.integers(1, 5000)),
    H=st.one_of(st.integers(1, 140), st.integers(1, 1100), st.integers(1, 5000)), D=st.sampled_from((1, 2)),
    dtype=st.sampled_from(PERSISTENT_DTYPES), precision=st.sampled_from(("ieee", "tf32")), I=st.just(0),
    P=st.one_of(st.just(0), st.integers(1, 800)), training=st.booleans(), ragged=st.booleans(), L=st.integers(1, 4),
).map(lambda layer: layer if layer.P < layer.H else layer._replace(P=0))  # fmt: skip
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


def rules(plan: PersistentPlan, layer: Layer, backward: bool, gpu: GPU) -> dict[str, bool]:
    """What the kernels and the GPU demand of a plan, by name, and whether the plan keeps it."""
    sizes = (plan.block_u, plan.block_b, plan.block_k, plan.parts, plan.num_warps)
    of_all = {
        "powers of two": all(size == 2 ** round(math.log2(size)) for size in sizes),
        "group": 1 <= plan.group <= plan.chunks and plan.chunks % plan.group == 0,
        "directions": plan.directions == layer.D,
        "no idle program": plan.row_programs <= plan.row_blocks and (plan.unit_programs - 1) * plan.block_u < layer.H,
        "pause": (plan.pause > 0)
        == (
            plan.wait == "data"
            and plan.blocks_per_program == 1
            and (plan.exact or plan.rows > 1 or plan.unit_programs > 32)
        ),
        "exact": plan.exact == (layer.dtype == torch.float32 and layer.precision == "ieee"),
        "estimate": 0 < plan.estimate_us < math.inf,
        "within a step": seconds_keep_the_rules(plan, layer, backward),
    }
    return of_all | (plain_rules if plan.exact else gluon_rules)(plan, layer, backward, gpu)


def seconds_keep_the_rules(plan: PersistentPlan, layer: Layer, backward: bool) -> bool:
    """Whether there is a product within a step where one is needed; it has all columns, in whole groups of chunks."""
    of_program = plan.parts * plan.block_k
    needed = (layer.H if layer.output_current else 0, (layer.P if backward else layer.H) if layer.P else 0)
    for second, columns in zip((plan.peephole, plan.projection), needed, strict=True):
        if plan.alone or not columns:
            if second is not None:
                return False
        elif second is None or second.group < 1 or second.chunks % second.group or second.chunks * of_program < columns:
            return False
    return True


def second_bytes(plan: PersistentPlan, layer: Layer) -> int:
    """Shared memory for the weights of products within a step; in Gluon also for their sums."""
    chunks = sum(second.chunks for second in (plan.peephole, plan.projection) if second is not None)
    if plan.exact:
        return chunks * plan.parts * plan.block_k * plan.block_u * layer.element_bytes
    sums = sum(second is not None for second in (plan.peephole, plan.projection)) * (plan.parts > 1)
    return plan.parts * max(16, plan.block_u) * (chunks * 64 + sums * plan.block_b * 4)


def plain_rules(plan: PersistentPlan, layer: Layer, backward: bool, gpu: GPU) -> dict[str, bool]:
    """Those of the kernels in plain Triton."""
    chunk = plan.parts * plan.block_k
    width = layer.H if backward else layer.hidden
    weights = plan.block_u * (width * layer.gates + layer.H * layer.matrices) * layer.element_bytes
    if plan.alone:
        needed = layer.H
    else:
        needed = layer.H * layer.gates if backward else layer.H if layer.spec.full else layer.hidden
    return {
        "large enough for a product": plan.block_k >= 16 and min(plan.block_b, plan.block_u) >= 8,
        "columns": needed <= plan.columns < needed + chunk,
        "chunks": plan.chunks <= MOST_CHUNKS,
        "warps": 1 <= plan.num_warps <= 8
        and plan.parts in ((1,) if plan.alone else [n * plan.num_warps for n in (1, 2, 4)]),
        "shared memory": weights <= plan.tile_bytes < plan.shared_bytes - second_bytes(plan, layer)
        and plan.shared_bytes <= gpu.shared_bytes,
        "resident": plan.alone or plan.programs <= gpu.multiprocessors,
        "waits": plan.wait in ("counter", "data") if plan.unit_programs > 1 else plan.wait is None,
        # Fewer elements than threads are loaded by several, see `sync.any_missing`.
        "elements for all threads": plan.alone or plan.block_b * chunk >= 32 * plan.num_warps,
        "of Gluon": (plan.kept, plan.together, plan.tiled, plan.streamed) == (0, 1, False, 0),
    }


def left_rows(plan: PersistentPlan, layer: Layer, backward: bool) -> int:
    """The rows of the left operand in Gluon, the weights: four gates of each unit, backward one or two columns."""
    return plan.block_u * ((2 if layer.spec.full else 1) if backward else 4)


def gluon_rules(plan: PersistentPlan, layer: Layer, backward: bool, gpu: GPU) -> dict[str, bool]:
    """Those of the kernels in Gluon."""
    chunk = plan.parts * plan.block_k
    M, N = left_rows(plan, layer, backward), plan.block_b
    of_h, of_c = (8 * math.ceil(n / 8) for n in (layer.hidden, layer.H))
    needed = of_c * layer.gates if backward else of_h + of_c * layer.spec.full
    width = layer.H if backward else layer.hidden
    weights = plan.block_u * (width * layer.gates + layer.H * layer.matrices) * layer.element_bytes
    chunks, pieces = math.ceil(needed / chunk), math.ceil(plan.chunks / max(1, plan.group))
    threads = 32 * plan.num_warps
    sharing = max(1, plan.num_warps // plan.parts)  # warps that share the rows: all, or none
    # Of a thread, 4 bytes each: a chunk of a warp is 64 bytes of each row of weights, and of each of its rows.
    held, operands = (plan.chunks - plan.kept) * M * 64 // (4 * 32), plan.group * N // sharing * 64 // (4 * 32)
    flying = max(1, 128 // M)  # chunks of streamed weights under way: 64 registers at least
    held -= (plan.streamed - flying * (plan.streamed > 0)) * M * 64 // (4 * 32)
    from_l2 = (plan.streamed - plan.beyond_l2) * plan.tile_bytes // plan.chunks * plan.unit_programs * layer.D
    from_l2 *= 0.75 if layer.spec.coupled and not backward else 1  # forward a fourth of the rows is zero
    registers = plan.register_bytes // 4
    kept_bytes, part_bytes = plan.kept * plan.parts * M * 64, (plan.parts > 1) * plan.parts * M * N * 4
    kept_bytes += second_bytes(plan, layer)
    of_multiprocessor = gpu.shared_bytes + 1024  # a program can have all but what the driver takes for it
    return {
        "units": plan.block_u % 8 == 0,
        "left operand": M % 16 == 0,
        "right operand": N in (8 * sharing, 16 * sharing) and 1 <= plan.rows <= N and (N == 8 or 2 * plan.rows > N),
        "chunks of 64 bytes": plan.block_k * layer.element_bytes == 64,
        # Pieces are all alike, and no more than it takes.
        "columns": needed <= plan.columns
        and (pieces, plan.group) == (math.ceil(chunks / max(1, plan.group)), math.ceil(chunks / pieces)),
        "columns for every warp": plan.parts <= 4 or (plan.parts - 1) * plan.block_k < needed,
        "warps": plan.num_warps in (1, 2, 4, 8) if sharing == 1 else plan.num_warps * plan.together == 8,
        "parts": plan.parts in (1, plan.num_warps),
        "kept": 0 <= plan.kept <= plan.chunks - plan.streamed,
        "streamed": plan.streamed == 0
        or (plan.streamed % flying == 0 and plan.streamed > flying and plan.parts == plan.num_warps == 8),
        "beyond L2": 0 <= plan.beyond_l2 <= plan.streamed and from_l2 <= gpu.l2_bytes / 2,
        "weights": weights <= plan.tile_bytes == plan.chunks * plan.parts * M * 64,
        "registers hold what they must": held + operands + M * N // sharing // 32 <= registers,
        "registers": registers < min(255, 65_536 // (threads * max(1, plan.together))),
        "shared memory": kept_bytes + part_bytes <= plan.shared_bytes <= gpu.shared_bytes,
        "shared memory of all": plan.together * (plan.shared_bytes + 1024) <= of_multiprocessor,
        "resident": plan.programs <= plan.together * gpu.multiprocessors,
        "pairs": plan.together == 1 or (plan.together == 2 and plan.programs > gpu.multiprocessors),
        "waits": plan.wait == "data",
        "tiled": plan.tiled or backward or plan.rows < 8,
        "no padded tiles": plan.rows >= 8 or not plan.tiled,
    }


def broken_rules(plan: PersistentPlan, layer: Layer, backward: bool, gpu: GPU) -> list[str]:
    """What the plan does not keep."""
    return [rule for rule, kept in rules(plan, layer, backward, gpu).items() if not kept]


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


OF_ALL = [
    (dict(block_u=12), "powers of two"), (dict(block_k=24), "powers of two"), (dict(num_warps=6), "powers of two"),
    (dict(group=2), "group"), (dict(group=0), "group"), (dict(group=6), "group"), (dict(directions=2), "directions"),
    (dict(row_programs=2), "no idle program"), (dict(unit_programs=97), "no idle program"), (dict(pause=0), "pause"),
    (dict(row_blocks=2), "pause"), (dict(estimate_us=math.inf), "estimate"), (dict(estimate_us=0.0), "estimate"),
    (dict(projection=Second(3, 3)), "within a step"), (dict(peephole=Second(3, 1)), "within a step"),
]  # fmt: skip
WRONG = {
    "plain": [
        *OF_ALL, (dict(exact=False), "exact"), (dict(block_k=8), "large enough for a product"),
        (dict(block_b=4), "large enough for a product"), (dict(chunks=2), "columns"), (dict(chunks=4), "columns"),
        (dict(chunks=16), "chunks"), (dict(num_warps=16), "warps"), (dict(num_warps=16, parts=16), "warps"),
        (dict(parts=4), "warps"), (dict(shared_bytes=96 * KIB), "shared memory"),
        (dict(shared_bytes=228 * KIB), "shared memory"), (dict(tile_bytes=95 * KIB), "shared memory"),
        (dict(unit_programs=133), "resident"), (dict(row_programs=2), "resident"), (dict(wait=None), "waits"),
        (dict(unit_programs=1), "waits"), (dict(wait="counter"), "pause"),
        (dict(block_b=4, parts=2, block_k=16), "elements for all threads"), (dict(kept=1), "of Gluon"),
        (dict(together=2), "of Gluon"), (dict(tiled=True), "of Gluon"),
    ],
    "gluon": [
        *OF_ALL, (dict(exact=True), "exact"), (dict(block_u=4), "units"), (dict(block_u=2), "left operand"),
        (dict(block_b=32), "right operand"), (dict(rows=8), "right operand"), (dict(rows=17), "right operand"),
        (dict(rows=0, row_blocks=1), "right operand"), (dict(block_k=16), "chunks of 64 bytes"),
        (dict(chunks=2), "columns"), (dict(chunks=4), "columns"),
        (dict(parts=32, num_warps=32, chunks=1, group=1), "columns for every warp"), (dict(parts=4), "parts"),
        (dict(num_warps=4), "parts"), (dict(num_warps=16, parts=16), "warps"), (dict(parts=1), "right operand"),
        (dict(kept=4), "kept"),
        (dict(kept=-1), "kept"), (dict(streamed=2, kept=2), "kept"), (dict(streamed=3), "streamed"),
        (dict(streamed=4, beyond_l2=5), "beyond L2"), (dict(beyond_l2=-1), "beyond L2"),
        (dict(tile_bytes=47 * KIB), "weights"), (dict(tile_bytes=49 * KIB), "weights"),
        (dict(register_bytes=4 * 60), "registers hold what they must"), (dict(register_bytes=4 * 255), "registers"),
        (dict(together=2, register_bytes=4 * 128), "registers"), (dict(shared_bytes=15 * KIB), "shared memory"),
        (dict(kept=2), "shared memory"), (dict(shared_bytes=228 * KIB), "shared memory"),
        (dict(together=2, shared_bytes=114 * KIB), "shared memory of all"), (dict(unit_programs=133), "resident"),
        (dict(row_programs=2), "resident"), (dict(together=2, row_programs=3, row_blocks=3), "resident"),
        (dict(together=2), "pairs"), (dict(together=3, row_programs=2), "pairs"), (dict(together=0), "pairs"),
        (dict(wait=None), "waits"), (dict(wait="counter"), "waits"), (dict(tiled=False), "tiled"),
        (dict(rows=4), "no padded tiles"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kernels, layer", [("plain", EXACT), ("gluon", ANCHOR)])
def test_a_broken_rule_is_seen(kernels, layer):
    """Test of the test: a plan that is wrong in one field breaks a rule, and there is a wrong plan for every rule."""
    plans = ranked_plans(layer, False, H100, Preference("data", block_u=8, block_b=16))
    plan = next(plan for plan in plans if plan.num_warps == 8)
    assert not broken_rules(plan, layer, False, H100) and plan.grid == (96, 1, 1) and plan.chunks == 3
    for fields, rule in WRONG[kernels]:
        assert rule in broken_rules(replace(plan, **fields), layer, False, H100), fields
    assert {rule for _, rule in WRONG[kernels]} == set(rules(plan, layer, False, H100))


@thorough
@given(layers, passes, machines)
def test_all_candidates_are_ranked_by_their_estimate_each_time(layer, backward, gpu):
    plans, every = ranked_plans(layer, backward, gpu), list(candidates(layer, backward, gpu))
    if isinstance(plans, str):
        assert not every and ("Gluon" if gpu.interpreted and not layer.exact else "MiB") in plans
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
@pytest.mark.parametrize("layer", [ANCHOR, ANCHOR._replace(dtype=torch.float16), TF32, EXACT], ids=lambda one: one.rate)
def test_no_size_below_one_that_fits_is_left_out(layer, backward):
    """An H100 has room for 1024 units in every type; so it has for fewer."""
    without = [H for H in range(1, 1025) if not any(candidates(layer._replace(H=H), backward, H100))]
    assert not without, f"{len(without)} sizes from {without[0]} to {without[-1]}"


preferences = st.builds(
    Preference,
    wait=st.sampled_from((None, "counter", "data")),
    block_u=st.sampled_from((None, 8, 16, 32, 64)),
    block_b=st.sampled_from((None, 8, 16, 32)),
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
        refused = gpu.interpreted and not layer.exact  # whatever is wanted
        assert refused or preference == ANY or repr(preference) in plans
    else:
        assert sorted(plans, key=repr) == sorted(as_wanted, key=repr)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("wait", ["counter", "data"])
def test_either_wait_can_be_had_in_exact_float32(wait, backward):
    assert {plan.wait for plan in ranked_plans(EXACT, backward, H100, Preference(wait=wait))} == {wait}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layer", [ANCHOR, TF32], ids=lambda layer: layer.rate)
def test_on_tensor_cores_programs_wait_by_the_data(layer, backward):
    assert {plan.wait for plan in ranked_plans(layer, backward, H100)} == {"data"}
    wanted = Preference(wait="counter")
    assert ranked_plans(layer, backward, H100, wanted) == f"no plan is {wanted}"


REFUSED = [
    (dict(dtype=torch.float64), "float64 has no persistent kernel"),
    (dict(B=0), "there are no rows"),
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
    for layer in (ANCHOR, EXACT):
        plans = ranked_plans(layer._replace(H=H, B=B), False, H100)
        assert isinstance(plans, str) == (B * layer.gates * H >= 2**31)


def test_a_plan_is_a_value():
    first = ranked_plans(ANCHOR, False, H100)[0]
    planner._ranked_plans.cache_clear()
    again = ranked_plans(ANCHOR, False, H100)[0]
    assert first is not again and first == again and len({first, again}) == 1
    for value, field in ((first, "rows"), (ANY, "wait"), (H100, "shared_bytes")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1)
    assert len({H100, replace(H100), INTERPRETER}) == 2


BACKWARD = dict(backward=True)
FLOAT32, IN_TF32 = (dict(dtype=torch.float32, precision=precision) for precision in ("ieee", "tf32"))
KNOWN = [
    # GPU, work, then what is expected: the programs (units, groups of row blocks, directions), units of one, and more
    (
        "h100",
        dict(),
        (48, 2, 1),
        dict(block_u=16, rows=8, num_warps=4, chunks=6, kept=2, columns=768, together=1, pause=600, tiled=True),
    ),
    (
        "h100",
        BACKWARD,
        (24, 4, 1),
        dict(block_u=32, rows=4, block_k=32, num_warps=8, chunks=12, group=12, kept=6, pause=700, tiled=False),
    ),
    ("a100", dict(), (48, 2, 1), dict(block_u=16, rows=8, row_blocks=2, columns=768)),
    ("a100", BACKWARD, (48, 2, 1), dict(block_u=16, rows=8, num_warps=8, kept=0, together=1)),
    ("l4", dict(), (48, 2, 1), dict(block_u=16, rows=8, num_warps=4, kept=2, together=2)),
    ("l4", BACKWARD, (48, 1, 1), dict(block_u=16, block_b=16, num_warps=8, chunks=12, group=6, tiled=True)),
    ("rtx4090", dict(), (48, 2, 1), dict(block_u=16, rows=8, columns=768)),
    ("rtx4090", BACKWARD, (48, 2, 1), dict(block_u=16, rows=8, num_warps=8, kept=0)),
    ("h100", dict(B=1), (96, 1, 1), dict(block_u=8, block_b=8, rows=1, row_blocks=1, num_warps=4, kept=0)),
    ("h100", dict(H=256), (16, 8, 1), dict(block_u=16, rows=2, row_blocks=8, num_warps=4, chunks=2)),
    ("h100", dict(D=2), (48, 2, 2), dict(block_u=16, block_b=8, rows=8, row_blocks=2, num_warps=4, together=2)),
    ("h100", dict(H=1024), (64, 2, 1), dict(block_u=16, chunks=4, block_k=32, num_warps=8)),
    ("h100", dict(H=1536), (96, 1, 1), dict(block_u=16, block_b=16, rows=16, chunks=6, group=3)),
    ("h100", dict(H=1536) | BACKWARD, (96, 1, 1), dict(block_u=16, chunks=24, group=8, num_warps=8)),
    ("h100", dict(H=2048) | BACKWARD, (128, 1, 1), dict(block_u=16, chunks=32, group=8, num_warps=8)),
    ("h100", dict(H=1024) | IN_TF32, (64, 2, 1), dict(block_u=16, block_k=16, chunks=8, num_warps=8)),
    ("h100", dict(H=128, B=64), (8, 16, 1), dict(block_u=16, rows=4, num_warps=4, chunks=1)),
    ("h100", dict(H=128, B=512), (16, 8, 1), dict(block_u=8, block_b=64, parts=1, num_warps=8, kept=0, tiled=True)),
    ("h100", dict(H=192, B=2000), (3, 44, 1), dict(block_u=64, block_b=64, rows=46, parts=1, num_warps=8, kept=6)),
    ("h100", dict(H=192, B=2000) | BACKWARD, (6, 22, 1), dict(block_u=32, block_b=64, rows=46, parts=1, pause=0)),
    ("h100", dict(H=1024, B=128), (64, 2, 1), dict(block_u=16, block_b=64, rows=64, parts=1, kept=33)),
    ("h100", dict(H=64, B=64, D=2), (8, 8, 2), dict(block_u=8, block_k=32, num_warps=2, chunks=1)),
    ("h100", dict(H=1, B=1), (1, 1, 1), dict(block_u=8, num_warps=2, chunks=1, wait="data")),
    ("h100", FLOAT32, (48, 2, 1), dict(block_u=16, block_b=8, parts=8, chunks=3, wait="data", pause=800)),
    ("h100", FLOAT32 | BACKWARD, (48, 2, 1), dict(block_u=16, parts=32, chunks=3, group=1, wait="counter")),
    ("h100", FLOAT32 | dict(H=1024), (128, 1, 1), dict(block_u=8, chunks=4, group=2, block_k=32, wait="counter")),
    ("h100", FLOAT32 | dict(H=128, B=64), (16, 8, 1), dict(block_u=8, rows=8, parts=4, num_warps=4, wait="data")),
    ("h100", FLOAT32 | dict(H=1, B=1), (1, 1, 1), dict(block_u=16, block_k=16, parts=1, wait=None)),
    ("a100", FLOAT32, (96, 1, 1), dict(block_u=8, rows=8, row_blocks=2, wait="data", pause=0)),
]


@pytest.mark.parametrize("name, changed, grid, fields", KNOWN, ids=str)
def test_known_plans(name, changed, grid, fields):
    backward = "backward" in changed
    layer = ANCHOR._replace(**{k: v for k, v in changed.items() if k != "backward"})
    plan = ranked_plans(layer, backward, GPUS[name])[0]
    assert (plan.unit_programs, plan.row_programs, plan.directions) == grid
    assert {field: getattr(plan, field) for field in fields} == fields
    assert plan.exact == layer.exact


@pytest.mark.parametrize("layer", [ANCHOR, EXACT], ids=lambda layer: layer.rate)
def test_many_rows_are_worked_through_in_turns(layer):
    plan = ranked_plans(layer._replace(B=4096), False, H100)[0]
    assert plan.programs <= 132 * plan.together and 2 * plan.rows > plan.block_b and plan.blocks_per_program > 1
    assert plan.wait == "data" and plan.pause == 0  # there is other work meanwhile


@pytest.mark.parametrize("backward", [False, True])
def test_registers_and_shared_memory_together_hold_what_neither_does(backward):
    """32 MiB of 2048 units on an H100: 29.3 MiB are shared memory, and 33 MiB registers."""
    plans = ranked_plans(ANCHOR._replace(H=2048), backward, H100)
    assert plans[0].tile_bytes * plans[0].programs == 2**25
    for plan in plans:
        assert plan.tile_bytes > plan.together * 65_536 * 4 or 0 < plan.kept < plan.chunks, plan
    assert isinstance(ranked_plans(EXACT._replace(H=2048), backward, H100), str)


@pytest.mark.parametrize(
    "name, changed, said",
    [
        (
            "h100",
            dict(H=4352),
            r"the recurrent weights, 144\.5 MiB, .* 132 multiprocessors .* 29\.3 MiB .* 33\.0 MiB of registers in all; "
            r"to stream a part of them takes 136 multiprocessors$",
        ),
        ("h100", dict(H=2560, D=2, spec=COUPLED), r"75\.0 MiB"),
        ("h100", dict(H=5000), r"190\.7 MiB"),
        ("h100", dict(H=4352) | IN_TF32, r"289\.0 MiB, .* takes 136 multiprocessors$"),
        ("h100", dict(H=2048) | FLOAT32, r"64\.0 MiB, .* 29\.3 MiB .* 8 chunks of columns at most$"),
        ("h100", dict(H=1024, D=2) | FLOAT32, r"32\.0 MiB, "),
        ("l4", dict(H=1024, D=2), r"16\.0 MiB, .* 58 multiprocessors .* 5\.6 MiB .* takes 64 multiprocessors$"),
    ],
)
def test_weights_that_fit_nowhere_are_told_in_numbers(name, changed, said):
    for backward in (False, True):
        reason = ranked_plans(ANCHOR._replace(**changed), backward, GPUS[name])
        assert isinstance(reason, str) and re.search(said, reason), reason


# Plans of the kernels in Gluon


@pytest.mark.parametrize(
    "warps, together, registers",
    [(1, 1, 255), (4, 1, 255), (8, 1, 255), (1, 2, 255), (4, 2, 255), (8, 2, 128)],
)
def test_the_registers_of_a_thread_are_its_share(warps, together, registers):
    """65,536 are shared out to a multiprocessor's threads, by eights; no thread has more than 255."""
    assert thread_registers(warps, together) == registers
    assert 32 * warps * together * (8 * math.ceil(registers / 8)) <= 65_536


@pytest.mark.parametrize(
    "changed, backward, columns",
    [
        (dict(H=768), False, 768),
        (dict(H=501), False, 504),
        (dict(H=1), False, 8),
        (dict(H=501), True, 4 * 504),
        (dict(H=501, spec=COUPLED), True, 3 * 504),
        (dict(H=501, spec=LSTMSpec(peephole="diagonal")), False, 504),
        (dict(H=501, spec=LSTMSpec(peephole="full")), False, 2 * 504),  # h and c
        (dict(H=501, spec=LSTMSpec(peephole="full")), True, 4 * 504),
    ],
)
def test_columns_are_exchanged_in_whole_tiles(changed, backward, columns):
    assert exchanged_columns(ANCHOR._replace(**changed), backward) == columns
    assert exchanged_columns(EXACT._replace(**changed), backward) == columns


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("layer", [ANCHOR, TF32], ids=lambda layer: layer.rate)
def test_an_odd_size_costs_little_more_than_the_next_multiple_of_64(layer, backward):
    """By estimate. Units are filled up to tiles of 8, and the tensors of the user are read as they are."""
    for B, D, H in itertools.product((1, 12, 32, 80, 128, 256), (1, 2), (77, 243, 300, 362, 400, 500, 519, 684, 1150)):
        plans, even = (
            ranked_plans(layer._replace(B=B, D=D, H=units), backward, H100) for units in (H, -(-H // 64) * 64)
        )
        if not isinstance(even, str):
            assert plans[0].estimate_us <= 1.3 * even[0].estimate_us, (B, D, H, plans[0], even[0])


@pytest.mark.parametrize(
    "gpu, changed, pause",
    [
        ("h100", dict(), 300 + 25 * 12),  # 8 rows of 768 units
        ("h100", dict(B=1), 338),  # 1.5 KiB
        ("h100", dict(B=1, H=512), 0),  # of one row, by 32 programs
        ("h100", dict(B=32), 700),
        ("h100", dict(H=256), 325),  # 2 rows are 1 KiB
        ("h100", dict(B=4096), 0),  # in turns
    ],
)
def test_the_pause_follows_what_is_read_of_others(gpu, changed, pause):
    assert ranked_plans(ANCHOR._replace(**changed), False, GPUS[gpu])[0].pause == pause


def test_programs_that_share_a_multiprocessor_pause_for_what_both_read():
    for B, pause in ((2, 300 + 25 * 4), (4, 300 + 25 * 8), (8, 700)):  # a row of 512 units is 1 KiB
        plans = ranked_plans(ANCHOR._replace(H=512, B=B), False, GPUS["l4"], Preference(block_u=8, block_b=8))
        found = {(plan.together, plan.rows, plan.pause) for plan in plans if plan.num_warps == 4}
        assert found == {(2, B, pause)}


def test_few_rows_are_exchanged_by_rows():
    """Fewer than a tile has; backward up to 16, as long as a multiprocessor reads no more than 48 KiB in a step."""

    def tiled(layer, backward=True, gpu=H100):
        return {(plan.rows, plan.tiled) for plan in ranked_plans(layer, backward, gpu)}

    assert (8, False) in tiled(ANCHOR) and (16, True) in tiled(ANCHOR._replace(H=1536))
    assert all(by_tiles == (rows >= 8) for rows, by_tiles in tiled(ANCHOR._replace(B=17)))
    assert all(by_tiles == (rows >= 8) for rows, by_tiles in tiled(TF32._replace(H=1024)))  # 8 rows are 64 KiB
    for layer in (ANCHOR, TF32, ANCHOR._replace(B=1), ANCHOR._replace(B=100, H=64)):
        assert all(by_tiles == (rows >= 8) for rows, by_tiles in tiled(layer, backward=False))
    for plan in ranked_plans(ANCHOR, True, H100):
        assert plan.tiled == (plan.rows >= 8 and plan.together * plan.rows * plan.columns * 2 > 48 * KIB)


def clocks(left, right, chunks, warps, kept):
    """Of a step of a program in Gluon: the products of its warps, then its traffic of shared memory.

    Tensor cores take 16 rows of weights, 8 of the batch and half of a chunk at once, in 8 clocks of one of the four
    quarters of a multiprocessor.
    """
    products = left // 16 * right // 8 * 2 * chunks
    quarters = max(1, warps / 4)
    parts = warps * left * right * 4 if warps > 1 else 0
    weights = kept * warps * left * 64
    return 0.77 * 8 * products * quarters + (0.68 * weights + 3.6 * parts) / 128


def step_us(plan, clocks, read_kib, backward=False):
    """Of a row block, of all programs that share a multiprocessor: clocks in it, bytes that it reads; and pieces."""
    pieces = plan.chunks // plan.group
    grid = 0.1 * max(3, math.log2(plan.unit_programs)) + 0.041 * math.log2(plan.programs)
    rows = (0.44 if backward else 0.038) * plan.together * plan.rows / 8
    return grid + rows + 0.0125 * read_kib * plan.together + plan.together * clocks / 1.83e3 + 0.08 * (pieces - 1)


def first(layer, backward, gpu=H100, **fields):
    """The first of the ranked plans with these fields."""
    plans = ranked_plans(layer, backward, gpu)
    return next(plan for plan in plans if all(getattr(plan, name) == value for name, value in fields.items()))


def test_the_estimate_of_the_anchor_by_hand_in_gluon():
    plan = first(ANCHOR, False, num_warps=4, group=6)
    assert plan.describe() == f"U16 R8/8 K32x4x6 kept {plan.kept} 48x2x1 data"
    of_step = clocks(left=4 * 16, right=8, chunks=6, warps=4, kept=2)  # by 128 threads, 16 x 8
    assert of_step == pytest.approx(0.77 * 384 + 0.68 * 256 + 3.6 * 64)
    read = 8 * 768 * 2 / 1024
    assert plan.estimate_us == pytest.approx(step_us(plan, of_step, read), rel=1e-12)
    assert plan.tile_bytes == 64 * 768 * 2 and plan.shared_bytes == plan.kept * 4 * 64 * 64 + 4 * 64 * 8 * 4
    weights, accumulators, operands = (6 - plan.kept) * 64 // 2, 64 * 8 // 32, 6 * 8 // 2
    assert plan.register_bytes == 4 * (weights + accumulators + operands)


def test_the_estimate_of_a_backward_step_by_hand_in_gluon():
    plan = first(ANCHOR, True, num_warps=8, group=12, block_u=16)
    assert plan.describe() == "U16 R8/8 K32x8x12 48x2x1 data"
    of_step = clocks(left=16, right=8, chunks=12, warps=8, kept=0)  # two threads have the same output
    read = 8 * 4 * 768 * 2 / 1024
    assert plan.estimate_us == pytest.approx(step_us(plan, of_step, read, backward=True), rel=1e-12)
    assert plan.tile_bytes == 16 * 4 * 768 * 2 and plan.shared_bytes == 8 * 16 * 8 * 4
    assert plan.register_bytes == 4 * (12 * 16 // 2 + 2 * 16 * 8 // 32 + 12 * 8 // 2)  # two accumulators of one tile


def test_the_estimate_of_a_step_in_tf32_by_hand():
    """Half as many columns in a chunk, and in a product of the same time."""
    plan = first(TF32._replace(H=1024), False, num_warps=8, block_b=8, group=8)
    assert plan.describe() == f"U16 R8/8 K16x8x8 kept {plan.kept} 64x2x1 data"
    of_step = clocks(left=4 * 16, right=8, chunks=8, warps=8, kept=plan.kept)
    assert plan.estimate_us == pytest.approx(step_us(plan, of_step, 8 * 4), rel=1e-12)


def test_the_estimate_of_programs_that_share_a_multiprocessor_by_hand():
    """They read as much again, and take turns in its units."""
    plan = first(ANCHOR._replace(H=2048), False, together=2, block_b=16, group=8)
    assert plan.describe() == f"U8 R16/16 K32x4x16 by 8 kept {plan.kept} 256x1x1 data in pairs"
    of_one = clocks(left=4 * 8, right=16, chunks=16, warps=4, kept=plan.kept)
    grid = (0.1 + 0.041) * 8  # 256 programs share the units, and are all there are
    us = grid + 2 * (0.038 * 2 + 0.0125 * 16 * 4 + of_one / 1.83e3) + 0.08  # of two pieces
    assert plan.estimate_us == pytest.approx(us, rel=1e-12)
    assert 2 * (plan.shared_bytes + KIB) <= 228 * KIB


def test_the_estimate_of_warps_that_share_the_rows_by_hand():
    """All of them read the same weights; simulated times are short of measured ones."""
    layer = ANCHOR._replace(H=192, B=2000)
    forward = first(layer, False, block_u=16, block_b=64, kept=6)
    assert forward.describe() == "U16 R61/64 K32x1x6 kept 6 12x11x1 of 33 data"
    products = 8 * (2 * 4 * 6) * 1 * 2  # of a warp, 8 rows; two warps a quarter
    weights = 8 * (64 * 192 * 2) / 128
    clocks = 0.485 * max(0.9 * products, weights) + 1.375 * 16 * 64
    us = 0.36 + 0.0126 * 61 * 192 * 2 / 1024 + clocks / 1.83e3
    assert forward.estimate_us == pytest.approx(1.46 * 3 * us, rel=1e-12)
    backward = first(layer, True, block_u=32, block_b=64, group=12, together=1)
    assert backward.describe() == f"U32 R46/64 K32x1x24 by 12 kept {backward.kept} 6x22x1 of 44 data"
    weights = 8 * backward.kept * 32 * 64 / 128
    clocks = 0.165 * max(0.9 * 8 * (2 * 2 * 24) * 2, weights) + 0.86 * 32 * 64
    us = 0.0132 * 46 * 768 * 2 / 1024 + 0.79 + clocks / 1.83e3
    assert backward.estimate_us == pytest.approx(1.38 * 2 * us, rel=1e-12)
    assert forward.shared_bytes == 64 * 192 * 2  # no sums


def test_the_last_piece_of_what_is_read_at_once_may_be_filled_up():
    """So that 9 chunks of a warp, say, are not read one by one."""
    found = []
    for H in range(8, 2049, 8):
        layer = ANCHOR._replace(H=H)
        for backward in (False, True):
            plans = ranked_plans(layer, backward, H100)
            for plan in plans if isinstance(plans, tuple) else ():
                needed = math.ceil(exchanged_columns(layer, backward) / (plan.parts * plan.block_k))
                assert plan.chunks < needed + plan.chunks // plan.group
                found += [plan] * (plan.chunks > needed)
    assert found


def test_in_gluon_a_program_with_several_row_blocks_takes_as_many_times_as_long():
    for B, times in ((16, 1), (32, 2), (48, 3)):
        plans = ranked_plans(ANCHOR._replace(B=B), False, H100, Preference(block_u=8, block_b=16))
        plans = [plan for plan in plans if plan.together == 1]
        assert {4, 8} <= {plan.num_warps for plan in plans}
        for plan in plans:
            of_block = clocks(32, 16, plan.chunks, plan.num_warps, plan.kept)
            us = step_us(plan, of_block, 16 * plan.columns * 2 / 1024)
            us += 0.19 * (max(1, 8 * 16 // (32 * plan.num_warps)) - 1)  # a thread of few has several outputs
            assert plan.blocks_per_program == times
            assert plan.estimate_us == pytest.approx(times * us, rel=1e-12)


@pytest.fixture
def asked_again():
    """What Triton has is asked again, in the test and after it."""
    caches = (no_gluon, planner._ranked_plans, routing._kernels)

    def clear():
        for cached in caches:
            cached.cache_clear()

    clear()
    yield
    clear()


def take_away(monkeypatch, missing):
    """Have the kernels in Gluon imported anew, while something of it is missing."""
    for name in ("exchanged_backward", "tiles"):
        monkeypatch.delitem(sys.modules, f"lstm_triton_kernels.{name}", raising=False)
    if missing == "a module":
        monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.ampere", None)
    else:
        language = importlib.import_module("triton.experimental.gluon.language")
        for name in ("barrier", "thread_barrier"):
            monkeypatch.delattr(language, name, raising=False)


@pytest.mark.skipif(not routing.TRITON_INSTALLED, reason="needs triton")
@pytest.mark.parametrize("missing, said", [("a module", "nvidia.ampere"), ("a name", "thread_barrier")])
def test_a_triton_without_what_the_kernels_need_of_gluon_is_a_reason(missing, said, asked_again, monkeypatch):
    import triton

    with monkeypatch.context() as patch:
        take_away(patch, missing)
        reason = no_gluon()
        assert reason.startswith(f"Gluon of Triton {triton.__version__} lacks what the kernels need: ")
        assert said in reason
        for layer, backward in ((ANCHOR, False), (ANCHOR, True), (TF32, False)):
            assert ranked_plans(layer, backward, H100) == reason and not any(candidates(layer, backward, H100))
        assert ranked_plans(EXACT, False, H100)[0].exact
        assert routing.why_not_persistent(ANCHOR, H100) == reason
        assert ranked_plans(ANCHOR._replace(dtype=torch.float64), False, H100).startswith("float64")


def test_without_triton_plans_are_made_as_with_it(asked_again, monkeypatch):
    """`lstm-triton info` works without; whether Triton is there is for routing to say."""
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert no_gluon() is None and isinstance(ranked_plans(ANCHOR, False, H100), tuple)


@pytest.mark.skipif(not routing.TRITON_INSTALLED, reason="needs triton")
def test_this_triton_has_what_the_kernels_need():
    assert no_gluon() is None
    assert all(tensor_core_plan.why_not(gpu) is None for gpu in GPUS.values())


# Estimates of the kernels in plain Triton


def test_the_estimate_of_the_anchor_by_hand():
    plan = ranked_plans(EXACT, False, H100, Preference(wait="counter", block_u=8, block_b=16))[0]
    tile, operand = 768 * 8 * 4 * 4, 768 * 16 * 4
    traffic = (tile + 2 * operand) / (128 * 1.83e3)  # of shared memory: tiles are read, right operands written and read
    multiplying = (2 * 16 * 8 * 768 * 4) / (0.2 * 67e6 / 132)  # at a fifth of the rate
    states = 96 * operand / (132 * 40 * 1.83e3)  # all h through L2
    outputs = 8 * 16 / 256  # of a thread
    assert multiplying > traffic and (plan.chunks, plan.group) == (3, 1)
    rest = 0.63 + 0.3 * outputs + multiplying + 2 * 0.3  # two groups more
    assert plan.estimate_us == pytest.approx(0.69 + 1.36 * states + rest, rel=1e-12) and plan.pause == 0
    assert plan.tile_bytes == tile and plan.shared_bytes == tile + max(operand // 3, 8 * 32 * 16 * 4) + 1024
    data = ranked_plans(EXACT, False, H100, Preference(wait="data", block_u=8, block_b=16))[0]
    kib = operand / 1024
    assert data.estimate_us == pytest.approx(0.4 + 0.012 * kib + 0.0004 * kib**2 + rest, rel=1e-12)
    assert data.pause == min(800, 300 + 25 * kib) == 800


def test_the_estimate_of_a_backward_step_by_hand():
    plan = ranked_plans(EXACT, True, H100, Preference("counter", block_u=16, block_b=8))[0]
    operand = 8 * 4 * 768 * 4
    multiplying = (2 * 8 * 16 * 768 * 4) / (0.2 * 67e6 / 132)
    read = 48 * 2 * operand / (132 * 40 * 1.83e3)
    more_groups = 0.3 * (plan.chunks // plan.group - 1)
    assert more_groups > 0
    rest = 0.63 + 0.14 * 16 * 8 / 256 + multiplying + more_groups
    assert plan.estimate_us == pytest.approx(0.62 + 0.6 * read + rest, rel=1e-12)
    data = ranked_plans(EXACT, True, H100, Preference("data", block_u=16, block_b=8))[0]
    assert data.estimate_us == pytest.approx(0.4 + 0.017 * operand / 1024 + rest, rel=1e-12)


@pytest.mark.parametrize("traffic, us", [(128 * 1.83e3 * 9, 9.0), (0, 2 * 16 * 8 * 768 * 4 / (0.2 * 67e6 / 132))])
def test_a_product_takes_as_long_as_its_traffic_or_its_operations(traffic, us):
    assert float32_plan._product_us(EXACT, H100, traffic, block_b=16, units=8) == pytest.approx(us, rel=1e-12)


@pytest.mark.parametrize("H", [500, 501, 502, 504, 519])
def test_rows_that_do_not_begin_on_16_bytes_are_rather_not_polled(H):
    """Backward, three gates of float32: unless 4 divides H. Forward, every row is filled up."""
    layer = EXACT._replace(H=H, spec=COUPLED)
    counter, data = (ranked_plans(layer, True, H100, Preference(wait))[0].estimate_us for wait in ("counter", "data"))
    assert (data > counter + 1) == (H % 4 > 0)
    data = ranked_plans(layer, False, H100, Preference("data"))[0].estimate_us
    assert data < ranked_plans(layer._replace(H=H + 16 - H % 16), False, H100, Preference("data"))[0].estimate_us + 0.1


def test_a_program_with_several_row_blocks_takes_as_many_times_as_long():
    one, two = (ranked_plans(EXACT._replace(B=B), False, H100, Preference("counter", 8, 16))[0] for B in (16, 32))
    assert (one.blocks_per_program, two.blocks_per_program) == (1, 2) and one.wait == two.wait
    assert two.estimate_us == pytest.approx(2 * one.estimate_us, rel=1e-12)


def test_products_within_a_step_are_planned():
    projected = ANCHOR._replace(P=300, spec=LSTMSpec(False, "full", "current"))
    for layer, backward in (
        (projected, False),
        (projected, True),
        (projected._replace(dtype=torch.float32, H=512), False),
    ):
        plan = ranked_plans(layer, backward, H100)[0]
        assert not broken_rules(plan, layer, backward, H100)
        for name in ("peephole", "projection"):
            second = getattr(plan, name)
            for wrong in (
                None,
                Second(second.chunks, 0),
                Second(2 * second.chunks + 1, 2),
                Second(second.chunks // 2, 1),
            ):
                assert "within a step" in broken_rules(replace(plan, **{name: wrong}), layer, backward, H100)
    one = ranked_plans(ANCHOR, False, H100)[0]
    assert ranked_plans(ANCHOR._replace(P=300), False, H100)[0].estimate_us > one.estimate_us


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_what_follows_from_the_sizes(spec):
    layer = Layer(spec, 9, 3, 5, 2, torch.float32, "tf32", P=2)
    assert layer.gates == (3 if spec.coupled else 4)
    assert layer.matrices == (0 if spec.peephole != "full" else 2 if spec.coupled else 3)
    assert exchanged_bytes(layer, True) == layer.gates * 5 * 4
    assert exchanged_bytes(layer, False) == 4 * (2 + 5 * spec.full)
    assert layer.hidden == 2 and layer._replace(P=0).hidden == 5
    assert layer.output_current == (spec.name in ("full+current", "coupled+full+current"))
    elements = layer.gates * 5 * 2 + 2 * 5 + layer.matrices * 5 * 5
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
    assert (
        layer.exact or plans == "Triton's interpreter does not run the kernels in Gluon, which compute on tensor cores"
    )
    assert isinstance(plans, str) or all(plan.alone and plan.unit_programs == 1 for plan in plans)
    assert all(plan.alone for plan in candidates(layer, backward, INTERPRETER))


def test_small_layers_run_in_the_interpreter():
    for spec in (LSTMSpec(), LSTMSpec(coupled=True, peephole="full")):
        for H, backward in ((1, False), (16, True), (33, True), (64, True)):
            assert ranked_plans(Layer(spec, 5, 100, H, 2, torch.float32), backward, INTERPRETER)[0].alone


@pytest.mark.parametrize(
    "name, capability, multiprocessors, shared_bytes, alike",
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 232_448, "h100"),
        ("NVIDIA H200", (9, 0), 132, 232_448, "h200"),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 166_912, "a100"),
        ("NVIDIA RTX A1000", (8, 6), 18, 101_376, "a10"),
        ("NVIDIA A10", (8, 6), 72, 101_376, "a10"),
        ("NVIDIA L40S", (8, 9), 142, 101_376, "l40s"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), 76, 101_376, "rtx4090"),
        ("NVIDIA GeForce RTX 5090", (12, 0), 170, 101_376, "rtx5090"),
        ("NVIDIA B300", (10, 3), 148, 232_448, "b200"),
    ],
)
def test_a_device_has_the_drivers_limits_and_the_rates_of_its_kind(
    name, capability, multiprocessors, shared_bytes, alike, monkeypatch
):
    properties = SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=multiprocessors,
        shared_memory_per_block_optin=shared_bytes, L2_cache_size=30 * 2**20,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu_of.cache_clear()
    try:
        gpu = gpu_of(torch.device("cuda", 0))
    finally:
        gpu_of.cache_clear()
    assert (gpu.name, gpu.capability) == (name, 10 * capability[0] + capability[1])
    assert (gpu.multiprocessors, gpu.shared_bytes) == (multiprocessors, shared_bytes)
    expected = GPUS[alike]
    assert (gpu.tflop_per_s, gpu.clock_ghz) == (expected.tflop_per_s, expected.clock_ghz)
    assert gpu.memory_gb_per_s == expected.memory_gb_per_s and gpu.l2_bytes == 30 * 2**20


@pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS.keys())
def test_nominal_constants_are_those_of_the_gpu(gpu):
    constants = nominal_constants(gpu)
    assert constants.multiprocessors == gpu.multiprocessors and constants.l2_bytes == gpu.l2_bytes
    assert constants.on_chip_bytes == gpu.shared_bytes + 65_536 * 4  # of registers
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


@thorough
@given(layers, passes, machines)
def test_weights_are_streamed_only_where_no_plan_keeps_them_all(layer, backward, gpu):
    plans = list(candidates(layer, backward, gpu))
    assert len({plan.streamed > 0 for plan in plans}) <= 1
    if any(plan.streamed for plan in plans) and not layer.P:  # h of a few elements is held by a few programs
        assert layer.recurrent_bytes * layer.D > gpu.multiprocessors * gpu.shared_bytes / 4


WIDE = ANCHOR._replace(H=4096)
"""128 MiB of weights, in 128 programs of 1 MiB."""


@pytest.mark.parametrize(
    "changed, gpu, backward, streamed, beyond",
    [
        (dict(), "h100", False, 14, 11),  # of 16 chunks of 8 MiB; 25 MiB are half of L2
        (dict(B=8), "h100", False, 12, 9),  # smaller sums leave room for a third chunk in shared memory, and operands
        (dict(), "h100", True, 52, 40),  # of 64 chunks of 2 MiB
        (dict(), "b200", False, 14, 7),  # half of L2 is 63 MiB
        (dict(H=1840, dtype=torch.float32, precision="tf32"), "h100", False, 8, 2),  # 3.6 MiB each
        (dict(H=2048, D=2, dtype=torch.float32, precision="tf32"), "h100", False, 14, 11),
        (dict(spec=LSTMSpec(coupled=True)), "h100", False, 14, 10),  # of 6 MiB: a fourth of the rows is zero
    ],
    ids=str,
)
def test_weights_beyond_the_chip_are_streamed(changed, gpu, backward, streamed, beyond):
    plan = ranked_plans(WIDE._replace(**changed), backward, GPUS[gpu])[0]
    assert (plan.streamed, plan.beyond_l2) == (streamed, beyond)
    assert plan.kept + plan.streamed <= plan.chunks and f" streamed {streamed} " in plan.describe()
    assert plan.shared_bytes <= GPUS[gpu].shared_bytes


def test_there_is_a_plan_for_every_number_of_units_that_has_its_programs():
    for H, D, backward in itertools.product((2305, 3000, 4096, 4224), (1, 2), (False, True)):
        plans = ranked_plans(WIDE._replace(H=H, D=D), backward, H100)
        programs = math.ceil(H / 32) * D
        if programs <= 132:
            assert all(plan.streamed for plan in plans)
        else:
            assert plans.endswith(f"; to stream a part of them takes {programs} multiprocessors")


def test_the_estimate_of_streamed_weights_by_hand():
    plan = ranked_plans(WIDE, False, H100)[0]
    assert plan.describe() == "U32 R16/16 K32x8x16 by 4 kept 2 streamed 14 128x1x1 data"
    chunk = 8 * 4 * 32 * 64  # bytes of a program: of 8 warps 64 bytes of 128 rows
    of_l2 = 3 * chunk / (40 * 1.83e3)
    us = 1.46 * (1.27 + 0.0139 * 16 * 8 + 0.281 * 3 + 0.63 * of_l2) + 11 * chunk * 128 / 3.352e6
    assert plan.estimate_us == pytest.approx(us, rel=1e-12)
    assert plan.tile_bytes == 2**20 and plan.shared_bytes == 2 * chunk + 8 * 128 * 16 * 4
    stream, accumulators, operands = 128 // 2, 128 * 16 // 32, 4 * 2 * 4
    assert plan.register_bytes == 4 * (stream + accumulators + operands)

    coupled = ranked_plans(WIDE._replace(spec=LSTMSpec(coupled=True)), False, H100)[0]
    chunk = 8 * 3 * 32 * 64
    of_l2 = 4 * chunk / (40 * 1.83e3)
    us = 1.46 * (1.27 + 0.0139 * 16 * 8 + 0.281 * 3 + 0.63 * of_l2) + 10 * chunk * 128 / 3.352e6
    assert coupled.estimate_us == pytest.approx(us, rel=1e-12)

    backward = ranked_plans(WIDE, True, H100)[0]
    assert backward.describe() == "U32 R16/16 K32x8x64 by 8 kept 12 streamed 52 128x1x1 data"
    chunk = 8 * 32 * 64
    of_l2 = 12 * chunk / (40 * 1.83e3)
    us = 1.38 * (1.27 + 0.0139 * 16 * 32 + 0.281 * 7 + 0.63 * of_l2) + 40 * chunk * 128 / 3.352e6
    assert backward.estimate_us == pytest.approx(us, rel=1e-12)


def test_a_plan_in_few_words():
    plan = replace(first(ANCHOR._replace(B=12), False, num_warps=8, group=3), kept=0)
    assert plan.describe() == "U16 R6/8 K32x8x3 48x2x1 data"
    assert replace(plan, kept=2).describe() == "U16 R6/8 K32x8x3 kept 2 48x2x1 data"
    assert replace(plan, streamed=1).describe() == "U16 R6/8 K32x8x3 streamed 1 48x2x1 data"
    assert replace(plan, group=1, kept=1, row_blocks=4).describe() == "U16 R6/8 K32x8x3 by 1 kept 1 48x2x1 of 4 data"
    assert replace(plan, kept=3, together=2).describe() == "U16 R6/8 K32x8x3 kept 3 48x2x1 data in pairs"
    exact = first(EXACT._replace(B=12), False)
    assert exact.describe() == "U16 R6/8 K32x8x3 48x2x1 data"
    assert replace(exact, group=1, wait="counter").describe() == "U16 R6/8 K32x8x3 by 1 48x2x1 counter"
    assert replace(exact, wait=None, unit_programs=1).describe() == "U16 R6/8 K32x8x3 1x2x1 alone"
