"""Plans that spill registers, by release of Triton, as compiling them showed (`make plans` writes this file)."""

from __future__ import annotations

from typing import Any

Kind = tuple[int, str, int, int, bool, bool]
"""Compute capability times ten, type of the products, gates, matrices of a full peephole, whether the backward
pass, whether with lengths or resets."""

SPILLS: dict[str, dict[Kind, frozenset[tuple[Any, ...]]]] = {}
