"""The results in pictures: from rows to PNGs. Colours are providers, the same in every picture of a machine."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rows import BASELINE, Row, slug
from benchmarks.suites import MODES, STORAGE
from benchmarks.summary import OURS, in_turns_with_ours, is_gpu, machines, name_key, number, ratio_of
from lstm_triton.cli.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINE_COLOUR = "#222222"
MARKERS = "osD^vP*X"
SIZES = {"H": "hidden units H", "B": "batch rows B", "T": "time steps T"}
DPI = 120

Group = dict[str, Any]
"""What the rows of a plot have in common, by name."""


def draw_all(rows: Sequence[Row], folder: Path) -> list[tuple[str, Path]]:
    """Write every plot that the rows have points for, GPUs first; titles and paths.

    A baseline's time is that of its turns with the library, as in the tables.
    `<machine>-speed-over-shapes.png`, `-time-vs-hidden.png`, `-time-vs-batch.png`, `-time-vs-steps.png`, `-limit.png`.
    """
    rows = in_turns_with_ours(rows)
    drawn = []
    for gpu in machines(rows):
        own = [row for row in rows if row.gpu == gpu]
        plots: tuple[tuple[str, str, Callable[[Sequence[Row]], bytes | None]], ...] = (
            ("speed-over-shapes", f"speed against {BASELINE} over H and B", speed_over_shapes),
            ("time-vs-hidden", "time of a step against H", lambda rows: time_against(rows, "H")),
            ("time-vs-batch", "time of a step against B", lambda rows: time_against(rows, "B")),
            ("time-vs-steps", "time of a step against T", lambda rows: time_against(rows, "T")),
            ("limit", "distance to the limit", distance_to_limit),
        )
        for stem, title, draw in plots:
            picture = draw(own)
            if picture is not None:
                path = folder / f"{slug(gpu)}-{stem}.png"
                folder.mkdir(parents=True, exist_ok=True)
                write_whole(path, picture)
                drawn.append((f"{gpu}: {title}", path))
    return drawn


def time_against(rows: Sequence[Row], size: str) -> bytes | None:
    """Microseconds of a step over one size ("H", "B" or "T"): a column of panels per mode, a line per type.

    Bars go from the 20th to the 80th percentile of the calls.

    Of one machine, the rows that share everything else; None where no two of them differ in the size.
    """
    fixed, points = largest_group([row for row in rows if row.us_per_step], size)
    if len({getattr(row, size) for row in points}) < 2:
        return None
    modes = _present(points, "mode", MODES)
    dtypes = _present(points, "dtype", tuple(STORAGE))
    figure, panels = _grid(len(dtypes), len(modes), width=5.2, height=3.0)
    colours, markers = _styles(rows)
    ticks = sorted({getattr(row, size) for row in points})
    for dtype, line in zip(dtypes, panels, strict=True):
        for mode, axes in zip(modes, line, strict=True):
            here = [row for row in points if row.mode == mode and row.dtype == dtype]
            for name in sorted({row.name for row in here}, key=name_key, reverse=True):
                own = sorted((row for row in here if row.name == name), key=lambda row: getattr(row, size))
                x, y = [getattr(row, size) for row in own], [row.us_per_step or math.nan for row in own]
                style = dict(color=colours[name], marker=markers[name], markersize=5, linewidth=1.6, label=name)
                axes.errorbar(x, y, list(zip(*map(_bar, own), strict=True)), capsize=2, elinewidth=1, **style)
            limit = {getattr(row, size): row.limit_us_per_step for row in here if row.limit_us_per_step}
            if limit:
                x = sorted(limit)
                axes.plot(x, [limit[value] for value in x], "--", color="#888888", linewidth=1.4, label="limit")
            _logarithmic(axes, ticks)
            axes.set_title(f"{mode}, {dtype}", loc="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(SIZES[size])
    for line in panels:
        line[0].set_ylabel("microseconds per step")
    _legend(figure, [axes for line in panels for axes in line])
    held = f"{_fixed_words(fixed)}; median, bars: 20th to 80th percentile of the calls"
    _title(figure, points[0], f"time of one step against {SIZES[size]}", held)
    return _png(figure)


def _bar(row: Row) -> tuple[float, float]:
    """How far below and above the time of a step its 20th and 80th percentile lie; nothing where they are not known."""
    if row.ms_p20 is None or row.ms_p80 is None or not row.ms_median or not row.us_per_step:
        return 0.0, 0.0
    us_per_ms = row.us_per_step / row.ms_median
    return us_per_ms * (row.ms_median - row.ms_p20), us_per_ms * (row.ms_p80 - row.ms_median)


def largest_group(rows: Iterable[Row], *sizes: str) -> tuple[Group, list[Row]]:
    """Of rows which share all but the sizes, the group with the most values of them.

    Of equals the one of the most cases, then the first measured, since a run begins with what tells most. I is shared,
    or everywhere equal to H.
    """
    groups: dict[tuple[tuple[str, Hashable], ...], list[Row]] = {}
    for row in rows:
        shared: Group = {"suite": row.suite, "variant": row.variant}
        shared |= {size: getattr(row, size) for size in ("T", "B", "H", "L", "D") if size not in sizes}
        shared["I"] = "H" if row.I == row.H and "H" in sizes else row.I
        groups.setdefault(tuple(shared.items()), []).append(row)

    def values(key: tuple[tuple[str, Hashable], ...]) -> tuple[int, int]:
        cases = {(tuple(getattr(row, size) for size in sizes), row.dtype, row.mode) for row in groups[key]}
        return len({case[0] for case in cases}), len(cases)

    best = max(groups, key=values, default=None)
    return ({}, []) if best is None else (dict(best), groups[best])


def speed_over_shapes(rows: Sequence[Row]) -> bytes | None:
    """A map of the library's ratio to the baseline over H and B, for every type and mode: blue is faster, red slower.

    Of one machine, the rows of one suite that share everything else; None where there is no ratio. A row without a time
    is marked.
    """
    fixed, found = largest_group([row for row in rows if row.name == OURS], "H", "B")
    ratios = [value for row in found if (value := ratio_of(row)) is not None]
    if not ratios:
        return None
    modes, dtypes = _present(found, "mode", MODES), _present(found, "dtype", tuple(STORAGE))
    widths, heights = sorted({row.H for row in found}), sorted({row.B for row in found})
    reach = max(math.log2(1.25), *(abs(math.log2(ratio)) for ratio in ratios))
    width, height = max(3.0, 0.56 * len(widths) + 0.5), max(1.9, 0.38 * len(heights) + 0.6)
    figure, panels = _grid(len(dtypes), len(modes), width=width, height=height)
    for dtype, line in zip(dtypes, panels, strict=True):
        for mode, axes in zip(modes, line, strict=True):
            here = [row for row in found if row.mode == mode and row.dtype == dtype]
            image = _map(axes, here, widths, heights, reach)
            axes.set_title(f"{mode}, {dtype}", loc="left", fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(SIZES["H"])
    for line in panels:
        line[0].set_ylabel(SIZES["B"])
    bar = figure.colorbar(image, ax=[axes for line in panels for axes in line], pad=0.01)
    bar.set_label("ratio")
    bar.ax.tick_params(labelsize=8)
    ticks = _ratio_ticks(reach)
    bar.set_ticks([math.log2(ratio) for ratio in ticks], labels=[f"{ratio:.3g}" for ratio in ticks])
    ratio = f"ratio: time of {BASELINE} / time of {OURS}, blue: faster, red: slower, in brackets: noise"
    _title(figure, found[0], f"{OURS} against {BASELINE}", f"{_fixed_words(fixed)}\n{ratio}")
    return _png(figure)


def _map(axes: Axes, rows: Sequence[Row], widths: Sequence[int], heights: Sequence[int], reach: float) -> Any:
    cells = [[math.nan] * len(widths) for _ in heights]
    for row in rows:
        x, y = widths.index(row.H), heights.index(row.B)
        ratio = ratio_of(row)
        if ratio is None:
            axes.text(x, y, "no\ntime" if not row.timed else "no\nratio", ha="center", va="center", fontsize=6)
            continue
        cells[y][x] = math.log2(ratio)
        colour = "white" if abs(cells[y][x]) > 0.6 * reach else "black"
        words = f"({_short(ratio)})" if row.noise else _short(ratio)
        axes.text(x, y, words, ha="center", va="center", fontsize=8, color=colour)
    axes.set_facecolor("#e8e8e8")
    axes.set_xticks(range(len(widths)), labels=[str(value) for value in widths])
    axes.set_yticks(range(len(heights)), labels=[str(value) for value in heights])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)
    return axes.imshow(cells, cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto", origin="lower")


def _short(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 9.995 else f"{ratio:.0f}" if ratio >= 99.5 else f"{ratio:.1f}"


def _ratio_ticks(reach: float) -> list[float]:
    """Ratios between 2 ** -reach and 2 ** reach: powers of two, or tenths where there is no room for those."""
    if reach < 1:
        return [tenths / 10 for tenths in range(6, 20) if abs(math.log2(tenths / 10)) <= reach]
    step = 1 if reach < 6 else 2
    return [2.0**power for power in range(-step * int(reach / step), int(reach) + 1, step)]


def distance_to_limit(rows: Sequence[Row]) -> bytes | None:
    """How many times the least time each provider needs: a point per row, coloured by H, and the median.

    Of one machine; None where no row has a limit.
    """
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    found = [row for row in rows if row.limit_ratio]
    if not found:
        return None
    modes = _present(found, "mode", MODES)
    names = sorted({row.name for row in found}, key=lambda name: _median_distance(found, name), reverse=True)
    figure, panels = _grid(1, len(modes), width=5.4, height=1.3 + 0.55 * len(names))
    widths = [row.H for row in found]
    norm = LogNorm(min(widths), max(max(widths), min(widths) + 1))
    colours = colormaps["viridis_r"]
    for mode, axes in zip(modes, panels[0], strict=True):
        for place, name in enumerate(names):
            own = [row for row in found if row.name == name and row.mode == mode]
            if not own:
                continue
            distances = [row.limit_ratio or math.nan for row in own]
            heights = [place + 0.5 * _scatter(n) for n in range(len(own))]
            hidden = [row.H for row in own]
            points = axes.scatter(distances, heights, 18, hidden, norm=norm, cmap=colours, alpha=0.8, linewidths=0)
            median = statistics.median(distances)
            axes.plot([median] * 2, [place - 0.36, place + 0.36], color="#c00000", linewidth=2)
            axes.text(median, place + 0.38, number(median), color="#c00000", ha="center", va="bottom", fontsize=8)
        axes.axvline(1, color="#888888", linestyle="--", linewidth=1.2)
        axes.set_xscale("log")
        axes.set_ylim(-0.6, len(names) - 0.25)
        axes.set_yticks(range(len(names)), labels=names)
        axes.set_xlabel("time / least time (dashed: the limit)")
        axes.set_title(mode, loc="left", fontsize=10)
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _plain_numbers(axes.xaxis, [row.limit_ratio for row in found if row.limit_ratio])
    bar = figure.colorbar(points, ax=list(panels[0]), pad=0.01)
    ticks: list[int] = []
    for value in sorted(set(widths)):
        ticks += [value] if not ticks or value > 1.1 * ticks[-1] else []
    bar.set_ticks(ticks, labels=[str(value) for value in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=7)
    bar.set_label(SIZES["H"])
    _title(figure, found[0], "distance to the limit", "a point is a row, of all suites and types; red: the median")
    return _png(figure)


def _median_distance(rows: Iterable[Row], name: str) -> float:
    return statistics.median(row.limit_ratio for row in rows if row.name == name and row.limit_ratio)


def _scatter(n: int) -> float:
    """Evenly spread between -0.5 and 0.5, the same every time."""
    return (n * 0.6180339887498949 + 0.5) % 1 - 0.5


def _present(rows: Iterable[Row], column: str, known: Sequence[str]) -> list[str]:
    found = {getattr(row, column) for row in rows}
    return [value for value in known if value in found] + sorted(found - set(known))


def _styles(rows: Iterable[Row]) -> tuple[dict[str, Any], dict[str, str]]:
    """A colour and a marker for every name among the machine's rows."""
    from matplotlib import colormaps

    names = sorted({row.name for row in rows}, key=name_key)
    others = [name for name in names if name.split(" ")[0] != BASELINE]
    colours = {name: BASELINE_COLOUR for name in names} | {
        name: colormaps["tab10"](index % 10) for index, name in enumerate(others)
    }
    return colours, {name: MARKERS[index % len(MARKERS)] for index, name in enumerate(names)}


