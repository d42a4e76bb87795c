"""On a GPU: layers at the same time are, bit for bit, one after another, and right; in CUDA graphs and without."""

from __future__ import annotations

import copy

import pytest
import torch

import lstm_triton
from lstm_triton import LSTMSpec, routing

if not routing.TRITON_INSTALLED:
    pytest.skip("needs triton", allow_module_level=True)

from lstm_triton import overlap, stack
from tests.support.gpu import NEEDS_GPU, TYPES, assert_same, finish
from tests.support.overlap import StackCase, by_layer, inputs_of, one_layer_after_another, overlapped
from tests.support.parity import errors

pytestmark = NEEDS_GPU

TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 2.5e-2, torch.float32: 4e-3}
"""Between two ways to compute a stack of layers: relative Frobenius errors, of five layers more than of one."""

SIZES = {
    "odd": StackCase(2, 16, L=3, T=50, B=5, H=130, I=33),
    "peepholes, resets, dropout": StackCase(
        3, 16, LSTMSpec(True, "diagonal", "current"), L=4, T=70, B=12, H=256, I=40, resets=True, dropout=0.3
    ),
    "few units": StackCase(4, 32, L=5, T=129, B=16, H=64, I=64, bias=False, dropout=0.5),
    "in halves": StackCase(2, 48, L=5, T=200, B=64, H=512, I=512),
    "one gradient": StackCase(2, 16, L=2, T=20, B=9, H=100, I=30, gradients=(False, True, False)),
    "inference": StackCase(3, 16, L=3, T=50, B=33, H=200, I=30, gradients=None),
}


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32 tf32", "float32 ieee"], indirect=True)
@pytest.mark.parametrize("case", SIZES.values(), ids=SIZES)
def test_bit_for_bit_as_one_layer_after_another_and_near_one_launch_a_layer(case, precision):
    """Several times: a wait that is missing would not show every time."""
    case = StackCase(**{**vars(case), "dtype": TYPES[precision], "device": "cuda"})
    inputs = inputs_of(case)
    with one_layer_after_another():
        wanted = overlapped(case, inputs)
    for _ in range(5):
        assert_same(overlapped(case, inputs), wanted)
    finish()
    apart = by_layer(case, inputs, strategy="persistent")
    assert max(errors(wanted, {name: t.double() for name, t in apart.items()}).values()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dropout_drawn_ahead_and_applied_in_parts_is_that_of_pytorch(dtype, p):
    """Bit for bit, the gradient too; two layers, one after the other from the same generator."""
    sequences = [torch.randn(37, 3, 130, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2)]
    gradient = torch.randn(37, 3, 130, device="cuda", dtype=dtype)
    torch.manual_seed(3)
    wanted = [torch.nn.functional.dropout(x, p) for x in sequences]
    left = torch.rand(3, device="cuda")
    torch.manual_seed(3)
    masks = [stack.dropout_mask(torch.ones_like(gradient), p) for _ in range(2)]
    assert torch.equal(torch.rand(3, device="cuda"), left)
    for x, mask, result in zip(sequences, masks, wanted, strict=True):
        found, grads = torch.empty_like(result), []
        for part in (slice(0, 16), slice(16, 37)):
            stack.drop(x.detach()[part], mask[part], p, found[part])
            grads.append(stack.drop_backward(gradient[part], mask[part], p))
        assert torch.equal(found, result)
        assert torch.equal(torch.cat(grads), *torch.autograd.grad(result, x, gradient))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_captured_and_overlapped_training_is_as_by_the_module(dtype, dropout, monkeypatch):
    """Whatever the estimate says; with dropout against the same call without graphs, from the same seed twice."""
    forced = overlap.Overlap(3, 16)
    monkeypatch.setattr(stack, "overlap_of", lambda *_: forced)
    module = lstm_triton.LSTM(40, 130, num_layers=4, dropout=dropout, strategy="persistent", device="cuda", dtype=dtype)
    plain, fast = copy.deepcopy(module), module.captured(overlap=True)
    launches = []
    follow = stack.follow
    monkeypatch.setattr(stack, "follow", lambda *given: launches.append(given[0].lanes) or follow(*given))
    for _ in range(3):
        x, found = torch.randn(70, 9, 40, device="cuda", dtype=dtype), []
        for run, own in ((fast, module), (fast if dropout else plain, module if dropout else plain)):
            torch.manual_seed(7)
            given = x.clone().requires_grad_()
            output, states = run(given)
            sum(t.float().square().mean() for t in (output, *states)).backward()
            found.append(
                [output.detach(), *(t.detach() for t in states), given.grad, *(p.grad for p in own.parameters())]
            )
            own.zero_grad(set_to_none=True)
        for a, b in zip(*found, strict=True):
            assert (a.double() - b.double()).norm() <= TOLERANCE[dtype] * b.double().norm()
    (graph,) = fast._graphs.values()
    assert graph.replays == (6 if dropout else 3) and launches and set(launches) == {3}
    finish()


def test_beside_other_streams_and_other_persistent_launches():
    """Single layers on another stream are launched before or after a stack, never within it."""
    case = StackCase(4, 16, L=5, T=100, B=16, H=512, I=512, dtype=torch.float16, device="cuda")
    inputs = inputs_of(case)
    wanted = overlapped(case, inputs)
    single = lstm_triton.LSTM(512, 512, strategy="persistent", device="cuda", dtype=torch.float16)
    x, other = torch.randn(64, 64, 512, device="cuda", dtype=torch.float16), torch.cuda.Stream()
    with torch.no_grad():
        alone = single(x)[0]
        torch.cuda.synchronize()
        for _ in range(5):
            with torch.cuda.stream(other):
                results = [single(x)[0] for _ in range(3)]
            with torch.enable_grad():
                assert_same(overlapped(case, inputs), wanted)
            torch.cuda.synchronize()
            assert all(torch.equal(result, alone) for result in results)
    finish()
