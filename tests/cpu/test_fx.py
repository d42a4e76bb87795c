"""torch.fx: the modules are leaves of the graph, as PyTorch's own are, whatever tracer is at work."""

import copy
import operator
import pickle

import pytest
import torch
from torch import fx, nn

import lstm_triton
from lstm_triton import VARIANTS, CoupledLSTM, PeepholeLSTM
from tests.support.composes import variant

T, B = 5, 2
LIBRARIES = pytest.mark.parametrize("library", [nn, lstm_triton], ids=["torch.nn", "lstm_triton"])
every_variant = pytest.mark.parametrize("spec", VARIANTS, ids=lambda spec: spec.name)


class Encoder(nn.Module):
    """A layer and a cell in a model, with states given or not."""

    def __init__(self, library, states, **options):
        super().__init__()
        self.states = states
        self.layer = library.LSTM(3, 4, 2, bidirectional=True, **options)
        self.cell = library.LSTMCell(8, 4, **options)
        self.head = nn.Linear(4, 2)

    def forward(self, x, h_0, c_0):
        output, (h_n, c_n) = self.layer(x, (h_0, c_0)) if self.states else self.layer(x)
        h, c = self.cell(output[-1], (h_n[0], c_n[0])) if self.states else self.cell(output[-1])
        return self.head(h) + c.sum(), output


class Ragged(nn.Module):
    """What a call may ask for beside PyTorch's arguments."""

    def __init__(self, **options):
        super().__init__()
        self.layer = lstm_triton.LSTM(3, 4, **options)

    def forward(self, x, lengths, resets):
        output, (h_n, _), cells = self.layer(x, lengths=lengths, resets=resets, return_cell_states=True)
        return output.tanh(), h_n, cells


class Constant(nn.Module):
    """An input that is no proxy, states that are."""

    def __init__(self, library):
        super().__init__()
        self.layer, self.cell = library.LSTM(3, 4), library.LSTMCell(3, 4)

    def forward(self, h, c):
        output, states = self.layer(torch.ones(T, B, 3), (h[None], c[None]))
        return output, states, self.cell(torch.ones(B, 3), [h, c])


class NoLeaves(fx.Tracer):
    """Looks into everything that it can, but for linear layers."""

    def is_leaf_module(self, m, qualified_name):
        return isinstance(m, nn.Linear)


def tensors():
    torch.manual_seed(1)
    return torch.randn(T, B, 3), torch.randn(4, B, 4), torch.randn(4, B, 4)


def nodes(graph):
    """As PyTorch's and ours can be compared."""
    return [(n.op, n.target, len(n.args), tuple(n.kwargs)) for n in graph.nodes]


def modules_called(graph):
    return [node.target for node in graph.nodes if node.op == "call_module"]


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def same(actual, expected):
    assert all(torch.equal(a, b) for a, b in zip(flat(actual), flat(expected), strict=True))


@pytest.mark.parametrize("states", [True, False], ids=["states given", "zero states"])
@every_variant
def test_a_traced_model_calls_the_modules_and_computes_the_same(spec, states):
    model = Encoder(lstm_triton, states, **variant(spec))
    traced = fx.symbolic_trace(model)
    assert nodes(traced.graph) == nodes(fx.symbolic_trace(Encoder(nn, states)).graph)
    assert modules_called(traced.graph) == ["layer", "cell", "head"]
    assert traced.layer is model.layer and traced.cell is model.cell
    given = tensors()
    same(traced(*given), model(*given))
    other = torch.randn(2, 3, 3), torch.randn(4, 3, 4), torch.randn(4, 3, 4)
    same(traced(*other), model(*other))


