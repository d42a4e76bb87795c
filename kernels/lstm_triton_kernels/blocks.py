"""Block sizes of the kernels of one step, from shapes and types. Needs no triton and asks no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lstm_triton_kernels.sizes import next_power_of_2


@dataclass(frozen=True)
class MatmulBlocks:
    """Blocks of the gate matmul: a program computes (block_b rows, block_u units) of one gate, block_k at a time."""

    block_b: int
    block_u: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class ElementwiseBlocks:
    """Blocks of the elementwise kernels: a program updates (block_b rows, block_u units)."""

    block_b: int
    block_u: int
    num_warps: int


def matmul_blocks(B: int, K: int, dtype: torch.dtype) -> MatmulBlocks:
    """Blocks for B rows and products over at most K columns; of a few sizes, so that new shapes rarely compile anew.

    Few rows take narrow unit blocks: a step is latency, and more programs share the reading of the weights. The widest
    block is what compiles without spilling for sm_80, sm_90 and sm_100 (tests/compile).
    """
    block_b = min(64, max(16, next_power_of_2(max(B, 1))))
    block_k = max(16, next_power_of_2(K))
    if dtype == torch.float64:
        return MatmulBlocks(min(block_b, 32), block_u=32, block_k=16, num_warps=4, num_stages=2)
    if dtype == torch.float32:
        return MatmulBlocks(
            block_b, block_u=32, block_k=min(block_k, 32), num_warps=8 if block_b == 64 else 4, num_stages=3
        )
    if block_b == 64:
        return MatmulBlocks(block_b, block_u=64, block_k=min(block_k, 32), num_warps=8, num_stages=3)
    return MatmulBlocks(block_b, block_u=32, block_k=min(block_k, 64), num_warps=4, num_stages=3)


def elementwise_blocks(H: int) -> ElementwiseBlocks:
    """Blocks of 512 elements, 4 a thread: one 16-byte access of float32. Few rows leave part of a block idle."""
    block_u = min(128, next_power_of_2(H))
    return ElementwiseBlocks(512 // block_u, block_u, num_warps=4)