def _grid(lines: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure and its panels, [line][column], each of the size in inches, all with the same axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(7.5, width * columns + 1.2), height * lines + 1.3), layout="constrained")
    return figure, figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)


def _logarithmic(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, labels=[str(value) for value in ticks])
    axes.minorticks_off()
    axes.tick_params(axis="x", labelsize=8, rotation=45 if len(ticks) > 6 else 0)
    low, high = axes.get_ylim()
    _plain_numbers(axes.yaxis, (low, high))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _plain_numbers(axis: Any, values: Sequence[float]) -> None:
    """1, 2, 5, 10 instead of powers of ten, as many of them as the span leaves room for."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    decades = math.log10(max(values) / min(values))
    steps = (1.0, 2.0, 5.0) if decades < 3 else (1.0, 3.0) if decades < 4 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=steps))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One for all panels, below them."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries[label] = handle
    labels = sorted(entries, key=lambda label: (label == "limit", name_key(label)))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)


def _title(figure: Figure, row: Row, what: str, held: str) -> None:
    where = row.gpu if is_gpu(row) else f"{row.gpu} (CPU)"
    figure.suptitle(f"{where}: {what}\n{held}", x=0.01, ha="left", fontsize=11)


def _fixed_words(fixed: Group) -> str:
    sizes = " ".join(f"{name}={fixed[name]}" for name in ("T", "B", "I", "H", "L", "D") if name in fixed)
    return f"suite {fixed['suite']}, {fixed['variant']} cell, {sizes}"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