@every_variant
def test_what_a_call_asks_for_beside_is_in_the_graph(spec):
    model = Ragged(**variant(spec))
    traced = fx.symbolic_trace(model)
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert list(node.kwargs) == ["lengths", "resets", "return_cell_states"]
    resets = torch.arange(T * B).view(T, B) % 3 == 0
    for lengths in (torch.tensor([5, 2]), torch.tensor([1, 4])):
        given = tensors()[0], lengths, resets
        same(traced(*given), model(*given))
    with pytest.raises(ValueError, match="lengths must be"):
        traced(tensors()[0], torch.tensor([9, 1]), resets)


@LIBRARIES
def test_states_alone_may_be_traced(library):
    model = Constant(library)
    traced = fx.symbolic_trace(model)
    assert modules_called(traced.graph) == ["layer", "cell"]
    given = torch.randn(2, B, 4).unbind()
    same(traced(*given), model(*given))


@every_variant
def test_a_traced_model_is_trained(spec):
    model = Encoder(lstm_triton, True, **variant(spec))
    traced, given = fx.symbolic_trace(model), tensors()
    expected = torch.autograd.grad(model(*given)[0].sum(), list(model.parameters()))
    same(torch.autograd.grad(traced(*given)[0].sum(), list(traced.parameters())), expected)


@pytest.mark.parametrize("how", ["pickle", "copy"])
@every_variant
def test_a_traced_model_is_pickled_and_copied(spec, how):
    model = Encoder(lstm_triton, True, **variant(spec))
    traced = fx.symbolic_trace(model)
    other = pickle.loads(pickle.dumps(traced)) if how == "pickle" else copy.deepcopy(traced)
    given = tensors()
    same(other(*given), model(*given))
    assert other.layer is not model.layer and type(other.layer) is lstm_triton.LSTM
    assert list(other.state_dict()) == list(traced.state_dict())


@every_variant
def test_another_tracer_finds_the_same_leaves(spec):
    model = Encoder(lstm_triton, True, **variant(spec))
    graph = NoLeaves().trace(model)
    assert modules_called(graph) == ["layer", "cell", "head"]
    given = tensors()
    same(fx.GraphModule(model, graph)(*given), model(*given))


def test_a_traced_model_is_traced_and_transformed_again():
    model, given = Encoder(lstm_triton, True, coupled=True), tensors()
    again = fx.symbolic_trace(fx.symbolic_trace(model))
    transformed = fx.Transformer(again).transform()
    for traced in (again, transformed):
        assert modules_called(traced.graph) == ["layer", "cell", "head"]
        same(traced(*given), model(*given))
    same(fx.Interpreter(again).run(*given), model(*given))


def test_a_graph_is_changed_around_the_modules():
    """As quantizers and profilers do."""
    model, (x, *states) = Encoder(lstm_triton, True), tensors()
    traced = fx.symbolic_trace(model)
    node = next(node for node in traced.graph.nodes if node.target == "layer")
    assert isinstance(traced.get_submodule(node.target), lstm_triton.LSTM)
    with traced.graph.inserting_before(node):
        node.replace_input_with(node.args[0], traced.graph.call_function(operator.mul, (node.args[0], 2)))
    traced.recompile()
    same(traced(x, *states), model(2 * x, *states))


@pytest.mark.parametrize("kind", [CoupledLSTM, PeepholeLSTM])
def test_subclasses_and_sequences_of_modules_are_leaves(kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([kind(3, 3) for _ in range(2)])

        def forward(self, x):
            for layer in self.layers:
                x, _ = layer(x)
            return x

    model = Model()
    traced = fx.symbolic_trace(model)
    assert modules_called(traced.graph) == ["layers.0", "layers.1"]
    same(traced(tensors()[0]), model(tensors()[0]))


@LIBRARIES
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_a_module_that_is_traced_itself_is_a_trace_error(library, kind):
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(getattr(library, kind)(3, 4))
    if library is lstm_triton:
        with pytest.raises(fx.proxy.TraceError, match=f"trace a module that holds the {kind}$"):
            NoLeaves().trace(getattr(library, kind)(3, 4))
