"""How the layer behaves as a differentiable function: operators, graphs, what is not wanted, torch.compile."""

import weakref
from contextlib import nullcontext

import pytest
import torch

import lstm_triton
from lstm_triton import VARIANTS, LSTMSpec, autograd, routing
from tests.support.operators import check_operators
from tests.support.parity import Case, call, call_reference, errors, expected_results, random_inputs, results


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_operators_pass_opcheck(spec):
    check_operators(spec, "torch")


SPECS = [LSTMSpec(), LSTMSpec(coupled=True), LSTMSpec(peephole="full", output_peephole="current")]


@pytest.fixture(params=SPECS, ids=lambda spec: spec.name)
def case(request):
    return Case(request.param, T=4, L=2, bidirectional=True)


def test_a_second_backward_over_a_retained_graph_gives_the_same(case):
    inputs = random_inputs(case)
    outputs = call(case, *inputs.values())
    loss = sum((t * t).sum() for t in outputs)
    first = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(inputs.values()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, list(inputs.values()))


@pytest.mark.parametrize("used", ["output", "h_n", "c_n"])
def test_each_output_alone_carries_gradients(case, used):
    inputs = random_inputs(case)
    index = ("output", "h_n", "c_n").index(used)
    gradients = torch.autograd.grad(
        call(case, *inputs.values())[index].square().sum(), list(inputs.values()), allow_unused=True
    )
    expected = torch.autograd.grad(
        call_reference(case, *inputs.values())[index].square().sum(), list(inputs.values()), allow_unused=True
    )
    for name, gradient, wanted in zip(inputs, gradients, expected, strict=True):
        assert (gradient is None or not gradient.any()) if wanted is None else torch.allclose(gradient, wanted), name


def test_what_needs_no_gradient_costs_none(case, monkeypatch):
    asked = []
    backward = autograd.backward_pass

    def spy(*arguments):
        asked.append(arguments[7])
        computed = backward(*arguments)
        assert len(computed) == sum(arguments[7])
        return computed

    monkeypatch.setattr(autograd, "backward_pass", spy)
    monkeypatch.setattr(routing, "why_not_operator", lambda *_: "not asked here")
    inputs = random_inputs(case)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == "weight_hh_l1")
    call(case, *inputs.values())[0].sum().backward()
    (needs,) = asked  # the layer below was not differentiated at all
    assert sum(needs) == 1
    assert inputs["weight_hh_l1"].grad is not None and inputs["x"].grad is None


def test_nothing_is_saved_without_gradients(monkeypatch):
    saved = []
    forward = autograd.layer.forward
    monkeypatch.setattr(autograd.layer, "forward", lambda *a, **k: saved.append(a[5].save) or forward(*a, **k))
    layer = lstm_triton.LSTM(3, 4, peephole="diagonal")
    x = torch.randn(2, 1, 3)
    with torch.no_grad():
        layer(x)
    layer.requires_grad_(False)(x)
    layer.requires_grad_(True)(x)
    assert saved == [False, False, True]


def test_nothing_is_saved_for_members_whose_gradient_nobody_asks(monkeypatch):
    saved = []
    forward = autograd.layer.forward
    monkeypatch.setattr(autograd.layer, "forward", lambda *a, **k: saved.append(a[5].save) or forward(*a, **k))
    layer = lstm_triton.LSTM(3, 4, peephole="diagonal")
    ensemble = {name: torch.stack([p, 2 * p]).detach() for name, p in layer.named_parameters()}
    x = torch.randn(2, 1, 3)

    def output(weights):
        return torch.func.functional_call(layer, weights, (x,))[0]

    torch.func.vmap(output)(ensemble)
    assert saved == [False, False]
    torch.func.vmap(torch.func.grad(lambda weights: output(weights).sum()))(ensemble)
    assert saved == [False, False, True, True]


