"""The report of all results files, and the block of a README that says the shortest of it. Needs pandas, matplotlib.

Every number is a row's, or a mean or count of rows. Simulated times are in no results file, and so in no table here.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from lstm_triton_kernels.limit import Constants

from benchmarks import plots, rows, summary
from benchmarks.console import constants_lines
from benchmarks.environment import write_whole
from benchmarks.providers import PROVIDERS
from benchmarks.rows import BASELINE, OURS
from benchmarks.suites import FORWARD, TRAINING, WORDS
from benchmarks.summary import count_text, geometric_mean
from benchmarks.text import escaped, number, table

HOW = f"""\
`docs/benchmarking.md` says how rows are measured and checked, and what their columns mean. In short: *ms* is the
median time of a call, *baseline ms* that of the baseline in the same turns, and *ratio* the second over the first,
**above 1 is faster than the baseline**, with the 20th and 80th percentile of the quotients turn by turn in brackets.
Where these and the ratio do not all lie on one side of 1, the ratio is *noise*. Of files without a time of the
baseline it is the median of the quotients. The baseline is `{BASELINE}`; beside a variant or resets, which it lacks,
it computes the standard cell of the same sizes, except in the suites `overhead` and `overhead-cell`, where it is the
variant's step in plain PyTorch, `by-hand`. A baseline's own row is timed alone and has no ratio. *shape* begins with
the workload that has it. *us/step* is the time of one time step of one layer and direction, *cpu us* the time until a
call returns to Python, *MiB* the most memory that it allocates, *error* the largest distance from a float64 reference
relative to its norm. *limit* is the least us/step that the machine's constants allow, and *times* is us/step over it;
*times* below 1 shows that the constants were measured while the machine was slower. *regime* is the algorithm that
PyTorch asks cuDNN for at the shape, or the CPU. A mean is geometric, and of the rows that its provider computes, which
are not always the same; *n of m* rows: n have a ratio."""

WAITED_FOR = "*ms* and *p99 ms*: from the call until the device is done, the median and the 99th percentile."
"""What the report says beside rows that have a 99th percentile."""

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


class WrongMarkers(Exception):
    """A file has not exactly one line with each marker, in the right order."""


def write(results: Path, readme: Path | None = None) -> tuple[list[Path], list[str]]:
    """Write the plots, the report and, where one is named, the README; return what was written and what is damaged."""
    text = readme.read_bytes().decode() if readme is not None else ""
    if readme is not None:
        rewrite_block(text, "")  # wrong markers are found before anything is written
    frame, damaged_rows = summary.load(results)
    known, damaged_constants = rows.all_constants(results)
    damaged = [str(error) for error in (*damaged_rows, *damaged_constants)]
    pictures = plots.draw_all(frame, results)
    written = [path for _, path in pictures]
    written.append(results / "report.md")
    write_whole(written[-1], markdown(frame, known, damaged, [(title, path.name) for title, path in pictures]))
    if readme is not None:
        write_whole(readme, rewrite_block(text, block(frame, Path(os.path.relpath(results, readme.parent)))))
        written.append(readme)
    return written, damaged


def markdown(
    frame: pd.DataFrame, known: dict[str, Constants], damaged: list[str], pictures: list[tuple[str, str]]
) -> str:
    """Return the report; `known` are constants by machine, `pictures` titles and names of files beside the report."""
    parts = ["# Benchmarks", HOW]
    if not len(frame):
        parts.append("No row has been measured yet.")
    if damaged:
        parts += ["## Damaged files, left out", "\n".join(f"- {escaped(words)}" for words in damaged)]
    present = frame.who.unique()
    leaves_out = {f"{one.name} {one.strategy}": one.leaves_out or "nothing" for one in PROVIDERS.values()}
    lines = [(name, words) for name, words in leaves_out.items() if name in present]
    parts += ["## What each provider leaves out", table(("provider", "leaves out"), lines)] if lines else []
    for gpu in dict.fromkeys([*frame.gpu, *known]):
        parts += [f"## {escaped(gpu)}", *machine(frame[frame.gpu == gpu])]
        parts += [f"![{escaped(title)}]({quote(name)})" for title, name in pictures if title.startswith(f"{gpu}: ")]
        if gpu in known:
            parts += ["### Constants of the limit", table(("constant", "value"), constants_lines(known[gpu]), (1,))]
    return "\n\n".join(parts) + "\n"


def machine(frame: pd.DataFrame) -> list[str]:
    """Return what the report says of one machine's rows: where from, means, rows without a ratio, all rows."""
    if not len(frame):
        return ["No results file of this folder has a row of this machine."]
    origin = ["file", "driver", "torch", "triton", "cudnn", "commit", "date"]
    counts = frame.groupby(origin, sort=False).size().reset_index(name="rows")
    counts["file"] = [f"[{escaped(name)}]({quote(name)})" for name in counts.file]
    parts = [markdown_of(counts)]
    if frame.commit.str.endswith("+").any():
        parts.append("A `+` behind a commit: the code that was measured differed from it.")
    missing = frame[frame.ratio.isna() & ~((frame.provider == frame.baseline) & frame.ms_median.notna())]
    words = ", ".join(f"{count} {kind}" for kind, count in missing.outcome.value_counts().items())
    parts += ["### Geometric means of the ratio to the baseline", markdown_of(summary.means(frame))]
    parts.append("*slower*: rows that are slower than the baseline, noise not counted. *slowest*: the least ratio.")
    parts += ["### Rows without a ratio", f"{words}." if words else "None."]
    if len(missing):
        why = missing[["suite", "mode", "who", "dtype", "shape", "outcome"]].copy()
        timed = missing.ms_median.notna()
        why["why"] = missing.error.where(~timed, f"no time of {BASELINE} beside it").map(
            lambda text: escaped(str(text))
        )
        parts.append(markdown_of(why))
    parts.append("### All rows")
    for suite, own in frame.groupby("suite", sort=False):
        parts.append(f"<details>\n<summary>{suite}, {len(own)} rows</summary>")
        parts += [WAITED_FOR] if own.ms_p99.notna().any() else []
        parts += [markdown_of(all_rows(own)), "</details>"]
    return parts


