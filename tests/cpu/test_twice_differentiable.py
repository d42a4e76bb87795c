"""The Function that serves on CUDA, on tensors of the CPU: `aten.twice_differentiable` beside the float64 reference."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

import lstm_triton
from lstm_triton import LSTMSpec, aten, reference
from lstm_triton.parameters import group_layers
from lstm_triton.ragged import Packing
from tests.support.composes import close, loss

STANDARD = LSTMSpec()
T, B, I, H = 4, 3, 3, 5  # noqa: E741
LENGTHS = torch.tensor([4, 2, 1])

CASES = {
    "standard": dict(),
    "one step": dict(steps=1),
    "both directions": dict(bidirectional=True),
    "two layers": dict(num_layers=2),
    "projection": dict(proj_size=2),
    "projection, two layers, both directions": dict(proj_size=2, num_layers=2, bidirectional=True),
    "no bias": dict(bias=False),
    "packed": dict(packed=True),
    "packed, two layers, both directions, no bias": dict(packed=True, num_layers=2, bidirectional=True, bias=False),
}
each_case = pytest.mark.parametrize("options", CASES.values(), ids=CASES)


class Problem:
    """Leaves, and the same computed by the Function and by the reference: x is (T, B, I) for both."""

    def __init__(self, packed=False, steps=T, dtype=torch.float64, **options):
        module = lstm_triton.LSTM(I, H, dtype=torch.float64, **options)
        self.module, self.dtype = module, dtype
        self.lengths = LENGTHS if packed else None
        states = module.num_layers * (2 if module.bidirectional else 1), B
        x, h_0, c_0 = torch.randn(steps, B, I), torch.randn(*states, module.proj_size or H), torch.randn(*states, H)
        given = [x, h_0, c_0, *module.parameters()]
        self.leaves = [t.detach().to(dtype).requires_grad_() for t in given]
        self.names = ["x", "h_0", "c_0", *module._flat_weights_names]

    def of(self, *wanted):
        """Those leaves alone require gradients."""
        for name, leaf in zip(self.names, self.leaves, strict=True):
            leaf.requires_grad_(name in wanted)
        return [leaf for leaf in self.leaves if leaf.requires_grad]

    def by_function(self):
        """Output in rows, h_n and c_n."""
        module, (x, *others) = self.module, self.leaves
        options = aten.Options(module.bias, module.num_layers, 0.0, module.bidirectional)
        if self.lengths is None:
            return aten.twice_differentiable(options, x, *others)
        rows = pack_padded_sequence(x, self.lengths)
        packing = Packing(rows)
        output, *states = aten.twice_differentiable(options._replace(packing=packing), rows.data, *others)
        return [packing.pad(output), *states]

    def by_reference(self):
        """The same, in float64."""
        module, (x, h_0, c_0, *weights) = self.module, [t.double() for t in self.leaves]
        D = 2 if module.bidirectional else 1
        layers = group_layers(weights, STANDARD, D, module.bias, module.proj_size)
        return reference.lstm(x, h_0, c_0, layers, STANDARD, self.lengths)[:3]


@each_case
def test_results_and_first_gradients_are_the_references(options):
    problem = Problem(**options)
    found, expected = problem.by_function(), problem.by_reference()
    close(found, expected)
    assert all(t.grad_fn is not None and t.is_leaf is False for t in found)
    close(torch.autograd.grad(loss(found), problem.leaves), torch.autograd.grad(loss(expected), problem.leaves))


@each_case
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-3)], ids=str)
def test_second_gradients_are_the_references(options, dtype, tolerance):
    problem = Problem(dtype=dtype, **options)

    def second(results):
        gradients = torch.autograd.grad(loss(results), problem.leaves, create_graph=True)
        return torch.autograd.grad(loss(gradients), problem.leaves)

    close(second(problem.by_function()), second(problem.by_reference()), tolerance)


def test_gradients_pass_gradgradcheck():
    problem = Problem(num_layers=2, steps=2)
    options = aten.Options(True, 2, 0.0, False)

    def call(*inputs):
        return aten.twice_differentiable(options, *inputs)

    assert torch.autograd.gradcheck(call, problem.leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, problem.leaves, fast_mode=True)


SOME = ["x", "h_0", "c_0", "weight_ih_l0", "weight_hh_l0", "bias_hh_l1", "weight_hr_l1", "x weight_hh_l1"]


@pytest.mark.parametrize("wanted", SOME)
@pytest.mark.parametrize("again", [False, True], ids=["first", "second"])
def test_gradients_wanted_by_some_inputs_only(wanted, again):
    problem = Problem(num_layers=2, proj_size=2)
    leaves = problem.of(*wanted.split())
    assert len(leaves) == len(wanted.split())

    def gradients(results):
        found = torch.autograd.grad(loss(results), leaves, create_graph=again)
        return [*found, *torch.autograd.grad(loss(found), leaves)] if again else found

    close(gradients(problem.by_function()), gradients(problem.by_reference()))


def test_a_single_step_whose_cell_state_does_not_depend_on_what_is_trained():
    problem = Problem(proj_size=2, steps=1)
    (weight_hr,) = problem.of("weight_hr_l0")
    output, h_n, c_n = problem.by_function()
    assert output.requires_grad and h_n.requires_grad and not c_n.requires_grad
    expected = torch.autograd.grad(loss(problem.by_reference()[:2]), weight_hr)
    close(torch.autograd.grad(loss([output, h_n]), weight_hr), expected)


@pytest.mark.parametrize("used", [0, 1, 2], ids=["output", "h_n", "c_n"])
@each_case
def test_each_result_alone_has_gradients(options, used):
    problem = Problem(**options)

    def gradients(results):
        return torch.autograd.grad(loss([results[used]]), problem.leaves, allow_unused=True, materialize_grads=True)

    close(gradients(problem.by_function()), gradients(problem.by_reference()))


@each_case
def test_a_retained_graph_is_used_again_and_a_freed_one_is_pytorchs_error(options):
    problem = Problem(**options)
    value = loss(problem.by_function())
    first, again, last = (torch.autograd.grad(value, problem.leaves, retain_graph=kept) for kept in (True, True, False))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, last, strict=True))
    theirs = torch.nn.LSTM(I, H)(torch.randn(T, B, I))[0].sum()
    theirs.backward()
    said = []
    for freed in (value, theirs):
        with pytest.raises(RuntimeError, match=r"^Trying to backward through the graph a second time") as caught:
            freed.backward()
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_a_graph_that_was_differentiated_with_create_graph_is_still_there():
    problem = Problem()
    value = loss(problem.by_function())
    first = torch.autograd.grad(value, problem.leaves, create_graph=True)
    close(torch.autograd.grad(value, problem.leaves), first)


@each_case
def test_hooks_see_every_saved_tensor_and_give_it_back(options):
    problem = Problem(**options)
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    def unpack(number):
        unpacked.append(number)
        return packed[number]

    with saved_tensors_hooks(pack, unpack):
        results = problem.by_function()
    inner = len(packed) - len(problem.leaves)
    assert inner > 0  # those that PyTorch's operator saved
    for leaf in problem.leaves[1:]:
        assert any(torch.equal(leaf, kept) for kept in packed)
    expected = torch.autograd.grad(loss(problem.by_reference()), problem.leaves)
    close(torch.autograd.grad(loss(results), problem.leaves, retain_graph=True), expected)
    assert set(unpacked) == set(range(len(packed)))
    packed = [kept * 0 for kept in packed]  # nothing is taken from elsewhere
    found = torch.autograd.grad(loss(results), problem.leaves)
    assert not any(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@each_case
def test_a_batch_of_gradients_is_one_after_the_other(options):
    problem = Problem(**options)
    results = problem.by_function()
    cotangents = [torch.randn(4, *t.shape, dtype=t.dtype) for t in results]
    batch = torch.autograd.grad(results, problem.leaves, cotangents, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(problem.by_reference(), problem.leaves, [c[n] for c in cotangents]) for n in range(4)]
    close(batch, [torch.stack(parts) for parts in zip(*single, strict=True)])
    close(torch.autograd.grad(results, problem.leaves, [c[0] for c in cotangents]), single[0])


def test_nothing_is_recorded_without_gradients():
    problem = Problem()
    with torch.no_grad():
        assert not any(t.requires_grad for t in problem.by_function())
    problem.of()
    assert not any(t.requires_grad for t in problem.by_function())
