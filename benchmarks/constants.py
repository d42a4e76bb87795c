"""The file of a machine's constants, `<gpu>-<date>-micro.json`: what `python -m benchmarks micro` measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lstm_triton_kernels.limit import Constants

from benchmarks.rows import DamagedResults, in_order


def save(path: Path, constants: Constants, environment: dict[str, Any]) -> None:
    """Write a new file of constants; one that exists is an error, never overwritten."""
    with path.open("x") as file:
        file.write(json.dumps({"environment": environment, "constants": asdict(constants)}, indent=2) + "\n")


def load(path: Path) -> tuple[Constants, dict[str, Any]]:
    """The constants and the environment of a file. Raises DamagedResults if it is not what `save` writes."""
    try:
        content = json.loads(path.read_text())
        values = dict(content["constants"])
        if values.get("wait_us") is not None:
            values["wait_us"] = {
                method: {int(programs): float(us) for programs, us in by_programs.items()}
                for method, by_programs in values["wait_us"].items()
            }
        environment = dict(content["environment"])
        environment["gpu"], environment["date"] = str(environment["gpu"]), str(environment["date"])
        return Constants(**values), environment
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedResults(f"{path}: not a file of constants: {error!r}") from error


def load_all(folder: Path) -> tuple[dict[str, Constants], list[DamagedResults]]:
    """By the machine's name the newest constants in the folder; and what is damaged, which is left alone."""
    found: dict[str, tuple[str, Constants]] = {}
    damaged: list[DamagedResults] = []
    for path in in_order(folder.glob("*-micro*.json")):
        try:
            constants, environment = load(path)
        except DamagedResults as error:
            damaged.append(error)
            continue
        gpu, date = environment["gpu"], environment["date"]
        if gpu not in found or found[gpu][0] <= date:
            found[gpu] = (date, constants)
    return {gpu: constants for gpu, (_, constants) in found.items()}, damaged
