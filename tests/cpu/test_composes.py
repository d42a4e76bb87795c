"""What PyTorch does around a module works with ours: compile, export, torch.func, checkpoint, hooks, autocast, jit."""

from __future__ import annotations

import contextlib
import io
import itertools
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.autograd.functional import hessian as plain_hessian
from torch.autograd.functional import jacobian as plain_jacobian
from torch.export import Dim
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.nn.utils.rnn import PackedSequence

import lstm_triton
from lstm_triton import VARIANTS, LSTMCell, LSTMSpec, aten, autograd, reference
from tests.support.composes import (
    EVERYTHING,
    arguments,
    by_reference,
    cell_by_reference,
    close,
    in_rows,
    loss,
    module_of,
    packed,
    packed_by_reference,
    sequence,
    tensors,
    variant,
    with_and_without_checkpoint,
)

STANDARD = LSTMSpec()
SPECS = [STANDARD, LSTMSpec(coupled=True, peephole="full", output_peephole="current"), LSTMSpec(peephole="diagonal")]
STACK = dict(num_layers=2, bidirectional=True)
SIZES = [(7, 4), (4, 3), (9, 2)]
"""T and B of calls that follow each other."""

ROWS = [(7, 3, 5, 2), (4, 2, 3), (9, 4)]
"""Lengths of the rows of packed calls that follow each other."""

ASKED = {"plain": (), "lengths, resets, cell states": EVERYTHING, "packed": "packed"}
"""What a call may ask for, and a PackedSequence as its input."""

two_specs = pytest.mark.parametrize("spec", SPECS[:2], ids=lambda spec: spec.name)
every_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
each_asked = pytest.mark.parametrize("asked", [(), EVERYTHING], ids=["plain", "lengths, resets, cell states"])
each_input = pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)


@pytest.fixture(autouse=True)
def compiled_anew():
    """Nothing that another test compiled is used or counted."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def calls(monkeypatch):
    """How often each computed: our operators "forward" and "backward", the "reference", and "aten", PyTorch's LSTM."""
    counted = dict(forward=0, backward=0, reference=0, aten=0)

    def count(owner, attribute, name):
        original = getattr(owner, attribute)

        def counting(*args, **kwargs):
            counted[name] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, attribute, counting)

    for name in ("layer_forward", "forward_pass"):
        count(autograd, name, "forward")
    for name in ("layer_backward", "backward_pass"):
        count(autograd, name, "backward")
    count(reference, "layer_states", "reference")
    count(aten, "operator", "aten")
    return counted


def parameters_of(module):
    """The parameters by name; torch.func differentiates by these alone."""
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def gradients_by_reference(module, x, **asked):
    """Of `loss`, by x and every parameter."""
    x = x.detach().requires_grad_()
    weights = {name: weight.requires_grad_() for name, weight in parameters_of(module).items()}
    return torch.autograd.grad(loss(by_reference(module, x, weights, **asked)), [x, *weights.values()])


# torch.compile


@pytest.mark.parametrize(
    "spec, asked", list(zip([SPECS[0], SPECS[1], SPECS[0]], ASKED.values(), strict=True)), ids=ASKED
)
def test_one_graph_serves_every_number_of_steps_and_rows(spec, asked):
    module = module_of(spec, bidirectional=True)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    call_on_every_size(module, compiled, asked)
    assert counter.frame_count == 1


@each_input
def test_sizes_that_turn_out_to_change_are_compiled_once_more(asked):
    module = module_of(SPECS[1])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    call_on_every_size(module, compiled, asked)
    assert counter.frame_count <= 2


def call_on_every_size(module, compiled, asked):
    if asked == "packed":
        for lengths in ROWS:
            input = packed(lengths)
            close(in_rows(compiled(input)), packed_by_reference(module, input))
        return
    for T, B in SIZES:
        x, options = sequence(T, B), arguments(asked, T, B)
        close(tensors(compiled(x, **options)), by_reference(module, x, **options))


@pytest.mark.parametrize(
    "spec, asked", list(zip(SPECS[1::-1], [EVERYTHING, "packed"], strict=True)), ids=list(ASKED)[1:]
)
def test_compiled_training_is_eager_training(spec, asked):
    """Three steps of Adam on other sizes each, by gradients that are the reference's."""
    eager, module = module_of(spec, num_layers=2), module_of(spec, num_layers=2)
    module.load_state_dict(eager.state_dict())
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.05) for m in (module, eager)]
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for (T, B), lengths in zip(SIZES, ROWS, strict=True):
        if asked == "packed":
            input, options = packed(lengths), {}
        else:
            input, options = sequence(T, B), arguments(asked, T, B)
        for call, optimizer in zip((compiled, eager), optimizers, strict=True):
            optimizer.zero_grad()
            loss(call(input, **options)).backward()
        if asked != "packed":
            expected = gradients_by_reference(module, input, **options)[1:]
            close([p.grad for p in module.parameters()], expected)
        close([p.grad for p in module.parameters()], [p.grad for p in eager.parameters()])
        for optimizer in optimizers:
            optimizer.step()
    close(list(module.parameters()), list(eager.parameters()))


