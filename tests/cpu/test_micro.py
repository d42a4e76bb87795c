import os
import subprocess
import sys

import pytest
import torch

from benchmarks import micro

CPU = torch.device("cpu")


def test_a_cpu_has_a_copy_bandwidth_and_two_matmul_rates():
    constants = micro.measure(CPU, quick=True)
    assert constants.copy_gb_per_s > 0
    assert set(constants.matmul_tflop_per_s) == {"float32", "float64"}
    assert all(rate > 0 for rate in constants.matmul_tflop_per_s.values())
    rest = ("l2_read_gb_per_s", "l2_round_trip_us", "launch_us", "wait_us", "multiprocessors", "on_chip_bytes")
    assert all(getattr(constants, name) is None for name in rest)


def test_a_cpu_is_measured_without_triton():
    program = (
        "import sys, torch; sys.modules['triton'] = None; from benchmarks import micro;"
        "micro.measure(torch.device('cpu'), quick=True)"
    )
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def test_the_switch_for_float32_matmuls_is_put_back():
    before = torch.backends.cuda.matmul.fp32_precision
    with pytest.raises(KeyError), micro.float32_matmuls("tf32"):
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise KeyError
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_counts_of_programs_end_with_all_multiprocessors():
    assert micro.program_counts(132) == [1, 2, 4, 8, 16, 32, 64, 128, 132]
    assert micro.program_counts(128) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert micro.program_counts(1) == [1]
    assert micro.program_counts(132, quick=True) == [1, 2, 8, 32, 128, 132]


def test_more_programs_than_multiprocessors_are_refused():
    micro.require_resident(132, 132)
    with pytest.raises(ValueError, match="133 programs cannot wait for each other on 132 multiprocessors"):
        micro.require_resident(133, 132)


def test_one_of_many_is_the_difference(monkeypatch):
    """A launch that takes 20 s whatever it does, 1 s more for each of what it does, and longer the first time."""
    clock, runs, checked = [0.0], [], []
    monkeypatch.setattr(micro.time, "perf_counter", lambda: clock[0])

    def run(count):
        runs.append(count)
        clock[0] += 20 + count + (1000 if runs.count(count) == 1 else 0)

    def prepare():
        clock[0] += 5

    assert micro.seconds_of_one(CPU, run, (1, 21), prepare, checked.append) == 1.0
    assert checked == [1, 21]
