"""Plans that spill registers, by release of Triton, as compiling them showed (`make plans` writes this file)."""

from __future__ import annotations

from typing import Any

Kind = tuple[int, str, int, int, bool, bool]
"""Compute capability times ten, type of the products, gates, matrices of a full peephole, whether the backward
pass, whether with lengths or resets."""

# fmt: off
SPILLS: dict[str, dict[Kind, frozenset[tuple[Any, ...]]]] = {
    "3.6": {
        (80, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", True, True), (8, 16, 32, 4, 2, 2, 4, "counter", True, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", True, True), (8, 16, 32, 8, 3, 3, 8, "counter", True, True),
            (8, 16, 32, 8, 3, 3, 8, "data", True, True), (8, 32, 32, 4, 2, 2, 4, "counter", True, True),
            (8, 32, 32, 8, 2, 2, 8, "counter", True, True), (8, 32, 32, 8, 3, 1, 8, "counter", True, True),
            (8, 32, 32, 8, 3, 1, 8, "data", True, True),
        }),
        (80, "half", 4, 0, True, True): frozenset({
            (8, 16, 64, 8, 1, 1, 8, "counter", False, True),
        }),
        (80, "tf32", 4, 0, True, True): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (80, "tf32", 4, 3, True, True): frozenset({
            (8, 32, 32, 8, 2, 1, 8, "counter", False, False),
        }),
        (89, "float32", 4, 0, False, False): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, True, True),
        }),
        (89, "float32", 4, 0, False, True): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, True, True),
        }),
        (89, "float32", 4, 0, True, False): frozenset({
            (8, 16, 32, 8, 2, 1, 8, "counter", True, True),
        }),
        (89, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", True, True), (8, 16, 32, 8, 2, 1, 8, "counter", True, True),
        }),
        (89, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", False, True), (64, 16, 64, 1, 1, 1, 4, None, False, True),
        }),
        (90, "float32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (8, 16, 32, 8, 2, 2, 8, "counter", True, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", True, True), (16, 16, 32, 8, 2, 2, 8, "counter", True, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (16, 16, 32, 8, 3, 1, 8, "counter", True, True),
            (64, 16, 64, 1, 1, 1, 4, None, True, True), (8, 16, 32, 8, 2, 2, 8, "counter", True, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", True, True), (8, 16, 32, 8, 4, 4, 8, "counter", True, True),
            (8, 16, 32, 8, 4, 4, 8, "data", True, True), (8, 32, 32, 8, 2, 2, 8, "counter", True, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", True, False), (8, 32, 32, 8, 3, 3, 8, "counter", True, True),
            (8, 32, 32, 8, 4, 1, 8, "counter", True, True), (8, 32, 32, 8, 4, 1, 8, "data", True, True),
        }),
        (90, "tf32", 3, 0, False, True): frozenset({
            (16, 16, 32, 8, 4, 1, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (90, "tf32", 3, 0, True, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (16, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 3, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (90, "tf32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", False, True), (16, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", False, True), (64, 16, 64, 1, 1, 1, 4, None, False, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 16, 32, 8, 4, 4, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "data", False, True), (8, 32, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "data", False, True),
        }),
        (90, "tf32", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 3, True, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "float32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, True, False): frozenset({
            (16, 16, 32, 4, 1, 1, 4, "counter", True, True), (16, 16, 32, 4, 1, 1, 4, "data", True, True),
            (16, 16, 32, 4, 2, 2, 4, "counter", True, False), (16, 16, 32, 4, 2, 2, 4, "counter", True, True),
            (16, 16, 32, 8, 2, 2, 8, "counter", True, False), (16, 16, 32, 8, 2, 2, 8, "counter", True, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (8, 16, 32, 4, 1, 1, 4, "counter", True, False),
            (8, 16, 32, 4, 1, 1, 4, "counter", True, True), (8, 32, 32, 4, 1, 1, 4, "counter", True, True),
            (8, 32, 32, 4, 1, 1, 4, "data", True, True), (8, 32, 32, 4, 2, 2, 4, "counter", True, False),
            (8, 32, 32, 8, 2, 2, 8, "counter", True, False), (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 1, 1, 4, "counter", True, True), (16, 16, 32, 4, 2, 2, 4, "counter", True, False),
            (16, 16, 32, 4, 2, 2, 4, "counter", True, True), (16, 16, 32, 8, 2, 2, 8, "counter", True, False),
            (16, 16, 32, 8, 2, 2, 8, "counter", True, True), (16, 16, 32, 8, 3, 1, 8, "counter", True, False),
            (16, 16, 32, 8, 3, 1, 8, "counter", True, True), (64, 16, 64, 1, 1, 1, 4, None, True, True),
            (8, 16, 32, 4, 1, 1, 4, "counter", True, True), (8, 16, 32, 8, 2, 2, 8, "counter", True, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", True, True), (8, 16, 32, 8, 4, 4, 8, "counter", True, True),
            (8, 16, 32, 8, 4, 4, 8, "data", True, True), (8, 32, 32, 4, 1, 1, 4, "counter", True, True),
            (8, 32, 32, 4, 2, 2, 4, "counter", True, False), (8, 32, 32, 8, 2, 2, 8, "counter", True, False),
            (8, 32, 32, 8, 2, 2, 8, "counter", True, True), (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
            (8, 32, 32, 8, 3, 3, 8, "counter", True, True), (8, 32, 32, 8, 4, 1, 8, "counter", True, True),
            (8, 32, 32, 8, 4, 1, 8, "data", True, True),
        }),
        (100, "half", 4, 0, True, True): frozenset({
            (8, 16, 64, 8, 1, 1, 8, "counter", False, True), (8, 16, 64, 8, 2, 2, 8, "counter", False, True),
            (8, 32, 32, 8, 4, 4, 8, "counter", False, True),
        }),
        (100, "half", 4, 3, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, False, True): frozenset({
            (16, 16, 32, 8, 4, 1, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, True, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (16, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", False, True), (16, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", False, True), (64, 16, 64, 1, 1, 1, 4, None, False, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 16, 32, 8, 4, 4, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "data", False, True), (8, 32, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "data", False, True),
        }),
        (100, "tf32", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "tf32", 4, 3, True, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
    },
    "3.8": {
        (80, "half", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (80, "tf32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 3, 1, 8, "counter", False, False),
        }),
        (80, "tf32", 4, 0, True, True): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, False, True),
        }),
        (80, "tf32", 4, 3, False, True): frozenset({
            (8, 32, 32, 8, 2, 1, 8, "counter", False, False),
        }),
        (89, "float32", 4, 0, False, False): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, True, True),
        }),
        (89, "float32", 4, 0, False, True): frozenset({
            (64, 16, 64, 1, 1, 1, 4, None, True, True),
        }),
        (89, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 4, 2, 2, 4, "counter", False, True), (64, 16, 64, 1, 1, 1, 4, None, False, True),
        }),
        (90, "float32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (90, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (64, 16, 64, 1, 1, 1, 4, None, True, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (90, "half", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
        }),
        (90, "tf32", 3, 0, True, True): frozenset({
            (16, 16, 32, 8, 3, 3, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (90, "tf32", 4, 0, False, True): frozenset({
            (8, 16, 32, 8, 4, 4, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (64, 16, 64, 1, 1, 1, 4, None, False, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, True), (8, 32, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 3, False, False): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (90, "tf32", 4, 3, True, True): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "float32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, False, True): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (100, "float32", 4, 0, True, True): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", True, False), (64, 16, 64, 1, 1, 1, 4, None, True, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", True, False),
        }),
        (100, "half", 4, 0, True, False): frozenset({
            (16, 16, 64, 8, 2, 2, 8, "counter", False, False), (16, 16, 64, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 64, 8, 3, 1, 8, "counter", False, False), (16, 16, 64, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "half", 4, 0, True, True): frozenset({
            (16, 16, 64, 8, 2, 2, 8, "counter", False, False), (16, 16, 64, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 64, 8, 3, 1, 8, "counter", False, False), (16, 16, 64, 8, 3, 1, 8, "counter", False, True),
            (8, 16, 64, 8, 2, 2, 8, "counter", False, False), (8, 32, 32, 8, 4, 4, 8, "counter", False, False),
        }),
        (100, "half", 4, 3, False, False): frozenset({
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "half", 4, 3, False, True): frozenset({
            (16, 16, 32, 8, 3, 1, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "half", 4, 3, True, False): frozenset({
            (16, 16, 32, 8, 3, 3, 8, "counter", False, True),
        }),
        (100, "half", 4, 3, True, True): frozenset({
            (8, 16, 64, 8, 2, 2, 8, "counter", False, False), (8, 32, 32, 8, 4, 4, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, False, False): frozenset({
            (16, 16, 32, 8, 4, 1, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, False, True): frozenset({
            (16, 16, 32, 8, 4, 1, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, True, False): frozenset({
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 3, 0, True, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, True), (16, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", False, False), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 32, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, False, False): frozenset({
            (8, 32, 32, 8, 3, 3, 8, "counter", False, False), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, False, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, False), (16, 16, 32, 8, 3, 1, 8, "counter", False, False),
            (16, 16, 32, 8, 3, 1, 8, "counter", False, True), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, False), (8, 32, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, True, False): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, False), (16, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", False, False), (8, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", False, False), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 32, 32, 8, 2, 2, 8, "counter", False, False),
            (8, 32, 32, 8, 2, 2, 8, "counter", False, True), (8, 32, 32, 8, 3, 3, 8, "counter", False, False),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 3, 8, "data", False, False),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
        }),
        (100, "tf32", 4, 0, True, True): frozenset({
            (16, 16, 32, 8, 2, 2, 8, "counter", False, False), (16, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (16, 16, 32, 8, 3, 1, 8, "counter", False, False), (16, 16, 32, 8, 3, 1, 8, "counter", False, True),
            (64, 16, 64, 1, 1, 1, 4, None, False, True), (8, 16, 32, 4, 2, 2, 4, "counter", False, True),
            (8, 16, 32, 8, 2, 2, 8, "counter", False, False), (8, 16, 32, 8, 2, 2, 8, "counter", False, True),
            (8, 16, 32, 8, 3, 3, 8, "counter", False, False), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 16, 32, 8, 4, 4, 8, "counter", False, False), (8, 16, 32, 8, 4, 4, 8, "counter", False, True),
            (8, 32, 32, 4, 2, 2, 4, "counter", False, True), (8, 32, 32, 8, 2, 2, 8, "counter", False, False),
            (8, 32, 32, 8, 2, 2, 8, "counter", False, True), (8, 32, 32, 8, 3, 3, 8, "counter", False, False),
            (8, 32, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 4, 1, 8, "counter", False, False),
            (8, 32, 32, 8, 4, 1, 8, "counter", False, True),
        }),
        (100, "tf32", 4, 3, False, False): frozenset({
            (8, 16, 32, 8, 3, 3, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "tf32", 4, 3, False, True): frozenset({
            (8, 16, 32, 8, 2, 2, 8, "counter", False, False), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 2, 2, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
        (100, "tf32", 4, 3, True, True): frozenset({
            (8, 16, 32, 8, 2, 2, 8, "counter", False, False), (8, 16, 32, 8, 3, 3, 8, "counter", False, True),
            (8, 32, 32, 8, 2, 2, 8, "counter", False, True), (8, 32, 32, 8, 3, 1, 8, "counter", False, True),
        }),
    },
}
