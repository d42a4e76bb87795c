"""Statistics of rows whose units are on many programs, in Gluon: a small exchange within a step.

Shapes: a block (ROWS, UNITS) is a program's own in the layout `own` of tiles.py, in which 8 lanes of a warp have units
of the same row. A slot has for each row block a line for each row, and in that two float32 of every program:

- of `publish_moments` the mean of the program's values of the row, and the sum of their squared distances from it
- of `publish_sums` two sums

Each of the 8 lanes of a row reads a part of its line, 16 bytes at a time, in inline PTX that waits as polling.py does;
then they add what they have by shuffles. So a warp reads the statistics of its rows without shared memory or barrier.
A line is filled up to whole loads of 8 lanes; what is behind the last program is zero and has no weight. Sums are added
up. Means are taken relative to that of the first program: the sum of their squares is then at most so many times that
of all distances as there are programs, and what is subtracted from it cancels few digits.
"""

from __future__ import annotations

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from lstm_triton_kernels import tensor_core_plan
from lstm_triton_kernels.normalize import NORM_EPS
from lstm_triton_kernels.polling import missing_ptx
from lstm_triton_kernels.sync import publish
from lstm_triton_kernels.tiles import row_in_block, warps_across

MOST_LOADS = tensor_core_plan.STATISTICS_LOADS

STATISTICS_PAUSE = gl.constexpr(tensor_core_plan.PAUSE)
"""Clocks from a program's own statistics to its first poll at most: less than in the exchange of h, as less is read."""

statistics_loads = triton.constexpr_function(tensor_core_plan.statistics_loads)


@triton.constexpr_function
def line_elements(H, units):
    """Return the float32 of a row in a slot."""
    return 32 * statistics_loads(H, units)


