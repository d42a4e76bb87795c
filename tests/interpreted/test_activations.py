"""The kernels' activations over the whole range of their argument."""

import pytest
import torch
import triton
import triton.language as tl
from lstm_triton_kernels.activations import log_sigmoid, sigmoid, tanh


@triton.jit
def apply(x_ptr, sigmoid_ptr, tanh_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    x = tl.load(x_ptr + n)
    tl.store(sigmoid_ptr + n, sigmoid(x))
    tl.store(tanh_ptr + n, tanh(x))


def evaluate(x):
    s, t = torch.empty_like(x), torch.empty_like(x)
    apply[(1,)](x, s, t, N=x.numel())
    return s, t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_relative_error_from_tiny_to_huge(dtype):
    """Both ends of the range, and around 1/8, where tanh goes over to 2 s(2x) - 1: there it is off by two units in the
    last place of 1, of a result of 1/8."""
    unit = torch.finfo(dtype).eps
    size = torch.logspace(-30, 4, 1024, dtype=torch.float64)
    near = torch.linspace(0.12, 0.13, 1024, dtype=torch.float64)
    x = torch.cat([size, near, -size, -near]).to(dtype)
    s, t = evaluate(x)
    exact = x.double()
    assert ((t.double() - exact.tanh()) / exact.tanh()).abs().max() < 2 * unit / 0.12
    moderate = exact.abs() < 80
    assert ((s.double() - exact.sigmoid()) / exact.sigmoid())[moderate].abs().max() < 80 * unit  # of e^x
    assert (s.double() - exact.sigmoid()).abs().max() < 2 * unit


def test_infinities_and_nan():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    s, t = evaluate(x)
    assert torch.equal(s[:2], torch.tensor([1.0, 0.0])) and torch.equal(t[:2], torch.tensor([1.0, -1.0]))
    assert s[2].isnan() and t[2].isnan() and s[3] == 0.5 and t[3] == 0.0


@triton.jit
def apply_log_sigmoid(x_ptr, out_ptr, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(out_ptr + n, log_sigmoid(tl.load(x_ptr + n)))


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 3e-7), (torch.float64, 1e-15)], ids=str)
def test_the_logarithm_of_the_sigmoid_where_that_is_zero_and_where_it_is_one(dtype, allowed):
    size = torch.logspace(-30, 4, 1024, dtype=torch.float64)
    x = torch.cat([size, -size]).to(dtype)
    found = torch.empty_like(x)
    apply_log_sigmoid[(1,)](x, found, N=x.numel())
    exact = torch.nn.functional.logsigmoid(x.double())
    assert ((found.double() - exact).abs() <= allowed + torch.finfo(dtype).eps * exact.abs()).all()
    ends = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0], dtype=dtype)
    found = torch.empty_like(ends)
    apply_log_sigmoid[(1,)](ends, found, N=4)
    torch.testing.assert_close(found, torch.nn.functional.logsigmoid(ends), equal_nan=True, rtol=0, atol=allowed)


def test_nan_and_infinity_in_the_input_flow_through():
    import lstm_triton

    layer = lstm_triton.LSTM(3, 4)
    x = torch.randn(4, 3, 3)
    x[1, 0, 0], x[1, 1, 0], x[1, 2, 0] = float("nan"), float("inf"), float("-inf")
    expected, _ = torch.func.functional_call(torch.nn.LSTM(3, 4), dict(layer.named_parameters()), (x,))
    with lstm_triton.backend("triton"):
        output, _ = layer(x)
    torch.testing.assert_close(output, expected, equal_nan=True, rtol=1e-4, atol=1e-6)
    assert output[1:, 0].isnan().all() and output[:, 1:].isfinite().all()
