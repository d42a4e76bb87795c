"""The microbenchmarks' kernels through their launchers, all programs at once: right results pass, wrong ones do not."""

from types import SimpleNamespace

import pytest
import torch
from lstm_triton_kernels import sync
from lstm_triton_kernels.inline_ptx import INTERPRETED

from benchmarks import micro, micro_kernels
from tests.support.concurrent import concurrent_programs

CPU = torch.device("cpu")


def concurrently(**options):
    kernels = ["empty_kernel", "wait_kernel", "l2_read_kernel", "chase_kernel"]
    return concurrent_programs({micro_kernels: kernels}, **options)


@pytest.mark.parametrize("programs", [1, 2, 3, 8])
@pytest.mark.parametrize("method, exchange", [("counter", False), ("counter", True), ("data", True)])
def test_programs_wait_for_each_other(method, exchange, programs):
    buffers = micro.WaitBuffers(CPU, rounds=6, programs=programs)
    with concurrently(seed=programs) as grids:
        micro.wait_for_all(buffers, method, 5, None, exchange=exchange)
    assert grids == [(programs,)]


def test_bfloat16_is_exchanged():
    buffers = micro.WaitBuffers(CPU, rounds=4, programs=4, dtype=torch.bfloat16)
    with concurrently():
        micro.wait_for_all(buffers, "data", 4, None, exchange=True)


@pytest.mark.parametrize("method", sync.WAIT_METHODS)
def test_buffers_can_be_used_again(method):
    buffers = micro.WaitBuffers(CPU, rounds=6, programs=2)
    with concurrently():
        for rounds in (2, 6):
            micro.wait_for_all(buffers, method, rounds, None, exchange=True)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")  # what never came is NaN
@pytest.mark.parametrize("method", sync.WAIT_METHODS)
def test_a_wait_that_times_out_is_an_error_that_names_the_launch(method):
    """The programs run one after another here, so the first one times out."""
    buffers = micro.WaitBuffers(CPU, rounds=6, programs=2)
    with pytest.raises(RuntimeError, match=rf"wait_kernel \(method {method}, 2 programs, 4 rounds\): .*timed out"):
        micro.wait_for_all(buffers, method, 4, None, exchange=True, limit=3)


def test_a_wait_that_does_not_wait_is_an_error():
    buffers = micro.WaitBuffers(CPU, rounds=6, programs=2)
    buffers.counter.fill_(8)
    with pytest.raises(RuntimeError, match="counted 8 arrivals, not 10"):
        buffers.check("counter", 5, exchange=False)
    buffers.counter.fill_(10)
    buffers.check("counter", 5, exchange=False)
    with pytest.raises(RuntimeError, match="the wait does not wait"):
        buffers.check("counter", 5, exchange=True)


@pytest.mark.parametrize("reads", [1, 3, 8])
def test_every_read_counts(reads):
    h = torch.randint(-(2**31), 2**31, (3, 64), dtype=torch.int32)
    sums = torch.zeros(2, 32, dtype=torch.int32)
    with concurrently():
        micro.read_through_l2(h, sums, reads, 2)
    micro.check_read(h, sums, reads)
    sums[1, 5] += 1
    with pytest.raises(RuntimeError, match=rf"2 programs, {reads} reads"):
        micro.check_read(h, sums, reads)


def test_reads_of_an_odd_width_are_refused():
    with pytest.raises(ValueError, match=r"h \(3, 63\)"):
        micro.read_through_l2(torch.zeros(3, 63, dtype=torch.int32), torch.zeros(2, 32, dtype=torch.int32), 1, 2)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 40])
def test_a_chain_ends_where_it_leads(length):
    following, end = micro.random_cycle(16), torch.zeros(1, dtype=torch.int32)
    micro.chase(following, end, length)
    micro.check_chase(following, end, length)
    end += 1
    with pytest.raises(RuntimeError, match=rf"{length} loads"):
        micro.check_chase(following, end, length)


def test_the_chain_visits_every_line_once():
    following, at, visited = micro.random_cycle(50), 0, []
    for _ in range(50):
        visited.append(at)
        at = int(following[at])
    assert at == 0
    assert sorted(visited) == list(range(0, 50 * micro.LINE, micro.LINE))


def test_an_empty_launch():
    assert INTERPRETED
    with concurrently() as grids:
        micro.launch_empty(torch.zeros(1, dtype=torch.int32), 4)
    assert grids == [(4,)]


@pytest.fixture
def gpu_of_three(monkeypatch):
    """The CPU in the place of a GPU with three multiprocessors, and measurements as small as can be."""
    properties = SimpleNamespace(
        multi_processor_count=3,
        L2_cache_size=1 << 16,
        shared_memory_per_multiprocessor=1000,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    small = dict(
        WAIT_ROUNDS=(1, 3), CHASE_LOADS=(2, 5), READS_OF_ALL_STEPS=(1, 2), READ_BLOCK=32, LAUNCHES=2, REPEATS=1
    )
    for name, value in small.items():
        monkeypatch.setattr(micro, name, value)
    monkeypatch.setattr(micro, "copy_gb_per_s", lambda device, megabytes: 1.0)
    monkeypatch.setattr(micro, "matmul_tflop_per_s", lambda device, kind, size: 1.0)


def test_everything_is_measured(gpu_of_three):
    with concurrently(delay=0.0) as grids:
        constants = micro.measure_gpu(CPU, quick=False)
    assert set(constants.matmul_tflop_per_s) == {"float16", "bfloat16", "float32", "tf32", "float64"}
    assert {method: list(by_count) for method, by_count in constants.wait_us.items()} == {
        "counter": [1, 2, 3], "data": [1, 2, 3],
    }  # fmt: skip
    assert (constants.multiprocessors, constants.on_chip_bytes) == (3, 1000 + 256 * 1024)
    values = (constants.l2_read_gb_per_s, constants.l2_round_trip_us, constants.launch_us)
    assert all(isinstance(value, float) for value in values)
    assert set(grids) == {(1,), (2,), (3,)}


class DoesNothing:
    def __getitem__(self, grid):
        return lambda **arguments: None


@pytest.mark.parametrize(
    "measurement",
    [
        lambda: micro.wait_us(CPU, "counter", 3, 3),
        lambda: micro.wait_us(CPU, "data", 3, 3),
        lambda: micro.l2_read_gb_per_s(CPU, 3),
        lambda: micro.l2_round_trip_us(CPU),
    ],
)
def test_a_kernel_that_does_nothing_is_not_fast_but_wrong(measurement, gpu_of_three, monkeypatch):
    for name in ("wait_kernel", "l2_read_kernel", "chase_kernel"):
        monkeypatch.setattr(micro_kernels, name, DoesNothing())
    with pytest.raises(RuntimeError, match="_kernel"):
        measurement()
