"""Measure what a machine can do at best: the constants of the limit (`lstm_triton_kernels.limit`).

A time of one load, read, wait or launch comes from the difference between many and few of them in one launch, or from
many launches queued behind a busy device, so that the cost of launching cancels. Every value is the median of repeats
after a warm-up, and every launch's result is checked: what does not wait or read is not reported as fast.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lstm_triton_kernels.limit import Constants
from torch import Tensor

from benchmarks import timing

WAIT_BLOCK = 8
"""Elements that a program publishes in a round: 16 bytes, one access."""

READ_BLOCK = 4096
"""32-bit words that a program reads at once: two loads of 16 bytes in each of 512 threads, several such in flight."""

REGISTER_BYTES = 256 * 1024
"""Registers of a multiprocessor, of every compute capability since 3.0 (CUDA C++ Programming Guide)."""

WARP = 32
"""Threads of a warp."""

LINE = 32
"""int32 elements of one cache line: a step of the dependent chain never finds its line read before."""

# Few and many, whose difference is measured.
WAIT_ROUNDS = (200, 1000)
READS_OF_ALL_STEPS = (2, 10)
CHASE_LOADS = (5000, 30_000)

LAUNCHES = 200
"""Launches queued at a time: fewer than the queue of a stream holds."""

REPEATS = 7


def measure(device: torch.device, quick: bool = False) -> Constants:
    """Return the constants of a device.

    On a CPU the copy bandwidth and the matmul rates of float32 and float64 alone, in a second or two. On a GPU all of
    them, in about half a minute; it must be idle otherwise. quick: fewer counts of programs, smaller buffers.
    """
    if device.type == "cpu":
        sizes = {"float32": 512 if quick else 1024, "float64": 512}
        rates = {kind: matmul_tflop_per_s(device, kind, size) for kind, size in sizes.items()}
        return Constants(copy_gb_per_s(device, megabytes=32 if quick else 128), rates)
    with torch.cuda.device(device):
        return measure_gpu(device, quick)


def measure_gpu(device: torch.device, quick: bool) -> Constants:
    """Return all constants of the current GPU."""
    properties = torch.cuda.get_device_properties(device)
    multiprocessors = properties.multi_processor_count
    sizes = dict.fromkeys(("float16", "bfloat16", "float32", "tf32"), 4096 if quick else 8192) | {"float64": 4096}
    counts = program_counts(multiprocessors, quick)
    return Constants(
        copy_gb_per_s=copy_gb_per_s(device, megabytes=256 if quick else 1024),
        matmul_tflop_per_s={kind: matmul_tflop_per_s(device, kind, size) for kind, size in sizes.items()},
        l2_read_gb_per_s=l2_read_gb_per_s(device, multiprocessors),
        l2_round_trip_us=l2_round_trip_us(device),
        launch_us=launch_us(device, multiprocessors),
        wait_us={how: {n: wait_us(device, how, n, multiprocessors) for n in counts} for how in ("counter", "data")},
        multiprocessors=multiprocessors,
        on_chip_bytes=properties.shared_memory_per_multiprocessor + REGISTER_BYTES,
        l2_bytes=properties.L2_cache_size,
    )


def program_counts(multiprocessors: int, quick: bool = False) -> list[int]:
    """Return 1, 2, 4, ... and all multiprocessors; quick: 1, 2, 8, 32, ... and all."""
    counts = [1 << n for n in range(multiprocessors.bit_length()) if not quick or n % 2 or n == 0]
    return [*(count for count in counts if count < multiprocessors), multiprocessors]


# Measurements


def copy_gb_per_s(device: torch.device, megabytes: int) -> float:
    """Return the bytes read plus written by a copy of `megabytes` from one buffer to another, 1e9 a second."""
    source = torch.ones(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = median_seconds(device, lambda: target.copy_(source))
    return 2 * source.numel() / seconds / 1e9


def matmul_tflop_per_s(device: torch.device, kind: str, size: int) -> float:
    """Return the rate of a (size, size) product: "float16", "bfloat16", "float32" (IEEE), "tf32" or "float64"."""
    dtype = torch.float32 if kind == "tf32" else getattr(torch, kind)
    # Random: a product of zeros draws less power, so its clock is higher than real work's.
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with float32_matmuls("tf32" if kind == "tf32" else "ieee"):
        seconds = median_seconds(device, lambda: torch.mm(a, b, out=out))
    return 2 * size**3 / seconds / 1e12


def l2_read_gb_per_s(device: torch.device, programs: int) -> float:
    """Return the bandwidth of all programs reading the same 4 MB (or half of L2, if less), 1e9 bytes a second."""
    steps, width = 64, 4 * READ_BLOCK
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    while steps > 1 and 4 * steps * width > l2 // 2:
        steps //= 2
    h = torch.randint(-(2**31), 2**31, (steps, width), dtype=torch.int32, device=device)
    sums = torch.empty(programs, READ_BLOCK, dtype=torch.int32, device=device)
    seconds = seconds_of_one(
        device,
        lambda reads: read_through_l2(h, sums, reads, programs),
        [steps * times for times in READS_OF_ALL_STEPS],
        check=lambda reads: check_read(h, sums, reads),
    )
    return programs * 4 * width / seconds / 1e9


def l2_round_trip_us(device: torch.device) -> float:
    """Return the microseconds of one load that the next one needs, from a buffer of 1 MB in L2."""
    following = random_cycle(1 << 13).to(device)
    end = torch.empty(1, dtype=torch.int32, device=device)
    seconds = seconds_of_one(
        device,
        lambda length: chase(following, end, length),
        CHASE_LOADS,
        check=lambda length: check_chase(following, end, length),
    )
    return 1e6 * seconds


def launch_us(device: torch.device, programs: int) -> float:
    """Return the microseconds from one empty cooperative launch to the next, all queued before the first one starts."""
    flag = torch.zeros(1, dtype=torch.int32, device=device)

    def launch_all() -> None:
        for _ in range(LAUNCHES):
            launch_empty(flag, programs)

    launch_all()  # compiles
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    launch_all()
    host_seconds = time.perf_counter() - start
    cycles_per_second = 3e9  # no GPU's clock is higher: the device is busy for longer than the host takes
    busy = int(min(1.0, 2 * host_seconds) * cycles_per_second)
    return 1e6 * median_seconds(device, launch_all, first=lambda: torch.cuda._sleep(busy)) / LAUNCHES


def wait_us(device: torch.device, method: str, programs: int, multiprocessors: int) -> float:
    """Return the microseconds of one wait of programs for each other, by "counter" or "data" (see sync.py)."""
    buffers = WaitBuffers(device, rounds=max(WAIT_ROUNDS), programs=programs)
    exchange = method == "data"
    # The counter alone is timed, but a count that waits for nothing would pass: values exchanged by it would not.
    wait_for_all(buffers, method, min(WAIT_ROUNDS), multiprocessors, exchange=True)
    seconds = seconds_of_one(
        device,
        lambda rounds: wait_for_all(buffers, method, rounds, multiprocessors, exchange=exchange, check=False),
        WAIT_ROUNDS,
        prepare=buffers.reset,
        check=lambda rounds: buffers.check(method, rounds, exchange),
    )
    return 1e6 * seconds


# Launchers


class WaitBuffers:
    """What the programs of `wait_kernel` share, for up to `rounds` rounds.

    - chunks: (rounds, programs, WAIT_BLOCK) 16-bit floats, unpublished
    - sums: (programs,) int32; counter, error: (1,) int32, in different cache lines
    """

    def __init__(self, device: torch.device, rounds: int, programs: int, dtype: torch.dtype = torch.float16) -> None:
        self.rounds, self.programs = rounds, programs
        self.chunks = torch.empty(rounds, programs, WAIT_BLOCK, dtype=dtype, device=device)
        self.sums = torch.empty(programs, dtype=torch.int32, device=device)
        flags = torch.empty(2, LINE, dtype=torch.int32, device=device)
        self.counter, self.error = flags[0, :1], flags[1, :1]
        self.reset()

    def reset(self) -> None:
        """Restore what a launch expects to find."""
        from lstm_triton_kernels.sync import unpublish

        unpublish(self.chunks)
        for tensor in (self.sums, self.counter, self.error):
            tensor.zero_()

    def check(self, method: str, rounds: int, exchange: bool) -> None:
        """Raise RuntimeError if a wait of the last launch timed out, or its programs did not see each other."""
        from lstm_triton_kernels.sync import raise_if_timed_out

        launch = f"wait_kernel (method {method}, {self.programs} programs, {rounds} rounds)"
        raise_if_timed_out(self.error, launch)
        arrived = self.programs * rounds if method == "counter" else 0
        if self.counter.item() != arrived:
            raise RuntimeError(f"{launch}: counted {self.counter.item()} arrivals, not {arrived}")
        if exchange:
            values = (torch.arange(rounds)[:, None] + torch.arange(self.programs)) % 256
            expected = WAIT_BLOCK * int(values.sum())
            if (self.sums != expected).any():
                raise RuntimeError(f"{launch}: programs read other values than were sent: the wait does not wait")


def wait_for_all(
    buffers: WaitBuffers, method: str, rounds: int, multiprocessors: int | None, *,
    exchange: bool, check: bool = True, limit: int | None = None,
) -> None:  # fmt: skip
    """Launch `wait_kernel` on fresh buffers; with `check`, reset them before and raise RuntimeError on a wrong result.

    multiprocessors: of the device, None where programs need not be resident together (interpreter); limit: turns that
    one wait may take, by default as in the library.
    """
    from lstm_triton_kernels.sizes import next_power_of_2
    from lstm_triton_kernels.sync import POLLS

    from benchmarks import micro_kernels

    require_resident(buffers.programs, multiprocessors)
    seen = max(WARP // WAIT_BLOCK, next_power_of_2(buffers.programs)) if exchange else 1
    if method == "data" and not exchange:
        raise ValueError("programs that exchange nothing cannot wait by data")
    if not 0 < rounds <= buffers.rounds:
        raise ValueError(f"{rounds} rounds do not fit buffers for {buffers.rounds}")
    if check:
        buffers.reset()
    micro_kernels.wait_kernel[(buffers.programs,)](
        chunks_ptr=buffers.chunks,
        sums_ptr=buffers.sums,
        counter_ptr=buffers.counter,
        error_ptr=buffers.error,
        rounds=rounds,
        limit=POLLS if limit is None else limit,
        SEEN=seen,
        BLOCK=WAIT_BLOCK,
        WAIT=method,
        EXCHANGE=exchange,
        num_warps=min(4, seen * WAIT_BLOCK // WARP) if exchange else 4,
        num_stages=1,
        launch_cooperative_grid=True,
    )
    if check:
        buffers.check(method, rounds, exchange)


def read_through_l2(h: Tensor, sums: Tensor, reads: int, programs: int) -> None:
    """Launch `l2_read_kernel`: h (steps, width) int32; sums (programs, block) int32, out; width a multiple of block."""
    from benchmarks import micro_kernels

    steps, width = h.shape
    block = sums.shape[1]
    if width % block:
        raise ValueError(f"h {tuple(h.shape)} is not a multiple of {block} wide")
    micro_kernels.l2_read_kernel[(programs,)](
        h_ptr=h, sums_ptr=sums, steps=steps, width=width, reads=reads, BLOCK=block, num_warps=16, num_stages=1
    )


def chase(following: Tensor, end: Tensor, length: int) -> None:
    """Launch `chase_kernel`: `length` loads along following (any length,) int32 from element 0; end (1,) int32, out."""
    from benchmarks import micro_kernels

    micro_kernels.chase_kernel[(1,)](next_ptr=following, end_ptr=end, length=length, num_warps=1, num_stages=1)


def check_read(h: Tensor, sums: Tensor, reads: int) -> None:
    """Raise RuntimeError if a program's sums are not those of `reads` steps of h, round and round."""
    steps, block = h.shape[0], sums.shape[1]
    of_step = h.view(steps, -1, block).sum(1, dtype=torch.int64)
    times = torch.arange(steps, device=h.device) < reads % steps
    expected = ((reads // steps + times.long())[:, None] * of_step).sum(0)
    if ((sums - expected) % 2**32).any():
        raise RuntimeError(f"l2_read_kernel ({sums.shape[0]} programs, {reads} reads): wrong sums")


def check_chase(following: Tensor, end: Tensor, length: int) -> None:
    """Raise RuntimeError if end is not where `length` steps from element 0 of following lead."""
    steps, at = following.tolist(), 0
    for _ in range(length):
        at = steps[at]
    if end.item() != at:
        raise RuntimeError(f"chase_kernel ({length} loads): ended at {end.item()}, not {at}")


def launch_empty(flag: Tensor, programs: int) -> None:
    """Launch `empty_kernel` cooperatively; flag (1,) any type."""
    from benchmarks import micro_kernels

    micro_kernels.empty_kernel[(programs,)](flag_ptr=flag, num_warps=4, launch_cooperative_grid=True)


def require_resident(programs: int, multiprocessors: int | None) -> None:
    """Raise ValueError unless all programs can run at the same time, one a multiprocessor."""
    if multiprocessors is not None and programs > multiprocessors:
        raise ValueError(f"{programs} programs cannot wait for each other on {multiprocessors} multiprocessors")


def random_cycle(lines: int) -> Tensor:
    """Return where to go next, int32: a random cycle from element 0 through one element of every line."""
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(lines - 1, generator=generator)]) * LINE
    following = torch.zeros(lines * LINE, dtype=torch.int32)
    following[order] = order.roll(-1).int()
    return following


# Time


def median_seconds(
    device: torch.device, run: Callable[[], object], first: Callable[[], object] = lambda: None
) -> float:
    """Return the median time of run() after a warm-up; `first` runs before each, untimed."""
    one = timing.Timed(first, run)
    return 1e-3 * statistics.median([timing.one_round([one], device)[0] for _ in range(1 + REPEATS)][1:])


def seconds_of_one(
    device: torch.device, run: Callable[[int], object], counts: Sequence[int],
    prepare: Callable[[], object] = lambda: None, check: Callable[[int], object] = lambda count: None,
) -> float:  # fmt: skip
    """Return the time of one of what run(count) does `count` times: many against few, so that the launch cancels.

    counts: few, many. `prepare` runs before each run, untimed; `check` after the last run of each count.
    """
    seconds = []
    for count in counts:
        seconds.append(median_seconds(device, functools.partial(run, count), first=prepare))
        check(count)
    few, many = counts
    return (seconds[1] - seconds[0]) / (many - few)


@contextmanager
def float32_matmuls(precision: str) -> Iterator[None]:
    """Set PyTorch's switch for float32 products on CUDA to "ieee" or "tf32", and back."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before
