"""On a GPU: every variant and type against the float64 reference, within 1.5 times what others err by."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels.sizes import matmul_precision

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, routing
from tests.support.gpu import NEEDS_GPU, TYPES, assert_as_near_as_cudnn, strategies
from tests.support.parity import Case, call, errors, expected_results, random_inputs, results
from tests.support.rounding import rounded_results

pytestmark = NEEDS_GPU

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
    "lengths": dict(T=41, B=12, I=33, H=130, bidirectional=True, lengths=True),
    "resets, cell states": dict(T=41, B=12, I=33, H=130, resets=True, states=True),
    "lengths, resets, cell states, projection": dict(
        T=9, B=5, I=33, H=64, L=2, bidirectional=True, proj_size=20, lengths=True, resets=True, states=True
    ),
}
STRATEGIES = ("stepwise", "auto")


def cases():
    """(precision, case): every variant, shape and type, each strategy that is another one there."""
    for spec in VARIANTS:
        for shape, sizes in SHAPES.items():
            for precision, dtype in TYPES.items():
                case = Case(spec, dtype=dtype, device="cuda", **sizes)
                for strategy in strategies(case, precision):
                    asked = Case(spec, dtype=dtype, device="cuda", strategy=strategy, **sizes)
                    yield pytest.param(precision, asked, id=f"{spec.name}-{shape}-{precision}-{strategy}")


@pytest.mark.parametrize("precision, case", list(cases()), indirect=["precision"])
def test_as_near_to_the_reference_as_cudnn(precision, case):
    with lstm_triton.backend("triton"):
        assert_as_near_as_cudnn(case, call)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_the_same_bits_from_run_to_run(spec, strategy):
    case = Case(spec, T=20, B=12, I=64, H=130, dtype=torch.bfloat16, device="cuda", strategy=strategy)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        first, second = (results(case, inputs, call) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_compiled_and_on_another_stream(spec, strategy):
    torch._dynamo.reset()  # it compiles a function, which all cases share, a few times only
    case = Case(spec, T=6, B=3, I=10, H=20, dtype=torch.float32, device="cuda", strategy=strategy)
    inputs = random_inputs(case)
    with lstm_triton.backend("triton"):
        plain = results(case, inputs, call)
        compiled = torch.compile(lambda *tensors: call(case, *tensors), fullgraph=True, backend="aot_eager")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
        torch.cuda.current_stream().wait_stream(stream)
    assert max(errors(actual, plain).values()) < 1e-6


@pytest.mark.parametrize("precision", ["float32 tf32", "bfloat16"], indirect=True)
def test_rounding_alone_errs_on_the_gpu_as_on_the_cpu(precision):
    """In both passes: autograd computes the backward pass of a GPU's tensors in a thread of its own."""
    case = Case(LSTMSpec(peephole="full"), T=6, B=12, I=33, H=40, dtype=TYPES[precision], device="cuda")
    inputs = random_inputs(case)
    on_cpu = {name: tensor.detach().cpu().requires_grad_() for name, tensor in inputs.items()}
    found = errors(rounded_results(case, inputs, matmul_precision()), expected_results(case, inputs))
    case = replace(case, device="cpu")
    wanted = errors(rounded_results(case, on_cpu, matmul_precision()), expected_results(case, on_cpu))
    assert found == pytest.approx(wanted, rel=1e-2)


def test_auto_chooses_the_kernels():
    assert routing.choose_backend(torch.device("cuda", 0), torch.bfloat16).name == "triton"
