"""The second derivative of what PyTorch's operators compute step by step, against the float64 reference."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, routing, second_order
from tests.support.double_backward import (
    GRADS,
    assert_right,
    cases_of,
    expected_second_gradients,
    second_gradients,
    without_reference,
)
from tests.support.parity import Case, call, call_reference, errors, random_inputs

CPU = torch.device("cpu")
RAGGED = Case(LSTMSpec(), T=3, B=2, I=2, H=3, bidirectional=True, lengths=True, states=True)
PEEPHOLES = LSTMSpec(peephole="diagonal", output_peephole="current")

each_case = pytest.mark.parametrize("case", [case for spec in VARIANTS for case in cases_of(spec)], ids=str)


@each_case
def test_second_gradients_are_the_references(case):
    assert_right(case, "torch", 1e-12)


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_in_float32_they_are_as_near_as_first_gradients(spec):
    assert_right(Case(spec, T=20, B=3, I=4, H=9, dtype=torch.float32, resets=True), "torch", 1e-5)


@pytest.mark.parametrize("given", [("output",), ("h_n",), ("c_n",), ("states",), ("h_n", "states")], ids=str)
@pytest.mark.parametrize("spec", [LSTMSpec(), PEEPHOLES], ids=lambda spec: spec.name)
def test_of_some_results_only(spec, given):
    assert_right(
        Case(spec, T=3, B=3, I=2, H=5, bidirectional=True, lengths=True, states=True), "torch", 1e-12, given=given
    )


SOME = [("x",), ("h_0",), ("c_0",), ("weight_ih_l0",), ("weight_hh_l0",), ("bias_ih_l0",), ("bias_hh_l0_reverse",),
        ("weight_hr_l0_reverse",), ("weight_ch_l0",), ("h_0", "weight_hh_l0_reverse")]  # fmt: skip


@pytest.mark.parametrize("first", SOME, ids=" ".join)
def test_of_some_first_gradients_only(first):
    assert_right(
        Case(PEEPHOLES, T=3, B=2, I=2, H=5, bidirectional=True, proj_size=3, resets=True), "torch", 1e-12, first=first
    )


@pytest.mark.parametrize("wanted", SOME, ids=" ".join)
def test_where_some_inputs_alone_require_gradients(wanted):
    case = Case(PEEPHOLES, T=3, B=2, I=2, H=5, bidirectional=True, proj_size=3, resets=True)

    def found(function):
        inputs = random_inputs(case)
        for name, t in inputs.items():
            t.requires_grad_(name in wanted)
        leaves = [inputs[name] for name in wanted]
        first = torch.autograd.grad(function(case, *inputs.values())[0].square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(t.sin().sum() for t in first), leaves)

    with lstm_triton.backend("torch"), without_reference():
        second = found(call)
    torch.testing.assert_close(second, found(call_reference), rtol=1e-11, atol=1e-13)


def third_gradients(case, inputs, function):
    """The gradients of a gradient penalty of gradients, by every input."""
    leaves = list(inputs.values())
    value = sum(t.sin().sum() for t in function(case, *leaves))
    for _ in range(2):
        value = sum(t.square().sum() for t in torch.autograd.grad(value, leaves, create_graph=True))
    return torch.autograd.grad(value, leaves)


@pytest.mark.parametrize("spec", [LSTMSpec(), PEEPHOLES], ids=lambda spec: spec.name)
def test_third_gradients_are_the_references(spec):
    case = Case(spec, T=2, B=2, I=2, H=3, bidirectional=True, lengths=True, states=True)
    inputs = random_inputs(case)
    with lstm_triton.backend("torch"):
        found = third_gradients(case, inputs, call)
    torch.testing.assert_close(found, third_gradients(case, inputs, call_reference), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batched", ["by is_grads_batched", "by vmap"])
def test_a_batch_of_second_gradients_is_one_after_the_other(batched):
    inputs = random_inputs(RAGGED)
    leaves = list(inputs.values())
    (gradient,) = torch.autograd.grad(sum(t.sin().sum() for t in call(RAGGED, *leaves)), inputs["x"], create_graph=True)
    cotangents = torch.randn(3, *gradient.shape, dtype=gradient.dtype)

    def second(cotangent, **options):
        return torch.autograd.grad(gradient, leaves, cotangent, retain_graph=True, **options)

    single = [torch.stack(parts) for parts in zip(*map(second, cotangents), strict=True)]
    batch = second(cotangents, is_grads_batched=True) if "is" in batched else torch.func.vmap(second)(cotangents)
    torch.testing.assert_close(list(batch), single, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("recompute", [False, True])
def test_everything_that_is_kept_is_seen_by_hooks(recompute):
    """And nothing of the size of the gates is kept for the second derivative where it is not for the first."""
    T, B, H = 6, 5, 7
    layer = lstm_triton.LSTM(3, H, coupled=True, peephole="diagonal", dtype=torch.float64, recompute=recompute)
    x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
    kept = []

    def pack(tensor):
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with saved_tensors_hooks(pack, lambda n: kept[n]), without_reference():
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert (max(t.numel() for t in kept) >= T * B * 3 * H) == (not recompute)
    plain = x.grad.clone()
    x.grad = None
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    torch.testing.assert_close(x.grad, plain)


def test_an_output_changed_in_place_is_an_error_not_a_wrong_gradient():
    inputs = random_inputs(RAGGED)
    output = call(RAGGED, *inputs.values())[0]
    (gradient,) = torch.autograd.grad(output.sum(), inputs["x"], create_graph=True)
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient.sum().backward()


def test_a_retained_graph_of_gradients_gives_the_same_twice_and_a_freed_one_is_pytorchs_error():
    inputs = random_inputs(RAGGED)
    loss = sum(t.sin().sum() for t in call(RAGGED, *inputs.values()))
    value = torch.autograd.grad(loss, inputs["x"], create_graph=True)[0].square().sum()
    leaves = list(inputs.values())
    first, again = (torch.autograd.grad(value, leaves, retain_graph=kept) for kept in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_a_gradient_penalty_with_a_frozen_layer_and_without_gradients_of_the_grads():
    """MAML's inner step: the gradient of every weight, used to change it."""
    case = Case(LSTMSpec(coupled=True), T=3, B=2, I=3, H=4, lengths=True)
    inputs = random_inputs(case)
    names = list(inputs)[3:]

    def outer(function):
        weights = [inputs[name] for name in names]
        states = [inputs[name].detach() for name in ("x", "h_0", "c_0")]
        steps = torch.autograd.grad(function(case, *states, *weights)[0].square().sum(), weights, create_graph=True)
        changed = [w - 0.1 * step for w, step in zip(weights, steps, strict=True)]
        return torch.autograd.grad(function(case, *states, *changed)[0].square().sum(), weights)

    with without_reference():
        found = outer(call)
    torch.testing.assert_close(found, outer(call_reference), rtol=1e-11, atol=1e-13)


