"""What `lstm-triton info` prints: versions, devices, and the backend that runs on each of them; tables of facts."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import import_module

import torch
from rich.table import Table
from rich.text import Text

import lstm_triton
from lstm_triton import routing


def versions() -> dict[str, str]:
    """Name to version of everything that decides which code runs; what is absent says so."""
    try:
        triton_version = import_module("triton").__version__
    except ImportError:
        triton_version = "not installed"
    cudnn = torch.backends.cudnn.version()
    return {
        "lstm_triton": lstm_triton.__version__,
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "CUDA": torch.version.cuda or "torch was built without",
        "cuDNN": str(cudnn) if cudnn else "none",
    }


def devices() -> dict[torch.device, str]:
    """Each device that the library can run on, and a description of it."""
    found = {torch.device("cpu"): f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found[torch.device("cuda", index)] = (
            f"{properties.name}, capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB"
        )
    return found


def backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The name of the backend that is chosen, and why; "none" and why if the chosen one cannot run."""
    try:
        choice = routing.choose_backend(device, dtype)
    except (RuntimeError, ValueError) as error:
        return "none", str(error)
    return choice.name, choice.reason


def versions_table() -> Table:
    """One row per version."""
    return facts_table("versions", versions().items())


def devices_table() -> Table:
    """One row per device, with its backend for float32."""
    table = Table("device", "what it is", "backend", "why", title="devices, and the backend for float32")
    for device, description in devices().items():
        table.add_row(str(device), description, *backend(device, torch.float32))
    return table


def facts_table(title: str, rows: Iterable[tuple[str, str]]) -> Table:
    """Two columns: names, which stay whole, and texts, which wrap."""
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    return table