def test_the_gradient_of_a_compiled_input_is_the_references():
    module = module_of(SPECS[2])
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for T, B in SIZES[:2]:
        x, options = sequence(T, B, requires_grad=True), arguments(EVERYTHING, T, B)
        loss(compiled(x, **options)).backward()
        close([x.grad], gradients_by_reference(module, x, **options)[:1])


def test_inductor_trains_as_eager_does():
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        pytest.skip(f"inductor needs a C++ compiler: {error}")
    module = module_of(SPECS[2])
    x, options = sequence(5, 3), arguments(EVERYTHING, 5, 3)
    loss(torch.compile(module, fullgraph=True)(x, **options)[0]).backward()
    found = [p.grad for p in module.parameters()]
    close(found, torch.autograd.grad(loss(by_reference(module, x, **options)[0]), list(module.parameters())))


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_lengths_out_of_range_are_refused_by_a_compiled_module(training):
    module = module_of(STANDARD)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = sequence(4, 2)
    with torch.set_grad_enabled(training):
        compiled(x, lengths=torch.tensor([4, 1]))
        for wrong, message in (([4, 0], "got 0 in row 1"), ([5, 1], "got 5 in row 0"), ([-1, 2], "got -1 in row 0")):
            with pytest.raises(ValueError, match=f"lengths must be from 1 to the 4 steps of the input, {message}"):
                compiled(x, lengths=torch.tensor(wrong))


def test_a_compiled_call_under_autocast_has_the_types_of_an_eager_one():
    module = module_of(SPECS[1], dtype=torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, options = sequence(5, 3, dtype=torch.float32), arguments(EVERYTHING, 5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        found, eager = tensors(compiled(x, **options)), tensors(module(x, **options))
    assert {t.dtype for t in found} == {torch.bfloat16}
    close(found, eager, 1e-2)
    sum(t.float().sum() for t in found).backward()
    assert all(p.grad.dtype == torch.float32 for p in module.parameters())


TRANSFORMED = {
    "grad": lambda f, x: grad(lambda x: loss(f(x)))(x),
    "vjp": lambda f, x: vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jvp": lambda f, x: jvp(f, (x,), (x,))[1],
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x])),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: loss(f(x))))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(lambda x: loss(vmap(f)(torch.stack([x, 2 * x]))))(x),
    "grad of grad": lambda f, x: grad(lambda x: loss(grad(lambda x: loss(f(x)))(x)))(x),
}


@pytest.mark.parametrize("transform", TRANSFORMED)
def test_a_transform_in_a_compiled_function_is_the_transform(transform):
    module = module_of(SPECS[2])
    x, options, weights = sequence(2, 3), arguments(EVERYTHING, 2, 3), parameters_of(module)
    transformed = TRANSFORMED[transform]
    compiled = torch.compile(
        lambda x: transformed(lambda x: functional_call(module, weights, (x,), options)[0], x),
        fullgraph=True,
        backend="eager",
    )
    close([compiled(x)], [transformed(lambda x: by_reference(module, x, weights, **options)[0], x)])


def test_a_compiled_call_loses_no_tangent():
    """Compiled outside of forward mode, then called inside: newer PyTorch refuses that, older does not."""
    module = module_of(SPECS[1])
    x, tangent = sequence(4, 2), sequence(4, 2)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            try:
                found = forward_ad.unpack_dual(compiled(dual)[0]).tangent
            except torch._dynamo.exc.Unsupported as refused:
                assert "dual tensor" in str(refused)
                return
    close([found], [jvp(lambda x: by_reference(module, x)[0], (x,), (tangent,))[1]])


# torch.export


class Exported(torch.nn.Module):
    """A module with what export is given: tensors, by position."""

    def __init__(self, spec, asked):
        super().__init__()
        self.lstm, self.asked = module_of(spec, **STACK), asked

    def forward(self, x, lengths=None, resets=None, batch_sizes=None):
        if batch_sizes is not None:
            return tensors(self.lstm(PackedSequence(x, batch_sizes)))
        return tensors(self.lstm(x, lengths=lengths, resets=resets, return_cell_states="states" in self.asked))


def exported_arguments(asked, n):
    """Tensors for the n-th call, and which of their dimensions change from call to call."""
    if asked == "packed":
        data, batch_sizes, *_ = packed(sorted(ROWS[n], reverse=True))
        return (data, None, None, batch_sizes), ({0: Dim("N")}, None, None, {0: Dim("T")})
    (T, B), steps, rows = SIZES[n], Dim("T", min=1), Dim("B", min=1)
    options = arguments(asked, T, B)
    given = (sequence(T, B), options.get("lengths"), options.get("resets"), None)
    shapes = ({0: steps, 1: rows}, {0: rows}, {0: steps, 1: rows}, None)
    return given, tuple(None if t is None else shape for t, shape in zip(given, shapes, strict=True))


