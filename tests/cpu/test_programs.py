"""Programs that leave this process: ONNX by both exporters, exported programs in files, AOTInductor."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
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
FULL = dict(peephole="full")
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
    x, lengths = torch.randn(T, B, 3), torch.randint(1, T + 1, (B,))
    return (x, lengths) if model.takes_lengths else (x,)


def shapes(model, dynamic):
    """`dynamic_shapes` of the arguments."""
    steps, rows = Dim("T", min=1), Dim("B", min=1)
    of_each = ({0: steps, 1: rows}, {0: rows}) if model.takes_lengths else ({0: steps, 1: rows},)
    return of_each if dynamic else None


def exported_to_onnx(model, by, dynamic):
    """The bytes of the ONNX model: `by` "dynamo", "dynamo from a program" or "TorchScript"."""
    file, arguments = io.BytesIO(), example(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if by == "TorchScript":
            names = ["x", "lengths"][: len(arguments)]
            axes = {"x": {0: "T", 1: "B"}, "lengths": {0: "B"}} if dynamic else None
            axes = axes and {name: axes[name] for name in names}
            torch.onnx.export(model, arguments, file, dynamo=False, input_names=names, dynamic_axes=axes)
            return file.getvalue()
        dynamic_shapes = shapes(model, dynamic)
        if by == "dynamo":
            program = torch.onnx.export(model, arguments, dynamo=True, dynamic_shapes=dynamic_shapes)
        else:
            program = torch.export.export(model, arguments, dynamic_shapes=dynamic_shapes)
            program = torch.onnx.export(program, dynamo=True)
        program.save(file)
    return file.getvalue()


ONNX = [
    (options, by, dynamic)
    for options in (STANDARD, COUPLED)
    for by in ("dynamo", "dynamo from a program", "TorchScript")
    for dynamic in (False, True)
]
ONNX += [(options, "dynamo", True) for options in (CURRENT, COUPLED_CURRENT, COUPLED_CURRENT | dict(lengths=True))]
ONNX += [(CURRENT, "dynamo from a program", True), (STANDARD | dict(lengths=True), "dynamo", False)]


@pytest.mark.parametrize("options, by, dynamic", ONNX, ids=str)
def test_an_onnx_model_computes_the_same(options, by, dynamic):
    model = Model(**options).eval()
    session = onnxruntime.InferenceSession(exported_to_onnx(model, by, dynamic))
    names = [given.name for given in session.get_inputs()]
    for n in range(len(SIZES) if dynamic else 1):
        arguments = example(model, n)
        with torch.no_grad():
            expected = model(*arguments)
        found = session.run(None, dict(zip(names, [t.numpy() for t in arguments], strict=True)))
        for actual, wanted in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual, wanted.numpy(), atol=1e-5)


REFUSED = {
    "a peephole on c_{t-1}": (DIAGONAL, "dynamo", "reads c_t: train with output_peephole='current'"),
    "a full peephole": (FULL, "dynamo", "has no full peepholes"),
    "a projection": (dict(proj_size=2), "dynamo", "has no projection"),
    "a peephole by TorchScript": (CURRENT, "TorchScript", r"use torch.onnx.export\(..., dynamo=True\)"),
    "lengths by TorchScript": (dict(lengths=True), "TorchScript", r"use torch.onnx.export\(..., dynamo=True\)"),
    "a peephole of a program": (DIAGONAL, "dynamo from a program", "reads c_t: train with output_peephole='current'"),
}


@pytest.mark.parametrize("options, by, words", REFUSED.values(), ids=REFUSED)
def test_what_onnx_does_not_have_is_refused_with_a_way_out(options, by, words):
    with pytest.raises(RuntimeError) as raised:
        exported_to_onnx(Model(**options).eval(), by, True)
    cause: BaseException = raised.value
    while cause.__cause__ is not None:  # the exporter wraps what it meets
        cause = cause.__cause__
    assert isinstance(cause, RuntimeError) and re.search(words, str(cause))


ELSEWHERE = """
import sys, torch
kind, program, calls = sys.argv[1:]
if kind.endswith("with the library"):
    import lstm_triton
if kind.startswith("exported"):
    run = torch.export.load(program).module()
else:
    run = torch._inductor.aoti_load_package(program)
with torch.no_grad():
    for arguments, expected in torch.load(calls):
        for a, b in zip(run(*arguments), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
assert ("lstm_triton" in sys.modules) == kind.endswith("with the library")
print("the same")
"""


def run_elsewhere(kind, program, model, number, folder):
    """Run a program that is in a file in a new process, on `number` calls."""
    calls = [(arguments := example(model, n), model(*arguments)) for n in range(number)]
    torch.save(calls, folder / "calls.pt")
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
    run_elsewhere(f"exported{needs}", tmp_path / "program.pt2", model, len(SIZES) if dynamic else 1, tmp_path)


@pytest.mark.parametrize(
    "options, dynamic, needs", [(COUPLED, False, ""), (DIAGONAL, True, " with the library")], ids=str
)
def test_a_program_compiled_ahead_of_time_runs_in_another_process(options, dynamic, needs, tmp_path):
    model = Model(**options).eval().requires_grad_(False)
    program = torch.export.export(model, example(model), dynamic_shapes=shapes(model, dynamic))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "compiled.pt2"))
    run_elsewhere(f"compiled{needs}", package, model, len(SIZES) if dynamic else 1, tmp_path)
