"""The results: one row per provider, shape, type and mode; files of them that grow row by row.

A file is `<gpu>-<date>-<suite>.csv`. What a killed run had finished is whole: a row goes to the file in one write.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

BASELINE = "torch.nn.LSTM"


@dataclass(frozen=True)
class Row:
    """One line of a results file; times and ratios are None where nothing was timed.

    - provider: `lstm_triton`, `torch.nn.LSTM`, ...; strategy: `auto`, `stepwise`, `cudnn`, ...
    - regime: what PyTorch asks cuDNN for at this shape, `cudnn-persistent` or `cudnn-standard`; on a CPU `cpu`
    - mode: `forward` or `forward+backward`; variant: of the provider's cell (the baseline's is always `standard`)
    - ms_median, ms_p20, ms_p80: milliseconds of a call; us_per_step: of one time step of one layer and direction
    - cpu_us_per_call: microseconds until the call returned to Python
    - peak_mib: most memory allocated during a call above what was before, MiB
    - error: largest ||result - reference|| / ||reference|| of outputs and gradients; or the words why nothing was timed
    - baseline_ratio: baseline_ms / ms_median, above 1 is faster (in files without baseline_ms: the median of the turns)
    - limit_us_per_step, limit_ratio: the least time of a step (`lstm_triton_kernels.limit`); us_per_step / it
    - plan: what computed it where the strategy does not say that alone (`PersistentPlan.describe`)
    - baseline: the provider that it took turns with; baseline_ms: the median of that one's calls in these turns
    - ratio_p20, ratio_p80: of the quotients of both times, turn by turn

    Older files lack the columns from `plan` or from `baseline` on.
    """

    provider: str
    strategy: str
    suite: str
    regime: str
    mode: str
    dtype: str
    T: int
    B: int
    I: int
    H: int
    L: int
    D: int
    variant: str
    ms_median: float | None
    ms_p20: float | None
    ms_p80: float | None
    us_per_step: float | None
    cpu_us_per_call: float | None
    peak_mib: float | None
    error: float | str | None
    baseline_ratio: float | None
    limit_us_per_step: float | None
    limit_ratio: float | None
    gpu: str
    driver: str
    torch: str
    triton: str
    cudnn: str
    commit: str
    date: str
    plan: str = ""
    baseline: str = BASELINE
    baseline_ms: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None

    @property
    def noise(self) -> bool:
        """Whether the ratio says nothing: it and its spread do not all lie on one side of 1."""
        if self.baseline_ratio is None or self.ratio_p20 is None or self.ratio_p80 is None:
            return False
        return min(self.ratio_p20, self.baseline_ratio) <= 1 <= max(self.ratio_p80, self.baseline_ratio)

    @property
    def is_baseline(self) -> bool:
        """Whether it is the baseline's own row, timed alone: others are not to be compared with it."""
        return self.provider == self.baseline

    @property
    def case(self) -> tuple[object, ...]:
        """What was computed where, whoever computed it."""
        sizes = (self.T, self.B, self.I, self.H, self.L, self.D)
        return (self.gpu, self.suite, self.variant, self.dtype, self.mode, *sizes)

    @property
    def timed(self) -> bool:
        """Whether there is a time."""
        return self.ms_median is not None

    @property
    def name(self) -> str:
        """Provider and strategy, in words."""
        return f"{self.provider} {self.strategy}" if self.strategy else self.provider

    @property
    def shape(self) -> str:
        """The sizes and the variant, in words."""
        layers = f" L={self.L}" * (self.L > 1) + f" D={self.D}" * (self.D > 1)
        return f"{self.variant} T={self.T} B={self.B} I={self.I} H={self.H}{layers}"


COLUMNS = tuple(field.name for field in fields(Row))
OLD_COLUMNS = tuple(COLUMNS[: COLUMNS.index(first)] for first in ("plan", "baseline"))
"""Of files from before there were plans, and from before a row had its baseline's time."""

_INTEGERS = ("T", "B", "I", "H", "L", "D")
_NUMBERS = (
    "ms_median", "ms_p20", "ms_p80", "us_per_step", "cpu_us_per_call", "peak_mib", "baseline_ratio",
    "limit_us_per_step", "limit_ratio", "baseline_ms", "ratio_p20", "ratio_p80",
)  # fmt: skip