def operators_of(program):
    """The nodes of our operators in the graph and in those inside of it."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    return [node for graph in graphs for node in graph.nodes if str(node.target).startswith("lstm_triton.")]


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@each_input
def test_an_exported_program_runs_on_other_sizes_also_from_a_file(asked, strict):
    module = Exported(SPECS[0 if strict else 1], asked)
    given, shapes = exported_arguments(asked, 0)
    program = torch.export.export(module, given, dynamic_shapes=shapes, strict=strict)
    layers = [node for node in operators_of(program) if "layer" in str(node.target)]
    assert len(layers) == 2  # one a layer, however many steps
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for n in range(len(SIZES)):
        given, _ = exported_arguments(asked, n)
        expected = module(*given)
        for runs in (program, loaded):
            close(runs.module()(*given), expected)


def test_an_exported_program_refuses_lengths_out_of_range():
    module = Exported(STANDARD, ("lengths",))
    given, shapes = exported_arguments(("lengths",), 0)
    program = torch.export.export(module, given, dynamic_shapes=shapes).module()
    x = sequence(5, 2)
    close(program(x, torch.tensor([5, 2]), None, None), module(x, torch.tensor([5, 2])))
    with pytest.raises(ValueError, match="got 6 in row 1"):
        program(x, torch.tensor([5, 6]), None, None)


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("steps", [Dim.STATIC, Dim("T", min=2)], ids=["T fixed", "any T"])
@every_spec
def test_an_exported_program_is_trained_and_saves_nothing_without_gradients(spec, steps, strict, calls):
    module = module_of(spec, num_layers=2, bidirectional=True)
    x = sequence(4, 2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: steps},), strict=strict).module()
    other = x if steps is Dim.STATIC else sequence(7, 2)
    expected = torch.autograd.grad(loss(module(other)), list(module.parameters()))
    close(torch.autograd.grad(loss(program(other)), list(program.parameters())), expected)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with torch.no_grad(), hooks:
        close(program(other), module(other))
    assert not kept


def test_an_exported_program_of_fixed_length_is_pytorchs_alone():
    """As of `torch.nn.LSTM`: what runs it need not know this library."""
    for options in (dict(), dict(coupled=True)):
        module = lstm_triton.LSTM(3, 4, 2, bidirectional=True, batch_first=True, **options)
        program = torch.export.export(module, (torch.randn(2, 5, 3),))
        names = [str(node.target) for node in program.graph.nodes]
        assert not any(name.startswith("lstm_triton") for name in names)
        assert names.count("aten.lstm.input") == 1


# torch.func


@each_asked
@every_spec
def test_grad_and_vjp_are_the_references_gradients(spec, asked):
    module = module_of(spec, **STACK)
    x, options, weights = sequence(5, 3), arguments(asked, 5, 3), parameters_of(module)
    of_x, *of_weights = gradients_by_reference(module, x, **options)

    def scalar(weights, x):
        return loss(functional_call(module, weights, (x,), options))

    found, found_x = grad(scalar, argnums=(0, 1))(weights, x)
    close([found_x, *found.values()], [of_x, *of_weights])
    value, pull_back = vjp(scalar, weights, x)
    close([value], [loss(by_reference(module, x, weights, **options))])
    found, found_x = pull_back(torch.tensor(2.0, dtype=torch.float64))
    close([found_x, *found.values()], [2 * of_x, *(2 * gradient for gradient in of_weights)])


@each_asked
@every_spec
def test_jvp_jacrev_and_jacfwd_are_the_references_jacobian(spec, asked):
    """Of every result, by the input and by a weight."""
    module = module_of(spec, bidirectional=True)
    x, options, weights = sequence(3, 2), arguments(asked, 3, 2), parameters_of(module)

    def run(x, w):
        return tuple(tensors(functional_call(module, weights | dict(weight_hh_l0=w), (x,), options)))

    def wanted(x, w):
        return tuple(by_reference(module, x, weights | dict(weight_hh_l0=w), **options))

    at = (x, weights["weight_hh_l0"])
    expected = plain_jacobian(wanted, at)
    for transform in (jacrev, jacfwd):
        for found, jacobians in zip(transform(run, argnums=(0, 1))(*at), expected, strict=True):
            close(found, jacobians)
    tangents = tuple(torch.randn_like(t) for t in at)
    results, pushed = jvp(run, at, tangents)
    close(results, wanted(*at))
    close(pushed, jvp(wanted, at, tangents)[1])


NESTED = {
    "hessian": hessian,
    "jacfwd of jacrev": lambda f: jacfwd(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jacrev of grad": lambda f: jacrev(grad(f)),
    "jacfwd of grad": lambda f: jacfwd(grad(f)),
}


@pytest.mark.parametrize("nested", NESTED)
@each_asked
@two_specs
def test_every_nesting_is_the_references_hessian(spec, asked, nested):
    module = module_of(spec)
    x, options, weights = sequence(3, 2), arguments(asked, 3, 2), parameters_of(module)
    at = weights["weight_hh_l0"]

    def scalar(w):
        return loss(functional_call(module, weights | dict(weight_hh_l0=w), (x,), options))

    def wanted(w):
        return loss(by_reference(module, x, weights | dict(weight_hh_l0=w), **options))

    close([NESTED[nested](scalar)(at)], [plain_hessian(wanted, at)])


@each_asked
@two_specs
def test_a_gradient_of_a_gradient_is_the_references(spec, asked):
    module = module_of(spec, **STACK)
    x, options, weights = sequence(4, 3), arguments(asked, 4, 3), parameters_of(module)

    def twice(call):
        return grad(lambda weights: loss(grad(lambda x: loss(call(x, weights)))(x)))(weights)

    found = twice(lambda x, weights: functional_call(module, weights, (x,), options))
    expected = twice(lambda x, weights: by_reference(module, x, weights, **options))
    close(found.values(), expected.values())


def by_the_cotangent(transform):
    """The pull-back at x, differentiated by what it is given."""

    def differentiated(f, x, cotangent):
        pull_back = vjp(f, x)[1]
        return transform(lambda cotangent: pull_back(cotangent)[0], cotangent)

    return differentiated


def both_pulled_back(f, x, cotangent):
    return vmap(vjp(f, x)[1])(torch.stack([cotangent, 2 * cotangent]))[0]


LATER = {
    "grad of vjp": lambda f, x, cotangent: grad(lambda x: loss(vjp(f, x)[1](cotangent)))(x),
    "grad by the cotangent": by_the_cotangent(lambda f, cotangent: grad(lambda c: loss(f(c)))(cotangent)),
    "jvp by the cotangent": by_the_cotangent(lambda f, cotangent: jvp(f, (cotangent,), (cotangent,))[1]),
    "vmap of the pull-back": both_pulled_back,
    "grad of vmap of the pull-back": lambda f, x, cotangent: grad(lambda x: loss(both_pulled_back(f, x, cotangent)))(x),
    "grad by the cotangent of vmap": lambda f, x, cotangent: by_the_cotangent(
        lambda f, cotangent: grad(lambda c: loss(f(c)))(cotangent)
    )(vmap(f), torch.stack([x, 2 * x]), torch.stack([cotangent, cotangent])),
}


@pytest.mark.parametrize("later", LATER)
@each_asked
@two_specs
def test_a_pull_back_is_differentiable_after_its_transform_has_ended(spec, asked, later):
    """vjp returns before its backward pass runs, so that the transform that recorded it is no longer there."""
    module = module_of(spec).requires_grad_(False)
    x, options, cotangent = sequence(4, 3), arguments(asked, 4, 3), sequence(4, 3, 4)
    found = LATER[later](lambda x: module(x, **options)[0], x, cotangent)
    close([found], [LATER[later](lambda x: by_reference(module, x, **options)[0], x, cotangent)])


@each_asked
@every_spec
def test_an_ensemble_of_weights_is_each_member_in_turn(spec, asked):
    """Results; gradients by vmap of grad, by grad of vmap and by plain autograd through vmap."""
    members = [module_of(spec, **STACK) for _ in range(3)]
    base, (stacked, _) = members[0], stack_module_state(members)
    x, options = sequence(5, 3), arguments(asked, 5, 3)

    def run(weights):
        return tuple(tensors(functional_call(base, weights, (x,), options)))

    def scalar(weights):
        return loss(run(weights))

    expected = [by_reference(member, x, **options) for member in members]
    close(vmap(run)(stacked), [torch.stack(parts) for parts in zip(*expected, strict=True)])
    by_member = [gradients_by_reference(member, x, **options)[1:] for member in members]
    expected = [torch.stack(parts) for parts in zip(*by_member, strict=True)]
    close(vmap(grad(scalar))(stacked).values(), expected)
    close(grad(lambda weights: vmap(scalar)(weights).sum())(stacked).values(), expected)
    close(torch.autograd.grad(vmap(scalar)(stacked).sum(), list(stacked.values())), expected)


@each_asked
@every_spec
def test_gradients_of_each_row_are_those_of_the_row_alone(spec, asked):
    """As differential privacy takes them: vmap of grad over the rows, each with its own length and resets."""
    module = module_of(spec, **STACK)
    x, weights, options = sequence(5, 4), parameters_of(module), arguments(asked, 5, 4)
    lengths, resets = options.pop("lengths", None), options.pop("resets", None)

    def scalar(weights, row, length, reset):
        own = dict(lengths=None if length is None else length[None], resets=None if reset is None else reset[:, None])
        return loss(functional_call(module, weights, (row[:, None],), own | options))

    dims = (None, 1, None if lengths is None else 0, None if resets is None else 1)
    found = vmap(grad(scalar), in_dims=dims)(weights, x, lengths, resets)
    for b in range(4):
        rows = slice(b, b + 1)
        own = {} if lengths is None else dict(lengths=lengths[rows], resets=resets[:, rows])
        expected = gradients_by_reference(module, x[:, rows], **own, **options)[1:]
        close([gradient[b] for gradient in found.values()], expected)


@each_asked
@two_specs
def test_first_gradients_under_torch_func_are_the_operators_work(spec, asked, calls):
    """Of 2 layers each forward and backward once, for all members of a vmap in one call; never the reference."""
    module = module_of(spec, **STACK)
    x, options, weights = sequence(5, 3), arguments(asked, 5, 3), parameters_of(module)
    stacked = {name: torch.stack([weight, 2 * weight]) for name, weight in weights.items()}

    def scalar(weights):
        return loss(functional_call(module, weights, (x,), options))

    transforms = {
        "grad": lambda: grad(scalar)(weights),
        "vjp": lambda: vjp(scalar, weights)[1](torch.tensor(1.0, dtype=torch.float64)),
        "vmap of grad": lambda: vmap(grad(scalar))(stacked),
        "grad of vmap": lambda: grad(lambda weights: vmap(scalar)(weights).sum())(stacked),
        "jacrev": lambda: jacrev(scalar)(weights),
        "autograd through vmap": lambda: (
            vmap(scalar)({name: weight.clone().requires_grad_() for name, weight in stacked.items()}).sum().backward()
        ),
    }
    for name, transform in transforms.items():
        calls.update(dict.fromkeys(calls, 0))
        transform()
        assert calls["reference"] == calls["aten"] == 0, name
        assert calls["forward"] == calls["backward"] == 2, name
    vmap(lambda weights: functional_call(module, weights, (x,), options)[0])(stacked)
    assert calls["forward"] == 4 and calls["reference"] == 0


@two_specs
def test_vmap_takes_any_dimension_in_chunks_and_in_vmap(spec):
    module = module_of(spec)
    x = torch.randn(5, 4, 2, 3, dtype=torch.float64)  # 5 sequences of 4 steps and 2 rows
    expected = torch.stack([by_reference(module, one)[0] for one in x])

    def run(x):
        return module(x)[0]

    close([vmap(run, chunk_size=2)(x)], [expected])
    close([vmap(run, in_dims=1, out_dims=2)(x.transpose(0, 1))], [expected.movedim(0, 2)])
    close([vmap(vmap(run))(torch.stack([x, -x]))[0]], [expected])


@two_specs
def test_dropout_under_vmap_is_each_members_own_or_the_same(spec):
    module = module_of(spec, num_layers=2, dropout=0.5)
    x = sequence(4, 3).expand(5, 4, 3, 3)
    own, same = (vmap(lambda x: module(x)[0], randomness=how)(x) for how in ("different", "same"))
    assert all(torch.equal(same[0], other) for other in same[1:])
    assert not any(torch.equal(own[0], other) for other in own[1:])
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: module(x)[0])(x)


@two_specs
def test_packed_data_goes_through_torch_func(spec):
    module = module_of(spec, **STACK)
    input = packed((3, 5, 2, 4))
    data, *how = input

    def run(call):
        return lambda data: torch.cat([t.flatten() for t in call(PackedSequence(data, *how))])

    ours, wanted = run(lambda p: in_rows(module(p))), run(lambda p: packed_by_reference(module, p))
    expected = plain_jacobian(wanted, data)
    close([jacrev(ours)(data), jacfwd(ours)(data)], [expected, expected])
    batch = torch.stack([data, -data])
    close([vmap(lambda d: module(PackedSequence(d, *how))[0].data)(batch)[0]], [module(input)[0].data])


@every_spec
def test_a_cell_goes_through_torch_func(spec):
    cell = LSTMCell(3, 4, dtype=torch.float64, **variant(spec))
    x, weights = sequence(2, 3)[0], parameters_of(cell)

    def ours(w, x):
        return loss(functional_call(cell, weights | dict(weight_hh=w), (x,)))

    def wanted(w, x):
        return loss(cell_by_reference(cell, x, weights | dict(weight_hh=w)))

    at = (weights["weight_hh"], x)
    expected = torch.func.grad(wanted, argnums=(0, 1))(*at)
    close(grad(ours, argnums=(0, 1))(*at), expected)
    close([jvp(ours, at, at)[1]], [sum((a * b).sum() for a, b in zip(at, expected, strict=True))])
    expected = plain_hessian(lambda x: wanted(at[0], x), x)
    for nested in NESTED.values():
        close([nested(lambda x: ours(at[0], x))(x)], [expected])
    stacked, _ = stack_module_state(cells := [LSTMCell(3, 4, dtype=torch.float64, **variant(spec)) for _ in range(3)])
    results = vmap(lambda weights: functional_call(cell, weights, (x,)))(stacked)
    close(results, [torch.stack(member) for member in zip(*[c(x) for c in cells], strict=True)])
    found = vmap(grad(lambda weights: loss(functional_call(cell, weights, (x,)))))(stacked)
    for n, member in enumerate(cells):
        expected = torch.autograd.grad(loss(cell_by_reference(member, x)), list(member.parameters()))
        close([gradient[n] for gradient in found.values()], expected)


@each_asked
@every_spec
def test_forward_mode_works_on_a_module_in_training_and_over_reverse(spec, asked):
    """`forward_ad` without torch.func; parameters that require gradients do not hinder it."""
    module = module_of(spec)
    x, tangent, options = sequence(4, 3), sequence(4, 3), arguments(asked, 4, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.clone().requires_grad_(), tangent)
        result = module(dual, **options)
        pushed = forward_ad.unpack_dual(tensors(result)[0]).tangent
        (gradient,) = torch.autograd.grad(loss(result), dual)
        of_gradient = forward_ad.unpack_dual(gradient).tangent
    expected = jvp(lambda x: by_reference(module, x, **options)[0], (x,), (tangent,))[1]
    close([pushed], [expected])
    expected = jvp(grad(lambda x: loss(by_reference(module, x, **options))), (x,), (tangent,))[1]
    close([of_gradient], [expected])


@two_specs
def test_a_backward_pass_loses_no_tangent_of_its_gradient(spec):
    """The forward pass was recorded outside of forward mode."""
    module = module_of(spec)
    x, cotangent, tangent = sequence(4, 3, requires_grad=True), sequence(4, 3, 4), sequence(4, 3, 4)
    output = module(x)[0]
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(output, x, forward_ad.make_dual(cotangent, tangent))
        found = forward_ad.unpack_dual(gradient).tangent
    close([found], torch.autograd.grad(by_reference(module, x)[0], x, tangent))


@two_specs
def test_forward_mode_is_the_references_work_also_where_the_torch_backend_is_asked_for(spec, calls):
    module, x = module_of(spec), sequence(4, 2)
    with lstm_triton.backend("torch"):
        jvp(lambda x: module(x)[0], (x,), (x,))
    assert calls == dict(forward=0, backward=0, reference=1, aten=0)


# Second gradients


@pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)
def test_second_gradients_with_lengths_resets_and_cell_states_are_the_differences(spec):
    module = module_of(spec, bidirectional=True)
    options = arguments(EVERYTHING, 3, 2)
    names = [name for name, _ in module.named_parameters()]
    inputs = [sequence(3, 2), torch.randn(2, 2, 4, dtype=torch.float64), torch.randn(2, 2, 4, dtype=torch.float64)]
    inputs = [t.detach().requires_grad_() for t in (*inputs, *module.parameters())]

    def run(x, h_0, c_0, *weights):
        return tuple(tensors(functional_call(module, dict(zip(names, weights, strict=True)), (x, (h_0, c_0)), options)))

    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@two_specs
def test_second_gradients_of_a_packed_sequence_are_the_differences(spec):
    module = module_of(spec, bidirectional=True)
    data, *how = packed((2, 3, 1))

    def run(data, *weights):
        named = dict(zip(dict(module.named_parameters()), weights, strict=True))
        return tuple(tensors(functional_call(module, named, (PackedSequence(data, *how),))))

    inputs = [t.detach().requires_grad_() for t in (data, *module.parameters())]
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


# Checkpoint, inference, deterministic and anomaly mode


@each_input
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
@two_specs
def test_a_checkpoint_changes_no_gradient_and_draws_the_same_dropout(spec, reentrant, asked):
    module = module_of(spec, **STACK, dropout=0.5)
    if asked == "packed":
        x, *how = packed((3, 5, 2, 4))
        options = {}
    else:
        x, how, options = sequence(5, 4), None, arguments(asked, 5, 4)

    def run(x):
        return tuple(tensors(module(x if how is None else PackedSequence(x, *how), **options)))

    plain, again = with_and_without_checkpoint(module, run, x, reentrant)
    close(again, plain, 0)


@each_asked
@two_specs
def test_inference_mode_and_no_grad_record_nothing(spec, asked):
    module = module_of(spec, **STACK)
    x, options = sequence(5, 3), arguments(asked, 5, 3)
    expected = by_reference(module, x, **options)
    with torch.no_grad():
        without = tensors(module(x, **options))
    with torch.inference_mode():
        inferred = tensors(module(x, **options))
        own = tensors(module(x.clone(), **options))
    for found in (without, inferred, own):
        assert not any(t.requires_grad for t in found)
        close(found, expected)
    assert all(t.is_inference() for t in (*inferred, *own)) and not any(t.is_inference() for t in without)
    with pytest.raises(RuntimeError, match="nference tensor"):
        inferred[0].mul(torch.ones((), requires_grad=True))
    loss(module(x, **options)).backward()  # the module is as it was
    assert all(p.grad is not None for p in module.parameters())


def test_an_inference_tensor_is_no_input_for_training():
    """As for `torch.nn.LSTM`; an error, not a wrong gradient."""
    with torch.inference_mode():
        x = sequence(5, 3)
    for module in (torch.nn.LSTM(3, 4, dtype=torch.float64), *(module_of(spec) for spec in SPECS)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            module(x)


@every_spec
def test_deterministic_algorithms_are_enough(spec):
    """Nothing that PyTorch refuses in deterministic mode, and the same bits twice."""
    module = module_of(spec, **STACK)
    x, options, input = sequence(5, 3), arguments(EVERYTHING, 5, 3), packed((3, 5, 2))
    torch.use_deterministic_algorithms(True)
    runs = []
    for _ in range(2):
        results = [*tensors(module(x)), *tensors(module(x, **options)), *tensors(module(input))]
        runs.append([*results, *torch.autograd.grad(loss(results), list(module.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@each_asked
@every_spec
def test_anomaly_mode_finds_nothing_wrong_and_names_our_function_where_it_is(spec, asked):
    """The standard variant is PyTorch's own LSTM, and what is named is what is named there."""
    module = module_of(spec)
    x, options = sequence(4, 3, requires_grad=True), arguments(asked, 4, 3)
    with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
        warnings.simplefilter("always")
        loss(module(x, **options)).backward()
        close([x.grad], gradients_by_reference(module, x, **options)[:1])
        output = module(x, **options)[0]
        with pytest.raises(RuntimeError) as found:
            output.backward(torch.full_like(output, torch.nan))
        if spec.standard and not asked:
            theirs = torch.nn.LSTM(3, 4, dtype=torch.float64)(x)[0]
            with pytest.raises(RuntimeError) as wanted:
                theirs.backward(torch.full_like(theirs, torch.nan))
            assert str(found.value) == str(wanted.value)
        else:
            assert "'LSTMLayerFunctionBackward' returned nan values" in str(found.value)
    traces = [str(warning.message) for warning in caught if "Traceback of forward call" in str(warning.message)]
    assert "output = module(x, **options)[0]" in traces[0]


