"""On a GPU: every variant and type against the float64 reference, as near as cuDNN's own LSTM comes, times 1.5."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, dispatch
from tests.support.parity import Case, call, errors, expected_results, random_inputs, results


def why_no_gpu() -> str | None:
    """Why these tests cannot run here; None where they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return dispatch.why_not_triton(torch.device("cuda"), torch.float32)


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_no_gpu() is not None, reason=f"needs a GPU: {why_no_gpu()}")]

SHAPES = {
    "small": dict(T=8, B=3, I=5, H=7),
    "odd": dict(T=33, B=12, I=300, H=500),
    "anchor": dict(T=64, B=16, I=768, H=768),
    "many rows": dict(T=9, B=200, I=64, H=130),
    "two layers, both directions": dict(T=17, B=5, I=33, H=64, L=2, bidirectional=True),
    "projection": dict(T=17, B=5, I=33, H=64, proj_size=20),
    "no bias": dict(T=17, B=17, I=31, H=63, bias=False),
    "cell": dict(B=17, I=63, H=65, cell=True),
    "one step": dict(T=1, B=17, I=63, H=65),
    "transposed": dict(T=5, B=6, I=40, H=48, layout="transposed"),
    "expanded": dict(T=5, B=6, I=40, H=48, layout="expanded"),
}
TYPES = {"float32 tf32": torch.float32, "float32 ieee": torch.float32, "float16": torch.float16,
         "bfloat16": torch.bfloat16, "float64": torch.float64}  # fmt: skip
FLOOR = {torch.float32: 1e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3, torch.float64: 1e-12}
"""No bound is below this: where cuDNN happens to be exact (a single step, say), one rounding of ours is allowed."""


@pytest.fixture
def precision(request):
    """PyTorch's switches for float32: both the matmuls' and cuDNN's, so that both sides compute alike."""
    mode = "tf32" if request.param.endswith("tf32") else "ieee"
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = mode
    yield request.param
    for switch, value in zip(switches, before, strict=True):
        switch.fp32_precision = value


def cudnn(case: Case, x, h_0, c_0, *weights):
    """`torch.nn.LSTM` (for a cell: one step of it) on the case's tensors."""
    from tests.support.parity import laid_out

    x = laid_out(case, x)
    if case.cell:
        x, h_0, c_0 = x[None], h_0[None], c_0[None]
    output, h_n, c_n = torch._VF.lstm(
        x, (h_0, c_0), list(weights), case.bias, case.L, 0.0, True, case.bidirectional, False
    )
    return (h_n[0], c_n[0]) if case.cell else (output, h_n, c_n)


def bounds(case: Case) -> dict[str, float]:
    """1.5 times cuDNN's own error for each output and gradient of the standard variant at this type and shape."""
    case = replace(case, spec=LSTMSpec())
    inputs = random_inputs(case)
    found = errors(results(case, inputs, cudnn), expected_results(case, inputs))
    return {name: max(1.5 * error, FLOOR[case.dtype]) for name, error in found.items()}


@pytest.mark.parametrize("precision", TYPES, indirect=True)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_as_near_to_the_reference_as_cudnn(spec, shape, precision):
    case = Case(spec, dtype=TYPES[precision], device="cuda", **SHAPES[shape])
    allowed = bounds(case)
    largest = max(allowed.values())
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        found = errors(results(case, inputs, call), expected_results(case, inputs))
    wrong = {name: (error, allowed.get(name, largest)) for name, error in found.items()
             if not error <= allowed.get(name, largest)}  # fmt: skip
    assert not wrong, f"{case}: (error, allowed) {wrong}"


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_the_same_bits_from_run_to_run(spec):
    case = Case(spec, T=20, B=12, I=64, H=130, dtype=torch.bfloat16, device="cuda")
    inputs = random_inputs(case)
    first, second = (results(case, inputs, call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_compiled_and_on_another_stream(spec):
    case = Case(spec, T=6, B=3, I=10, H=20, dtype=torch.float32, device="cuda")
    inputs = random_inputs(case)
    plain = results(case, inputs, call)
    compiled = torch.compile(lambda *tensors: call(case, *tensors), fullgraph=True, backend="aot_eager")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    torch.cuda.current_stream().wait_stream(stream)
    assert max(errors(actual, plain).values()) < 1e-6


def test_auto_chooses_the_kernels():
    assert dispatch.choose(torch.device("cuda", 0), torch.bfloat16).name == "triton"
