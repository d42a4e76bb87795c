"""Which implementation computes a call: the Triton kernels or PyTorch's own operators.

(Not named `backends`: torch.compile skips every file with `triton/backends` in its path, `lstm_triton/backends` too.)
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from lstm_triton_kernels.plan import SUPPORTED_DTYPES

BACKENDS = ("auto", "triton", "torch")
ENVIRONMENT_VARIABLE = "LSTM_TRITON_BACKEND"
MINIMUM_CAPABILITY = (8, 0)
NEEDS_CUDA = (
    "it needs a CUDA device, move model and input there (model.to('cuda')); CPU tensors only with TRITON_INTERPRET=1, "
    "set before the program starts"
)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

FROM_ENVIRONMENT = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
"""Read once: at every call it would cost a tenth of a short one."""

_requested: list[str] = []  # innermost last; a plain list because torch.compile guards on it, and not on a ContextVar


class Choice(NamedTuple):
    """A chosen backend or strategy, and one sentence why."""

    name: str
    reason: str


ON_CPU = Choice("torch", "the kernels run on CUDA devices, not on cpu")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute every call inside the `with` block on the given backend.

    - name: "triton" (the kernels; an error where they cannot run), "torch" (PyTorch's own operators), or "auto"
      (the kernels for CUDA tensors of a supported type on compute capability 8.0 or newer, else PyTorch)

    Holds for the whole process, whichever thread calls. Overrides the environment variable LSTM_TRITON_BACKEND, which
    is read when the library is imported. Raises ValueError for another name.
    """
    _requested.append(check_name(name, "backend"))
    try:
        yield
    finally:
        _requested.pop()


def check_name(name: str, source: str) -> str:
    """The name, if it is a backend's; else ValueError."""
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    return name


def requested() -> str:
    """What the user asked for: the innermost `with backend(...)`, else the environment variable, else "auto"."""
    if _requested:
        return _requested[-1]
    return check_name(FROM_ENVIRONMENT, ENVIRONMENT_VARIABLE)


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend for tensors of the given device and type.

    Raises RuntimeError where `triton` was asked for and cannot run, ValueError for an unknown name.
    """
    name = requested()
    if name == "torch":
        return Choice("torch", "asked for")
    if name == "auto" and device.type != "cuda":
        return ON_CPU if device.type == "cpu" else Choice("torch", f"the kernels run on CUDA devices, not on {device}")
    obstacle = why_not_triton(device, dtype)
    if obstacle is None:
        return Choice("triton", "asked for" if name == "triton" else f"{device} can run the kernels")
    if name == "triton":
        raise RuntimeError(f"backend 'triton' cannot run here: {obstacle}")
    return Choice("torch", obstacle)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the kernels from running on such tensors; None if nothing does."""
    if not TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype not in SUPPORTED_DTYPES:
        return f"the kernels compute in {', '.join(map(str, SUPPORTED_DTYPES))}, got {dtype}"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < MINIMUM_CAPABILITY:
            return f"{device} has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
        return None
    if device.type == "cpu":
        from lstm_triton_kernels.gates import INTERPRETED

        return None if INTERPRETED else NEEDS_CUDA
    return f"the kernels run on CUDA devices, not on {device.type}"
