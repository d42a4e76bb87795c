"""What to launch: pure functions from shapes and types to block sizes. Nothing here imports triton or asks a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the cell state and of every accumulator: float32, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def matmul_precision() -> str:
    """How float32 operands are multiplied: "tf32" or "ieee", as PyTorch's own switch for CUDA matmuls says."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (n >= 1)."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class MatmulPlan:
    """Blocks of the gate matmul: a program computes (block_b rows, block_u units) of one gate, block_k at a time."""

    block_b: int
    block_u: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ElementwisePlan:
    """Blocks of the elementwise kernels: a program updates (block_b rows, block_u units)."""

    block_b: int
    block_u: int
    num_warps: int


def matmul_plan(B: int, K: int, dtype: torch.dtype) -> MatmulPlan:
    """Blocks for B rows and products over at most K columns; of a few sizes, so that new shapes rarely compile anew.

    Few rows take narrow unit blocks: a step is latency, and more programs share the reading of the weights. The widest
    block is what compiles without spilling for sm_80, sm_90 and sm_100 (tests/compile).
    """
    block_b = min(64, max(16, next_power_of_2(max(B, 1))))
    block_k = max(16, next_power_of_2(K))
    if dtype == torch.float64:
        return MatmulPlan(min(block_b, 32), block_u=32, block_k=16, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        return MatmulPlan(
            block_b, block_u=32, block_k=min(block_k, 32), num_warps=8 if block_b == 64 else 4, num_stages=3
        )
    if block_b == 64:
        return MatmulPlan(block_b, block_u=64, block_k=min(block_k, 32), num_warps=8, num_stages=3)
    return MatmulPlan(block_b, block_u=32, block_k=min(block_k, 64), num_warps=4, num_stages=3)


def elementwise_plan(H: int) -> ElementwisePlan:
    """Blocks of 512 elements, 4 a thread: one 16-byte access of float32. Few rows leave part of a block idle."""
    block_u = min(128, next_power_of_2(H))
    return ElementwisePlan(512 // block_u, block_u, num_warps=4)