# Hooks


@every_spec
def test_hooks_before_and_after_forward_see_and_change_what_rows_are_given(spec):
    module = module_of(spec)
    x, options = sequence(5, 3), arguments(EVERYTHING, 5, 3)
    shorter = options | dict(lengths=(options["lengths"] - 1).clamp_min(1))
    seen = []

    def before(module, args, kwargs):
        seen.append(sorted(kwargs))
        return args, kwargs | dict(lengths=shorter["lengths"])

    def after(module, args, kwargs, result):
        seen.append(torch.equal(kwargs["lengths"], shorter["lengths"]))
        return result[0] * 2, *result[1:]

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    output, *rest = by_reference(module, x, **shorter)
    close(tensors(module(x, **options)), [2 * output, *rest])
    assert seen == [["lengths", "resets", "return_cell_states"], True]
    for handle in handles:
        handle.remove()
    close(tensors(module(x, **options)), by_reference(module, x, **options))


@each_asked
@every_spec
def test_backward_hooks_see_and_change_the_gradients(spec, asked):
    """Of the module, of its results, and of each parameter when its gradient is there."""
    module = module_of(spec, **STACK)
    x, options = sequence(5, 3, requires_grad=True), arguments(asked, 5, 3)
    plain = gradients_by_reference(module, x, **options)
    seen = []
    handles = [
        module.register_full_backward_pre_hook(lambda _, grads: seen.append(("pre", grads[0])) or None),
        module.register_full_backward_hook(
            lambda _, inputs, outputs: seen.append(("full", inputs[0], outputs[0])) or (3 * inputs[0],)
        ),
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
        for name, parameter in module.named_parameters()
    ]
    result = module(x, **options)
    for t in tensors(result):
        t.register_hook(lambda gradient: seen.append(("result", gradient)) or 2 * gradient)
    loss(result).backward()
    assert [name for name, *_ in seen].count("result") == len(tensors(result))
    (of_output,) = [gradient for name, *gradient in seen if name == "pre"]
    ((of_input, again),) = [gradients for name, *gradients in seen if name == "full"]
    assert torch.equal(of_output[0], again)
    close([of_input, x.grad], [2 * plain[0], 6 * plain[0]])
    found = {name: gradient for name, *rest in seen if name in dict(module.named_parameters()) for gradient in rest}
    close([found[name] for name, _ in module.named_parameters()], [2 * gradient for gradient in plain[1:]])
    for handle in handles:
        handle.remove()


