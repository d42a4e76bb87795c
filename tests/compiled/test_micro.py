"""The kernels of the microbenchmarks, compiled for GPUs that are not there: what is timed is really in the loop."""

import functools
import re
from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from benchmarks import micro, micro_kernels
from tests.emulator.machine import Machine
from tests.support.compiling import SHARED_MEMORY_LIMIT, compile_launch, record_launches

CPU = torch.device("cpu")
CAPABILITIES = (80, 90, 100)
KERNELS = ["empty_kernel", "wait_kernel", "l2_read_kernel", "chase_kernel"]

RELEASE_ADD = r"(atom|red)\.global\.gpu\.release\.add\.u32|(atom|red)\.release\.gpu\.global\.add\.u32"
ACQUIRE = r"ld\.global\.gpu\.acquire\.b32|ld\.acquire\.gpu\.global|atom\.global\.gpu\.acquire\.add\.u32"


def wait(method, programs, exchange, dtype=torch.float16):
    buffers = micro.WaitBuffers(CPU, rounds=100, programs=programs, dtype=dtype)
    micro.wait_for_all(buffers, method, 100, 132, exchange=exchange, check=False)


def read():
    h = torch.zeros(8, 2 * micro.READ_BLOCK, dtype=torch.int32)
    micro.read_through_l2(h, torch.zeros(132, micro.READ_BLOCK, dtype=torch.int32), 100, 132)


def chase():
    micro.chase(micro.random_cycle(16), torch.zeros(1, dtype=torch.int32), 100)


def empty():
    micro.launch_empty(torch.zeros(1, dtype=torch.int32), 132)


LAUNCHERS = {
    "an empty launch": empty,
    "reads through L2": read,
    "a chain of loads": chase,
    "counter": lambda: wait("counter", 132, False),
    "counter, exchange": lambda: wait("counter", 132, True),
    "data": lambda: wait("data", 132, True),
    "data, one program": lambda: wait("data", 1, True),
    "data, bfloat16": lambda: wait("data", 8, True, torch.bfloat16),
}


@functools.cache
def compiled(name, capability):
    """What the compiler makes of the one launch of a launcher."""
    with record_launches({micro_kernels: KERNELS}) as launches:
        LAUNCHERS[name]()
    (launch,) = launches
    return compile_launch(getattr(micro_kernels, launch.kernel), launch, capability)


def loops(ptx):
    """The text of every loop: from a label to the last branch back to it."""
    lines = re.sub(r"//.*", "", ptx).splitlines()
    labels = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"(\$L\w+):", line))}
    found = {}
    for n, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+);", line)
        if branch and labels[branch[1]] <= n:
            found[branch[1]] = "\n".join(lines[labels[branch[1]] : n + 1])
    return list(found.values())


def in_a_loop(pattern, ptx):
    return any(re.search(pattern, loop) for loop in loops(ptx))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_launch_fits(name, capability):
    kernel = compiled(name, capability)
    assert kernel.stack == 0
    assert kernel.shared <= SHARED_MEMORY_LIMIT[capability]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_programs_that_wait_are_launched_together(name, capability):
    assert compiled(name, capability).cooperative == (name not in ("reads through L2", "a chain of loads"))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("exchange", [False, True])
def test_a_counted_round_releases_and_acquires(exchange, capability):
    """In every round: barrier, release-add; then a loop of its own that acquires."""
    kernel = compiled("counter, exchange" if exchange else "counter", capability)
    assert {"MEMBAR", "CCTL"} <= set(kernel.instructions), "the release fences, the acquire empties the first cache"
    ptx = kernel.ptx
    round_ = max(loops(ptx), key=len)
    inner = [loop for loop in loops(ptx) if loop != round_ and loop in round_]
    assert re.search(rf"bar\.sync[^@]*?@[^@]*?({RELEASE_ADD})", round_)
    assert any(re.search(ACQUIRE, loop) for loop in inner)
    assert not any(re.search(RELEASE_ADD, loop) for loop in inner)
    assert "ld.volatile" not in ptx
    assert exchange == bool(re.search(r"ld\.global\.cg\.v4", round_))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["data", "data, one program", "data, bfloat16"])
