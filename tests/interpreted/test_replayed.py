"""The stepwise strategy in chunks, on the CPU: a "graph" here is the function itself, run again at each replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lstm_triton_kernels import sequence_replayed
from lstm_triton_kernels.sizes import Layer

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec
from tests.support import parity
from tests.support.parity import BOUND, RULES, Case, call, errors, expected_results, random_inputs, results


@pytest.fixture
def captures(monkeypatch):
    """Chunks of two steps, "captured" without CUDA; yields the list of captured functions."""
    captured = []

    def capture(function):
        captured.append(function)
        return function, None

    monkeypatch.setattr(sequence_replayed, "STEPS", 2)
    monkeypatch.setattr(sequence_replayed, "capture", capture)
    monkeypatch.setattr(sequence_replayed, "pays", lambda layer, device: layer.T >= 2)
    monkeypatch.setattr(sequence_replayed, "_chunks", type(sequence_replayed._chunks)())
    return captured


def stepwise(case, inputs):
    with lstm_triton.backend("triton"):
        return results(case, inputs, call)


SHAPES = {
    "two directions": dict(T=5, bidirectional=True),
    "projection": dict(T=3, proj_size=3, bias=False),
    "ragged": dict(T=5, bidirectional=True, lengths=True, resets=True, states=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_replayed_chunks_give_the_same_bits_and_are_right(spec, shape, captures):
    case = Case(spec, B=2, I=3, H=5, strategy="stepwise", **SHAPES[shape])
    inputs = random_inputs(case)
    first = stepwise(case, inputs)
    assert not captures
    second, third = stepwise(case, inputs), stepwise(case, inputs)
    assert len(captures) == 2 * case.D  # forward and backward of each direction
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)
    found = errors(third, expected_results(case, inputs))
    assert max(found.values()) <= BOUND[torch.float64], found


def test_one_graph_serves_all_lengths_and_other_values(captures):
    """But not other weights, which stand elsewhere."""
    cases = [Case(LSTMSpec(), T=T, B=2, I=3, H=5, strategy="stepwise") for T in (2, 4, 7)]
    inputs = random_inputs(cases[0])
    for seed, case in enumerate((*cases, *cases)):
        own = random_inputs(case, seed=seed)
        own |= {name: inputs[name] for name in inputs if "weight" in name or "bias" in name}
        found = errors(stepwise(case, own), expected_results(case, own))
        assert max(found.values()) <= BOUND[torch.float64], (case, found)
    assert len(captures) == 2
    others = random_inputs(cases[0], seed=9)
    for _ in range(2):
        assert max(errors(stepwise(cases[0], others), expected_results(cases[0], others)).values()) < 1e-12
    assert len(captures) == 4


def test_inference_keeps_no_gates(captures):
    layer = lstm_triton.LSTM(3, 5, dtype=torch.float64, strategy="stepwise")
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    with lstm_triton.backend("triton"), torch.no_grad():
        first, second = layer(x), layer(x)
    assert len(captures) == 1 and "gates" not in next(iter(sequence_replayed._chunks.values())).buffers
    assert torch.equal(first[0], second[0]) and torch.equal(first[1][1], second[1][1])


def test_the_graph_that_was_not_used_for_longest_goes(captures, monkeypatch):
    monkeypatch.setattr(sequence_replayed, "MOST_GRAPHS", 2)
    x = torch.randn(2, 1, 3)
    layers = [lstm_triton.LSTM(3, 4, strategy="stepwise").requires_grad_(False) for _ in range(3)]
    with lstm_triton.backend("triton"):
        for layer in (layers[0], layers[0], layers[1], layers[0], layers[2], layers[0]):
            layer(x)
        assert len(captures) == 1 and len(sequence_replayed._chunks) == 2
        layers[1](x)
        layers[1](x)
    assert len(captures) == 2


def test_what_cannot_be_captured_is_launched_step_by_step(captures, monkeypatch):
    def refuse(function):
        captures.append(function)
        raise RuntimeError("no graphs today")

    monkeypatch.setattr(sequence_replayed, "capture", refuse)
    layer = lstm_triton.LSTM(3, 5, strategy="stepwise").requires_grad_(False)
    x = torch.randn(4, 2, 3)
    with lstm_triton.backend("triton"):
        first = layer(x)[0]
        with pytest.warns(UserWarning, match="one by one: capturing them failed: no graphs today"):
            second = layer(x)[0]
        third = layer(x)[0]
    assert torch.equal(first, second) and torch.equal(first, third) and len(captures) == 1


@pytest.mark.parametrize(
    "sizes, capturing, expected",
    [
        (dict(T=512, B=16, H=768, P=768), False, True),
        (dict(T=31, B=16, H=768, P=768), False, False),  # not a chunk of it
        (dict(T=512, B=4096, H=4096, P=4096), False, False),  # its steps are long
        (dict(T=512, B=16, H=768, P=768), True, False),  # the user is capturing
    ],
)
def test_when_it_pays(sizes, capturing, expected, monkeypatch):
    from lstm_triton_kernels.gpus import GPUS

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(sequence_replayed, "gpu_of", lambda device: GPUS["h100"])
    layer = Layer(LSTMSpec(), D=1, dtype=torch.bfloat16, **sizes)
    assert sequence_replayed.pays(layer, torch.device("cuda")) == expected
    assert not sequence_replayed.pays(layer, torch.device("cpu"))


RULED = {
    "all rules": dict(T=5, bidirectional=True, rules=RULES[3]),
    "candidate": dict(T=5, bidirectional=True, resets=True, states=True, rules=RULES[4]),
    "projection": dict(T=5, proj_size=3, rules=RULES[3]._replace(proj_clip=0.25)),
    "evaluated": dict(T=5, rules=RULES[3], training=False),
}


@pytest.mark.parametrize("shape", RULED)
@pytest.mark.parametrize("spec", [VARIANTS[0], LSTMSpec(True, "full", "current")], ids=lambda spec: spec.name)
def test_regularised_chunks_read_the_masks_of_their_call(spec, shape, captures, monkeypatch):
    case = Case(spec, B=2, I=3, H=5, strategy="stepwise", **RULED[shape])
    inputs = random_inputs(case)
    other = replace(case, rules=case.rules._replace(cell_clip=0.375))  # captured anew: a graph holds its limits
    for asked, seed in ((case, 5), (case, 5), (case, 6), (other, 6), (other, 7), (case, 8)):
        monkeypatch.setattr(parity, "MASKS", seed)
        found = errors(stepwise(asked, inputs), expected_results(asked, inputs))
        assert max(found.values()) <= BOUND[torch.float64], (seed, found)
    assert len(captures) == 2 * 2 * case.D