@each_input
@every_spec
def test_saved_tensors_may_be_kept_elsewhere(spec, asked):
    """saved_tensors_hooks and save_on_cpu, which is made of them."""
    module = module_of(spec, **STACK)
    if asked == "packed":
        input, options = packed((3, 5, 2)), {}
    else:
        input, options = sequence(5, 3), arguments(asked, 5, 3)
    away = []

    def unpack(n):
        return away[n]

    def pack(t):
        away.append(t.clone())
        return len(away) - 1

    places = (
        contextlib.nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        torch.autograd.graph.save_on_cpu(),
    )
    found = []
    for place in places:
        with place:
            scalar = loss(module(input, **options))
        found.append(torch.autograd.grad(scalar, list(module.parameters())))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    shapes = {tuple(t.shape) for t in away}
    if spec.peephole:  # of PyTorch's own operator it is PyTorch's affair what is saved
        assert {tuple(p.shape) for p in module.parameters() if p.dim() > 1} <= shapes
    assert len(shapes) > 1


@every_spec
def test_a_weight_that_layers_share_gets_the_sum_of_their_gradients(spec):
    module = module_of(spec, num_layers=3)
    module.weight_hh_l1 = module.weight_hh_l2 = module.weight_hh_l0
    x, options = sequence(5, 3), arguments(EVERYTHING, 5, 3)
    names = list(dict(module.named_parameters(remove_duplicate=False)))
    weights = {name: getattr(module, name).detach().clone().requires_grad_() for name in names}
    own = torch.autograd.grad(loss(by_reference(module, x, weights, **options)), list(weights.values()))
    loss(module(x, **options)).backward()
    by_name = dict(zip(names, own, strict=True))
    close([module.weight_hh_l0.grad], [sum(by_name[f"weight_hh_l{n}"] for n in range(3))])
    close([module.weight_ih_l2.grad], [by_name["weight_ih_l2"]])
    assert len(list(module.parameters())) == len(names) - 2