def test_a_round_of_data_loads_until_it_is_there(name, capability):
    """Volatile loads, 16 bytes wide, before the loop that repeats them and in it; no fence, no atomic add."""
    kernel = compiled(name, capability)
    assert not {"MEMBAR", "CCTL"} & set(kernel.instructions)
    ptx = kernel.ptx
    round_ = max(loops(ptx), key=len)
    inner = [loop for loop in loops(ptx) if loop != round_ and loop in round_]
    volatile = r"ld\.volatile\.global\.v4" if name == "data" else r"ld\.volatile\.global"  # few: an element a thread
    threads = int(re.search(r"\.reqntid (\d+)", ptx)[1])
    barrier = "bar.sync" if threads > 32 else "redux|shfl"
    assert any(re.search(volatile, loop) and re.search(barrier, loop) for loop in inner), "all threads decide alike"
    assert len(re.findall(volatile, round_)) > len(re.findall(volatile, inner[0]))
    assert not re.search(rf"fence|membar|acquire|{RELEASE_ADD}", ptx)


def sums_of(programs, seed, rounds=8, **launch):
    """What the programs have added up when they were executed, each warp by itself, and what they should have."""
    buffers = micro.WaitBuffers(CPU, rounds=rounds, programs=programs)
    with record_launches({micro_kernels: KERNELS}) as launches:
        micro.wait_for_all(buffers, "data", rounds, 132, exchange=True, check=False)
    (recorded,) = launches
    recorded = replace(recorded, options=tuple((dict(recorded.options) | launch).items()))
    kernel = compile_launch(micro_kernels.wait_kernel, recorded, 90)
    arguments = [buffers.chunks, buffers.sums, buffers.counter, buffers.error, rounds, 1000]
    machine = Machine(kernel.ptx, (programs,), arguments, kernel.shared, gang="warp", weak=seed % 2 == 1, seed=seed)
    machine.run()
    values = (torch.arange(rounds)[:, None] + torch.arange(programs)) % 256
    return buffers.sums.tolist(), [micro.WAIT_BLOCK * int(values.sum())] * programs, machine.findings


@pytest.mark.parametrize("programs", [1, 2, 8, 16, 33])
def test_executed_programs_read_what_was_sent(programs):
    for seed in range(4):
        found, wanted, findings = sums_of(programs, seed)
        assert found == wanted and not list(findings)


def test_fewer_elements_than_threads_would_be_seen():
    """A test of the test: where two warps load the same elements, one may see what the other does not."""
    assert any(found != wanted for found, wanted, _ in (sums_of(8, seed, num_warps=4) for seed in range(6)))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_reads_are_wide_past_the_first_cache_and_in_the_loop(capability):
    kernel = compiled("reads through L2", capability)
    assert in_a_loop(r"(?s)(ld\.global\.cg\.v4.*){2}", kernel.ptx)
    assert len(re.findall(r"ld\.global", kernel.ptx)) == len(re.findall(r"ld\.global\.cg\.v4", kernel.ptx))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_chain_depends_on_the_load_before(capability):
    ptx = compiled("a chain of loads", capability).ptx
    assert in_a_loop(r"ld\.global\.cg\.b32", ptx)
    (loop,) = (loop for loop in loops(ptx) if "ld.global.cg.b32" in loop)
    loaded = re.search(r"ld\.global\.cg\.b32 \{ (%r\d+) \}", loop)[1]
    assert re.search(rf"(mad|mul|cvt|shl)\S+ [^;]*{loaded}\b", loop), "the next address comes from the load"


def test_every_kernel_is_compiled():
    with record_launches({micro_kernels: KERNELS}) as launches:
        for launch in LAUNCHERS.values():
            launch()
    jitted = {name for name in vars(micro_kernels) if name.endswith("_kernel")}
    assert {launch.kernel for launch in launches} == jitted == set(KERNELS)


@pytest.mark.parametrize("programs, rounds", [(133, 10), (132, 0), (132, 101)])
def test_launches_that_cannot_end_well_are_refused(programs, rounds):
    buffers = micro.WaitBuffers(CPU, rounds=100, programs=programs)
    with pytest.raises(ValueError, match=f"{programs} programs|{rounds} rounds"):
        micro.wait_for_all(buffers, "counter", rounds, 132, exchange=False)
    with pytest.raises(ValueError, match="exchange nothing" if programs <= 132 else f"{programs} programs"):
        micro.wait_for_all(buffers, "data", 1, 132, exchange=False)
