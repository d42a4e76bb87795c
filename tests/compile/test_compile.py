"""The launches of the launchers, compiled for GPUs that are not there: fits, does not spill, uses the tensor cores."""

import functools

import pytest
import torch
from lstm_triton_kernels.gates import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from tests.support.compiling import SHARED_MEMORY_LIMIT, compile_launch
from tests.support.launches import KERNELS, TYPES, launches_of

TENSOR_CORE = {80: {"HMMA", "DMMA"}, 90: {"HMMA", "HGMMA", "DMMA"}, 100: {"HMMA", "UTCHMMA", "DMMA"}}


@functools.cache
def sorted_launches(dtype, precision, kernel):
    return sorted((launch for launch in launches_of(dtype, precision) if launch.kernel == kernel), key=repr)


def parts():
    """(type, precision, kernel, capability, part, of): pieces small enough to share between two workers."""
    for dtype, precision in TYPES:
        for kernel in KERNELS:
            if "cell" in kernel and precision == "tf32":
                continue  # no matmul: the same launches as under ieee
            pieces = 4 if kernel == "gate_preactivations_kernel" else 1
            for capability in (90,) if dtype == torch.float64 else (80, 90, 100):
                for part in range(pieces):
                    name = (
                        f"{kernel}-{str(dtype).removeprefix('torch.')}-{precision}-sm{capability}-{part + 1}of{pieces}"
                    )
                    yield pytest.param(dtype, precision, kernel, capability, part, pieces, id=name)


@pytest.mark.parametrize("dtype, precision, kernel, capability, part, pieces", list(parts()))
def test_every_launch_compiles(dtype, precision, kernel, capability, part, pieces):
    launches = sorted_launches(dtype, precision, kernel)[part::pieces]
    assert launches
    for launch in launches:
        compiled = compile_launch(KERNELS[kernel], launch, capability)
        assert compiled.shared <= SHARED_MEMORY_LIMIT[capability], f"{launch}: {compiled.shared} bytes"
        assert compiled.stack == 0, f"{launch}: {compiled.stack} bytes of stack, {compiled.registers} registers"
        spilled = {"LDL", "STL"} & set(compiled.instructions)
        assert not spilled, f"{launch}: {spilled}"
        multiplies = "PRECISION" in dict(launch.constants)
        exact_float32 = dtype == torch.float32 and precision == "ieee"
        if multiplies and not exact_float32:
            used = TENSOR_CORE[capability] & set(compiled.instructions)
            assert used, f"{launch}: {compiled.instructions}"


def test_every_kernel_is_compiled():
    for dtype, precision in TYPES:
        assert {launch.kernel for launch in launches_of(dtype, precision)} == set(KERNELS)


def test_a_spill_is_seen():
    """A test of the test: 64 x 64 blocks of exact float32 in one warp do not fit the registers."""
    launch = next(
        launch for launch in sorted_launches(torch.float32, "ieee", "gate_preactivations_kernel")
        if dict(launch.constants)["BLOCK_B"] == 64
    )  # fmt: skip
    from dataclasses import replace

    constants = tuple((name, 64 if name == "BLOCK_U" else value) for name, value in launch.constants)
    squeezed = replace(launch, constants=constants, options=(("num_warps", 1), ("num_stages", 1)))
    assert compile_launch(KERNELS[launch.kernel], squeezed, 90).stack > 0