# Autocast


@each_input
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@every_spec
def test_autocast_gives_results_of_its_type_and_gradients_of_the_parameters(spec, dtype, asked):
    module, exact = module_of(spec, dtype=torch.float32, **STACK), module_of(spec, **STACK)
    exact.load_state_dict(module.state_dict())
    if asked == "packed":
        input, options = packed((3, 5, 2), dtype=torch.float32), {}
    else:
        input, options = sequence(5, 3, dtype=torch.float32), arguments(asked, 5, 3)
    with torch.autocast("cpu", dtype):
        result = module(input, **options)
    assert {t.dtype for t in tensors(result)} == {dtype}
    wanted = exact(input.double() if asked != "packed" else input.to(torch.float64), **options)
    tolerance = 0.01 if dtype == torch.float16 else 0.05
    close([t.double() for t in tensors(result)], tensors(wanted), tolerance)
    loss([t.double() for t in tensors(result)]).backward()
    loss(wanted).backward()
    for parameter, other in zip(module.parameters(), exact.parameters(), strict=True):
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad - other.grad).norm() <= 10 * tolerance * other.grad.norm()


@every_spec
def test_autocast_ends_where_it_is_switched_off_and_leaves_float64_alone(spec):
    module, double = module_of(spec, dtype=torch.float32), module_of(spec)
    cell = LSTMCell(3, 4, **variant(spec))
    x, options = sequence(5, 3, dtype=torch.float32), arguments(EVERYTHING, 5, 3)
    plain, plain_step = tensors(module(x, **options)), cell(x[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in cell(x[0])} == {torch.bfloat16}
        with torch.autocast("cpu", enabled=False):
            nested, step = tensors(module(x, **options)), cell(x[0])
        exact = tensors(double(x.double(), **options))
    assert all(torch.equal(a, b) for a, b in zip((*nested, *step), (*plain, *plain_step), strict=True))
    close(exact, by_reference(double, x.double(), **options))


@two_specs
def test_a_scaler_of_gradients_steps_by_the_unscaled_and_skips_what_is_not_finite(spec):
    module = module_of(spec, dtype=torch.float32)
    optimizer, lr = torch.optim.SGD(module.parameters(), lr=0.5), 0.5
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, options = sequence(5, 3, dtype=torch.float32), arguments(EVERYTHING, 5, 3)

    def step(factor):
        """How far each parameter went, and its gradient without the scaler."""
        before = [p.detach().clone() for p in module.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            scalar = factor * loss([t.float() for t in tensors(module(x, **options))])
        plain = torch.autograd.grad(scalar, list(module.parameters()), retain_graph=True)
        scaler.scale(scalar).backward()
        scaler.step(optimizer)
        scaler.update()
        return [p.detach() - old for p, old in zip(module.parameters(), before, strict=True)], plain

    went, plain = step(1.0)
    close(went, [-lr * gradient for gradient in plain], 5e-3)
    went, _ = step(torch.inf)
    assert not any(distance.any() for distance in went) and scaler.get_scale() == 512.0


# torch.jit.trace


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_a_traced_module_of_the_standard_variant_runs_on_other_sizes_also_from_a_file(training):
    module = module_of(STANDARD, **STACK).train(training)
    hx = [torch.randn(4, 4, 4, dtype=torch.float64) for _ in range(2)]
    traced = torch.jit.trace(module, (sequence(6, 4), tuple(hx)))
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for runs, (T, B) in itertools.product((traced, torch.jit.load(file)), SIZES):
        x = sequence(T, B, requires_grad=True)
        zeros = torch.zeros(4, B, 4, dtype=torch.float64)
        result = runs(x, (zeros, zeros))
        close(tensors(result), by_reference(module, x))
        runs.zero_grad()
        loss(result).backward()
        close([x.grad, *(p.grad for p in runs.parameters())], gradients_by_reference(module, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_module_and_cell_start_from_zeros_of_the_size_of_the_call():
    module, cell = module_of(STANDARD), LSTMCell(3, 4, dtype=torch.float64)
    traced, traced_cell = torch.jit.trace(module, (sequence(6, 4),)), torch.jit.trace(cell, (sequence(6, 4)[0],))
    for T, B in SIZES:
        x = sequence(T, B)
        close(tensors(traced(x)), by_reference(module, x))
        close(traced_cell(x[0]), cell_by_reference(cell, x[0]))
