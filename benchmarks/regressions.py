"""Is this library slower than it was? The floors of a GPU: its newest committed times, in `floors/<gpu>.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.environment import write_whole
from benchmarks.rows import OURS, SHAPE, Row, provider_of, read_all, shape_of, slug
from benchmarks.suites import CPU

FLOORS = ROOT / "benchmarks" / "floors"

SLOWER = 1.1
"""A row is slower than its floor if it takes longer by this factor."""

KEY = ("suite", "name", "mode", "dtype", "variant", *SHAPE)
"""What is the same of a row and its floor."""

Floors = dict[tuple[object, ...], float]
"""Microseconds of a step by the values of KEY."""


class Slower(NamedTuple):
    """A row, and the microseconds of a step that it took before."""

    row: Row
    floor: float

    def __str__(self) -> str:
        row, times = self.row, self.row["us_per_step"] / self.floor
        start = f"{row['suite']} {row['mode']} {row['dtype']} {shape_of(row)}"
        return f"{start}: {row['us_per_step']:.3g} us a step, {times:.2f} times its floor of {self.floor:.3g}"


def floors_of(rows: Iterable[Row]) -> dict[str, Floors]:
    """Return the floors by GPU: of each shape the newest time; of one date the last."""
    found: dict[str, Floors] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        if has_floor(row):
            found.setdefault(row["gpu"], {})[key_of(row)] = row["us_per_step"]
    return found


def has_floor(row: Row) -> bool:
    """Return whether it is a time, on a GPU, of what a user of the library gets who chooses nothing."""
    return provider_of(row) == OURS and row["regime"] != CPU and row["us_per_step"] is not None


def key_of(row: Row) -> tuple[object, ...]:
    """Return the values of KEY."""
    return tuple(row[name] for name in KEY)


def slower_rows(rows: Iterable[Row], floors: Floors) -> list[Slower]:
    """Return the rows that take longer than their floors by more than the factor SLOWER; the slowest first."""
    known = [Slower(row, floors[key_of(row)]) for row in rows if has_floor(row) and key_of(row) in floors]
    found = [one for one in known if one.row["us_per_step"] > SLOWER * one.floor]
    return sorted(found, key=lambda one: one.floor / one.row["us_per_step"])


def path_of(gpu: str, folder: Path = FLOORS) -> Path:
    """Return the file of a GPU's floors."""
    return folder / f"{slug(gpu)}.json"


def write(results: Path, folder: Path = FLOORS) -> tuple[list[Path], list[str]]:
    """Write a file of floors for every GPU in results files, those of subfolders too; return them, what is damaged."""
    folders = sorted({results, *(path.parent for path in results.rglob("*.csv"))}, key=lambda path: -len(path.parts))
    read = [read_all(one) for one in folders]  # where dates are the same, those of a subfolder are the older ones
    floors = floors_of(row for rows, _ in read for row in rows)
    for gpu, own in floors.items():
        named = [(dict(zip(KEY, key, strict=True)), us) for key, us in sorted(own.items())]
        lines = [json.dumps({k: v for k, v in of.items() if k != "P" or v} | {"us_per_step": us}) for of, us in named]
        folder.mkdir(parents=True, exist_ok=True)
        text = ",\n".join(lines)
        write_whole(path_of(gpu, folder), f'{{"gpu": {json.dumps(gpu)}, "floors": [\n{text}\n]}}\n')
    return [path_of(gpu, folder) for gpu in floors], [str(error) for _, damaged in read for error in damaged]


def load(gpu: str, folder: Path = FLOORS) -> Floors:
    """Return the floors of a GPU; none if it has no file."""
    path = path_of(gpu, folder)
    if not path.exists():
        return {}
    floors = [{"P": 0} | one for one in json.loads(path.read_text())["floors"]]  # a line has P where there is one
    return {tuple(one[name] for name in KEY): one["us_per_step"] for one in floors}
