"""The results in brief, for the README: from rows to the text between its two marks.

Every number is a row's, or a mean or count of rows.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath

from lstm_triton_kernels.limit import Constants

from benchmarks.markdown import counted, dates, escaped, link_target, means_table, table
from benchmarks.rows import BASELINE, Row
from benchmarks.suites import CPU, MODES
from benchmarks.summary import (
    NO_GPU,
    OURS,
    Mean,
    compared,
    duration,
    geometric_means,
    in_order,
    in_turns_with_ours,
    in_words,
    is_gpu,
    kind,
    machines,
    name_key,
    number,
    older_note,
    ratio_in_words,
    ratio_of,
)

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def readme_block(
    rows: Sequence[Row],
    constants: Mapping[str, Constants],
    report_link: str,
    plots: Sequence[tuple[str, str]] = (),
) -> str:
    """The short form for the README: means and slowest rows of every GPU, then the CPU; or plainly that there is none.

    - plots: titles and paths, relative to the README; with GPU results the first is shown and the others are linked
    """
    rows = in_order(rows)
    on_gpu, on_cpu = [row for row in rows if is_gpu(row)], [row for row in rows if not is_gpu(row)]
    parts: list[str] = []
    if not on_gpu:
        parts.append(f"**{NO_GPU}**")
    for gpu in machines(on_gpu):
        parts += _gpu_in_brief([row for row in on_gpu if row.gpu == gpu], constants.get(gpu))
    for cpu in machines(on_cpu):
        parts += _cpu_in_brief([row for row in on_cpu if row.gpu == cpu], bool(on_gpu))
    if not on_cpu:
        parts.append("No CPU result yet.")
    links = [f"[{escaped(title)}]({link_target(path)})" for title, path in plots]
    if on_gpu and links:
        links[0] = f"!{links[0]}"
        parts.append(links.pop(0))
    report = f"All rows, how they were measured, and what failed: [{escaped(PurePath(report_link).name)}]"
    parts.append(f"{report}({link_target(report_link)}).")
    if links:
        parts.append("Plots: " + ", ".join(links) + ".")
    return "\n\n".join(parts)


def _gpu_in_brief(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    versions = _versions(rows, ("driver", "PyTorch", "Triton", "cuDNN"), ("driver", "torch", "triton", "cudnn"))
    parts = [
        f"**{escaped(rows[0].gpu)}**, {versions}, {dates(rows)}. Geometric means of the time of the baseline over the "
        "time of each, **above 1 is faster**:"
    ]
    means = geometric_means(compared(rows))
    parts += means_table(means)
    parts += _slower_in_brief(means)
    parts += _missing_in_brief(rows)
    parts += _limit_in_brief(rows, constants)
    return parts


def _slower_in_brief(means: Sequence[Mean]) -> list[str]:
    """How many rows are slower than the baseline, and the slowest: of the library per suite, of others in all."""
    groups: dict[tuple[str, str], list[Mean]] = {}
    for mean in means:
        if mean.worst is not None:
            groups.setdefault((mean.name, mean.suite if mean.name == OURS else "all"), []).append(mean)
    lines = []
    for (name, suite), group in sorted(groups.items(), key=lambda item: name_key(item[0][0])):
        worst = min((mean.worst for mean in group if mean.worst is not None), key=lambda row: ratio_of(row) or 0.0)
        slower = f"{sum(mean.slower for mean in group)} of {sum(mean.count for mean in group)}"
        which = f"{worst.suite}, " * (suite == "all") + f"{worst.mode}, {worst.dtype}, {worst.shape}"
        lines.append([name, suite, slower, ratio_in_words(worst), which])
    heads = ["provider", "suite", "slower rows", "slowest", "which"]
    text = "Rows that are slower than their baseline, those that are noise not counted, and the slowest of all:"
    return [text, table(heads, lines, right=(2, 3))] if lines else []


def _missing_in_brief(rows: Sequence[Row]) -> list[str]:
    counts: dict[str, Counter[str]] = {}
    for row in rows:
        if ratio_of(row) is None:
            counts.setdefault(row.name, Counter())[kind(row)] += 1
    if not counts:
        return []
    total = sum(kinds.total() for kinds in counts.values())
    words = "; ".join(f"`{name}` {in_words(counts[name])}" for name in sorted(counts, key=name_key))
    return [f"Of {counted(len(rows), 'row')} {total:,} have no ratio: {words}. The report names each."]


def _limit_in_brief(rows: Sequence[Row], constants: Constants | None) -> list[str]:
    """How far the library and the baseline are from the least time, and the constants that it is made of."""
    rows = in_turns_with_ours(rows)
    sentences = []
    for mode in dict.fromkeys(row.mode for row in rows):
        found: dict[str, list[float]] = {}
        for row in rows:
            if row.mode == mode and row.limit_ratio is not None and (row.name == OURS or row.is_baseline):
                found.setdefault(row.name, []).append(row.limit_ratio)
        if found:
            medians = [
                f"`{name}` {number(statistics.median(found[name]))} times" for name in sorted(found, key=name_key)
            ]
            sentences.append(f"{mode}: {', '.join(medians)}")
    parts = []
    if sentences:
        parts.append(f"Median of the time over the least time that the machine allows: {'; '.join(sentences)}.")
    if constants is not None:
        rate = max(constants.matmul_tflop_per_s.items(), key=lambda item: item[1], default=None)
        words = [f"{number(constants.copy_gb_per_s)} GB/s copied"]
        words += [f"{number(rate[1])} TFLOP/s in {rate[0]}"] if rate is not None else []
        waits = [(max(found), found[max(found)]) for found in (constants.wait_us or {}).values() if found]
        if waits:
            most = max(programs for programs, _ in waits)
            least = min(us for programs, us in waits if programs == most)
            words.append(f"{number(least)} us for one wait of {counted(most, 'program')}")
        parts.append(f"Measured on the machine: {', '.join(words)}.")
    return parts


_HOW = (
    "A layer took turns with its baseline, call by call; both times are medians of these turns, and *ratio* is the "
    "baseline's over the layer's: above 1 is faster. In brackets: from the 20th to the 80th percentile of the turns; "
    "*noise*: that, or the ratio, does not lie on one side of 1. "
    f"`{BASELINE}` computes the standard cell of the same sizes"
)
_BY_HAND = "; `by-hand` is the step of the variant in a few lines of PyTorch"


def _cpu_in_brief(rows: Sequence[Row], short: bool) -> list[str]:
    """The CPU's rows in words and a table, and the means over all of them.

    - short: only the shape with the most layers (there are GPU results, which say more); else all with several
    """
    rows = compared(rows) or list(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_sizes(row), []).append(row)
    layers = {sizes: len({(row.name, row.variant) for row in group}) for sizes, group in groups.items()}
    shown = [sizes for sizes in groups if layers[sizes] > 1] or list(groups)
    if short:
        shown = [max(groups, key=lambda sizes: (layers[sizes], len(groups[sizes]), _volume(groups[sizes][0])))]
    modes = [mode for mode in MODES if any(row.mode == mode for row in rows)]
    heads = ["layer", "shape", "baseline", *(head for mode in modes for head in (mode, "baseline's", "ratio"))]
    lines = [line for sizes in shown for line in _layers(sizes, groups[sizes], modes)]
    how = _HOW + _BY_HAND * any(row.baseline != BASELINE for row in rows)
    parts = [
        f"**CPU** ({escaped(rows[0].gpu)}), {_versions(rows, ('PyTorch',), ('torch',))}, {dates(rows)}. {how}:",
        table(heads, lines, right=range(3, len(heads))),
        *older_note(rows),
    ]
    means = geometric_means(rows)
    if any(mean.count for mean in means):
        parts += ["Geometric means of the ratios, of all shapes:", *means_table(means)]
    if len(shown) < len(groups):
        left = len(groups) - len(shown)
        parts.append(f"{counted(left, 'more shape')} {'is' if left == 1 else 'are'} in the report.")
    return parts + _missing_in_brief(rows)


def _layers(sizes: str, rows: Sequence[Row], modes: Sequence[str]) -> list[list[str]]:
    """A line per provider, variant and type, both times and a ratio per mode; words where there is no time."""
    lines: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        key = (f"{row.name} {row.variant}", f"{sizes} {row.dtype}", "" if row.is_baseline else row.baseline)
        lines.setdefault(key, {})[row.mode] = row
    return [[*key, *(cell for mode in modes for cell in _figures(found.get(mode)))] for key, found in lines.items()]


def _figures(row: Row | None) -> tuple[str, str, str]:
    """The time, the baseline's, and the ratio."""
    if row is None:
        return "", "", ""
    if not row.timed:
        return kind(row), "", ""
    return duration(row.ms_median), *(("", "") if row.is_baseline else (duration(row.baseline_ms), ratio_in_words(row)))


