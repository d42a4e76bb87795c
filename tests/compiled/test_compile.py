"""The launches of the launchers, compiled for GPUs that are not there: fits, does not spill, uses the tensor cores.

Disassembling costs more than compiling, so local memory is read from the assembler's own account, in which a spill is
stack (`test_a_spill_is_seen`), and tensor cores from the PTX; for each target, one launch of each set of tensor-core
instructions is disassembled, for the assembler translates the instruction and knows nothing of flags.
"""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from tests.support.compiling import SHARED_MEMORY_LIMIT, compile_launch
from tests.support.launches import KERNELS, TYPES, blocks, covering, launches_of

CAPABILITIES = (80, 90, 100)
IN_SASS = {"mma.sync": {"HMMA", "DMMA"}, "wgmma.mma_async": {"HGMMA"}, "tcgen05.mma": {"UTCHMMA"}}
"""What the assembler makes of a tensor-core instruction of the PTX."""
disassembled: set[tuple[int, frozenset[str]]] = set()
"""The targets and sets of tensor-core instructions that this process has seen translated."""


@functools.cache
def chosen_launches(dtype, precision, kernel, capability):
    """What is compiled for a target: every launch for sm_90; for sm_80 and sm_100 every block size, every two flags.

    Targets differ in how they load and multiply a block, which its size, type and alignment decide; what three flags
    together add is the same lines everywhere.
    """
    launches = sorted((launch for launch in launches_of(dtype, precision) if launch.kernel == kernel), key=repr)
    return launches if capability == 90 else covering(launches)


def parts():
    """(type, precision, kernel, capability), the cheap among the dear: workers are handed neighbours."""
    for capability in CAPABILITIES:
        for dtype, precision in TYPES:
            if dtype == torch.float64 and capability != 90:
                continue
            for kernel in KERNELS:
                if "cell" in kernel and precision == "tf32":
                    continue  # no matmul: the same launches as under ieee
                name = f"sm{capability}-{str(dtype).removeprefix('torch.')}-{precision}-{kernel}"
                yield pytest.param(dtype, precision, kernel, capability, id=name)


@pytest.mark.parametrize("dtype, precision, kernel, capability", list(parts()))
def test_every_launch_compiles(dtype, precision, kernel, capability):
    launches = chosen_launches(dtype, precision, kernel, capability)
    assert launches
    for launch in launches:
        compiled = compile_launch(KERNELS[kernel], launch, capability)
        assert compiled.shared <= SHARED_MEMORY_LIMIT[capability], f"{launch}: {compiled.shared} bytes"
        assert compiled.stack == 0, f"{launch}: {compiled.stack} bytes of stack, {compiled.registers} registers"
        multiplies = "PRECISION" in dict(launch.constants)
        exact_float32 = dtype == torch.float32 and precision == "ieee"
        if multiplies and not exact_float32:
            assert compiled.tensor_core, f"{launch}: no tensor core"
            if (capability, compiled.tensor_core) not in disassembled:
                for instruction in compiled.tensor_core:
                    (translations,) = (sass for ptx, sass in IN_SASS.items() if instruction.startswith(f"{ptx}."))
                    used = translations & set(compiled.instructions)
                    assert used, f"{launch}: {instruction} is not in {compiled.instructions}"
                assert not {"LDL", "STL"} & set(compiled.instructions), f"{launch}: {compiled.instructions}"
                disassembled.add((capability, compiled.tensor_core))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype, precision", TYPES)
def test_every_target_has_every_block_size_and_every_two_flags(dtype, precision, capability):
    for kernel in KERNELS:
        launches = [launch for launch in launches_of(dtype, precision) if launch.kernel == kernel]
        chosen = chosen_launches(dtype, precision, kernel, capability)
        assert set(map(blocks, chosen)) == set(map(blocks, launches))
        for one, other in itertools.combinations(KERNELS[kernel].arg_names, 2):
            meet, needed = (
                {(dict(launch.constants).get(one), dict(launch.constants).get(other)) for launch in some}
                for some in (chosen, launches)
            )
            assert meet == needed, f"{kernel}, sm_{capability}: {one} with {other}"


def test_every_kernel_is_compiled():
    for dtype, precision in TYPES:
        assert {launch.kernel for launch in launches_of(dtype, precision)} == set(KERNELS)


def test_a_spill_is_seen():
    """A test of the test: a thread that may use few registers spills, and what it spills is stack."""
    launches = chosen_launches(torch.float32, "ieee", "gate_preactivations_kernel", 90)
    launch = next(launch for launch in launches if dict(launch.constants)["BLOCK_B"] == 64)
    squeezed = replace(launch, options=(*launch.options, ("maxnreg", 32)))
    compiled = compile_launch(KERNELS[launch.kernel], squeezed, 90)
    assert compiled.registers == 32
    assert compiled.stack > 0
    assert {"LDL", "STL"} <= set(compiled.instructions)
