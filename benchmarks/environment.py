"""Where a number was measured: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

from benchmarks import ROOT


def environment(device: torch.device) -> dict[str, str]:
    """Return the columns of a row that this process, this checkout and the device have in common."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = ""
    on_gpu = device.type == "cuda"
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {torch.get_num_threads()} threads",
        "driver": output_of(driver).partition("\n")[0] if on_gpu else "",
        "torch": torch.__version__,
        "triton": triton,
        "cudnn": str(torch.backends.cudnn.version()) if on_gpu else "",
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def machine(device: torch.device) -> str:
    """Return what the names of results files begin with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """Return the processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """Return the checkout's commit, with `+` where the measured code differs from it; else the variable COMMIT."""
    git = ["git", "-C", str(ROOT)]
    found = output_of([*git, "rev-parse", "--short=10", "HEAD"])
    measured = ["lstm_triton", "kernels", "benchmarks"]
    measured += [":!benchmarks/results", ":!benchmarks/floors", ":!benchmarks/*.md"]
    changed = found and output_of([*git, "status", "--porcelain", "--", *measured])
    return found + "+" * bool(changed) if found else os.environ.get("COMMIT", "")


def output_of(command: list[str]) -> str:
    """Return what a command prints, stripped; "" if it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def write_whole(path: Path, text: str) -> None:
    """Replace a file by the text; if that fails, its former contents are still there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, newline="")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
