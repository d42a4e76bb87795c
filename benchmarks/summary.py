"""All results files as one table, and what its rows say together. Needs pandas.

A row without a time is counted, never dropped.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import rows
from benchmarks.console import GROUP
from benchmarks.rows import OURS
from benchmarks.suites import CPU, MODES, REGIMES, STORAGE, SUITES
from benchmarks.text import number, ratio

MEASURED = ["gpu", "suite", "name", "variant", "dtype", "mode", *rows.SHAPE, "provider", "strategy"]
"""Rows that agree in these measured the same thing; the newest counts."""

ORDER: dict[str, tuple[str, ...]] = {
    "suite": SUITES, "regime": REGIMES, "mode": MODES, "dtype": tuple(STORAGE), "variant": ("standard",), "who": (OURS,)
}  # fmt: skip
SORTED = [
    "on_cpu", "gpu", "suite", "regime", "mode", "dtype", "variant", "L", "D", "T", "B", "I", "H", "P", "name", "who"
]  # fmt: skip


def frame_of(found: list[rows.Row]) -> pd.DataFrame:
    """Return the newest rows, GPUs first, with what is derived from each.

    who (provider and strategy) and shape; ratio (missing where nothing was timed beside the baseline) and ratio_text;
    noise and slower (than the baseline, and not noise); outcome: see `rows.outcome_of`.
    """
    frame = pd.DataFrame(found, columns=[*rows.COLUMNS, "file"]).astype(dict.fromkeys(rows.NUMBERS, float))
    derived = {"who": rows.provider_of, "shape": rows.shape_of, "outcome": rows.outcome_of, "ratio_text": ratio}
    for column, of in derived.items():
        frame[column] = [of(row) for row in found]
    frame["ratio"] = pd.Series([rows.ratio_of(row) for row in found], dtype=float)
    frame["noise"] = pd.Series([rows.is_noise(row) for row in found], dtype=bool)
    frame["slower"] = (frame.ratio < 1) & ~frame.noise
    frame["on_cpu"] = frame.regime == CPU
    frame = frame.sort_values("date", kind="stable").drop_duplicates(MEASURED, keep="last")
    return frame.sort_values(SORTED, key=_places, kind="stable", ignore_index=True)


def _places(column: pd.Series) -> pd.Series:
    """Return what a column is sorted by: the place in its list, what is in none behind; the library before others."""
    known = ORDER.get(str(column.name), ())
    if column.dtype.kind in "bif":
        return column
    return column.map(lambda value: f"{known.index(value) if value in known else len(known):03}{value}")


def load(folder: Path) -> tuple[pd.DataFrame, list[rows.DamagedResults]]:
    """Return the rows of all results files of a folder, as `frame_of`, and what is damaged and left out."""
    found, damaged = rows.read_all(folder)
    return frame_of(found), damaged


def compared(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows but for the baselines' own, which were timed alone."""
    return frame[frame.provider != frame.baseline]


def geometric_mean(ratios: pd.Series) -> float:
    """Return the geometric mean of the ratios that there are; NaN of none."""
    return float(np.exp(np.log(ratios).mean()))


def count_text(ratios: pd.Series) -> str:
    """Return how many rows there are, and how many of them have a ratio where that is another number."""
    return f"{ratios.count()} of {ratios.size}" if ratios.count() < ratios.size else f"{ratios.size}"


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a line per provider and group of rows that differ in type and sizes alone."""
    lines = []
    for key, group in compared(frame).groupby([*GROUP, "who"], sort=False):
        line = dict(zip([*GROUP, "provider"], key, strict=True))
        line |= {"mean": number(geometric_mean(group.ratio)), "rows": count_text(group.ratio)}
        if group.ratio.count():
            worst = group.loc[group.ratio.idxmin()]
            line |= {"slower": int(group.slower.sum()), "slowest": worst.ratio_text}
            line["which"] = f"{worst['dtype']} {worst['shape']}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")
