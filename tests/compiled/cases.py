"""The cases that are executed: a quick selection, and by group all of them.

In each list shapes and flags take turns, so that each meets each variant and type somewhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from lstm_triton_kernels.gpus import GPUS
from lstm_triton_kernels.plan import PersistentPlan
from lstm_triton_kernels.planner import ranked_plans
from lstm_triton_kernels.regularize import Rules
from lstm_triton_kernels.sizes import Layer

from benchmarks import suites
from lstm_triton import VARIANTS, estimates
from tests.compiled.layers import DTYPES, Case, Plans
from tests.support.parity import RULES

TENSOR_CORES = ("bf16", "fp16", "tf32")
"""The types whose kernels are in Gluon; programs wait by the data there, and by either way in exact float32."""

FLAGS: list[dict[str, bool]] = [{}, {"lengths": True}, {"resets": True}, {"lengths": True, "resets": True}]


def quick() -> Iterator[Case]:
    """Every variant in one program, in several by each engine and wait, and step by step.

    Each flag, type, kind of memory, way to cut the columns and layout of the exchange buffer somewhere.
    """
    types = list(DTYPES)
    for n, spec in enumerate(VARIANTS):
        dtype = types[(n + 1) % 4]
        flags = FLAGS[(n + n // 4) % 4]
        H, block_u = (8, 16) if dtype == "fp32" else (24, 32)  # so wide a block has all units
        yield Case(spec.name, dtype, 2, (5, 1)[n // 4 % 2], H, 1 + n % 2, block_u=block_u, **flags)
    for n, (spec, wait) in enumerate(itertools.product(VARIANTS, ("data", "counter"))):
        flags = FLAGS[(n // 2 + n // 8) % 4]
        yield Case(spec.name, "fp32", 2, (1, 5, 11)[n % 3], 136, 1 + (n in (3, 10)), wait, **flags)
        flags, H = FLAGS[(n + n // 4) % 4], (136, 100, 72)[n // 2 % 3]
        yield Case(spec.name, TENSOR_CORES[n % 3], 2, (5, 1, 19)[n % 3], H, 1 + (n in (4, 9)), "data", **flags)
    yield Case("standard", "bf16", 2, 11, 136, wait="data", multiprocessors=17)
    yield Case("full", "tf32", 2, 9, 136, wait="data", multiprocessors=9, lengths=True)
    yield Case("diagonal", "bf16", 1, 9, 264, wait="data", multiprocessors=33)
    for n, dtype in enumerate(TENSOR_CORES):
        cut = Case(("standard", "coupled", "full")[n], dtype, 2, 9, 136, wait="data", resets=n == 1)
        yield cut.with_fields(kept=1, group=1)
        yield cut.with_fields(tiled=n != 0, group=1)
        yield replace(cut, weak=True).with_fields(tiled=n == 0, kept=n // 2)
    yield from shared_rows()
    yield from within_a_step()
    yield from streamed()
    yield from regularized_plain()
    yield from with_rules()
    for n, spec in enumerate(VARIANTS):
        yield Case(spec.name, types[n % 4], 2, (5, 17)[n % 2], 24, 1 + n % 2, stepwise=True, resets=n % 3 == 0, I=7)
    yield Case("standard", "bf16", 1, 64, 128, stepwise=True)  # by wgmma
    for dtype, wait in (("bf16", "data"), ("fp32", "data"), ("fp32", "counter")):
        rows = Case("diagonal", dtype, 2, 5, 136, wait=wait, lengths=True)
        yield rows.with_blocks_of(3)
        yield rows.with_blocks_of(3, row_programs=1)
        yield Case("standard", dtype, 2, 1, 136, wait=wait, weak=True)
    yield Case("full", "fp16", 2, 7, 72, 2, wait="data", resets=True, weak=True).with_blocks_of(3, row_programs=2)
    yield Case("standard", "fp32", 2, 5, 72, wait="data", weak=True).with_blocks_of(3, row_programs=1)
    yield Case("coupled", "fp32", 2, 1, 136, wait="counter", weak=True)
    yield Case("diagonal+current", "fp16", 2, 5, 136, wait="data", lengths=True, resets=True, weak=True)
    yield Case("standard", "bf16", 2, 5, 136, wait="data", gradients=(False, True, False, False))
    yield Case("full", "bf16", 3, 5, 64, gradients=(True, False, False, False), recompute=True)
    yield Case("standard", "fp32", 3, 5, 136, wait="counter", infer=True)
    yield Case("standard", "bf16", 3, 5, 136, wait="data", infer=True)
    yield Case("diagonal", "bf16", 2, 7, 136, wait="data", infer=True).with_blocks_of(3, row_programs=2)
    yield Case("coupled", "fp16", 1, 5, 136, wait="data", gradients=(False, False, True, True))
    yield Case("coupled", "fp32", 1, 5, 136, wait="counter", gradients=(False, False, True, True))
    for n, dtype in enumerate(types):
        variant = ("standard", "coupled", "diagonal+current", "full")[n]
        yield Case(variant, dtype, 2, 5, (136, 40)[n % 2], wait=("data", None)[n % 2], capability=80, **FLAGS[n])
    yield Case("standard", "tf32", 2, 64, 40, stepwise=True, capability=80)


def rules_of(*names: str) -> Rules:
    """Return the rules of these names, alike in all cases; limits are moved to where no value is (tests/support)."""
    values = dict(hidden_dropout=0.4, candidate_dropout=0.3, zoneout_h=0.3, zoneout_c=0.2, cell_clip=0.6, proj_clip=0.2)
    return Rules.rounded(*(value * (name in names) for name, value in values.items()))


EACH_RULE = tuple(map(rules_of, Rules._fields))
ZONEOUT = rules_of("zoneout_h", "zoneout_c")
ON_HIDDEN = rules_of("hidden_dropout", "zoneout_h", "zoneout_c", "cell_clip")
ON_CANDIDATE = rules_of("candidate_dropout", "zoneout_h", "zoneout_c", "cell_clip")
EVERY_RULE = rules_of(*Rules._fields[:5])


def clips_projected(case: Case) -> Case:
    """Return the case with a limit of the projected h, too."""
    return replace(case, rules=case.rules._replace(proj_clip=EACH_RULE[5].proj_clip))


def with_rules() -> Iterator[Case]:
    """Regularised steps by the kernels in Gluon: each rule alone, and all with all that these kernels have."""
    for n, rules in enumerate(EACH_RULE[:5]):
        yield Case("standard", TENSOR_CORES[n % 3], 2, 5, 40, wait="data", rules=rules, weak=n == 3)
    yield Case("standard", "bf16", 2, 5, 40, wait="data", rules=EACH_RULE[0], capability=80)
    yield Case("coupled", "tf32", 3, 5, 40, 2, wait="data", P=24, rules=EACH_RULE[5], lengths=True)
    turns = Case("diagonal", "bf16", 3, 7, 40, 2, wait="data", lengths=True, resets=True, rules=ON_HIDDEN)
    yield turns.with_blocks_of(3, row_programs=1)
    yield replace(turns, T=2, B=5, D=1, weak=True, infer=True, rules=ON_CANDIDATE).with_blocks_of(3, row_programs=1)
    within = clips_projected(Case("full+current", "fp16", 3, 5, 40, wait="data", P=24, rules=ON_HIDDEN, resets=True))
    yield within
    yield replace(within, D=2, lengths=True, resets=False).with_blocks_of(3, row_programs=1)
    yield Case("coupled+full", "tf32", 3, 5, 40, wait="data", rules=ON_HIDDEN, training=False, resets=True)
    turned = Case("coupled+diagonal+current", "tf32", 2, 5, 40, wait="data", P=20, rules=ON_HIDDEN, weak=True)
    yield clips_projected(turned.with_blocks_of(3, row_programs=1))
    many = Case("coupled+diagonal+current", "tf32", 2, 59, 40, wait="data", P=24, rules=ON_CANDIDATE, training=False)
    yield clips_projected(many.with_shared_rows(16, 32, 4))
    yield Case("standard", "bf16", 2, 59, 40, wait="data", rules=ON_HIDDEN, lengths=True).with_shared_rows(64, 64, 8)
    streams = Case("standard", "fp16", 2, 13, 72, wait="data", rules=EVERY_RULE, resets=True, recompute=True)
    yield streams.with_streamed_weights(16, 8, 2)


def shared_rows() -> Iterator[Case]:
    """Many rows, which the warps of a program share."""
    for n, (units, tile_rows, warps) in enumerate(((8, 32, 4), (16, 32, 2), (64, 64, 8), (16, 64, 4), (16, 128, 8))):
        for k, variant in enumerate(("standard", "coupled+diagonal", "full")):
            m = n + k
            B, flags = (tile_rows - 5, 2 * tile_rows - 3)[m % 2], FLAGS[(m + k) % 4]
            case = Case(variant, TENSOR_CORES[m % 3], 2, B, (40, 72)[k % 2], 1 + (m == 4), "data", weak=m == 3, **flags)
            yield case.with_shared_rows(16 if variant == "full" else units, tile_rows, warps)


def within_a_step() -> Iterator[Case]:
    """Products within a step: projections, and full peepholes on c_t."""
    variants = ("standard", "full+current", "coupled+diagonal+current", "full", "coupled+full+current")
    for n, variant in enumerate(variants):
        P, dtype, flags = (40, 0, 24, 16, 20)[n], TENSOR_CORES[n % 3], FLAGS[(n + 1) % 4]
        yield Case(variant, dtype, 2, (5, 19)[n % 2], (72, 40)[n % 2], 1 + (n == 2), "data", P=P, **flags)
        case = Case(variant, TENSOR_CORES[(n + 1) % 3], 2, 7, 136, wait="data", P=P, weak=n == 4, **flags)
        yield case.with_blocks_of(3, row_programs=2) if n % 2 else case.with_fields(tiled=n == 2)
    for n, (variant, P) in enumerate((("standard", 24), ("full+current", 40), ("coupled+full+current", 0))):
        many = Case(variant, TENSOR_CORES[n], 2, (27, 61, 27)[n], 72, wait="data", P=P, lengths=n == 1)
        yield many.with_shared_rows(16, 32, 4)
    for wait in ("data", "counter"):
        yield Case("full+current", "fp32", 2, 5, 72, wait=wait, resets=True)
        yield Case("coupled", "fp32", 2, 5, 72, wait=wait, P=20, lengths=True)
    yield Case("full+current", "fp32", 2, 3, 8, block_u=16, P=5)


def streamed() -> Iterator[Case]:
    """Weights that do not all stay on the chip: by one to eight warps, of one row block and of two."""
    for n, (variant, H, units, tile_rows, warps) in enumerate(
        (
            ("standard", 136, 32, 8, 2), ("coupled", 72, 16, 16, 4), ("full", 72, 16, 8, 2),
            ("diagonal+current", 264, 16, 16, 8), ("coupled+full", 40, 16, 8, 1), ("coupled+diagonal", 100, 16, 8, 2),
        )
    ):  # fmt: skip
        B = (tile_rows - 3, 2 * tile_rows - 3)[n // 2 % 2]
        case = Case(variant, TENSOR_CORES[n % 3], 2, B, H, 1 + (n == 1), "data", weak=n in (2, 5), **FLAGS[(n + 1) % 4])
        yield case.with_streamed_weights(units, tile_rows, warps)
    yield Case("standard", "bf16", 2, 5, 100, wait="data", capability=80).with_streamed_weights(16, 8, 2)
    for n, (variant, P) in enumerate((("full+current", 0), ("coupled", 60), ("coupled+full+current", 40))):
        case = Case(variant, TENSOR_CORES[n], 2, 5, 136, wait="data", P=P, resets=n == 1)
        yield case.with_streamed_weights(16, 8, 2)


def regularized_plain() -> Iterator[Case]:
    """Regularised steps, step by step and by the persistent kernels in plain Triton."""
    hidden, candidate, zoned = RULES[3], RULES[4], RULES[2]
    clipped = hidden._replace(proj_clip=0.25)
    yield Case("standard", "bf16", 2, 5, 24, 2, stepwise=True, rules=hidden, resets=True)
    yield Case("coupled+diagonal+current", "fp32", 3, 17, 40, stepwise=True, rules=candidate)
    yield Case("full+current", "tf32", 2, 5, 24, stepwise=True, rules=hidden)
    yield Case("full+current", "fp16", 2, 5, 40, stepwise=True, P=24, rules=clipped)
    yield Case("standard", "bf16", 2, 64, 128, stepwise=True, rules=RULES[0])  # by wgmma
    yield Case("diagonal", "fp16", 2, 5, 24, stepwise=True, rules=zoned, training=False)
    yield Case("standard", "fp32", 3, 5, 8, 2, block_u=16, rules=hidden, resets=True, lengths=True)
    yield Case("full+current", "fp32", 2, 3, 8, block_u=16, P=5, rules=clipped)
    yield Case("coupled", "fp32", 2, 5, 8, block_u=16, rules=zoned, training=False)
    for n, (variant, P) in enumerate((("standard", 0), ("full+current", 0), ("diagonal", 20))):
        for wait in ("data", "counter"):
            rules = clipped if P else (hidden, candidate)[(n + (wait == "data")) % 2]
            case = Case(variant, "fp32", 2, 5, 72, wait=wait, P=P, rules=rules, lengths=n == 0, resets=n != 0)
            yield case.with_blocks_of(3, row_programs=1) if wait == "data" else case
    yield Case("standard", "fp32", 2, 5, 72, wait="data", rules=hidden, weak=True).with_blocks_of(3, row_programs=1)


def alone() -> Iterator[Case]:
    """Few units: one program has them all (where the plan is several programs after all, that)."""
    heights, rows = (8, 24, 64), (5, 16, 33, 1)
    for n, (spec, dtype) in enumerate(itertools.product(VARIANTS, DTYPES)):
        k = n + n // 4
        H, B = heights[(k + n // 4) % 3], rows[k % 4]
        yield Case(spec.name, dtype, 3, B, H, 1 + k % 2, **FLAGS[(k // 2) % 4])


def together() -> Iterator[Case]:
    """Programs that wait for each other."""
    heights, rows = (136, 256, 384), (5, 16, 1, 33)
    engines = [*itertools.product(TENSOR_CORES, ("data",)), ("fp32", "data"), ("fp32", "counter")]
    for n, (spec, (dtype, wait)) in enumerate(itertools.product(VARIANTS, engines * 2)):
        k = n + n // 10
        H, B = heights[k % 3], rows[(k // 2) % 4]
        D = 2 if H < 384 and k % 4 == 0 else 1
        yield Case(spec.name, dtype, 3, B, H, D, wait, **FLAGS[(k // 3) % 4])


def many() -> Iterator[Case]:
    """Several row blocks, two directions."""
    variants = ("standard", "coupled+diagonal", "diagonal+current", "full")
    for n, (variant, dtype) in enumerate(itertools.product(variants, DTYPES)):
        for wait in ("data", "counter") if dtype == "fp32" else ("data",):
            yield Case(variant, dtype, 3, 40, 264, 2, wait, **FLAGS[n % 4])


def weak() -> Iterator[Case]:
    """Every warp at its own pace, in weak memory."""
    for case in [*itertools.islice(together(), 0, None, 9), *itertools.islice(alone(), 1, None, 8)]:
        yield replace(case, weak=True)


def asked() -> Iterator[Case]:
    """Which gradients are given, recompute, inference, T=1, other tiles."""
    for n, gradients in enumerate(itertools.product((True, False), repeat=4)):
        if any(gradients):
            flags = dict(lengths=n % 3 == 0, recompute=n % 4 == 1)
            yield Case("standard", "bf16", 3, 5, (64, 136)[n % 2], gradients=gradients, **flags)
    for dtype, H, wait in (("fp32", 64, None), ("bf16", 64, "data"), ("bf16", 136, "data"), ("fp32", 136, "counter")):
        yield Case("standard", dtype, 4, 5, H, wait=wait, infer=True)
        yield Case("full", dtype, 4, 5, H, wait=wait, infer=True, lengths=True)
    yield Case("standard", "bf16", 1, 5, 136, wait="data")
    yield Case("coupled", "fp32", 1, 5, 136, wait="counter")
    for dtype, wait in (("bf16", "data"), ("tf32", "data"), ("fp32", "data"), ("fp32", "counter")):
        yield Case("standard", dtype, 6, 35, 264, wait=wait, block_u=16, lengths=True, resets=True)
    for H in (64, 136, 264):
        yield Case("standard", "bf16", 3, 33, H, multiprocessors=30)
        yield Case("coupled", "fp16", 3, 33, H, multiprocessors=9, lengths=True)
        yield Case("standard", "fp32", 3, 33, H, block_b=16)
    for n, (variant, dtype) in enumerate(itertools.product(("standard", "coupled", "full"), TENSOR_CORES)):
        cut = Case(variant, dtype, 3, 17, 264, wait="data", lengths=n % 2 == 0, resets=n % 3 == 0)
        for fields in (dict(kept=2), dict(group=1, tiled=False), dict(tiled=False, kept=1, group=1)):
            yield cut.with_fields(**fields)


def stepwise() -> Iterator[Case]:
    """Two launches a step, all variants."""
    sizes = ((17, 24), (64, 128), (300, 130), (1, 1), (33, 100), (5, 64))
    for n, (spec, dtype) in enumerate(itertools.product(VARIANTS, DTYPES)):
        B, H = sizes[(n + n // 4) % 6]
        T = (3, 1)[n % 5 == 0]
        yield Case(spec.name, dtype, T, B, H, 1 + n % 2, stepwise=True, resets=n % 3 == 0, I=7)


def sm80() -> Iterator[Case]:
    """Some of each for an A100."""
    variants = ("standard", "coupled", "diagonal+current", "full")
    for n, (variant, dtype) in enumerate(itertools.product(variants, DTYPES)):
        H, wait = ((64, None), (136, "data"), (136, "counter"), (100, None))[(n + n // 4) % 4]
        wait = wait if dtype == "fp32" or wait is None else "data"
        yield Case(variant, dtype, 3, 5, H, wait=wait, capability=80, **FLAGS[n % 4])
        yield Case(variant, dtype, 2, 64, 40, stepwise=True, capability=80)


def regularized() -> Iterator[Case]:
    """All rules with all variants: a row block a program and several, rows that warps share, weights that are streamed.

    Two of four cases without masks, as in evaluation, and every third in weak memory. In bfloat16 nothing is clipped
    together with other rules: of so many values some are too near the limit (tests/support/clipped.py).
    """
    all_rules = (*EACH_RULE, ZONEOUT, ON_HIDDEN, ON_CANDIDATE, EVERY_RULE)
    for n, (spec, rules) in enumerate(itertools.product(VARIANTS, all_rules)):
        dtype, flags, projects = TENSOR_CORES[n % 3], FLAGS[(n + n // 4) % 4], (n + n // 2) % 2 or rules.proj_clip > 0
        case = Case(
            spec.name, dtype, 3, 5, (40, 72)[n % 2], 1 + n // 3 % 2, "data", rules=rules, training=n // 2 % 2 == 0,
            P=24 * projects, weak=n % 3 == 1, **flags,
        )  # fmt: skip
        if dtype != "bf16":
            case = clips_projected(case) if projects else case
        elif rules not in EACH_RULE:
            case = replace(case, rules=rules._replace(cell_clip=0.0))
        kind = n // len(all_rules) + n
        if kind % 5 < 2:
            yield case.with_blocks_of(3, row_programs=1 + kind % 2) if kind % 5 else case
        elif kind % 5 == 2:
            yield case.with_streamed_weights(16, 8, 2)
        elif kind % 5 == 3:
            yield replace(case, B=27, weak=False).with_shared_rows(16, 32, 4)
        else:
            yield replace(case, infer=True, B=7).with_blocks_of(3, row_programs=1)


def large() -> Iterator[Case]:
    """Layers of 1,536 to 4,096 units at their full size, of one step and up to 128 rows; a minute each."""
    for variant, dtype, B, H, P in (
        ("standard", "bf16", 1, 2048, 0), ("standard", "bf16", 16, 2048, 0), ("coupled", "fp16", 16, 2048, 0),
        ("standard", "fp16", 16, 2048, 640), ("diagonal+current", "bf16", 8, 1536, 0),
        ("standard", "fp16", 32, 1536, 0), ("standard", "fp16", 128, 1536, 0), ("standard", "bf16", 128, 2048, 0),
        ("full", "fp16", 8, 1536, 0), ("standard", "tf32", 16, 1536, 0), ("coupled", "tf32", 16, 2048, 0),
        ("standard", "bf16", 16, 4096, 0),
    ):  # fmt: skip
        yield Case(variant, dtype, 1, B, H, wait="data", P=P)


class Planned(NamedTuple):
    """A pass of a layer of the suites on a plan."""

    layer: Layer
    backward: bool
    plan: PersistentPlan


def span_of(plan: PersistentPlan) -> int:
    """Return the columns of a chunk."""
    return plan.parts * plan.block_k


def planned() -> Iterator[Planned]:
    """Yield what the GPU suites launch first on an H100, one of each pass and tile; those of a kind take turns.

    Without products within a step, whose plans are not made for fewer units here: `within_a_step` has them.
    """
    found: dict[tuple[Any, ...], list[Planned]] = {}
    layers = [case.layer for case in suites.cases(suites.GPU_SUITES) if not case.cell]
    shapes = [layer for layer in layers if not (layer.P or layer.output_current)]
    for shape, ragged in itertools.product(shapes, (False, True)):
        whole = shape._replace(ragged=ragged)
        for backward in estimates.passes(whole).values():
            plans = ranked_plans(whole, backward, GPUS["h100"])
            if isinstance(plans, str):
                continue
            plan = plans[0]
            tile = (plan.block_u, plan.block_b, plan.block_k, span_of(plan), plan.chunks, plan.group, plan.num_warps)
            tile += (plan.kept, plan.together, plan.tiled, plan.streamed)
            kind = (backward, *tile, plan.wait, plan.exact, plan.blocks_per_program == 1)
            found.setdefault(kind, []).append(Planned(whole, backward, plan))
    for number, kin in enumerate(found.values()):
        yield kin[number * 7 % len(kin)]


def columns_of(layer: Layer, backward: bool, plan: PersistentPlan) -> int:
    """Return the columns of the product for each unit (resident.py, tiles.py)."""
    if backward:
        return 1 if plan.alone else layer.gates
    return 1 if plan.exact else 1 + (layer.matrices > 0)


def suite() -> Iterator[Case]:
    """The kernels of `planned`, on as many units as reach into the last chunk, on as few rows as have its blocks."""
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32"}
    for whole, backward, plan in planned():
        several = plan.blocks_per_program > 1
        columns = columns_of(whole, backward, plan)
        span = span_of(plan) // columns
        H = plan.block_u if plan.alone else max((plan.chunks - 1) * span + 16, 5 * plan.block_u)
        H = min(-(-H // 16) * 16, plan.chunks * span // 8 * 8) - 12 * (whole.H % 16 != 0)
        few = plan.block_b // 2 + 1 if plan.num_warps > plan.parts else 2
        rows = min(plan.rows, few if several else few + 1)
        B = 2 * rows + 1 if several else rows
        row_blocks = -(-B // rows)
        variant, dtype = whole.spec.name, names[whole.rate]
        case = Case(variant, dtype, 3, B, H, plan.directions, lengths=whole.ragged, resets=whole.ragged)
        small = replace(
            plan,
            unit_programs=-(-H // plan.block_u),
            rows=rows,
            row_blocks=row_blocks,
            row_programs=1 if several else row_blocks,
        )
        other = case.plan(not backward)
        yield replace(case, own_plans=Plans(other, small) if backward else Plans(small, other))


BY_HAND = ("suite", "large", "regularized")
"""Groups that `check` runs only if they are named; the second one is in no test."""

GROUPS = {
    "alone": alone,
    "streamed": streamed,
    "together": together,
    "many": many,
    "weak": weak,
    "asked": asked,
    "stepwise": stepwise,
    "sm80": sm80,
    "regularized": regularized,
    "suite": suite,
    "large": large,
}
