"""The results files: one row per provider, shape, type and mode, appended when it is done; and a machine's constants.

docs/benchmarking.md says what each column of `<machine>-<date>-<suites>.csv` means. A cell is empty where nothing was
measured.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lstm_triton_kernels.limit import Constants

from benchmarks.suites import name_of_shape

BASELINE = "torch.nn.LSTM"
OURS = "lstm_triton auto"
"""What a user of the library gets who chooses nothing."""

COLUMNS = (
    "provider", "strategy", "suite", "regime", "mode", "dtype", "T", "B", "I", "H", "L", "D", "variant", "ms_median",
    "ms_p20", "ms_p80", "us_per_step", "cpu_us_per_call", "peak_mib", "error", "baseline_ratio", "limit_us_per_step",
    "limit_ratio", "gpu", "driver", "torch", "triton", "cudnn", "commit", "date", "plan", "baseline", "baseline_ms",
    "ratio_p20", "ratio_p80", "name", "ms_p99", "P",
)  # fmt: skip
SIZES = ("T", "B", "I", "H", "L", "D")
SHAPE = (*SIZES, "P")
"""All sizes of a layer: also the hidden size after projection, which is 0 without one."""
NUMBERS = (
    "ms_median", "ms_p20", "ms_p80", "us_per_step", "cpu_us_per_call", "peak_mib", "baseline_ratio",
    "limit_us_per_step", "limit_ratio", "baseline_ms", "ratio_p20", "ratio_p80", "ms_p99",
)  # fmt: skip
ADDED = dict(plan="", baseline=BASELINE, baseline_ms="", ratio_p20="", ratio_p80="", name="", ms_p99="", P=0)
"""What older files lack, and what it is then; the name is that of the case of the same shape."""

HEADERS = [*([*COLUMNS[: COLUMNS.index(first)]] for first in ("plan", "baseline", "name", "ms_p99", "P")), [*COLUMNS]]
"""The columns of results files, the oldest first."""

Row = dict[str, Any]
"""A value for every column; None where there is no number."""


class DamagedResults(Exception):
    """A results file is not what this program writes; the message names the file and what is wrong."""


def slug(machine: str) -> str:
    """Return a machine's name as it stands in file names: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    words = re.sub(r"^(nvidia|tesla|geforce|\s)+", "", machine.strip(), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "gpu"


def new_file(folder: Path, machine: str, date: str, what: str, suffix: str = "csv") -> Path:
    """Return the path `<machine>-<date>-<what>.<suffix>`, numbered where such a file is there already."""
    stem = f"{slug(machine)}-{date}-{what}"
    path, count = folder / f"{stem}.{suffix}", 2
    while path.exists():
        path, count = folder / f"{stem}-{count}.{suffix}", count + 1
    return path