def _volume(row: Row) -> int:
    return row.T * row.B * row.H * row.H * row.L * row.D


def _sizes(row: Row) -> str:
    sizes = row.shape.removeprefix(f"{row.variant} ")
    return sizes if row.suite == CPU else f"{row.suite}: {sizes}"


def _versions(rows: Iterable[Row], titles: Sequence[str], columns: Sequence[str]) -> str:
    """The versions by their titles; all of them where rows differ."""
    rows = list(rows)
    words = []
    for title, column in zip(titles, columns, strict=True):
        found = sorted({getattr(row, column) for row in rows} - {""})
        if found:
            words.append(f"{title} {' and '.join(found)}")
    return ", ".join(words)


def rewrite_block(text: str, block: str) -> str:
    """The text with `block` between the lines BEGIN and END; everything else is the same byte for byte.

    Raises ValueError where one of the two lines is missing, there twice, or they are in the wrong order.
    """
    lines = text.split("\n")
    places = {}
    for marker in (BEGIN, END):
        if marker in block:
            raise ValueError(f"the new text itself contains {marker}")
        found = [number for number, line in enumerate(lines) if line.rstrip() == marker]
        if len(found) != 1:
            raise ValueError(f"the line {marker} is {'missing' if not found else f'there {len(found)} times'}")
        places[marker] = found[0]
    if places[BEGIN] > places[END]:
        raise ValueError(f"the line {END} stands before {BEGIN}")
    between = ["", *block.strip("\n").split("\n"), ""] if block.strip("\n") else [""]
    return "\n".join([*lines[: places[BEGIN] + 1], *between, *lines[places[END] :]])