def all_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns of the table of all rows, in words."""
    own = frame.provider == frame.baseline
    found = frame[["who", "mode", "dtype", "shape"]].rename(columns={"who": "provider"})
    found["ms"] = frame.ms_median.map(number)
    if frame.ms_p99.notna().any():
        found["p99 ms"] = frame.ms_p99.map(number)
    found["baseline"] = frame.baseline.mask(own, "")
    found["baseline ms"] = frame.baseline_ms.mask(own).map(number)
    found["ratio"] = frame.ratio_text
    figures = {"us/step": "us_per_step", "cpu us": "cpu_us_per_call", "MiB": "peak_mib"}
    for head, column in (figures | {"limit": "limit_us_per_step", "times": "limit_ratio"}).items():
        found[head] = frame[column].map(number)
    errors = frame.error.map(lambda error: f"{error:.1e}" if isinstance(error, float) and error == error else "")
    found["error"] = errors.mask(frame.ms_median.isna(), frame.outcome)
    return found


def markdown_of(frame: pd.DataFrame) -> str:
    """Return a frame as a Markdown table."""
    return table(list(frame.columns), frame.astype(str).values.tolist()) if len(frame) else "None."


def block(frame: pd.DataFrame, results: Path) -> str:
    """Return the block of a README: of every GPU what a user gets who chooses nothing, with a picture of the one that
    has the most rows; links go to `results`."""
    report = f"[report.md]({quote(str(results / 'report.md'))})"
    ours = frame[(frame.who == OURS) & (frame.baseline == BASELINE) & ~frame.on_cpu]
    if not len(ours):
        return f"No GPU has been measured: no speed against cuDNN is claimed. What was measured: {report}."
    parts = []
    for gpu, rows_of_gpu in ours.groupby("gpu", sort=False):
        lines = []
        for suite, own in rows_of_gpu.groupby("suite", sort=False):
            by_mode = [number(geometric_mean(own.ratio[own["mode"] == mode])) for mode in (FORWARD, TRAINING)]
            slowest = own.ratio_text[own.ratio.idxmin()] if own.ratio.count() else ""
            lines.append((suite, WORDS.get(suite, ""), count_text(own.ratio), *by_mode, slowest, own.slower.sum()))
        words = [f"{name} {' and '.join(rows_of_gpu[column].unique())}" for name, column in VERSIONS.items()]
        files = ", ".join(f"[{name}]({quote(str(results / name))})" for name in rows_of_gpu.file.unique())
        picture = f"{rows.slug(gpu)}-speed-over-shapes.svg"
        parts += [
            f"**{gpu}**: time of `{BASELINE}` / time of this library with its defaults; above 1 is faster. "
            "Geometric means of the rows of each suite; in brackets the 20th and 80th percentile over the calls:",
            table(("suite", "what", "rows", FORWARD, TRAINING, "slowest row", "slower rows"), lines, range(2, 7)),
            f"*slower rows*: noise is not counted. {', '.join(words)}; rows of {files}. All of them: {report}.",
        ]
        if rows_of_gpu.ratio.count() and gpu == ours.gpu.mode()[0]:
            parts.append(f"![{gpu}: speed over shapes]({quote(str(results / picture))})")
    return "\n\n".join(parts)


VERSIONS = {"Driver": "driver", "PyTorch": "torch", "Triton": "triton", "cuDNN": "cudnn", "measured": "date"}


def rewrite_block(text: str, new: str) -> str:
    """Return the text with `new` between the lines BEGIN and END; everything else is the same byte for byte.

    Raises WrongMarkers where one of the two lines is missing, there twice, or they are in the wrong order.
    """
    lines = text.split("\n")
    for marker in (BEGIN, END):
        count = [line.rstrip() for line in lines].count(marker)
        if count != 1:
            raise WrongMarkers(f"the line {marker} is {f'there {count} times' if count else 'missing'}")
    first, last = ([line.rstrip() for line in lines].index(marker) for marker in (BEGIN, END))
    if first > last:
        raise WrongMarkers(f"the line {END} stands before {BEGIN}")
    return "\n".join([*lines[: first + 1], "", new.strip("\n"), "", *lines[last:]])