@triton.constexpr_function
def rows_of_thread(rows, units, parts, warps):
    """Return of how many rows a thread has elements in the layout `own`."""
    if parts == 1:
        return rows // (4 * warps)
    return max(1, rows * warps_across(units, warps) // (4 * warps))


@triton.constexpr_function
def statistics_ptx(rows, H, units, parts, blocks, pauses):
    """Return inline PTX that reads the lines of so many rows of a thread and combines them; and its constraints.

    - H, units, parts: of the layer and of a program
    - blocks: of moments the values of a unit, for mean and reciprocal standard deviation; 0: the two sums
    - pauses: whether clocks of the multiprocessor pass before the first poll

    Outputs: the two statistics and the polls left, each of all rows; inputs: the address of a line, the most polls,
    with `pauses` the clocks, likewise.
    """
    loads = statistics_loads(H, units)
    weights = line_weights(H, units, blocks) if blocks else None
    operands = [[f"${rows * n + row}" for row in range(rows)] for n in range(6)]
    first, second, left, line, most, clocks = operands
    # The lanes of a row are adjacent, or with one part every fourth.
    to_lane = ["shr.b32 %lane, %lane, 2;"] if parts == 1 else ["and.b32 %lane, %lane, 7;"]
    across = (4, 8, 16) if parts == 1 else (1, 2, 4)
    order = [(row, n) for row in range(rows) for n in range(loads)]
    pieces = [order[n : n + MOST_LOADS] for n in range(0, len(order), MOST_LOADS)]
    lines = [
        "{", ".reg .pred %absent, %any, %p;", ".reg .b32 %seen, %t, %start, %now, %lane, %left;",
        ".reg .f32 %d, %w, %v, %n;", f".reg .b64 %off, %at<{rows}>;", f".reg .b32 %word<{4 * MOST_LOADS}>;",
        f".reg .b32 %shift<{rows}>;", f".reg .pred %miss<{MOST_LOADS + rows}>;", f".reg .f32 %a<{rows}>, %q<{rows}>;",
    ]  # fmt: skip
    if pauses:
        lines += ["mov.u32 %start, %clock;", "PAUSE:", "mov.u32 %now, %clock;", "sub.u32 %t, %now, %start;"]
        lines += [f"setp.lt.u32 %any, %t, {clocks[0]};", "@%any bra PAUSE;"]
    lines += ["mov.u32 %lane, %laneid;", *to_lane, "mul.wide.u32 %off, %lane, 16;", f"mov.b32 %left, {most[0]};"]
    lines += [f"add.s64 %at{row}, {line[row]}, %off;" for row in range(rows)]
    lines += [f"mov.f32 %{sum_}{row}, 0f00000000;" for row in range(rows) for sum_ in "aq"]
    for number, piece in enumerate(pieces):
        asks = []
        for k, load in enumerate(piece):
            row, n = load
            words = [f"%word{4 * k + m}" for m in range(4)]
            asks.append((f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(words)}}}, [%at{row}+{128 * n}];", words))
            if weights and n == 0:
                asks.append((f"ld.relaxed.gpu.global.b32 %shift{row}, [{line[row]}];", [f"%shift{row}"]))
        lines += [ask for ask, _ in asks]
        lines += [f"AGAIN{number}:", "setp.ne.b32 %any, 0, 0;"]
        for k, asked in enumerate(asks):
            words = asked[1]
            if len(words) == 1:
                lines.append(f"setp.eq.u32 %miss{k}, {words[0]}, 0xFFFFFFFF;")
            else:
                lines += missing_ptx(words, f"%miss{k}", 32, True)
            lines.append(f"or.pred %any, %any, %miss{k};")
        lines += [
            "vote.sync.any.pred %any, %any, 0xffffffff;",
            f"@!%any bra THERE{number};",
            "sub.s32 %left, %left, 1;",
        ]
        lines += [f"@%miss{k} {ask}" for k, (ask, _) in enumerate(asks)]
        lines += ["setp.gt.s32 %any, %left, 0;", f"@%any bra AGAIN{number};", f"THERE{number}:"]
        for k, load in enumerate(piece):
            row, n = load
            for half in range(2):
                one, two = f"%word{4 * k + 2 * half}", f"%word{4 * k + 2 * half + 1}"
                if not weights:
                    lines += [f"add.f32 %a{row}, %a{row}, {one};", f"add.f32 %q{row}, %q{row}, {two};"]
                    continue
                lines += weight_ptx(16 * n + half, weights)
                lines += [f"sub.f32 %d, {one}, %shift{row};", "mul.f32 %v, %d, %w;", f"add.f32 %a{row}, %a{row}, %v;"]
                lines += [f"add.f32 %q{row}, %q{row}, {two};", f"fma.rn.f32 %q{row}, %v, %d, %q{row};"]
    for lanes in across:
        for row in range(rows):
            for sum_ in (f"%a{row}", f"%q{row}"):
                lines += [f"shfl.sync.bfly.b32 %v, {sum_}, {lanes}, 31, 0xffffffff;", f"add.f32 {sum_}, {sum_}, %v;"]
    for row in range(rows):
        if weights:
            inverse = as_ptx(1.0 / (blocks * H))
            lines += [f"mul.f32 %d, %a{row}, {inverse};", f"add.f32 {first[row]}, %d, %shift{row};", "neg.f32 %d, %d;"]
            lines += [f"fma.rn.f32 %q{row}, %a{row}, %d, %q{row};", f"mov.f32 %v, {as_ptx(NORM_EPS)};"]
            lines += [f"fma.rn.f32 %q{row}, %q{row}, {inverse}, %v;", f"rsqrt.approx.ftz.f32 {second[row]}, %q{row};"]
        else:
            lines += [f"mov.f32 {first[row]}, %a{row};", f"mov.f32 {second[row]}, %q{row};"]
        lines.append(f"mov.b32 {left[row]}, %left;")
    lines.append("}")
    constraints = ["=&f"] * (2 * rows) + ["=&r"] * rows + ["l"] * rows + ["r"] * (rows * (1 + pauses))
    return "\n".join(lines), ",".join(constraints)


@triton.constexpr_function
def weight_ptx(first, weights):
    """Return PTX for %w, the number of values of program 2 %lane + `first` of a line; 0 where there is none."""
    programs, values, of_last = weights
    if first + 14 < programs - (values != of_last):
        return [f"mov.f32 %w, {as_ptx(values)};"]
    behind, last = (programs - first + 1) // 2, programs - 1 - first  # lanes from `behind` on have none
    found = [f"setp.lt.s32 %p, %lane, {behind};", f"selp.f32 %w, {as_ptx(values)}, 0f00000000, %p;"]
    if values != of_last and last % 2 == 0 and 0 <= last < 16:
        found += [f"setp.eq.s32 %p, %lane, {last // 2};", f"selp.f32 %w, {as_ptx(of_last)}, %w, %p;"]
    return found


@triton.constexpr_function
def as_ptx(value):
    """Return a positive number as PTX writes one of float32, by its bits."""
    mantissa, exponent = float(value).hex().removeprefix("0x1.").split("p")  # of 52 bits, of which float32 has 23
    return f"0f{((int(exponent) + 127) << 23) + ((int(mantissa, 16) + (1 << 28)) >> 29):08X}"