def append(path: Path, row: Row) -> None:
    """Append a row to a file, after the header if it is new; one write, on the disk when this returns."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writeheader()
    writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    with path.open("ab", buffering=0) as file:
        file.write(buffer.getvalue().encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """Return the rows of a file. Raises DamagedResults if it is not what `append` writes."""
    try:
        text = path.read_bytes().decode()
        if not text.endswith("\n"):
            raise ValueError("the last line is not whole")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        if reader.fieldnames not in HEADERS:
            raise ValueError("line 1 has other columns than a results file")
        return [_typed(line, reader.line_num) for line in reader]
    except (OSError, ValueError, csv.Error) as error:
        raise DamagedResults(f"{path.name}: {error}") from error


def _typed(line: dict[str, Any], number: int) -> Row:
    """Return the row of a line of text. Raises ValueError where a cell is not what its column holds."""
    if None in line or None in line.values():
        raise ValueError(f"line {number} has another number of cells than line 1")
    row: Row = ADDED | line
    try:
        row |= {name: int(row[name]) for name in SHAPE}
        row |= {name: float(row[name]) if row[name] else None for name in NUMBERS}
        if row["ms_median"] is not None:
            row["error"] = float(row["error"]) if row["error"] else None
    except ValueError as error:
        raise ValueError(f"line {number}: {error}") from error
    if "name" not in line:
        row["name"] = name_of_shape(row["suite"], [row[name] for name in SIZES], row["variant"])
    sizes = min(row[name] for name in SIZES) >= 1 and 0 <= row["P"] < row["H"]
    if not sizes or not all(0 <= (row[name] or 0) < math.inf for name in NUMBERS):
        raise ValueError(f"line {number} has a number that cannot be measured")
    return row


def in_order(paths: Iterable[Path]) -> list[Path]:
    """Sort paths by name, numbers by value: the file of a second run, `...-2.csv`, comes after that of the first."""
    return sorted(paths, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.stem)])


def read_all(folder: Path) -> tuple[list[Row], list[DamagedResults]]:
    """Return the rows of all CSV files, each with its `file`, and what is damaged: such a file is left out."""
    found: list[Row] = []
    damaged = []
    for path in in_order(folder.glob("*.csv")):
        try:
            found += [row | {"file": path.name} for row in read(path)]
        except DamagedResults as error:
            damaged.append(error)
    return found, damaged


def provider_of(row: Row) -> str:
    """Return provider and strategy in words."""
    return f"{row['provider']} {row['strategy']}".strip()


def shape_of(row: Row) -> str:
    """Return the workload, the cell and its sizes in words."""
    more = "".join(f" {size}={row[size]}" for size in "LDP" if row[size] > (size != "P"))
    name = f"{row['name']}: " if row["name"] else ""
    return f"{name}{row['variant']} T={row['T']} B={row['B']} I={row['I']} H={row['H']}{more}"


def ratio_of(row: Row) -> float | None:
    """Return the ratio to the baseline of a row that was timed beside it; a baseline's own row has none."""
    own = row["provider"] == row["baseline"] or row["ms_median"] is None
    return None if own else row["baseline_ratio"] or None


def is_noise(row: Row) -> bool:
    """Return whether the ratio and its 20th and 80th percentile do not all lie on one side of 1."""
    ratio, low, high = ratio_of(row), row["ratio_p20"], row["ratio_p80"]
    return ratio is not None and None not in (low, high) and min(low, ratio) <= 1 <= max(high, ratio)


def outcome_of(row: Row) -> str:
    """Return what became of a row: a ratio, a time alone, or what went wrong."""
    if row["ms_median"] is not None:
        return "has a ratio" if ratio_of(row) else "timed alone"
    return next((kind for kind in ("out of memory", "wrong") if str(row["error"]).startswith(kind)), "failed")


def save_constants(path: Path, constants: Constants, environment: dict[str, str]) -> None:
    """Write a new file of a machine's constants; one that exists is an error, never overwritten."""
    with path.open("x") as file:
        file.write(json.dumps({"environment": environment, "constants": asdict(constants)}, indent=2) + "\n")


def load_constants(path: Path) -> tuple[str, Constants]:
    """Return the machine and the constants of a file. Raises DamagedResults if it is not what was saved."""
    try:
        content = json.loads(path.read_text())
        values = content["constants"]
        waits = values["wait_us"] or {}
        values["wait_us"] = {how: {int(n): float(us) for n, us in of.items()} for how, of in waits.items()} or None
        return str(content["environment"]["gpu"]), Constants(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedResults(f"{path.name}: not a file of constants: {error!r}") from error


def all_constants(folder: Path) -> tuple[dict[str, Constants], list[DamagedResults]]:
    """Return the newest constants by machine, and what is damaged; files are named by their dates."""
    known: dict[str, Constants] = {}
    damaged = []
    for path in in_order(folder.glob("*-micro*.json")):
        try:
            known |= [load_constants(path)]
        except DamagedResults as error:
            damaged.append(error)
    return known, damaged
