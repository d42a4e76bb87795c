"""Programs that leave this process: exported programs in files, AOTInductor. (ONNX: test_onnx.py.)"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.export import Dim

import lstm_triton
from tests.support.composes import tensors

ROOT = Path(__file__).parents[2]
STANDARD = dict()
COUPLED = dict(coupled=True, num_layers=2, bidirectional=True, bias=False)
CURRENT = dict(peephole="diagonal", output_peephole="current", bidirectional=True)
COUPLED_CURRENT = dict(CURRENT, coupled=True)
DIAGONAL = dict(peephole="diagonal", num_layers=2)
FULL = dict(peephole="full", output_peephole="current", layer_norm=True, bidirectional=True, dtype=torch.float64)
RAGGED = dict(COUPLED_CURRENT, lengths=True, num_layers=2, dtype=torch.float64)
LIMITED = dict(DIAGONAL, proj_size=2, cell_clip=0.2, proj_clip=0.1, zoneout=(0.1, 0.2), dtype=torch.float64)
SIZES = [(5, 2), (8, 4), (1, 1)]
"""T and B: of the example that is exported, and of later calls."""


class Model(torch.nn.Module):
    """An LSTM whose results are in one tuple, with or without the lengths of rows."""

    def __init__(self, lengths=False, **options):
        super().__init__()
        self.lstm, self.takes_lengths = lstm_triton.LSTM(3, 4, **options), lengths

    def forward(self, x, lengths=None):
        return tuple(tensors(self.lstm(x, lengths=lengths) if self.takes_lengths else self.lstm(x)))


def example(model, n=0):
    """The arguments of the n-th call."""
    T, B = SIZES[n]
    x, lengths = torch.randn(T, B, 3, dtype=model.lstm.weight_ih_l0.dtype), torch.randint(1, T + 1, (B,))
    return (x, lengths) if model.takes_lengths else (x,)


def calls(model, dynamic):
    """The arguments of the calls of a program."""
    return [example(model, n) for n in range(len(SIZES) if dynamic else 1)]


def shapes(model, dynamic):
    """`dynamic_shapes` of the arguments."""
    steps, rows = Dim("T", min=1), Dim("B", min=1)
    of_each = ({0: steps, 1: rows}, {0: rows}) if model.takes_lengths else ({0: steps, 1: rows},)
    return of_each if dynamic else None


ELSEWHERE = """
import sys, torch
kind, program, calls = sys.argv[1:]
if kind.endswith("with the library"):
    import lstm_triton
if kind.startswith("exported"):
    run = torch.export.load(program).module()
else:
    run = torch._inductor.aoti_load_package(program)
for arguments, expected, gradients in torch.load(calls):
    with torch.set_grad_enabled(gradients is not None):
        found = run(*arguments)
    if gradients is not None:
        of_weights = torch.autograd.grad(sum(t.square().sum() for t in found), list(run.parameters()))
        found, expected = (*found, *of_weights), (*expected, *gradients)
    tolerance = 1e-5 if found[0].dtype == torch.float32 else 1e-12
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
assert ("lstm_triton" in sys.modules) == kind.endswith("with the library")
print("the same")
"""


def expected(model, arguments):
    """The arguments, the results, and the gradients of their squares by the weights where these require gradients."""
    results, gradients = model(*arguments), None
    if any(weight.requires_grad for weight in model.parameters()):
        gradients = torch.autograd.grad(sum(t.square().sum() for t in results), list(model.parameters()))
    return arguments, tuple(t.detach() for t in results), gradients


def run_elsewhere(kind, program, model, calls, folder):
    """Run a program that is in a file in a new process, on these calls."""
    torch.save([expected(model, arguments) for arguments in calls], folder / "calls.pt")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))}
    command = [sys.executable, "-c", ELSEWHERE, kind, str(program), str(folder / "calls.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "the same\n", done.stderr[-2000:]


PROGRAMS = [
    (STANDARD, False, ""),
    (COUPLED, False, ""),
    (STANDARD, True, " with the library"),
    (DIAGONAL, True, " with the library"),
    (COUPLED_CURRENT | dict(lengths=True), True, " with the library"),
]


@pytest.mark.parametrize("options, dynamic, needs", PROGRAMS, ids=str)
def test_an_exported_program_runs_in_another_process(options, dynamic, needs, tmp_path):
    model = Model(**options).eval().requires_grad_(False)
    program = torch.export.export(model, example(model), dynamic_shapes=shapes(model, dynamic))
    torch.export.save(program, tmp_path / "program.pt2")
    run_elsewhere(f"exported{needs}", tmp_path / "program.pt2", model, calls(model, dynamic), tmp_path)


@pytest.mark.parametrize(
    "options, dynamic, needs", [(COUPLED, False, ""), (DIAGONAL, True, " with the library")], ids=str
)
def test_a_program_compiled_ahead_of_time_runs_in_another_process(options, dynamic, needs, tmp_path):
    model = Model(**options).eval().requires_grad_(False)
    program = torch.export.export(model, example(model), dynamic_shapes=shapes(model, dynamic))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    run_elsewhere(f"compiled{needs}", package, model, calls(model, dynamic), tmp_path)


OF_PYTORCH = [(FULL, True), (RAGGED, True), (LIMITED, False), (STANDARD | dict(dtype=torch.float64), True)]


@pytest.mark.parametrize("options, dynamic", OF_PYTORCH, ids=str)
def test_a_program_of_pytorchs_operators_runs_without_the_library_and_has_gradients(options, dynamic, tmp_path):
    model = Model(**options).eval()
    with lstm_triton.backend("torch"):
        program = torch.export.export(model, example(model), dynamic_shapes=shapes(model, dynamic))
    assert not [node for node in program.graph.nodes if "lstm_triton" in str(node.target)]
    torch.export.save(program, tmp_path / "program.pt2")
    run_elsewhere("exported", tmp_path / "program.pt2", model, calls(model, dynamic), tmp_path)


@pytest.mark.skipif(torch.__version__ < (2, 12), reason="Inductor of PyTorch 2.11 does not compile such a scan")
def test_a_program_of_pytorchs_operators_can_be_compiled_ahead_of_time_for_any_number_of_steps(tmp_path):
    model = Model(peephole="full").eval().requires_grad_(False)
    with lstm_triton.backend("torch"):
        program = torch.export.export(model, (torch.randn(5, 2, 3),), dynamic_shapes=({0: Dim("T", min=1)},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    run_elsewhere("compiled", package, model, [(torch.randn(T, 2, 3),) for T in (5, 1, 9)], tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_of_pytorchs_operators_counts_lengths_out_of_range_as_the_nearest(strict):
    model = Model(peephole="diagonal", lengths=True)
    with lstm_triton.backend("torch"):
        program = torch.export.export(model, example(model), dynamic_shapes=shapes(model, True), strict=strict)
    x = torch.randn(4, 3, 3)
    found, wanted = program.module()(x, torch.tensor([0, 9, 3])), model(x, torch.tensor([1, 4, 3]))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
