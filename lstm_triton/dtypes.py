"""The names by which the tools of this repository know types: how tensors are stored, and how float32 is multiplied."""

from __future__ import annotations

import torch

DTYPES: dict[str, tuple[torch.dtype, str]] = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}
"""Name to the type of the storage and the precision of float32 matrix products ("tf32" or "ieee")."""

SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
"""Other spellings of these names."""


def dtype_name(text: str) -> str:
    """Return the name in `DTYPES` of a type, from any spelling: "bf16", "BFloat16", "torch.bfloat16".

    Raises ValueError for a name of no type that the kernels know.
    """
    name = text.strip().lower().removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in DTYPES:
        raise ValueError(f"unknown dtype {text!r}: choose from {', '.join(DTYPES)}, or short {', '.join(SHORT)}")
    return name
