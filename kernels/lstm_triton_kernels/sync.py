"""Waiting of a program (thread block) for the others of a cooperative launch: by a counter, or by polling the data.

The kernels in Gluon publish as here, and poll the data in a way of their own (polling.py).

Programs exchange values through a buffer in device memory. Every slot of it is written once in a launch: h_t has its
own slot for every t. A kernel is written once, with `WAIT: tl.constexpr`, "counter" or "data":

    max_polls = limit
    for t in range(T):
        exchange_pause(clocks, WAIT)
        max_polls = exchange_wait(counter_ptr, t * programs, max_polls, error_ptr, WAIT)   # all have written h_{t-1}
        h, max_polls = exchange_load((h_{t-1},), (mask,), max_polls, error_ptr, WAIT)      # a tuple of blocks at once
        ...
        exchange_store(h_t, value, mask, WAIT)
        exchange_arrive(counter_ptr, WAIT)                                               # after the step's last store

*counter*. Store, `arrive`; `wait_for_count`, load. One int32 counter for each group of programs that read each other (a
block of batch rows), zero before the launch. Counts only grow: one that is set back races with its slowest reader. What
orders what, in the terms of the PTX memory model:

- The barrier of `arrive` orders the stores of all threads of a program before the add, which is one thread's. The add
  is a release at gpu scope, and a release is cumulative: it covers all that happens before it, other threads' stores.
- A wait that reads `target` has observed every add up to it, since atomic adds to one address form a chain, and an
  acquire that observes a chain synchronizes with every release in it. So the stores of all programs happen before it.
- The acquire, too, is one thread's; the barrier after it orders it before the loads of the program's other threads.

*data*. `unpublish` the buffer before the launch: every element becomes a bit pattern that no result has, all ones, a
NaN. `publish` stores values, a NaN of that pattern as another NaN; `load_when_published` loads until no element is the
pattern. There is no fence and none is needed: a fence orders one access after another, and here every element says for
itself whether it may be read. It is written once in a launch, aligned, and at most 8 bytes wide, so it is read either
unpublished or whole, whatever its neighbours are. The start of the launch orders the filling before everything. The
load must read memory and not an old copy, so it is volatile, which bypasses the multiprocessor's L1 cache. Another
buffer written beside needs a pattern of its own, or the counter.

The letter of the PTX memory model does not promise all of this. A plain store need never become visible to a volatile
load; the L1 caches of these GPUs write through, so it does. tests/compiled executes the kernels with stores that become
visible late, one element at a time and in any order.

A poll that comes too early costs a whole round trip more, and the traffic of polls delays what they wait for: on an
H100 a step is shorter by up to a fifth where a program lets a few hundred clocks pass before its first poll
(benchmarks/NOTES.md). `exchange_pause` does that; it changes no result.

Both waits are bounded. A kernel starts with `max_polls`, the most polls that one wait may take; every wait returns that
of the next one: the same, or 0 once a wait timed out, so that the program reaches its end at once instead of waiting T
times. A wait that times out sets a bit of the int32 at `error_ptr`, and values that were never published are NaN.
Whether to poll again must be decided alike in all threads of a program, as barriers demand: a count is read by one
thread and broadcast; for elements see `any_missing`.

The launch is cooperative (`launch_cooperative_grid=True`: all programs are resident, or it is an error) and has
`num_stages=1`: software pipelining would move the loads of a step before the wait they need. Programs times steps stay
below 2^31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lstm_triton_kernels.inline_ptx import pause
from lstm_triton_kernels.watch import reasons

WAIT_METHODS = ("counter", "data")
"""What `WAIT` may be."""

POLLS = 1 << 20
"""Polls of a wait of a launch at most: half a second, if a poll takes half a microsecond (an estimate)."""

COUNTER_STRIDE = tl.constexpr(32)
"""int32 from one counter to the next: each has a cache line of its own."""

TIMED_OUT_COUNT = tl.constexpr(1)
TIMED_OUT_DATA = tl.constexpr(2)


@triton.constexpr_function
def bits_type(element):
    """Return the integer type as wide as a float type."""
    return {16: tl.int16, 32: tl.int32, 64: tl.int64}[element.primitive_bitwidth]


@triton.constexpr_function
def quiet_nan(element):
    """Return the NaN that replaces the one whose bits are all ones: the same without its sign."""
    return (1 << (element.primitive_bitwidth - 1)) - 1


@triton.jit
def arrive(counter_ptr):
    """Add this program to the count at counter_ptr (int32), after all that its threads have stored."""
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release", scope="gpu")


@triton.jit
def wait_for_count(counter_ptr, target, max_polls, error_ptr):
    """Wait until the count at counter_ptr (int32) is at least target; returns max_polls for the next wait."""
    count = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
    polls = tl.full((), 0, tl.int32)
    while (count < target) & (polls < max_polls):
        count = tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu")
        polls += 1
    tl.debug_barrier()
    return time_out_if(count < target, max_polls, error_ptr, TIMED_OUT_COUNT)


@triton.jit
def publish(ptr, value, mask):
    """Store value (a block, any type that casts to the buffer's) where readers poll for it.

    The buffer's elements have 16, 32 or 64 bits.
    """
    BITS: tl.constexpr = bits_type(ptr.dtype.element_ty)
    NAN: tl.constexpr = quiet_nan(ptr.dtype.element_ty)
    bits = value.to(ptr.dtype.element_ty).to(BITS, bitcast=True)
    bits = tl.where(bits == -1, NAN, bits)
    tl.store(ptr.to(tl.pointer_type(BITS)), bits, mask=mask)


@triton.jit
def any_missing(blocks):
    """Return whether an element of a tuple of blocks of bits of one shape is unpublished, the same in every thread.

    A block needs at least as many elements as the program has threads. Of a smaller one several warps load the same
    element, each at a time of its own, and a reduction takes the word of one of them for all.
    """
    unpublished = blocks[0] == -1
    for n in tl.static_range(1, len(blocks)):
        unpublished = unpublished | (blocks[n] == -1)
    return tl.max(unpublished.to(tl.int32)) > 0


@triton.jit
def load_bits(pointers, masks):
    """Load the blocks at a tuple of pointers as integers, bypassing the L1 cache; 0 where masked."""
    BITS: tl.constexpr = bits_type(pointers[0].dtype.element_ty)
    blocks = ()
    for n in tl.static_range(len(pointers)):
        source = pointers[n].to(tl.pointer_type(BITS))
        blocks = blocks + (tl.load(source, mask=masks[n], other=0, volatile=True),)  # noqa: RUF005
    return blocks


@triton.jit
def load_when_published(pointers, masks, max_polls, error_ptr):
    """Wait until all blocks at a tuple of pointers are published, all of one shape and type, see `any_missing`.

    Returns the blocks (0 where masked) and the next wait's max_polls. All loads are issued before the first is
    examined: they cost one round trip together.
    """
    ELEMENT: tl.constexpr = pointers[0].dtype.element_ty
    bits = load_bits(pointers, masks)
    missing = any_missing(bits)
    polls = tl.full((), 0, tl.int32)
    while missing & (polls < max_polls):
        bits = load_bits(pointers, masks)
        missing = any_missing(bits)
        polls += 1
    max_polls = time_out_if(missing, max_polls, error_ptr, TIMED_OUT_DATA)
    blocks = ()
    for n in tl.static_range(len(pointers)):
        blocks = blocks + (bits[n].to(ELEMENT, bitcast=True),)  # noqa: RUF005
    return blocks, max_polls


@triton.jit
def time_out_if(failed, max_polls, error_ptr, CODE: tl.constexpr):
    """Return 0 and set CODE's bit at error_ptr (int32) if the wait failed, else return max_polls."""
    if failed:
        tl.atomic_or(error_ptr, CODE, sem="relaxed", scope="gpu")
    return tl.where(failed, 0, max_polls)


@triton.jit
def exchange_store(ptr, value, mask, WAIT: tl.constexpr):
    """Store a block of what other programs wait for."""
    if WAIT == "data":
        publish(ptr, value, mask)
    else:
        tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def exchange_arrive(counter_ptr, WAIT: tl.constexpr):
    """Count this program as done with a step's stores; nothing to do where readers poll the data."""
    if WAIT == "counter":
        arrive(counter_ptr)


@triton.jit
def exchange_pause(clocks, WAIT: tl.constexpr):
    """Let the multiprocessor's clocks pass before the first poll of the data; nothing to do by the counter."""
    if WAIT == "data":
        pause(clocks)


@triton.jit
def exchange_wait(counter_ptr, target, max_polls, error_ptr, WAIT: tl.constexpr):
    """Wait until target programs have arrived; where readers poll the data, `exchange_load` waits instead."""
    if WAIT == "counter":
        max_polls = wait_for_count(counter_ptr, target, max_polls, error_ptr)
    return max_polls


@triton.jit
def exchange_load(pointers, masks, max_polls, error_ptr, WAIT: tl.constexpr):
    """Load the blocks at a tuple of pointers, which others store, after `exchange_wait`.

    Returns them as a tuple (0 where masked) and the next wait's max_polls.
    """
    if WAIT == "data":
        blocks, max_polls = load_when_published(pointers, masks, max_polls, error_ptr)
    else:
        blocks = ()
        for n in tl.static_range(len(pointers)):
            value = tl.load(pointers[n], mask=masks[n], other=0, cache_modifier=".cg")
            blocks = blocks + (value,)  # noqa: RUF005
    return blocks, max_polls


def unpublish(buffer: Tensor) -> None:
    """Fill a floating-point tensor of any shape with the pattern that no published value has, before a launch."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[buffer.element_size()]
    buffer.view(integer).fill_(-1)


def raise_if_timed_out(error: Tensor, launch: str) -> None:
    """Raise RuntimeError naming the launch if a wait of it timed out; error (1,) int32. Synchronizes."""
    code = int(error.item())
    if code:
        raise RuntimeError(
            f"{launch}: timed out waiting for the other thread blocks ({reasons(code)}); the results are invalid"
        )
