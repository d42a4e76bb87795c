"""Layers at the same time, by the plain kernels: bit for bit as one after another, and right in every gradient."""

from __future__ import annotations

import pytest
import torch

import lstm_triton
from lstm_triton import LSTMSpec, stack
from lstm_triton.overlap import Overlap
from tests.support.overlap import (
    StackCase,
    both_passes,
    by_layer,
    in_any_order,
    inputs_of,
    one_layer_after_another,
    overlapped,
)
from tests.support.persistent import concurrently, plan_of, planned

PEEPHOLE = LSTMSpec(coupled=True, peephole="diagonal", output_peephole="current")
CASES = [
    StackCase(3, 2),
    StackCase(2, 3, L=4, resets=True, dropout=0.3),
    StackCase(2, 4, PEEPHOLE, L=2, T=8, B=5, H=9, bias=False, dropout=0.5),
    StackCase(4, 1, LSTMSpec(peephole="diagonal"), T=5, B=1, H=17, resets=True),
    StackCase(2, 7, L=2),
    StackCase(2, 2, gradients=(True, False, False), dropout=0.3),
    StackCase(2, 2, gradients=(False, True, False)),
    StackCase(2, 2, gradients=(False, False, True), resets=True),
    StackCase(3, 2, gradients=None, dropout=0.3),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def assert_same(found, wanted):
    other = [name for name in wanted if not torch.equal(found[name], wanted[name])]
    assert found.keys() == wanted.keys() and not other, f"not the same: {', '.join(other)}"


def double(case, inputs):
    """The reference of a stack without dropout in float64: every result and gradient."""
    wide = inputs_of(case)
    tensors = {name: getattr(inputs, name).detach().double().requires_grad_() for name in ("x", "h_0", "c_0")}
    wide.x, wide.h_0, wide.c_0 = tensors.values()
    wide.weights = [w.detach().double().requires_grad_() for w in inputs.weights]
    wide.resets, wide.gradients = inputs.resets, [g.double() for g in inputs.gradients]
    with lstm_triton.backend("torch"):
        return by_layer(case, wide)


def assert_near(found, wanted, bound):
    for name, w in wanted.items():
        error = float((found[name].double() - w).norm() / w.norm()) if w.any() else float(found[name].norm())
        assert error <= bound, f"{name}: {error:.1e}"


@every_case
def test_bit_for_bit_as_one_layer_after_another_in_the_same_chunks(case):
    inputs = inputs_of(case)
    with one_layer_after_another():
        wanted = overlapped(case, inputs)
    assert_same(overlapped(case, inputs), wanted)
    with in_any_order(CASES.index(case)):
        assert_same(overlapped(case, inputs), wanted)


@pytest.mark.parametrize("case", [case for case in CASES if case.dropout], ids=str)
def test_as_without_chunks(case):
    """Dropout draws the same random numbers, and the rest is what the layers compute one by one in a launch each."""
    inputs = inputs_of(case)
    assert_near(overlapped(case, inputs), {k: v.double() for k, v in by_layer(case, inputs).items()}, 2e-6)


@pytest.mark.parametrize("case", [case for case in CASES if not case.dropout], ids=str)
def test_against_float64(case):
    inputs = inputs_of(case)
    assert_near(overlapped(case, inputs), double(case, inputs), 3e-6)


def test_without_the_waits_of_a_schedule_the_results_are_wrong():
    """So that the test of other orders would notice one that is missing."""
    case = CASES[0]
    inputs = inputs_of(case)
    wanted = overlapped(case, inputs)
    different = 0
    for seed in range(4):
        with in_any_order(seed, waits=False):
            found = overlapped(case, inputs)
        different += any(not torch.equal(found[name], wanted[name]) for name in wanted)
    assert different == 4


def test_chunks_pass_states_and_their_gradients_as_calls_do():
    """A single layer cannot be overlapped; two are the same as two, each called on chunks that pass (h, c) on."""
    case = StackCase(2, 3, L=2)
    inputs = inputs_of(case)

    def by_calls(x, hx, weights, resets):
        states = []
        for n in range(case.L):
            h, c, outputs = hx[0][n : n + 1], hx[1][n : n + 1], []
            for part in x.split(case.chunk):
                output, (h, c) = lstm_triton.functional.lstm(
                    part, (h, c), weights[4 * n : 4 * n + 4], strategy="persistent"
                )
                outputs.append(output)
            x = torch.cat(outputs)
            states.append((h, c))
        return x, tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    wanted = both_passes(case, inputs, by_calls)
    found = overlapped(case, inputs)
    exact = ("output", "h_n", "c_n", "grad x", "grad h_0", "grad c_0")
    assert_same({name: found[name] for name in exact}, {name: wanted[name] for name in exact})
    assert_near(found, {name: w.double() for name, w in wanted.items()}, 1e-6)


@pytest.mark.parametrize("wait", ["counter", "data"])
def test_programs_that_wait_for_each_other(wait):
    """Three parts of the units, two row blocks in one program."""
    case = StackCase(2, 2, L=2, T=4, B=9, H=19, resets=True)
    inputs = inputs_of(case)
    plan = plan_of(9, 19, wait=wait, rows=5, row_programs=1, parts=8)
    with planned(plan), concurrently(delay=1e-4):
        found = overlapped(case, inputs)
        with one_layer_after_another():
            assert_same(found, overlapped(case, inputs))
    assert_near(found, double(case, inputs), 3e-6)


def test_what_cannot_be_overlapped_is_computed_layer_by_layer(monkeypatch):
    """Asked for or not: both directions, lengths, cell states, recomputing, a single layer, full peepholes."""
    monkeypatch.setattr(stack, "lstm", None)
    x = torch.randn(4, 2, 3)
    with stack.overlapping(Overlap(2, 2)):
        for options, call in (
            (dict(bidirectional=True), {}),
            (dict(), dict(lengths=torch.tensor([4, 2]))),
            (dict(), dict(return_cell_states=True)),
            (dict(recompute=True), {}),
            (dict(num_layers=1), {}),
            (dict(peephole="full"), {}),
            (dict(dropout=1.0), {}),
            (dict(strategy="stepwise"), {}),
        ):
            module = lstm_triton.LSTM(3, 5, **(dict(num_layers=2, strategy="persistent") | options))
            assert module(x, **call)[0].isfinite().all()
    module = lstm_triton.LSTM(3, 5, num_layers=2, strategy="persistent")
    assert module(x)[0].isfinite().all()  # not asked for
    with stack.overlapping():
        assert module(x)[0].isfinite().all()  # asked for, but of so few steps nothing is gained
    with stack.overlapping(Overlap(2, 2)), pytest.raises(TypeError):
        module(x)


def test_the_gradient_cannot_be_differentiated():
    case = StackCase(2, 2)
    inputs = inputs_of(case)
    with stack.overlapping(Overlap(2, 2)):
        output, _ = lstm_triton.functional.lstm(
            inputs.x, (inputs.h_0, inputs.c_0), inputs.weights, strategy="persistent", **case.options
        )
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(output.sum(), inputs.x, create_graph=True)
