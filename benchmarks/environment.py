"""Where a number was measured: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from datetime import date
from importlib import import_module
from pathlib import Path

import torch

from benchmarks import ROOT


@dataclass(frozen=True)
class Environment:
    """The last columns of a row; `gpu` is the processor's name where a CPU was measured."""

    gpu: str
    driver: str
    torch: str
    triton: str
    cudnn: str
    commit: str
    date: str


def environment(device: torch.device) -> Environment:
    """What is true of this process, this checkout and the given device."""
    on_gpu = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if on_gpu else f"{processor()}, {torch.get_num_threads()} threads",
        driver=driver() if on_gpu else "",
        torch=torch.__version__,
        triton=_version("triton"),
        cudnn=str(torch.backends.cudnn.version()) if on_gpu else "",
        commit=commit(ROOT),
        date=date.today().isoformat(),
    )


def machine(device: torch.device) -> str:
    """What the names of results files begin with."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def driver() -> str:
    """The version of NVIDIA's driver; "" where nvidia-smi does not say."""
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0] if found else ""


def commit(root: Path) -> str:
    """The checkout's commit, with `+` where the measured code differs from it; else the variable COMMIT."""
    found = _output(["git", "-C", str(root), "rev-parse", "--short=10", "HEAD"])
    if not found:
        return os.environ.get("COMMIT", "")
    measured = ["lstm_triton", "kernels", "benchmarks", ":!benchmarks/results", ":!benchmarks/*.md"]
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--", *measured])
    return found + ("+" if changed else "")


def _version(package: str) -> str:
    try:
        return str(import_module(package).__version__)
    except ImportError:
        return ""


def _output(command: list[str]) -> str | None:
    """What a command prints, stripped; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
