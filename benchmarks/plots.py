"""The results of a machine in pictures: this library and the baseline that took turns with it. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.rows import BASELINE, OURS, SHAPE, slug

LABELS = {"H": "hidden units H", "B": "batch rows B"}
COLOURS = {OURS: "#1f77b4", BASELINE: "#222222", "limit": "#999999"}


def draw_all(frame: pd.DataFrame, folder: Path) -> list[tuple[str, Path]]:
    """Write every plot that the rows have points for; return titles and paths, GPUs first.

    `<machine>-speed-over-shapes.svg`, `-time-vs-hidden.svg`, `-time-vs-batch.svg`, `-limit.svg`; of the rows of the
    library against the baseline. A time of the baseline is that of its turns with the library, as in the tables.
    The same rows make the same files, byte for byte.
    """
    ours = frame[(frame.who == OURS) & (frame.baseline == BASELINE)]
    plots: dict[str, tuple[str, Callable[[pd.DataFrame], Figure | None]]] = {
        "speed-over-shapes": (f"speed against {BASELINE}", speed_over_shapes),
        "time-vs-hidden": ("time of a step against H", lambda rows: time_against(rows, "H")),
        "time-vs-batch": ("time of a step against B", lambda rows: time_against(rows, "B")),
        "limit": ("distance to the limit", distance_to_limit),
    }
    drawn = []
    for gpu in frame.gpu.unique():
        for stem, (title, draw) in plots.items():
            figure = draw(ours[ours.gpu == gpu])
            if figure is not None:
                path = folder / f"{slug(gpu)}-{stem}.svg"
                with rc_context({"svg.hashsalt": "lstm_triton"}):
                    figure.savefig(path, metadata={"Date": None})
                drawn.append((f"{gpu}: {title}", path))
    return drawn


def largest_group(rows: pd.DataFrame, *sizes: str) -> tuple[str, pd.DataFrame]:
    """Return, of rows which share all but these sizes, the group with the most values of them, and what is shared.

    I is shared, or everywhere equal to H. Of equal groups that with the most rows is taken.
    """
    shared = ["suite", "variant", *(size for size in SHAPE if size not in sizes)]
    inputs = rows.I.astype(object).where(rows.I != rows.H, "H") if "H" in sizes else rows.I
    groups = list(rows.assign(I=inputs).groupby(shared, sort=False))
    if not groups:
        return "", rows
    key, group = max(groups, key=lambda item: (len(item[1].drop_duplicates(list(sizes))), len(item[1])))
    words = [f"{name}={value}" for name, value in list(zip(shared, key, strict=True))[2:] if name != "P" or value]
    return f"suite {key[0]}, {key[1]} cell, {' '.join(words)}", group


def panels(
    rows: pd.DataFrame, title: str, width: float, height: float
) -> tuple[Figure, list[tuple[Any, pd.DataFrame]]]:
    """Return a figure and its panels, each with its rows: a column per mode, a line per type."""
    modes, dtypes = rows["mode"].unique(), rows["dtype"].unique()
    figure = Figure(figsize=(max(7.5, width * len(modes)), height * len(dtypes) + 1.0), layout="constrained")
    axes = figure.subplots(len(dtypes), len(modes), sharex=True, sharey=True, squeeze=False)
    figure.suptitle(f"{rows.gpu.iloc[0]}: {title}", x=0.01, ha="left", fontsize=10)
    found = []
    for line, dtype in zip(axes, dtypes, strict=True):
        for one, mode in zip(line, modes, strict=True):
            one.set_title(f"{mode}, {dtype}", loc="left", fontsize=9)
            one.tick_params(labelsize=8)
            found.append((one, rows[(rows["mode"] == mode) & (rows["dtype"] == dtype)]))
    return figure, found


def speed_over_shapes(rows: pd.DataFrame) -> Figure | None:
    """Draw the ratio to the baseline over H and B: blue is faster, red slower; None where there is no ratio."""
    held, rows = largest_group(rows, "H", "B")
    if not rows.ratio.count():
        return None
    widths, heights = sorted(rows.H.unique()), sorted(rows.B.unique())
    reach = max(0.3, np.log2(rows.ratio).abs().max())
    title = f"time of {BASELINE} / time of {OURS}\n{held}; blue: faster, red: slower, in brackets: noise"
    figure, found = panels(rows, title, 0.62 * len(widths) + 1.2, 0.32 * len(heights) + 0.5)
    for axes, here in found:
        cells = np.full((len(heights), len(widths)), np.nan)
        for row in here.itertuples():
            y, x = heights.index(row.B), widths.index(row.H)
            cells[y, x] = np.log2(row.ratio)
            words = f"({row.ratio:.2f})" if row.noise else "no\nratio" if np.isnan(row.ratio) else f"{row.ratio:.2f}"
            dark = abs(cells[y, x]) > 0.6 * reach
            axes.text(x, y, words, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.imshow(cells, cmap="RdBu", norm=TwoSlopeNorm(0, -reach, reach), aspect="auto", origin="lower")
        axes.set_facecolor("#e8e8e8")
        axes.set_xticks(range(len(widths)), labels=widths)
        axes.set_yticks(range(len(heights)), labels=heights)
    figure.supxlabel(LABELS["H"], fontsize=9)
    figure.supylabel(LABELS["B"], fontsize=9)
    return figure


def logarithmic(figure: Figure, found: list[tuple[Any, pd.DataFrame]], size: str, label: str) -> None:
    """Make the axes of all panels logarithmic, one of them a size, with plain numbers and one legend below."""
    for axes, _ in found:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
            axis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel(LABELS[size], fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles = {
        name: handle for axes, _ in found for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)


def has_limit(rows: pd.DataFrame) -> bool:
    """Return whether the machine has a limit that no row is below.

    A row below it shows that the constants were measured while the machine was slower.
    """
    return bool(rows.limit_ratio.count()) and not (rows.limit_ratio < 1).any()


def time_against(rows: pd.DataFrame, size: str) -> Figure | None:
    """Draw the median time of a step over H or B, with its spread; None where no two rows differ in it alone.

    The spread is from the 20th to the 80th percentile; the baseline's is that of the ratio turn by turn, since a row
    has no other.
    """
    limit = has_limit(rows)
    held, rows = largest_group(rows[rows.ratio.notna()], size)
    if rows[size].nunique() < 2:
        return None
    title = f"median time of one step, 20th to 80th percentile (of {BASELINE}: of the ratio)\n{held}"
    figure, found = panels(rows, title, 4.2, 2.1)
    for axes, here in found:
        here = here.sort_values(size)
        lines = {BASELINE: here.us_per_step * here.ratio, OURS: here.us_per_step}
        spreads = {BASELINE: (here.ratio_p20, here.ratio_p80)}
        spreads[OURS] = (here.ms_p20 / here.ms_median, here.ms_p80 / here.ms_median)
        for name, (low, high) in spreads.items():
            edges = here.us_per_step * low, here.us_per_step * high
            axes.fill_between(here[size], *edges, color=COLOURS[name], alpha=0.2, linewidth=0)
        for name, times in (lines | ({"limit": here.limit_us_per_step} if limit else {})).items():
            style = dict(linestyle="--") if name == "limit" else dict(marker="o", markersize=4)
            axes.plot(here[size], times, color=COLOURS[name], label=name, **style)
    logarithmic(figure, found, size, "microseconds")
    if limit:  # that of few units is far below
        found[0][0].set_ylim(bottom=rows.us_per_step.min() / 10)
    return figure


def distance_to_limit(rows: pd.DataFrame) -> Figure | None:
    """Draw how many times the least time a step takes, over H, of all suites; None where there is no limit.

    Of the standard cell, since the limit of a variant is not that of the baseline beside it.
    """
    rows = rows[rows.limit_ratio.notna() & (rows.variant == "standard")]
    if not has_limit(rows):
        return None
    title = "time of a step / least time that the machine allows\nevery point is a row, of all suites, standard cell"
    figure, found = panels(rows, title, 4.2, 2.1)
    for axes, here in found:
        here = here[here.ratio.notna()]
        for name, times in {BASELINE: here.limit_ratio * here.ratio, OURS: here.limit_ratio}.items():
            axes.scatter(here.H, times, 14, color=COLOURS[name], label=name, alpha=0.7, linewidths=0)
        axes.axhline(1, color=COLOURS["limit"], linestyle="--", label="limit")
    logarithmic(figure, found, "H", "times the limit")
    return figure
