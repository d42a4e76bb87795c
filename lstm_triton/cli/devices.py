"""Which device a program runs on, from what the user calls it."""

from __future__ import annotations

import torch

from lstm_triton.cli.errors import UserError


def parse_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one. Raises UserError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: there are auto, cpu, cuda and cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"cannot run on {name!r}, only on cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no {name}: PyTorch {torch.__version__} finds {torch.cuda.device_count()} CUDA devices"
        )
    return device
