"""On a GPU: a model of cuDNN's LSTM gets peepholes of zero and computes what it did; weights are read from tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lstm_triton import convert, foreign
from tests.support.gpu import NEEDS_GPU

pytestmark = NEEDS_GPU


def results(layer, x):
    """output, h_n, c_n and by name the gradients of all parameters."""
    layer.zero_grad()
    output, (h_n, c_n) = layer(x)
    torch.stack([t.square().sum() for t in (output, h_n, c_n)]).sum().backward()
    return [t.detach() for t in (output, h_n, c_n)], {name: p.grad for name, p in layer.named_parameters()}


def error(actual, expected):
    """The largest relative difference, by norm."""
    return max(((a - e).norm() / e.norm()).item() for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    "peephole, output_peephole", [("diagonal", "previous"), ("diagonal", "current"), ("full", "current")]
)
def test_peepholes_of_zero_compute_what_cudnn_did(peephole, output_peephole):
    layer = nn.LSTM(33, 70, 2, bidirectional=True, dtype=torch.float64, device="cuda")
    x, parameters = torch.randn(13, 5, 33, dtype=torch.float64, device="cuda"), dict(layer.named_parameters())
    expected, of_expected = results(layer, x)
    of_expected = {name: grad.clone() for name, grad in of_expected.items()}
    convert.from_torch(layer, peephole=peephole, output_peephole=output_peephole)
    assert all(layer.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert {p.device.type for p in layer.parameters()} == {"cuda"} and layer.weight_ch_l1_reverse.dtype == torch.float64
    found, of_found = results(layer, x)
    assert error(found, expected) < 1e-10
    assert error([of_found[name] for name in of_expected], of_expected.values()) < 1e-10
    assert all(of_found[name].any() for name in of_found.keys() - of_expected.keys())


def test_coupled_gates_are_of_the_blocks_that_are_left():
    layer = nn.LSTM(33, 70, device="cuda")
    on_cpu = convert.from_torch(copy.deepcopy(layer).cpu(), coupled=True)
    convert.from_torch(layer, coupled=True)
    assert {name: p.cpu().tolist() for name, p in layer.named_parameters()} == {
        name: p.tolist() for name, p in on_cpu.named_parameters()
    }
    assert {p.device.type for p in layer.parameters()} == {"cuda"}
    x = torch.randn(13, 5, 33)
    assert error([layer(x.cuda())[0].cpu()], [on_cpu(x)[0]]) < 1e-2


def test_weights_are_read_where_they_are():
    weights = [torch.randn(*shape, dtype=torch.float64, device="cuda") for shape in ((33, 280), (70, 280), (280,))]
    lstm, on_cpu = foreign.from_haste(*weights).module(), foreign.from_haste(*(w.cpu() for w in weights)).module()
    assert {p.device.type for p in lstm.parameters()} == {"cuda"}
    x = torch.randn(13, 5, 33, dtype=torch.float64)
    assert error([lstm(x.cuda())[0].cpu()], [on_cpu(x)[0]]) < 1e-10
