"""The kernels of examples/own_cell, compiled for GPUs that are not there, and executed in the emulator."""

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from lstm_triton_kernels.inline_ptx import INTERPRETED

if INTERPRETED:
    pytest.skip("compiles kernels: needs a process without TRITON_INTERPRET", allow_module_level=True)

from lstm_triton_kernels import gates

from tests.emulator.launches import Emulation, StandIn, emulated
from tests.support.compiling import SHARED_MEMORY_LIMIT, compile_launch, record_launches
from tests.support.own_cell import CELLS, errors_of_kernels, gru, random_inputs, results, rounded, slstm

KERNELS = {
    gru: ["gru_forward_kernel", "gru_backward_kernel"],
    slstm: ["slstm_forward_kernel", "slstm_backward_kernel"],
}
MODULE_OF = {
    name: module for module, names in (*KERNELS.items(), (gates, ["gate_preactivations_kernel"])) for name in names
}
TYPES = [(torch.bfloat16, 80), (torch.bfloat16, 90), (torch.float32, 90), (torch.float64, 90)]


@pytest.mark.parametrize("dtype, capability", TYPES, ids=lambda value: str(value).removeprefix("torch."))
@pytest.mark.parametrize("name", CELLS)
def test_every_kernel_compiles_without_spilling(name, dtype, capability):
    inputs = rounded(random_inputs(name, 2, 5, 16, 144), dtype)
    with record_launches(KERNELS | {gates: ["gate_preactivations_kernel"]}) as launches:
        results(name, CELLS[name].kernels, inputs)
    kinds = {launch.kernel for launch in launches}
    assert {kind.split("_")[-2] for kind in kinds} == {"forward", "backward", "preactivations"}
    for launch in launches:
        compiled = compile_launch(getattr(MODULE_OF[launch.kernel], launch.kernel), launch, capability)
        assert compiled.shared <= SHARED_MEMORY_LIMIT[capability] and compiled.stack == 0, launch
        assert compiled.tensor_core or "gate" not in launch.kernel or dtype == torch.float32


@pytest.mark.parametrize("dtype, capability, bound", [(torch.bfloat16, 90, 2.4e-2), (torch.float32, 80, 1e-5)], ids=str)
@pytest.mark.parametrize("name", CELLS)
def test_compiled_kernels_compute_outputs_and_gradients(name, dtype, capability, bound):
    T = 2
    emulation = Emulation(capability=capability)
    with emulated(emulation), ExitStack() as stack:
        for module, kernels in KERNELS.items():
            for kernel in kernels:
                stack.enter_context(mock.patch.object(module, kernel, StandIn(getattr(module, kernel), emulation)))
        found = errors_of_kernels(name, T, 5, 3, 11, dtype)
    assert not emulation.findings
    assert sorted(emulation.launches.values()) == [T, T, T]
    assert max(found.values()) <= bound, found