def test_backward_works_in_eval(case):
    inputs = random_inputs(case)
    layer = lstm_triton.LSTM(
        case.I, case.H, 2, bidirectional=True, dropout=0.5, dtype=case.dtype, **case.variant
    ).eval()
    layer.load_state_dict(dict(list(inputs.items())[3:]))
    output, _ = layer(inputs["x"], (inputs["h_0"], inputs["c_0"]))
    output.sum().backward()
    (expected,) = torch.autograd.grad(call_reference(case, *inputs.values())[0].sum(), inputs["x"])
    torch.testing.assert_close(inputs["x"].grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_double_backward_where_pytorch_has_none(dtype):
    """A gradient penalty in float32, which PyTorch serves by oneDNN: `torch.nn.LSTM` cannot do it."""
    layer = lstm_triton.LSTM(3, 4, 2, dtype=dtype)
    x = torch.randn(5, 2, 3, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    exact = lstm_triton.LSTM(3, 4, 2, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    y = x.detach().double().requires_grad_()
    case = Case(LSTMSpec(), L=2)
    zeros = torch.zeros(2, 2, 4, dtype=torch.float64)
    out = call_reference(case, y, zeros, zeros, *exact.parameters())[0]
    (gradient,) = torch.autograd.grad(out.square().sum(), y, create_graph=True)
    gradient.square().sum().backward()
    for a, b in zip(layer.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=1e-4, atol=1e-7)


def test_an_output_changed_in_place_is_an_error_not_a_wrong_gradient(case):
    inputs = random_inputs(case)
    output = call(case, *inputs.values())[0]
    output.mul_(2)
    if not case.spec.peephole:  # PyTorch's own LSTM does not read its output again in float64
        (gradient,) = torch.autograd.grad(output.sum(), inputs["x"])
        (expected,) = torch.autograd.grad(2 * call_reference(case, *inputs.values())[0].sum(), inputs["x"])
        torch.testing.assert_close(gradient, expected)
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


class Packed:
    """What a hook keeps of a tensor, in place of it."""

    def __init__(self, tensor):
        self.tensor = tensor


@pytest.mark.parametrize("hooks", [False, True], ids=["no hooks", "hooks"])
def test_nothing_is_kept_after_a_backward_pass(case, hooks):
    """What was saved is freed at once, though the loss is still there; and hooks see all of it."""
    inputs, alive = random_inputs(case), []

    def pack(tensor):
        kept = Packed(tensor.detach().clone())
        alive.append(weakref.ref(kept))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor) if hooks else nullcontext():
        outputs = call(case, *inputs.values())
    loss = sum((output * output).sum() for output in outputs)
    before = sum(ref() is not None for ref in alive)
    saved = outputs[0].grad_fn  # the last layer's part of the graph, alive with the loss
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    assert saved is not None and all(gradient is not None for gradient in gradients)
    assert (before > 10) == hooks and not any(ref() is not None for ref in alive)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_gradients_to_be_differentiated_again_are_as_exact_as_others(spec, dtype):
    """In half types too: the cell state is kept in float32 whoever computes it."""
    case = Case(spec, T=64, dtype=dtype)
    inputs = random_inputs(case)
    expected = expected_results(case, inputs)
    exact = {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    outputs = call(case, *inputs.values())
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype) for t in outputs]
    again = torch.autograd.grad(outputs, list(inputs.values()), grads, create_graph=True)
    named = {f"grad {name}": gradient for name, gradient in zip(inputs, again, strict=True)}
    found = errors(named, {name: expected[name] for name in named})
    assert max(found.values()) < exact, found
    # Forward mode gives the very values that a call outside of it does, or nearer ones.
    primal, _ = torch.func.jvp(lambda x: call(case, x, *list(inputs.values())[1:])[0], (inputs["x"],), (inputs["x"],))
    assert errors({"output": primal}, {"output": expected["output"]})["output"] < exact


def test_autocast_does_not_reach_into_gradients_to_be_differentiated_again():
    layer, x = lstm_triton.LSTM(3, 4, peephole="full"), torch.randn(5, 2, 3, requires_grad=True)
    output, _ = layer(x)
    (plain,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (again,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("T, B", [(3, 0), (1, 0)])
def test_an_empty_batch_has_zero_gradients(case, T, B):
    layer = lstm_triton.LSTM(5, 7, 2, bidirectional=True, peephole=case.spec.peephole, coupled=True)
    x = torch.zeros(T, B, 5, requires_grad=True)
    output, (h_n, c_n) = layer(x)
    assert output.shape == (T, B, 14) and h_n.shape == c_n.shape == (4, B, 7)
    (output.sum() + c_n.sum()).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_compiles_into_one_graph(spec):
    torch._dynamo.reset()  # every variant compiles the same lambda anew
    case = Case(spec, T=3, L=2)
    inputs = random_inputs(case)
    compiled = torch.compile(lambda *tensors: call(case, *tensors), fullgraph=True, backend="aot_eager")
    actual = results(case, inputs, lambda _, *tensors: compiled(*tensors))
    found = errors(actual, expected_results(case, inputs))
    assert max(found.values()) < 1e-12, found


def test_compiled_module_and_cell():
    layer, cell = lstm_triton.LSTM(3, 4, coupled=True), lstm_triton.LSTMCell(3, 4, peephole="diagonal")
    x = torch.randn(5, 2, 3)
    for module, argument in ((layer, x), (cell, x[0])):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(argument)[0], module(argument)[0])
    # The operators stay opaque: the compiled graph does not grow with T.
    counts = []

    def count(graph, _):
        counts.append(len(list(graph.graph.nodes)))
        return graph

    for T in (2, 9):
        torch._dynamo.reset()
        torch.compile(layer, fullgraph=True, backend=count)(torch.randn(T, 2, 3))
    assert counts[0] == counts[1]


def test_compiled_inference_chooses_the_backend_at_the_call():
    layer = lstm_triton.LSTM(3, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 2, 3)
    compiled(x)
    with lstm_triton.backend("triton"), pytest.raises(Exception, match="TRITON_INTERPRET=1"):
        compiled(x)
