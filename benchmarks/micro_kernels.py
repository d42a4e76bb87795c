"""The kernels of the microbenchmarks: waiting for other programs, reading through L2, an empty launch."""

from __future__ import annotations

import triton
import triton.language as tl
from lstm_triton_kernels.sync import exchange_arrive, exchange_load, exchange_store, exchange_wait


@triton.jit
def empty_kernel(flag_ptr):
    """Nothing; flag (1,) any type is not read."""
    pass


@triton.jit(do_not_specialize=["rounds", "limit"])
def wait_kernel(
    chunks_ptr, sums_ptr, counter_ptr, error_ptr, rounds, limit,
    SEEN: tl.constexpr, BLOCK: tl.constexpr, WAIT: tl.constexpr, EXCHANGE: tl.constexpr,
):  # fmt: skip
    """`rounds` times: wait until all programs have come as far.

    With EXCHANGE each program stores BLOCK values (round + program) mod 256 in chunks (rounds, programs, BLOCK), 16-bit
    floats, loads those of all programs and adds them up in sums (programs,) int32. SEEN is a power of two >= programs;
    SEEN · BLOCK is at least the threads of a program (see `sync.any_missing`).
    counter (1,) and error (1,) int32 are zero before. WAIT "data" needs EXCHANGE and chunks unpublished before.
    """
    me = tl.program_id(0)
    programs = tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    seen = tl.arange(0, SEEN)
    everyone = seen[:, None] * BLOCK + lane[None, :]
    present = (seen < programs)[:, None] & (lane < BLOCK)[None, :]
    total = tl.zeros((SEEN, BLOCK), tl.int32)
    max_polls = limit
    for n in range(rounds):
        round_ptr = chunks_ptr + n * programs * BLOCK
        if EXCHANGE:
            value = tl.zeros((BLOCK,), tl.float32) + (n + me) % 256
            exchange_store(round_ptr + me * BLOCK + lane, value, lane < BLOCK, WAIT)
        exchange_arrive(counter_ptr, WAIT)
        max_polls = exchange_wait(counter_ptr, (n + 1) * programs, max_polls, error_ptr, WAIT)
        if EXCHANGE:
            blocks, max_polls = exchange_load((round_ptr + everyone,), (present,), max_polls, error_ptr, WAIT)
            total += blocks[0].to(tl.int32)
    if EXCHANGE:
        tl.store(sums_ptr + me, tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["reads"])
def l2_read_kernel(h_ptr, sums_ptr, steps, width, reads, BLOCK: tl.constexpr):
    """Every program reads h_t for t = 0, 1, ..., `reads` times in all, past its multiprocessor's own cache.

    h (steps, width) int32, two 16-bit elements each, width a multiple of BLOCK; sums (programs, BLOCK) int32: column
    sums of all blocks of all reads, modulo 2^32, so that no read is dead.
    """
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for n in range(reads):
        h_t = h_ptr + (n % steps) * width
        for start in range(0, width, BLOCK):
            total += tl.load(h_t + start + lane, cache_modifier=".cg")
    tl.store(sums_ptr + tl.program_id(0) * BLOCK + lane, total)


@triton.jit(do_not_specialize=["length"])
def chase_kernel(next_ptr, end_ptr, length):
    """end (1,) int32 = next[next[... next[0]]], `length` dependent loads past the multiprocessor's own cache."""
    at = tl.load(next_ptr, cache_modifier=".cg")
    for _ in range(1, length):
        at = tl.load(next_ptr + at, cache_modifier=".cg")
    tl.store(end_ptr, at)