def test_an_empty_batch():
    layer = lstm_triton.LSTM(3, 4, peephole="diagonal", bidirectional=True)
    x = torch.zeros(3, 0, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    gradient.sum().backward()
    assert x.grad is None or x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


# What computes it


def test_what_computes_a_second_derivative():
    def by(engine, dtype=torch.float32, watched=False):
        return routing.double_backward(engine, CPU, dtype, watched)

    for engine in ("persistent", "stepwise", "kernels", "eager"):
        assert by(engine).name == engine
        assert by(engine, watched=True).name == "reference"
        assert by(engine, torch.complex64).name == "reference"
    assert by("stepwise", torch.bfloat16).name == "stepwise"
    assert by("eager", torch.bfloat16).name == "reference"
    assert by("operator inside").name == "reference"
    refused = by("operator")
    assert refused.name == "reference" and "the kernels run on CUDA devices" in refused.reason


def test_under_a_mode_the_reference_computes_it():
    inputs = random_inputs(RAGGED)
    asked = []

    def counted(*arguments, **options):
        asked.append(True)
        return reference(*arguments, **options)

    reference = second_order.backward
    with pytest.MonkeyPatch.context() as patch, FlopCounterMode(display=False):
        patch.setattr(second_order, "backward", counted)
        found = second_gradients(RAGGED, inputs, call)
    assert asked
    assert max(errors(found, expected_second_gradients(RAGGED, inputs)).values()) < 1e-12
    assert {f"second of {name}" for name in GRADS} < found.keys()
