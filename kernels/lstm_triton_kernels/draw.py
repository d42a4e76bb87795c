"""The masks of regularised steps drawn on a GPU: bit for bit those of `regularize.step_codes` and `regularize.events`.

Shapes: T time steps, B batch rows, H hidden units, P hidden size after projection (else H), D directions. Four units, a
quad, take the four words that Philox4x32-10 makes of one counter. The seed is read from memory: nothing waits for the
host, and a launch may be captured in a CUDA graph, which draws from the seed that stands there when it is replayed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.regularize import HIDDEN_STREAM, Rules, keep_scale, threshold
from lstm_triton_kernels.sizes import ceil_div

BLOCK = 256
"""Quads of a program, of one time step and direction."""

STREAM_OF_H = tl.constexpr(HIDDEN_STREAM)


@triton.jit
def quads_of_program(T, B, quads, blocks, BLOCK: tl.constexpr):
    """Return direction, time index, and row and quad (BLOCK,) of the quads of this program; rows may be beyond B."""
    place = tl.program_id(0) // blocks
    direction = place // T
    index = (tl.program_id(0) - place * blocks) * BLOCK + tl.arange(0, BLOCK)
    row = index // quads
    return direction, place - direction * T, row, index - row * quads


@triton.jit
def words_of(seed, stream, direction, t, row, quad):
    """Return the four words (BLOCK,) of each quad, int64 from 0 to 2^32 - 1."""
    zero = quad * 0
    words = tl.philox(seed, quad, row, zero + t, zero + direction + 2 * stream)
    return words[0].to(tl.int64), words[1].to(tl.int64), words[2].to(tl.int64), words[3].to(tl.int64)


@triton.jit
def mark(codes, words, below, n: tl.constexpr, BIT: tl.constexpr):
    """Return the codes of the n-th unit of each quad, with a bit where its word is below a number."""
    return codes[n] + tl.where(words[n] < below, BIT, 0)


@triton.jit(do_not_specialize=["T", "B", "blocks"])
def draw_codes_kernel(
    codes_ptr, seed_ptr, candidate_below, zoneout_h_below, zoneout_c_below, T, B, H, quads, blocks, BLOCK: tl.constexpr
):
    """Store the codes (D, T, B, H) uint8 of all steps, from a seed (1,) int64.

    Each bit is set where a word of its own stream, of 2^32 values, is below a number; no bit where that is None.
    blocks: programs for each time step and direction. Program: (direction, time step, block of quads).
    """
    direction, t, row, quad = quads_of_program(T, B, quads, blocks, BLOCK)
    seed = tl.load(seed_ptr)
    below = (candidate_below, zoneout_h_below, zoneout_c_below)
    codes = (quad * 0, quad * 0, quad * 0, quad * 0)
    for stream in tl.static_range(3):
        if below[stream] is not None:
            words = words_of(seed, stream, direction, t, row, quad)
            codes = (
                mark(codes, words, below[stream], 0, 1 << stream),
                mark(codes, words, below[stream], 1, 1 << stream),
                mark(codes, words, below[stream], 2, 1 << stream),
                mark(codes, words, below[stream], 3, 1 << stream),
            )
    place = codes_ptr + ((direction.to(tl.int64) * T + t) * B + row) * H + quad * 4
    for n in tl.static_range(4):
        tl.store(place + n, codes[n].to(tl.uint8), mask=(row < B) & (quad * 4 + n < H))


@triton.jit(do_not_specialize=["B", "blocks"])
def draw_factors_kernel(factors_ptr, seed_ptr, below, scale, B, P, quads, blocks, BLOCK: tl.constexpr):
    """Store what h_{t-1} is multiplied with in all steps, (D, B, P): 0 where a word is below a number, else a scale.

    blocks: programs for each direction. Program: (direction, block of quads).
    """
    direction, t, row, quad = quads_of_program(1, B, quads, blocks, BLOCK)
    words = words_of(tl.load(seed_ptr), STREAM_OF_H, direction, t, row, quad)
    place = factors_ptr + (direction.to(tl.int64) * B + row) * P + quad * 4
    for n in tl.static_range(4):
        factor = tl.where(words[n] < below, 0.0, scale)
        tl.store(place + n, factor.to(factors_ptr.dtype.element_ty), mask=(row < B) & (quad * 4 + n < P))


def step_codes(rules: Rules, seed: Tensor, D: int, T: int, B: int, H: int) -> Tensor:
    """Return the codes of all steps, (D, T, B, H) uint8, as `regularize.step_codes`: one launch."""
    codes = torch.empty(D, T, B, H, dtype=torch.uint8, device=seed.device)
    rates = (rules.candidate_dropout, rules.zoneout_h, rules.zoneout_c)
    below = [threshold(rate) if rate > 0 else None for rate in rates]
    sizes = dict(candidate_below=below[0], zoneout_h_below=below[1], zoneout_c_below=below[2], T=T, H=H)
    launch(draw_codes_kernel, D * T, B, H, dict(codes_ptr=codes, seed_ptr=seed, **sizes))
    return codes


def hidden_factors(rate: float, seed: Tensor, D: int, B: int, P: int, dtype: torch.dtype) -> Tensor:
    """Return what h_{t-1} is multiplied with, (D, B, P) of a type, as `regularize.drawn` makes it: one launch."""
    factors = torch.empty(D, B, P, dtype=dtype, device=seed.device)
    scale = torch.tensor(keep_scale(rate), dtype=dtype).item()
    numbers = dict(below=threshold(rate), scale=scale, P=P)
    launch(draw_factors_kernel, D, B, P, dict(factors_ptr=factors, seed_ptr=seed, **numbers))
    return factors


def launch(kernel: Any, places: int, B: int, units: int, arguments: dict[str, Any]) -> None:
    """Launch a kernel for B rows of units at so many places, on the device of the seed."""
    quads = ceil_div(units, 4)
    blocks = ceil_div(B * quads, BLOCK)
    if places * blocks:
        with torch.cuda.device_of(arguments["seed_ptr"]):
            kernel[places * blocks,](B=B, quads=quads, blocks=blocks, BLOCK=BLOCK, num_warps=4, **arguments)