@triton.constexpr_function
def line_weights(H, units, blocks):
    """Return the programs of a line, and the values of a program and of the last, where a unit has so many values."""
    programs = -(-H // units)
    return programs, blocks * units, blocks * (H - (programs - 1) * units)


@gluon.jit
def by_group(x, GROUP: gl.constexpr):
    """Return a block (ROWS, UNITS) as (ROWS, groups, GROUP)."""
    return gl.reshape(x, [x.shape[0], x.shape[1] // GROUP, GROUP])


@gluon.jit
def rounded_product(x, y):
    """Return x y of two blocks of float32, which no compiler makes a part of a fused multiply-add.

    In a sum by shuffles each lane adds its own product to another's, and only of rounded ones all have the same sum.
    """
    return gl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def add_pairs(first, second, other_first, other_second):
    """Return the sums of two pairs."""
    return first + other_first, second + other_second


@gluon.jit
def combine_moments(n, mean, squares, other_n, other_mean, other_squares):
    """Return count, mean and sum of squared distances of two sets of values, from those of each (Chan et al. 1979)."""
    both, distance = n + other_n, other_mean - mean
    part = other_n / gl.maximum(both, 1.0)
    return both, mean + distance * part, squares + other_squares + distance * distance * (n * part)


@gluon.jit
def publish_pairs(slot_ptr, rows, first, second, H: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr,
                  PARTS: gl.constexpr):  # fmt: skip
    """Publish two values (ROWS,) of a program, side by side in the lines of `rows` rows."""
    row = row_in_block(gl.arange(0, ROWS, layout=first.type.layout), ROWS, PARTS)
    place = slot_ptr + row * line_elements(H, UNITS) + gl.program_id(0) * 2
    publish(place, first, row < rows)
    publish(place + 1, second, row < rows)


@gluon.jit
def publish_moments(
    slot_ptr, rows, x, inside, H: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr
):
    """Publish mean and sum of squared distances of a program's own values, a tuple of blocks (ROWS, UNITS).

    inside: which units exist, (ROWS, UNITS); the values of others are zero. What a warp has is combined by shuffles,
    and then what its groups of units have with others, of other warps, once through shared memory.
    """
    GROUP: gl.constexpr = UNITS if PARTS == 1 else 8
    total = x[0]
    for n in gl.static_range(1, len(x)):
        total += x[n]
    total = gl.sum(by_group(total, GROUP), 2)
    if H % GROUP == 0:
        mean = total * (1.0 / (len(x) * GROUP))
    else:
        count = len(x) * gl.sum(by_group(gl.where(inside, 1.0, 0.0), GROUP), 2)
        mean = total / gl.maximum(count, 1.0)
    for n in gl.static_range(len(x)):
        distance = by_group(x[n], GROUP) - gl.expand_dims(mean, 2)
        if H % GROUP != 0:
            distance = gl.where(by_group(inside, GROUP), distance, 0.0)
        if n == 0:
            distances = rounded_product(distance, distance)
        else:
            distances += rounded_product(distance, distance)
    squares = gl.sum(distances, 2)
    if GROUP == UNITS:
        mean, squares = gl.sum(mean, 1), gl.sum(squares, 1)  # of one group
    else:
        if H % GROUP == 0:
            count = total * 0.0 + len(x) * GROUP
            if H % UNITS != 0:
                there = gl.max(by_group(inside.to(gl.int32), GROUP), 2)
                count = gl.where(there != 0, count, 0.0)
        _, mean, squares = gl.reduce((count, mean, squares), 1, combine_moments)
    publish_pairs(slot_ptr, rows, mean, squares, H, ROWS, UNITS, PARTS)


@gluon.jit
def publish_sums(
    slot_ptr, rows, first, second, H: gl.constexpr, ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr
):
    """Publish the sums of two blocks (ROWS, UNITS) over a program's own units; zero where there is no unit."""
    first, second = gl.reduce((first, second), 1, add_pairs)
    publish_pairs(slot_ptr, rows, first, second, H, ROWS, UNITS, PARTS)


@gluon.jit
def read_pairs(
    slot_ptr, in_block, rows, polls, clocks, BLOCKS: gl.constexpr, PAUSES: gl.constexpr, H: gl.constexpr,
    ROWS: gl.constexpr, UNITS: gl.constexpr, PARTS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Wait for the lines of a row block; returns two statistics of each row, (ROWS,) as in_block, and the polls left.

    BLOCKS: of moments how many values a unit has; 0: of sums. in_block: the rows of the block; polls, clocks: of its
    shape. Less than one poll left: a warp gave up.
    """
    N: gl.constexpr = rows_of_thread(ROWS, UNITS, PARTS, WARPS)
    PTX: gl.constexpr = statistics_ptx(N, H, UNITS, PARTS, BLOCKS, PAUSES)
    line = slot_ptr + gl.minimum(in_block, rows - 1) * line_elements(H, UNITS)
    sources = [line.to(gl.int64, bitcast=True), polls]
    if PAUSES:
        sources = sources + [clocks]  # noqa: RUF005
    first, second, left = gl.inline_asm_elementwise(
        PTX[0], PTX[1], sources, dtype=(gl.float32, gl.float32, gl.int32), is_pure=False, pack=N
    )
    return first, second, gl.where(left > 0, polls, 0)
