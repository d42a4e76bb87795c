"""Block sizes of the kernels of one step, from shapes and types. Needs no triton and asks no device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lstm_triton_kernels.sizes import ceil_div, next_power_of_2


@dataclass(frozen=True)
class Blocks:
    """The blocks of a kernel: a program has (block_b rows, block_u units), in a product block_k columns at a time."""

    block_b: int
    block_u: int
    num_warps: int
    block_k: int | None = None
    num_stages: int = 3

    def grid(self, B: int, H: int) -> tuple[int, int]:
        """Return the numbers of row blocks and unit blocks."""
        return ceil_div(B, self.block_b), ceil_div(H, self.block_u)

    def constants(self) -> dict[str, int]:
        """Return the compile-time arguments of a kernel."""
        sizes = dict(BLOCK_B=self.block_b, BLOCK_U=self.block_u, num_warps=self.num_warps)
        return sizes if self.block_k is None else sizes | dict(BLOCK_K=self.block_k, num_stages=self.num_stages)


def matmul_blocks(B: int, K: int, dtype: torch.dtype) -> Blocks:
    """Return blocks for B rows and products over at most K columns; few sizes, so that new shapes rarely compile anew.

    Few rows take narrow unit blocks: a step is latency, and more programs share the reading of the weights. The widest
    block is what compiles without spilling for sm_80, sm_90 and sm_100 (tests/compiled).
    """
    block_b = min(64, max(16, next_power_of_2(max(B, 1))))
    block_k = max(16, next_power_of_2(K))
    if dtype == torch.float64:
        return Blocks(min(block_b, 32), block_u=32, num_warps=4, block_k=16, num_stages=2)
    if dtype == torch.float32:
        return Blocks(block_b, block_u=32, num_warps=8 if block_b == 64 else 4, block_k=min(block_k, 32))
    if block_b == 64:
        return Blocks(block_b, block_u=64, num_warps=8, block_k=min(block_k, 32))
    return Blocks(block_b, block_u=32, num_warps=4, block_k=min(block_k, 64))


def elementwise_blocks(H: int, elements: int = 512) -> Blocks:
    """Return blocks of 512 elements, 4 a thread: one 16-byte access of float32. Few rows leave part of a block idle.

    elements: fewer where a kernel keeps so many values of each that it would spill.
    """
    block_u = min(128, next_power_of_2(H))
    return Blocks(elements // block_u, block_u, num_warps=4)


def row_blocks(H: int) -> Blocks:
    """Return blocks of whole rows of H units, 256 elements of each gate or more: 2 to 4 a thread up to 2,048 units.

    Above that a thread has more, since a thread of more than 16 warps has too few registers for what a row needs.
    """
    block_u = next_power_of_2(H)
    block_b = max(1, 256 // block_u)
    return Blocks(block_b, block_u, num_warps=min(16, max(4, block_b * block_u // 128)))
