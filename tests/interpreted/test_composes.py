"""What PyTorch does around a module, around the kernels: torch.func, torch.compile, second gradients, packed rows."""

from contextlib import contextmanager

import pytest
import torch
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap

import lstm_triton
from lstm_triton import LSTMSpec, reference
from tests.support.composes import (
    EVERYTHING,
    arguments,
    by_reference,
    close,
    in_rows,
    loss,
    module_of,
    packed,
    packed_by_reference,
    sequence,
    tensors,
)

SPECS = [LSTMSpec(), LSTMSpec(coupled=True, peephole="full", output_peephole="current")]
T, B = 3, 2

two_specs = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


@pytest.fixture(autouse=True)
def compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@contextmanager
def without_reference():
    """Inside, the reference computes nothing: what is computed is the kernels' work."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "layer_states", None)
        yield


def expected_gradients(module, x, **options):
    return torch.autograd.grad(loss(by_reference(module, x, **options)), list(module.parameters()))


@two_specs
def test_gradients_of_an_ensemble_by_torch_func_are_the_kernels_work(spec):
    """grad, vmap of grad and grad of vmap, with lengths, resets and cell states."""
    members = [module_of(spec) for _ in range(2)]
    stacked = {name: weight.detach() for name, weight in stack_module_state(members)[0].items()}
    x, options = sequence(T, B), arguments(EVERYTHING, T, B)

    def scalar(weights):
        return loss(functional_call(members[0], weights, (x,), options))

    with lstm_triton.backend("triton"), without_reference():
        one = grad(scalar)({name: weight[0] for name, weight in stacked.items()})
        each = vmap(grad(scalar))(stacked)
        together = grad(lambda weights: vmap(scalar)(weights).sum())(stacked)
    expected = [expected_gradients(member, x, **options) for member in members]
    close(one.values(), expected[0])
    for found in (each, together):
        close(found.values(), [torch.stack(parts) for parts in zip(*expected, strict=True)])


@two_specs
def test_a_compiled_call_with_lengths_resets_and_cell_states_is_the_references(spec):
    module = module_of(spec)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps, rows in ((T, B), (2, 3)):
        x, options = sequence(steps, rows), arguments(EVERYTHING, steps, rows)
        with lstm_triton.backend("triton"), without_reference():
            result = compiled(x, **options)
            found = torch.autograd.grad(loss(result), list(module.parameters()))
        close(tensors(result), by_reference(module, x, **options))
        close(found, expected_gradients(module, x, **options))


@two_specs
def test_second_gradients_with_lengths_are_the_references(spec):
    module = module_of(spec)
    x, options = sequence(T, B, requires_grad=True), arguments(("lengths",), T, B)

    def second(result):
        (gradient,) = torch.autograd.grad(loss(result), x, create_graph=True)
        return torch.autograd.grad(loss(gradient), list(module.parameters()))

    with lstm_triton.backend("triton"):
        found = second(module(x, **options))
    close(found, second(by_reference(module, x, **options)))


def test_a_packed_sequence_is_as_torchs_in_outputs_and_gradients():
    ours, theirs = module_of(SPECS[0], bidirectional=True), torch.nn.LSTM(3, 4, bidirectional=True, dtype=torch.float64)
    theirs.load_state_dict(ours.state_dict())
    input = packed((2, 3, 1))
    with lstm_triton.backend("triton"), without_reference():
        result = ours(input)
        loss(result).backward()
    wanted = theirs(input)
    loss(wanted).backward()
    close(in_rows(result), in_rows(wanted))
    close([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()])


def test_a_packed_sequence_of_another_variant_is_as_the_references():
    module, input = module_of(SPECS[1]), packed((2, 3, 1))
    with lstm_triton.backend("triton"):
        result = module(input)
        found = torch.autograd.grad(loss(in_rows(result)), list(module.parameters()))
    wanted = packed_by_reference(module, input)
    close(in_rows(result), wanted)
    close(found, torch.autograd.grad(loss(wanted), list(module.parameters())))


@pytest.mark.parametrize("asked_by", ["backend", "strategy"])
@two_specs
def test_forward_mode_is_refused_where_the_kernels_were_asked_for(spec, asked_by):
    module = module_of(spec, strategy="stepwise" if asked_by == "strategy" else "auto")
    x = sequence(T, B)
    message = "forward-mode differentiation, .* are for strategy 'auto' with backend 'auto' or 'torch'"
    with lstm_triton.backend("triton" if asked_by == "backend" else "auto"):
        with pytest.raises(RuntimeError, match=message):
            jvp(lambda x: module(x)[0], (x,), (x,))
        with pytest.raises(RuntimeError, match=message):
            hessian(lambda x: loss(module(x)))(x)
        with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            module(torch.autograd.forward_ad.make_dual(x, x))