_PARTS = re.compile(r"(\d+)")


class DamagedResults(Exception):
    """A results file is not what this program writes; the message names the file, the line and what is wrong."""


def slug(gpu: str) -> str:
    """The name of a GPU as it stands in file names: "NVIDIA H100 80GB HBM3" -> "h100-80gb-hbm3"."""
    words = re.sub(r"^(nvidia|tesla|geforce|\s)+", "", gpu.strip(), flags=re.IGNORECASE)
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") or "gpu"


def new_file(folder: Path, gpu: str, date: str, what: str, suffix: str = "csv") -> Path:
    """`<gpu>-<date>-<what>.<suffix>` in the folder; a number is added where such a file is there already."""
    stem = f"{slug(gpu)}-{date}-{what}"
    path = folder / f"{stem}.{suffix}"
    count = 2
    while path.exists():
        path = folder / f"{stem}-{count}.{suffix}"
        count += 1
    return path


def _text(value: float | int | str | None) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def append(path: Path, row: Row) -> None:
    """Add the row to the file, which starts with the header; one write, on the disk when this returns."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    if not path.exists() or path.stat().st_size == 0:
        writer.writerow(COLUMNS)
    writer.writerow([_text(value) for value in asdict(row).values()])
    with path.open("ab", buffering=0) as file:
        file.write(buffer.getvalue().encode())
        os.fsync(file.fileno())


def read(path: Path) -> list[Row]:
    """The rows of a file. Raises DamagedResults if it is not what `append` writes."""
    try:
        text = path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedResults(f"{path}: cannot be read: {error}") from error
    if not text.endswith("\n"):
        raise DamagedResults(f"{path}: the last line is not whole")
    try:
        lines = list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise DamagedResults(f"{path}: {error}") from error
    columns = tuple(lines[0])
    if columns not in (COLUMNS, *OLD_COLUMNS):
        raise DamagedResults(f"{path}: line 1: the columns are not {','.join(COLUMNS)}")
    return [_parse(path, number, columns, line) for number, line in enumerate(lines[1:], 2)]


def _parse(path: Path, number: int, columns: tuple[str, ...], line: list[str]) -> Row:
    if len(line) != len(columns):
        raise DamagedResults(f"{path}: line {number}: {len(line)} cells instead of {len(columns)}")
    cells: dict[str, object] = dict(zip(columns, line, strict=True))
    for name in _INTEGERS:
        if not re.fullmatch(r"[1-9][0-9]*", str(cells[name])):
            raise DamagedResults(f"{path}: line {number}: {name} is {cells[name]!r}, not a positive whole number")
        cells[name] = int(str(cells[name]))
    for name in set(_NUMBERS) & cells.keys():
        cells[name] = _number(path, number, name, str(cells[name]))
    error = str(cells["error"])
    try:
        cells["error"] = float(error) if error else None
    except ValueError:
        if cells["ms_median"] is not None:
            raise DamagedResults(f"{path}: line {number}: error is {error!r}, but there is a time") from None
    return Row(**cells)  # type: ignore[arg-type]


def _number(path: Path, line: int, name: str, text: str) -> float | None:
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0:
        raise DamagedResults(f"{path}: line {line}: {name} is {text!r}, not a number")
    return value


def in_order(paths: Iterable[Path]) -> list[Path]:
    """By name, numbers by value: the file of a second run, `...-2.csv`, comes after that of the first, `....csv`."""
    return sorted(paths, key=lambda path: [int(part) if part.isdigit() else part for part in _PARTS.split(path.stem)])


def read_all(folder: Path) -> tuple[list[Row], list[DamagedResults]]:
    """The rows of every CSV file in the folder, and what is damaged: such a file is left out, and left alone."""
    rows: list[Row] = []
    damaged: list[DamagedResults] = []
    for path in in_order(folder.glob("*.csv")):
        try:
            rows += read(path)
        except DamagedResults as error:
            damaged.append(error)
    return rows, damaged


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measured the same thing on the same machine, the last; in the order of their dates."""
    last: dict[tuple[object, ...], Row] = {}
    for row in sorted(rows, key=lambda row: row.date):
        what = (row.provider, row.strategy, *row.case)
        last[what] = row
    return list(last.values())
